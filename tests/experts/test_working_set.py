"""The curve W(T) that a recorder counts equals the one that a look at every window finds, and its file is strict."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from argosy.errors import UsageError
from argosy.experts import hit_rate
from argosy.experts.hit_rate import AGES, WINDOWS, ReuseGaps, WorkingSet
from argosy.experts.policy import BONUS_TURNS, HALF_LIFE_TURNS


def choices(
    num_tokens: int, *, num_experts: int = 12, experts_per_token: int = 3, seed: int = 1
) -> NDArray[Any]:
    """Routing in which some experts are popular and a few are never used."""
    random = np.random.default_rng(seed)
    taste = random.normal(size=num_experts) - 9.0 * (np.arange(num_experts) < 2)
    scores = taste + random.normal(size=(num_tokens, num_experts))
    return np.argsort(-scores, axis=1)[:, :experts_per_token]


def gaps_of(experts: NDArray[Any], *, at_once: int, num_experts: int = 12) -> ReuseGaps:
    """Count reuse gaps of one layer, or of several: experts [tokens, (layers,) experts per token]."""
    experts = experts.reshape(len(experts), -1, experts.shape[-1])
    gaps = ReuseGaps(experts.shape[1], num_experts)
    for start in range(0, len(experts), at_once):
        gaps.count(experts[start : start + at_once])
    return gaps


def joined(*timelines: ReuseGaps, layers: Sequence[int] = (0,)) -> WorkingSet:
    return WorkingSet.of(timelines, layers=layers, num_experts=12, experts_per_token=3)


def distinct_in_windows(experts: NDArray[Any], window: int) -> list[int]:
    return [len(set(experts[at : at + window].flat)) for at in range(len(experts) - window + 1)]


@pytest.mark.parametrize("at_once", [1, 7, 50])
def test_gaps_give_the_mean_over_all_windows(at_once: int) -> None:
    experts = choices(50)
    found = joined(gaps_of(experts, at_once=at_once), layers=[3])

    assert found.windows == tuple(window for window in WINDOWS if window <= 50)
    assert found.layers == (3,)
    expected = [np.mean(distinct_in_windows(experts, window)) for window in found.windows]
    assert found.distinct[0] == pytest.approx(expected, abs=1e-12)


def test_timelines_are_joined_window_by_window() -> None:
    long, short = choices(40), choices(9, seed=2)
    found = joined(gaps_of(long, at_once=16), gaps_of(short, at_once=16))

    expected = [
        np.mean(distinct_in_windows(long, window) + distinct_in_windows(short, window))
        for window in found.windows
    ]
    assert found.num_tokens == 49
    assert found.distinct[0] == pytest.approx(expected, abs=1e-12)


def ages_before_each_token(experts: NDArray[Any]) -> list[dict[int, float]]:
    """Age of every expert used so far, before each token: token by token, as the policy counts."""
    used: dict[int, tuple[float, int]] = {}  # expert -> uses, and the token of the last
    found = []
    for token, row in enumerate(experts):
        found.append(
            {
                expert: (token - last) * (1 + BONUS_TURNS / HALF_LIFE_TURNS) - BONUS_TURNS * np.log2(uses)
                for expert, (uses, last) in used.items()
            }
        )
        for expert in row:
            uses, last = used.get(expert, (0.0, 0))
            used[expert] = 1.0 + uses * 0.5 ** ((token - last) / HALF_LIFE_TURNS), token
    return found


@pytest.mark.parametrize("at_once", [1, 7, 400])
def test_experts_up_to_an_age_and_uses_of_them_are_counted(at_once: int) -> None:
    experts = choices(400)
    found = joined(gaps_of(experts, at_once=at_once))

    before = ages_before_each_token(experts)[32:]  # while the cache fills, nothing counts
    resident = [np.mean([sum(age <= limit for age in ages.values()) for ages in before]) for limit in AGES]
    uses = [
        np.mean(
            [
                sum(ages.get(expert, np.inf) <= limit for expert in row)
                for ages, row in zip(before, experts[32:], strict=True)
            ]
        )
        for limit in AGES
    ]
    assert found.resident is not None
    assert found.found is not None
    # With three experts a token, each may count for half a token more or less; most of this cancels.
    assert found.resident[0] == pytest.approx(resident, abs=0.1)
    assert found.found[0] == pytest.approx(uses, abs=1e-12)
    assert 0 < uses[10] < uses[-1]


@pytest.mark.parametrize("choices_together", [1, 128 * 3 * 2, 1 << 13])
def test_layers_that_are_counted_together_have_the_curves_of_each_alone(
    choices_together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hit_rate, "_CHOICES_TOGETHER", choices_together)
    layers = [choices(300, seed=layer) for layer in range(5)]
    together = joined(gaps_of(np.stack(layers, axis=1), at_once=200), layers=range(5))
    for layer, experts in enumerate(layers):
        alone = joined(gaps_of(experts, at_once=200))
        assert together.distinct[layer] == pytest.approx(alone.distinct[0], abs=1e-9)
        for curve, own in ((together.resident, alone.resident), (together.found, alone.found)):
            assert curve is not None
            assert own is not None
            assert curve[layer] == pytest.approx(own[0], abs=1e-9)


def test_a_short_recording_has_no_ages() -> None:
    found = joined(gaps_of(choices(32), at_once=32))
    assert found.resident is None
    assert WorkingSet.from_json(json.dumps(found.as_dict()).encode()).found is None


def test_no_tokens_have_no_working_set() -> None:
    with pytest.raises(UsageError, match="no decode token"):
        WorkingSet.of([ReuseGaps(1, 4)], layers=[0], num_experts=4, experts_per_token=2)


def recorded() -> WorkingSet:
    experts = np.stack([choices(60, seed=layer) for layer in (1, 4)], axis=1)
    return joined(gaps_of(experts, at_once=30), layers=(1, 4))


def test_a_file_is_read_back() -> None:
    one = recorded()
    again = WorkingSet.from_json(json.dumps(one.as_dict()).encode())

    assert (again.layers, again.windows, again.num_tokens) == (one.layers, one.windows, 60)
    assert again.distinct == pytest.approx(one.distinct, abs=1e-4)
    assert again.resident == pytest.approx(one.resident, abs=1e-4)
    assert again.found == pytest.approx(one.found, abs=1e-4)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"format": "other"}, "format"),
        ({"num_experts": 0}, "num_experts"),
        ({"num_experts": True}, "num_experts"),
        ({"experts_per_token": 13}, "experts_per_token"),
        ({"tokens": 1.5}, "tokens"),
        ({"windows": []}, "windows"),
        ({"windows": [1, 5]}, "windows"),
        ({"windows": None}, "windows"),
        ({"layers": {}}, "layers"),
        ({"ages": [1, 2]}, "ages"),
        ({"ages": None, "layers": {"01": {"distinct": [3.0]}}}, "layer"),
        ({"ages": None, "layers": {"1": [3.0]}}, "layer 1"),
        ({"ages": None, "layers": {"1": {"distinct": [3.0]}}}, "layer 1"),
        ({"ages": None, "windows": [1, 2], "layers": {"1": {"distinct": [3.0, "4"]}}}, "layer 1"),
        ({"ages": None, "windows": [1, 2], "layers": {"1": {"distinct": [True, 3.0]}}}, "layer 1"),
        ({"ages": None, "windows": [1, 2], "layers": {"1": {"distinct": [3.0, 2.0]}}}, "rise"),
        ({"ages": None, "windows": [1, 2], "layers": {"1": {"distinct": [3.0, 13.0]}}}, "rise"),
        ({"windows": [1, 2], "layers": {"1": {"distinct": [3.0, 4.0]}}}, "resident"),
    ],
)
def test_a_wrong_file_is_refused_by_name(change: dict[str, object], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        WorkingSet.from_json(json.dumps(recorded().as_dict() | change).encode())


@pytest.mark.parametrize("data", [b"", b"[1]", b'{"format": NaN}', b"x" * (9 << 20)])
def test_what_is_no_object_is_refused(data: bytes) -> None:
    with pytest.raises(UsageError, match="working set cannot be read"):
        WorkingSet.from_json(data)
