"""Change some settings in another program's file, and keep everything else.

    text, or None  ->  merge_json | merge_toml | merge_yaml_list | merge_environment  ->  text  ->  edit_file

A file that cannot be parsed with certainty is refused, not rewritten by guess: comments in a format without comments, a
duplicate key, YAML beyond plain blocks. The old file is kept beside the new one, which replaces it atomically.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import tempfile
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from argosy.errors import UsageError

_LONGEST_BYTES = 4_000_000

Change = Callable[[str | None], str]


class _Unreadable(Exception):
    """Why a text is left unchanged; `edit_file` adds the name of the file."""


def edit_file(path: Path, change: Change) -> tuple[bool, Path | None]:
    """Replace the file by `change` of its text, or of None if there is no file.

    Only the owner can read a new file or a backup, because these files may contain keys. A link stays a link.

    Returns:
        Whether the file was changed, and the path of the backup.

    Raises:
        UsageError: the file cannot be read, parsed with certainty, or written.
    """
    target = path.resolve()
    try:
        old = _read(target)
        new = change(None if old is None else old.decode("utf-8")).encode("utf-8")
        if new == old:
            return False, None
        target.parent.mkdir(parents=True, exist_ok=True)
        backup = None if old is None else _keep(target, old)
        _replace(target, old, new)
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
    number = 1
    while True:
        backup = path.with_name(f"{path.name}.before-argosy-{number}")
        try:
            descriptor = os.open(backup, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            number += 1
            continue
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return backup


def _replace(path: Path, old: bytes | None, new: bytes) -> None:
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(new)
            file.flush()
            os.fsync(file.fileno())
        if old is not None:
            os.chmod(name, path.stat().st_mode & 0o7777)
        if _read(path) != old:
            raise _Unreadable("another program has just changed it")
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


# JSON


def merge_json(text: str | None, addition: Mapping[str, Any]) -> str:
    """Merge `addition` into the JSON object in `text`: objects are merged, other values replaced."""
    if text is None or not text.strip():
        return as_json(addition)
    try:
        found = json.loads(
            text, object_pairs_hook=_without_doubles, parse_constant=_no_json, parse_float=_finite
        )
    except (ValueError, RecursionError) as error:
        raise _Unreadable(f"it is not plain JSON ({error})") from error
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


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("a key appears twice")
    return result


def _no_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text} is too large")
    return value


# TOML


def merge_toml(
    text: str | None, root: Mapping[str, Any], table: tuple[str, str], values: Mapping[str, Any]
) -> str:
    """Set `root` among the keys before the first table, and `values` in [table]; keep all other lines.

    No TOML writer that keeps comments is available, so lines are replaced and the result is parsed. It must equal the
    old text except for the changed settings.
    """
    name = ".".join(table)
    lines = (text or "").splitlines()
    found = _parsed_toml(text or "")
    first_table = next((at for at, line in enumerate(lines) if re.match(r"\s*\[", line)), len(lines))
    ours = re.compile(rf"\s*({'|'.join(map(re.escape, root))})\s*=")
    head = [line for line in lines[:first_table] if not ours.match(line)]
    tail = _without_table(lines[first_table:], name)
    blocks = [_stripped(head), as_toml(root), _stripped(tail), [f"[{name}]", *as_toml(values)]]
    new = "\n\n".join("\n".join(block) for block in blocks if block) + "\n"
    outer, inner = table
    others = found.get(outer, {})
    kept = {key: value for key, value in others.get(inner, {}).items() if isinstance(value, dict)}
    expected = {**found, **root, outer: {**others, inner: {**values, **kept}}}
    if _parsed_toml(new) != expected:
        raise _Unreadable("it is written in a way that cannot be changed line by line")
    return new


def as_toml(values: Mapping[str, Any]) -> list[str]:
    """Lines `key = value`; JSON strings, numbers and booleans are valid TOML."""
    return [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]


def _parsed_toml(text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise _Unreadable(f"it is not TOML ({error})") from error


def _without_table(lines: Sequence[str], name: str) -> list[str]:
    kept = []
    is_ours = False
    for line in lines:
        if re.match(r"\s*\[", line):
            is_ours = re.match(rf"\s*\[\s*{re.escape(name)}\s*\]", line) is not None
        if not is_ours:
            kept.append(line)
    return kept


def _stripped(lines: Sequence[str]) -> list[str]:
    return "\n".join(lines).strip("\n").splitlines()


# YAML

_BEGIN, _END = "# argosy: begin", "# argosy: end"


def merge_yaml_list(text: str | None, start: str, key: str, item: Sequence[str]) -> str:
    """Insert `item`, the lines of one entry, first in the list `key`, between two marker comments.

    A new file begins with `start`. Only plain blocks are changed: keys at the margin, and below `key` a list with one
    entry per dash.
    """
    if text is None or not text.strip():
        return f"{start}{key}:\n" + _marked(item, "  ")
    lines = text.splitlines()
    for line in lines:
        if (
            not re.match(r"\s|#|- |-$|[A-Za-z_][\w-]*:(\s|$)|$", line)
            or "\t" in line[: len(line) - len(line.lstrip())]
        ):
            raise _Unreadable(f"the line '{line[:60]}' is YAML that cannot be changed line by line")
    begins, ends = ([at for at, line in enumerate(lines) if line.strip() == mark] for mark in (_BEGIN, _END))
    if begins or ends:
        if len(begins) != 1 or len(ends) != 1 or begins > ends:
            raise _Unreadable(f"its markers '{_BEGIN}' and '{_END}' are not a pair")
        before, after = lines[: begins[0]], lines[ends[0] + 1 :]
        margin = _margin(lines[begins[0]])
    else:
        keys = [at for at, line in enumerate(lines) if re.match(rf"{key}:", line)]
        if not keys:
            return "\n".join([*lines, f"{key}:"]) + "\n" + _marked(item, "  ")
        if len(keys) > 1 or not re.match(rf"{key}:\s*(#.*)?$", lines[keys[0]]):
            raise _Unreadable(f"its {key} are written in a way that cannot be changed line by line")
        before, after = lines[: keys[0] + 1], lines[keys[0] + 1 :]
        first = next((line for line in after if line.strip() and not line.lstrip().startswith("#")), "")
        margin = _margin(first) if first.lstrip().startswith("-") else "  "
        if first.startswith(" ") and not first.lstrip().startswith("-"):
            raise _Unreadable(f"its {key} are not a list")
    return "\n".join(before) + "\n" + _marked(item, margin) + "".join(f"{line}\n" for line in after)


def _marked(item: Sequence[str], margin: str) -> str:
    return "".join(f"{margin}{line}\n" for line in (_BEGIN, *item, _END))


def _margin(line: str) -> str:
    return line[: len(line) - len(line.lstrip())]


# Environment


def merge_environment(text: str | None, values: Mapping[str, str]) -> str:
    """Set NAME=value lines: each of `values` in its old place, or at the end."""
    lines = (text or "").splitlines()
    missing = dict(values)
    for at, line in enumerate(lines):
        assignment = re.match(r"\s*(?:export\s+)?([A-Za-z_]\w*)=", line)
        if assignment and assignment[1] in values:
            lines[at] = f"{assignment[1]}={values[assignment[1]]}"
            missing.pop(assignment[1], None)
        elif not assignment and line.strip() and not line.lstrip().startswith("#"):
            raise _Unreadable(f"the line '{line[:60]}' is not an assignment")
    return "".join(f"{line}\n" for line in [*lines, *(f"{name}={value}" for name, value in missing.items())])
