"""Predicted hit rates are those of the engine's own cache, replayed on routing with several kinds of locality."""

from __future__ import annotations

import itertools

import pytest

from argosy.experts.hit_rate import PRIOR_ERROR, RECORDED_ERROR, WorkingSet, typical_hit_rate
from hit_rate import replayed, working_set
from replay import Argosy, Lru, Trace, synthetic

KINDS = {
    "as fitted": {},
    "one subject": {"document": 0.6, "popular": 0.1, "drifting": 0.2},
    "popular experts": {"document": 0.2, "popular": 0.5, "drifting": 0.1},
    "six subjects": {"document": 0.5, "num_documents": 6},
}


def slots(trace: Trace, percent: float) -> int:
    return round(trace.num_layers * trace.num_experts * percent / 100)


@pytest.mark.parametrize("kind", KINDS)
def test_the_cache_hits_as_often_as_predicted(kind: str) -> None:
    trace = synthetic(kind, num_layers=8, **KINDS[kind])
    found = working_set(trace)
    for percent in (6, 12, 25, 37, 50, 75):
        num_slots = slots(trace, percent)
        assert found.hit_rate(num_slots) == pytest.approx(
            replayed(Argosy, num_slots, trace), abs=RECORDED_ERROR
        )
    assert found.error == RECORDED_ERROR


def test_a_global_lru_never_hits_below_the_experts_of_one_token() -> None:
    trace = synthetic("as fitted", num_layers=8)
    found = working_set(trace)
    one_layer = trace.experts_per_token
    others = (trace.num_layers - 1) * one_layer  # fill the cache before a layer has its next turn

    assert found.lru_hit_rate(others) == replayed(Lru, others, trace) == 0.0
    assert found.lru_hit_rate(others + one_layer) == pytest.approx(
        replayed(Lru, others + one_layer, trace), abs=0.05
    )
    # The engine's cache keeps some experts of each layer instead.
    assert found.hit_rate(others) > 0.3
    assert replayed(Argosy, others, trace) > 0.3


def test_more_slots_never_hit_less_and_all_of_them_always() -> None:
    found = working_set(synthetic("as fitted", num_layers=4))
    for one in (found, WorkingSet.prior(range(4), num_experts=64, experts_per_token=6)):
        rates = [one.hit_rate(num_slots) for num_slots in range(1, 4 * 64 + 1)]
        assert all(left <= right + 1e-9 for left, right in itertools.pairwise(rates))
        assert 0 <= rates[0] < 0.1
        assert rates[-1] == 1.0


def test_several_sequences_lie_between_one_subject_and_unrelated_ones() -> None:
    alone = working_set(synthetic("as fitted", num_layers=8, num_tokens=400))
    together = synthetic("as fitted", num_layers=8, num_tokens=80, num_sequences=4)
    alike, unrelated = alone.of_streams(4)
    asked = sum(len(layer) for token in together.answer for layer in token) / (8 * len(together.answer))

    assert alike.distinct_in(1).mean() < asked < unrelated.distinct_in(1).mean()
    for percent in (12, 25, 50):
        num_slots = slots(together, percent)
        rate = replayed(Argosy, num_slots, together)
        assert unrelated.hit_rate(num_slots) < rate < alike.hit_rate(num_slots) + 0.03
        assert rate < alone.hit_rate(num_slots)


@pytest.mark.parametrize(
    ("num_experts", "experts_per_token", "published"),
    [(384, 8, {0.06: 0.35, 0.12: 0.57, 0.25: 0.70, 0.50: 0.89}), (8, 2, {0.5: 0.464, 0.75: 0.71})],
)
def test_a_prior_gives_the_published_rates(
    num_experts: int, experts_per_token: int, published: dict[float, float]
) -> None:
    prior = WorkingSet.prior(range(10), num_experts=num_experts, experts_per_token=experts_per_token)
    for share, rate in published.items():
        assert prior.hit_rate(round(10 * num_experts * share)) == pytest.approx(rate, abs=0.05)
        assert typical_hit_rate(share, num_experts=num_experts) == pytest.approx(rate, abs=0.05)
    assert prior.error == PRIOR_ERROR
    assert prior.distinct_in(1) == pytest.approx(experts_per_token)
