"""Read small JSON files that cannot be trusted.

    bytes  ->  parse_json  ->  plain dicts, lists, text, numbers, or one CheckpointError

JSON has corners where two readers disagree: a key given twice, `NaN`, a number of ten thousand digits,
unlimited nesting. Here each of them is an error that names the file, never a crash or a guess. Only regular
files of a bounded size are opened (a link to one is fine: hub caches are made of links).

Elsewhere: `safetensors.py`, `pack.py` and `model/families/` interpret the keys.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from argosy.errors import CheckpointError

# The safetensors format's own limit for a header; more than any real config needs.
JSON_LIMIT_BYTES = 100_000_000
_LONGEST_QUOTE = 120


def quote(value: object) -> str:
    """`value` as one short printable line; text from a file may contain anything."""
    text = value if isinstance(value, str) else repr(value)
    shown = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text[: _LONGEST_QUOTE + 1])
    return shown if len(text) <= _LONGEST_QUOTE else shown[:_LONGEST_QUOTE] + "..."


@contextmanager
def open_regular(path: Path) -> Iterator[tuple[int, int]]:
    """Open `path` for reading and yield (file descriptor, size in bytes).

    Raises:
        CheckpointError: it is missing, a link that leads nowhere, unreadable, or not a regular file.
    """
    try:
        # O_NONBLOCK: opening a named pipe must not block before fstat can refuse it.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        if path.is_symlink():
            target = quote(os.readlink(path))
            raise CheckpointError(
                f"{path.name} is a link to {target}, which does not exist", path=path
            ) from None
        raise CheckpointError(f"{path.name} is missing from {path.parent}", path=path) from None
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be opened: {error.strerror}", path=path) from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path.name} is not a regular file", path=path)
        yield descriptor, status.st_size
    finally:
        os.close(descriptor)


def read_at(descriptor: int, nbytes: int, offset: int, path: Path) -> bytes:
    """Read exactly `nbytes` bytes at `offset`, or raise a CheckpointError that says where the file ends."""
    parts: list[bytes] = []
    found = 0
    while found < nbytes:
        try:
            part = os.pread(descriptor, nbytes - found, offset + found)
        except OSError as error:
            raise CheckpointError(f"{path.name} cannot be read: {error.strerror}", path=path) from error
        if not part:
            raise CheckpointError(
                f"{path.name} ends at byte {offset + found}; expected {nbytes} bytes at {offset}",
                path=path,
            )
        parts.append(part)
        found += len(part)
    return b"".join(parts)


def parse_json(data: bytes, path: Path, what: str = "") -> object:
    """Parse `data` as UTF-8 JSON with unique keys and finite numbers.

    Args:
        data: the text.
        path: the file it came from, named in errors.
        what: the part of that file, for example "header"; empty for the whole file.

    Raises:
        CheckpointError: `data` is anything else.
    """
    subject = f"{path.name}: the {what}" if what else path.name

    def pairs_to_dict(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found: dict[str, object] = {}
        for key, value in pairs:
            if key in found:
                raise CheckpointError(f"{subject} gives the key '{quote(key)}' twice", path=path, key=key)
            found[key] = value
        return found

    def refuse_constant(name: str) -> object:
        raise CheckpointError(f"{subject} holds {name}, which is not JSON", path=path)

    def parse_finite(text: str) -> float:
        number = float(text)
        if number in (float("inf"), float("-inf")):
            raise CheckpointError(f"{subject} holds the number {quote(text)}, which is too large", path=path)
        return number

    try:
        return json.loads(
            data.decode("utf-8"),
            object_pairs_hook=pairs_to_dict,
            parse_constant=refuse_constant,
            parse_float=parse_finite,
        )
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{subject} is not UTF-8 text: byte {error.start} is wrong", path=path
        ) from error
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"{subject} is not JSON: {error.msg} at character {error.pos}", path=path
        ) from error
    except RecursionError as error:
        raise CheckpointError(f"{subject} is nested too deeply", path=path) from error
    except ValueError as error:  # Python refuses to parse an integer with more than a few thousand digits
        raise CheckpointError(f"{subject} holds a number with too many digits", path=path) from error


def parse_object(data: bytes, path: Path, what: str = "") -> dict[str, object]:
    """`parse_json` for a file whose outermost value must be an object."""
    value = parse_json(data, path, what)
    if not isinstance(value, dict):
        subject = f"{path.name}: the {what}" if what else path.name
        raise CheckpointError(f"{subject} is {kind_of(value)}, expected an object", path=path)
    return value


def read_object(path: Path) -> dict[str, object]:
    """The object in a small JSON file, such as `config.json`."""
    with open_regular(path) as (descriptor, size):
        if size > JSON_LIMIT_BYTES:
            raise CheckpointError(
                f"{path.name} is {size} bytes long; at most {JSON_LIMIT_BYTES} are read", path=path
            )
        return parse_object(read_at(descriptor, size, 0, path), path)


def kind_of(value: object) -> str:
    """The JSON type of `value`, with its article."""
    kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list"}
    return "null" if value is None else kinds.get(type(value), "an object")
