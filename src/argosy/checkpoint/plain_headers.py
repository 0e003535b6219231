"""Read the headers and indexes of safetensors files quickly, if they are written as the usual writers write them.

    bytes  ->  plain_entries, plain_weight_map  ->  columns, or None: `safetensors.py` reads it with a JSON parser

A giant has half a million tensors; a parser of all JSON with a check after the other takes 20 s for them. The
expressions here match only ASCII text without escapes, with the keys in their usual order, and what they return has
passed the same checks. Anything else gets None, and the other reader accepts it or says what is wrong with it.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from argosy.checkpoint.untrusted_file import parse_object
from argosy.errors import CheckpointError

_TEXT = rb"[ !#-\[\]-~]"  # printable ASCII without quotes and backslashes
_NUMBER = rb"(?:0|[1-9][0-9]{0,17})"
_START = re.compile(rb'\{(?:("__metadata__":\{[^{}]*\})(?=[,}]))?')
_ENTRY = re.compile(
    rb',"(' + _TEXT + rb'{1,256})":\{"dtype":"([A-Z0-9_]{1,16})","shape":\[((?:' + _NUMBER + rb"(?:," + _NUMBER
    + rb'){0,7})?)\],"data_offsets":\[(' + _NUMBER + rb"),(" + _NUMBER + rb")\]\}"
)  # fmt: skip
_AROUND = len(b',"":{"dtype":"","shape":[],"data_offsets":[,]}')
_SPACE = rb"[ \t\n\r]*"
_FLAT = rb'"metadata"' + _SPACE + rb":" + _SPACE + rb"(\{[^{}]*\})" + _SPACE
_MAP_START = re.compile(
    _SPACE + rb"\{" + _SPACE + rb"(?:" + _FLAT + rb"," + _SPACE + rb')?"weight_map"' + _SPACE + rb":" + _SPACE
    + rb"(?=\{)"
)  # fmt: skip
_COLON = _SPACE + rb":" + _SPACE
_MAP_ENTRY = re.compile(
    rb"[{,]" + _SPACE + rb'"(' + _TEXT + rb'{1,256})"' + _COLON + rb'"(' + _TEXT + rb'{1,255})"' + _SPACE
)
_MAP_END = re.compile(rb"\}" + _SPACE + rb"(?:," + _SPACE + _FLAT + rb")?\}" + _SPACE)


class Kind(NamedTuple):
    """What many tensors have in common; shapes are rows first."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def plain_entries(
    text: bytes, data_bytes: int, dtype_bits: Mapping[str, int]
) -> tuple[list[str], list[Kind], list[int]] | None:
    """Read the header of a safetensors file.

    Args:
        text: the JSON, with spaces behind it.
        data_bytes: the bytes of the file behind its header, which the tensors must cover without overlaps or holes.

    Returns:
        names, kinds and offsets in those bytes, in the order of offsets; or None, which says nothing about the text.
    """
    start = _START.match(text)
    end = len(text.rstrip(b" "))
    if start is None or text[end - 1 : end] != b"}":
        return None
    if start[1] is not None and not _is_plain_metadata(start[1]):
        return None
    # The first entry gets a comma too, so that entries are all alike and nothing may be between them.
    body = text[start.end() : end - 1] if start[1] is not None else b"," + text[1 : end - 1]
    found = _ENTRY.findall(body)
    if not found or sum(map(len, map(b"".join, found))) + _AROUND * len(found) != len(body):
        return None
    kinds: dict[tuple[bytes, bytes], Kind | None] = {}
    entries = []
    for name, dtype, shape, begin, stop in found:
        if (dtype, shape) not in kinds:
            kinds[dtype, shape] = _kind(dtype.decode(), shape, dtype_bits)
        kind, offset = kinds[dtype, shape], int(begin)
        if kind is None or int(stop) - offset != kind.nbytes:
            return None
        entries.append((offset, kind.nbytes, name, kind))
    entries.sort(key=lambda entry: entry[:2])
    if entries[0][0] or entries[-1][0] + entries[-1][1] != data_bytes:
        return None
    if any(offset + nbytes != following[0] for (offset, nbytes, _, _), following in pairwise(entries)):
        return None
    names = b"\n".join(entry[2] for entry in entries).decode("ascii").split("\n")
    if len(set(names)) != len(names) or "__metadata__" in names:
        return None
    return names, [entry[3] for entry in entries], [entry[0] for entry in entries]


def _kind(dtype: str, shape: bytes, dtype_bits: Mapping[str, int]) -> Kind | None:
    sizes = tuple(map(int, shape.split(b","))) if shape else ()
    if dtype not in dtype_bits:
        return None
    num_bits = dtype_bits[dtype]
    for size in sizes:
        num_bits *= size
        if num_bits >= 2**63:
            return None
    return None if num_bits % 8 else Kind(dtype, sizes, num_bits // 8)


def _is_plain_metadata(text: bytes) -> bool:
    try:
        metadata = parse_object(b"{" + text + b"}", Path("header"))["__metadata__"]
    except CheckpointError:
        return False
    return isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())


def plain_weight_map(text: bytes) -> tuple[dict[str, int], list[str], Sequence[int]] | None:
    """Read an index of shards.

    Returns:
        the row of each name, in their order; the shards; and the number of the shard of each row. None says nothing
        about the text.
    """
    start = _MAP_START.match(text)
    if start is None:
        return None
    rows: dict[str, int] = {}
    numbers: dict[bytes, int] = {}
    shard_of = array("i")
    at = start.end()
    for entry in _MAP_ENTRY.finditer(text, at):
        if entry.start() != at or (text[at : at + 1] == b"{") != (not rows):
            break
        name, shard = entry.groups()
        if rows.setdefault(name.decode("ascii"), len(shard_of)) != len(shard_of):
            return None
        shard_of.append(numbers.setdefault(shard, len(numbers)))
        at = entry.end()
    end = _MAP_END.fullmatch(text, at)
    if end is None or not rows or (start[1] is not None and end[1] is not None):
        return None
    for metadata in (start[1], end[1]):
        try:
            parse_object(metadata or b"{}", Path("index"))
        except CheckpointError:
            return None
    return rows, [shard.decode("ascii") for shard in numbers], shard_of
