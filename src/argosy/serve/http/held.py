"""The resources that a request holds until it ends: files, and memory from a pool that the memory plan contains.

    part of a body, cost of parsing it  ->  PoolShare.hold  ->  within the pool, or refused
    end of the request, for any reason  ->  PoolShare.close

A body needs more memory than its bytes: as Python objects, JSON takes up to forty times as much. The cost of
parsing a body is therefore charged before it is parsed.

Elsewhere: `serve/dialects/body.py` estimates the cost of parsing; `serve/claims.py` claims the pool in the memory
plan.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from argosy.config import MIB
from argosy.errors import Overloaded

BODY_BYTES = 48 * MIB  # request bodies, and the values parsed from them
MEDIA_BODY_BYTES = 48 * MIB  # the largest body with pictures and sounds: a 32 MiB file takes 43 MiB as base64
# Added to BODY_BYTES if the model takes media: the largest body, and the text or files made from it.
MEDIA_BODIES_BYTES = 2 * MEDIA_BODY_BYTES
AUDIT_BYTES = 16 * MIB  # contents of requests that an audit has yet to write
_RETRY_S = 1


class Pool:
    """At most `max_bytes` for all requests together."""

    def __init__(self, max_bytes: int = BODY_BYTES) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.peak_bytes = 0
        self._lock = threading.Lock()

    def share(self) -> PoolShare:
        return PoolShare(self)

    def add(self, num_bytes: int) -> bool:
        """Take `num_bytes` if there is room; return whether it was taken."""
        with self._lock:
            if self.num_bytes + num_bytes > self.max_bytes:
                return False
            self.num_bytes += num_bytes
            self.peak_bytes = max(self.peak_bytes, self.num_bytes)
            return True

    def give_back(self, num_bytes: int) -> None:
        with self._lock:
            self.num_bytes -= num_bytes


class PoolShare:
    """One request's part of the pool."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._lock = threading.Lock()  # files of a request are fetched in parallel
        self._is_closed = False
        self.num_bytes = 0

    @property
    def max_bytes(self) -> int:
        """The most that a single request can hold."""
        return self._pool.max_bytes

    def hold(self, num_bytes: int) -> None:
        """Take `num_bytes` more.

        Raises:
            Overloaded: other requests leave too little room, or the share is closed.
        """
        with self._lock:
            if self._is_closed:
                raise Overloaded("the request has ended", retry_after_s=_RETRY_S)
            if not self._pool.add(num_bytes):
                raise Overloaded("no memory is left for another request body", retry_after_s=_RETRY_S)
            self.num_bytes += num_bytes

    def shrink(self, num_bytes: int) -> None:
        """Return everything above `num_bytes`."""
        with self._lock:
            surplus = max(0, self.num_bytes - num_bytes)
            self.num_bytes -= surplus
        self._pool.give_back(surplus)

    def release(self) -> None:
        self.shrink(0)

    def close(self) -> None:
        """Return everything for good: a thread that still works for an ended request cannot take more."""
        with self._lock:
            self._is_closed = True
        self.release()


@dataclass(slots=True)
class Files:
    """One request's files on other hosts.

    found: address -> the content, or why it could not be fetched.
    wanted: addresses not fetched yet.
    """

    found: dict[str, bytes | str] = field(default_factory=dict)
    wanted: dict[str, None] = field(default_factory=dict)

    def require_all(self) -> None:
        """Check that nothing is missing.

        Raises:
            FilesWanted: some files must be fetched before the request is read again.
        """
        if self.wanted:
            raise FilesWanted

    def clear(self) -> None:
        self.found.clear()
        self.wanted.clear()


class FilesWanted(Exception):
    """A request names files that have not been fetched yet."""


@dataclass(slots=True)
class Held:
    """The resources of one request, and the weight of its work.

    takes_long: the body is long, or contains pictures or sounds to decode.
    takes_video: it contains a video to decode.
    files: the files on other hosts that the body names.
    """

    share: PoolShare = field(default_factory=lambda: Pool().share())
    files: Files = field(default_factory=Files)
    takes_long: bool = False
    takes_video: bool = False
