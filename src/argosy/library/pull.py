"""Fetch a model from a hub into the hub's cache, where other programs also find it.

    OWNER/NAME[:Q4_K_M]  ->  ask_hub  ->  Repository: one commit, and its formats
                         ->  download ->  Download: the files needed, and how much of them is here
                         ->  fetch    ->  blobs/DIGEST, then links to them in snapshots/COMMIT

Each file is written sequentially as DIGEST.incomplete and becomes a blob once its digest is verified. A pull that
is interrupted for any reason leaves partial files, which the next one continues. The hub's own locks let one
process at a time write a blob, so two pulls of a model share its files. A snapshot gets its links when all its
blobs are complete.

Elsewhere: `checkpoint/hub.py` trusts no answer; `cli/commands/pull.py` asks before it fetches.
"""

from __future__ import annotations

import hashlib
import os
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event, Lock, Thread

from argosy.checkpoint.block_types import may_run
from argosy.checkpoint.gguf_names import GGUF_SUFFIX, PART_NAME
from argosy.checkpoint.hub import Hub, Listing, RemoteFile, Source, hub_address
from argosy.checkpoint.pack_contents import goes_with_weights, is_licence
from argosy.checkpoint.pooling import MODULE_CONFIG, MODULES_FILE
from argosy.checkpoint.safetensors import weight_files
from argosy.checkpoint.untrusted_file import JSON_LIMIT_BYTES, quote
from argosy.config import disk_size
from argosy.directory import Directory
from argosy.errors import CheckpointError, DiskFull, FetchFailed, UsageError, room_for
from argosy.library import kept
from argosy.library.places import choose_tower, gguf_names, hub_cache, repository_folder
from argosy.machine import resources
from argosy.model.remote import choose_weights, gguf_models, has_tensors

PARTIAL_SUFFIX = ".incomplete"
_LIST_BYTES = 4 << 20
_NUM_AT_ONCE = 4  # files
_MOST_FAILURES = 5  # in a row, without any byte received
_READ_BYTES = 1 << 20
_NO_SIZE = 1 << 62  # sorts last
_RESERVE_BYTES = 64 << 20  # left free on the drive
_TICK_S, _GRACE_S = 0.2, 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Download:
    """The files that a pull fetches.

    source: the repository at one commit.
    asked: the branch, tag or commit requested; "": the main branch.
    name: the model's name in the library.
    licence: as stated on its card, or "".
    files: weights first, then the accompanying files. All have a size and a digest.
    root: the hub's cache.
    """

    source: Source
    asked: str
    name: str
    licence: str
    files: tuple[RemoteFile, ...]
    root: Path

    @property
    def nbytes(self) -> int:
        return sum(blob.nbytes for blob in self.blobs)

    @property
    def here_bytes(self) -> int:
        """How many of its bytes are in the cache, including partial files."""
        return sum(blob.here_bytes for blob in self.blobs)

    @property
    def folder(self) -> Path:
        return self.root / repository_folder(self.source.repository)

    @property
    def snapshot(self) -> Path:
        return self.folder / "snapshots" / self.source.revision

    @property
    def blobs(self) -> list[Blob]:
        """Its files by content: files with equal content share a blob."""
        return list({blob.digest: blob for blob in map(self.blob_of, self.files)}.values())

    def blob_of(self, file: RemoteFile) -> Blob:
        digest = file.sha256 or file.git_sha1
        assert digest is not None
        assert file.nbytes is not None
        return Blob(file.name, digest, file.nbytes, self.folder / "blobs" / digest)

    @property
    def path(self) -> Path:
        """The path for `open_model` after the download."""
        weights = self.files[0].name
        return self.snapshot / weights if weights.endswith(GGUF_SUFFIX) else self.snapshot


