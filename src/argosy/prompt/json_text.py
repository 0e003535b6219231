"""JSON that callers and models write, read strictly and written one way.

    text  ->  read_json   ->  plain values, or a ValueError that says why not
    value ->  plain_json  ->  the same as plain values, or a UsageError that names the place
    value ->  write_json  ->  text

JSON has corners where two readers disagree: a key given twice, `NaN`, half a character, nesting without end. None of
them gets in here, so what was read once can be handed on to a template, a client or a grammar as it is.

Elsewhere: files that nobody vouches for are read by `checkpoint/json_strict.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

from argosy.errors import UsageError

_MOST_DEPTH = 64
_TOO_DEEP = f"it is nested deeper than {_MOST_DEPTH}"
_MOST_BITS = 1024  # of a whole number: what a float can reach
_LARGEST = 1 << _MOST_BITS


def read_json(text: str) -> object:
    """The value that `text` spells.

    Raises:
        ValueError: it is not JSON, gives a key twice, or holds what `plain_json` refuses.
    """
    try:
        value: object = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
        _require_plain(value)
        return value
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
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


def plain_json(value: object, where: str, *, depth: int = 0) -> object:
    """`value` in dicts, lists, text, numbers, truths and None; nothing is shared with the caller's.

    Raises:
        UsageError: it holds something else, half a character, or a number no float can reach, or is nested deeper
            than 64; `where` says whose it is.
    """
    if depth > _MOST_DEPTH:
        raise UsageError(f"{where} is nested deeper than {_MOST_DEPTH}")
    match value:
        case None | bool():
            return value
        case str():
            return plain_text(value, where)
        case int() if value.bit_length() <= _MOST_BITS:
            return int(value)
        case float() if math.isfinite(value):
            return float(value)
        case int() | float():
            raise UsageError(f"{where} holds a number that is too large")
        case Mapping():
            plain = {}
            for key, item in value.items():
                if not isinstance(key, str):
                    raise UsageError(f"{where} has the key {key!r}, expected text")
                plain[plain_text(key, where)] = plain_json(item, where, depth=depth + 1)
            return plain
        case Sequence() if not isinstance(value, bytes | bytearray):
            return [plain_json(item, where, depth=depth + 1) for item in value]
    raise UsageError(f"{where} holds a {type(value).__name__}, which JSON has no word for")


def plain_text(text: str, where: str) -> str:
    """`text`, if it can be written down; errors as `plain_json`."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{where} holds half a character (a lone surrogate)") from None
    return str(text)


def _require_plain(value: object) -> None:
    """What `plain_json` refuses in fresh values of `json.loads`; level by level, which is ten times as fast."""
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
                    plain_text(item, "it")
            elif (kind is int or kind is float) and not -_LARGEST < item < _LARGEST:  # type: ignore[operator]
                raise UsageError("it holds a number that is too large")
        if not following:
            return
        level = following
    raise UsageError(_TOO_DEEP)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise UsageError("it gives a key twice")
    return found


def _no_constant(name: str) -> object:
    raise UsageError(f"it holds {name}, which is not JSON")
