"""Replay recorded choices through caches of the same size with other eviction policies.

    choices [tokens, layers, experts per token]  ->  hit_rates  ->  {"lru": ..., "lfu": ..., "optimum": ...}

Elsewhere: `native/ops/replay` is the replay itself; `live.py` uses it for the last minutes, `report.py` for texts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from argosy import _native

POLICIES = ("lru", "lfu", "optimum")


def hit_rates(
    choices: NDArray[np.uint16],
    steps: NDArray[np.int64] | None = None,
    *,
    num_experts: int,
    slots: int,
    counted_from: int,
    policies: Sequence[str] = POLICIES,
) -> dict[str, float]:
    """The hit rate of each policy.

    Args:
        choices: [tokens, layers, experts per token].
        steps: each token's step; the tokens of a step request experts together. None: one token per step.
        counted_from: the first token that counts; earlier ones fill the cache.
    """
    if steps is None:
        steps = np.arange(len(choices), dtype=np.int64)
    found = {}
    for policy in policies:
        lookups, hits = _native.replay(
            np.ascontiguousarray(choices),
            steps,
            num_experts=num_experts,
            policy=policy,
            num_slots=slots,
            counted_from=counted_from,
        )
        found[policy] = hits / max(1, lookups)
    return found


def replay_bytes(num_tokens: int, *, num_layers: int, num_experts: int, k: int) -> int:
    """The most bytes that a replay allocates (`native/ops/replay.cpp`).

    Per choice, the expert and its next use; per token and layer, a request; per expert, its last and next request,
    its rank, and a node in the set of residents.
    """
    return num_tokens * num_layers * ((4 + 8) * k + 24) + 128 * num_layers * num_experts
