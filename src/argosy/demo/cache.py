"""A lock for those who put something into the user's cache directory."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

Progress = Callable[[str, float], None]


@contextmanager
def locked(directory: Path, name: str) -> Iterator[None]:
    """Wait until no other process has the lock file `name` in the directory, which is made if it is missing."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / name, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
