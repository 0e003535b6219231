"""Reads JSON from callers and models strictly, and writes JSON in one way.

    text  ->  read_json   ->  plain values, or a ValueError with the reason
    value ->  plain_json  ->  a copy in plain values, or a UsageError that names the place
    value ->  write_json  ->  text
    bytes ->  count_values  ->  the number of values, before any value is made

Two readers may disagree about some JSON: duplicate keys, `NaN`, half a character, endless nesting. None of it is
accepted here, so a value that was read once can be passed to a template, a client or a grammar as it is.

Elsewhere: `checkpoint/json_strict.py` reads untrusted files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from argosy.errors import UsageError

_MOST_DEPTH = 64
_TOO_DEEP = f"is nested deeper than {_MOST_DEPTH} levels"
_LARGEST = 1 << 1024  # beyond the range of floats
# Objects, lists, keys and strings in one body: 4096 messages with their parts need a third of this.
MAX_PARTS = 1 << 17
# Items of lists and objects: a prompt of token ids is as long as the longest context.
MAX_ITEMS = (1 << 20) + MAX_PARTS
_COUNTED_AT_ONCE = 1 << 18  # bytes
_NO_BACKSLASH = re.compile(rb"[^\\]")


class Counts(NamedTuple):
    """Values in a JSON text: objects, lists, keys and strings; items of objects and lists beyond the first of each."""

    num_parts: int
    num_items: int


def count_values(data: bytes) -> Counts:
    """Count the values in a JSON text, in a few passes that make no values.

    A reader that stops where the text stops being JSON has seen at most this many. Counting goes part by part and stops
    at the limit, because each pass keeps other threads waiting.

    Raises:
        ValueError: there are more than MAX_PARTS or MAX_ITEMS.
    """
    num_quotes = num_lists = num_items = start = 0
    while start < len(data):
        stop = start + _COUNTED_AT_ONCE
        if data[stop - 1 : stop] == b"\\":  # keep the escaped character in the same part
            following = _NO_BACKSLASH.search(data, stop)
            stop = len(data) if following is None else following.end()
        part = data[start:stop]
        if b"\\" in part:
            part = part.replace(b"\\\\", b"").replace(b'\\"', b"")
        is_inside = num_quotes % 2  # inside a string that began earlier
        num_quotes += part.count(b'"')
        # Checked before split() makes a piece for each.
        _require_few("objects, lists and strings", num_quotes // 2, MAX_PARTS)
        outside = b"".join(part.split(b'"')[is_inside::2])
        num_lists += outside.count(b"[") + outside.count(b"{")
        num_items += outside.count(b",")
        _require_few("objects, lists and strings", num_quotes // 2 + num_lists, MAX_PARTS)
        _require_few("values", num_items, MAX_ITEMS)
        start = stop
    return Counts(num_quotes // 2 + num_lists, num_items)


def _require_few(what: str, number: int, most: int) -> None:
    if number > most:
        raise ValueError(f"it has more than {most} {what}, which is the limit")


def read_json(text: str) -> object:
    """Parse the value of `text`.

    Raises:
        ValueError: it is not JSON, has a duplicate key, contains a value that `plain_json` refuses, or has too many
        values.
    """
    count_values(text.encode(errors="replace"))
    return parse_json(text)


def parse_json(text: str) -> object:
    """Parse a text that `count_values` has accepted. Raises what `read_json` raises."""
    try:
        value: object = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
        _require_exact(value, "it")
        return value
    except RecursionError:
        raise ValueError(f"it {_TOO_DEEP}") from None
    except UsageError as error:
        raise ValueError(error.message) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error.msg} at character {error.pos}") from None
    except ValueError:  # Python refuses whole numbers of more than a few thousand digits
        raise ValueError("it holds a number that is too large") from None


def read_object(text: str) -> dict[str, object] | None:
    """Parse the object in `text`, or return None if it is not one."""
    try:
        value = read_json(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def write_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def plain_json(value: object, where: str) -> object:
    """Copy `value` into dicts, lists, strings, numbers, booleans and None.

    Raises:
        UsageError: it contains another type, half a character, or a number beyond the range of floats, or is nested
            deeper than 64 levels; `where` names the value in the error.
    """
    try:
        plain = _copy(value, where)
    except RecursionError:
        raise UsageError(f"{where} {_TOO_DEEP}") from None
    _require_exact(plain, where)
    return plain


def plain_text(text: str, where: str) -> str:
    """Returns `text` if it can be encoded. Raises what `plain_json` raises."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{where} holds half a character (a lone surrogate)") from None
    return str(text)


def _copy(value: object, where: str) -> object:
    match value:
        case None | bool():
            return value
        case str():
            return str(value)
        case int():
            return int(value)
        case float():
            return float(value)
        case Mapping():
            for key in value:
                if not isinstance(key, str):
                    raise UsageError(f"{where} has the key {key!r}, expected text")
            return {str(key): _copy(item, where) for key, item in value.items()}
        case Sequence() if not isinstance(value, bytes | bytearray):
            return [_copy(item, where) for item in value]
    raise UsageError(f"{where} holds a {type(value).__name__}, which JSON cannot represent")


def _require_exact(value: object, where: str) -> None:
    """Check that every reader reads this alike. Level by level, which is ten times as fast as recursion."""
    level: list[object] = [value]
    for _ in range(_MOST_DEPTH + 1):
        following: list[object] = []
        for item in level:
            kind = type(item)
            if kind is dict:
                assert isinstance(item, dict)
                following += item.values()
                following += item
            elif kind is list:
                assert isinstance(item, list)
                following += item
            elif kind is str:
                assert isinstance(item, str)
                if not item.isascii():
                    plain_text(item, where)
            elif (kind is int or kind is float) and not -_LARGEST < item < _LARGEST:  # type: ignore[operator]
                raise UsageError(f"{where} holds a number that is too large")
        if not following:
            return
        level = following
    raise UsageError(f"{where} {_TOO_DEEP}")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise UsageError("it has a duplicate key")
    return found


def _no_constant(name: str) -> object:
    raise UsageError(f"it holds {name}, which is not JSON")
