"""Which slot of the recurrent state belongs to which sequence, and snapshots of slots.

Layers with a delta net keep a state per sequence instead of keys and values per position. It cannot be cut back to an
earlier position as KV blocks can: whoever wants to go on from one (a shared prefix, a sequence that was put back) needs
a snapshot from there, and the tokens that follow have the bits they had before. Snapshots are slots too, so many and no
more, under the key of the KV block that they stand behind; when there is none left the one not used for longest goes.

The state itself is native memory (`_native.RecurrentState`); a sequence that begins at position 0 begins with zeros.
"""

from __future__ import annotations

from collections import OrderedDict

from argosy import _native


class StateSlots:
    """The first `num_sequences` slots are for sequences that run, the others for snapshots."""

    def __init__(self, state: _native.RecurrentState, num_sequences: int | None = None) -> None:
        self.state = state
        self.num_sequences = state.num_slots if num_sequences is None else num_sequences
        self._free = list(range(self.num_sequences - 1, -1, -1))
        self._unused = list(range(self.num_sequences, state.num_slots))
        self._snapshots: OrderedDict[bytes, int] = OrderedDict()  # key -> slot, least recently used first

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_snapshots(self) -> int:
        return len(self._snapshots)

    @property
    def most_snapshots(self) -> int:
        return self.state.num_slots - self.num_sequences

    def take(self) -> int:
        """Hand out a slot; the caller has seen that there is one."""
        return self._free.pop()

    def give_back(self, slot: int) -> None:
        self._free.append(slot)

    def has_snapshot(self, key: bytes) -> bool:
        return key in self._snapshots

    def slot_of(self, key: bytes) -> int:
        """The slot of a snapshot that is there."""
        return self._snapshots[key]

    def snapshot(self, slot: int, key: bytes) -> None:
        """Remember under `key` what the sequence in `slot` remembers now, between two steps.

        Raises:
            ValueError: a step of the sequence failed half-way, so it stands nowhere.
        """
        if self.state.position(slot) < 0:
            raise ValueError(f"the recurrent state in slot {slot} is not whole: a step failed half-way")
        self.state.copy_slot(slot, self.place(key))

    def place(self, key: bytes) -> int:
        """The slot of the snapshot of that key, a new one if there was none: for somebody to write."""
        slot = self._snapshots.pop(key, None)
        if slot is None:
            slot = self._unused.pop() if self._unused else self._snapshots.popitem(last=False)[1]
        self._snapshots[key] = slot
        return slot

    def restore(self, key: bytes, slot: int) -> None:
        """Let the sequence in `slot` go on from where the snapshot was taken."""
        self._snapshots.move_to_end(key)
        self.state.copy_slot(self._snapshots[key], slot)

    def forget(self, key: bytes) -> None:
        """Drop the snapshot of that key, if there is one."""
        if (slot := self._snapshots.pop(key, None)) is not None:
            self._unused.append(slot)
