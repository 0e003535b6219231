"""Change settings in another program's file and keep everything else.

    text, or None  ->  merge_json | merge_toml | merge_yaml... | merge_environment  ->  text  ->  edit_file

Comments, order and unknown settings stay. A change is refused if its result, parsed again, differs from the old
settings in anything else, and JSON with comments is refused because they would be lost. A backup of the old file is
kept next to it.

Elsewhere: `directory.py` replaces the file atomically.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from argosy.directory import Directory, replacing
from argosy.errors import UsageError
from argosy.strict_json import JsonError, parse_json

_LONGEST_BYTES = 4_000_000

Change = Callable[[str | None], str]


class _Unreadable(Exception):
    """Why a text is left unchanged; `edit_file` adds the file's name."""


def edit_file(path: Path, change: Change) -> tuple[bool, Path | None]:
    """Replace a file's text by `change` of it, or of None if there is no file.

    Only the owner can read a new file or a backup, because it may contain keys. A link stays a link.

    Returns:
        Whether the file was changed, and the path of the backup.

    Raises:
        UsageError: the file cannot be read, reliably parsed, or written.
    """
    target = path.resolve()
    try:
        old = _read(target)
        new = change(None if old is None else old.decode("utf-8")).encode("utf-8")
        if new == old:
            return False, None
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as write:
            backup = None if old is None else _keep(target, old)
            if _read(target) != old:
                raise _Unreadable("another program has just changed it")
            write(new)
    except (_Unreadable, UnicodeDecodeError) as error:
        why = error if isinstance(error, _Unreadable) else "it is not UTF-8 text"
        raise UsageError(
            f"{path} is left unchanged: {why}",
            hint="leave out --write to print the settings, and add them by hand",
        ) from error
    except OSError as error:
        raise UsageError(f"{path} cannot be changed: {error.strerror}") from error
    return True, backup


def _read(path: Path) -> bytes | None:
    if not path.exists():
        return None
    if not path.is_file():
        raise _Unreadable("it is not a regular file")
    with path.open("rb") as file:
        data = file.read(_LONGEST_BYTES + 1)
    if len(data) > _LONGEST_BYTES:
        raise _Unreadable("it is too large for a settings file")
    return data


def _keep(path: Path, data: bytes) -> Path:
    numbered = (path.with_name(f"{path.name}.before-argosy-{number}") for number in itertools.count(1))
    backup = next(path for path in numbered if not path.exists())
    with Directory(path.parent) as parent:
        parent.put(backup.name, data)
    return backup


@contextlib.contextmanager
def _changing() -> Iterator[None]:
    """Refuse the file on any failure, because the parsers can read some texts that they cannot change."""
    try:
        yield
    except Exception as error:
        raise _Unreadable("it is written in a way that cannot be changed") from error


def _require_equal(found: object, expected: object) -> None:
    if found != expected:
        raise ValueError("something else changed")


# JSON


def merge_json(text: str | None, addition: Mapping[str, Any]) -> str:
    """Merge `addition` into the JSON object in `text`: objects are merged, other values replaced."""
    if text is None or not text.strip():
        return as_json(addition)
    try:
        found = parse_json(text)
    except JsonError as error:
        raise _Unreadable(str(error)) from error
    if not isinstance(found, dict):
        raise _Unreadable("it is not a JSON object")
    indent = re.search(r"\n([ \t]+)\"", text)
    return as_json(_merged(found, addition, ""), indent[1] if indent else "  ")


def as_json(values: Mapping[str, Any], indent: str = "  ") -> str:
    return json.dumps(values, indent=indent, ensure_ascii=False) + "\n"


def _merged(found: dict[str, Any], addition: Mapping[str, Any], path: str) -> dict[str, Any]:
    result = dict(found)
    for key, value in addition.items():
        if isinstance(value, Mapping):
            inner = found.get(key, {})
            if not isinstance(inner, dict):
                raise _Unreadable(f"its {path}{key} is not an object")
            result[key] = _merged(inner, value, f"{path}{key}.")
        else:
            result[key] = value
    return result


# TOML


def merge_toml(
    text: str | None, root: Mapping[str, Any], table: tuple[str, str], values: Mapping[str, Any]
) -> str:
    """Set `root` at the top level, and make `values` the only settings of [table]; its subtables stay."""
    import tomlkit

    found, (outer, inner) = _parsed_toml(text := text or ""), table
    others = found.get(outer, {})
    ours = others.get(inner, {}) if isinstance(others, dict) else None
    if not isinstance(ours, dict):
        raise _Unreadable(f"its {outer} or its {outer}.{inner} is not a table")
    kept = {key: value for key, value in ours.items() if isinstance(value, dict) and key not in values}
    expected = {**found, **root, outer: {**others, inner: {**values, **kept}}}
    if found == expected:
        return text
    # New text goes before and after the old text, because inside it a comment could end up above another setting.
    before = as_toml({key: value for key, value in root.items() if key not in found})
    after = [] if inner in others else [f"[{outer}.{inner}]", *as_toml(values)]
    with _changing():
        document = tomlkit.parse(text)
        _require_equal(document.as_string(), text)  # fails if a table is split into several places
        document.update({key: value for key, value in root.items() if key in found})
        if inner in others:
            settings: Any = document[outer][inner]
            for key in ours.keys() - kept.keys() - values.keys():
                del settings[key]
            settings.update(values)
        blocks = ("\n".join(before), document.as_string(), "\n".join(after))
        made = "\n".join(block if block.endswith("\n") else f"{block}\n" for block in blocks if block)
        _require_equal(_parsed_toml(made), expected)
    return made


