"""Packs in processes that end before they have finished."""

from __future__ import annotations

import os
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

from argosy.checkpoint.pack import pack
from argosy.model.families import open_model


def killed_at_a_write(source: Path, destination: Path, at_write: int) -> None:
    """Pack, and kill this process with SIGKILL when half of that write is written."""
    real, left = os.pwrite, at_write

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        nonlocal left
        left -= 1
        if left == 0:
            real(descriptor, data[: len(data) // 2], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(descriptor, data, offset)

    os.pwrite = pwrite  # type: ignore[assignment]
    pack(open_model(source), destination, format="q4")


def slow_pack(source: Path, destination: Path, ready: Connection) -> None:
    real = os.pwrite

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        time.sleep(0.004)
        return real(descriptor, data, offset)

    os.pwrite = pwrite  # type: ignore[assignment]
    ready.send(None)
    pack(open_model(source), destination, format="q4")
