"""Keys and values of prompts in files, so that a prompt need not be computed again by the next process.

    <kv dir>/secret                        32 random bytes; all names and checksums are keyed with them
    <kv dir>/<tenant>/<content>.kv         a KV block
    <kv dir>/<tenant>/<content>.state      the recurrent state behind it

A file is a header, the bytes, and a keyed BLAKE3 of both. It is written under another name and renamed when whole. It
is used if every field is as expected: version, model and format, tokens, tenant, age, checksum. A file that is damaged,
cut off, too old or another's is removed and never trusted; its prompt is computed. A file that cannot be read at the
moment stays. Files that were not used for longest go when there are too many bytes. A drive that is full or refuses
costs nothing but the reuse.

What lies here tells what was said: directories are 0700, files 0600, and names are hashes that nobody can make without
the secret. A thread writes; others read ahead of the caller, as many at once as keep a drive busy.

Elsewhere: which contents are worth a file is `prefix.py`'s decision.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hmac
import mmap
import os
import queue
import re
import shutil
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
from argosy.engine.kv_cache import BlockContent
from argosy.errors import UsageError
from argosy.replace_file import replace

VERSION = 1
SECRET_BYTES = 32
Kind = Literal["kv", "state"]

# magic, version, kind, unix time, bytes of the payload, model and format, parent, key; then the tokens
_HEADER = struct.Struct("<8sIIdQ32s32s32s")
_HEADER_BYTES, _MAC_BYTES = 4096, 32  # a payload begins where memory pages do
_MAGIC = b"ARGOSYKV"
_KINDS: dict[Kind, int] = {"kv": 0, "state": 1}
_NAME = re.compile(r"[0-9a-f]{64}\.(kv|state)")
_TENANT = re.compile(r"[0-9a-f]{32}")
_READERS = 4  # threads: alone on a drive two are enough; beside reads of experts four get a third more of it
# One more than is under way: somebody looks into it, or fills it.
_READ_BUFFERS, _WRITE_BUFFERS = _READERS + 1, 2
_PAGE_BYTES = 4096
_NO_SUCH_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)  # it is gone, or a link that we did not make
_SWEEP_SECONDS = 60.0
_REST_SECONDS = 60.0  # after a write that failed

Bytes = NDArray[np.uint8]


def buffer_bytes(block_bytes: int, state_bytes: int) -> int:
    """What a `PrefixFiles` takes of memory, the page cache of the file that is written included."""
    longest = _buffer_bytes(max(block_bytes, state_bytes))
    return _reading_bytes(block_bytes, state_bytes) + (_WRITE_BUFFERS + 1) * longest


_Id = tuple[bytes, Kind]  # key of a content


def tenant_key(secret: bytes, tenant: str) -> bytes:
    """What everything of one tenant is hashed with."""
    return blake3(b"argosy tenant\0" + tenant.encode(), key=secret).digest()


class _File(NamedTuple):
    path: Path
    nbytes: int
    written_at: float


class _Found(NamedTuple):
    """The payload of a file, or None if it cannot be used now. `is_bad`: it can never be used, so remove it."""

    payload: Bytes | None
    is_bad: bool


class _Job(NamedTuple):
    id: _Id
    file: _File
    key: bytes  # of the checksum
    buffer: Bytes  # header, payload, and room for the checksum


class PrefixFiles:
    """The files of one model's engine; one process at a time uses a directory.

    Args:
        identity: 32 bytes that stand for the model, the format of keys and values, and the arithmetic.
        block_bytes: of a KV block.   state_bytes: of a recurrent state; 0 where no layer has one.
        clock: seconds since 1970.

    Raises:
        UsageError: the directory is another's, open to others, or in use by another process.
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
        self._root = config.path
        self._lock = threading.Lock()  # of _files and _num_bytes
        self._files: OrderedDict[_Id, _File] = OrderedDict()  # not used for longest first
        self._num_bytes = 0
        self._tenant = functools.lru_cache(maxsize=1024)(self._find_tenant)
        self._rests_until = 0.0
        self._writable: queue.SimpleQueue[Bytes] = queue.SimpleQueue()
        self._jobs: queue.SimpleQueue[_Job | Path | None] = queue.SimpleQueue()
        _make_private(self._root)
        self._held = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._held)
            raise UsageError(
                f"{self._root} is in use by another process", hint="give each engine a --kv-dir of its own"
            ) from None
        try:
            self.secret = _read_secret(self._root / "secret")
            self._scan()
            self._readers = ThreadPoolExecutor(_READERS, "argosy-kv-dir-reader")
            self._reading = _aligned(_reading_bytes(block_bytes, state_bytes))
            for _ in range(_WRITE_BUFFERS):
                self._writable.put(_aligned(_buffer_bytes(max(block_bytes, state_bytes))))
            self._thread = threading.Thread(target=self._write_all, name="argosy-kv-dir", daemon=True)
            self._thread.start()
        except BaseException:
            os.close(self._held)
            raise

    @property
    def num_bytes(self) -> int:
        """Of all files."""
        return self._num_bytes

    @property
    def max_bytes(self) -> int:
        return self._config.max_bytes

    def file_bytes(self, kind: Kind) -> int:
        return _file_bytes(self._payload_bytes[kind])

    def has(self, kind: Kind, content: BlockContent) -> bool:
        """Whether there is a file; whether it can be trusted shows when it is read."""
        return (content.key, kind) in self._files

    def read(self, kind: Kind, contents: Sequence[BlockContent]) -> Generator[Bytes | None, None, None]:
        """The payload of each file, in order; None: there is no file to be trusted.

        The next ones are read while the caller looks at one, which stays as it is until the next is asked for.
        """
        waiting, free = deque(contents), self._read_buffers(kind)
        under_way: deque[tuple[BlockContent, Bytes, Future[_Found]]] = deque()
        try:
            while waiting or under_way:
                while waiting and free:
                    content, buffer = waiting.popleft(), free.pop()
                    under_way.append(
                        (content, buffer, self._readers.submit(self._read, kind, content, buffer))
                    )
                content, buffer, future = under_way.popleft()
                found = future.result()
                self._note_use(kind, content, is_bad=found.is_bad)
                yield found.payload
                free.append(buffer)
        finally:
            wait(future for _, _, future in under_way)

    def _read_buffers(self, kind: Kind) -> list[Bytes]:
        """The room for reading, cut for files of this kind: many blocks at once, of large states one."""
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
        """Write a file, if the thread has a hand free: `fill` is then called with room for the payload.

        Returns:
            False: not now; come back later.
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
        """Find no file of a tenant any more; the thread removes them, behind those that it was given to write."""
        self._forget(self._tenant(tenant)[1])

    def forget_others(self, tenants: Collection[str]) -> None:
        """The same for all tenants but these."""
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
        with os.scandir(self._root) as entries:
            return [
                Path(entry.path)
                for entry in entries
                if entry.is_dir(follow_symlinks=False) and _TENANT.fullmatch(entry.name)
            ]

    def close(self) -> None:
        """Write what was accepted, and let go of the directory; harmless the second time."""
        if self._held < 0:
            return
        self._jobs.put(None)
        self._thread.join()
        self._readers.shutdown()
        os.close(self._held)
        self._held = -1

    # ── names and headers ───────────────────────────────────────────────────────────────────────────────────────

    def _find_tenant(self, tenant: str) -> tuple[bytes, Path]:
        key = tenant_key(self.secret, tenant)
        return key, self._root / blake3(b"directory", key=key).hexdigest()[:32]

    def _path(self, kind: Kind, content: BlockContent) -> Path:
        return self._tenant(content.tenant)[1] / f"{content.key.hex()}.{kind}"

    def _header(self, kind: Kind, content: BlockContent, written_at: float) -> bytes:
        fixed = (_MAGIC, VERSION, _KINDS[kind], written_at, self._payload_bytes[kind])
        header = _HEADER.pack(*fixed, self.identity, content.parent, content.key) + content.tokens
        return header.ljust(_HEADER_BYTES, b"\0")

    # ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _read(self, kind: Kind, content: BlockContent, buffer: Bytes) -> _Found:
        """One file into `buffer`; a reader's work."""
        try:
            is_whole = _read_into(self._path(kind, content), self.file_bytes(kind), buffer)
        except OSError as error:  # too many open files, or a drive that fails: the file itself may be good
            return _Found(None, is_bad=error.errno in _NO_SUCH_FILE)
        payload = self._checked(kind, content, buffer) if is_whole else None
        return _Found(payload, is_bad=payload is None)

    def _checked(self, kind: Kind, content: BlockContent, buffer: Bytes) -> Bytes | None:
        """Returns the payload of the file in `buffer`, or None if any field is not as expected."""
        whole = buffer[: self.file_bytes(kind)]
        data = whole.data
        written_at = float(_HEADER.unpack_from(data)[3])
        if bytes(data[:_HEADER_BYTES]) != self._header(kind, content, written_at):
            return None
        if not 0 <= self._clock() - written_at <= self._config.ttl_s:
            return None
        mac = _mac(self._tenant(content.tenant)[0], whole)
        if not hmac.compare_digest(mac, bytes(data[-_MAC_BYTES:])):
            return None
        return whole[_HEADER_BYTES:-_MAC_BYTES]

    def _scan(self) -> None:
        """Find what an earlier process left, the oldest first, and remove what is nobody's."""
        found: list[tuple[_Id, _File]] = []
        for directory in self._tenant_directories():
            with os.scandir(directory) as entries:
                for entry in entries:
                    path = Path(entry.path)
                    if not _NAME.fullmatch(entry.name) or not entry.is_file(follow_symlinks=False):
                        _unlink(path)  # a write that was cut off
                        continue
                    key, _, kind = entry.name.partition(".")
                    facts = entry.stat(follow_symlinks=False)
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
            if isinstance(job, Path):  # a tenant's, forgotten
                self._drop(job)
                shutil.rmtree(job, ignore_errors=True)
            elif job is not None:
                try:
                    self._write(job)
                except OSError:  # no room, or no drive: the next process computes what it wants to know
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
        file.path.parent.mkdir(mode=0o700, exist_ok=True)
        temporary = file.path.parent / f"{os.urandom(8).hex()}.writing"
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with open(descriptor, "wb", buffering=0) as out:
                data = whole.data
                while data:
                    data = data[out.write(data) :]
                os.fdatasync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            self._sweep(room_for=file.nbytes)
            temporary.rename(file.path)
        except BaseException:
            _unlink(temporary)
            raise
        with self._lock:
            before = self._files.pop(job.id, None)  # two prompts with the same beginning
            self._num_bytes += file.nbytes - (before.nbytes if before is not None else 0)
            self._files[job.id] = file

    def _sweep(self, *, room_for: int = 0) -> None:
        """Remove files that are too old, and those not used for longest while there are too many bytes."""
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
        _unlink(path)


