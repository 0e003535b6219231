"""API keys: made once, kept as SHA-256 in a file that only its owner reads.

    argosy keys add  ->  KeyFile  ->  KeyRing.find, for each request

A key is 256 random bits, so a plain digest of it cannot be guessed back. Digests are compared in constant time, all of
them each time. A running server sees a changed file within a second: a key that is revoked ends there.

Elsewhere: how much a key may ask for is `limits.py`.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import stat
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, get_args

from argosy.errors import UsageError

Scope = Literal["infer", "grammar", "metrics", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
_MAX_FILE_BYTES = 1 << 20
_LOOK_AGAIN_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """What is known of a key; None leaves a limit out."""

    id: str
    name: str
    sha256: str
    scopes: tuple[Scope, ...] = ("infer",)
    requests_per_minute: int | None = None
    concurrent_requests: int | None = None
    tokens_per_day: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "scopes", tuple(self.scopes))
        for scope in self.scopes:
            if scope not in SCOPES:
                raise UsageError(f"unknown scope '{scope}'; known: {', '.join(SCOPES)}")
        for name in ("requests_per_minute", "concurrent_requests", "tokens_per_day"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise UsageError(f"{name} must be a whole number of at least 1, found {value!r}")


LOCAL = Key(id="local", name="this machine, without a key", sha256="", scopes=SCOPES)


class KeyFile:
    """The file of keys at `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[Key]:
        """All keys.

        Raises:
            UsageError: no such file, others may read it, or it is no file of keys.
        """
        try:
            with self.path.open("rb") as file:
                if os.fstat(file.fileno()).st_mode & (stat.S_IRWXG | stat.S_IRWXO):
                    raise UsageError(f"{self.path} can be used by others", hint=f"chmod 600 {self.path}")
                data = file.read(_MAX_FILE_BYTES + 1)
        except OSError as error:
            raise UsageError(
                f"{self.path} cannot be read: {error.strerror}",
                hint=f"argosy keys add NAME --keys {self.path}",
            ) from None
        try:
            content = json.loads(data)
            if content["version"] != 1:
                raise ValueError
            known = {field.name for field in fields(Key)}
            if any(item.keys() - known for item in content["keys"]):
                raise ValueError
            return [Key(**item) for item in content["keys"]]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise UsageError(f"{self.path} is not a file of keys of version 1") from None

    def write(self, keys: list[Key]) -> None:
        """Put `keys` in its place, in one go."""
        text = json.dumps({"version": 1, "keys": [asdict(key) for key in keys]}, indent=1)
        beside = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}")
        try:
            descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(text + "\n")
                file.flush()
                os.fsync(descriptor)
            beside.replace(self.path)
        except OSError as error:
            beside.unlink(missing_ok=True)
            raise UsageError(f"{self.path} cannot be written: {error.strerror}") from None

    def add(self, name: str, **limits: object) -> tuple[Key, str]:
        """A new key, and its secret, which is kept nowhere."""
        keys = self.read() if self.path.exists() else []
        if any(key.name == name for key in keys):
            raise UsageError(
                f"a key of the name '{name}' is there already", hint="revoke it first, or name another"
            )
        secret = "ak-" + secrets.token_urlsafe(32)
        key = Key(id="key-" + secrets.token_hex(4), name=name, sha256=_digest(secret), **limits)  # type: ignore[arg-type]
        self.write([*keys, key])
        return key, secret

    def revoke(self, name_or_id: str) -> Key:
        """Take a key out.

        Raises:
            UsageError: there is none of that name.
        """
        keys = self.read()
        for key in keys:
            if name_or_id in (key.name, key.id):
                self.write([other for other in keys if other is not key])
                return key
        raise UsageError(f"no key '{name_or_id}' in {self.path}", hint="`argosy keys list` shows them")


class KeyRing:
    """The keys of a running server. Without a file everybody is `LOCAL`, which only loopback may be."""

    def __init__(self, file: KeyFile | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._file = file
        self._clock = clock
        self._lock = threading.Lock()
        self._keys = [] if file is None else file.read()
        self._known = {key.id for key in self._keys}  # as of the last time when the file could be read
        self._gone: list[str] = []
        self._seen = self._mark()
        self._looked_at = clock()

    @property
    def ids(self) -> set[str]:
        """Of all keys."""
        return {key.id for key in self._keys}

    def look(self) -> list[str]:
        """Ids of keys that were revoked since the last call; a file that cannot be read revokes nobody."""
        if self._file is not None:
            self._look_again()
        with self._lock:
            gone, self._gone = self._gone, []
        return gone

    def find(self, secret: str | None) -> Key | None:
        """Whose secret it is."""
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
                except UsageError:
                    self._keys = []  # a file that cannot be trusted lets nobody in
                else:
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
