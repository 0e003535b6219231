"""Write a model in packed form: one read per expert, aligned, with a checksum on every record.

    ModelFiles  ->  pack  ->  DIR.partial/ (record by record, each noted in a journal)  ->  manifest  ->  DIR/

    format    experts   other matrices   norms, biases, router, shared_score
    bf16      bf16      bf16             f32
    q8        q8        q8               f32
    q4        q4        q8               f32
    source    unchanged, bit for bit; blocks, codes and scales become slot formats, which hold the same weights

Tensors of encoders for pictures and sound are copied bit for bit in every format.

With `num_shares`, experts are divided into files by shard (`shards.py`), so that a worker needs only one of the files.

The matrix that turns latent vectors into keys and values is written in two halves, as in memory. q8 quantises the key
half in the order in which it is multiplied; `source` writes the halves only if every weight keeps its bits
(`latent_up.py`).

Norms, biases and the rows that score experts stay float32, exactly: a rounded router does not blur a sum, it picks
another expert. From float32 or float16, `bf16` rounds to nearest even, because it was requested by name. Formats in
which models are released (f8, int4, mxfp4) count as exact; weights that were quantised afterwards, such as a GGUF, are
never requantised.

Memory is bounded by one record and a few slices, whatever the model's size. If `pack` is killed, the next run resumes:
it reads the records in the journal again, compares them with their checksums, and writes the rest. The manifest is
written last, after the data is on the drive; then the directory gets its name.

Elsewhere: `pack_contents.py` lists the contents of a pack; `pack_conversion.py` reads and converts; `manifest.py`
defines the layout and opens packs.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import blake3
import numpy as np

from argosy import _native
from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.landing import Bytes
from argosy.checkpoint.manifest import (
    DENSE_FILE,
    ENCODERS_FILE,
    FILE_ALIGNMENT,
    MANIFEST_FILE,
    PACK_VERSION,
    PARTIAL_SUFFIX,
    Manifest,
    Progress,
    checksum_of,
    expert_file,
    open_pack,
    verify_pack,
)
from argosy.checkpoint.pack_contents import (
    Unit,
    contents_of,
    files_to_copy,
    files_to_make,
    quantised_formats,
)
from argosy.checkpoint.pack_conversion import Conversion
from argosy.checkpoint.safetensors import TensorRef
from argosy.checkpoint.shards import NUM_SHARDS
from argosy.checkpoint.untrusted_file import open_regular, parse_object, quote, read_at
from argosy.config import format_bytes
from argosy.directory import Directory
from argosy.errors import CheckpointError, DiskFull, UsageError, is_disk_full

__all__ = ["PACK_FORMATS", "PackReport", "open_pack", "pack", "verify_pack"]

PACK_FORMATS = ("bf16", "q8", "q4", "source")
JOURNAL_FILE = "journal"


@dataclass(frozen=True, slots=True)
class PackReport:
    """The result of `pack`."""

    directory: Path
    format: str
    source_bytes: int  # dense weights, experts and encoders of the source
    packed_bytes: int  # all files of the pack
    seconds: float
    resumed_bytes: int  # bytes of the pack that an earlier run had written
    restarted_because: str | None  # why an earlier run's work was discarded


def pack(
    files: ModelFiles,
    destination: str | Path,
    *,
    format: str,
    num_shares: int = 1,
    encoder_tensors: Collection[str] = (),
    progress: Progress | None = None,
) -> PackReport:
    """Write `files` as a pack.

    Args:
        files: a checkpoint in place, or a pack that is not quantised.
        destination: a directory that does not exist yet; `<destination>.partial` is used until the pack is complete.
        format: bf16, q8, q4 or source.
        num_shares: the number of files for experts, 1 to 64.
        encoder_tensors: names in `files.others` of the tensors that encoders of pictures and sound need.
        progress: called with the current task and its finished share.

    Raises:
        UsageError: the format is unknown, the source is quantised, `destination` exists, or another process is
            packing to it.
        DiskFull: the drive is full. Written data stays, and another call continues.
        CheckpointError: the source changed meanwhile, or contains values that are not finite numbers.
    """
    started = time.monotonic()
    destination = Path(destination)
    try:
        _require_packable(files, destination, format)
    except OSError as error:
        raise UsageError(f"{destination} cannot be written: {error.strerror}") from error
    if not 1 <= num_shares <= NUM_SHARDS:
        raise UsageError(f"a pack is divided into 1 to {NUM_SHARDS} shards, found {num_shares}")
    assert files.others.keys() >= set(encoder_tensors)
    encoders = [ref for name, ref in files.others.items() if name in encoder_tensors]
    tell = progress or (lambda what, share: None)
    with _Writer(files, destination, format, num_shares, encoders, tell) as writer, writer.reporting():
        writer.write_all()
        packed_bytes = writer.finish()
    return PackReport(
        directory=destination,
        format=format,
        source_bytes=files.dense_bytes + files.expert_bytes + sum(ref.nbytes for ref in encoders),
        packed_bytes=packed_bytes,
        seconds=time.monotonic() - started,
        resumed_bytes=writer.resumed_bytes,
        restarted_because=writer.restarted_because,
    )


def _require_packable(files: ModelFiles, destination: Path, format: str) -> None:
    if format not in PACK_FORMATS:
        raise UsageError(f"unknown format '{format}'; known: {', '.join(PACK_FORMATS)}")
    if format != "source" and (quantised := quantised_formats(files)):
        raise UsageError(
            f"{files.path} is already {quantised}, which is not quantised again",
            hint="`--format source` keeps them as they are; for another format, pack from the original checkpoint",
        )
    if files.tables:
        raise UsageError(
            f"{files.path} has n-gram tables of {format_bytes(files.table_bytes)}, which packs do not hold",
            hint="run the checkpoint in place: its tables stay on the drive either way",
        )
    if destination.name.endswith(PARTIAL_SUFFIX) or destination.name in ("", ".", ".."):
        raise UsageError(f"'{destination}' cannot be the name of a pack")
    if destination.is_symlink() or (destination.exists() and not destination.is_dir()):
        raise UsageError(f"{destination} exists and is not a directory")
    if destination.is_dir() and any(destination.iterdir()):
        raise UsageError(f"{destination} exists and is not empty", hint="remove it, or choose another name")
    parent = destination.absolute().parent
    if not parent.is_dir():
        raise UsageError(f"{parent} {'is not a directory' if parent.exists() else 'does not exist'}")


class _Writer:
    """One run of `pack`: owns the partial directory while it is open."""

    def __init__(
        self,
        files: ModelFiles,
        destination: Path,
        format: str,
        num_shares: int,
        encoders: list[TensorRef],
        progress: Progress,
    ) -> None:
        self._files = files
        self._destination = destination
        self._format = format
        self._num_shares = num_shares
        self._progress = progress
        self._parent_path = destination.absolute().parent
        self._partial = destination.with_name(destination.name + PARTIAL_SUFFIX)
        self._encoders = encoders
        self._contents = contents_of(files, format, num_shares, encoders)
        self._units = self._contents.units
        self._copied = files_to_copy(files.path)
        self._made = files_to_make(files, has_encoders=bool(encoders))
        self._fingerprint = self._source_fingerprint()
        self._checksums: list[int] = []
        experts = [expert_file(share, num_shares) for share in range(1, num_shares + 1)]
        names = (DENSE_FILE, *experts, *([ENCODERS_FILE] if encoders else []))
        self._hashers = {name: blake3.blake3() for name in names}
        self._targets: dict[str, int] = {}
        self._open_files = ExitStack()
        self._conversion = Conversion()
        self._open_files.callback(self._conversion.close)
        self.resumed_bytes = 0
        self.restarted_because: str | None = None

    def __enter__(self) -> _Writer:
        try:
            with self.reporting():
                self._open_partial()
                self._require_ours()
                for name in self._hashers:
                    self._targets[name] = self._open_target(name)
                self._resume()
                self._require_room()
        except BaseException:
            self._open_files.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._open_files.close()

    def _open_partial(self) -> None:
        self._parent = self._open_files.enter_context(Directory(self._parent_path))
        self._folder = self._open_files.enter_context(self._parent.directory(self._partial.name, make=True))
        found = self._folder.names()
        if found and JOURNAL_FILE not in found:
            raise self._not_ours(found[0])
        is_ours = False
        with suppress(TimeoutError):
            self._lock = self._folder.lock(JOURNAL_FILE, wait_s=0.0, mode=0o644)
            self._open_files.callback(os.close, self._lock)
            # Another process may have finished the pack and renamed the directory that is open here.
            there = self._parent.stat(self._partial.name)
            is_ours = there is not None and os.path.samestat(there, os.fstat(self._folder.descriptor))
        if not is_ours:
            raise UsageError(f"another process is writing {self._partial}")

    def write_all(self) -> None:
        """Write every unit that an earlier run did not write."""
        total, done = self._contents.nbytes, self.resumed_bytes
        for unit in self._units[len(self._checksums) :]:
            checksum = self._write_unit(unit)
            self._append_to_journal(f"{len(self._checksums)} {checksum}\n")
            self._checksums.append(checksum)
            done += unit.end - unit.offset
            self._progress(f"packing {self._format}", done / total)

    def finish(self) -> int:
        """Copy the small files, write the manifest and rename the directory; return the size of the pack."""
        sizes = {}
        for name, descriptor in self._targets.items():
            os.fsync(descriptor)
            sizes[name] = os.fstat(descriptor).st_size, self._hashers[name].hexdigest()
        for source in self._copied:
            sizes[source.name] = self._copy(source)
        for name, data in self._made.items():
            self._write_small(name, data)
            sizes[name] = len(data), blake3.blake3(data).hexdigest()
        if self._source_fingerprint() != self._fingerprint:
            raise CheckpointError(
                f"{self._files.path} changed while it was being packed",
                hint="run the same command again; it starts over",
            )
        contents = self._contents
        manifest = Manifest(
            format=self._format,
            config=contents.config,
            dense_formats={ref.name: ref.format for ref in contents.dense},
            dense_checksums={
                ref.name: checksum for ref, checksum in zip(contents.dense, self._checksums, strict=False)
            },
            expert_formats=contents.expert_formats(),
            num_shares=self._num_shares,
            expert_checksums=self._checksums[contents.experts],
            encoder_checksums={
                unit.copied.name: checksum
                for unit, checksum in zip(self._units, self._checksums, strict=True)
                if isinstance(unit.copied, TensorRef)
            },
            files=dict(sorted(sizes.items())),
        ).to_bytes()
        self._write_small(MANIFEST_FILE, manifest)
        self._folder.sync()
        self._parent.move(self._partial.name, self._destination.name)
        # The journal is removed last: until the new name is on the drive, a crash may restore the partial directory.
        with suppress(OSError):  # the pack is complete; a leftover journal is never read
            self._parent.sync()
            self._folder.remove(JOURNAL_FILE)
        return sum(nbytes for nbytes, _ in sizes.values()) + len(manifest)

    # One unit: read slices of the source, convert, write, hash.

    def _write_unit(self, unit: Unit) -> int:
        if len(unit.parts) > 1:  # an expert
            record = np.zeros(unit.end - unit.offset, np.uint8)
            for source, format, at in unit.parts:
                for start, piece in self._conversion.matrix(source, format):
                    record[at + start : at + start + piece.size] = piece
            self._write(unit.file, record, unit.offset)
            return int(_native.crc32c_wide(record[: unit.nbytes]))
        written = 0
        conversion = self._conversion
        for start, piece in conversion.matrix(*unit.parts[0][:2]) if unit.parts else conversion.copied(unit):
            self._write(unit.file, piece, unit.offset + start)
            written = start + piece.size
        self._write(unit.file, np.zeros(unit.end - unit.offset - written, np.uint8), unit.offset + written)
        return checksum_of(self._partial / unit.file, unit.offset, unit.nbytes)

    def _write(self, name: str, data: Bytes, offset: int) -> None:
        self._hashers[name].update(data.data)
        self._write_at(self._targets[name], data.data, offset)

    # Journal: one line that describes the source and the pack, then "<unit> <checksum>" for each unit written.

    def _resume(self) -> None:
        """Keep the units of an earlier run that are exactly what this run would write."""
        header = json.dumps(
            {
                "version": PACK_VERSION,
                "format": self._format,
                "source": self._fingerprint,
                "encoders": self._encoders_digest(),
                "num_shares": self._num_shares,
            }
        )
        lines = self._read_journal()
        if lines and lines[0] != header:
            self.restarted_because = self._difference(lines[0])
            self._progress(f"starting over: {self.restarted_because}", 0.0)
            lines = []
        if not lines:
            for descriptor in self._targets.values():
                os.ftruncate(descriptor, 0)
            # This pack must not include small files of another source.
            for name in set(self._folder.names()) - {JOURNAL_FILE, *self._targets}:
                self._folder.remove(name)
            os.ftruncate(self._lock, 0)  # last: as long as other files exist, it shows that they are ours
            self._append_to_journal(header + "\n")
        for line in lines[1:]:
            unit = self._units[len(self._checksums)] if len(self._checksums) < len(self._units) else None
            checksum = self._checksum_of_written(unit) if unit is not None else None
            if unit is None or line != f"{len(self._checksums)} {checksum}":
                break
            assert checksum is not None
            self._hash_written(unit)
            self._checksums.append(checksum)
            self.resumed_bytes += unit.end - unit.offset
            self._progress("checking the records of an earlier run", len(self._checksums) / len(self._units))
        kept = [header, *(f"{index} {checksum}" for index, checksum in enumerate(self._checksums))]
        os.ftruncate(self._lock, sum(len(line) + 1 for line in kept))
        for name, descriptor in self._targets.items():
            ends = [unit.end for unit in self._units[: len(self._checksums)] if unit.file == name]
            os.ftruncate(descriptor, max(ends, default=0))

    def _require_ours(self) -> None:
        """Refuse a directory that is not ours, before changing anything in it.

        If the journal lacks a header, which a power cut may have damaged, the directory may hold only files that this
        pack writes.
        """
        lines = self._read_journal()
        if lines and _parsed_header(lines[0], self._partial) is not None:
            return
        small = {path.name for path in self._copied} | {MANIFEST_FILE, *self._made}
        own = {JOURNAL_FILE, *self._hashers, *small, *(f".{name}.new" for name in small)}
        if strangers := sorted(set(self._folder.names()) - own):
            raise self._not_ours(strangers[0])

    def _not_ours(self, name: str) -> UsageError:
        return UsageError(
            f"{self._partial} is not an unfinished pack: it holds {quote(name)}",
            hint="move it away, or choose another name for the pack",
        )

    def _read_journal(self) -> list[str]:
        size = os.fstat(self._lock).st_size
        text = os.pread(self._lock, size, 0).decode("utf-8", "replace")
        return text.split("\n")[:-1]  # the kill cut off a line without a newline

    def _append_to_journal(self, line: str) -> None:
        self._write_at(self._lock, memoryview(line.encode()), os.fstat(self._lock).st_size)

    def _checksum_of_written(self, unit: Unit) -> int | None:
        if os.fstat(self._targets[unit.file]).st_size < unit.end:
            return None
        return checksum_of(self._partial / unit.file, unit.offset, unit.nbytes)

    def _hash_written(self, unit: Unit) -> None:
        view = np.memmap(self._partial / unit.file, np.uint8, "r", unit.offset, (unit.end - unit.offset,))
        self._hashers[unit.file].update(view.data)

    def _difference(self, header: str) -> str:
        earlier = _parsed_header(header, self._partial)
        if earlier is None:
            return "the journal of the unfinished pack is damaged"
        if earlier["format"] != self._format:
            return f"the unfinished pack is {earlier['format']}, but {self._format} was requested"
        if earlier["version"] != PACK_VERSION:
            return "the unfinished pack was made by another version of Argosy"
        if earlier["num_shares"] != self._num_shares:
            return f"the unfinished pack has {earlier['num_shares']} shards, but {self._num_shares} were requested"
        if earlier["encoders"] != self._encoders_digest() and earlier["source"] == self._fingerprint:
            return "the unfinished pack has other encoders"
        return f"{self._files.path} changed since the unfinished pack was started"

    def _encoders_digest(self) -> str | None:
        """Return the digest of the header of the encoders' file, which fixes the place of each tensor."""
        header = self._contents.encoder_header
        return None if header is None else blake3.blake3(header).hexdigest()

    def _source_fingerprint(self) -> list[list[object]]:
        """Return name, size and modification time of every source file of the pack."""
        paths = {path for unit in self._units for path in unit.paths} | set(self._copied)
        if self._files.path.is_file():  # the first part of a GGUF may contain no tensors
            paths.add(self._files.path)
        found: list[list[object]] = []
        for path in sorted(paths):
            try:
                status = path.stat()
                found.append([path.name, status.st_size, status.st_mtime_ns])
            except OSError:
                found.append([path.name, None, None])  # missing, so it has changed
        return found

    # Files

    def _require_room(self) -> None:
        needed = self._contents.nbytes - self.resumed_bytes
        needed += sum(path.stat().st_size for path in self._copied) + sum(map(len, self._made.values()))
        free = shutil.disk_usage(self._parent_path).free
        if needed <= free:
            return
        error = self._disk_full(needed, free)
        if smaller := self._smaller_formats(free):
            error.hint = f"{error.hint}; or {' or '.join(smaller)}"
        raise error

    def _smaller_formats(self, free_bytes: int) -> list[str]:
        """Return options for packs that fit in `free_bytes`."""
        found = []
        for format in PACK_FORMATS:
            if format in ("source", self._format) or quantised_formats(self._files):
                continue
            needed = contents_of(self._files, format, self._num_shares, self._encoders).nbytes
            if needed <= free_bytes:
                found.append(f"`--format {format}`, which takes {format_bytes(needed)}")
        return found

    def _open_target(self, name: str) -> int:
        descriptor = self._folder.open(name, os.O_RDWR | os.O_CREAT, 0o644)
        self._open_files.callback(os.close, descriptor)
        return descriptor

    def _write_at(self, descriptor: int, data: memoryview, offset: int) -> None:
        with self.reporting(len(data)):
            while data:
                written = os.pwrite(descriptor, data, offset)
                data, offset = data[written:], offset + written

    def _write_small(self, name: str, data: bytes) -> None:
        """Write a whole file so that it is either absent or complete and on the drive."""
        temporary = f".{name}.new"
        descriptor = self._open_target(temporary)
        os.ftruncate(descriptor, 0)
        self._write_at(descriptor, memoryview(data), 0)
        os.fsync(descriptor)
        self._folder.move(temporary, name)

    def _copy(self, source: Path) -> tuple[int, str]:
        with open_regular(source) as (descriptor, size):
            data = read_at(descriptor, size, 0, source)
        self._write_small(source.name, data)
        return size, blake3.blake3(data).hexdigest()

    @contextmanager
    def reporting(self, needed_bytes: int = 0) -> Iterator[None]:
        """Turn file system errors in this block into Argosy's errors."""
        try:
            yield
        except OSError as error:
            if is_disk_full(error):
                needed = max(needed_bytes, self._remaining_bytes(), FILE_ALIGNMENT)
                raise self._disk_full(needed, shutil.disk_usage(self._parent_path).free) from error
            raise UsageError(
                f"{error.filename or self._partial} cannot be written: {error.strerror}"
            ) from error

    def _disk_full(self, needed_bytes: int, free_bytes: int) -> DiskFull:
        return DiskFull(
            f"{self._partial} needs {format_bytes(needed_bytes)} more, but its file system has "
            f"{format_bytes(free_bytes)} free",
            hint="make room and run the same command again; it continues where it stopped",
            path=self._partial,
            needed_bytes=needed_bytes,
            free_bytes=free_bytes,
        )

    def _remaining_bytes(self) -> int:
        return sum(unit.end - unit.offset for unit in self._units[len(self._checksums) :])


def _parsed_header(line: str, path: Path) -> dict[str, object] | None:
    """Parse the first line of a journal; return None if no `pack` wrote it."""
    with suppress(CheckpointError):
        header = parse_object(line.encode("utf-8", "replace"), path)
        if header.keys() == {"version", "format", "source", "encoders", "num_shares"}:
            return header
    return None
