"""Assigns slots of the recurrent state to sequences, and keeps snapshots of slots.

Layers with a delta net keep a state per sequence instead of keys and values per position. Unlike KV blocks, the state
cannot be cut back to an earlier position: continuing from there (a shared prefix, or a preempted sequence) needs a
snapshot taken at that position, and the tokens that follow then have the same bits as before. Snapshots use a fixed
number of slots. The key of the last KV block before a snapshot finds it; when no slot is left, the least recently used
snapshot is dropped.

The state itself is native memory (`_native.RecurrentState`); a sequence that starts at position 0 starts with zeros.
"""

from __future__ import annotations

from collections import OrderedDict

from argosy import _native


class StateSlots:
    """The first `num_sequences` slots are for running sequences, the others for snapshots.

    Args:
        can_roll_back: a second slot per sequence keeps its state from before proposed tokens ran.
    """

    def __init__(
        self,
        state: _native.RecurrentState,
        num_sequences: int | None = None,
        *,
        can_roll_back: bool = False,
    ) -> None:
        self.state = state
        self.num_sequences = state.num_slots if num_sequences is None else num_sequences
        self._first_snapshot = (2 if can_roll_back else 1) * self.num_sequences
        self.reset()

    def reset(self) -> None:
        """Free every slot and drop every snapshot, whatever state an interrupted call left."""
        self._free = list(range(self.num_sequences - 1, -1, -1))
        self._unused = list(range(self._first_snapshot, self.state.num_slots))
        self._snapshots: OrderedDict[bytes, int] = OrderedDict()  # key -> slot, least recently used first

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_snapshots(self) -> int:
        return len(self._snapshots)

    @property
    def most_snapshots(self) -> int:
        return self.state.num_slots - self._first_snapshot

    def take(self) -> int:
        """Hand out a slot. The caller has checked that one is free."""
        return self._free.pop()

    def give_back(self, slot: int) -> None:
        self._free.append(slot)

    def save(self, slot: int) -> None:
        """Keep the state in a sequence's slot, for `roll_back`."""
        self.state.copy_slot(slot, self.num_sequences + slot)

    def roll_back(self, slot: int) -> None:
        """Restore the state in a sequence's slot as `save` kept it."""
        self.state.copy_slot(self.num_sequences + slot, slot)

    def has_snapshot(self, key: bytes) -> bool:
        return key in self._snapshots

    def slot_of(self, key: bytes) -> int:
        """Return the slot of an existing snapshot."""
        return self._snapshots[key]

    def snapshot(self, slot: int, key: bytes) -> None:
        """Save the state in `slot` under `key`, between two steps.

        Raises:
            ValueError: a step of the sequence failed midway, so its state is invalid.
        """
        if self.state.position(slot) < 0:
            raise ValueError(f"the recurrent state in slot {slot} is invalid: a step failed midway")
        self.state.copy_slot(slot, self.place(key))

    def place(self, key: bytes) -> int:
        """Return the slot in which to write a snapshot under `key`: its existing slot, or a new one."""
        slot = self._snapshots.pop(key, None)
        if slot is None:
            slot = self._unused.pop() if self._unused else self._snapshots.popitem(last=False)[1]
        self._snapshots[key] = slot
        return slot

    def restore(self, key: bytes, slot: int) -> None:
        """Set the state in `slot` to the snapshot."""
        self._snapshots.move_to_end(key)
        self.state.copy_slot(self._snapshots[key], slot)

    def forget(self, key: bytes) -> None:
        """Drop the snapshot under `key`, if there is one."""
        if (slot := self._snapshots.pop(key, None)) is not None:
            self._unused.append(slot)
