"""A lock for those who put something into the user's cache directory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from argosy.directory import Directory
from argosy.errors import UsageError, is_disk_full

Progress = Callable[[str, float], None]


@contextmanager
def locked(directory: Path, name: str) -> Iterator[Directory]:
    """Wait until no other process has the lock file `name` in the directory, which is made if it is missing.

    Raises:
        UsageError: something in the directory cannot be made, read or written.
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
