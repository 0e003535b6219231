"""^C while a command answers: the first one stops the answer, the second one ends the command."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self


class SecondInterrupt(KeyboardInterrupt):
    """^C while an answer is being stopped."""


class Interrupts:
    """Records the first ^C instead of raising; the second ^C raises SecondInterrupt.

    Attributes:
        on_first: called on the first ^C, in the signal handler.
    """

    def __init__(self) -> None:
        self.count = 0
        self.on_first: Callable[[], None] = lambda: None

    @classmethod
    @contextmanager
    def watched(cls) -> Iterator[Self]:
        made = cls()
        before = signal.signal(signal.SIGINT, made._remember)
        try:
            yield made
        finally:
            signal.signal(signal.SIGINT, before)

    def _remember(self, number: int, frame: object) -> None:
        self.count += 1
        if self.count > 1:
            raise SecondInterrupt
        self.on_first()
