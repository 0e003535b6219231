"""A lock whose waiters take turns, so that steps of a model and other work of an engine go on side by side.

With an ordinary lock, a thread that frees it and takes it again at once may keep all others out for seconds.

An engine has two. One guards its state: it is held for a whole step, and for every call between two steps. The other
is for the cores, and engines of one process share it: a step holds it too, and lends it while it waits for reads of a
model that is still being loaded. Whoever needs both takes the engine's own first.
"""

from __future__ import annotations

import threading
from collections import deque
from types import TracebackType


class Turns:
    """A lock that goes to whoever has waited longest; its owner may take it again."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._owner: int | None = None
        self._depth = 0
        self._waiting: deque[tuple[int, threading.Lock]] = deque()

    def acquire(self) -> bool:
        """Take the lock, after all that wait for it; returns whether it was free."""
        own = threading.get_ident()
        with self._guard:
            if self._owner == own:
                self._depth += 1
                return True
            if self._owner is None:
                self._owner, self._depth = own, 1
                return True
            gate = threading.Lock()
            gate.acquire()
            ticket = (own, gate)
            self._waiting.append(ticket)
        try:
            gate.acquire()
        except BaseException:  # ^C while it waited
            with self._guard:
                if ticket in self._waiting:
                    self._waiting.remove(ticket)
                else:
                    self._pass_on()
            raise
        return False

    def release(self) -> None:
        """Give it to whoever has waited longest."""
        with self._guard:
            assert self._owner == threading.get_ident()
            self._depth -= 1
            if not self._depth:
                self._pass_on()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _pass_on(self) -> None:
        if self._waiting:
            self._owner, gate = self._waiting.popleft()
            self._depth = 1
            gate.release()
        else:
            self._owner = None
