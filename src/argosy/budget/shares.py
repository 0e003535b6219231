"""Divide the memory for experts among models that share a budget: one rule, and numbers alone.

    budget  =  process  +  floors of the models in memory  +  experts

A model's floor is all that it needs besides experts: dense weights, KV cache, buffers, and as many expert slots as one
layer asks for. What the floors leave is for experts:

1. Models in use get equal shares. None gets more than all of its experts take; the others share what it leaves.
2. The other models keep what they have while there is room for it, the one that was used last first.

So a model that nobody uses has its experts until another one needs their memory.

Elsewhere: `planner.plan_share` knows floors; `serve/models/models.py` loads models and moves the memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

IN_USE_S = 60.0  # a model is in use while it answers, and for so long afterwards


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A model's use for memory beyond its floor."""

    most_bytes: int
    held_bytes: int  # at present
    used_at: float
    is_in_use: bool


def divide(free_bytes: int, claims: Sequence[Claim]) -> list[int]:
    """The bytes of each model beyond its floor, together at most `free_bytes`, which is not negative."""
    assert free_bytes >= 0
    shares = [0] * len(claims)
    in_use = [number for number, claim in enumerate(claims) if claim.is_in_use]
    # Those that can use least come first, so that the others share what they leave.
    in_use.sort(key=lambda number: claims[number].most_bytes)
    for place, number in enumerate(in_use):
        shares[number] = min(claims[number].most_bytes, free_bytes // (len(in_use) - place))
        free_bytes -= shares[number]
    others = [number for number, claim in enumerate(claims) if not claim.is_in_use]
    others.sort(key=lambda number: claims[number].used_at, reverse=True)
    for number in others:
        shares[number] = min(claims[number].held_bytes, free_bytes)
        free_bytes -= shares[number]
    return shares
