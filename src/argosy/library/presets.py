"""Presets: models under names that the user chose, with their own system message, sampling and limits.

    model = "Qwen/Qwen3-30B-A3B"      # coder.toml in `presets`, in the user's data directory
    system = "Answer with code alone."
    temperature = 0.2
    context = 16384

Each preset is a small file whose keys are the long options of `argosy preset` without their dashes. Files are
checked as strictly as requests, and links are not followed.

Elsewhere: `names.py` resolves names; Ollama's format is `modelfile.py`; `config.Preset` fills in requests.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from argosy.checkpoint.untrusted_file import quote
from argosy.config import CHOOSING, EFFORTS, Preset
from argosy.directory import Directory
from argosy.errors import UsageError, did_you_mean
from argosy.library import kept
from argosy.user_directories import data_directory

MOST_BYTES = 256 << 10  # per file
MOST_PRESETS = 1000
ROLES = ("system", "user", "assistant")
_SUFFIX = ".toml"
_MOST_STOPS, _MOST_STOP_CHARACTERS = 64, 1024  # as in a request
_MOST_TOKENS = 1 << 20
_WHOLE = ("top_k", "context", "max_tokens", "seed")


def place() -> Path:
    return data_directory() / "presets"


def path_of(name: str) -> Path:
    return place() / (name + _SUFFIX)


def names() -> list[str]:
    """The names of all presets, including damaged ones.

    Raises:
        UsageError: the directory cannot be read, or there are more than MOST_PRESETS.
    """
    try:
        with Directory(place()) as directory:
            entries = directory.names()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UsageError(f"{place()} cannot be read: {error.strerror}") from error
    found = [
        name
        for entry in entries
        if entry.endswith(_SUFFIX) and kept.is_alias(name := entry.removesuffix(_SUFFIX))
    ]
    if len(found) > MOST_PRESETS:
        raise UsageError(f"{place()} has {len(found)} presets; at most {MOST_PRESETS} are read")
    return found


def find(name: str) -> Preset | None:
    """The preset of that name, or None.

    Raises:
        UsageError: its file cannot be read, or is damaged.
    """
    if not kept.is_alias(name):
        return None
    try:
        with Directory(place()) as directory:
            data = directory.read(name + _SUFFIX, MOST_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UsageError(f"{path_of(name)} cannot be read: {error.strerror}") from error
    try:
        return from_toml(data, name)
    except UsageError as error:
        raise UsageError(f"{path_of(name)}: {error.message}", hint=error.hint) from None


def find_all() -> tuple[list[Preset], list[str]]:
    """All presets by name, and a sentence for each that cannot be used."""
    found: list[Preset] = []
    faults: list[str] = []
    try:
        known = names()
    except UsageError as error:
        return [], [error.message]
    for name in known:
        try:
            preset = find(name)
        except UsageError as error:
            faults.append(error.message)
        else:
            found += [] if preset is None else [preset]
    return found, faults


def save(preset: Preset) -> None:
    """Write a preset; a running server uses it from its next request.

    Raises:
        UsageError: it is too large, or cannot be written.
    """
    data = to_toml(preset).encode(errors="surrogatepass")
    from_toml(data, preset.name)  # proves that the written file can be read
    with _changing() as directory:
        if preset.name not in (known := names()) and len(known) >= MOST_PRESETS:
            raise UsageError(f"there are already {MOST_PRESETS} presets, which is the limit")
        directory.put(preset.name + _SUFFIX, data)


def remove(name: str) -> None:
    """Forget a preset, even a damaged one.

    Raises:
        UsageError: there is no such preset, or it cannot be removed.
    """
    with _changing() as directory:
        if name not in names():
            raise UsageError(f"'{quote(name)}' is not a preset", hint="`argosy preset` lists them")
        directory.remove(name + _SUFFIX)


@contextmanager
def _changing() -> Iterator[Directory]:
    """Lock the directory for one process at a time."""
    try:
        with Directory(place(), make=True, mode=0o700) as directory, directory.locked(".lock"):
            yield directory
    except OSError as error:
        raise UsageError(f"{place()} cannot be written: {error.strerror}") from error


# ── the file ────────────────────────────────────────────────────────────────────────────────────────────────────────


def from_toml(data: bytes, name: str) -> Preset:
    """The preset in a file.

    Raises:
        UsageError: it is too large, is not TOML, or has a setting that is unknown or out of bounds.
    """
    import tomllib

    if len(data) > MOST_BYTES:
        raise UsageError(f"a preset of {len(data)} bytes is too large; at most {MOST_BYTES} are read")
    try:
        given = tomllib.loads(data.decode())
    except UnicodeDecodeError as error:
        raise UsageError(f"it is not UTF-8 text: byte {error.start} is invalid") from None
    except (ValueError, RecursionError) as error:  # ValueError: invalid, or a number has too many digits
        raise UsageError(f"it is not TOML: {error}") from None
    for key in given:
        require_known(key, _KEYS)
    if "model" not in given:
        raise UsageError("it names no model")
    fields = {_FIELDS[key]: _checked(key, value) for key, value in given.items()}
    return made(name, **fields)


def made(name: str, **fields: Any) -> Preset:
    """Make a preset from fields of checked types, which may include `CHOOSING`.

    Raises:
        UsageError: a value is out of bounds.
    """
    sampling = {one: fields.pop(one) for one in CHOOSING if one in fields}
    for one, bound in (("max_tokens", _MOST_TOKENS), ("context", _MOST_TOKENS << 6)):
        if fields.get(one) is not None and not 1 <= fields[one] <= bound:
            raise UsageError(f"{_key(one)} must be from 1 to {bound}, found {fields[one]}")
    if (effort := fields.get("effort")) not in (None, *EFFORTS):
        raise UsageError(f"effort must be {', '.join(EFFORTS)}, found '{quote(effort)}'")
    stops = fields.get("stop", ())
    if len(stops) > _MOST_STOPS or any(len(one) > _MOST_STOP_CHARACTERS for one in stops):
        raise UsageError(
            f"stop takes at most {_MOST_STOPS} texts of at most {_MOST_STOP_CHARACTERS} characters each"
        )
    return Preset(name=name, sampling=sampling, **fields)


def require_known(key: str, known: Sequence[str]) -> None:
    """Check the name of a setting.

    Raises:
        UsageError: it is unknown; the nearest known one is named.
    """
    if key not in known:
        said = did_you_mean(key, known) or f"known: {', '.join(known)}"
        raise UsageError(f"unknown setting '{quote(key)}'; {said}")


def _key(field: str) -> str:
    return {"thinks": "think", "messages": "message"}.get(field, field.replace("_", "-"))


_ORDER = (
    "model", "system", *CHOOSING, "context", "max_tokens", "seed", "stop", "thinks", "effort", "messages",
)  # fmt: skip
_FIELDS = {_key(field): field for field in _ORDER}
_KEYS = tuple(_FIELDS)


def _checked(key: str, value: object) -> Any:
    field = _FIELDS[key]
    match field:
        case "model" | "system" | "effort":
            wanted, fits = "text", isinstance(value, str)
        case "thinks":
            wanted, fits = "true or false", isinstance(value, bool)
        case "stop":
            wanted = "a list of texts"
            fits = isinstance(value, list) and all(isinstance(one, str) for one in value)
            value = tuple(value) if isinstance(value, list) else value
        case "messages":
            wanted = f"tables with a role ({', '.join(ROLES)}) and a content"
            fits = isinstance(value, list) and all(map(_is_message, value))
            value = tuple(value) if isinstance(value, list) else value
        case _ if field in _WHOLE:
            wanted, fits = "a whole number", type(value) is int
        case _:
            wanted, fits = "a number", type(value) in (int, float)
    if not fits:
        raise UsageError(f"{key} must be {wanted}")
    return value


def _is_message(value: object) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"role", "content"}
        and value["role"] in ROLES
        and isinstance(value["content"], str)
    )


def to_toml(preset: Preset) -> str:
    """The text of a preset's file."""
    lines = [f"{_key(field)} = {_written(value)}" for field, value in facts_of(preset).items()]
    for message in preset.messages:
        lines += ["", "[[message]]", *(f"{key} = {_written(message[key])}" for key in ("role", "content"))]
    return "\n".join([*lines, ""])


def facts_of(preset: Preset) -> dict[str, Any]:
    """A preset's settings by field name, without the messages."""
    every = {**{field: getattr(preset, field, None) for field in _ORDER}, **preset.sampling}
    return {field: every[field] for field in _ORDER if field != "messages" and every[field] not in (None, ())}


def _written(value: Any) -> str:
    match value:
        case str():  # JSON strings are TOML strings, except for this character
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        case bool():
            return str(value).lower()
        case tuple():
            return f"[{', '.join(map(_written, value))}]"
    return repr(value)


def summary(preset: Preset) -> str:
    """A preset's settings, in one line."""
    facts: Mapping[str, Any] = facts_of(preset)
    parts = [
        "a system message" if field == "system" else f"{_key(field)} {_written(value)}"
        for field, value in facts.items()
        if field != "model"
    ]
    if preset.messages:
        parts.append(f"{len(preset.messages)} messages")
    return ", ".join(parts)
