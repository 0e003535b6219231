"""Read texts by domain: one domain per file, or labelled JSON lines. Sizes are bounded before reading.

maths.txt                    ->  {"maths": ["..."]}
{"domain": ..., "text": ...} ->  the texts of each domain, in order
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from argosy.directory import read_named
from argosy.errors import UsageError
from argosy.strict_json import JsonError, parse_json

MOST_DOMAINS = 64
MOST_NAME = 64  # characters
MOST_JSONL_BYTES = 64 << 20
MOST_LINE_BYTES = 4 << 20
_HINT = (
    'one domain per file, or lines such as {"domain": "maths", "text": "2 + 2 = 4"} in a file named .jsonl'
)


def read_texts(paths: Sequence[Path], *, most_bytes: int) -> dict[str, list[str]]:
    """The texts of each domain, in order of appearance.

    Args:
        most_bytes: how much to read of each plain file, from its beginning, and to keep of each domain.

    Raises:
        UsageError: a file cannot be read, is not text, is too large, or contains a malformed line.
    """
    domains: dict[str, list[str]] = {}
    kept: dict[str, int] = {}
    for path in paths:
        found = (
            _labelled(path) if path.suffix == ".jsonl" else [(_name_of(path), _beginning(path, most_bytes))]
        )
        for domain, text in found:
            if domain not in domains:
                if len(domains) == MOST_DOMAINS:
                    raise UsageError(
                        f"there are more than {MOST_DOMAINS} domains, the most that can be compared"
                    )
                domains[domain], kept[domain] = [], 0
            elif path.suffix != ".jsonl":
                raise UsageError(
                    f"two files are named '{domain}'", hint="a file's name is its domain: rename one"
                )
            if text and kept[domain] < most_bytes:
                domains[domain].append(text)
                kept[domain] += len(text)
    for domain, texts in domains.items():
        if not texts:
            raise UsageError(f"the domain '{domain}' has no text", hint=_HINT)
    return domains


def _name_of(path: Path) -> str:
    name = path.stem
    if not name.isprintable() or len(name) > MOST_NAME:
        raise UsageError(
            f"the name of {path} is its domain, and has more than {MOST_NAME} or unprintable characters"
        )
    return name


def _beginning(path: Path, most_bytes: int) -> str:
    data = _read(path, most_bytes)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        if len(data) == most_bytes and error.start >= len(data) - 3:  # the limit cut a character
            return data[: error.start].decode("utf-8")
        raise UsageError(f"{path} is not UTF-8 text: byte {error.start} is wrong") from None


def _read(path: Path, most_bytes: int) -> bytes:
    try:
        return read_named(path, most_bytes)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error


def _labelled(path: Path) -> list[tuple[str, str]]:
    data = _read(path, MOST_JSONL_BYTES + 1)
    if len(data) > MOST_JSONL_BYTES:
        raise UsageError(
            f"{path} has more than {MOST_JSONL_BYTES >> 20} MiB",
            hint=f"`head -n 10000 {path.name}` is smaller",
        )
    found = []
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            if len(line) > MOST_LINE_BYTES:
                raise JsonError(f"has {len(line)} bytes; at most {MOST_LINE_BYTES} are read")
            value = parse_json(line)
            if not isinstance(value, dict) or value.keys() != {"domain", "text"}:
                raise JsonError("is not an object with `domain` and `text`, and nothing else")
            domain, text = value["domain"], value["text"]
            if not isinstance(domain, str) or not 1 <= len(domain) <= MOST_NAME or not domain.isprintable():
                raise JsonError(f"has no `domain` of 1 to {MOST_NAME} printable characters")
            if not isinstance(text, str):
                raise JsonError("has a `text` that is not text")
        except JsonError as error:
            raise UsageError(f"{path}, line {number}: {error}", hint=_HINT) from None
        found.append((domain, text))
    return found
