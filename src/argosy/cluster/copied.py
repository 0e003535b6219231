"""A worker's copy of a model: sparse files that a coordinator fills. An interrupted copy resumes in the next run.

    hello ─>  CopyLink  ─ list, headers ─>  files with holes  ─ open_model ─>  plan, room  ─>  shards, one after another

The files have the coordinator's names and sizes, so a copy is opened, planned and run like any model, whatever the
format of its weights. Experts of other machines stay holes, which take no space.

`argosy-copy.json` lists the parts that are on the drive. It is replaced only after their bytes are, so after a kill
or a power cut at most `_SAVE_BYTES` are copied again.

The coordinator is not trusted: every name must stay inside the directory, sizes and free space are checked before
any bytes are requested, headers are checked like those of any file, and each piece by its BLAKE3. The finished copy
must have the fingerprint that the coordinator gave in the introduction.

Elsewhere: `copy_source.py` is the other side; `worker.py` runs the experts.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Self

from blake3 import blake3

from argosy import _native
from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.shards import ALL_SHARDS, COPY_FILE, NUM_SHARDS, shard_of
from argosy.checkpoint.untrusted_file import parse_object, quote, read_object
from argosy.cluster import door, hello, secure
from argosy.cluster.copy_link import PIECE_BYTES, CopyLink
from argosy.cluster.hello import Facts, Offer, Refusal
from argosy.cluster.identity import fingerprint, samples
from argosy.cluster.worker import share_to_run
from argosy.cluster.worker_plan import WorkerSettings, biases_of, instruction_set_of, plan_worker
from argosy.config import format_bytes
from argosy.directory import Directory
from argosy.errors import CheckpointError, DiskFull, PeerNotUsable, UsageError, is_disk_full
from argosy.machine.resources import free_disk_bytes, usable_cores
from argosy.model.families import open_model

log = logging.getLogger("argosy.cluster")

_VERSION = 1
_LOCK = ".lock"
_SAVE_BYTES = 64 << 20  # bytes between two updates of COPY_FILE
_RESERVE_BYTES = 64 << 20  # left free on the drive
_MOST_FILES = 4096
_MOST_HEADER_BYTES = 256 << 20  # for all files together: vocabularies and lists of tensors
_MOST_OPEN = 64
_LARGEST_FILE = 1 << 50
_LONGEST_NAME = 200
_HEADERS, _SHARED = "headers", "shared"  # the parts of a copy other than shards

Progress = Callable[[str, float], None]
Range = tuple[Path, int, int]  # file, offset, bytes


@dataclass(slots=True)
class _State:
    """The contents of `argosy-copy.json`.

    model: the coordinator's fingerprint, in hexadecimal.
    files: name, size and header bytes of each, as in the coordinator's list.
    opens: the file for `open_model`; "": the directory.
    shards: mask of the shards to copy.
    done: complete parts.   part, part_bytes: the part in progress, and how much of it has been written.
    """

    model: str
    files: list[tuple[str, int, int]]
    opens: str
    shards: int
    done: list[str] = field(default_factory=list)
    part: str = ""
    part_bytes: int = 0

    def to_bytes(self) -> bytes:
        contents = asdict(self)
        return json.dumps(
            {"argosy_copy": _VERSION, "blake3": _digest(contents), "contents": contents}
        ).encode()

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the file; raises `CheckpointError` if it is damaged."""
        raw = read_object(path)
        contents = raw.get("contents")
        if raw.get("argosy_copy") != _VERSION or not isinstance(contents, dict):
            raise CheckpointError(f"{path} was written by another version of Argosy", path=path)
        if raw.get("blake3") != _digest(contents):
            raise CheckpointError(
                f"{path} was changed or damaged", hint="remove the directory, and copy again", path=path
            )
        contents["files"] = [(name, nbytes, head) for name, nbytes, head in contents["files"]]
        return cls(**contents)

    @property
    def parts(self) -> list[str]:
        return [_HEADERS, _SHARED, *(str(shard) for shard in range(NUM_SHARDS) if self.shards >> shard & 1)]

    @property
    def is_whole(self) -> bool:
        return set(self.parts) <= set(self.done)


def _digest(contents: object) -> str:
    return blake3(json.dumps(contents, sort_keys=True).encode()).hexdigest()


