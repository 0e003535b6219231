"""A request as it arrives: unambiguous headers, and a body bounded in size and time.

Elsewhere: `serve/dialects/body.py` parses a body; `gate.py` decides how large it may be.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Callable, Mapping

from starlette.types import Message, Receive, Scope

from argosy.serve.http.access import MAX_BODY_BYTES
from argosy.serve.http.failures import BadFrame, Refused
from argosy.serve.http.held import MEDIA_BODY_BYTES
from argosy.serve.http.running import GoneAway

BODY_STALL_S = 15.0  # the longest wait between two parts of a body
BODY_S = 60.0
# For the rest of the body of a refused request.
_DISCARD_S = 5.0
_MOST_DISCARDED_BYTES = 2 * MEDIA_BODY_BYTES
CHOSEN_POLICY = "x-argosy-policy"  # the header with which a request names its policy
_ONCE = (
    CHOSEN_POLICY,
    "host",
    "content-length",
    "authorization",
    "x-api-key",
    "origin",
    "content-type",
    "transfer-encoding",
)
_TRACE = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})(?P<trace_id>[0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?"
)


def read_headers(scope: Scope) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in scope["headers"]:
        key = name.decode("latin-1").lower()
        if key in found and key in _ONCE:
            raise BadFrame(f"the {key} header appears twice")
        found[key] = value.decode("latin-1")
    if not found.get("content-length", "0").isdecimal():
        raise BadFrame("content-length is not a number")
    # If a proxy in front of this server obeys one header and this server the other, a body can smuggle a request.
    if "transfer-encoding" in found and ("content-length" in found or scope.get("http_version") == "1.0"):
        raise BadFrame("transfer-encoding is not allowed with content-length or in HTTP/1.0")
    return found


def trace_of(headers: Mapping[str, str]) -> str | None:
    """The client's trace id, 32 hexadecimal digits (W3C Trace Context), if the request is part of a trace."""
    found = _TRACE.fullmatch(headers.get("traceparent", ""))
    return None if found is None else found["trace_id"]


def secret_of(headers: dict[str, str]) -> str | None:
    """The key from either header; if both contain a key, it must be the same."""
    scheme, _, bearer = headers.get("authorization", "").partition(" ")
    given = headers.get("x-api-key")
    if scheme.lower() != "bearer":  # for example, a user name and password for a proxy
        return given
    if given is not None and given.strip() != bearer.strip():
        raise Refused(
            401, "the authorization and x-api-key headers hold different keys", hint="send only one"
        )
    return bearer.strip()


class IncomingBody:
    """The body of a request as it arrives: bounded in size and time, and charged to the memory for all bodies.

    is_whole: all of the body has been read.
    is_awaited: the client sends the body only after a 100 Continue.
    max_bytes: the limit on the body.
    asked: called with each part of the body.
    when_whole: called when all of the body has been read.
    """

    def __init__(self, receive: Receive, hold: Callable[[int], None]) -> None:
        """`hold` is called with the memory of each part and raises if there is no room for it."""
        self._receive, self._hold = receive, hold
        self.asked: Callable[[bytes], None] = lambda data: None
        self.when_whole: Callable[[], None] = lambda: None
        self._size, self._began = 0, time.monotonic()
        self.is_whole = False
        self.is_awaited = False
        self.max_bytes = MAX_BODY_BYTES

    async def receive(self) -> Message:
        """Receive the next part of the body; after the last one, wait for the end of the connection.

        Raises:
            Refused: the body is too large or too slow.
            GoneAway: the client has disconnected.
        """
        if self.is_whole:
            return await self._receive()
        left = min(BODY_STALL_S, BODY_S - (time.monotonic() - self._began))
        try:
            async with asyncio.timeout(max(0.01, left)):
                message = await self._next()
        except TimeoutError:
            raise Refused(408, "the body took too long to arrive") from None
        if message["type"] == "http.disconnect":
            raise GoneAway
        num_bytes = len(message.get("body", b""))
        self._size += num_bytes
        self.require_allowed(self._size)
        self._hold(num_bytes + num_bytes // 8)  # a growing buffer has some spare room
        self.asked(message.get("body", b""))
        return message

    def require_allowed(self, num_bytes: int) -> None:
        """Refuse a body of this size if it is too large.

        Raises:
            Refused: it is too large.
        """
        if num_bytes > self.max_bytes:
            raise Refused(413, f"the body is larger than {self.max_bytes} bytes")

    async def discard(self) -> bool:
        """Read the rest of the body, within bounds; return whether all of it was read.

        A client that has sent all of its body can read the response. A client that is still sending when the connection
        closes gets a reset, and may drop the response unread.
        """
        size = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DISCARD_S):
                while not self.is_whole and not self.is_awaited and size <= _MOST_DISCARDED_BYTES:
                    size += len((await self._next()).get("body", b""))
        return self.is_whole

    async def _next(self) -> Message:
        message = await self._receive()
        self.is_whole = not message.get("more_body", False)
        if self.is_whole:
            self.when_whole()
        return message
