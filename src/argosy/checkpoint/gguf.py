"""Find the metadata and every tensor of a GGUF file, and prove where the bytes are, without reading them.

    file.gguf  ->  read_gguf  ->  GgufFile: metadata by key, {name: TensorRef(file, offset, length, type, shape)}

    "GGUF" | version | counts | key, type, value ... | name, shape, type, offset ... | padding | data, tensor by tensor

ggml's docs/gguf.md describes the format; this module reads versions 2 and 3, little-endian only. It reads only the
header, however large the file. Nothing is trusted: counts and lengths are checked against the size of the file before
anything is allocated, keys and tensor names must be unique, tensors must follow each other in the data part without
overlaps or holes, each must start at a multiple of the alignment, and the file must end after the last tensor. Any
fault raises one CheckpointError.

A model may be split into parts, `name-00001-of-0000N.gguf` and so on, as llama.cpp's `gguf-split` writes them. Each
part is a GGUF file: the first contains the metadata, any may contain tensors, and `split.no`, `split.count` and
`split.tensors.count` identify each part. The caller opens the first part; the others are found by name in the same
directory and proved to belong to it.

Long arrays (the vocabulary has a hundred thousand entries) are skipped, and decoded on request.

Elsewhere: `model/families/` says which keys and tensors a model must have; `landing.py` turns blocks into slot formats;
`gguf_names.py` finds files.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from argosy.checkpoint.block_types import ROW_SCALE_BYTES, RUNNABLE_TYPES, TENSOR_TYPES, unread_type
from argosy.checkpoint.gguf_names import PART_NAME, first_part, part_name
from argosy.checkpoint.safetensors import TensorRef
from argosy.checkpoint.untrusted_file import open_regular, quote, read_at
from argosy.errors import CheckpointError, UnsupportedModel

_SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32

HEADER_LIMIT_BYTES = 256 << 20  # a vocabulary of 256 k tokens and its merges take 12 MB
_FIRST_READ_BYTES = 1 << 20
_LONGEST_KEY = 65_535  # the specification's limits
_LONGEST_TENSOR_NAME = 64
_MOST_DIMENSIONS = 4
_LARGEST_ALIGNMENT = 1 << 20
_LARGEST_NUMBER = 2**63 - 1
_NO_TOKEN = 2**32 - 1  # some converters write this for a missing token

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_TYPE_NAMES = {
    0: "uint8", 1: "int8", 2: "uint16", 3: "int16", 4: "uint32", 5: "int32", 6: "float32", _BOOL: "bool",
    _STRING: "string", _ARRAY: "array", 10: "uint64", 11: "int64", 12: "float64",
}  # fmt: skip
_LENGTH, _TYPE = struct.Struct("<Q"), struct.Struct("<I")
_SMALLEST_ENTRY = 8 + 1 + 4 + 1  # metadata: key length, key, type, value
_SMALLEST_TENSOR = 8 + 1 + 4 + 4 + 8  # tensor list: name length, name, dimensions, type, offset

Scalar = int | float | bool | str


@dataclass(frozen=True, slots=True)
class GgufArray:
    """An array in the metadata, kept as bytes of the file until its values are requested."""

    path: Path
    key: str
    item_type: int
    num_items: int
    raw: bytes

    def __len__(self) -> int:
        return self.num_items

    def values(self) -> list[Scalar]:
        """Return all items.

        Raises:
            CheckpointError: a string is not UTF-8, or a bool is neither 0 nor 1.
        """
        if self.item_type == _STRING:
            return list(self._texts())
        if self.item_type == _BOOL:
            if max(self.raw, default=0) > 1:
                raise CheckpointError(
                    f"{self.path.name}: {quote(self.key)} holds {max(self.raw)}, expected 0 or 1 for a bool",
                    path=self.path,
                    key=self.key,
                )
            return [item == 1 for item in self.raw]
        return list(struct.unpack(f"<{self.num_items}{_NUMBERS[self.item_type]}", self.raw))

    def _texts(self) -> Iterator[str]:
        at, raw, unpack = 0, self.raw, _LENGTH.unpack_from
        for index in range(self.num_items):
            start = at + 8
            at = start + unpack(raw, at)[0]
            try:
                yield raw[start:at].decode("utf-8")
            except UnicodeDecodeError:
                raise CheckpointError(
                    f"{self.path.name}: item {index} of {quote(self.key)} is not UTF-8",
                    path=self.path,
                    key=self.key,
                ) from None


Value = Scalar | GgufArray


@dataclass(frozen=True, slots=True)
class GgufFile:
    """The header of a file, or the merged headers of all parts of a model. Shapes are rows first, as everywhere in
    Argosy.
    """

    path: Path  # the first part of a split model
    metadata: Mapping[str, Value]
    tensors: Mapping[str, TensorRef]  # of all parts

    def integer(self, key: str, default: int | None = None, *, least: int = 0, most: int = 2**31 - 1) -> int:
        """Return a whole number.

        Raises:
            CheckpointError: the key is missing without a default, has another type, or is out of bounds.
        """
        value = self._find(key, default)
        if type(value) is not int or not least <= value <= most:
            raise self.wrong(key, value, f"a whole number from {least} to {most}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a number above zero. A float32 becomes the shortest decimal that rounds to it: 1e-05, not 9.99e-06."""
        value = self._find(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 1e-37 < value < 1e38:
            raise self.wrong(key, value, "a number above zero")
        return float(str(np.float32(value))) if isinstance(value, float) else float(value)

    def flag(self, key: str, default: bool) -> bool:
        """Return true or false."""
        value = self._find(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, value, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """Return a string."""
        value = self._find(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, value, "a string")
        return value

    def token_id(self, role: str) -> int | None:
        """Return the token id of a role such as "eos", or None if the file names none or the id that means none."""
        key = f"tokenizer.ggml.{role}_token_id"
        if self.metadata.get(key) in (None, _NO_TOKEN):
            return None
        return self.integer(key)

    def texts(self, key: str) -> list[str]:
        """Return an array of strings."""
        value = self._find(key, None)
        if not isinstance(value, GgufArray) or value.item_type != _STRING:
            raise self.wrong(key, value, "an array of strings")
        return value.values()  # type: ignore[return-value]

    def numbers(self, key: str) -> list[float]:
        """Return an array of numbers."""
        value = self._find(key, None)
        if not isinstance(value, GgufArray) or value.item_type not in _NUMBERS:
            raise self.wrong(key, value, "an array of numbers")
        return value.values()  # type: ignore[return-value]

    def wrong(self, key: str, value: object, expected: str) -> CheckpointError:
        """Return the error for an invalid value."""
        found = f"an array of {len(value)}" if isinstance(value, GgufArray) else f"'{quote(value)}'"
        return CheckpointError(
            f"{self.path.name}: {quote(key)} is {found}, expected {expected}", path=self.path, key=key
        )

    def _find(self, key: str, default: Value | None) -> Value:
        value = self.metadata.get(key, default)
        if value is None:
            raise CheckpointError(f"{self.path.name} has no key {key}", path=self.path, key=key)
        return value


@dataclass(frozen=True, slots=True)
class _Split:
    """Which part of a model a file is: the values of `_SPLIT_KEYS`."""

    number: int
    count: int
    num_tensors: int

    def __str__(self) -> str:
        return f"part {self.number + 1} of {self.count} of a model with {self.num_tensors} tensors"


def read_gguf(path: Path) -> GgufFile:
    """Read the header of a GGUF file; if it is the first part of a split model, also read the headers of the other
    parts.

    Raises:
        CheckpointError: a header contradicts its file or cannot be read; a part is missing or belongs to another model.
        UnsupportedModel: the file is well-formed, but big-endian or of another version.
    """
    first, split = _read_file(path)
    if split is None or split.count <= 1:
        return first
    name = PART_NAME.fullmatch(path.name)
    if name is None or int(name["count"]) != split.count or int(name["number"]) != split.number + 1:
        raise CheckpointError(
            f"{path.name} is {split}, but its name does not end in "
            f"{part_name('', split.number + 1, split.count)}, so the other parts cannot be found",
            hint="restore the file names under which the parts were published",
            path=path,
        )
    if split.number != 0:
        raise CheckpointError(
            f"{path.name} is {split}; a split model is opened by its first part",
            hint=f"give {first_part(path)}",
            path=path,
        )
    tensors = dict(first.tensors)
    for number in range(1, split.count):
        part_path = path.with_name(part_name(name["stem"], number + 1, split.count))
        if not part_path.exists():
            raise CheckpointError(
                f"{part_path.name} is missing from {path.parent}: {path.name} is {split}",
                hint="download it to the same directory",
                path=part_path,
            )
        part, found = _read_file(part_path)
        expected = _Split(number, split.count, split.num_tensors)
        if found != expected:
            raise CheckpointError(
                f"{part_path.name} is {found or 'not part of a split model'}, expected {expected}",
                hint=f"it does not belong to {path.name}",
                path=part_path,
            )
        for key, value in part.metadata.items():
            if not isinstance(value, GgufArray) and value != first.metadata.get(key, value):
                raise CheckpointError(
                    f"{part_path.name}: {quote(key)} is '{quote(value)}', but in {path.name} it is "
                    f"'{quote(first.metadata[key])}'",
                    hint="the parts belong to different models",
                    path=part_path,
                    key=key,
                )
        for tensor, ref in part.tensors.items():
            if tensor in tensors:
                raise CheckpointError(
                    f"{part_path.name} lists {quote(tensor)}, which {tensors[tensor].path.name} already contains",
                    hint="the parts belong to different models",
                    path=part_path,
                    tensor=tensor,
                )
            tensors[tensor] = ref
    if len(tensors) != split.num_tensors:
        raise CheckpointError(
            f"the {split.count} parts of {path.name} hold {len(tensors)} tensors, expected {split.num_tensors}",
            path=path,
        )
    return GgufFile(path, first.metadata, tensors)


def _read_file(path: Path) -> tuple[GgufFile, _Split | None]:
    """Read one file; return its contents without split keys, and which part of a model it is."""
    with open_regular(path) as (descriptor, file_bytes):
        cursor = _Cursor(path, descriptor, file_bytes)
        num_tensors, num_entries = _read_start(cursor)
        metadata, _ = _read_metadata(cursor, num_entries)
        split = _take_split(cursor, metadata)
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        # The specification requires a multiple of 8; every reader in use requires a power of two.
        if (
            type(alignment) is not int
            or not 8 <= alignment <= _LARGEST_ALIGNMENT
            or alignment & (alignment - 1)
        ):
            raise cursor.refuse(
                f"general.alignment is {quote(alignment)}, expected a power of two from 8 to {_LARGEST_ALIGNMENT}"
            )
        relative = [_read_tensor(cursor) for _ in range(num_tensors)]
        data_start = _round_up(cursor.at, alignment)
        tensors = _place(relative, cursor, data_start, alignment)
        return GgufFile(path, metadata, tensors), split


def _take_split(cursor: _Cursor, metadata: dict[str, Value]) -> _Split | None:
    """Remove the split keys from the metadata, and return them; None if there are none."""
    values = {key: metadata.pop(key) for key in _SPLIT_KEYS if key in metadata}
    if not values:
        return None
    for key in _SPLIT_KEYS:
        value = values.get(key, 0)
        if type(value) is not int or value < 0:
            raise cursor.refuse(f"{key} is {quote(value)}, expected a whole number of 0 or more")
    number, count, num_tensors = (values.get(key, 0) for key in _SPLIT_KEYS)
    return _Split(number, count, num_tensors)  # type: ignore[arg-type]


def is_gguf(path: Path) -> bool:
    """Whether a file begins like a GGUF file, whatever its name: Ollama names files by digest.

    Raises:
        CheckpointError: the file cannot be opened, or is not a regular file.
    """
    with open_regular(path) as (descriptor, nbytes):
        return nbytes >= len(MAGIC) and read_at(descriptor, len(MAGIC), 0, path) == MAGIC


def metadata_only(path: Path) -> bytes:
    """Read the bytes of a GGUF file with the same metadata and no tensors, as vocabularies are distributed.

    Raises: as `read_gguf`.
    """
    with open_regular(path) as (descriptor, file_bytes):
        cursor = _Cursor(path, descriptor, file_bytes)
        metadata, spans = _read_metadata(cursor, _read_start(cursor)[1])
        _take_split(cursor, metadata)
        entries = b"".join(cursor.bytes(*spans[key]) for key in metadata)
    return MAGIC + struct.pack("<IQQ", 3, 0, len(metadata)) + entries


class _Cursor:
    """A position in the header. Bytes are read from the file on demand, never beyond its end."""

    def __init__(self, path: Path, descriptor: int, file_bytes: int) -> None:
        self.path, self.file_bytes = path, file_bytes
        self.at = 0
        self._descriptor = descriptor
        self._buffer = b""

    def refuse(self, sentence: str, hint: str | None = None) -> CheckpointError:
        return CheckpointError(f"{self.path.name}: {sentence}", hint=hint, path=self.path)

    @property
    def bytes_left(self) -> int:
        return self.file_bytes - self.at

    def bytes(self, start: int, stop: int) -> bytes:
        """The bytes of the header read so far."""
        return self._buffer[start:stop]

    def need(self, nbytes: int, what: str) -> int:
        """Advance over `nbytes` bytes, so that they are in the buffer; return where they start."""
        start, stop = self.at, self.at + nbytes
        if stop > len(self._buffer):
            self._fill(stop, what)
        self.at = stop
        return start

    def _fill(self, stop: int, what: str) -> None:
        if stop > self.file_bytes:
            raise self.refuse(
                f"the file ends at byte {self.file_bytes}, inside its header: {what} would end at byte {stop}",
                hint="the download may be incomplete",
            )
        if stop > HEADER_LIMIT_BYTES:
            raise self.refuse(
                f"the header is larger than {HEADER_LIMIT_BYTES} bytes: {what} would end at byte {stop}"
            )
        have = len(self._buffer)
        wanted = min(self.file_bytes, max(stop, 2 * have, _FIRST_READ_BYTES))
        self._buffer += read_at(self._descriptor, wanted - have, have, self.path)

    def unpack(self, layout: struct.Struct, what: str) -> int:
        start = self.need(layout.size, what)
        number: int = layout.unpack_from(self._buffer, start)[0]
        return number

    def text(self, what: str, longest: int = _LARGEST_NUMBER) -> str:
        nbytes = self.unpack(_LENGTH, f"the length of {what}")
        if nbytes > longest:
            raise self.refuse(f"{what} has {nbytes} bytes; at most {longest} are allowed")
        start = self.need(nbytes, what)
        try:
            return self._buffer[start : self.at].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.refuse(f"{what} is not UTF-8 text: byte {error.start} is wrong") from None

    def step_over_texts(self, num_items: int, what: str) -> None:
        """Skip an array of strings; each is a length and that many bytes."""
        at, buffer, unpack = self.at, self._buffer, _LENGTH.unpack_from
        for index in range(num_items):
            if at + 8 > len(buffer):
                self.at = at
                self.need(8, f"item {index} of {what}")
                buffer = self._buffer
            at += 8 + unpack(buffer, at)[0]
        self.at = min(at, self.file_bytes)
        self.need(at - self.at, what)


def _read_start(cursor: _Cursor) -> tuple[int, int]:
    """Check magic and version; return the counts of tensors and metadata entries, both plausible for this file."""
    path = cursor.path
    if cursor.file_bytes < 24:
        raise cursor.refuse(f"{cursor.file_bytes} bytes are too few for a GGUF file")
    cursor.need(4, "the magic")
    magic = cursor.bytes(0, 4)
    if magic == MAGIC[::-1]:
        raise _big_endian(path)
    if magic != MAGIC:
        hint = "`git lfs pull` fetches the file of a Git LFS pointer" if magic == b"vers" else None
        found = quote(magic.decode("latin-1"))
        raise cursor.refuse(f"starts with '{found}'; a GGUF file starts with 'GGUF'", hint)
    version = cursor.unpack(_TYPE, "the version")
    # A big-endian file has the same magic; the low bytes of its version then read as zero.
    if version and version & 0xFFFF == 0:
        raise _big_endian(path)
    if version not in VERSIONS:
        raise UnsupportedModel(
            f"{path.name} is GGUF version {version}; supported: {', '.join(map(str, VERSIONS))}",
            hint="convert the model again with a current llama.cpp" if version == 1 else None,
            path=path,
            key="version",
            value=version,
            supported=VERSIONS,
        )
    num_tensors = cursor.unpack(_LENGTH, "the number of tensors")
    num_entries = cursor.unpack(_LENGTH, "the number of metadata entries")
    for what, count, least in (
        ("metadata entries", num_entries, _SMALLEST_ENTRY),
        ("tensors", num_tensors, _SMALLEST_TENSOR),
    ):
        if count * least > cursor.bytes_left:
            raise cursor.refuse(
                f"claims {count} {what}, but the {cursor.bytes_left} bytes after the counts have room for only "
                f"{cursor.bytes_left // least}",
                hint="the download may be incomplete",
            )
    return num_tensors, num_entries


def _big_endian(path: Path) -> UnsupportedModel:
    return UnsupportedModel(
        f"{path.name} is a big-endian GGUF file; supported: little-endian",
        hint="download the usual little-endian file, or convert this one with `gguf-convert-endian`",
        path=path,
        key="endianness",
        value="big",
        supported=("little",),
    )


def _read_metadata(cursor: _Cursor, num_entries: int) -> tuple[dict[str, Value], dict[str, tuple[int, int]]]:
    """Read values by key, and the bytes [start, stop) of each entry."""
    metadata: dict[str, Value] = {}
    spans: dict[str, tuple[int, int]] = {}
    for index in range(num_entries):
        start = cursor.at
        key = cursor.text(f"the key of metadata entry {index}", _LONGEST_KEY)
        if not key:
            raise cursor.refuse(f"metadata entry {index} has an empty key")
        if key in metadata:
            raise cursor.refuse(f"the key {quote(key)} is given twice")
        kind = cursor.unpack(_TYPE, f"the type of {quote(key)}")
        metadata[key] = _read_value(cursor, key, kind)
        spans[key] = start, cursor.at
    return metadata, spans


def _read_value(cursor: _Cursor, key: str, kind: int) -> Value:
    shown = quote(key)
    if kind in _NUMBERS:
        layout = struct.Struct("<" + _NUMBERS[kind])
        return cursor.unpack(layout, shown)
    if kind == _BOOL:
        start = cursor.need(1, shown)
        byte = cursor.bytes(start, start + 1)[0]
        if byte > 1:
            raise cursor.refuse(f"{shown} is a bool with value {byte}, expected 0 or 1")
        return byte == 1
    if kind == _STRING:
        return cursor.text(shown)
    if kind == _ARRAY:
        return _read_array(cursor, key)
    raise cursor.refuse(f"{shown} has the unknown type {kind}; known: 0 to {max(_TYPE_NAMES)}")


def _read_array(cursor: _Cursor, key: str) -> GgufArray:
    shown = quote(key)
    item_type = cursor.unpack(_TYPE, f"the item type of {shown}")
    if item_type == _ARRAY:
        raise cursor.refuse(
            f"{shown} is an array of arrays, which no model uses; expected an array of plain values"
        )
    if item_type not in _TYPE_NAMES:
        raise cursor.refuse(
            f"the items of {shown} have the unknown type {item_type}; known: 0 to {max(_TYPE_NAMES)}"
        )
    num_items = cursor.unpack(_LENGTH, f"the length of {shown}")
    item_bytes = {_STRING: 8, _BOOL: 1}.get(item_type) or struct.calcsize("<" + _NUMBERS[item_type])
    if num_items * item_bytes > cursor.bytes_left:
        raise cursor.refuse(
            f"{shown} claims {num_items} items of {_TYPE_NAMES[item_type]}, but the {cursor.bytes_left} bytes "
            f"after it have room for only {cursor.bytes_left // item_bytes}",
            hint="the download may be incomplete",
        )
    start = cursor.at
    if item_type == _STRING:
        cursor.step_over_texts(num_items, shown)
    else:
        cursor.need(num_items * item_bytes, shown)
    return GgufArray(cursor.path, key, item_type, num_items, cursor.bytes(start, cursor.at))


def _read_tensor(cursor: _Cursor) -> TensorRef:
    """Read one entry of the tensor list; its offset counts from the start of the data part."""
    name = cursor.text("the name of a tensor", _LONGEST_TENSOR_NAME)
    shown = quote(name)

    def refuse(sentence: str) -> CheckpointError:
        return CheckpointError(f"{cursor.path.name}: {shown} {sentence}", path=cursor.path, tensor=name)

    if not name:
        raise cursor.refuse("a tensor has an empty name")
    num_dimensions = cursor.unpack(_TYPE, f"the dimensions of {shown}")
    if num_dimensions > _MOST_DIMENSIONS:
        raise refuse(f"has {num_dimensions} dimensions; at most {_MOST_DIMENSIONS} are allowed")
    sizes = [cursor.unpack(_LENGTH, f"the shape of {shown}") for _ in range(num_dimensions)]
    kind = cursor.unpack(_TYPE, f"the type of {shown}")
    offset = cursor.unpack(_LENGTH, f"the offset of {shown}")
    if kind not in TENSOR_TYPES:
        called, hint = unread_type(kind)
        raise UnsupportedModel(
            f"{cursor.path.name}: {shown} has type {called}; supported: {', '.join(RUNNABLE_TYPES)}",
            hint=hint,
            path=cursor.path,
            tensor=name,
            key="type",
            value=kind,
            supported=RUNNABLE_TYPES,
        )
    dtype, block_values, block_bytes = TENSOR_TYPES[kind]
    num_values = 1
    for size in sizes:
        num_values *= size
        # Checked after every factor, as an implementation with 64-bit arithmetic would have to.
        if num_values * block_bytes > _LARGEST_NUMBER:
            raise refuse(f"is {dtype} {sizes[::-1]}, more than 2^63 - 1 bytes")
    row = sizes[0] if sizes else 1
    if row % block_values:
        raise refuse(f"has rows of {row} values, but {dtype} stores blocks of {block_values}")
    nbytes = num_values // block_values * block_bytes
    if dtype in ROW_SCALE_BYTES and row:
        nbytes += num_values // row * ROW_SCALE_BYTES[dtype]
    return TensorRef(name, cursor.path, offset, nbytes, dtype, tuple(reversed(sizes)))


def _place(
    relative: list[TensorRef], cursor: _Cursor, data_start: int, alignment: int
) -> dict[str, TensorRef]:
    """Prove that the tensors, in order, fill exactly the data part; return them with offsets in the file."""
    tensors: dict[str, TensorRef] = {}
    for ref in relative:
        if ref.name in tensors:
            raise cursor.refuse(f"the tensor {quote(ref.name)} is listed twice")
        tensors[ref.name] = TensorRef(
            ref.name, ref.path, data_start + ref.offset, ref.nbytes, ref.dtype, ref.shape
        )
    end, before = data_start, "the header"
    for ref in sorted(tensors.values(), key=lambda ref: (ref.offset, ref.nbytes)):
        shown, expected = quote(ref.name), _round_up(end, alignment)
        if (ref.offset - data_start) % alignment:
            raise cursor.refuse(
                f"{shown} starts {ref.offset - data_start} bytes into the data, expected a multiple of {alignment}"
            )
        if ref.offset != expected:
            fault = "overlaps" if ref.offset < expected else "leaves a hole after"
            raise cursor.refuse(
                f"{shown} {fault} {quote(before)}: it starts at byte {ref.offset}, expected {expected}"
            )
        end, before = ref.offset + ref.nbytes, ref.name
        if end > cursor.file_bytes:
            raise cursor.refuse(
                f"{shown} ends at byte {end}, but the file has {cursor.file_bytes} bytes",
                hint="the download may be incomplete",
            )
    # Some writers pad the last tensor to the alignment, others do not.
    if tensors and cursor.file_bytes > _round_up(end, alignment):
        raise cursor.refuse(f"the file has {cursor.file_bytes} bytes, but its tensors end at byte {end}")
    if not tensors and cursor.file_bytes > data_start:
        raise cursor.refuse(
            f"the file has {cursor.file_bytes} bytes, but no tensor follows its header of {cursor.at}"
        )
    return tensors


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
