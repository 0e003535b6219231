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
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from argosy.checkpoint.untrusted_file import (
    kind_of,
    open_regular,
    parse_object,
    quote,
    read_at,
    read_object,
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


def open_tensors(directory: Path) -> dict[str, TensorRef]:
    """Return every tensor of the checkpoint in `directory`, by name.

    Raises:
        CheckpointError: there is no checkpoint, or it breaks a rule in this module's docstring.
    """
    for single_name, index_name in _NAMES:
        single, index = directory / single_name, directory / index_name
        has_single, has_index = _exists(single), _exists(index)
        if has_single and has_index:
            if set(_read_weight_map(index).values()) == {
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


def read_header(path: Path) -> dict[str, TensorRef]:
    """Return every tensor of one safetensors file, in the order of their bytes.

    Raises:
        CheckpointError: the header contradicts the file, or cannot be read.
    """
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
    entries = parse_object(text, path, "header")
    _check_metadata(entries.pop("__metadata__", {}), path)
    data_start = 8 + header_bytes
    refs = [_tensor_ref(name, entry, path, data_start) for name, entry in entries.items()]
    refs.sort(key=lambda ref: (ref.offset, ref.nbytes))
    _check_ranges(refs, path, data_start, file_bytes)
    return {ref.name: ref for ref in refs}


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


def _read_shards(index: Path) -> dict[str, TensorRef]:
    weight_map = _read_weight_map(index)
    found: dict[str, TensorRef] = {}
    for shard in sorted(set(weight_map.values())):
        refs = read_header(index.parent / shard)
        for name, ref in refs.items():
            promised = weight_map.get(name)
            if promised != shard:
                where = "does not list it" if promised is None else f"assigns it to {promised}"
                raise CheckpointError(
                    f"{shard} holds {quote(name)}, but {index.name} {where}", path=ref.path, tensor=name
                )
            found[name] = ref
    for name, shard in weight_map.items():
        if name not in found:
            raise CheckpointError(
                f"{index.name} assigns {quote(name)} to {shard}, which does not contain it",
                path=index,
                tensor=name,
            )
    return found


def _read_weight_map(index: Path) -> dict[str, str]:
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
    weight_map: dict[str, str] = {}
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
        weight_map[name] = shard
    return weight_map


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