class Copy:
    """The directory of a copy. One process at a time may open it.

    Args:
        shards: mask of the wanted shards; 0: those of an earlier run, otherwise the coordinator's choice.

    Raises:
        UsageError: the directory is not a copy, or another process has it open.   CheckpointError: it is damaged.
    """

    def __init__(self, directory: Path, *, shards: int = 0) -> None:
        self.directory = directory
        with ExitStack() as opened:
            try:
                directory.mkdir(exist_ok=True)
                self._root = opened.enter_context(Directory(directory))
                if set(self._root.names()) - {_LOCK} and self._root.stat(COPY_FILE) is None:
                    raise UsageError(
                        f"{directory} is not empty and not a copy of a model",
                        hint="name a directory that does not exist",
                    )
                opened.enter_context(self._root.locked(_LOCK, wait_s=0.0))
            except TimeoutError:
                raise UsageError(f"another worker is copying to {directory}") from None
            except OSError as error:
                raise UsageError(f"{directory} cannot hold a copy: {error.strerror}") from None
            is_begun = self._root.stat(COPY_FILE) is not None
            self._state = _State.read(directory / COPY_FILE) if is_begun else None
            self._closing = opened.pop_all()
        self._wanted = shards
        if self._state is not None and shards:
            self._state.shards = shards
        self._targets: dict[Path, int] = {}
        self._unsaved = 0

    def close(self) -> None:
        for descriptor in self._targets.values():
            os.close(descriptor)
        self._targets.clear()
        self._closing.close()

    @property
    def is_whole(self) -> bool:
        return self._state is not None and self._state.is_whole

    @property
    def shards(self) -> int:
        """Mask of the shards to copy; 0 leaves the choice to the coordinator."""
        return self._wanted if self._state is None else self._state.shards

    @property
    def path(self) -> Path:
        """The path to give to `open_model`."""
        assert self._state is not None
        return self.directory / self._state.opens if self._state.opens else self.directory

    def fill(
        self, link: CopyLink, model: bytes, check: Callable[[ModelFiles, int], None], tell: Progress
    ) -> None:
        """Copy the missing bytes.

        Args:
            model: the fingerprint that the coordinator gave.
            check: called with the opened headers and the shards before weights are copied; raises if the worker
                cannot run them.

        Raises:
            PeerNotUsable: the connection failed; received bytes are kept.   DiskFull: the copy does not fit the drive.
            CheckpointError: the coordinator sent no model, or not the one it announced.
            UsageError: the directory holds a copy of another model, or cannot be written.
        """
        state = self._begin(_parse_list(link.fetch_list()), model)
        names = {self.directory / name: number for number, (name, _, _) in enumerate(state.files)}
        with self._writing():
            if _HEADERS not in state.done:
                self._make_files(state)
                heads = [(self.directory / name, 0, head) for name, _, head in state.files]
                self._require_room(sum(nbytes for _, _, nbytes in heads))
                self._fill_part(link, names, _HEADERS, heads, lambda nbytes: tell("copying headers", 0.0))
            files = open_model(self.path, shards=state.shards, is_copy=True)
            check(files, state.shards)
            parts = {part: list(_ranges(files, part)) for part in state.parts if part != _HEADERS}
            sizes = {part: sum(nbytes for _, _, nbytes in ranges) for part, ranges in parts.items()}
            total = sum(sizes.values())
            copied = [sum(sizes[part] for part in parts if part in state.done)]
            going_on = state.part_bytes if state.part in parts else 0
            self._require_room(total - copied[0] - going_on)
            log.info("worker: copying %s of experts", format_bytes(total - copied[0] - going_on))

            def came(nbytes: int) -> None:
                copied[0] += nbytes
                tell(f"copying {format_bytes(total)}", copied[0] / max(1, total))

            for part, ranges in parts.items():
                if part not in state.done:
                    self._fill_part(link, names, part, ranges, came)
            if fingerprint(files) != model:
                raise CheckpointError(
                    f"the copy in {self.directory} is not the model that the coordinator announced",
                    hint="the coordinator's files changed meanwhile; remove the directory and copy again",
                    path=self.directory,
                )
            self._note("", 0)

    def _begin(self, listed: _State, model: bytes) -> _State:
        """Compare the coordinator's list with the state of an earlier run, or start a new state."""
        listed.model = model.hex()
        state = self._state
        if state is None:
            if self._wanted and listed.shards != self._wanted:
                raise PeerNotUsable("it offers other shards than those requested")
            self._state = state = listed
            with self._writing():
                self._note("", 0)
        elif (state.model, state.files, state.opens) != (listed.model, listed.files, listed.opens):
            raise UsageError(
                f"{self.directory} holds a copy of another model than the coordinator runs",
                hint="name another directory or remove this one",
            )
        return state

    def _make_files(self, state: _State) -> None:
        for name, nbytes, _ in state.files:
            os.ftruncate(self._target(self.directory / name), nbytes)
        self._flush()
        self._root.sync()

    def _fill_part(
        self,
        link: CopyLink,
        names: dict[Path, int],
        part: str,
        ranges: list[Range],
        came: Callable[[int], None],
    ) -> None:
        """Copy the ranges of a part in order, from where an earlier run stopped."""
        state = self._state
        assert state is not None
        have = state.part_bytes if state.part == part else 0
        at = 0
        try:
            for path, offset, nbytes in ranges:
                for start in range(0, nbytes, PIECE_BYTES):
                    size = min(PIECE_BYTES, nbytes - start)
                    if at + size > have:
                        self._write(path, link.fetch(names[path], offset + start, size), offset + start)
                        self._unsaved += size
                    at += size
                    came(size)
                    if self._unsaved >= _SAVE_BYTES:
                        self._note(part, at)
        except PeerNotUsable:
            if self._unsaved:
                self._note(part, at)
            raise
        state.done.append(part)
        state.part, state.part_bytes = "", 0
        if self._unsaved >= _SAVE_BYTES:
            self._note("", 0)

    # ── the drive ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _note(self, part: str, part_bytes: int) -> None:
        """Wait until all written bytes are on the drive, then update COPY_FILE."""
        assert self._state is not None
        self._flush()
        self._unsaved = 0
        self._state.part, self._state.part_bytes = part, part_bytes
        self._root.put(COPY_FILE, self._state.to_bytes(), 0o644)

    def _flush(self) -> None:
        while self._targets:
            _, descriptor = self._targets.popitem()
            try:
                os.fdatasync(descriptor)
                # The budget pays for what the kernel caches, so drop it.
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)

    def _target(self, path: Path) -> int:
        if (descriptor := self._targets.get(path)) is None:
            if len(self._targets) == _MOST_OPEN:
                self._flush()
            name = path.relative_to(self.directory)
            self._targets[path] = descriptor = self._root.open(name, os.O_RDWR | os.O_CREAT, 0o644)
        return descriptor

    def _write(self, path: Path, data: bytes, offset: int) -> None:
        view = memoryview(data)
        while view:
            written = os.pwrite(self._target(path), view, offset)
            view, offset = view[written:], offset + written

    def _require_room(self, needed_bytes: int) -> None:
        free_bytes = free_disk_bytes(self.directory)
        if needed_bytes and needed_bytes + _RESERVE_BYTES > free_bytes:
            raise self._full(needed_bytes + _RESERVE_BYTES, free_bytes)

    def _full(self, needed_bytes: int, free_bytes: int) -> DiskFull:
        return DiskFull(
            f"the copy in {self.directory} needs {format_bytes(needed_bytes)} more, and its file system has "
            f"{format_bytes(free_bytes)} free",
            hint="free some space and run the same command again to resume; or copy less with `--share K/N`",
            path=self.directory,
            needed_bytes=needed_bytes,
            free_bytes=free_bytes,
        )

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn file-system errors in this block into Argosy's."""
        try:
            yield
        except OSError as error:
            if is_disk_full(error):
                raise self._full(PIECE_BYTES, free_disk_bytes(self.directory)) from error
            raise UsageError(f"{self.directory} cannot be written: {error.strerror}") from error


