"""Measure how fast this machine reads memory and its drive at this moment. Each probe takes a second or two.

Elsewhere: `forecast/calibration.py` measures all that a forecast needs, in a minute; `resources.py` reads facts.
"""

from __future__ import annotations

import statistics
from pathlib import Path

from argosy import _native
from argosy.config import MIB

MEMORY_BYTES = 512 * MIB  # larger than any cache
_DRIVE_BYTES = 512 * MIB
_PAGE_BYTES = 4096


def memory_rate(threads: int) -> float:
    """Return the bytes per second at which `threads` threads read memory: the median of three measurements.

    The median, not the best: on some virtual machines the memory rate changes every few seconds, and its best second
    promises too much. The probe allocates 512 MiB, or 8 MiB per thread if that is more.
    """
    nbytes = max(MEMORY_BYTES, 8 * MIB * threads)
    return statistics.median(_native.memory_probe(threads, nbytes) for _ in range(3))


def drive_rate(path: Path, record_bytes: int) -> float:
    """Return the bytes per second at which the drive reads a file, with the best of 1, 2 and 4 readers.

    Reads records of whole 4 KiB pages in shuffled order with O_DIRECT: half a GiB, or less of a smaller file.

    Raises:
        OSError: the file cannot be read.   RuntimeError: its file system does not support direct reads.
        ValueError: the file is smaller than one record.
    """
    record_bytes = -(-record_bytes // _PAGE_BYTES) * _PAGE_BYTES
    num_records = max(8, min(_DRIVE_BYTES, path.stat().st_size) // record_bytes)
    return max(
        _native.drive_probe(str(path), record_bytes, num_records, readers, True) for readers in (1, 2, 4)
    )
