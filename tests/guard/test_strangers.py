"""Requests without a valid key are limited by address, and addresses of this machine are not."""

from __future__ import annotations

import pytest

from argosy.guard.buckets import MOST_NAMES
from argosy.guard.strangers import PER_MINUTE, Stranger, Strangers


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def num_until_refused(strangers: Strangers, *addresses: str, most: int = 3 * PER_MINUTE) -> int:
    """How many requests from these addresses in turn are counted before one is limited."""
    for number in range(most):
        try:
            strangers.count(addresses[number % len(addresses)])
        except Stranger:
            return number
    return most


def test_an_address_that_goes_on_is_limited_until_time_has_passed() -> None:
    clock = Clock()
    strangers = Strangers(clock)
    assert num_until_refused(strangers, "192.0.2.1") == PER_MINUTE
    with pytest.raises(Stranger) as raised:
        strangers.count("192.0.2.1")
    assert 1 <= raised.value.retry_after_s <= 2
    strangers.count("192.0.2.2")
    clock.now += 2 * raised.value.retry_after_s
    strangers.count("192.0.2.1")
    clock.now += 3600
    assert num_until_refused(strangers, "192.0.2.1") == PER_MINUTE


def test_a_network_of_ipv6_counts_as_one_address_and_a_mapped_one_as_ipv4() -> None:
    assert num_until_refused(Strangers(Clock()), "2001:db8::1", "2001:db8::2") == PER_MINUTE
    assert num_until_refused(Strangers(Clock()), "2001:db8::1", "2001:db8:0:1::1") == 2 * PER_MINUTE
    assert num_until_refused(Strangers(Clock()), "192.0.2.1", "::ffff:192.0.2.1") == PER_MINUTE


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1", "unix", "", "x" * 999]
)
def test_addresses_of_this_machine_are_not_limited(address: str) -> None:
    assert num_until_refused(Strangers(Clock()), address) == 3 * PER_MINUTE


def test_the_number_of_remembered_addresses_is_bounded() -> None:
    strangers = Strangers(Clock())
    for number in range(MOST_NAMES + 100):
        strangers.count(f"10.{number >> 16}.{(number >> 8) & 255}.{number & 255}")
    assert len(strangers._buckets._left) == MOST_NAMES
    assert num_until_refused(strangers, "10.0.0.0") == PER_MINUTE  # forgotten, so it begins again
