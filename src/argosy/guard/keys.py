"""API keys: shown once, stored as SHA-256 in a file that only its owner can read.

    argosy keys add  ->  KeyFile  ->  KeyRing.find, for each request

A key is 256 random bits, so a plain digest does not help to guess it. Every look-up compares all digests, each in
constant time. A running server notices a changed file within a second and from then on refuses revoked keys. Every
change reads and writes the file under a lock, so no change undoes another.

Elsewhere: the limits of a key are `limits.py`.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import re
import secrets
import stat
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, get_args

from argosy.directory import replacing
from argosy.errors import UsageError
from argosy.strict_json import JsonError, parse_json

Scope = Literal["infer", "grammar", "metrics", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
_VERSION = 1
_MAX_FILE_BYTES = 1 << 20
_LONGEST_NAME = 64
_LONGEST_ID = 256
_MOST = 10**15  # requests or tokens
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LOOK_AGAIN_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One key; a limit of None means no limit.

    Raises:
        UsageError: a field has the wrong type or an invalid value.
    """

    id: str
    name: str
    sha256: str  # the secret's digest, in hexadecimal
    scopes: tuple[Scope, ...] = ("infer",)
    requests_per_minute: int | None = None
    concurrent_requests: int | None = None
    tokens_per_day: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.id, str) or not self.id or not self.id.isprintable():  # it is logged
            raise UsageError(f"id must be printable text, found {_kind(self.id)}")
        if len(self.id) > _LONGEST_ID:
            raise UsageError(f"id has {len(self.id)} characters, and may have at most {_LONGEST_ID}")
        if not isinstance(self.name, str):
            raise UsageError(f"name must be text, found {_kind(self.name)}")
        if not isinstance(self.sha256, str) or not _SHA256.fullmatch(self.sha256):
            # Do not quote the value: it may be the secret itself.
            raise UsageError("sha256 must be 64 hexadecimal digits in lower case")
        if not isinstance(self.scopes, list | tuple):
            raise UsageError(f"scopes must be a list, found {_kind(self.scopes)}")
        object.__setattr__(self, "scopes", tuple(self.scopes))
        for scope in self.scopes:
            if scope not in SCOPES:
                raise UsageError(f"unknown scope {ascii(scope)[:64]}; known: {', '.join(SCOPES)}")
        for field in ("requests_per_minute", "concurrent_requests", "tokens_per_day"):
            value = getattr(self, field)
            if value is not None and (type(value) is not int or not 1 <= value <= _MOST):
                raise UsageError(f"{field} must be a whole number from 1 to {_MOST}, found {_kind(value)}")


_MADE_ID = re.compile(r"key-[0-9a-f]{8}")

LOCAL = Key(id="local", name="this machine, without a key", sha256="0" * 64, scopes=SCOPES)


def is_key_id(text: str) -> bool:
    """Whether a text looks like a key's id, and so may name a revoked key."""
    return text == LOCAL.id or _MADE_ID.fullmatch(text) is not None


