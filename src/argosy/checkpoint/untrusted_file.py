"""Read files that cannot be trusted, small JSON files above all.

    path   ->  read_object            ->  a plain dict, or one CheckpointError that names the file
    bytes  ->  parse_object           ->  the same, for JSON that is part of a file
    path   ->  open_regular, read_at  ->  bytes of a regular file of the stated length

Only regular files of bounded size are opened, directly or through a link: hub caches consist of links.

Elsewhere: `strict_json.py` decides which JSON is accepted; `safetensors.py`, `pack.py` and `model/families/` interpret
the keys.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from argosy.errors import CheckpointError
from argosy.strict_json import JsonError, parse_json

# The safetensors format's own limit for a header; more than any real config needs.
JSON_LIMIT_BYTES = 100_000_000
_LONGEST_QUOTE = 120


def quote(value: object) -> str:
    """Format `value` as one short printable line; text from a file may contain anything."""
    text = value if isinstance(value, str) else repr(value)
    shown = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text[: _LONGEST_QUOTE + 1])
    return shown if len(text) <= _LONGEST_QUOTE else shown[:_LONGEST_QUOTE] + "..."


@contextmanager
def open_regular(path: Path) -> Iterator[tuple[int, int]]:
    """Open `path` for reading and yield (file descriptor, size in bytes).

    Raises:
        CheckpointError: the file is missing, a dangling link, unreadable, or not a regular file.
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


def parse_object(
    data: bytes, path: Path, what: str = "", *, spells_constants: bool = False
) -> dict[str, object]:
    """Parse the JSON object in `data`.

    Args:
        data: the text, in UTF-8.
        path: the file that contained it, named in errors.
        what: the part of that file, for example "header"; empty for the whole file.
        spells_constants: as for `parse_json`.

    Raises:
        CheckpointError: `data` is anything else, or JSON that readers could interpret differently.
    """
    subject = f"{path.name}: the {what}" if what else path.name
    try:
        value = parse_json(data, spells_constants=spells_constants)
    except JsonError as error:
        fault = error.fault if error.key is None else f"gives the key '{quote(error.key)}' twice"
        raise CheckpointError(f"{subject} {fault}", path=path, key=error.key) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{subject} is {kind_of(value)}, expected an object", path=path)
    return value


def read_object(path: Path, *, spells_constants: bool = False) -> dict[str, object]:
    """Read the object in a small JSON file, such as `config.json`; `spells_constants` as for `parse_json`."""
    return parse_object(read_text(path), path, spells_constants=spells_constants)


def read_text(path: Path) -> bytes:
    """Read a small JSON file without parsing it."""
    with open_regular(path) as (descriptor, size):
        if size > JSON_LIMIT_BYTES:
            raise CheckpointError(
                f"{path.name} is {size} bytes long; at most {JSON_LIMIT_BYTES} are read", path=path
            )
        return read_at(descriptor, size, 0, path)


def kind_of(value: object) -> str:
    """Return the JSON type of `value`, with its article."""
    kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list"}
    return "null" if value is None else kinds.get(type(value), "an object")
