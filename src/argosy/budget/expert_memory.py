"""How many slots the expert cache has at the moment: those of the plan, and more in memory that others do not need.

    the plan's share + what pictures, prompts, sequences leave idle  ->  slots now  ->  `experts/cache.py`

Whoever has memory in the plan that it does not use says so with `allow`, and takes it back in the same way before it
uses it. Memory is with the system when such a call returns, so the sum never exceeds the budget. The cache changes
only between two steps. What is resident decides no token.

A step that needs memory takes it at once. Everybody else takes it in small pieces between steps, for a part of the time
that steps take, so that running answers hardly notice; and the rest at once after a second.

Elsewhere: `media_memory.py` lends what pictures and sounds take, `idle_memory.py` what prompts and the KV cache do;
`shares.py` divides the plan's share among models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from time import perf_counter
from typing import Protocol

from argosy.config import MIB
from argosy.errors import UsageError

OWN = "experts"  # the source of the plan's own slots
# Memory that goes at once, while a step may wait: to copy as much and to free its pages takes a few milliseconds.
_PIECE_BYTES = 32 * MIB
_SHARE_OF_STEPS = 0.25  # share of the time for pieces between steps
_PATIENCE_S = 1.0  # whoever has waited for so long gets the rest at once


class Slots(Protocol):
    """The method of an `ExpertCache` that is needed here."""

    def resize(self, num_slots: int, *, held_slots: int | None = None) -> None: ...


class ExpertMemory:
    """The memory that experts may have now, by source.

    Attributes:
        step_s: the duration of the last step.
        most_slots: the limit, however much memory is idle.

    Args:
        num_slots: the plan's own slots.
        lock: held by whoever runs a step; it goes to whoever has waited longest (`engine/turns.py`).
    """

    def __init__(
        self,
        cache: Slots,
        *,
        num_slots: int,
        slot_bytes: int,
        most_slots: int,
        lock: AbstractContextManager[object],
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        self.step_s = 0.0
        self._cache, self._lock, self._clock = cache, lock, clock
        self.most_slots = most_slots
        self._slot_bytes = max(1, slot_bytes)
        self._allowed = {OWN: num_slots * slot_bytes}
        self._num_slots = num_slots
        self._held_slots = num_slots  # slots with memory; the others hold experts that have not moved yet
        self._is_closed = False

    @property
    def num_slots(self) -> int:
        """Slots that there are now."""
        return self._num_slots

    @property
    def lent_slots(self) -> int:
        """Slots in memory that others lend now."""
        return max(0, self._num_slots - self._allowed[OWN] // self._slot_bytes)

    def allow(self, source: str, nbytes: int) -> None:
        """Let experts have so much memory of a source. Call it with the lock, between two steps."""
        self._require_open()
        num_awaited = self._held_slots - self._num_slots  # they are for others, who take them between steps
        self._allowed[source] = nbytes
        self._resize(self._target() + num_awaited)

    def approach(self, wanted: Mapping[str, int], *, is_urgent: bool = False) -> bool:
        """Do a part of `allow` that steps hardly notice, or all of it if it is urgent. Call it likewise.

        Args:
            wanted: bytes of some sources.

        Returns:
            Whether nothing is left to do, for anybody.
        """
        self._require_open()
        began = self._clock()
        self._allowed |= wanted
        while True:
            self._resize(0 if is_urgent else self._held_slots - max(1, _PIECE_BYTES // self._slot_bytes))
            if self._held_slots == self._num_slots:
                return True
            if self._clock() - began >= self.step_s * _SHARE_OF_STEPS:
                return False

    def shrink(self, source: str, nbytes: int) -> None:
        """Let experts have no more than so much of a source. Call it with the lock, within a step, between two layers.

        All of it goes at once, including what `allow_between_steps` has not taken yet.
        """
        self.approach({source: min(nbytes, self._allowed[source])}, is_urgent=True)

    def allow_between_steps(self, wanted: Callable[[], Mapping[str, int]]) -> None:
        """As `allow`, in parts, from any thread; steps go on meanwhile.

        Args:
            wanted: bytes of some sources; called with the lock before each part.

        Raises:
            UsageError: the engine was closed meanwhile.
        """
        is_done, began = False, self._clock()
        while not is_done:
            with self._lock:
                self._require_open()
                is_urgent = self._clock() - began >= _PATIENCE_S
                is_done = self.approach(wanted(), is_urgent=is_urgent)

    def close(self) -> None:
        """End: the cache changes no more. Call it with the lock."""
        self._is_closed = True

    def _target(self) -> int:
        return min(self.most_slots, sum(self._allowed.values()) // self._slot_bytes)

    def _resize(self, held_slots: int) -> None:
        """Have the slots that are allowed; at most `held_slots` of those that there were have memory afterwards."""
        num_slots = self._target()
        held = max(num_slots, min(held_slots, self._held_slots))
        if (num_slots, held) != (self._num_slots, self._held_slots):
            self._cache.resize(num_slots, held_slots=held)
            self._num_slots, self._held_slots = num_slots, held

    def _require_open(self) -> None:
        if self._is_closed:
            raise UsageError("the engine is closed")
