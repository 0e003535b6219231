"""One request to one server over its own connection: HTTP/1.1, with every wait and every size bounded.

A whole answer is sent when it is complete, so its head may take `ANSWER_S`. A stream begins once its request is
read and its model is loaded, within `HEAD_S`. After the head a server may be silent for `STALL_S`: in a stream, or
in a whole answer that has begun, it sends a sign of life every ten seconds.

    Address  ->  Reply.connect  ->  ask: method, path, headers, body  ->  status, headers, then parts of the body

A connection serves one request, so no request meets a connection that the server is about to close. h11 parses the
answer: an endless header, garbage and a body that ends early are errors, and every error here is `ServerGone`.

Elsewhere: which server, and what happens if it dies, is `app.py`; health is `servers.py`.
"""

from __future__ import annotations

import asyncio
import functools
import ssl
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

import h11

from argosy.errors import ArgosyError, UsageError

CONNECT_S = 5.0
ANSWER_S = 3600.0  # from a request to the head of a whole answer
HEAD_S = 600.0  # from a request to the head of a stream
STALL_S = 40.0  # between two parts of a body
_MOST_HEAD_BYTES = 32 << 10
_MOST_INTERIM = 8  # answers like 100 Continue before the real one
_PART_BYTES = 64 << 10

RawHeaders = Sequence[tuple[bytes, bytes]]


