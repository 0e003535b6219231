"""Shared by both children of `engines.py`: a job on stdin, events in a file, the kernel's peak for this process.

Only the standard library is used: llama.cpp's interpreter has no Argosy.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any


class Work:
    """The job, and the file for its events: one JSON line each, written at once."""

    def __init__(self) -> None:
        self.job: dict[str, Any] = json.loads(sys.stdin.read())
        self._events = open(self.job["events"], "a", buffering=1)  # noqa: SIM115

    def tell(self, event: str, **facts: object) -> None:
        self._events.write(json.dumps({"event": event, "at": time.monotonic(), **facts}) + "\n")


def peak_bytes() -> int:
    """The peak memory of this process, including mapped file pages (`VmHWM`)."""
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM"))
