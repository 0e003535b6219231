"""The parts of experts that an adapter brings: all in memory, or in slots and read with their experts.

    AdapterFiles.read_expert  ->  PartFile, a temporary file  ->  slots, as experts need them (native/ops/part_cache.h)
                              ->  one arena, while every expert is in memory end to end

Parts cannot be read where the adapter's files have them: PEFT interleaves the columns of all experts. So they are
written once, each at a multiple of the alignment of reads, into a file without a name that disappears with the process.

An adapter has slots in proportion to the experts in memory, because a plan gives every slot of an expert the bytes of
its parts (`AdapterNeeds`), and at least one.

Elsewhere: `experts/cache.py` calls `resize` when its own slots change; `loaded.py` has the dense part.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from argosy import _native
from argosy.adapters.files import AdapterFiles
from argosy.checkpoint.files import ExpertRecords, ModelFiles
from argosy.checkpoint.formats import round_up
from argosy.config import format_bytes
from argosy.errors import CheckpointError, DiskFull, UnsupportedModel, room_for
from argosy.experts.files import LARGEST_ALIGNMENT
from argosy.experts.policy import CachePolicy
from argosy.machine.resources import drive_of, free_disk_bytes

Key = tuple[int, int]  # (layer, expert)
_IN_MEMORY = ("tmpfs", "ramfs")  # a file there would take memory that no plan counts
_HINT = "free some space, or set TMPDIR to a directory on another drive"


def experts_by_layer(files: ModelFiles) -> dict[int, int]:
    """Return how many routed experts each layer has."""
    found: dict[int, int] = {}
    for layer, first, count, _ in ExpertRecords.of(files.experts).runs():
        found[layer] = max(found.get(layer, 0), first + count)
    return found


def part_slot_bytes(files: AdapterFiles) -> int:
    """Return the bytes of a slot, and of a part in the file; 0: no expert has a part."""
    return round_up(max((part.nbytes for part in files.experts.values()), default=0), LARGEST_ALIGNMENT)


def require_parts_fit(files: AdapterFiles, model: ModelFiles) -> None:
    """Check that the parts fit the model's experts.

    Raises:
        UnsupportedModel: a layer has no routed experts.   CheckpointError: an expert has other sizes.
    """
    counts, config = experts_by_layer(model), model.own_config
    for layer, part in files.experts.items():
        if layer not in counts or layer >= config.num_layers:
            raise UnsupportedModel(
                f"{files.path.name} has pairs for routed experts of layer {layer}, and the model has none there",
                path=files.path,
                layer=layer,
            )
        record = model.experts[layer, 0]
        found, expected = (part.width, part.hidden), (record.up.rows, record.up.cols)
        if found != expected:
            raise CheckpointError(
                f"{files.path.name}: pairs of the experts of layer {layer} are for [{found[0]}, {found[1]}], and the "
                f"model's experts have [{expected[0]}, {expected[1]}]",
                path=files.path,
                layer=layer,
            )


class PartFile:
    """A file without a name for the parts of all adapters of an engine; one thread at a time calls `add`.

    Args:
        directory: None: where temporary files go, if that is on a drive.

    Attributes:
        store: reads the file.
        file_id: the number of the file there, after the first `add`.
    """

    def __init__(self, store: _native.Store, directory: Path | None = None) -> None:
        self.store, self._directory = store, directory
        self.file_id = -1
        self._descriptor = -1
        self._used: dict[int, int] = {}  # by offset, where the parts of an adapter end

    def add(self, parts: Iterator[bytes], count: int, stride: int) -> tuple[int, list[int]]:
        """Write parts, `stride` bytes apart; return where the first begins, and the checksum of each.

        Raises:
            DiskFull: they do not fit on the drive; nothing changed.
        """
        directory = self._directory = self._directory or _directory_on_a_drive()
        checksums: list[int] = []
        with room_for("the parts of an adapter", directory, hint=_HINT):
            if self._descriptor < 0:
                self._open(directory)
            begin = self._free_place(count * stride, directory)
            try:
                os.posix_fallocate(self._descriptor, begin, count * stride)
                for number, part in enumerate(parts):
                    checksums.append(_native.crc32c_wide(part))
                    _write(self._descriptor, part, begin + number * stride)
                os.fdatasync(self._descriptor)
                # Otherwise they would stay in memory that no plan counts.
                os.posix_fadvise(self._descriptor, begin, count * stride, os.POSIX_FADV_DONTNEED)
            except BaseException:
                self._cut()
                raise
        assert len(checksums) == count
        self._used[begin] = begin + count * stride
        return begin, checksums

    def remove(self, begin: int) -> None:
        """Forget the parts that begin there; no read of them is in flight."""
        self._used.pop(begin)
        self._cut()

    def _open(self, directory: Path) -> None:
        with tempfile.TemporaryFile(dir=directory) as file:
            self._descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._descriptor)
        self.file_id = self.store.open(f"/proc/self/fd/{self._descriptor}")

    def _free_place(self, nbytes: int, directory: Path) -> int:
        """Return the first gap of this size."""
        place = 0
        for begin, end in sorted(self._used.items()):
            if begin - place >= nbytes:
                return place
            place = end
        if (free := free_disk_bytes(directory)) < nbytes:
            raise DiskFull(
                f"the parts of an adapter need {format_bytes(nbytes, rounds_up=True)} in {directory}, and "
                f"{format_bytes(free)} are free",
                hint=_HINT,
                path=directory,
                needed_bytes=nbytes,
                free_bytes=free,
            )
        return place

    def _cut(self) -> None:
        os.ftruncate(self._descriptor, max(self._used.values(), default=0))


def _write(descriptor: int, data: bytes, offset: int) -> None:
    rest = memoryview(data)
    while rest:
        written = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[written:], offset + written


def _directory_on_a_drive() -> Path:
    candidates = [Path(tempfile.gettempdir()), Path("/var/tmp")]
    for path in candidates:
        drive = drive_of(path)
        if os.access(path, os.W_OK) and (drive is None or drive.file_system not in _IN_MEMORY):
            return path
    raise DiskFull(
        f"the parts of an adapter are read from a drive, and {candidates[0]} is in memory",
        hint="set TMPDIR to a directory on a drive",
        path=candidates[0],
    )


def load_parts(
    files: AdapterFiles,
    model: ModelFiles,
    file: PartFile,
    *,
    name: str = "",
    factor: float = 1.0,
    is_packed: bool,
) -> ExpertParts | None:
    """Bring the parts of an adapter into memory or into the file; None: it changes no routed expert.

    Args:
        name: the adapter's, for errors.
        is_packed: every expert is in memory end to end, and so are parts.

    Raises:
        UnsupportedModel, CheckpointError: as `require_parts_fit`.   DiskFull: the drive has no room for them.
    """
    if not files.experts:
        return None
    require_parts_fit(files, model)
    parts = ExpertParts(files, experts_by_layer(model), file, k=model.config.experts_per_token, factor=factor)
    parts.name = name
    try:
        if is_packed:
            parts.load_all()
        else:
            parts.write()
    except BaseException:
        parts.close()
        raise
    return parts


class ExpertParts:
    """The parts of one adapter, for `LoadedAdapter.experts`: see `argosy.experts.runner.AdapterParts`.

    Args:
        experts: by layer, how many there are.
        k: experts per token.
        factor: multiplies the scales.
    """

    name = ""

    def __init__(
        self, files: AdapterFiles, experts: Mapping[int, int], file: PartFile, *, k: int, factor: float
    ) -> None:
        assert files.read_expert is not None
        self._read: Callable[[int, int], bytes] = files.read_expert
        self._file, self._k, self._slot_bytes = file, k, part_slot_bytes(files)
        self._sizes = {
            layer: (experts[layer], files.experts[layer].nbytes) for layer in sorted(files.experts)
        }
        self.most = sum(count for count, _ in self._sizes.values())
        self._reads: tuple[int, dict[int, tuple[int, int, list[int]]]] | None = (
            None  # begin in the file, layers
        )
        self._policy: CachePolicy | None = None  # of slots
        self._is_loaded = False
        self._arena = _native.Arena(self.most * self._slot_bytes)
        self.adapter = _native.ExpertAdapter(self._arena)
        for layer, part in files.experts.items():
            self.adapter.add_layer(
                layer,
                format=part.format,
                ranks=part.ranks,
                scales=[scale * factor for scale in part.scales],
                hidden=part.hidden,
                width=part.width,
                num_experts=experts[layer],
            )

    @property
    def _parts(self) -> Iterator[tuple[Key, int]]:
        """Each expert, and where its part lies while all are in memory."""
        at = 0
        for layer, (count, _) in self._sizes.items():
            for expert in range(count):
                yield (layer, expert), at
                at += self._slot_bytes

    def load_all(self) -> None:
        """Bring every part into memory; harmless if they are there."""
        if self._is_loaded:
            return
        memory = self._arena.array()
        for key, at in self._parts:
            part = np.frombuffer(self._part(key), np.uint8)
            memory[at : at + len(part)] = part
        self.adapter.place(list(self._parts))
        self._is_loaded = True

    def write(self) -> None:
        """Write every part into the file; harmless if they are there."""
        if self._reads is not None:
            return
        memory = self._arena.array()
        parts = (
            memory[at : at + self._sizes[key[0]][1]].tobytes() if self._is_loaded else self._part(key)
            for key, at in self._parts
        )
        begin, checksums = self._file.add(parts, self.most, self._slot_bytes)
        layers, number = {}, 0
        for layer, (count, nbytes) in self._sizes.items():
            layers[layer] = (begin + number * self._slot_bytes, nbytes, checksums[number : number + count])
            number += count
        self._reads = begin, layers

    def _part(self, key: Key) -> bytes:
        part, nbytes = self._read(*key), self._sizes[key[0]][1]
        if len(part) != nbytes:
            raise CheckpointError(
                f"the adapter's part of layer {key[0]}, expert {key[1]} has {len(part)} bytes, expected {nbytes}",
                layer=key[0],
                expert=key[1],
            )
        return part

    def stream(self, num_slots: int) -> _native.PartCache:
        """From now on, have slots for some parts, which are read when experts need them; none is in memory at first.

        Raises:
            DiskFull: `write` failed; nothing changed.
        """
        self.write()
        assert self._reads is not None
        self._is_loaded = False
        self._arena.resize(0)
        self._arena.resize(num_slots * self._slot_bytes)
        self._policy = CachePolicy(num_slots=num_slots, layers=list(self._sizes), experts_per_token=self._k)
        file = self._file
        reads = _native.PartReads(
            file.store, self._arena, file.file_id, stride=self._slot_bytes, layers=self._reads[1]
        )
        return _native.PartCache(
            reads, self._policy, self.adapter, slot_bytes=self._slot_bytes, num_parts=self.most
        )

    def resize(self, num_slots: int) -> None:
        """Change the number of slots, after `stream`, between two leases; removed slots give their memory back."""
        assert self._policy is not None
        if num_slots == self._policy.num_slots:
            return
        self._policy.resize(num_slots)
        memory, size = self._arena.array(), self._slot_bytes
        for key, slot, to in self._policy.moves(num_slots):
            memory[to * size : (to + 1) * size] = memory[slot * size : (slot + 1) * size]
            self.adapter.place([(key, to * size)])
        self._arena.resize(num_slots * size)

    def close(self) -> None:
        """Free memory and file; no read may be in flight."""
        self._arena.close()
        if self._reads is not None:
            self._file.remove(self._reads[0])
            self._reads = None
