"""What both children of `engines.py` share: a job on stdin, events in a file, the kernel's peak of this process.

Nothing but the standard library is used: llama.cpp's interpreter has no Argosy.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any


class Work:
    """The job, and where its events go: one line of JSON each, written at once."""

    def __init__(self) -> None:
        self.job: dict[str, Any] = json.loads(sys.stdin.read())
        self._events = open(self.job["events"], "a", buffering=1)  # noqa: SIM115

    def tell(self, event: str, **facts: object) -> None:
        self._events.write(json.dumps({"event": event, "at": time.monotonic(), **facts}) + "\n")


def peak_bytes() -> int:
    """The most memory that this process ever had, mapped file pages included (`VmHWM`)."""
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM"))