def as_toml(values: Mapping[str, Any]) -> list[str]:
    """Write `key = value` lines; JSON strings, numbers and booleans are valid TOML."""
    return [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]


def _parsed_toml(text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: invalid, or a number has too many digits
        raise _Unreadable(f"it is not TOML ({error})") from error


# YAML


def merge_yaml_list(
    text: str | None, start: str, key: str, item: Sequence[str], is_ours: Callable[[object], bool]
) -> str:
    """Put `item`, the lines of one entry, in place of the entry that `is_ours`, or first in the list `key`.

    A new file begins with `start`. The parser is only used to find lines: its writer would move a comment above an
    entry.
    """
    found, node = _parsed_yaml(text := text or "")
    if found is None:  # no more than comments
        found, node = _parsed_yaml(text := f"{text.rstrip()}\n\n{start}".lstrip("\n"))
    if isinstance(found, dict) and key not in found:
        found, node = _parsed_yaml(text := f"{text.rstrip()}\n{key}:\n")
    entries = (found[key] or []) if isinstance(found, dict) else None
    if not isinstance(entries, list):
        raise _Unreadable(f"its {key} are not a list")
    at = next((at for at, entry in enumerate(entries) if is_ours(entry)), None)
    with _changing():
        name, node = next((name, node) for name, node in node.value if name.value == key)
        first = stop = name.end_mark.line + 1
        if at is not None:
            first, stop = node.value[at].start_mark.line, _line_after(node.value[at])
        margin = " " * node.start_mark.column if entries else "  "
        made = _with_lines(text, first, stop, item, margin)
        entries[at or 0 : 0 if at is None else at + 1] = _parsed_yaml("\n".join(item))[0]
        _require_equal(_parsed_yaml(made)[0], {**found, key: entries})
    return made


def merge_yaml_items(text: str | None, item: Sequence[str], is_ours: Callable[[object], bool]) -> str:
    """Put `item`, the lines of one entry, in place of the entry that `is_ours`, or last, in a file that is a list.

    Not first, because a comment at the start of the file may be about the file or about its first entry.
    """
    found, node = _parsed_yaml(text := text or "")
    entries = [] if found is None else found  # None: no more than comments
    if not isinstance(entries, list):
        raise _Unreadable("it is not a list")
    at = next((at for at, entry in enumerate(entries) if is_ours(entry)), len(entries))
    with _changing():
        if at < len(entries):
            first, stop = node.value[at].start_mark.line, _line_after(node.value[at])
        else:
            text = text.rstrip()
            first = stop = len(text.splitlines())
        margin = " " * node.start_mark.column if entries else ""
        made = _with_lines(text, first, stop, item, margin)
        entries[at : at + 1] = _parsed_yaml("\n".join(item))[0]
        _require_equal(_parsed_yaml(made)[0], entries)
    return made


def _with_lines(text: str, first: int, stop: int, new: Sequence[str], margin: str) -> str:
    """The text with the lines from `first` up to `stop` replaced by `new`, indented by `margin`."""
    lines = text.splitlines()
    return "\n".join([*lines[:first], *(margin + line for line in new), *lines[stop:], ""])


def _parsed_yaml(text: str) -> tuple[Any, Any]:
    """The value, and its nodes with their places in the text."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        return YAML(typ="safe", pure=True).load(text), YAML(pure=True).compose(text)
    except (YAMLError, RecursionError, ValueError) as error:
        raise _Unreadable(f"it is not plain YAML ({getattr(error, 'problem', None) or error})") from error


def _line_after(node: Any) -> Any:
    """The line after a node. A block's recorded end is the start of the next node, which is after comments."""
    while isinstance(node.value, list) and node.value and not node.flow_style:
        last = node.value[-1]
        node = last[1] if isinstance(last, tuple) else last
    return node.end_mark.line + (node.end_mark.column > 0)


# Environment


def merge_environment(text: str | None, values: Mapping[str, str]) -> str:
    """Set NAME=value lines, each in its old place or at the end."""
    from dotenv.parser import parse_stream

    parts = []
    missing = dict(values)
    for found in parse_stream(io.StringIO(text or "", newline="")):
        part = found.original.string
        if found.error:
            raise _Unreadable(f"the line '{part.strip()[:60]}' is not an assignment")
        if found.key is not None and found.key in values:
            space = part[: len(part) - len(part.lstrip())]
            part = f"{space}{found.key}={values[found.key]}\n"
            missing.pop(found.key, None)
        parts.append(part if part.endswith("\n") else f"{part}\n")
    return "".join([*parts, *(f"{name}={value}\n" for name, value in missing.items())])
