"""Read JSON that cannot be trusted: from callers, models, files and other programs.

    bytes or text  ->  parse_json  ->  plain dicts, lists, text and numbers, or one JsonError

Two readers may disagree about some JSON: a key given twice, `NaN`, a number beyond all floats, half a character,
endless nesting. None of it is accepted here, so a value that was read once can be passed to a template, a client, a
grammar or another program as it is.

Elsewhere: `prompt/json_text.py` bounds how many values a caller's text may have; `checkpoint/untrusted_file.py` bounds
the files of a checkpoint and names them in errors.
"""

from __future__ import annotations

import json

_MOST_DEPTH = 64
TOO_DEEP = f"is nested deeper than {_MOST_DEPTH} levels"
_TOO_LARGE = "holds a number that is too large"
_LARGEST = (1 << 1024) - (1 << 970)  # the smallest whole number that no float can hold, even rounded


class JsonError(ValueError):
    """Why a text or a value is refused; `str()` is a sentence about "it".

    Attributes:
        fault: the sentence without its subject, such as "has a duplicate key".
        key: the duplicate key, if that is the reason. It is content, so it is not part of the sentence.
        syntax: the error of Python's parser, if the text is not JSON at all.
    """

    def __init__(
        self, fault: str, *, key: str | None = None, syntax: json.JSONDecodeError | None = None
    ) -> None:
        super().__init__(f"it {fault}")
        self.fault = fault
        self.key = key
        self.syntax = syntax


def parse_json(data: bytes | str, *, spells_constants: bool = False) -> object:
    """Parse one JSON value.

    Args:
        data: the text, or its bytes in UTF-8.
        spells_constants: `Infinity` and `NaN`, which Python writes, become {"__float__": "Infinity"}, as transformers 5
            writes them, instead of an error.

    Raises:
        JsonError: it is not JSON, has a duplicate key, or holds a value that `check_json` refuses.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        constant = _spelled if spells_constants else _no_constant
        value: object = json.loads(text, object_pairs_hook=_unique, parse_constant=constant)
    except UnicodeDecodeError as error:
        raise JsonError(f"is not UTF-8 text: byte {error.start} is wrong") from None
    except json.JSONDecodeError as error:
        raise JsonError(f"is not JSON: {error.msg} at character {error.pos}", syntax=error) from None
    except JsonError:
        raise
    except RecursionError:
        raise JsonError(TOO_DEEP) from None
    except ValueError:  # Python refuses whole numbers of more than a few thousand digits
        raise JsonError(_TOO_LARGE) from None
    check_json(value)
    return value


def check_json(value: object) -> None:
    """Check that every reader reads a value of plain dicts, lists, strings and numbers alike.

    Raises:
        JsonError: it contains half a character or a number beyond the range of floats, or is nested deeper than 64
            levels.
    """
    # Level by level, which is ten times as fast as recursion.
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
                    _require_whole(item)
            elif (kind is int or kind is float) and not -_LARGEST < item < _LARGEST:  # type: ignore[operator]
                raise JsonError(_TOO_LARGE)
        if not following:
            return
        level = following
    raise JsonError(TOO_DEEP)


def _require_whole(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise JsonError("holds half a character (a lone surrogate)") from None


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in pairs:
        if key in found:
            raise JsonError("has a duplicate key", key=key)
        found[key] = value
    return found


def _no_constant(name: str) -> object:
    raise JsonError(f"holds {name}, which is not JSON")


def _spelled(name: str) -> object:
    return {"__float__": name}
