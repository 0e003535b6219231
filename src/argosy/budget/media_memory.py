"""Lend the memory for pictures and sounds to experts while there are none.

    lent to the expert cache  ── a picture comes ──>  taken back: decoded, encoded  ── idle for a minute ──>  lent again

The plan reserves memory for encoders and ears, one encode, and the process that decodes files
(`allowances.lendable_bytes`). While nothing uses it, it holds more slots of the expert cache. A caller that needs it
calls `use`, which returns once experts have left and the system has their pages.

Elsewhere: `expert_memory.py` turns it into slots; `engine/media/prompt_media.py` uses it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from time import monotonic

from argosy import _native
from argosy.budget.expert_memory import ExpertMemory
from argosy.errors import UsageError

# Reading an encoder of 1 GB again takes about a second, and so does reading the experts that it displaces.
IDLE_S = 60.0
SOURCE = "pictures, sound"


class MediaMemory:
    """Lends the memory for pictures and sounds to experts, and takes it back.

    Args:
        clear: frees all of it that pictures and sounds occupy.
        experts: the borrower; None: the memory is never lent.
        nbytes: the bytes to lend.
        lock: held while a step runs; it goes to the longest waiter (`engine/turns.py`).
    """

    def __init__(
        self,
        clear: Callable[[], None],
        *,
        experts: ExpertMemory | None,
        nbytes: int,
        lock: AbstractContextManager[object],
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._experts = experts
        self._nbytes = nbytes
        self._lock = lock
        self._clear = clear
        self._clock = clock
        self._is_lent = False
        self._is_closed = False
        self._users = threading.Lock()  # guards the next two
        self._num_users = 0
        self._used_at = 0.0
        if experts is not None and nbytes:
            self._is_lent = True
            experts.allow(SOURCE, nbytes)

    @property
    def is_lent(self) -> bool:
        """Whether experts occupy any of it."""
        return self._is_lent

    @contextmanager
    def use(self) -> Iterator[None]:
        """Keep the memory for pictures and sounds; if experts occupy it, wait for some steps. Safe from any thread.

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
        """Lend the memory or take it back, as its users need it. Call this with the lock, between two steps."""
        self._require_open()
        if self._experts is None or not self._nbytes:
            return
        if self._is_lent:
            if self._num_users and self._experts.approach({SOURCE: 0}):
                self._is_lent = False
            return
        with self._users:
            is_idle = not self._num_users and self._clock() - self._used_at >= IDLE_S
            self._is_lent = is_idle  # later callers wait for the lock
        if is_idle:
            self._clear()
            _native.trim_heap()
            self._experts.allow(SOURCE, self._nbytes)

    def close(self) -> None:
        """Close: nothing is lent any more. Call this with the lock."""
        self._is_closed = True

    def _require_open(self) -> None:
        if self._is_closed:
            raise UsageError("the engine is closed")
