"""A program on a pseudo-terminal, and what it shows there."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

_TIMEOUT_S = 60.0
# Makes stdin the controlling terminal, whose ^C is a signal, and becomes the program.
_TAKE_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execvp(sys.argv[1], sys.argv[1:])
"""


class OnTerminal:
    """A running program; `shown` is what came after the text that `until` found last."""

    def __init__(self, process: subprocess.Popen[bytes], master: int) -> None:
        self.process = process
        self._master = master
        self.shown = b""

    def send(self, text: bytes) -> None:
        os.write(self._master, text)

    def until(self, text: bytes) -> bytes:
        """Wait for `text`; returns what came before it."""
        deadline = time.monotonic() + _TIMEOUT_S
        while text not in self.shown:
            assert time.monotonic() < deadline, self.shown
            if select.select([self._master], [], [], 1)[0]:
                part = os.read(self._master, 4096)
                self.shown += part
                if b"\x1b[6n" in part:
                    self.send(b"\x1b[1;1R")  # the terminal's answer: its cursor position
        before, self.shown = self.shown.split(text, 1)
        return before


@contextmanager
def on_terminal(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Iterator[OnTerminal]:
    """Start a program with a terminal of its own, and end it at the end."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", _TAKE_TERMINAL, *command],
        stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
        env={**os.environ, "TERM": "xterm", **(environment or {})},
    )  # fmt: skip
    os.close(slave)
    try:
        yield OnTerminal(process, master)
    finally:
        process.kill()
        process.wait()
        os.close(master)