def _parse_list(data: bytes) -> _State:
    """Parse a coordinator's list of files.

    Raises:
        CheckpointError: it is malformed, or contains names or sizes that no model has.
    """
    path = Path("the coordinator's list of files")
    raw = parse_object(data, path)
    files, opens, shards = raw.get("files"), raw.get("opens"), raw.get("shards")
    if not isinstance(files, list) or not 1 <= len(files) <= _MOST_FILES:
        raise CheckpointError(f"{path} does not list 1 to {_MOST_FILES} files", path=path)
    if type(shards) is not int or not 1 <= shards <= ALL_SHARDS:
        raise CheckpointError(f"{path} does not say which shards to copy", path=path)
    found: list[tuple[str, int, int]] = []
    for entry in files:
        if not isinstance(entry, list) or len(entry) != 3:
            raise CheckpointError(f"{path} has an entry that is not a name and two sizes", path=path)
        name, nbytes, head = entry
        if not isinstance(name, str) or not _is_plain(name):
            raise CheckpointError(
                f"{path} has '{quote(name)}', which cannot name a file of a model", path=path
            )
        if not (type(nbytes) is type(head) is int and 0 <= head <= nbytes <= _LARGEST_FILE):
            raise CheckpointError(f"{path} gives '{name}' an impossible size", path=path)
        found.append((name, nbytes, head))
    names = {name for name, _, _ in found}
    if len(names) != len(found) or not isinstance(opens, str) or (opens and opens not in names):
        raise CheckpointError(f"{path} lists a name twice, or opens a file that it does not list", path=path)
    if sum(head for _, _, head in found) > _MOST_HEADER_BYTES:
        raise CheckpointError(
            f"{path} has headers of more than {format_bytes(_MOST_HEADER_BYTES)}", path=path
        )
    return _State("", found, opens, shards)


