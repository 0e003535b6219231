"""Limits of a key: requests a minute, requests at once, tokens a day."""

from __future__ import annotations

from dataclasses import replace

import pytest

from argosy.guard.keys import LOCAL, Key
from argosy.guard.limits import Limits, TooMany


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def key(**limits: int) -> Key:
    return replace(LOCAL, id="k", **limits)  # type: ignore[arg-type]


def refused_for(limits: Limits, one: Key) -> int:
    with pytest.raises(TooMany) as caught:
        limits.begin(one)
    return caught.value.retry_after_s


def test_a_minute_s_requests_may_come_at_once_and_then_as_the_minute_passes(clock: Clock) -> None:
    limits, one = Limits(clock), key(requests_per_minute=3)
    for _ in range(3):
        limits.begin(one)
        limits.end(one, 0)
    assert refused_for(limits, one) == 20
    clock.now += 19.9
    assert refused_for(limits, one) == 1
    clock.now += 0.2
    limits.begin(one)


def test_no_more_requests_run_at_once_than_may(clock: Clock) -> None:
    limits, one = Limits(clock), key(concurrent_requests=2)
    limits.begin(one)
    limits.begin(one)
    refused_for(limits, one)
    limits.end(one, 5)
    limits.begin(one)


def test_a_day_s_tokens_end_with_the_answer_that_uses_them_up(clock: Clock) -> None:
    limits, one = Limits(clock), key(tokens_per_day=100)
    limits.begin(one)
    limits.end(one, 99)
    limits.begin(one)
    limits.end(one, 50)
    clock.now += 3600
    assert refused_for(limits, one) == 86_400 - 3600
    clock.now += 86_400 - 3600
    limits.begin(one)


def test_a_refused_request_uses_nothing_and_keys_do_not_share(clock: Clock) -> None:
    limits, one = Limits(clock), key(concurrent_requests=1, requests_per_minute=2)
    limits.begin(one)
    for _ in range(5):
        refused_for(limits, one)
    limits.end(one, 0)
    limits.begin(one)  # the second of the minute
    limits.begin(replace(one, id="other"))


def test_a_key_without_limits_is_never_refused(clock: Clock) -> None:
    limits, one = Limits(clock), key()
    for _ in range(1000):
        limits.begin(one)
        limits.end(one, 10**6)
