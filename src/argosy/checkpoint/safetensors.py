"""Find every tensor of a safetensors checkpoint and prove where its bytes are, without reading them.

    directory  ->  open_tensors  ->  {name: TensorRef(file, offset, length, dtype, shape)}

A checkpoint is `model.safetensors`, or the shards that `model.safetensors.index.json` lists; Mistral's own files are
named `consolidated` instead. Only the header of each file is read: 8 bytes of length, then JSON. Nothing is trusted:
every range must lie inside the actual file, ranges must follow each other without overlaps or holes (as the format's
reference implementation demands), a length must be dtype times shape, and the index and its shards must agree in both
directions. Any fault raises one CheckpointError.

Elsewhere: `model/families/` says which tensors a model must have; `pack.py` writes the packed form.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from argosy.checkpoint.plain_headers import Kind, plain_entries, plain_weight_map
from argosy.checkpoint.untrusted_file import (
    kind_of,
    open_regular,
    parse_object,
    quote,
    read_at,
    read_object,
    read_text,
)
from argosy.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONSOLIDATED_FILE = "consolidated.safetensors"  # Mistral's
CONSOLIDATED_INDEX = "consolidated.safetensors.index.json"
_NAMES = ((SINGLE_FILE, INDEX_FILE), (CONSOLIDATED_FILE, CONSOLIDATED_INDEX))
TENSOR_FILES = tuple(name for names in _NAMES for name in names)

SHARD = re.compile(r"(?P<stem>model|consolidated)-(?P<number>\d{5,6})-of-(?P<count>\d{5,6})\.safetensors")

HEADER_LIMIT_BYTES = 100_000_000  # the reference implementation's limit
LONGEST_NAME = 256  # characters of a tensor's name; real ones have a hundred
_LARGEST_NUMBER = 2**63 - 1
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E5M2FNUZ": 8, "F8_E4M3FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32,
    "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorRef:
    """The place of one tensor: `nbytes` bytes at `offset` of `path`, rows first, little-endian."""

    name: str
    path: Path
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    checksum: int | None = None  # crc32c_wide of the bytes; only packs have it

    def at(self, index: int) -> TensorRef:
        """Return one of the tensors that it stacks along its first axis."""
        nbytes = self.nbytes // self.shape[0]
        return TensorRef(
            self.name, self.path, self.offset + index * nbytes, nbytes, self.dtype, self.shape[1:]
        )

    def rows(self, first: int, count: int) -> TensorRef:
        """Return `count` of its rows, from row `first` on."""
        row_bytes = self.nbytes // self.shape[0]
        return TensorRef(
            self.name,
            self.path,
            self.offset + first * row_bytes,
            count * row_bytes,
            self.dtype,
            (count, *self.shape[1:]),
        )


class Tensors(Mapping[str, TensorRef]):
    """Tensors by name, in columns: a giant has half a million, and a `TensorRef` is made when one is asked for.

    Attributes:
        rows: the row of each name.
    """

    def __init__(self, rows: dict[str, int] | None = None) -> None:
        self.rows = rows or {}
        unknown = [-1] * len(self.rows)
        self._kinds: list[Kind] = []
        self._kind_numbers: dict[Kind, int] = {}
        self._kind_of = array("i", unknown)
        self._paths: list[Path] = []
        self._path_of = array("i", unknown)
        self._offset_of = array("q", unknown)
        self._others: dict[int, TensorRef] = {}  # by row, those with more than columns hold

    @classmethod
    def of(cls, tensors: Mapping[str, TensorRef]) -> Tensors:
        """Return tensors in columns."""
        if isinstance(tensors, cls):
            return tensors
        found = cls({name: row for row, name in enumerate(tensors)})
        for row, ref in enumerate(tensors.values()):
            found._set(row, ref.path, ref.offset, Kind(ref.dtype, ref.shape, ref.nbytes))
            found._others[row] = ref
        return found

    def add(self, path: Path, names: Iterable[str], kinds: Iterable[Kind], offsets: Iterable[int]) -> None:
        """Add tensors of a file, in columns."""
        for name, kind, offset in zip(names, kinds, offsets, strict=True):
            row = self.rows.setdefault(name, len(self._kind_of))
            if row == len(self._kind_of):
                self._kind_of.append(-1)
                self._path_of.append(-1)
                self._offset_of.append(-1)
            self._set(row, path, offset, kind)

    def _set(self, row: int, path: Path, offset: int, kind: Kind) -> None:
        if (number := self._kind_numbers.get(kind)) is None:
            number = self._kind_numbers[kind] = len(self._kinds)
            self._kinds.append(kind)
        if not self._paths or self._paths[-1] is not path:
            self._paths.append(path)
        self._kind_of[row], self._path_of[row], self._offset_of[row] = number, len(self._paths) - 1, offset

    def kind(self, row: int) -> Kind:
        """Return the dtype, shape and size of the tensor in a row."""
        return self._kinds[self._kind_of[row]]

    def place(self, row: int) -> tuple[Path, int]:
        """Return the file and offset of the tensor in a row."""
        return self._paths[self._path_of[row]], self._offset_of[row]

    def is_found(self, row: int) -> bool:
        """Whether a header has described the tensor in a row, and not only an index."""
        return self._kind_of[row] >= 0

    def __getitem__(self, name: str) -> TensorRef:
        row = self.rows[name]
        if (known := self._others.get(row)) is not None:
            return known
        dtype, shape, nbytes = self.kind(row)
        path, offset = self.place(row)
        return TensorRef(name, path, offset, nbytes, dtype, shape)

    def __contains__(self, name: object) -> bool:
        return name in self.rows

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


def weight_files(names: Collection[str]) -> tuple[list[str], str]:
    """Choose a checkpoint's files with weights among the names of all files; also return the name of their index."""
    for single, index in _NAMES:
        if single in names:
            return [single], index
        shards = [
            name for name in names if (match := SHARD.fullmatch(name)) and single.startswith(match["stem"])
        ]
        if shards or index in names:
            return shards, index
    return [], INDEX_FILE