def _is_plain(name: str) -> bool:
    """Whether this is a plain file name, neither hidden nor our own."""
    is_short = 0 < len(name.encode("utf-8", "surrogatepass")) <= _LONGEST_NAME
    return is_short and name.isprintable() and "/" not in name and name[0] != "." and name != COPY_FILE


def _ranges(files: ModelFiles, part: str) -> Iterator[Range]:
    """The bytes of a part: the experts of a shard, or the biases and samples that every worker needs."""
    if part == _SHARED:
        for ref in biases_of(files).values():
            for piece in ref.pieces:
                yield piece.path, piece.offset, piece.nbytes
        yield from samples(files)
        return
    shard = int(part)
    for key in sorted(files.experts):
        if shard_of(*key) == shard:
            for piece in files.experts[key].pieces:
                yield piece.path, piece.offset, piece.nbytes


class CopyingWorker:
    """A worker without files: it waits for a coordinator and copies its experts' files from there.

    Args:
        settings: those with which the worker will run; `shards` is ignored.

    Raises:
        UsageError: there is no key.
    """

    def __init__(self, copy: Copy, settings: WorkerSettings, *, progress: Progress | None = None) -> None:
        if not settings.key:
            raise UsageError(
                "--copy needs --key-file: without a key, anyone who can reach the port could fill the drive",
                hint="`openssl rand -hex 32 > FILE; chmod 600 FILE` makes one; copy it to every machine",
            )
        self._copy, self._settings = copy, settings
        self._tell: Progress = progress or (lambda what, share: None)
        self._facts = Facts(
            version=version("argosy"), kernel=instruction_set_of(settings),
            sources=bytes.fromhex(_native.sources_hash()), model=hello.NO_MODEL, most_rows=0, most_assignments=0,
            hidden=0, num_layers=0, num_experts=0,
        )  # fmt: skip
        self._turn = threading.Lock()  # one coordinator at a time
        self._connection: socket.socket | None = None
        self._is_over = threading.Event()
        self._failure: BaseException | None = None

    def serve(self, listener: socket.socket) -> bool:
        """Copy the model, then close `listener`. Returns False if `drain` was called before the copy was complete.

        Raises:
            What `Copy.fill` raises, except `PeerNotUsable`: the next connection resumes the copy.
        """
        listener.listen(door.MOST_STRANGERS)
        door.admit(listener, self._meet, self._is_over)
        with self._turn:  # wait for a copy in progress to end
            if self._failure is not None:
                raise self._failure
            return self._copy.is_whole

    def drain(self) -> None:
        """Stop, and keep the copied bytes. Safe in a signal handler."""
        self._is_over.set()
        if (connection := self._connection) is not None:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _meet(self, connection: socket.socket, address: str, is_known: Callable[[], None]) -> None:
        settings = self._settings
        try:
            with connection:
                hello.prepare(connection)
                if settings.tls is not None:
                    connection = secure.wrap(connection, settings.tls, name=None)
                self._copy_over(connection, address, is_known)
        except PeerNotUsable as error:
            log.warning("worker: %s: %s", address, error.message)
        except OSError as error:
            log.warning(
                "worker: %s: the connection failed: %s", address, error.strerror or type(error).__name__
            )
        except BaseException as failure:  # raised in the waiting caller
            self._failure = failure
            self._is_over.set()

    def _copy_over(self, connection: socket.socket, address: str, is_known: Callable[[], None]) -> None:
        with connection:
            refusal = Refusal.busy if self._turn.locked() else Refusal.copying
            theirs, key = hello.accept_copy(
                connection, self._settings.key, self._facts, self._offer(), refusal=refusal
            )
            is_known()
            if not self._turn.acquire(blocking=False):  # another coordinator was faster
                return
            try:
                self._connection = connection
                if not self._is_over.is_set():
                    log.info("worker: copying from the coordinator at %s", address)
                    self._copy.fill(CopyLink(connection, key), theirs.model, self._check, self._tell)
                    self._is_over.set()
            finally:
                self._connection = None
                self._turn.release()

    def _check(self, files: ModelFiles, shards: int) -> None:
        threads = self._settings.threads or usable_cores()  # at most
        plan_worker(files, share_to_run(files, shards), self._settings, threads)

    def _offer(self) -> Offer:
        return Offer(
            num_slots=0, cache_bytes=self._settings.budget_bytes,
            disk_bytes_per_s=self._settings.disk_bytes_per_s or 0.0,
            share_bytes=free_disk_bytes(self._copy.directory), shards=self._copy.shards, is_resident=False,
        )  # fmt: skip
