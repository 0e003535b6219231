"""Keep the keys and values of prompts in files, so that the next process need not recompute a prompt.

    <kv dir>/secret                        32 random bytes; all names and checksums are keyed with them
    <kv dir>/lock                          held by the process that uses the directory
    <kv dir>/<tenant>/<content>.kv         a KV block
    <kv dir>/<tenant>/<content>.state      the recurrent state after it

A file is a header, the payload, and a keyed BLAKE3 of both. It is written under a temporary name and renamed when
complete. It is used only if every field is as expected: version, model and format, tokens, tenant, age, checksum. A
file that is damaged, truncated, too old or from another model is never trusted: it is removed and its prompt computed.
A file that cannot be read at the moment stays, and its prompt is computed; the same goes for a file from the future,
left by a clock that was set back. When files exceed the size limit, the least recently used are removed. A full or
failing drive costs nothing but reuse.

These files reveal prompts: directories have mode 0700, files 0600, and names are hashes that nobody can compute
without the secret. One thread writes; several threads read ahead of the caller, enough to keep a drive busy.

Elsewhere: `engine/prefix.py` decides which contents to keep in files.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hmac
import mmap
import os
import queue
import re
import stat
import struct
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from argosy.config import KvDir
from argosy.directory import Directory
from argosy.errors import UsageError
from argosy.kept.kv_cache import BlockContent
from argosy.private_files import hold, open_private, read_secret

VERSION = 1
SECRET_BYTES = 32
Kind = Literal["kv", "state"]

# magic, version, kind, unix time, payload bytes, model and format, parent, key; then the tokens
_HEADER = struct.Struct("<8sIIdQ32s32s32s")
_HEADER_BYTES, _MAC_BYTES = 4096, 32  # the payload starts at a page boundary
_MAGIC = b"ARGOSYKV"
_KINDS: dict[Kind, int] = {"kv": 0, "state": 1}
_NAME = re.compile(r"[0-9a-f]{64}\.(kv|state)")
_SECRET = "secret"  # name of the file
_TENANT = re.compile(r"[0-9a-f]{32}")
# Threads: two saturate an idle drive; while experts are read, four get a third more of its bandwidth.
_READERS = 4
# One more than the reads in flight: the caller uses or fills one.
_READ_BUFFERS, _WRITE_BUFFERS = _READERS + 1, 2
_PAGE_BYTES = 4096
# The file is gone, or it is a link that we did not make.
_NO_SUCH_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
_SWEEP_SECONDS = 60.0
_REST_SECONDS = 60.0  # pause in writing after a failed write
DRIVE_S = 30.0  # how long to wait for a drive to read or write a file; answers wait meanwhile

Bytes = NDArray[np.uint8]


def buffer_bytes(block_bytes: int, state_bytes: int) -> int:
    """Return the memory that a `PrefixFiles` takes, including the page cache of the file being written."""
    longest = _buffer_bytes(max(block_bytes, state_bytes))
    return _reading_bytes(block_bytes, state_bytes) + (_WRITE_BUFFERS + 1) * longest


_Id = tuple[bytes, Kind]  # key of a content


def forget_files(directory: Path, tenant: str) -> None:
    """Delete the files of a tenant in the directory of an engine that is not open."""
    with contextlib.suppress(OSError), Directory(directory) as root:  # no engine has used it yet
        _erase(root, tenant)


def erase_files(directory: Path, tenant: str) -> int:
    """Delete the files of a tenant in a directory that no engine uses, and in the directories of models below it.

    Returns:
        The number of deleted files.

    Raises:
        UsageError: an engine uses a directory, or something in it cannot be read or deleted.
    """
    num_files = 0
    try:
        with Directory(directory) as top:
            for name in ("", *top.names()):
                facts = top.stat(Path(name, _SECRET)) if name == "" or top.is_directory(name) else None
                if facts is None or facts.st_size != SECRET_BYTES:
                    continue
                with top.directory(name) as root:
                    held = hold(root, option="--kv-dir")
                    try:
                        num_files += _erase(root, tenant)
                    finally:
                        os.close(held)
    except OSError as error:
        raise UsageError(
            f"{error.filename or directory} cannot be read or deleted: {error.strerror}"
        ) from None
    return num_files


def _erase(root: Directory, tenant: str) -> int:
    """Delete the files of a tenant; return their number."""
    secret = root.read(_SECRET, SECRET_BYTES)
    if len(secret) != SECRET_BYTES:
        return 0
    own = _tenant_directory(tenant_key(secret, tenant))
    num_files = len(root.names(own))
    root.remove_tree(own)
    return num_files


def _tenant_directory(key: bytes) -> Path:
    return Path(blake3(b"directory", key=key).hexdigest()[:32])


def tenant_key(secret: bytes, tenant: str) -> bytes:
    """Return the hash key for everything that belongs to one tenant."""
    return blake3(b"argosy tenant\0" + tenant.encode(), key=secret).digest()


class _File(NamedTuple):
    path: Path  # below the root
    nbytes: int
    written_at: float


class _Found(NamedTuple):
    """The payload of a file, or None if the file cannot be used now. `is_bad` means never usable: remove the file."""

    payload: Bytes | None
    is_bad: bool


class _Job(NamedTuple):
    id: _Id
    file: _File
    key: bytes  # for the checksum
    buffer: Bytes  # header, payload, and room for the checksum


class PrefixFiles:
    """The files of one model's engine. Only one process at a time may use a directory.

    Args:
        identity: 32 bytes that identify the model, the format of keys and values, and the arithmetic.
        block_bytes: size of a KV block.   state_bytes: size of a recurrent state; 0 where no layer has one.
        clock: seconds since 1970.

    Raises:
        UsageError: the directory belongs to someone else, is open to other users or in use by another process, or
            something in it cannot be read or written.
    """

    def __init__(
        self,
        config: KvDir,
        *,
        identity: bytes,
        block_bytes: int,
        state_bytes: int = 0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._config = config
        self.identity = identity
        self._payload_bytes: dict[Kind, int] = {"kv": block_bytes, "state": state_bytes}
        self._clock = clock
        self._lock = threading.Lock()  # guards _files and _num_bytes
        self._files: OrderedDict[_Id, _File] = OrderedDict()  # least recently used first
        self._num_bytes = 0
        self._tenant = functools.lru_cache(maxsize=1024)(self._find_tenant)
        self._rests_until = 0.0
        self._writable: queue.SimpleQueue[Bytes] = queue.SimpleQueue()
        self._jobs: queue.SimpleQueue[_Job | Path | None] = queue.SimpleQueue()
        self._root = open_private(config.path, option="--kv-dir", holds="prompts")
        self._held = -1
        try:
            self._held = hold(self._root, option="--kv-dir")
            self.secret = read_secret(config.path / _SECRET, SECRET_BYTES, lost_with_it="files made with it")
            self._scan()
            self._readers = ThreadPoolExecutor(_READERS, "argosy-kv-dir-reader")
            self._under_way: deque[tuple[BlockContent, Bytes, Future[_Found]]] = deque()
            self._patience_s = DRIVE_S
            self._reading = _aligned(_reading_bytes(block_bytes, state_bytes))
            for _ in range(_WRITE_BUFFERS):
                self._writable.put(_aligned(_buffer_bytes(max(block_bytes, state_bytes))))
            self._thread = threading.Thread(target=self._write_all, name="argosy-kv-dir", daemon=True)
            self._thread.start()
        except BaseException as error:
            self._release()
            if isinstance(error, OSError):
                raise UsageError(
                    f"{error.filename or config.path} cannot be used for --kv-dir: {error.strerror}"
                ) from error
            raise

    @property
    def num_bytes(self) -> int:
        """Total size of all files."""
        return self._num_bytes

    @property
    def max_bytes(self) -> int:
        return self._config.max_bytes

    def file_bytes(self, kind: Kind) -> int:
        return _file_bytes(self._payload_bytes[kind])

    def has(self, kind: Kind, content: BlockContent) -> bool:
        """Whether a file exists. Only reading it shows whether it can be trusted."""
        return (content.key, kind) in self._files

    def read(self, kind: Kind, contents: Sequence[BlockContent]) -> Generator[Bytes | None, None, None]:
        """Yield the payload of each file in order, or None for a file that is missing or not trusted.

        The next files are read while the caller uses one. A payload stays valid until the next one is requested. If the
        drive does not answer within `DRIVE_S`, every file counts as missing until it does: late reads still fill the
        buffers.
        """
        waiting, free, under_way = deque(contents), self._read_buffers(kind), self._under_way
        is_late = not self._have_ended([future for _, _, future in under_way])
        if not is_late:
            under_way.clear()
        for _ in contents:
            if is_late:
                yield None
                continue
            while waiting and free:
                content, buffer = waiting.popleft(), free.pop()
                under_way.append((content, buffer, self._readers.submit(self._read, kind, content, buffer)))
            content, buffer, future = under_way[0]
            if is_late := not self._have_ended([future]):
                yield None
                continue
            under_way.popleft()
            found = future.result()
            self._note_use(kind, content, is_bad=found.is_bad)
            yield found.payload
            free.append(buffer)

    def _have_ended(self, reads: list[Future[_Found]]) -> bool:
        """Wait for reads. Once the drive was late, poll without waiting until it has answered."""
        is_late = bool(wait(reads, self._patience_s).not_done)
        self._patience_s = 0.0 if is_late else DRIVE_S
        return not is_late

    def _read_buffers(self, kind: Kind) -> list[Bytes]:
        """Divide the reading memory into buffers for this kind: several for blocks, one for a large state."""
        size = _buffer_bytes(self._payload_bytes[kind])
        count = min(_READ_BUFFERS, len(self._reading) // size)
        return [self._reading[at * size : (at + 1) * size] for at in range(count)]

    def _note_use(self, kind: Kind, content: BlockContent, *, is_bad: bool) -> None:
        id: _Id = (content.key, kind)
        with self._lock:
            if is_bad:
                self._remove(id, self._path(kind, content))
            elif id in self._files:
                self._files.move_to_end(id)

    def offer(self, kind: Kind, content: BlockContent, fill: Callable[[Bytes], None]) -> bool:
        """Write a file if the thread is free: `fill` is then called with a buffer for the payload.

        Returns:
            False if the thread is busy; try again later.
        """
        now = self._clock()
        if self.has(kind, content) or now < self._rests_until:
            return True
        try:
            buffer = self._writable.get_nowait()
        except queue.Empty:
            return False
        size = self.file_bytes(kind)
        whole = buffer[:size]
        whole[:_HEADER_BYTES] = np.frombuffer(self._header(kind, content, now), np.uint8)
        fill(whole[_HEADER_BYTES : size - _MAC_BYTES])
        file = _File(self._path(kind, content), size, now)
        self._jobs.put(_Job((content.key, kind), file, self._tenant(content.tenant)[0], buffer))
        return True

    def forget(self, tenant: str) -> None:
        """Hide a tenant's files at once; the thread removes them after the writes it has already accepted."""
        self._forget(self._tenant(tenant)[1])

    def forget_others(self, tenants: Collection[str]) -> None:
        """Forget all tenants except these."""
        known = {self._tenant(tenant)[1] for tenant in tenants}
        for directory in self._tenant_directories():
            if directory not in known:
                self._forget(directory)

    def _forget(self, directory: Path) -> None:
        self._drop(directory)
        self._jobs.put(directory)

    def _drop(self, directory: Path) -> None:
        with self._lock:
            for id in [id for id, file in self._files.items() if file.path.parent == directory]:
                self._num_bytes -= self._files.pop(id).nbytes

    def _tenant_directories(self) -> list[Path]:
        return [
            Path(name)
            for name in self._root.names()
            if _TENANT.fullmatch(name) and self._root.is_directory(name)
        ]

    def close(self) -> None:
        """Write the accepted files and release the directory. Closing twice is harmless.

        The thread keeps files that the drive does not accept within `DRIVE_S`; it ends with the process.
        """
        if self._held < 0:
            return
        self._jobs.put(None)
        self._thread.join(DRIVE_S)
        have_read = self._have_ended([future for _, _, future in self._under_way])
        self._readers.shutdown(wait=have_read)
        self._release(is_unused=have_read and not self._thread.is_alive())

    def _release(self, *, is_unused: bool = True) -> None:
        if self._held >= 0:
            os.close(self._held)
            self._held = -1
        if is_unused:  # otherwise another file could get the descriptor that a thread still uses
            self._root.close()

    # ── names and headers ───────────────────────────────────────────────────────────────────────────────────────

    def _find_tenant(self, tenant: str) -> tuple[bytes, Path]:
        key = tenant_key(self.secret, tenant)
        return key, _tenant_directory(key)

    def _path(self, kind: Kind, content: BlockContent) -> Path:
        return self._tenant(content.tenant)[1] / f"{content.key.hex()}.{kind}"

    def _header(self, kind: Kind, content: BlockContent, written_at: float) -> bytes:
        fixed = (_MAGIC, VERSION, _KINDS[kind], written_at, self._payload_bytes[kind])
        header = _HEADER.pack(*fixed, self.identity, content.parent, content.key) + content.tokens
        return header.ljust(_HEADER_BYTES, b"\0")

    # ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _read(self, kind: Kind, content: BlockContent, buffer: Bytes) -> _Found:
        """Read one file into `buffer`; runs in a reader thread."""
        try:
            is_whole = _read_into(self._root, self._path(kind, content), self.file_bytes(kind), buffer)
        except OSError as error:  # too many open files, or a failing drive: the file itself may be good
            return _Found(None, is_bad=error.errno in _NO_SUCH_FILE)
        return self._checked(kind, content, buffer) if is_whole else _Found(None, is_bad=True)

    def _checked(self, kind: Kind, content: BlockContent, buffer: Bytes) -> _Found:
        """Return the payload of the file in `buffer`, if every field is as expected."""
        whole = buffer[: self.file_bytes(kind)]
        data = whole.data
        written_at = float(_HEADER.unpack_from(data)[3])
        if bytes(data[:_HEADER_BYTES]) != self._header(kind, content, written_at):
            return _Found(None, is_bad=True)
        mac = _mac(self._tenant(content.tenant)[0], whole)
        if not hmac.compare_digest(mac, bytes(data[-_MAC_BYTES:])):
            return _Found(None, is_bad=True)
        age_s = self._clock() - written_at
        if not 0 <= age_s <= self._config.ttl_s:
            return _Found(None, is_bad=age_s > 0)  # a file from the future is intact: the clock was set back
        return _Found(whole[_HEADER_BYTES:-_MAC_BYTES], is_bad=False)

    def _scan(self) -> None:
        """Find files of earlier processes, oldest first, and remove files that are not ours."""
        found: list[tuple[_Id, _File]] = []
        for directory in self._tenant_directories():
            for name in self._root.names(directory):
                path = directory / name
                facts = self._root.stat(path)
                if facts is None or not stat.S_ISREG(facts.st_mode) or not _NAME.fullmatch(name):
                    self._unlink(path)  # an interrupted write
                    continue
                key, _, kind = name.partition(".")
                file = _File(path, facts.st_size, facts.st_mtime)
                found.append(((bytes.fromhex(key), "kv" if kind == "kv" else "state"), file))
        found.sort(key=lambda item: item[1].written_at)
        self._files.update(found)
        self._num_bytes = sum(file.nbytes for _, file in found)
        self._sweep()

    # ── writing: the thread ─────────────────────────────────────────────────────────────────────────────────────

    def _write_all(self) -> None:
        swept_at = time.monotonic()
        while True:
            job: _Job | Path | None = None
            with contextlib.suppress(queue.Empty):
                job = self._jobs.get(timeout=_SWEEP_SECONDS)
                if job is None:
                    return
            if isinstance(job, Path):  # the directory of a forgotten tenant
                self._drop(job)
                with contextlib.suppress(OSError):
                    self._root.remove_tree(job)
            elif job is not None:
                try:
                    self._write(job)
                except OSError:  # no space, or no drive: the next process computes these prompts again
                    self._rests_until = self._clock() + _REST_SECONDS
                finally:
                    self._writable.put(job.buffer)
            if time.monotonic() - swept_at >= _SWEEP_SECONDS:
                self._sweep()
                swept_at = time.monotonic()

    def _write(self, job: _Job) -> None:
        file, whole = job.file, job.buffer[: job.file.nbytes]
        if file.nbytes > self._config.max_bytes:
            return
        whole[-_MAC_BYTES:] = np.frombuffer(_mac(job.key, whole), np.uint8)
        self._root.directory(file.path.parent, make=True, mode=0o700).close()
        temporary = file.path.parent / f"{os.urandom(8).hex()}.writing"
        descriptor = self._root.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            with open(descriptor, "wb", buffering=0) as out:
                data = whole.data
                while data:
                    data = data[out.write(data) :]
                os.fdatasync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            self._sweep(room_for=file.nbytes)
            self._root.move(temporary, file.path)
        except BaseException:
            self._unlink(temporary)
            raise
        with self._lock:
            before = self._files.pop(job.id, None)  # two prompts had the same prefix
            self._num_bytes += file.nbytes - (before.nbytes if before is not None else 0)
            self._files[job.id] = file

    def _sweep(self, *, room_for: int = 0) -> None:
        """Remove files that are too old, then the least recently used ones until the size limit holds."""
        with self._lock:
            oldest = self._clock() - self._config.ttl_s
            for id, file in [item for item in self._files.items() if item[1].written_at < oldest]:
                self._remove(id, file.path)
            while self._files and self._num_bytes + room_for > self._config.max_bytes:
                id, file = next(iter(self._files.items()))
                self._remove(id, file.path)

    def _remove(self, id: _Id, path: Path) -> None:
        if (file := self._files.pop(id, None)) is not None:
            self._num_bytes -= file.nbytes
        self._unlink(path)

    def _unlink(self, path: Path) -> None:
        with contextlib.suppress(OSError):
            self._root.remove(path)


