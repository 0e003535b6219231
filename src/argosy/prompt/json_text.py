"""Reads JSON from callers and models within bounds, and writes JSON in one fixed style.

    text  ->  read_json   ->  plain values, or a ValueError with the reason
    value ->  plain_json  ->  a copy in plain values, or a UsageError that names the place
    value ->  write_json  ->  text
    bytes ->  count_values  ->  the number of values, before any value is created

Elsewhere: `strict_json.py` decides which JSON is accepted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from argosy.errors import UsageError
from argosy.strict_json import TOO_DEEP, JsonError, check_json, parse_json

# Objects, lists, keys and strings per body; 4096 messages with their parts need a third of this.
MAX_PARTS = 1 << 17
# Items of lists and objects; a prompt of token ids may be as long as the longest context.
MAX_ITEMS = (1 << 20) + MAX_PARTS
_COUNTED_AT_ONCE = 1 << 18  # bytes
_NO_BACKSLASH = re.compile(rb"[^\\]")


class Counts(NamedTuple):
    """Values in a JSON text: objects, lists, keys and strings; items of objects and lists beyond the first of each."""

    num_parts: int
    num_items: int


def count_values(data: bytes) -> Counts:
    """Count the values in a JSON text in a few passes that create no values.

    A parser that stops where the text stops being JSON has seen at most this many. Counting goes part by part and
    stops at the limit, because each pass blocks other threads.

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
        # Checked before split() creates a piece for each.
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
        ValueError: it has too many values, or `parse_json` refuses it.
    """
    count_values(text.encode(errors="replace"))
    return parse_json(text)


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
        check_json(plain)
    except RecursionError:
        raise UsageError(f"{where} {TOO_DEEP}") from None
    except JsonError as error:
        raise UsageError(f"{where} {error.fault}") from None
    return plain


def plain_text(text: str, where: str) -> str:
    """Return `text` if it can be encoded; otherwise raise what `plain_json` raises."""
    plain = str(text)
    try:
        check_json(plain)
    except JsonError as error:
        raise UsageError(f"{where} {error.fault}") from None
    return plain


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
