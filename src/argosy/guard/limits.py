"""How much one key may ask for: requests a minute, requests at once, tokens a day.

A day is a window of 24 hours from the first token that counted. Tokens are counted when an answer ends, so the last
answer of a day may go beyond.

Elsewhere: whose key it is, is `keys.py`.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from argosy.errors import ArgosyError
from argosy.guard.keys import Key

_DAY_S = 86_400.0


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
class _Use:
    tokens_left: float  # of requests, filled a minute's worth a minute
    filled_at: float
    running: int = 0
    day_began: float = 0.0
    tokens_today: int = 0


class Limits:
    """What each key has used."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._uses: dict[str, _Use] = {}

    def begin(self, key: Key) -> None:
        """Let a request in; `end` has to follow.

        Raises:
            TooMany: one of the key's limits is reached.
        """
        now = self._clock()
        with self._lock:
            rate = key.requests_per_minute
            use = self._uses.setdefault(key.id, _Use(float(rate or 0), now))
            if (
                key.tokens_per_day is not None
                and now - use.day_began < _DAY_S
                and use.tokens_today >= key.tokens_per_day
            ):
                wait = math.ceil(_DAY_S - (now - use.day_began))
                raise TooMany(f"the key has used its {key.tokens_per_day} tokens a day", retry_after_s=wait)
            if key.concurrent_requests is not None and use.running >= key.concurrent_requests:
                raise TooMany(
                    f"{use.running} requests of the key run already, and as many may", retry_after_s=1
                )
            if rate is not None:
                use.tokens_left = min(float(rate), use.tokens_left + (now - use.filled_at) * rate / 60)
                use.filled_at = now
                if use.tokens_left < 1:
                    wait = max(1, math.ceil((1 - use.tokens_left) * 60 / rate))
                    raise TooMany(f"the key may make {rate} requests a minute", retry_after_s=wait)
                use.tokens_left -= 1
            use.running += 1

    def end(self, key: Key, num_tokens: int) -> None:
        """A request has ended; prompt and answer had so many tokens."""
        now = self._clock()
        with self._lock:
            use = self._uses[key.id]
            use.running -= 1
            if now - use.day_began >= _DAY_S or not use.tokens_today:
                use.day_began, use.tokens_today = now, 0
            use.tokens_today += num_tokens
