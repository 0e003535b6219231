"""Stops: the operator cuts off a model, a key or a user; new requests are refused, running answers end.

    POST /v1/engine/stops  ->  Stops.set  ->  FILE, for the next process  ->  has, for requests that begin or run

A stop takes effect at once, without a restart. Unlike revoking a key, stopping it deletes nothing.

Elsewhere: the route is `serve/guards/stops.py`; revoking a key is `keys.py`.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

from argosy.directory import replacing
from argosy.errors import ArgosyError, UsageError
from argosy.strict_json import JsonError, parse_json

Kind = Literal["model", "key", "user"]
KINDS: tuple[Kind, ...] = get_args(Kind)
MOST_STOPPED = 10_000  # per kind
LONGEST_NAME = 512
_MOST_FILE_BYTES = 32 << 20
_VERSION = 1


class Stopped(ArgosyError):
    """The operator has stopped the model or the key of a request."""

    http_status = 403


def stopped(kind: Literal["model", "key"]) -> Stopped:
    """The error for a request whose model or key is stopped."""
    return Stopped(f"the operator of this server has stopped this {kind}", code=f"{kind}_stopped")


class Stops:
    """Any thread may use it.

    Args:
        path: the file to keep stops in; None: they last until the process ends.

    Raises:
        UsageError: the file cannot be read, or is not a file of stops.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._names: dict[Kind, frozenset[str]] = {kind: frozenset() for kind in KINDS}
        if path is not None:
            self.reload()

    def reload(self) -> None:
        """Read the file again, if there is one. On UsageError nothing changes."""
        if self.path is None:
            return
        try:
            with self.path.open("rb") as file:
                data = file.read(_MOST_FILE_BYTES + 1)
        except FileNotFoundError:
            return
        except OSError as error:
            raise UsageError(f"{self.path} cannot be read: {error.strerror}") from None
        with self._lock:
            try:
                self._names = _names_in(data)
            except ValueError as error:
                raise UsageError(f"{self.path} is not a file of stops: {error}") from None

    def has(self, kind: Kind, *names: str) -> bool:
        """Whether one of these names is stopped."""
        return not self._names[kind].isdisjoint(names)

    def set(self, kind: Kind, *names: str, is_stopped: bool) -> None:
        """Stop a model, key or user by any of its names, or lift the stop; write the file.

        Raises:
            UsageError: the list is full, or the file cannot be written.
        """
        with self._lock:
            found = self._names[kind] | {*names} if is_stopped else self._names[kind] - {*names}
            if len(found) > MOST_STOPPED:
                raise UsageError(f"at most {MOST_STOPPED} of one kind can be stopped")
            made = {**self._names, kind: found}
            if self.path is not None:
                listed: dict[str, object] = {"version": _VERSION}
                for one, kept in made.items():
                    listed[one] = sorted(kept)
                try:
                    with replacing(self.path) as write:
                        write(json.dumps(listed, indent=2).encode())
                except OSError as error:
                    raise UsageError(f"{self.path} cannot be written: {error.strerror}") from None
            self._names = made

    def listed(self) -> Mapping[Kind, list[str]]:
        """Everything that is stopped, by kind."""
        return {kind: sorted(names) for kind, names in self._names.items()}


def _names_in(data: bytes) -> dict[Kind, frozenset[str]]:
    if len(data) > _MOST_FILE_BYTES:
        raise ValueError(f"it has more than {_MOST_FILE_BYTES} bytes")
    try:
        given = parse_json(data)
    except JsonError as error:
        raise ValueError(str(error)) from None
    if not isinstance(given, dict) or given.keys() != {"version", *KINDS} or given["version"] != _VERSION:
        raise ValueError(f"it must contain version {_VERSION}, {', '.join(KINDS)}, and nothing else")
    for kind in KINDS:
        names = given[kind]
        is_list = isinstance(names, list) and len(names) <= MOST_STOPPED
        if not is_list or not all(isinstance(name, str) and len(name) <= LONGEST_NAME for name in names):
            raise ValueError(f"{kind} is not a list of at most {MOST_STOPPED} names")
    return {kind: frozenset(given[kind]) for kind in KINDS}
