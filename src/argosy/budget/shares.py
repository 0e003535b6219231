"""Divide the memory for experts among models that share a budget: one rule, and numbers alone.

    budget  =  process  +  floors of the models in memory  +  experts

A model's floor is all that it needs besides experts: dense weights, KV cache, buffers, and as many expert slots as one
layer asks for. What the floors leave is for experts:

1. Models in use get equal shares. None gets more than all of its experts take; the others share what it leaves.
2. The other models keep what they have while there is room for it, the one that was used last first.

So a model that nobody uses has its experts until another one needs their memory.

Elsewhere: `memory_plan.plan_share` knows floors; `serve/models/models.py` loads models and moves the memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

IN_USE_S = 60.0  # a model is in use while it answers, and for so long afterwards


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A model's use for more expert memory; slots count from its floor."""

    slot_bytes: int
    most_slots: int
    num_slots: int  # at present
    used_at: float
    is_in_use: bool

    @property
    def most_bytes(self) -> int:
        return self.most_slots * self.slot_bytes


def divide(free_bytes: int, claims: Sequence[Claim]) -> list[int]:
    """The slots of each model; together they take at most `free_bytes`, which is not negative."""
    assert free_bytes >= 0
    slots = [0] * len(claims)
    in_use = [number for number, claim in enumerate(claims) if claim.is_in_use]
    # Those that can use least come first, so that the others share what they leave.
    in_use.sort(key=lambda number: claims[number].most_bytes)
    for place, number in enumerate(in_use):
        share_bytes = free_bytes // (len(in_use) - place)
        slots[number] = min(claims[number].most_slots, share_bytes // claims[number].slot_bytes)
        free_bytes -= slots[number] * claims[number].slot_bytes
    others = [number for number, claim in enumerate(claims) if not claim.is_in_use]
    others.sort(key=lambda number: claims[number].used_at, reverse=True)
    for number in others:
        slots[number] = min(claims[number].num_slots, free_bytes // claims[number].slot_bytes)
        free_bytes -= slots[number] * claims[number].slot_bytes
    return slots