class KeyFile:
    """The keys file at `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[Key]:
        """Read all keys.

        Raises:
            UsageError: the file is missing, others can access it, or its content is invalid.
        """
        try:
            # Opening a named pipe must not block.
            with open(
                self.path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)
            ) as file:
                mode = os.fstat(file.fileno()).st_mode
                if not stat.S_ISREG(mode):
                    raise UsageError(f"{self.path} cannot be read: it is not a regular file")
                if mode & (stat.S_IRWXG | stat.S_IRWXO):
                    raise UsageError(f"other users can access {self.path}", hint=f"chmod 600 {self.path}")
                data = file.read(_MAX_FILE_BYTES + 1)
        except OSError as error:
            makes = f"`argosy keys add NAME --keys {self.path}` makes one"
            raise UsageError(
                f"{self.path} cannot be read: {error.strerror}",
                hint=makes if isinstance(error, FileNotFoundError) else None,
            ) from None
        try:
            return _keys_in(data)
        except UsageError as error:
            raise UsageError(
                f"{self.path} is not a keys file of version {_VERSION}: {error.message}"
            ) from None

    def add(self, name: str, **limits: object) -> tuple[Key, str]:
        """Create a key; return it with its secret, which is not stored.

        Raises:
            UsageError: `name` is taken or invalid, or the file cannot be read or written.
        """
        if not 0 < len(name) <= _LONGEST_NAME or not name.isprintable() or name != name.strip():
            raise UsageError(
                f"a key name must be 1 to {_LONGEST_NAME} printable characters without spaces at either end,"
                f" found {name[: _LONGEST_NAME + 1]!a}"
            )
        secret = "ak-" + secrets.token_urlsafe(32)
        key = Key(id="key-" + secrets.token_hex(4), name=name, sha256=_digest(secret), **limits)  # type: ignore[arg-type]
        with self._changing() as write:
            keys = self.read() if self.path.exists() else []
            if any(name in (other.name, other.id) for other in keys):
                raise UsageError(
                    f"a key named '{name}' already exists", hint="revoke it first, or choose another name"
                )
            write([*keys, key])
        return key, secret

    def revoke(self, name_or_id: str) -> Key:
        """Remove a key.

        Raises:
            UsageError: there is no such key, or the file cannot be read or written.
        """
        self.read()  # fails before a lock file is created next to a missing file
        with self._changing() as write:
            keys = self.read()
            for key in keys:
                if name_or_id in (key.name, key.id):
                    write([other for other in keys if other is not key])
                    return key
        raise UsageError(f"no key '{name_or_id}' in {self.path}", hint="`argosy keys list` shows them")

    @contextlib.contextmanager
    def _changing(self) -> Iterator[Callable[[list[Key]], None]]:
        """Hold the lock from reading to writing, so no other process changes the file in between."""
        try:
            with replacing(self.path) as write:
                yield lambda keys: write(_as_json(keys))
        except OSError as error:
            raise UsageError(f"{self.path} cannot be written: {error.strerror}") from None


def _as_json(keys: list[Key]) -> bytes:
    text = json.dumps({"version": _VERSION, "keys": [asdict(key) for key in keys]}, indent=1)
    return f"{text}\n".encode()


def _keys_in(data: bytes) -> list[Key]:
    """Parse a keys file.

    Raises:
        UsageError: the file is invalid; the message names the line or the number of the key.
    """
    if len(data) > _MAX_FILE_BYTES:
        raise UsageError(f"it is larger than {_MAX_FILE_BYTES} bytes")
    try:
        content = parse_json(data)
    except JsonError as error:
        if error.key is not None:  # do not quote it: it may be a secret in the wrong place
            raise UsageError("an object has the same field twice") from None
        if error.syntax is not None:
            raise UsageError(f"line {error.syntax.lineno}: {error.syntax.msg}") from None
        raise UsageError(str(error)) from None
    if not isinstance(content, dict) or content.keys() != {"version", "keys"}:
        raise UsageError("expected an object with version and keys, and nothing else")
    if type(content["version"]) is not int or content["version"] != _VERSION:
        raise UsageError(f"version must be {_VERSION}")
    if not isinstance(content["keys"], list):
        raise UsageError(f"keys must be a list, found {_kind(content['keys'])}")
    keys: list[Key] = []
    seen: dict[tuple[str, str], int] = {}
    for number, item in enumerate(content["keys"], 1):
        try:
            key = _key_of(item)
        except UsageError as error:
            raise UsageError(f"key {number}: {error.message}") from None
        for field in ("id", "name", "sha256"):
            first = seen.setdefault((field, getattr(key, field)), number)
            if first != number:
                raise UsageError(f"key {number}: it has the same {field} as key {first}")
        keys.append(key)
    return keys


def _key_of(item: object) -> Key:
    if not isinstance(item, dict):
        raise UsageError(f"expected an object, found {_kind(item)}")
    known = [field.name for field in fields(Key)]
    for name in item:
        if name not in known:
            raise UsageError(f"unknown field {name[:64]!a}; known: {', '.join(known)}")
    for name in ("id", "name", "sha256"):
        if name not in item:
            raise UsageError(f"it has no {name}")
    return Key(**item)


def _kind(value: object) -> str:
    """Describe a JSON value in a few words. Text is not quoted: it may be a secret in the wrong field."""
    if type(value) is int and abs(value) <= 10 * _MOST:
        return str(value)
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


class KeyRing:
    """The keys of a running server. Without a file every caller is `LOCAL`, and `serve` listens on loopback only."""

    def __init__(self, file: KeyFile | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._file = file
        self._clock = clock
        self._lock = threading.Lock()
        self._keys = [] if file is None else file.read()
        self.fault: str | None = None  # why a changed file cannot be used; every key is then refused
        self._known = {key.id for key in self._keys}  # as of the last time the file could be read
        self._gone: list[str] = []
        self._seen = self._mark()
        self._looked_at = clock()

    @property
    def is_needed(self) -> bool:
        """Whether requests must present a key."""
        return self._file is not None

    @property
    def ids(self) -> set[str]:
        """Ids of all keys."""
        return {key.id for key in self._keys}

    def id_of(self, name_or_id: str) -> str | None:
        """The id of the key with this id or name, or None."""
        return next((key.id for key in self._keys if name_or_id in (key.id, key.name)), None)

    def look(self) -> list[str]:
        """Ids of keys revoked since the last call. An unreadable file revokes no key."""
        if self._file is not None:
            self._look_again()
        with self._lock:
            gone, self._gone = self._gone, []
        return gone

    def find(self, secret: str | None) -> Key | None:
        """The key that has this secret."""
        if self._file is None:
            return LOCAL
        self._look_again()
        digest = _digest(secret or "")
        found = None
        for key in self._keys:
            if hmac.compare_digest(digest, key.sha256):
                found = key
        return found

    def _look_again(self) -> None:
        assert self._file is not None
        with self._lock:
            if self._clock() - self._looked_at < _LOOK_AGAIN_S:
                return
            self._looked_at = self._clock()
            mark = self._mark()
            if mark != self._seen:
                self._seen = mark
                try:
                    self._keys = self._file.read()
                except UsageError as error:
                    self._keys = []  # a file that cannot be trusted admits no key
                    self.fault = str(error)
                else:
                    self.fault = None
                    self._gone += sorted(self._known - self.ids)
                    self._known = self.ids

    def _mark(self) -> tuple[int, int, int] | None:
        try:
            found = self._file.path.stat() if self._file is not None else None
        except OSError:
            return None
        return None if found is None else (found.st_mtime_ns, found.st_ino, found.st_mode)


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()