@dataclass(frozen=True, slots=True)
class Blob:
    """A file identified by its content. `digest` is its SHA-256, or the 40-digit SHA-1 of its git blob."""

    name: str
    digest: str
    nbytes: int
    path: Path

    @property
    def partial(self) -> Path:
        return self.path.with_name(self.path.name + PARTIAL_SUFFIX)

    @property
    def is_here(self) -> bool:
        return self.path.is_file() and self.path.stat().st_size == self.nbytes

    @property
    def here_bytes(self) -> int:
        if self.is_here:
            return self.nbytes
        with suppress(OSError):
            return min(self.partial.lstat().st_size, self.nbytes)
        return 0

    def hasher(self) -> hashlib._Hash:
        if len(self.digest) == 64:
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % self.nbytes, usedforsecurity=False)


@dataclass(frozen=True, slots=True)
class Moment:
    """The progress of a fetch. `waits_for` names files that another program is fetching."""

    done_bytes: int
    total_bytes: int
    waits_for: tuple[str, ...] = ()


Watch = Callable[[Moment], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A model in a repository, in one format.

    name: its name in the library.
    format: such as Q4_K_M or safetensors, or the file name if that names no format, or one that others also have.
    source: names exactly this model.
    nbytes: the size of its weights; None if a part or a size is missing.
    may_run: False if its format has no kernel.
    """

    name: str
    format: str
    source: Source
    num_parts: int
    nbytes: int | None
    may_run: bool


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository on the hub at one commit.

    source: includes the commit and the part of a name that selects one of its models.
    asked: the branch, tag or commit requested; "": the main branch.
    """

    source: Source
    asked: str
    listing: Listing

    @property
    def is_open(self) -> bool:
        """Whether the choice is open: its models are GGUF files, and the source names none or several of them."""
        names = self.listing.names
        is_gguf = bool(self.source.part) or not has_tensors(names)
        return is_gguf and bool(gguf_models(names)) and len(gguf_models(names, self.source.part)) != 1

    def offers(self, part: str = "") -> list[Offer]:
        """Its models, or those that a part of a name selects, smallest first."""
        names, sizes = self.listing.names, {file.name: file.nbytes for file in self.listing.files}
        models = gguf_models(names, part)
        library = self._gguf_names
        formats = Counter(model.format for model in gguf_models(names))
        found = [
            Offer(
                name=library[model.stem],
                format=model.format if formats[model.format] == 1 else model.stem.rpartition("/")[2],
                source=replace(self.source, part=model.stem),
                num_parts=model.num_parts,
                nbytes=_total(sizes, model.parts) if len(model.parts) == model.num_parts else None,
                may_run=may_run(model.format),
            )
            for model in models
        ]
        if has_tensors(names) and not part:
            source = replace(self.source, part="")
            shards = choose_weights(names, source)
            nbytes = _total(sizes, shards)
            found.append(
                Offer(
                    name=source.repository,
                    format="safetensors",
                    source=source,
                    num_parts=len(shards),
                    nbytes=nbytes,
                    may_run=True,
                )
            )
        return sorted(found, key=lambda offer: (offer.nbytes or _NO_SIZE, offer.name))

    @property
    def has_part(self) -> bool:
        """Whether the source includes a part of a name that some model matches."""
        return bool(self.source.part) and bool(gguf_models(self.listing.names, self.source.part))

    @property
    def _gguf_names(self) -> dict[str, str]:
        """The library's names of its GGUF models, by the stems of their files."""
        return gguf_names(self.source.repository, [model.stem for model in gguf_models(self.listing.names)])

    @property
    def tower(self) -> RemoteFile | None:
        """The vision tower's file for the GGUF models here; None if there is none, or if it is in a folder."""
        name = choose_tower([file.name for file in self.listing.files if "/" not in file.name])
        return next((file for file in self.listing.files if file.name == name), None)

    def download(self) -> Download:
        """The files needed for the model that the source names.

        Raises:
            UsageError: several models match.
            CheckpointError: there is no model, or the hub's list lacks sizes or digests.
        """
        source, listing = self.source, self.listing
        weights = choose_weights(listing.names, source)
        chosen = dict.fromkeys((*weights, *_beside(weights, listing.names)))
        files = {file.name: file for file in listing.files}
        for name in chosen:
            _require_known(source, files[name])
        stem = weights[0].removesuffix(GGUF_SUFFIX)
        if part := PART_NAME.fullmatch(weights[0]):
            stem = part["stem"]
        is_gguf = weights[0].endswith(GGUF_SUFFIX)
        return Download(
            source=source,
            asked=self.asked,
            name=self._gguf_names[stem] if is_gguf else source.repository,
            licence=listing.licence,
            files=tuple(files[name] for name in chosen),
            root=hub_cache(),
        )


def _total(sizes: Mapping[str, int | None], names: Iterable[str]) -> int | None:
    found = [sizes[name] for name in names]
    known = [nbytes for nbytes in found if nbytes is not None]
    return sum(known) if len(known) == len(found) else None


def look_up(text: str, revision: str | None = None) -> Download:
    """The download of a model; no weights are read.

    Raises:
        The errors of `ask_hub` and `Repository.download`.
    """
    return ask_hub(text, revision).download()


def ask_hub(text: str, revision: str | None = None) -> Repository:
    """Ask the hub which files a model has.

    Args:
        revision: a branch, tag or commit; None: the main branch.

    Raises:
        UsageError: `text` does not name a model on this hub, or the revision is malformed.
        FetchFailed: the hub cannot be reached, or refuses.
        CheckpointError: there is no such repository, or the answer is malformed.
    """
    source = Source.find(text)
    endpoint = hub_address()
    if source is None or not source.repository:
        raise UsageError(
            f"models on the hub are named OWNER/NAME, found '{quote(text)}'",
            hint=f"`argosy search {shlex.quote(quote(text))}` looks for one; OWNER/NAME:Q4_K_M names a GGUF file",
        )
    if source.url != endpoint:
        raise UsageError(
            f"{quote(text)} is on another hub than {endpoint}, and the cache keeps both under the same names",
            hint=f"`HF_ENDPOINT={source.url} argosy pull {source.repository}` fetches it",
        )
    if revision is not None and not kept.is_revision(revision):
        raise UsageError(
            f"'{quote(revision)}' cannot be a revision",
            hint="give a branch, a tag or a commit, such as v1.0 or refs/pr/1",
        )
    asked = "" if revision in (None, kept.MAIN) else revision
    source = replace(source, revision=asked)
    listing = Hub(source, most_bytes=_LIST_BYTES).list_files()
    return Repository(replace(source, revision=listing.revision), asked, listing)


def _beside(weights: list[str], names: list[str]) -> list[str]:
    """The files that a model needs in addition to its weights."""
    top = [name for name in names if "/" not in name and goes_with_weights(name)]
    if not weights[0].endswith(GGUF_SUFFIX):
        # An embedding model's modules have small files in folders that only the contents of its list name.
        modules = [name for name in names if MODULES_FILE in top and MODULE_CONFIG.fullmatch(name)]
        return [*top, *modules, *(name for name in names if name == weight_files(names)[1])]
    licences = [name for name in top if is_licence(name)]
    folder = weights[0].rpartition("/")[0]
    beside = [name for name in names if name.rpartition("/")[0] == folder]
    tower = choose_tower(beside) or choose_tower([name for name in names if "/" not in name])
    return licences if tower is None else [tower, *licences]


def _require_known(source: Source, file: RemoteFile) -> None:
    if file.nbytes is None or (file.sha256 is None and file.git_sha1 is None):
        raise CheckpointError(
            f"{source.repository}: the hub's list of files lacks the size or digest of {quote(file.name)}",
            path=source.url,
        )
    if file.sha256 is None and file.nbytes > JSON_LIMIT_BYTES:
        raise CheckpointError(
            f"{source.repository}: {quote(file.name)} is {file.nbytes} bytes long, and has no SHA-256",
            path=source.url,
        )


def fetch(download: Download, watch: Watch = lambda moment: None, *, accepted_at: int | None = None) -> Path:
    """Fetch the missing files, verify and link them; return the path for `open_model`.

    Args:
        watch: called a few times a second.
        accepted_at: when the user agreed to its licence, in seconds since 1970; None: the user was not asked this
            time, and an earlier agreement stands if the licence has not changed.

    Raises:
        DiskFull: it does not fit.   UsageError: the cache cannot be written.
        FetchFailed: the connection failed repeatedly; received bytes are kept.
        CheckpointError: a file's size or digest differs from the hub's list; it is removed.
    """
    missing_bytes = download.nbytes - download.here_bytes
    free_bytes = resources.free_disk_bytes(download.root)
    if missing_bytes and missing_bytes + _RESERVE_BYTES > free_bytes:
        raise DiskFull(
            f"{download.name} needs {disk_size(missing_bytes)} more, and {disk_size(free_bytes)} are free in "
            f"{download.root}",
            hint="free some space, or name a directory on another drive with HF_HUB_CACHE",
            path=download.root,
            needed_bytes=missing_bytes + _RESERVE_BYTES,
            free_bytes=free_bytes,
        )
    with kept.changing() as known:  # before the first byte, so that `rm` knows who started an unfinished pull
        if accepted_at is None:
            earlier = known.pulled.get(download.name)
            is_same = earlier is not None and earlier.licence == download.licence
            accepted_at = earlier.accepted_at if earlier is not None and is_same else 0
        known.pulled[download.name] = kept.Pulled(
            download.source.repository,
            download.source.revision,
            download.nbytes,
            tuple(blob.digest for blob in download.blobs),
            download.asked,
            download.licence,
            accepted_at,
        )
    try:
        with room_for(
            download.name, download.root, hint="free some space, and run the same command again: it continues"
        ):
            _Fetching(download, watch).run()
            _link(download)
    except OSError as error:
        raise UsageError(
            f"{error.filename or download.root} cannot be written: {error.strerror}",
            hint="HF_HUB_CACHE names another directory",
        ) from error
    return download.path


class _Fetching:
    """The threads that fetch the blobs of a download. They are daemons, so ^C does not wait for a server."""

    def __init__(self, download: Download, watch: Watch) -> None:
        self._download, self._watch = download, watch
        self._root = Directory(download.root, make=True)  # closed by the last thread
        self._hub = Hub(download.source, most_bytes=_LIST_BYTES)
        self._blobs = sorted(download.blobs, key=lambda blob: blob.nbytes)  # small files first
        self._next = iter(self._blobs)
        self._waits: dict[str, str] = {}  # names of files by digest
        self._lock, self._stop, self._has_ended = Lock(), Event(), Event()
        self._num_running = _NUM_AT_ONCE
        self._failure: BaseException | None = None

    def run(self) -> None:
        for _ in range(self._num_running):
            Thread(target=self._work, daemon=True).start()
        try:
            while not self._has_ended.wait(_TICK_S):
                self._watch(self._moment())
                if self._stop.is_set():  # one thread failed; others may wait a minute for their server
                    self._has_ended.wait(_GRACE_S)
                    break
        finally:
            self._stop.set()
        if self._failure is not None:
            raise self._failure
        self._watch(self._moment())

    def _moment(self) -> Moment:
        with self._lock:
            waits_for = tuple(self._waits.values())
        done_bytes = sum(blob.here_bytes for blob in self._blobs)
        return Moment(done_bytes, sum(blob.nbytes for blob in self._blobs), waits_for)

    def _work(self) -> None:
        try:
            while not self._stop.is_set():
                with self._lock:
                    blob = next(self._next, None)
                if blob is None:
                    return
                if not blob.is_here:
                    self._fetch(blob)
        except BaseException as failure:  # raised in the waiting caller
            with self._lock:
                self._failure = self._failure or failure
            self._stop.set()
        finally:
            with self._lock:
                self._num_running -= 1
                if not self._num_running:
                    self._root.close()
                    self._has_ended.set()

    def _fetch(self, blob: Blob) -> None:
        blobs, locks = Path(self._download.folder.name, "blobs"), _locks(self._download)
        for folder in (blobs, locks):
            self._root.directory(folder, make=True).close()
        with self._locked(locks / f"{blob.digest}.lock", blob) as is_locked:
            if not is_locked or blob.is_here:
                return
            is_continued = blob.here_bytes > 0
            while not self._stop.is_set():
                partial = blobs / blob.partial.name
                found = self._complete(blob, partial)
                if found == blob.digest:
                    self._root.move(partial, blobs / blob.digest)
                    with self._root.directory(blobs) as directory:
                        directory.sync()
                    return
                if found is None:
                    return
                self._root.remove(partial)
                if not is_continued:
                    raise CheckpointError(
                        f"{blob.name} does not match the hub's list: its digest is {found}, expected {blob.digest}",
                        hint="it was removed; if the same command fails again, do not trust the server",
                        path=blob.path,
                    )
                # a power cut may have damaged its beginning: fetch it again from the start
                is_continued = False

    def _complete(self, blob: Blob, partial: Path) -> str | None:
        """Append the missing bytes of a blob; return its digest, or None if the fetch is stopped."""
        descriptor = self._root.open(partial, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            if os.fstat(descriptor).st_size > blob.nbytes:
                os.ftruncate(descriptor, 0)
            hasher, done_bytes = blob.hasher(), 0
            while part := os.pread(descriptor, _READ_BYTES, done_bytes):
                hasher.update(part)
                done_bytes += len(part)
                if self._stop.is_set():
                    return None
            url = self._hub.url_of(self._download.source.revision, blob.name)
            num_failures = 0
            while done_bytes < blob.nbytes:
                before = done_bytes
                try:
                    for part in self._hub.stream(url, done_bytes, blob.nbytes):
                        append(descriptor, part)
                        hasher.update(part)
                        done_bytes += len(part)
                        if self._stop.is_set():
                            return None
                except FetchFailed:
                    num_failures = 0 if done_bytes > before else num_failures + 1
                    if num_failures >= _MOST_FAILURES or self._stop.wait(min(2**num_failures, 30) / 2):
                        raise
            os.fsync(descriptor)
            return hasher.hexdigest()
        finally:
            os.close(descriptor)

    @contextmanager
    def _locked(self, path: Path, blob: Blob) -> Iterator[bool]:
        """Wait until no other program is fetching the blob; False if the fetch is stopped first."""
        while True:
            try:
                lock = self._root.lock(path, wait_s=0.0, mode=0o666)
                break
            except TimeoutError:
                with self._lock:
                    self._waits[blob.digest] = blob.name
            if self._stop.wait(_TICK_S):
                yield False
                return
        try:
            with self._lock:
                self._waits.pop(blob.digest, None)
            yield True
        finally:
            os.close(lock)


def append(descriptor: int, data: bytes) -> None:
    """Append all of `data` to a file."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _locks(download: Download) -> Path:
    return Path(".locks", download.folder.name)


def _link(download: Download) -> None:
    """Create the snapshot and point the requested branch or tag at it, as the hub's own client does."""
    folder, locks = Path(download.folder.name), _locks(download)
    with Directory(download.root) as root:
        root.directory(locks, make=True).close()
        with root.locked(locks / "links.lock"):  # another pull of the model may be linking
            for file in download.files:
                link = download.snapshot.relative_to(download.root) / file.name
                target = os.path.relpath(folder / "blobs" / download.blob_of(file).digest, link.parent)
                root.directory(link.parent, make=True).close()
                if not (download.root / link).is_symlink() or os.readlink(download.root / link) != target:
                    root.put_link(link, target)
            if download.asked != download.source.revision:
                ref = folder / "refs" / (download.asked or kept.MAIN)
                root.directory(ref.parent, make=True).close()
                root.put(ref, download.source.revision.encode(), 0o644)