def _file_bytes(payload_bytes: int) -> int:
    return _HEADER_BYTES + payload_bytes + _MAC_BYTES


def _mac(key: bytes, whole: Bytes) -> bytes:
    """Return a file's checksum, computed over all but its last bytes, which hold the checksum."""
    return blake3(whole.data[:-_MAC_BYTES], key=key).digest()


def _buffer_bytes(payload_bytes: int) -> int:
    return -(-_file_bytes(payload_bytes) // _PAGE_BYTES) * _PAGE_BYTES


def _reading_bytes(block_bytes: int, state_bytes: int) -> int:
    return max(_READ_BUFFERS * _buffer_bytes(block_bytes), _buffer_bytes(state_bytes) if state_bytes else 0)


def _aligned(nbytes: int) -> Bytes:
    """Allocate a buffer aligned for direct reads."""
    return np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)


def _read_into(root: Directory, path: Path, size: int, buffer: Bytes) -> bool:
    """Read a file, bypassing the page cache, which would be charged to the budget. Return False if its size differs."""
    try:
        descriptor = root.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        descriptor = root.open(path)  # the file system does not support direct reads
    try:
        return os.fstat(descriptor).st_size == size and os.preadv(descriptor, [buffer.data], 0) == size
    finally:
        os.close(descriptor)
