"""Change files below a directory without ever following a symbolic link there.

    with Directory(path, make=True) as cache:        the user named this path, so it may be a link of theirs
        cache.put("sub/file.json", data)             no name below it may, even if somebody plants a link meanwhile

A name is relative to the open directory, and every directory on its way is opened without following links, so nothing
outside is ever read, written or removed. A link where a directory is expected, or a file to open, is an OSError that
says so. A link in the place of a file that is replaced or removed goes itself, and its target stays.

    with replacing(path) as write:                   a file that the user named: a link to it stays a link
        write(changed(path.read_bytes()))

After a crash at any moment either the old file or the new one is there, whole. Readers need no lock.

No other module removes, renames or replaces files.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from types import TracebackType
from typing import Self

_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_LOOK_S = 0.05  # between two looks at a lock with a deadline

Name = str | PurePath


class Directory:
    """An open directory. Every method takes names below it, such as "a" or "a/b".

    Args:
        make: create it, and the directories above it, if it is missing.
        mode: of the directory that is created.

    Raises (so does every method, about its own name):
        OSError: a part of the path is missing, not accessible, a link below the directory, or the directory itself is
            a link of another user. `filename` is the path.
        ValueError: a name leads out of the directory.
    """

    def __init__(self, path: Path, *, make: bool = False, mode: int = 0o777) -> None:
        if make:
            with contextlib.suppress(FileExistsError):  # if it is not a directory, opening it fails
                path.mkdir(mode=mode, parents=True)
        self.path = path
        try:
            self.descriptor = os.open(path, _OPEN | os.O_NOFOLLOW)
        except NotADirectoryError:
            self.descriptor = _open_linked(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close it. Closing twice is harmless."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def directory(self, name: Name, *, make: bool = False, mode: int = 0o777) -> Directory:
        """Open a directory below this one; with `make`, create what is missing on the way."""
        parts = _parts(name)
        inner = Directory.__new__(Directory)
        inner.path, inner.descriptor = self.path, os.dup(self.descriptor)
        try:
            for part in parts:
                inner.path /= part
                inner._enter(part, mode if make else None)
        except BaseException:
            inner.close()
            raise
        return inner

    def _enter(self, part: str, mode: int | None) -> None:
        """Become the directory `part` of this one."""
        with _naming(self.path):
            if mode is not None:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, mode, dir_fd=self.descriptor)
            try:
                inner = os.open(part, _OPEN | os.O_NOFOLLOW, dir_fd=self.descriptor)
            except NotADirectoryError:
                if _is(stat.S_ISLNK, _stat(part, self.descriptor)):
                    raise OSError(errno.ELOOP, "") from None
                raise
        os.close(self.descriptor)
        self.descriptor = inner

    @contextlib.contextmanager
    def _parent_of(self, name: Name) -> Iterator[tuple[int, str]]:
        """The descriptor of the directory that holds `name`, and the name there."""
        *folders, last = _parts(name)
        with self.directory("/".join(folders)) as parent, _naming(self.path / name):
            yield parent.descriptor, last

    # ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def open(self, name: Name, flags: int = os.O_RDONLY, mode: int = 0o600) -> int:
        """Open a regular file; returns its descriptor."""
        # Opening a named pipe must not block before fstat can refuse it.
        flags |= os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        with self._parent_of(name) as (parent, last):
            descriptor = os.open(last, flags, mode, dir_fd=parent)
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                os.close(descriptor)
                raise OSError(errno.EINVAL, "it is not a regular file")
        return descriptor

    def read(self, name: Name, most_bytes: int) -> bytes:
        """Read a whole file, of at most `most_bytes`."""
        with open(self.open(name), "rb", buffering=0) as file:
            parts, num_left = [], most_bytes + 1
            while num_left and (part := file.read(num_left)):
                parts.append(part)
                num_left -= len(part)
        if not num_left:
            raise OSError(errno.EINVAL, f"it has more than {most_bytes} bytes", str(self.path / name))
        return b"".join(parts)

    def stat(self, name: Name) -> os.stat_result | None:
        """The facts of a file, a directory or a link itself; None: there is nothing of that name."""
        try:
            with self._parent_of(name) as (parent, last):
                return _stat(last, parent)
        except FileNotFoundError:
            return None

    def is_directory(self, name: Name) -> bool:
        """Whether there is a directory of that name, and no link to one."""
        return _is(stat.S_ISDIR, self.stat(name))

    def names(self, name: Name = "") -> list[str]:
        """The names in a directory, sorted; none if it is missing."""
        try:
            with self.directory(name) as inner:
                return sorted(os.listdir(inner.descriptor))
        except FileNotFoundError:
            return []

    def files(self, name: Name = "") -> list[Path]:
        """The names of all files and links below a directory; none if it is missing."""
        found: list[Path] = []
        remaining = [Path(name)]  # a tree may be deeper than Python's stack
        while remaining:
            directory = remaining.pop()
            for entry in self.names(directory):
                inner = directory / entry
                (remaining if self.is_directory(inner) else found).append(inner)
        return found

    # ── changing ────────────────────────────────────────────────────────────────────────────────────────────────────

    def put(self, name: Name, data: bytes, mode: int = 0o600) -> None:
        """Replace a file, or create it with `mode`; the caller must be its only writer.

        The new file gets the old one's mode and, if we may set it, its owner.
        """
        with self._parent_of(name) as (parent, last):
            beside = f".{last}.new"
            _remove(beside, parent)  # left by a writer that was killed
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            descriptor = os.open(beside, flags, 0o600, dir_fd=parent)
            try:
                with open(descriptor, "wb") as file:
                    old = _stat(last, parent)
                    if old is not None and stat.S_ISREG(old.st_mode):
                        mode = stat.S_IMODE(old.st_mode)
                        _give(descriptor, old)
                    os.fchmod(descriptor, mode)
                    file.write(data)
                    file.flush()
                    os.fsync(descriptor)
                os.replace(beside, last, src_dir_fd=parent, dst_dir_fd=parent)
            except BaseException:
                _remove(beside, parent)
                raise
            # Otherwise a power cut may bring the old file back, and with it a revoked key.
            os.fsync(parent)

    def put_link(self, name: Name, target: str) -> None:
        """Replace a file or a link by a link; the caller must be its only writer."""
        with self._parent_of(name) as (parent, last):
            beside = f".{last}.new"
            _remove(beside, parent)
            os.symlink(target, beside, dir_fd=parent)
            try:
                os.replace(beside, last, src_dir_fd=parent, dst_dir_fd=parent)
            except BaseException:
                _remove(beside, parent)
                raise

    def move(self, name: Name, to: Name) -> None:
        """Rename a file or a directory; a file or a link that has the name `to` is replaced."""
        with self._parent_of(name) as (parent, last), self._parent_of(to) as (new_parent, new_last):
            os.rename(last, new_last, src_dir_fd=parent, dst_dir_fd=new_parent)

    def remove(self, name: Name) -> None:
        """Remove a file or a link, if it is there."""
        with contextlib.suppress(FileNotFoundError), self._parent_of(name) as (parent, last):
            _remove(last, parent)

    def remove_empty(self, name: Name) -> None:
        """Remove a directory if it is empty and we may."""
        with contextlib.suppress(OSError), self._parent_of(name) as (parent, last):
            os.rmdir(last, dir_fd=parent)

    def remove_tree(self, name: Name) -> None:
        """Remove a directory and everything in it, if it is there; another file system mounted below stays.

        Removes everything that can be removed; then raises the first error, if there was one.
        """
        first: OSError | None = None
        with contextlib.suppress(FileNotFoundError), self._parent_of(name) as (parent, last):
            with self.directory(name) as inner:
                if os.fstat(inner.descriptor).st_dev != os.fstat(parent).st_dev:
                    raise OSError(errno.EXDEV, "it is another file system")
                for entry in inner.names():
                    try:
                        if inner.is_directory(entry):
                            inner.remove_tree(entry)
                        else:
                            inner.remove(entry)
                    except OSError as error:
                        first = first or error
            if first is not None:
                raise first
            os.rmdir(last, dir_fd=parent)

    def sync(self) -> None:
        """Wait until the names of its entries are on the drive."""
        os.fsync(self.descriptor)

    # ── one process at a time ───────────────────────────────────────────────────────────────────────────────────────

    def lock(self, name: Name, *, wait_s: float | None = None, mode: int = 0o600) -> int:
        """Lock a file for this process, and create it if need be; returns the descriptor that holds the lock.

        The kernel releases the lock when the process ends, so a crash leaves nothing locked. A directory itself cannot
        be locked over NFS.

        Args:
            wait_s: for another process, at most; None: as long as it takes.

        Raises:
            TimeoutError: another process has held it for longer.
        """
        deadline = None if wait_s is None else time.monotonic() + wait_s
        while True:
            lock = self._open_lock(name, mode)
            try:
                _wait_for(lock, deadline, self.path / name)
                # Its last holder may have removed it, and then the next process would not see this lock.
                found = self.stat(name)
                if found is not None and os.path.samestat(os.fstat(lock), found):
                    return lock
            except BaseException:
                os.close(lock)
                raise
            os.close(lock)

    def _open_lock(self, name: Name, mode: int) -> int:
        try:
            lock = self.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)
        except FileExistsError:
            # It keeps its owner: it may be a hard link to a file that is not ours to give.
            return self.open(name, os.O_RDWR | os.O_CREAT, mode)
        with self._parent_of(name) as (parent, _):
            _give(lock, os.fstat(parent))
        return lock

    @contextlib.contextmanager
    def locked(self, name: Name, *, wait_s: float | None = None) -> Iterator[int]:
        """Hold a lock file for the duration of the context, and remove it at the end. Raises what `lock` raises."""
        lock = self.lock(name, wait_s=wait_s)
        try:
            yield lock
        finally:
            with contextlib.suppress(OSError):
                self.remove(name)
            os.close(lock)

    @contextlib.contextmanager
    def replacing(
        self, name: Name, *, mode: int = 0o600, wait_s: float | None = None
    ) -> Iterator[Callable[[bytes], None]]:
        """Yield a function that replaces a file, while no other process can. It need not be called.

        Raises what `put` and `lock` raise.
        """
        # The lock is a separate file: the next writer would not see a lock on a file that is replaced.
        name = Path(name)
        with self.locked(name.with_name(f".{name.name}.lock"), wait_s=wait_s):
            yield lambda data: self.put(name, data, mode)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Callable[[bytes], None]]:
    """`Directory.replacing` for a file that the user named: a link stays a link, and its target is replaced."""
    path = Path(os.path.realpath(path))
    with Directory(path.parent) as parent, parent.replacing(file_name(path)) as write:
        yield write


def read_named(
    path: Path, most_bytes: int, *, inspect: Callable[[os.stat_result], None] | None = None
) -> bytes:
    """Read the first `most_bytes` of a file or pipe that the user named.

    Args:
        inspect: gets the facts of the open file before it is read, and raises if it must not be.

    Raises:
        OSError: it cannot be read, or it is a pipe that nothing writes to, which would be waited for forever.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(descriptor, "rb", buffering=0) as file:
        if inspect is not None:
            inspect(os.fstat(descriptor))
        data = file.read(most_bytes)  # None: a writer of the pipe has written nothing yet
        if data == b"" and stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            raise OSError(errno.EPIPE, "it is a pipe that nothing writes to", str(path))
        os.set_blocking(descriptor, True)
        parts = [part := data or file.read(most_bytes)]
        num_left = most_bytes - len(part)
        while part and num_left:
            parts.append(part := file.read(num_left))
            num_left -= len(part)
    return b"".join(parts)


