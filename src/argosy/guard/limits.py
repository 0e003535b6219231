"""How much one key may ask for: requests a minute, requests at once, tokens a day.

    request  ->  begin  ->  count, as its tokens come  ->  end, however it ends
                 └── counts of every key  ->  save  ->  UseFile, for the next process

A day is a window of 24 hours from the first token that counted. A clock that is set back renews no day, and makes
none longer than 24 hours from then. A prompt counts when the engine takes it and a token of
an answer when it is there, whether or not anybody waits for it still; the last answer of a day may go beyond.

Elsewhere: whose key it is, is `keys.py`.
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

from argosy.errors import ArgosyError, UsageError
from argosy.guard.keys import Key

_DAY_S = 86_400.0
_VERSION = 1


class TooMany(ArgosyError):
    """A key is at its limit.

    Attributes:
        retry_after_s: when it will not be.
    """

    http_status = 429

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.retry_after_s = retry_after_s


@dataclass(slots=True)
class Use:
    """What a key has used; times are seconds since 1970."""

    requests_left: float  # filled a minute's worth a minute
    filled_at: float
    day_began: float = 0.0
    tokens_today: int = 0


class UseFile:
    """Counts that outlive the process; one process at a time uses a file.

    Raises:
        UsageError: another process has it, or it is no such file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
            self._database = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
        except (OSError, sqlite3.Error) as error:
            raise UsageError(f"{path} cannot be written: {error}") from None
        try:
            # Locked from the first write until it is closed.
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
                f"{path} is in use by another server", hint="give each server a file of keys of its own"
            ) from None
        except sqlite3.Error:
            self._database.close()
            raise UsageError(
                f"{path} is not a file of counts of version {_VERSION}",
                hint="remove it to begin counting anew",
            ) from None

    def read(self) -> dict[str, Use]:
        return {key: Use(*use) for key, *use in self._database.execute("SELECT * FROM uses")}

    def write(self, uses: Mapping[str, Use], gone: Collection[str]) -> None:
        """Put these counts in, and take out those of keys that are gone; all or nothing."""
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
            self._database.execute("ROLLBACK")
            raise
        self._database.execute("COMMIT")


class Limits:
    """What each key has used.

    Args:
        file: where counts are kept for the next process; None: nowhere.
        known: ids of the keys there are; counts of others are forgotten.
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
        """Let a request in; `end` has to follow.

        Raises:
            TooMany: one of the key's limits is reached.
        """
        now = self._clock()
        with self._lock:
            rate = key.requests_per_minute
            use = self._uses.setdefault(key.id, Use(float(rate or 0), now))
            _bring_forward(use, now)
            running = self._running.get(key.id, 0)
            if (
                key.tokens_per_day is not None
                and now - use.day_began < _DAY_S
                and use.tokens_today >= key.tokens_per_day
            ):
                wait = math.ceil(_DAY_S - (now - use.day_began))
                raise TooMany(f"the key has used its {key.tokens_per_day} tokens a day", retry_after_s=wait)
            if key.concurrent_requests is not None and running >= key.concurrent_requests:
                raise TooMany(f"{running} requests of the key run already, and as many may", retry_after_s=1)
            if rate is not None:
                passed = max(0.0, now - use.filled_at)
                use.requests_left = min(float(rate), use.requests_left + passed * rate / 60)
                use.filled_at = now
                if use.requests_left < 1:
                    wait = max(1, math.ceil((1 - use.requests_left) * 60 / rate))
                    raise TooMany(f"the key may make {rate} requests a minute", retry_after_s=wait)
                use.requests_left -= 1
                self._changed.add(key.id)
            self._running[key.id] = running + 1

    def count(self, key: Key, num_tokens: int) -> None:
        """So many tokens more, of a prompt or an answer."""
        now = self._clock()
        with self._lock:
            if (use := self._uses.get(key.id)) is None:  # its key is gone
                return
            _bring_forward(use, now)
            if now - use.day_began >= _DAY_S or not use.tokens_today:
                use.day_began, use.tokens_today = now, 0
            use.tokens_today += num_tokens
            self._changed.add(key.id)

    def end(self, key: Key) -> None:
        """A request has ended."""
        with self._lock:
            self._running[key.id] -= 1
            if not self._running[key.id]:
                del self._running[key.id]

    def forget(self, key_id: str) -> None:
        """A key is gone, and its counts with it."""
        with self._lock:
            self._uses.pop(key_id, None)
            self._changed.add(key_id)

    def save(self) -> None:
        """Write what has changed since it was called last.

        Raises:
            UsageError: the file cannot be written; what has changed stays to be written.
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
            raise UsageError(f"counts of keys cannot be written: {error}") from None

    def close(self) -> None:
        """Write what is left, and let go of the file."""
        if self._file is not None:
            try:
                self.save()
            finally:
                self._file.close()


def _bring_forward(use: Use, now: float) -> None:
    """A day that begins later than now, because the clock was set back, begins now; what it has used stays used."""
    use.day_began = min(use.day_began, now)
