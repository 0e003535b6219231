"""The rule by which models share the memory for experts."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from argosy.budget.shares import Claim, divide


def claim(
    most_slots: int, *, num_slots: int = 0, slot_bytes: int = 10, used_at: float = 0.0, in_use: bool
) -> Claim:
    return Claim(
        slot_bytes=slot_bytes, most_slots=most_slots, num_slots=num_slots, used_at=used_at, is_in_use=in_use
    )


def test_models_in_use_have_equal_shares() -> None:
    assert divide(600, [claim(100, in_use=True), claim(100, in_use=True), claim(100, in_use=True)]) == [
        20,
        20,
        20,
    ]
    halves = divide(600, [claim(100, in_use=True), claim(100, slot_bytes=30, in_use=True)])
    assert halves == [30, 10]  # of bytes, whatever an expert takes


def test_what_a_small_model_leaves_goes_to_the_others() -> None:
    assert divide(600, [claim(100, in_use=True), claim(5, in_use=True), claim(100, in_use=True)]) == [
        27,
        5,
        28,
    ]
    assert divide(600, [claim(7, in_use=True), claim(5, in_use=True)]) == [7, 5]


def test_an_idle_model_keeps_its_experts_until_another_needs_the_memory() -> None:
    idle = claim(100, num_slots=40, in_use=False)
    assert divide(600, [idle, claim(20, in_use=True)]) == [40, 20]
    assert divide(600, [idle, claim(30, in_use=True)]) == [30, 30]
    assert divide(600, [idle, claim(100, in_use=True)]) == [0, 60]


def test_the_idle_model_that_was_used_last_keeps_most() -> None:
    older = claim(100, num_slots=40, used_at=1.0, in_use=False)
    newer = claim(100, num_slots=40, used_at=2.0, in_use=False)
    assert divide(600, [older, newer, claim(15, in_use=True)]) == [5, 40, 15]


CLAIMS = st.lists(
    st.builds(
        Claim,
        slot_bytes=st.integers(1, 50),
        most_slots=st.integers(0, 200),
        num_slots=st.integers(0, 200),
        used_at=st.floats(0, 1e6),
        is_in_use=st.booleans(),
    ),
    max_size=6,
)


@given(st.integers(0, 10_000), CLAIMS)
def test_shares_never_exceed_what_there_is(free_bytes: int, claims: list[Claim]) -> None:
    slots = divide(free_bytes, claims)
    assert sum(num * one.slot_bytes for num, one in zip(slots, claims, strict=True)) <= free_bytes
    for num, one in zip(slots, claims, strict=True):
        assert 0 <= num <= (one.most_slots if one.is_in_use else one.num_slots)


@given(st.integers(0, 10_000), CLAIMS)
def test_models_in_use_go_without_only_if_all_is_theirs(free_bytes: int, claims: list[Claim]) -> None:
    both = list(zip(divide(free_bytes, claims), claims, strict=True))
    theirs = [(num, one) for num, one in both if one.is_in_use]
    if any(num < one.most_slots for num, one in theirs):
        left_bytes = free_bytes - sum(num * one.slot_bytes for num, one in theirs)
        assert left_bytes < sum(one.slot_bytes for _, one in theirs)  # each share is a whole number of slots
