"""Lend the memory of pictures and sounds to experts while there are none.

    lent to the expert cache  ── a picture comes ──>  taken back: decoded, encoded  ── idle for a minute ──>  lent again

The plan reserves memory for encoders and ears, one encode, and the process that decodes files
(`memory_plan.lendable_bytes`). While nothing uses it, the expert cache has more slots there. Whoever needs it says so
with `use`, which returns once the cache has given the slots back and the system has their pages. The cache changes only
between two steps.

Elsewhere: `experts/cache.py` gives slots back; `media.py` is who uses the memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from time import monotonic

from argosy import _native
from argosy.errors import UsageError
from argosy.experts.cache import ExpertCache

# Reading an encoder of 1 GB again takes about a second, and so does reading the experts that it displaces.
IDLE_S = 60.0


class MediaMemory:
    """Who has the memory for pictures and sounds at the moment.

    Args:
        clear: frees all that pictures and sounds use of it.
        cache: the experts that it is lent to, with `num_slots` or `lent_slots` more; None: it is never lent.
        lock: held by whoever runs a step; it goes to whoever has waited longest (`turns.py`).
    """

    def __init__(
        self,
        clear: Callable[[], None],
        *,
        cache: ExpertCache | None,
        num_slots: int,
        lent_slots: int,
        lock: AbstractContextManager[object],
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._cache = cache
        self._num_slots = num_slots
        self._lent_slots = lent_slots
        self._lock = lock
        self._clear = clear
        self._clock = clock
        self._is_lent = cache is not None and lent_slots > 0  # a cache starts with all its slots
        self._is_closed = False
        self._users = threading.Lock()  # guards the next two
        self._num_users = 0
        self._used_at = 0.0

    @property
    def lent_slots(self) -> int:
        """Expert slots in this memory now."""
        return self._lent_slots if self._is_lent else 0

    @contextmanager
    def use(self) -> Iterator[None]:
        """Keep the memory for pictures and sounds; waits for at most a step while experts have it. From any thread.

        Raises:
            UsageError: the engine was closed meanwhile.
        """
        with self._users:
            self._num_users += 1
        try:
            while self._is_lent:
                with self._lock:
                    self.settle()
            self._require_open()
            yield
        finally:
            with self._users:
                self._num_users -= 1
                self._used_at = self._clock()

    def settle(self) -> None:
        """Lend the memory or take it back, as its users need it. Call it with the lock, between two steps."""
        self._require_open()
        if self._cache is None or not self._lent_slots:
            return
        if self._is_lent:
            if self._num_users:
                self._cache.resize(self._num_slots)
                self._is_lent = False
            return
        with self._users:
            is_idle = not self._num_users and self._clock() - self._used_at >= IDLE_S
            self._is_lent = is_idle  # whoever comes from now on waits for the lock
        if is_idle:
            self._clear()
            _native.trim_heap()
            self._cache.resize(self._num_slots + self._lent_slots)

    def close(self) -> None:
        """End: nothing is lent any more. Call it with the lock."""
        self._is_closed = True

    def _require_open(self) -> None:
        if self._is_closed:
            raise UsageError("the engine is closed")
