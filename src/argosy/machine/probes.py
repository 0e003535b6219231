"""Rates of this machine at this moment: memory and the drive. Each takes a second or two.

Elsewhere: `forecast/calibration.py` measures what a forecast needs, in a minute; `resources.py` reads facts.
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
    """Bytes per second at which `threads` read memory: the median of three measurements.

    Not the best: the memory of some virtual machines changes its rate every few seconds, and a rate that it has for one
    of them promises too much. Takes 512 MiB meanwhile, or 8 MiB for each of many threads.
    """
    nbytes = max(MEMORY_BYTES, 8 * MIB * threads)
    return statistics.median(_native.memory_probe(threads, nbytes) for _ in range(3))


def drive_rate(path: Path, record_bytes: int) -> float:
    """Bytes per second at which the drive reads a file, the best of 1, 2 and 4 readers.

    Reads records of whole 4 KiB pages in shuffled order with O_DIRECT: half a GiB, or less of a smaller file.

    Raises:
        OSError: the file cannot be read.   RuntimeError: its file system has no direct reads.
        ValueError: the file has less than one record.
    """
    record_bytes = -(-record_bytes // _PAGE_BYTES) * _PAGE_BYTES
    num_records = max(8, min(_DRIVE_BYTES, path.stat().st_size) // record_bytes)
    return max(
        _native.drive_probe(str(path), record_bytes, num_records, readers, True) for readers in (1, 2, 4)
    )