def open_tensors(directory: Path) -> Tensors:
    """Return every tensor of the checkpoint in `directory`, by name.

    Raises:
        CheckpointError: there is no checkpoint, or it breaks a rule in this module's docstring.
    """
    for single_name, index_name in _NAMES:
        single, index = directory / single_name, directory / index_name
        has_single, has_index = _exists(single), _exists(index)
        if has_single and has_index:
            if set(_read_weight_map(index)[1]) == {
                single_name
            }:  # mlx-lm writes an index for one file as well
                return _read_shards(index)
            raise CheckpointError(
                f"{directory} holds both {single_name} and {index_name}, but only one of them may exist",
                hint="move one of them away",
                path=directory,
            )
        if has_single:
            return read_header(single)
        if has_index:
            return _read_shards(index)
    raise _nothing_to_read(directory)


def read_header(path: Path) -> Tensors:
    """Return every tensor of one safetensors file, in the order of their bytes.

    Raises:
        CheckpointError: the header contradicts the file, or cannot be read.
    """
    found = Tensors()
    found.add(path, *_read_columns(path))
    return found


def _read_columns(path: Path) -> tuple[list[str], list[Kind], list[int]]:
    """Return the names, kinds and offsets of the tensors of a file, in the order of their bytes."""
    with open_regular(path) as (descriptor, file_bytes):
        if file_bytes < 8:
            raise CheckpointError(
                f"{path.name} is {file_bytes} bytes long, too short to be a safetensors file", path=path
            )
        header_bytes = int.from_bytes(read_at(descriptor, 8, 0, path), "little")
        if header_bytes > HEADER_LIMIT_BYTES:
            raise CheckpointError(
                f"{path.name} claims a header of {header_bytes} bytes; at most {HEADER_LIMIT_BYTES} are read",
                path=path,
            )
        if 8 + header_bytes > file_bytes:
            raise CheckpointError(
                f"{path.name} claims a header of {header_bytes} bytes, but the file has only "
                f"{file_bytes - 8} after the length",
                hint="the download may be incomplete",
                path=path,
            )
        text = read_at(descriptor, header_bytes, 8, path)
    if not text.startswith(b"{"):
        raise CheckpointError(f"{path.name}: the header does not start with '{{'", path=path)
    data_start = 8 + header_bytes
    if (plain := plain_entries(text, file_bytes - data_start, DTYPE_BITS)) is not None:
        return plain[0], plain[1], [data_start + offset for offset in plain[2]]
    entries = parse_object(text, path, "header")
    _check_metadata(entries.pop("__metadata__", {}), path)
    refs = [_tensor_ref(name, entry, path, data_start) for name, entry in entries.items()]
    refs.sort(key=lambda ref: (ref.offset, ref.nbytes))
    _check_ranges(refs, path, data_start, file_bytes)
    kinds = [Kind(ref.dtype, ref.shape, ref.nbytes) for ref in refs]
    return [ref.name for ref in refs], kinds, [ref.offset for ref in refs]


