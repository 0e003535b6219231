"""Limits for the users behind a key, if its client names them.

    `safety_identifier`, `user` or `metadata.user_id`  ->  Users.admit  ->  the request goes on, or 429

One key often serves many users. A name means something only together with its key, and is kept as a keyed digest
that no other process can compute. A client that names nobody, or the wrong user, is not held back; the key's own
limits are `limits.py`.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable

from argosy.config import counted
from argosy.errors import ArgosyError
from argosy.guard.buckets import Buckets
from argosy.guard.limits import TooMany

MOST_USERS = 1 << 16


class UserBlocked(ArgosyError):
    """The operator has blocked the user that a request names."""

    http_status = 403


class Users:
    """Any thread may use it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._buckets = Buckets(clock, most_names=MOST_USERS)
        self._secret = secrets.token_bytes(32)

    def admit(self, tenant: str, user: str, per_minute: int | None) -> None:
        """Count a user's request.

        Raises:
            TooMany: the user has reached the limit.
        """
        if per_minute is None:
            return
        name = hashlib.blake2b(
            f"{tenant}\0{user}".encode("utf-8", "surrogatepass"), key=self._secret
        ).hexdigest()
        wait_s = self._buckets.take(name, per_minute)
        if wait_s:
            raise TooMany(
                f"a user may make {counted(per_minute, 'request')} per minute", retry_after_s=wait_s
            )
