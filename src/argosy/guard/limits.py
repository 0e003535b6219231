"""Limits of a key: requests per minute, concurrent requests, tokens per day.

    request  ->  begin  ->  count, for each token  ->  end, whatever the outcome
                 └── counts of every key  ->  save  ->  UseFile, for the next process

A day is a window of 24 hours that starts with the first counted token. Setting the clock back neither renews a day
nor extends it beyond 24 hours from that moment. A prompt counts when the engine accepts it, and a token of an
answer when it is generated, even if the client has left. The last answer of a day may exceed the limit.

Elsewhere: keys are `keys.py`.
"""

from __future__ import annotations

import contextlib
import math
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from argosy.config import counted
from argosy.directory import Directory
from argosy.errors import ArgosyError, UsageError
from argosy.guard.keys import Key

_DAY_S = 86_400.0
_VERSION = 1


class TooMany(ArgosyError):
    """A key has reached one of its limits.

    Attributes:
        retry_after_s: when to try again.
    """

    http_status = 429

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.retry_after_s = retry_after_s


@dataclass(slots=True)
class Use:
    """The usage of one key; times are seconds since 1970."""

    requests_left: float  # refills at the limit's rate
    filled_at: float
    day_began: float = 0.0
    tokens_today: int = 0


class UseFile:
    """Counts that outlive the process; one process at a time uses a file.

    Raises:
        UsageError: another process uses the file, or it is not a usage file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with Directory(path.parent) as parent:
                os.close(parent.open(path.name, os.O_RDWR | os.O_CREAT))
            self._database = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
        except (OSError, sqlite3.Error) as error:
            raise UsageError(f"{path} cannot be written: {error}") from None
        try:
            # Locked from the first write until the file is closed.
            self._database.execute("PRAGMA locking_mode = EXCLUSIVE")
            with self._transaction():
                (version,) = self._database.execute("PRAGMA user_version").fetchone()
                if version not in (0, _VERSION):
                    raise sqlite3.DatabaseError
                self._database.execute(f"PRAGMA user_version = {_VERSION}")
                self._database.execute(
                    "CREATE TABLE IF NOT EXISTS uses (key TEXT PRIMARY KEY, requests_left REAL,"
                    " filled_at REAL, day_began REAL, tokens_today INTEGER)"
                )
        except sqlite3.OperationalError as error:
            self._database.close()
            if "locked" not in str(error):
                raise UsageError(f"{path} cannot be written: {error}") from None
            raise UsageError(
                f"{path} is in use by another server", hint="give each server its own keys file"
            ) from None
        except sqlite3.Error:
            self._database.close()
            raise UsageError(
                f"{path} is not a usage file of version {_VERSION}",
                hint="remove it to start counting from zero",
            ) from None

    def read(self) -> dict[str, Use]:
        return {key: Use(*use) for key, *use in self._database.execute("SELECT * FROM uses")}

    def write(self, uses: Mapping[str, Use], gone: Collection[str]) -> None:
        """Store these counts and delete those of revoked keys in one transaction."""
        with self._transaction():
            self._database.executemany("DELETE FROM uses WHERE key = ?", [(key,) for key in gone])
            self._database.executemany(
                "INSERT OR REPLACE INTO uses VALUES"
                " (:key, :requests_left, :filled_at, :day_began, :tokens_today)",
                [{"key": key, **asdict(use)} for key, use in uses.items()],
            )

    def close(self) -> None:
        self._database.close()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            if self._database.in_transaction:  # on a full drive, SQLite has rolled back already
                self._database.execute("ROLLBACK")
            raise
        self._database.execute("COMMIT")


class Limits:
    """Usage of every key.

    Args:
        file: keeps counts for the next process; None keeps them in memory only.
        known: ids of existing keys; counts of other keys are deleted.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.time,
        *,
        file: UseFile | None = None,
        known: Collection[str] = (),
    ) -> None:
        self._clock = clock
        self._file = file
        self._lock = threading.Lock()
        self._uses = {} if file is None else file.read()
        self._running: dict[str, int] = {}
        self._changed: set[str] = set()
        for key_id in self._uses.keys() - set(known):
            self.forget(key_id)

    def begin(self, key: Key) -> None:
        """Admit a request; `end` must follow.

        Raises:
            TooMany: the key has reached one of its limits.
        """
        now = self._clock()
        with self._lock:
            rate = key.requests_per_minute
            use = self._use_of(key, now)
            _require_tokens(key, use, now)
            running = self._running.get(key.id, 0)
            if key.concurrent_requests is not None and running >= key.concurrent_requests:
                raise TooMany(
                    f"the key has {counted(running, 'running request')}, and its limit is {key.concurrent_requests}",
                    retry_after_s=1,
                )
            if rate is not None:
                passed = max(0.0, now - use.filled_at)
                use.requests_left = min(float(rate), use.requests_left + passed * rate / 60)
                use.filled_at = now
                if use.requests_left < 1:
                    wait = max(1, math.ceil((1 - use.requests_left) * 60 / rate))
                    raise TooMany(
                        f"the key may make {counted(rate, 'request')} per minute", retry_after_s=wait
                    )
                use.requests_left -= 1
                self._changed.add(key.id)
            self._running[key.id] = running + 1

    def used_today(self, key: Key) -> tuple[int, int]:
        """The tokens that count against a key's daily limit now, and the seconds until they expire."""
        now = self._clock()
        with self._lock:
            if (use := self._uses.get(key.id)) is None:
                return 0, 0
            _bring_forward(use, now)
            num_tokens, left_s = use.tokens_today, math.ceil(_DAY_S - (now - use.day_began))
        return (num_tokens, left_s) if left_s > 0 and num_tokens else (0, 0)

    def take_used(self, key: Key, num_tokens: int, left_s: int) -> None:
        """Replace a key's count of tokens by a count made elsewhere.

        Args:
            left_s: seconds until those tokens expire.

        Raises:
            TooMany: the key has used its tokens.
        """
        now = self._clock()
        with self._lock:
            use = self._use_of(key, now)
            use.tokens_today, use.day_began = num_tokens, min(now, now + left_s - _DAY_S)
            self._changed.add(key.id)
            _require_tokens(key, use, now)

    def count(self, key: Key, num_tokens: int) -> None:
        """Add `num_tokens` tokens of a prompt or an answer."""
        now = self._clock()
        with self._lock:
            if (use := self._uses.get(key.id)) is None:  # the key was revoked
                return
            _bring_forward(use, now)
            if now - use.day_began >= _DAY_S or not use.tokens_today:
                use.day_began, use.tokens_today = now, 0
            use.tokens_today += num_tokens
            self._changed.add(key.id)

    def end(self, key: Key) -> None:
        """End a request that `begin` admitted."""
        with self._lock:
            self._running[key.id] -= 1
            if not self._running[key.id]:
                del self._running[key.id]

    def forget(self, key_id: str) -> None:
        """Delete the counts of a revoked key."""
        with self._lock:
            self._uses.pop(key_id, None)
            self._changed.add(key_id)

    def _use_of(self, key: Key, now: float) -> Use:
        use = self._uses.setdefault(key.id, Use(float(key.requests_per_minute or 0), now))
        _bring_forward(use, now)
        return use

    def save(self) -> None:
        """Write the counts that changed since the last call.

        Raises:
            UsageError: the file cannot be written; the next call tries again.
        """
        if self._file is None:
            return
        with self._lock:
            changed, self._changed = self._changed, set()
            uses = {key_id: replace(self._uses[key_id]) for key_id in changed & self._uses.keys()}
        try:
            self._file.write(uses, changed - uses.keys())
        except sqlite3.Error as error:
            with self._lock:
                self._changed |= changed
            raise UsageError(f"the usage of keys cannot be written: {error}") from None

    def close(self) -> None:
        """Write the remaining changes and close the file."""
        if self._file is not None:
            try:
                self.save()
            finally:
                self._file.close()


def _require_tokens(key: Key, use: Use, now: float) -> None:
    left_s = _DAY_S - (now - use.day_began)
    if key.tokens_per_day is not None and left_s > 0 and use.tokens_today >= key.tokens_per_day:
        raise TooMany(
            f"the key has used its {key.tokens_per_day} tokens per day", retry_after_s=math.ceil(left_s)
        )


def _bring_forward(use: Use, now: float) -> None:
    """Move a day that begins in the future, because the clock was set back, to now. Its usage stays."""
    use.day_began = min(use.day_began, now)
