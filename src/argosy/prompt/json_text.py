"""JSON that callers and models write, read strictly and written one way.

    text  ->  read_json   ->  plain values, or a ValueError that says why not
    value ->  plain_json  ->  the same as plain values, or a UsageError that names the place
    value ->  write_json  ->  text
    bytes ->  count_values  ->  how much there is of it, before any value is made

JSON has corners where two readers disagree: a key given twice, `NaN`, half a character, nesting without end. None of
them gets in here, so what was read once can be handed on to a template, a client or a grammar as it is.

Elsewhere: files that nobody vouches for are read by `checkpoint/json_strict.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from argosy.errors import UsageError

_MOST_DEPTH = 64
_TOO_DEEP = f"is nested deeper than {_MOST_DEPTH}"
_LARGEST = 1 << 1024  # what a float can reach
# Objects, lists, keys and texts of one body: 4096 messages with their parts have a third of that.
MAX_PARTS = 1 << 17
# Items of lists and objects: a prompt of token ids is as long as the longest context.
MAX_ITEMS = (1 << 20) + MAX_PARTS
_COUNTED_AT_ONCE = 1 << 18  # bytes
_NO_BACKSLASH = re.compile(rb"[^\\]")


class Counts(NamedTuple):
    """Values of a JSON text: objects, lists, keys and texts; items of objects and lists, beyond the first of each."""

    num_parts: int
    num_items: int


def count_values(data: bytes) -> Counts:
    """How many values a JSON text has, in a few passes that make none of them.

    A reader that goes through it from the start has met no more than that, wherever the text stops being JSON. It is
    counted in parts, and no further than it is refused, because each pass keeps other threads waiting.

    Raises:
        ValueError: there are more than MAX_PARTS or MAX_ITEMS.
    """
    num_quotes = num_lists = num_items = start = 0
    while start < len(data):
        stop = start + _COUNTED_AT_ONCE
        if data[stop - 1 : stop] == b"\\":  # what it escapes comes with it
            following = _NO_BACKSLASH.search(data, stop)
            stop = len(data) if following is None else following.end()
        part = data[start:stop]
        if b"\\" in part:
            part = part.replace(b"\\\\", b"").replace(b'\\"', b"")
        is_inside = num_quotes % 2  # a text that began before
        num_quotes += part.count(b'"')
        _require_few(
            "objects, lists and texts", num_quotes // 2, MAX_PARTS
        )  # before there is a piece for each
        outside = b"".join(part.split(b'"')[is_inside::2])
        num_lists += outside.count(b"[") + outside.count(b"{")
        num_items += outside.count(b",")
        _require_few("objects, lists and texts", num_quotes // 2 + num_lists, MAX_PARTS)
        _require_few("values", num_items, MAX_ITEMS)
        start = stop
    return Counts(num_quotes // 2 + num_lists, num_items)


def _require_few(what: str, number: int, most: int) -> None:
    if number > most:
        raise ValueError(f"it has more than {most} {what}, and no more are read")


def read_json(text: str) -> object:
    """The value that `text` spells.

    Raises:
        ValueError: it is not JSON, gives a key twice, holds what `plain_json` refuses, or has too many values.
    """
    count_values(text.encode(errors="replace"))
    return parse_json(text)


def parse_json(text: str) -> object:
    """Returns the value of a text that `count_values` has passed. Raises what `read_json` raises."""
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
    except ValueError:  # Python reads no whole number of more than a few thousand digits
        raise ValueError("it holds a number that is too large") from None


def read_object(text: str) -> dict[str, object] | None:
    """The object that `text` spells, or None if it spells none."""
    try:
        value = read_json(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def write_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def plain_json(value: object, where: str) -> object:
    """`value` in dicts, lists, text, numbers, truths and None; nothing is shared with the caller's.

    Raises:
        UsageError: it holds something else, half a character, or a number no float can reach, or is nested deeper
            than 64; `where` says whose it is.
    """
    try:
        plain = _copy(value, where)
    except RecursionError:
        raise UsageError(f"{where} {_TOO_DEEP}") from None
    _require_exact(plain, where)
    return plain


def plain_text(text: str, where: str) -> str:
    """`text`, if it can be written down; errors as `plain_json`."""
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
    raise UsageError(f"{where} holds a {type(value).__name__}, which JSON has no word for")


def _require_exact(value: object, where: str) -> None:
    """That every reader reads this alike; Python's own types only. Level by level, which is ten times as fast."""
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
        raise UsageError("it gives a key twice")
    return found


def _no_constant(name: str) -> object:
    raise UsageError(f"it holds {name}, which is not JSON")
