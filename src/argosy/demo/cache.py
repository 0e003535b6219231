"""A lock for processes that write into the user's cache directory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from argosy.directory import Directory
from argosy.errors import UsageError, is_disk_full

Progress = Callable[[str, float], None]


@contextmanager
def locked(directory: Path, name: str) -> Iterator[Directory]:
    """Wait until no other process holds the lock file `name` in the directory; create the directory if it is missing.

    Raises:
        UsageError: something in the directory cannot be created, read or written.
    """
    try:
        with Directory(directory, make=True) as opened, opened.locked(name):
            yield opened
    except OSError as error:
        if is_disk_full(error):
            raise
        raise UsageError(
            f"the cache cannot be used: {error.filename or directory}: {error.strerror}",
            hint="ARGOSY_CACHE names another directory",
        ) from error
