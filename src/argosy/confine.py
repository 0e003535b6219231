"""Limits that a process sets on itself before it touches data from a stranger; they cannot be lifted again.

Where a system does not know a limit, the others still hold: the parent process also enforces a time limit.
"""

from __future__ import annotations

import contextlib
import resource


def virtual_bytes() -> int:
    """Address space that this process uses."""
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[0]) * resource.getpagesize()


def limit_resource(name: int, value: int) -> None:
    """Set one limit (`resource.RLIMIT_CPU` ...), for good."""
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(name, (value, value))


def forbid_files() -> None:
    """Open nothing any more, write no byte to a file, and leave no core dump; three descriptors stay as they are."""
    for name, value in ((resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_NOFILE, 3), (resource.RLIMIT_CORE, 0)):
        limit_resource(name, value)


def limit_memory(nbytes: int) -> None:
    """Use at most this much address space until the next call."""
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (nbytes, resource.RLIM_INFINITY))
