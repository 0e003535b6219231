"""Directories and secrets that only their owner may read.

    open_private   ->  a directory of mode 0700
    hold           ->  it is this process's alone
    make_secret    ->  random bytes in a new file of mode 0600
    read_secret    ->  the bytes; made if there are none, unless the caller says otherwise

Elsewhere: a file that is replaced in one go is `directory.py`.
"""

from __future__ import annotations

import os
from pathlib import Path

from argosy.directory import Directory, file_name
from argosy.errors import UsageError

LOCK = "lock"  # name of the file that a process locks to hold a directory


def open_private(path: Path, *, option: str, holds: str) -> Directory:
    """Open a directory that only we can access; create it if it is missing.

    Args:
        option: the option that names it, and `holds` what it would hold, for the error.

    Raises:
        UsageError: it cannot be created, is a link or no directory, belongs to another user, or is open to others.
    """
    try:
        directory = Directory(path, make=True, mode=0o700)
    except OSError as error:
        raise UsageError(f"{path} cannot be used as {option}: {error.strerror}") from None
    if path.is_symlink():
        directory.close()
        raise UsageError(
            f"{path} would hold {holds}, and it is a symbolic link",
            hint=f"name the directory itself: {path.resolve()}",
        )
    facts = os.fstat(directory.descriptor)
    if facts.st_uid != os.geteuid():
        directory.close()
        raise UsageError(
            f"{path} would hold {holds}, but it belongs to another user",
            hint="run the command as that user, or name a directory of your own",
        )
    if facts.st_mode & 0o077:
        directory.close()
        raise UsageError(
            f"{path} would hold {holds}, but other users can access it",
            hint=f"run `chmod 700 {path}`, or name a directory that does not exist yet",
        )
    return directory


def hold(directory: Directory, *, option: str) -> int:
    """Lock a directory for this process; returns the descriptor that holds the lock.

    Raises:
        UsageError: another process holds it, or it cannot be locked.
    """
    try:
        return directory.lock(LOCK, wait_s=0.0)
    except TimeoutError:
        raise UsageError(
            f"{directory.path} is in use by another process",
            hint=f"give each its own {option}; a running server erases data with `argosy data erase --url URL`",
        ) from None
    except OSError as error:
        raise UsageError(f"{directory.path} cannot be locked: {error.strerror}") from None


def make_secret(path: Path, num_bytes: int) -> None:
    """Make a secret in a new file.

    Raises:
        UsageError: there is such a file.
        OSError: it cannot be written.
    """
    with Directory(path.parent) as parent:
        try:
            descriptor = parent.open(file_name(path), os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        except FileExistsError:
            raise UsageError(
                f"{path} exists, and a secret is never replaced", hint="name another file"
            ) from None
        with open(descriptor, "wb", buffering=0) as file:
            file.write(os.urandom(num_bytes))
            os.fsync(descriptor)
        parent.sync()


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
        with Directory(path.parent) as parent:
            descriptor = parent.open(file_name(path))
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
