"""The user's cache directory, and a lock for those who put something there."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

Progress = Callable[[str, float], None]


def cache_directory() -> Path:
    """`ARGOSY_CACHE`, or `argosy` in the user's cache directory."""
    if own := os.environ.get("ARGOSY_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "argosy"


@contextmanager
def locked(directory: Path, name: str) -> Iterator[None]:
    """Wait until no other process has the lock file `name` in the directory, which is made if it is missing."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / name, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