def _check_metadata(metadata: object, path: Path) -> None:
    if metadata is None:  # MLX writes null if there are none, and the reference implementation reads it
        return
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path.name}: __metadata__ must map strings to strings", path=path)


def _tensor_ref(name: str, entry: object, path: Path, data_start: int) -> TensorRef:
    def refuse(sentence: str) -> CheckpointError:
        return CheckpointError(f"{path.name}: {quote(name)} {sentence}", path=path, tensor=name)

    if len(name) > LONGEST_NAME:
        raise refuse(f"is a name of {len(name)} characters; at most {LONGEST_NAME} are read")
    if not isinstance(entry, dict):
        raise refuse(f"is {kind_of(entry)} in the header, expected an object")
    if entry.keys() != {"dtype", "shape", "data_offsets"}:
        found = ", ".join(sorted(quote(key) for key in entry)) or "nothing"
        raise refuse(f"has the fields {found}; expected data_offsets, dtype, shape")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise refuse(f"has dtype {quote(dtype)}; known: {', '.join(DTYPE_BITS)}")
    if not isinstance(shape, list) or not all(_is_count(size) for size in shape):
        raise refuse(f"has shape {quote(shape)}, expected a list of whole numbers from 0 to 2^63 - 1")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(offset) for offset in offsets):
        raise refuse(f"has data_offsets {quote(offsets)}, expected two whole numbers from 0 to 2^63 - 1")

    num_bits = DTYPE_BITS[dtype]
    for size in shape:
        num_bits *= size
        # Checked after every factor, as an implementation with 64-bit arithmetic would have to.
        if num_bits > _LARGEST_NUMBER:
            raise refuse(f"is {dtype} {quote(shape)}, more than 2^63 - 1 bits")
    if num_bits % 8:
        raise refuse(f"is {dtype} {quote(shape)}, which is not a whole number of bytes")
    begin, end = offsets
    if end < begin or end - begin != num_bits // 8:
        raise refuse(
            f"is {dtype} {quote(shape)} and needs {num_bits // 8} bytes, but its data_offsets {offsets} "
            f"span {end - begin}"
        )
    return TensorRef(name, path, data_start + begin, end - begin, dtype, tuple(shape))


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST_NUMBER


def _check_ranges(refs: list[TensorRef], path: Path, data_start: int, file_bytes: int) -> None:
    """Prove that the ranges, in order, are exactly the bytes after the header."""
    at, before = data_start, "the header"
    for ref in refs:
        if ref.offset + ref.nbytes > file_bytes:
            raise CheckpointError(
                f"{path.name}: {quote(ref.name)} ends at byte {ref.offset + ref.nbytes}, "
                f"but the file has {file_bytes} bytes",
                hint="the download may be incomplete",
                path=path,
                tensor=ref.name,
            )
        if ref.offset != at:
            fault = "overlaps" if ref.offset < at else "leaves a hole after"
            raise CheckpointError(
                f"{path.name}: {quote(ref.name)} {fault} {quote(before)}: it starts at byte "
                f"{ref.offset}, expected {at}",
                path=path,
                tensor=ref.name,
            )
        at, before = ref.offset + ref.nbytes, ref.name
    if at != file_bytes:
        raise CheckpointError(
            f"{path.name} has {file_bytes} bytes, but its tensors end at byte {at}", path=path
        )


