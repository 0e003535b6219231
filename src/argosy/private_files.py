"""Directories and secrets that only their owner may read.

    make_private   ->  a directory of mode 0700
    make_secret    ->  random bytes in a new file of mode 0600
    read_secret    ->  the bytes; made if there are none, unless the caller says otherwise

Elsewhere: a file that is replaced in one go is `directory.py`.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from argosy.directory import Directory, sync
from argosy.errors import UsageError


def make_private(directory: Path, *, option: str, holds: str) -> None:
    """Create a directory, or check that only we can access it.

    Args:
        option: the option that names it, and `holds` what it would hold, for the error.

    Raises:
        UsageError: it cannot be created, is no directory, belongs to another user, or is open to others.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = directory.lstat()
    except OSError as error:
        raise UsageError(f"{directory} cannot be used as {option}: {error.strerror}") from None
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.geteuid() or facts.st_mode & 0o077:
        raise UsageError(
            f"{directory} would hold {holds}, but other users can access it",
            hint=f"run `chmod 700 {directory}`, or name a directory that does not exist yet",
        )


def make_secret(path: Path, num_bytes: int) -> None:
    """Make a secret in a new file.

    Raises:
        UsageError: there is such a file.
        OSError: it cannot be written.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise UsageError(f"{path} exists, and a secret is never replaced", hint="name another file") from None
    with open(descriptor, "wb", buffering=0) as file:
        file.write(os.urandom(num_bytes))
        os.fsync(file.fileno())
    sync(path.parent)


def read_secret(path: Path, num_bytes: int, *, lost_with_it: str, may_make: bool = True) -> bytes:
    """Read a secret; create one if the file is missing or empty. The caller excludes other writers.

    Args:
        lost_with_it: the data that become useless with another secret, for the hint.
        may_make: False: a missing file is an OSError, and an empty one a UsageError.

    Raises:
        UsageError: others can read the file, or it has another size.
        OSError: it cannot be read or written.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        if not may_make:
            raise
        return _write_secret(path, num_bytes)
    with open(descriptor, "rb", buffering=0) as file:
        if os.fstat(file.fileno()).st_mode & 0o077:
            raise UsageError(
                f"{path} can be read by others", hint=f"remove it; {lost_with_it} become useless"
            )
        secret = file.read(num_bytes + 1)
    if not secret and may_make:
        return _write_secret(path, num_bytes)
    if len(secret) != num_bytes:
        raise UsageError(
            f"{path} holds {'more' if len(secret) > num_bytes else len(secret)} bytes, expected {num_bytes}",
            hint="remove it" if may_make else None,
        )
    return secret


def _write_secret(path: Path, num_bytes: int) -> bytes:
    """Create a secret, and have it on the drive before anything is written with it."""
    secret = os.urandom(num_bytes)
    with Directory(path.parent) as parent:
        parent.put(path.name, secret)
    return secret
