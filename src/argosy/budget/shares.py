"""Divide the memory for experts among models that share a budget: one rule, pure arithmetic.

    budget  =  process  +  floors of the models in memory  +  experts

A model's floor is everything that it needs to run: dense weights, KV cache, buffers, and expert slots for one token in
one layer. The memory that the floors leave is for experts:

1. Models in use get equal shares. No model gets more than all of its experts take; the others share the excess.
2. Idle models keep their memory while there is room, the most recently used first.

So an idle model keeps its experts until another model needs their memory.

Elsewhere: `planner.plan_share` knows floors; `serve/models/models.py` loads models and moves the memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

IN_USE_S = 60.0  # a model is in use while it answers, and for this long afterwards


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """How much memory beyond its floor a model could use, and holds now."""

    most_bytes: int
    held_bytes: int  # current bytes
    used_at: float
    is_in_use: bool


def divide(free_bytes: int, demands: Sequence[Demand]) -> list[int]:
    """Return the bytes of each model beyond its floor, together at most `free_bytes`, which is not negative."""
    assert free_bytes >= 0
    shares = [0] * len(demands)
    in_use = [number for number, demand in enumerate(demands) if demand.is_in_use]
    # Models that can use least come first, so that the others share the excess.
    in_use.sort(key=lambda number: demands[number].most_bytes)
    for place, number in enumerate(in_use):
        shares[number] = min(demands[number].most_bytes, free_bytes // (len(in_use) - place))
        free_bytes -= shares[number]
    others = [number for number, demand in enumerate(demands) if not demand.is_in_use]
    others.sort(key=lambda number: demands[number].used_at, reverse=True)
    for number in others:
        shares[number] = min(demands[number].held_bytes, free_bytes)
        free_bytes -= shares[number]
    return shares
