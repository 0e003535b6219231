"""Room for experts in memory, in numbers: a plan decides it, and caches, models and forecasts follow it."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertSlots:
    """How many experts have a slot in memory: always, at times, and at most.

    own: slots in memory that only experts use.
    lent: more, in the memory for pictures and sounds while there are none.
    idle: more at most, in what prompts and the KV cache leave idle.
    most: the limit of all together, if `own` has changed or may change; 0: neither.
    num_experts: routed experts in all layers.
    slot_bytes, part_bytes: of a slot, and how much of it is for parts that adapters bring.
    """

    own: int = 0
    lent: int = 0
    idle: int = 0
    most: int = 0
    num_experts: int
    slot_bytes: int
    part_bytes: int = 0

    @property
    def own_bytes(self) -> int:
        return self.own * self.slot_bytes

    @property
    def own_percent(self) -> float:
        """The part of all experts that always has a slot."""
        return 100 * self.own / max(1, self.num_experts)

    @property
    def without_media(self) -> int:
        """Slots while there are no pictures or sounds."""
        return self.own + self.lent

    @property
    def reachable(self) -> int:
        """Slots while everything that may be lent is lent."""
        return self.own + self.lent + self.idle

    @property
    def is_resident(self) -> bool:
        return self.own >= self.num_experts

    @property
    def is_packed(self) -> bool:
        """Whether all experts are stored end to end, and not in slots."""
        return self.is_resident and not self.most

    def fitting(self, nbytes: int) -> int:
        """How many slots fit in so much memory."""
        return nbytes // max(1, self.slot_bytes)

    def filled(self, own: int, *, lent: int = 0, idle: int = 0) -> ExpertSlots:
        """The same with so many slots of its own, and as many of the others as the limit allows."""
        most = self.most or self.num_experts
        lent = min(lent, most - own)
        return replace(self, own=own, lent=lent, idle=min(idle, most - own - lent))
