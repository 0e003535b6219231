"""Which slot of the recurrent state belongs to which sequence, and snapshots of slots.

Layers with a delta net keep a state per sequence instead of keys and values per position. It cannot be cut back to an
earlier position as KV blocks can: whoever wants to go on from one (a shared prefix, a rollback) takes a snapshot there
and restores it, in the same slot or another, and the tokens that follow have the bits they had before.

The state itself is native memory (`_native.RecurrentState`); a sequence that begins at position 0 begins with zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from argosy import _native


@dataclass(frozen=True, slots=True)
class StateSnapshot:
    """All that a sequence's layers remember after `position` tokens. Its bytes are no part of the memory plan."""

    position: int
    values: NDArray[np.float32]


class StateSlots:
    """A pool of slots, one for each sequence that runs."""

    def __init__(self, state: _native.RecurrentState) -> None:
        self.state = state
        self._free = list(range(state.num_slots - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self) -> int:
        """Hand out a slot; the caller has seen that there is one."""
        return self._free.pop()

    def give_back(self, slot: int) -> None:
        self._free.append(slot)

    def snapshot(self, slot: int) -> StateSnapshot:
        """What the sequence in `slot` remembers now, between two steps.

        Raises:
            ValueError: a step of the sequence failed half-way, so it stands nowhere.
        """
        position = self.state.position(slot)
        if position < 0:
            raise ValueError(f"the recurrent state in slot {slot} is not whole: a step failed half-way")
        values = np.empty(self.state.slot_floats, np.float32)
        self.state.copy_out(slot, values)
        return StateSnapshot(position, values)

    def restore(self, slot: int, snapshot: StateSnapshot) -> None:
        """Let the sequence in `slot` go on from where the snapshot was taken."""
        self.state.copy_in(slot, snapshot.values, snapshot.position)