def file_name(path: Path) -> str:
    """The name of a file that the user named, in its directory.

    Raises:
        IsADirectoryError: the path can only name a directory: `.`, `..`, `/`, or no text.
    """
    if path.name in ("", ".."):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    return path.name


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a directory, are on the drive."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _parts(name: Name) -> tuple[str, ...]:
    parts = PurePath(name).parts
    if ".." in parts or PurePath(name).is_absolute():
        raise ValueError(f"{name} leads out of its directory")
    return parts


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Give an error of the system the whole path, and say what is wrong with a link."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ELOOP:
            error.strerror = "it is a symbolic link, and none is followed here"
        if os.sep not in str(error.filename or ""):  # otherwise an inner directory has named it
            error.filename = str(path)
        raise


def _open_linked(path: Path) -> int:
    """Open the directory that a link of this user or of root leads to.

    The kernel refuses a link of another user only in a directory that anyone may write, and only if it is set to.
    """
    link = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)  # from here on it cannot be exchanged
    try:
        facts = os.fstat(link)
        if not stat.S_ISLNK(facts.st_mode):
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if facts.st_uid not in (0, os.geteuid()):
            raise OSError(errno.ELOOP, "it is a symbolic link of another user")
        return os.open(path.parent / os.readlink("", dir_fd=link), _OPEN)
    except OSError as error:
        error.filename = str(path)  # not its target, which the user did not name
        raise
    finally:
        os.close(link)


def _stat(name: str, parent: int) -> os.stat_result | None:
    with contextlib.suppress(FileNotFoundError):
        return os.stat(name, dir_fd=parent, follow_symlinks=False)
    return None


def _is(kind: Callable[[int], bool], facts: os.stat_result | None) -> bool:
    return facts is not None and kind(facts.st_mode)


def _remove(name: str, parent: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=parent)


def _give(descriptor: int, facts: os.stat_result) -> None:
    """Keep the owner, so that `sudo argosy keys add` leaves a file that the server's own user can read."""
    with contextlib.suppress(OSError):  # we may not, or the owner has no number in our user namespace
        os.fchown(descriptor, facts.st_uid, facts.st_gid)


def _wait_for(lock: int, deadline: float | None, path: Path) -> None:
    if deadline is None:
        return fcntl.flock(lock, fcntl.LOCK_EX)
    while True:
        with contextlib.suppress(BlockingIOError):
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if time.monotonic() >= deadline:
            raise TimeoutError(f"{path} stayed locked")
        time.sleep(_LOOK_S)
