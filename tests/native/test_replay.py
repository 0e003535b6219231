"""Replayed caches hit as their rules say, and none hits more than the optimum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from argosy import _native as native

Request = frozenset[tuple[int, int]]  # (layer, expert)


def random_trace(
    seed: int, *, tokens: int = 40, layers: int = 3, k: int = 2, num_experts: int = 8
) -> NDArray[np.uint16]:
    scores = np.random.default_rng(seed).normal(size=(tokens, layers, num_experts))
    scores += 1.5 * np.random.default_rng(seed + 1).normal(size=(layers, num_experts))  # some are popular
    return np.argsort(-scores, axis=-1)[..., :k].astype(np.uint16)


def requests_of(trace: NDArray[np.uint16], steps: Sequence[int]) -> list[Request]:
    found = []
    for step in sorted(set(steps)):
        rows = [row for row, each in enumerate(steps) if each == step]
        found += [
            frozenset((layer, int(expert)) for row in rows for expert in trace[row, layer])
            for layer in range(trace.shape[1])
        ]
    return found


def hits_of(requests: list[Request], num_slots: int, worth: Callable[[int, Any], Any]) -> int:
    """Hits of a cache that evicts what is worth least; `worth` gets the number of the request that evicts."""
    resident: set[Any] = set()
    hits = 0
    for number, request in enumerate(requests):
        hits += len(request & resident)
        others = sorted(resident - request, key=lambda key: worth(number, key))
        room = max(0, num_slots - len(request))
        resident = set(others[len(others) - room :] if room < len(others) else others) | request
    return hits


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_slots", [2, 3, 7, 12, 24, 30])
@pytest.mark.parametrize("tokens_a_step", [1, 3])
def test_each_policy_hits_as_its_rule_says(seed: int, num_slots: int, tokens_a_step: int) -> None:
    trace = random_trace(seed)
    steps = [token // tokens_a_step for token in range(len(trace))]
    requests = requests_of(trace, steps)
    num_slots = max(num_slots, *map(len, requests))

    def last_use(number: int, key: Any) -> int:
        return max(i for i in range(number) if key in requests[i])

    def uses(number: int, key: Any) -> tuple[int, int]:
        return sum(key in requests[i] for i in range(number)), last_use(number, key)

    def next_use(number: int, key: Any) -> int:
        return -next((i for i in range(number + 1, len(requests)) if key in requests[i]), len(requests))

    for policy, worth in (("lru", last_use), ("lfu", uses), ("optimum", next_use)):
        lookups, hits = native.replay(
            trace, np.array(steps, np.int64), num_experts=8, policy=policy, num_slots=num_slots
        )
        assert lookups == sum(map(len, requests))
        if (
            policy == "optimum"
        ):  # experts that are never used again are equal, so the rule allows several choices
            assert hits == hits_of(requests, num_slots, worth)
        else:
            # Two experts of one request were used at the same time; the native order between them is by number.
            assert hits == hits_of(
                requests, num_slots, lambda number, key, worth=worth: (worth(number, key), key)
            )


def best_hits(requests: list[Request], num_slots: int) -> int:
    """The most hits of any policy, by trying every choice of whom to evict."""

    @cache
    def best(number: int, resident: Request) -> int:
        if number == len(requests):
            return 0
        request = requests[number]
        others = resident - request
        keep = min(len(others), num_slots - len(request))
        following = max(best(number + 1, frozenset(kept) | request) for kept in combinations(others, keep))
        return len(request & resident) + following

    return best(0, frozenset())


@pytest.mark.parametrize("seed", range(6))
def test_no_choice_of_whom_to_evict_hits_more_than_the_optimum(seed: int) -> None:
    trace = random_trace(seed, tokens=9, layers=2, k=1, num_experts=4)
    steps = np.arange(len(trace), dtype=np.int64)
    for num_slots in (1, 2, 3, 5):
        found = {
            policy: native.replay(trace, steps, num_experts=4, policy=policy, num_slots=num_slots)[1]
            for policy in ("lru", "lfu", "optimum")
        }
        assert found["optimum"] == best_hits(requests_of(trace, steps.tolist()), num_slots)
        assert max(found.values()) == found["optimum"]


def test_only_tokens_from_the_first_that_counts_are_counted() -> None:
    trace = random_trace(5)
    steps = np.arange(len(trace), dtype=np.int64)

    def hits(counted_from: int) -> NDArray[np.int64]:
        return np.array(
            native.replay(trace, steps, num_experts=8, policy="lru", num_slots=12, counted_from=counted_from)
        )

    assert hits(len(trace)).tolist() == [0, 0]
    assert hits(30)[0] == 10 * 3 * 2
    np.testing.assert_array_equal(hits(0) - hits(30), np.array(
        native.replay(trace[:30], steps[:30], num_experts=8, policy="lru", num_slots=12)
    ))  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 3}, "an expert is"),
        ({"num_slots": 0}, "num_slots is 0"),
        ({"policy": "fifo"}, "unknown policy 'fifo'; known: lru, lfu, optimum"),
        ({"num_experts": 1 << 22}, "num_experts is"),
    ],
)
def test_arguments_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    trace = random_trace(1, tokens=3)
    given: dict[str, Any] = {"num_experts": 8, "policy": "lru", "num_slots": 4} | changes
    with pytest.raises(ValueError, match=message):
        native.replay(trace, np.arange(3, dtype=np.int64), **given)


def test_steps_that_decrease_are_refused() -> None:
    with pytest.raises(ValueError, match="steps decrease at token 2"):
        native.replay(
            random_trace(1, tokens=3), np.array([0, 2, 1]), num_experts=8, policy="lru", num_slots=4
        )
