"""Keep one model's rows of logits until another model has read the same texts.

Exact divergences need the whole vocabulary at every position: a gigabyte or so, which may exceed the budget, and
only one of the two models is in memory at a time. So the rows go through an unnamed file in Argosy's cache
directory, which disappears when the process ends for any reason. Rows are dropped from the page cache once written
or read, because it counts as memory of the process.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from argosy.config import disk_size
from argosy.errors import DiskFull, UsageError, room_for
from argosy.machine import resources

_WRITTEN_BYTES = 8 << 20  # the most written bytes that stay in the page cache
_RESERVE_BYTES = 64 << 20  # bytes left free on the drive
_HINT = "free some space, or name a directory on another drive with ARGOSY_CACHE"


class RowFile:
    """Rows of float32, written once from first to last, then read once in the same order.

    Args:
        directory: created if missing.
        num_rows, row_values: the number of rows, and of values in each.

    Raises:
        DiskFull: they do not fit.   UsageError: the directory cannot be written.
    """

    def __init__(self, directory: Path, num_rows: int, row_values: int) -> None:
        self._directory, self._row_values = directory, row_values
        needed_bytes = num_rows * row_values * 4
        free_bytes = resources.free_disk_bytes(directory)
        if needed_bytes + _RESERVE_BYTES > free_bytes:
            raise DiskFull(
                f"the reference's logits take {disk_size(needed_bytes)} while the candidate is read, and "
                f"{disk_size(free_bytes)} are free in {directory}",
                hint=_HINT,
                path=directory,
                needed_bytes=needed_bytes + _RESERVE_BYTES,
                free_bytes=free_bytes,
            )
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115  # `__exit__` closes it
        except OSError as error:
            raise UsageError(
                f"{directory} cannot be written: {error.strerror}",
                hint="ARGOSY_CACHE names another directory",
            ) from error
        self._written = self._read = self._synced = 0

    def append(self, rows: NDArray[np.float32]) -> None:
        """Write rows: float32 [rows, row_values].

        Raises:
            DiskFull: there is no room left.
        """
        left = np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data
        with room_for("the reference's logits", self._directory, hint=_HINT):
            while left:
                count = os.pwrite(self._file.fileno(), left, self._written)
                self._written += count
                left = left[count:]
            if self._written - self._synced >= _WRITTEN_BYTES:
                os.fdatasync(self._file.fileno())
                self._leave_page_cache(self._synced, self._written)
                self._synced = self._written

    def take(self, count: int) -> NDArray[np.float32]:
        """Read the next `count` rows: float32 [count, row_values]."""
        rows = np.empty((count, self._row_values), np.float32)
        start, left = self._read, rows.reshape(-1).view(np.uint8).data
        while left:
            found = os.preadv(self._file.fileno(), [left], self._read)
            assert found  # the caller takes no more rows than were written
            self._read += found
            left = left[found:]
        self._leave_page_cache(start, self._read)
        return rows

    def _leave_page_cache(self, start: int, end: int) -> None:
        os.posix_fadvise(self._file.fileno(), start, end - start, os.POSIX_FADV_DONTNEED)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