class ServerGone(ArgosyError):
    """A server cannot be reached, died, or sent something other than an answer.

    Facts: `server`, and `is_silent` if the server may merely be slow.
    """

    http_status = 502


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens: `http://10.0.0.2:8080`, perhaps with a base path."""

    host: str
    port: int
    is_tls: bool
    base_path: str

    def __str__(self) -> str:
        shown = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.is_tls else 'http'}://{shown}:{self.port}{self.base_path}"


def parse_address(url: str) -> Address:
    """Raises: UsageError: `url` is not the address of a server."""
    try:
        parts = urlsplit(url)
        port = parts.port
        (parts.hostname or "").encode("idna")  # as sockets do: an empty or long label is an error
    except ValueError:
        parts, port = urlsplit(""), None
    if (
        parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None
        or parts.query or parts.fragment or not url.isascii() or not url.isprintable()
    ):  # fmt: skip
        raise UsageError(
            f"a server's address begins with http:// or https://, found {url[:80]!a}",
            hint="for example http://10.0.0.2:8080",
        )
    is_tls = parts.scheme == "https"
    return Address(parts.hostname, port or (443 if is_tls else 80), is_tls, parts.path.rstrip("/"))


class Reply:
    """A connection to a server, and the answer to its one request.

    Attributes:
        status: the answer's status, once `ask` returns.
        headers: as received, with names in lower case.
        heard_at: monotonic seconds at which the server last sent something, or was connected.
    """

    def __init__(self, address: Address, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._address, self._reader, self._writer = address, reader, writer
        self._protocol = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MOST_HEAD_BYTES)
        self.status = 0
        self.heard_at = time.monotonic()
        self.headers: list[tuple[bytes, bytes]] = []

    @classmethod
    async def connect(cls, address: Address) -> Reply:
        """Connect to a server. The caller closes the reply.

        Raises:
            ServerGone: the server cannot be reached.
        """
        try:
            async with asyncio.timeout(CONNECT_S):
                reader, writer = await asyncio.open_connection(
                    address.host, address.port, ssl=_tls() if address.is_tls else None, limit=2 * _PART_BYTES
                )
        except (OSError, TimeoutError) as error:
            is_silent = isinstance(error, TimeoutError)
            raise ServerGone(
                f"{address} cannot be reached: {_reason(error)}", server=str(address), is_silent=is_silent
            ) from None
        return cls(address, reader, writer)

    async def ask(
        self, method: str, path: str, headers: RawHeaders, body: bytes = b"", *, streams: bool = False
    ) -> None:
        """Send a request and wait for the head of its answer.

        Args:
            path: with the query; the address's base path is prepended.
            headers: without host, length and connection.
            streams: the answer is a stream of events.

        Raises:
            ServerGone: no head comes within `HEAD_S` or `ANSWER_S`.
        """
        address = self._address
        shown = f"[{address.host}]" if ":" in address.host else address.host
        length = [(b"content-length", b"%d" % len(body))] if body or method == "POST" else []
        request = h11.Request(
            method=method,
            target=f"{address.base_path}{path}",
            headers=[
                (b"host", f"{shown}:{address.port}".encode()), (b"connection", b"close"), *headers, *length,
            ],
        )  # fmt: skip
        # Do not drain: a server may answer before it has read the body, which is in memory anyway.
        self._writer.write(self._protocol.send(request) or b"")
        self._writer.write(self._protocol.send(h11.Data(data=body)) or b"")
        self._protocol.send(h11.EndOfMessage())
        until = time.monotonic() + (HEAD_S if streams else ANSWER_S)
        for _ in range(_MOST_INTERIM):
            event = await self._next(until - time.monotonic())
            if isinstance(event, h11.Response):
                self.status, self.headers = event.status_code, list(event.headers)
                return
        raise ServerGone(f"{address} sent no answer", server=str(address))

    def header(self, name: bytes) -> bytes:
        """The first value of a header; empty if there is none."""
        return next((value for key, value in self.headers if key == name), b"")

    async def parts(self) -> AsyncGenerator[bytes, None]:
        """The body, part by part, until it is complete.

        Raises:
            ServerGone: it ended early, or the server is silent for too long.
        """
        while isinstance(event := await self._next(STALL_S), h11.Data):
            yield bytes(event.data)

    async def _next(self, within_s: float) -> h11.Event:
        try:
            async with asyncio.timeout(within_s):
                while (event := self._protocol.next_event()) is h11.NEED_DATA:
                    self._protocol.receive_data(await self._reader.read(_PART_BYTES))
                    self.heard_at = time.monotonic()
        except TimeoutError:
            raise ServerGone(
                f"{self._address} sent nothing for {within_s:.0f} s", server=str(self._address)
            ) from None
        except (OSError, h11.RemoteProtocolError) as error:
            raise ServerGone(
                f"{self._address} broke off: {_reason(error)}", server=str(self._address)
            ) from None
        if not isinstance(event, h11.Event) or isinstance(event, h11.ConnectionClosed):
            raise ServerGone(f"{self._address} broke off: the connection ended", server=str(self._address))
        return event

    def close(self) -> None:
        """Close the connection at once, so that the server stops an answer whose client has left."""
        self._writer.transport.abort()


async def is_ready(address: Address, *, timeout_s: float) -> bool:
    """Whether a server accepts requests: `GET /ready` is 200 if it does, and 503 if not.

    Raises:
        ServerGone: the server gives no answer within `timeout_s`, or a different one.
    """
    try:
        async with asyncio.timeout(timeout_s):
            reply = await Reply.connect(address)
            try:
                await reply.ask("GET", "/ready", [])
            finally:
                reply.close()
            if reply.status not in (200, 503):
                raise ServerGone(f"{address} answers GET /ready with {reply.status}", server=str(address))
            return reply.status == 200
    except TimeoutError:
        raise ServerGone(
            f"{address} does not answer within {timeout_s:.0f} s", server=str(address), is_silent=True
        ) from None


@functools.cache
def _tls() -> ssl.SSLContext:
    """Cached: reading the system's certificates takes longer than a request."""
    return ssl.create_default_context()


def _reason(error: BaseException) -> str:
    """Say what went wrong, without a server's own words."""
    if isinstance(error, h11.RemoteProtocolError):
        return "it does not speak HTTP" if "incomplete" not in str(error) else "its answer is not complete"
    if isinstance(error, TimeoutError):
        return f"no connection within {CONNECT_S:.0f} s"
    return getattr(error, "strerror", None) or type(error).__name__
