"""Set the current number of expert slots: the plan's slots, plus slots in memory that other parts do not need.

    the plan's share + idle memory of pictures, prompts, sequences  ->  slots now  ->  `experts/cache.py`

A part of the plan that does not use its memory lends it with `allow`, and takes it back the same way before using it.
When such a call returns, the system has the memory, so the sum never exceeds the budget. The cache changes only
between two steps. Residency never changes a token.

A step that needs memory takes it at once. Other users take it in small pieces between steps, for a fraction of the
steps' time, so that running answers hardly notice; after a second they take the rest at once.

Elsewhere: `media_memory.py` lends the memory of pictures and sounds, `idle_memory.py` that of prompts and the KV
cache; `shares.py` divides the plan's share among models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from time import perf_counter

from argosy.config import MIB, ExpertSlots
from argosy.errors import UsageError
from argosy.experts.cache import ExpertCache

OWN = "experts"  # the source of the plan's own slots
# Memory taken at once, while a step may wait: copying this much and freeing its pages takes a few milliseconds.
_PIECE_BYTES = 32 * MIB
_SHARE_OF_STEPS = 0.25  # share of the time for pieces between steps
_PATIENCE_S = 1.0  # after waiting this long, a caller gets the rest at once


class ExpertMemory:
    """The memory that experts may use now, by source.

    Attributes:
        step_s: the duration of the last step.
        num_slots: the current number of slots.
        slot_bytes: of one slot, with adapters' parts; `Resizer.make_room` changes it.
        most: the limit of slots, however much memory is idle.

    Args:
        slots: the plan's slots.
        lock: held while a step runs; it goes to the longest waiter (`engine/turns.py`).
    """

    def __init__(
        self,
        cache: ExpertCache,
        slots: ExpertSlots,
        *,
        lock: AbstractContextManager[object],
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        self.step_s = 0.0
        self._cache, self._lock, self._clock = cache, lock, clock
        self.most = slots.reachable
        self.slot_bytes = max(1, slots.slot_bytes)
        self._allowed = {OWN: slots.own_bytes}
        self.num_slots = slots.own
        self._num_held = slots.own  # slots that keep memory; those beyond hold unmoved experts
        self._is_closed = False

    def allow(self, source: str, nbytes: int) -> None:
        """Let experts use `nbytes` of a source. Call this with the lock, between two steps."""
        self._require_open()
        num_awaited = self._num_held - self.num_slots  # other callers take this memory between steps
        self._allowed[source] = nbytes
        self._resize(self._target() + num_awaited)

    def approach(self, wanted: Mapping[str, int], *, is_urgent: bool = False) -> bool:
        """Do a part of `allow` that steps hardly notice, or all of it if it is urgent. Call this with the lock,
        between steps.

        Args:
            wanted: bytes by source, for some sources.

        Returns:
            Whether no work is left, for any caller.
        """
        self._require_open()
        began = self._clock()
        self._allowed |= wanted
        while True:
            self._resize(0 if is_urgent else self._num_held - max(1, _PIECE_BYTES // self.slot_bytes))
            if self._num_held == self.num_slots:
                return True
            if self._clock() - began >= self.step_s * _SHARE_OF_STEPS:
                return False

    def shrink(self, source: str, nbytes: int) -> None:
        """Limit experts to `nbytes` of a source. Call this with the lock, within a step, between two layers.

        The memory is freed at once, including memory that `allow_between_steps` has not taken yet.
        """
        self.approach({source: min(nbytes, self._allowed[source])}, is_urgent=True)

    def allow_between_steps(self, wanted: Callable[[], Mapping[str, int]]) -> None:
        """Do `allow` in parts, from any thread; steps continue meanwhile.

        Args:
            wanted: returns bytes by source, for some sources; called with the lock before each part.

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
        """Close: the cache no longer changes. Call this with the lock."""
        self._is_closed = True

    def _target(self) -> int:
        return min(self.most, sum(self._allowed.values()) // self.slot_bytes)

    def _resize(self, held: int) -> None:
        """Resize to the allowed slots; at most `held` of the earlier slots keep memory."""
        num_slots = self._target()
        held = max(num_slots, min(held, self._num_held))
        if (num_slots, held) != (self.num_slots, self._num_held):
            self._cache.resize(num_slots, held=held)
            self.num_slots, self._num_held = num_slots, held

    def _require_open(self) -> None:
        if self._is_closed:
            raise UsageError("the engine is closed")