def _read_shards(index: Path) -> Tensors:
    rows, shards, shard_of = _read_weight_map(index)
    found = Tensors(rows)
    for number, shard in sorted(enumerate(shards), key=lambda item: item[1]):
        path = index.parent / shard
        names, kinds, offsets = _read_columns(path)
        for name in names:
            row = rows.get(name)
            if row is None or shard_of[row] != number:
                where = "does not list it" if row is None else f"assigns it to {shards[shard_of[row]]}"
                raise CheckpointError(
                    f"{shard} holds {quote(name)}, but {index.name} {where}",
                    path=path,
                    tensor=name,
                )
        found.add(path, names, kinds, offsets)
    for name, row in rows.items():
        if not found.is_found(row):
            raise CheckpointError(
                f"{index.name} assigns {quote(name)} to {shards[shard_of[row]]}, which does not contain it",
                path=index,
                tensor=name,
            )
    return found


def _read_weight_map(index: Path) -> tuple[dict[str, int], list[str], Sequence[int]]:
    """Return the names of an index with a row each, its shards, and the number of the shard of each row."""
    if (plain := plain_weight_map(read_text(index))) is not None:
        rows, shards, shard_of = plain
        if all(_is_plain_file_name(shard) for shard in shards):
            return rows, shards, shard_of
    raw = read_object(index)
    for key in raw:
        if key not in ("metadata", "weight_map"):
            raise CheckpointError(
                f"{index.name} has the unknown key '{quote(key)}'; known: metadata, weight_map",
                path=index,
                key=key,
            )
    entries = raw.get("weight_map")
    if not isinstance(entries, dict) or not entries:
        raise CheckpointError(f"{index.name} has no weight_map from tensor names to shards", path=index)
    numbers: dict[str, int] = {}  # of shards
    shard_of = array("i")
    for name, shard in entries.items():
        if not isinstance(shard, str):
            raise CheckpointError(
                f"{index.name} assigns {quote(name)} to {quote(shard)}, expected a file name",
                path=index,
                tensor=name,
            )
        if not _is_plain_file_name(shard):
            raise CheckpointError(
                f"{index.name} names the shard '{quote(shard)}'; a shard is a plain file name "
                "without a folder, ending in .safetensors",
                path=index,
                tensor=name,
            )
        shard_of.append(numbers.setdefault(shard, len(numbers)))
    return {name: row for row, name in enumerate(entries)}, list(numbers), shard_of


def _is_plain_file_name(name: str) -> bool:
    is_plain = name.isprintable() and "/" not in name and "\\" not in name and not name.startswith(".")
    return is_plain and name.endswith(".safetensors") and len(name) <= 255


def _exists(path: Path) -> bool:
    return path.is_symlink() or path.exists()  # a dangling link counts, so that it gets its own error


def _nothing_to_read(directory: Path) -> CheckpointError:
    """Return the error for a directory without safetensors: the files expected, and the files found instead."""
    looked_for = f"{directory} holds no safetensors: looked for {SINGLE_FILE} and {INDEX_FILE}"
    names = sorted(entry.name for entry in directory.iterdir()) if directory.is_dir() else []
    for name in names:
        if name.endswith(_PICKLE_SUFFIXES):
            return CheckpointError(
                f"{looked_for}, found {quote(name)}, a format that can run code when it is loaded",
                hint="download the safetensors files of this model instead",
                path=directory,
                found=name,
            )
    for name in names:
        if name.endswith((".safetensors", ".gguf")):
            return CheckpointError(f"{looked_for}, found {quote(name)}", path=directory, found=name)
    return CheckpointError(looked_for, path=directory)
