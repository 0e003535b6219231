"""Argosy's own records of models: aliases, when each was last used, and which were pulled.

One small file in the user's data directory, readable only by its owner. One process at a time changes it, and a
crash leaves either the old file or the new one.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from argosy.config import DEMO
from argosy.directory import Directory
from argosy.errors import UsageError
from argosy.strict_json import JsonError, parse_json
from argosy.user_directories import data_directory

MAIN = "main"  # the branch that a repository's name means
_MOST_BYTES = 8 << 20
_MOST_USED = 1000  # models whose last use is remembered
_VERSION = 1
_LATEST = 1 << 37  # the latest time that can be shown as a date
_ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")
_MOST_CHARACTERS = 128  # per revision
_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


@dataclass(frozen=True, slots=True)
class Pulled:
    """A model that Argosy has fetched, or begun to fetch.

    revision: the commit.
    blobs: digests of its files, which are their names in the hub's cache.
    asked: the branch, tag or commit requested; "": the main branch.
    licence: as stated on the hub's card at the time; "": not stated.
    accepted_at: when the user agreed to that licence, in seconds since 1970; 0: the user was not asked.
    """

    repository: str
    revision: str
    nbytes: int
    blobs: tuple[str, ...]
    asked: str = ""
    licence: str = ""
    accepted_at: int = 0


@dataclass(frozen=True, slots=True)
class Kept:
    """The file's contents: names by alias, seconds since 1970 by a model's name, and pulled models by name."""

    aliases: dict[str, str] = field(default_factory=dict)
    used: dict[str, int] = field(default_factory=dict)
    pulled: dict[str, Pulled] = field(default_factory=dict)


def is_revision(text: str) -> bool:
    """Whether a text can be a branch, a tag or a commit, and also a path below `refs` in the hub's cache."""
    return len(text) <= _MOST_CHARACTERS and _REVISION.fullmatch(text) is not None


def is_alias(text: str) -> bool:
    """Whether a text can be an alias or a preset's name, and also a file name."""
    return _ALIAS.fullmatch(text) is not None and text != DEMO


def path() -> Path:
    return data_directory() / "library.json"


def read() -> Kept:
    """Read the records.

    Raises:
        UsageError: the file cannot be read, or is damaged.
    """
    place = path()
    try:
        with Directory(place.parent) as directory:
            return _parse(directory.read(place.name, _MOST_BYTES), place)
    except FileNotFoundError:
        return Kept()
    except OSError as error:
        raise UsageError(f"{place} cannot be read: {error.strerror}") from error


@contextmanager
def changing() -> Iterator[Kept]:
    """Change the records, which are written at the end of the context unless it raises.

    Raises:
        UsageError: the file is damaged, or cannot be written, or a name is not UTF-8 text.
    """
    place = path()
    try:
        with (
            Directory(place.parent, make=True, mode=0o700) as directory,
            directory.replacing(place.name) as write,
        ):
            kept = read()
            before = _to_json(kept)
            yield kept
            if (after := _to_json(kept)) != before:
                write(after)
    except OSError as error:
        raise UsageError(f"{place} cannot be written: {error.strerror}") from error
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{place} cannot keep a name that is not UTF-8 text", hint="rename that file or directory"
        ) from error


def note_use(name: str) -> None:
    """Record that a model is used now; a failure to write is ignored."""
    with suppress(UsageError), changing() as kept:
        kept.used[name] = int(time.time())
        for old in sorted(kept.used, key=lambda one: kept.used[one])[:-_MOST_USED]:
            del kept.used[old]


def _to_json(kept: Kept) -> bytes:
    # Not as ASCII, which would hide a broken character in a name until the file is read again.
    return (json.dumps({"version": _VERSION, **asdict(kept)}, indent=1, ensure_ascii=False) + "\n").encode()


def _parse(data: bytes, place: Path) -> Kept:
    try:
        raw = parse_json(data)
    except JsonError as error:
        raise _damaged(place, error.fault) from error
    if not isinstance(raw, dict) or raw.get("version") != _VERSION:
        raise _damaged(place, f"is not of version {_VERSION}")
    aliases, used, pulled = (raw.get(name) for name in ("aliases", "used", "pulled"))
    if not (isinstance(aliases, dict) and isinstance(used, dict) and isinstance(pulled, dict)):
        raise _damaged(place, "lacks aliases, used or pulled")
    if not all(isinstance(target, str) for target in aliases.values()):
        raise _damaged(place, "has an alias whose target is not text")
    if not all(type(when) is int for when in used.values()):
        raise _damaged(place, "has a time that is not a whole number")
    return Kept(aliases, used, {name: _pulled(value, place) for name, value in pulled.items()})


def _pulled(value: Any, place: Path) -> Pulled:
    fields: Mapping[str, Any] = value if isinstance(value, dict) else {}
    repository, revision, nbytes, blobs = (
        fields.get(name) for name in ("repository", "revision", "nbytes", "blobs")
    )
    # Older files have none of these.
    asked, licence, accepted_at = (
        fields.get(name, default) for name, default in (("asked", ""), ("licence", ""), ("accepted_at", 0))
    )
    if (
        not isinstance(repository, str)
        or not _REPOSITORY.fullmatch(repository)
        or not isinstance(revision, str)
        or not _DIGEST.fullmatch(revision)
        or not isinstance(asked, str)
        or (asked and not is_revision(asked))
        or not isinstance(licence, str)
        or type(accepted_at) is not int
        or not 0 <= accepted_at < _LATEST
        or type(nbytes) is not int
        or not isinstance(blobs, list)
        # They become names of files to delete.
        or not all(isinstance(blob, str) and _DIGEST.fullmatch(blob) for blob in blobs)
    ):
        raise _damaged(place, "has a malformed record of a pulled model")
    return Pulled(repository, revision, nbytes, tuple(blobs), asked, licence, accepted_at)


def _damaged(place: Path, fault: str) -> UsageError:
    return UsageError(
        f"{place} {fault}", hint="it keeps aliases and the record of pulled models: correct it or remove it"
    )
