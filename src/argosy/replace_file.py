"""Replace a small file atomically, one process at a time.

    with replacing(path) as write:     other writers of `path` wait
        write(changed(path.read_bytes()))

After a crash at any moment, either the old file or the new one is there, whole. Readers need no lock. A caller that
excludes other writers itself calls `replace`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

_LOOK_S = 0.05  # between two looks at a lock with a deadline


@contextlib.contextmanager
def replacing(
    path: Path, *, mode: int = 0o600, wait_s: float | None = None
) -> Iterator[Callable[[bytes], None]]:
    """Yield a function that replaces `path`, while no other process can. It need not be called.

    A symbolic link stays a link. The new file gets the old file's mode and, if we may set it, its owner; if there was
    no old file, it gets `mode`.

    Args:
        wait_s: for another writer, at most; None: as long as it takes.

    Raises:
        TimeoutError: the other writer took longer.
        OSError: the directory cannot be written, or its drive is full; `path` is then unchanged.
    """
    path = Path(os.path.realpath(path))
    # The lock is a separate file: the next writer would not see a lock on a file that is replaced.
    # The kernel releases it when the process ends, so a crash leaves nothing locked.
    lock_path = path.with_name(f".{path.name}.lock")
    lock = _locked(lock_path, None if wait_s is None else time.monotonic() + wait_s)
    try:
        yield lambda data: replace(path, data, mode)
    finally:
        with contextlib.suppress(OSError):
            lock_path.unlink()
        os.close(lock)


def replace(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replace `path` with `data`; the caller must be its only writer. Raises what `replacing` raises."""
    beside = path.with_name(f".{path.name}.new")
    beside.unlink(missing_ok=True)  # left by a writer that was killed: only one process holds the lock
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            if path.exists():
                mode = path.stat().st_mode & 0o7777
                _give_to_owner_of(path, descriptor)
            os.fchmod(descriptor, mode)
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync(path.parent)  # otherwise a power cut may bring the old file back, and with it a revoked key


def _locked(path: Path, deadline: float | None) -> int:
    """Create a lock file and lock it; returns its descriptor. Raises TimeoutError at the deadline."""
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            _give_to_owner_of(path.parent, lock)
            _lock(lock, path, deadline)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock), path.stat(follow_symlinks=False)):
                    return lock
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)  # its last holder removed it, so the next writer would not see it


def _lock(lock: int, path: Path, deadline: float | None) -> None:
    if deadline is None:
        return fcntl.flock(lock, fcntl.LOCK_EX)
    while True:
        with contextlib.suppress(BlockingIOError):
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if time.monotonic() >= deadline:
            raise TimeoutError(f"{path} stayed locked")
        time.sleep(_LOOK_S)


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a directory, are on the drive."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _give_to_owner_of(path: Path, descriptor: int) -> None:
    """Keep the owner, so that `sudo argosy keys add` leaves a file that the server's own user can read."""
    facts = path.stat()
    with contextlib.suppress(PermissionError):
        os.fchown(descriptor, facts.st_uid, facts.st_gid)
