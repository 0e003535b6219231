"""A lock whose waiters take turns, so that steps of a model and other work of an engine alternate.

With an ordinary lock, a thread that releases and retakes it at once may keep all others out for seconds.

An engine has two such locks. One guards its state: it is held for a whole step, and for every call between two steps.
The other is for the cores, and engines of one process share it: a step also holds it, but the step of a model that is
still being loaded lends it while waiting for reads. A thread that needs both takes the engine's own lock first.
"""

from __future__ import annotations

import threading
from collections import deque
from types import TracebackType


class Turns:
    """A lock that goes to the longest waiter; its owner may take it again."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._owner: int | None = None
        self._depth = 0
        self._waiting: deque[tuple[int, threading.Lock]] = deque()

    def acquire(self) -> bool:
        """Take the lock, after all earlier waiters; return whether it was free."""
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
        except BaseException:  # ^C during the wait
            with self._guard:
                if ticket in self._waiting:
                    self._waiting.remove(ticket)
                else:
                    self._pass_on()
            raise
        return False

    def release(self) -> None:
        """Pass the lock to the longest waiter."""
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
