"""A program on a pseudo-terminal, what it shows there, and how long it shows nothing new."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from tests.helpers.forks import Forked

_TIMEOUT_S = 60.0
_ESCAPES = re.compile(rb"\x1b(?:\[[0-9;?]*[A-Za-z]|\][^\x07]*\x07|[^\[\]])")
# Makes stdin the controlling terminal, whose ^C is a signal, and becomes the program.
_TAKE_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execvp(sys.argv[1], sys.argv[1:])
"""


class Wait(NamedTuple):
    """A stretch in which nothing new came, and the last line that was on the screen meanwhile.

    `is_blank`: that line was only what had been typed.
    """

    seconds: float
    shown: str
    is_blank: bool


class OnTerminal:
    """A running program; `shown` is what came after the text that `until` found last.

    Attributes:
        longest: the longest wait since it was last set to None.
    """

    def __init__(self, process: subprocess.Popen[bytes], master: int) -> None:
        self.process = process
        self._master = master
        self.shown = b""
        self.longest: Wait | None = None
        self._recent = b""
        self._typed = b""
        self._new_at = time.monotonic()

    def send(self, text: bytes) -> None:
        self._typed, self._new_at = text.strip(), time.monotonic()
        os.write(self._master, text)

    def until(self, text: bytes) -> bytes:
        """Wait for `text`; returns what came before it."""
        deadline = time.monotonic() + _TIMEOUT_S
        while text not in self.shown:
            assert time.monotonic() < deadline, (text, self.shown[-500:])
            if select.select([self._master], [], [], 1)[0]:
                part = os.read(self._master, 4096)
                self._note_wait()
                self.shown += part
                self._recent = (self._recent + part)[-4096:]
                if b"\x1b[6n" in part:
                    os.write(self._master, b"\x1b[1;1R")  # the terminal's answer: its cursor position
        before, self.shown = self.shown.split(text, 1)
        return before

    def _note_wait(self) -> None:
        now = time.monotonic()
        seconds, self._new_at = now - self._new_at, now
        if self.longest is not None and seconds <= self.longest.seconds:
            return
        lines = [line.strip() for line in re.split(rb"[\r\n]", _ESCAPES.sub(b"", self._recent))]
        line = next((line for line in reversed(lines) if line), b"")
        is_blank = not line or line.endswith(self._typed)
        self.longest = Wait(seconds, line.decode(errors="replace"), is_blank)


@contextmanager
def on_terminal(command: Sequence[Any], environment: Mapping[str, str] | None = None) -> Iterator[OnTerminal]:
    """Start a program with a terminal of its own, and end it at the end.

    Args:
        command: a program and its arguments, or a function of a module and its arguments, which is called in a fork.
    """
    master, slave = pty.openpty()
    if callable(command[0]):
        start: type[subprocess.Popen[bytes]] = Forked
    else:
        start, command = subprocess.Popen, [sys.executable, "-S", "-c", _TAKE_TERMINAL, *command]
    process = start(
        command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
        env={**os.environ, "TERM": "xterm", **(environment or {})},
    )  # fmt: skip
    os.close(slave)
    try:
        yield OnTerminal(process, master)
    finally:
        process.kill()
        process.wait()
        os.close(master)