def _file_bytes(payload_bytes: int) -> int:
    return _HEADER_BYTES + payload_bytes + _MAC_BYTES


def _mac(key: bytes, whole: Bytes) -> bytes:
    """Checksum of a file without its last bytes, which hold it."""
    return blake3(whole.data[:-_MAC_BYTES], key=key).digest()


def _buffer_bytes(payload_bytes: int) -> int:
    return -(-_file_bytes(payload_bytes) // _PAGE_BYTES) * _PAGE_BYTES


def _reading_bytes(block_bytes: int, state_bytes: int) -> int:
    return max(_READ_BUFFERS * _buffer_bytes(block_bytes), _buffer_bytes(state_bytes) if state_bytes else 0)


def _aligned(nbytes: int) -> Bytes:
    """Room for files, aligned as direct reads want it."""
    return np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)


def _read_into(path: Path, size: int, buffer: Bytes) -> bool:
    """Read a file past the page cache, which is charged to the budget. False: it has another size."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags | os.O_DIRECT)
    except OSError:
        descriptor = os.open(path, flags)  # a file system without direct reads
    try:
        return os.fstat(descriptor).st_size == size and os.preadv(descriptor, [buffer.data], 0) == size
    finally:
        os.close(descriptor)


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def _make_private(directory: Path) -> None:
    """Make the directory, or see that it is ours alone."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = directory.lstat()
    except OSError as error:
        raise UsageError(f"{directory} cannot be used for prompts: {error.strerror}") from None
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.geteuid() or facts.st_mode & 0o077:
        raise UsageError(
            f"{directory} is to hold prompts, and others can look into it",
            hint=f"`chmod 700 {directory}`, or name a directory that is not there yet",
        )


def _read_secret(path: Path) -> bytes:
    """Read the secret of a directory that this process has locked; make a new one if it has none."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return _write_secret(path)
    with open(descriptor, "rb", buffering=0) as file:
        if os.fstat(file.fileno()).st_mode & 0o077:
            raise UsageError(
                f"{path} can be read by others", hint="remove it; files made with it are then useless"
            )
        secret = file.read(SECRET_BYTES + 1)
    if not secret:
        return _write_secret(path)
    if len(secret) != SECRET_BYTES:
        raise UsageError(f"{path} holds {len(secret)} bytes, expected {SECRET_BYTES}", hint="remove it")
    return secret


def _write_secret(path: Path) -> bytes:
    """Make a new secret, and have it on the drive before anything is written with it."""
    secret = os.urandom(SECRET_BYTES)
    replace(path, secret)
    return secret
