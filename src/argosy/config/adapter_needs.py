"""The memory that adapters need, for a plan."""

from __future__ import annotations

from typing import NamedTuple


class AdapterNeeds(NamedTuple):
    """Bytes of some adapters together (`adapters/needs.py`).

    fixed_bytes: everything but `part_bytes`: dense pairs, and one part of an expert with the records of all.
    part_bytes: parts of all experts; a slot of an expert has room for its share.
    ranks: the most that the ranks of one network's pairs add up to, for scratch memory.
    """

    fixed_bytes: int = 0
    part_bytes: int = 0
    ranks: int = 0

    def joined(self, other: AdapterNeeds) -> AdapterNeeds:
        return AdapterNeeds(
            self.fixed_bytes + other.fixed_bytes,
            self.part_bytes + other.part_bytes,
            max(self.ranks, other.ranks),
        )
