"""The rule by which models share the memory for experts."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from argosy.budget.shares import Demand, divide


def claim(most_bytes: int, *, held_bytes: int = 0, used_at: float = 0.0, in_use: bool) -> Demand:
    return Demand(most_bytes=most_bytes, held_bytes=held_bytes, used_at=used_at, is_in_use=in_use)


def test_models_in_use_have_equal_shares() -> None:
    assert divide(600, [claim(1000, in_use=True), claim(1000, in_use=True), claim(1000, in_use=True)]) == [
        200,
        200,
        200,
    ]


def test_what_a_small_model_leaves_goes_to_the_others() -> None:
    assert divide(600, [claim(1000, in_use=True), claim(50, in_use=True), claim(1000, in_use=True)]) == [
        275,
        50,
        275,
    ]
    assert divide(600, [claim(70, in_use=True), claim(50, in_use=True)]) == [70, 50]


def test_an_idle_model_keeps_its_experts_until_another_needs_the_memory() -> None:
    idle = claim(1000, held_bytes=400, in_use=False)
    assert divide(600, [idle, claim(200, in_use=True)]) == [400, 200]
    assert divide(600, [idle, claim(300, in_use=True)]) == [300, 300]
    assert divide(600, [idle, claim(1000, in_use=True)]) == [0, 600]


def test_the_idle_model_that_was_used_last_keeps_most() -> None:
    older = claim(1000, held_bytes=400, used_at=1.0, in_use=False)
    newer = claim(1000, held_bytes=400, used_at=2.0, in_use=False)
    assert divide(600, [older, newer, claim(150, in_use=True)]) == [50, 400, 150]


CLAIMS = st.lists(
    st.builds(
        Demand,
        most_bytes=st.integers(0, 5000),
        held_bytes=st.integers(0, 5000),
        used_at=st.floats(0, 1e6),
        is_in_use=st.booleans(),
    ),
    max_size=6,
)


@given(st.integers(0, 10_000), CLAIMS)
def test_shares_never_exceed_what_there_is(free_bytes: int, claims: list[Demand]) -> None:
    shares = divide(free_bytes, claims)
    assert sum(shares) <= free_bytes
    for share, one in zip(shares, claims, strict=True):
        assert 0 <= share <= (one.most_bytes if one.is_in_use else one.held_bytes)


@given(st.integers(0, 10_000), CLAIMS)
def test_models_in_use_go_without_only_if_all_is_theirs(free_bytes: int, claims: list[Demand]) -> None:
    both = list(zip(divide(free_bytes, claims), claims, strict=True))
    theirs = [(share, one) for share, one in both if one.is_in_use]
    if any(share < one.most_bytes for share, one in theirs):
        assert sum(share for share, _ in theirs) == free_bytes
