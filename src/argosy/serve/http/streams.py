"""Send answers as a stream of events, with a failure as the last event.

    an event  ->  Encoding.write  ->  bytes: a server-sent event, or a line of JSON

An unstreamed answer is sent when it is complete. After WHOLE_S, newlines, which JSON allows before its value, keep
the connection alive until then. Clients give up after five or ten silent minutes, proxies after one.

Elsewhere: the content and the encoding are up to each dialect.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from argosy.serve.http.access import Dialect
from argosy.serve.http.caller import Caller
from argosy.serve.http.failures import error_body, report
from argosy.serve.http.running import GoneAway

KEEP_ALIVE_S = 10.0
# Silence before an unstreamed answer; until then its status may still be that of an error.
WHOLE_S = 30.0
DONE = "[DONE]"  # OpenAI's last event
COMMENT = b": keep-alive\n\n"  # clients ignore it


def sse(data: object, event: str | None = None) -> bytes:
    """Encode one server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    head = b"" if event is None else f"event: {event}\n".encode()
    return head + f"data: {text}\n\n".encode("utf-8", "replace")


def json_line(data: object, event: str | None = None) -> bytes:
    """Encode one event as a line of JSON, which has no room for a name."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace") + b"\n"


@dataclass(frozen=True, slots=True)
class Encoding:
    """How a stream writes its events.

    media_type: the content type of the stream.
    write: encodes the data of an event, given its name if it has one.
    """

    media_type: str
    write: Callable[[object, str | None], bytes]


SSE = Encoding("text/event-stream", sse)
JSON_LINES = Encoding("application/x-ndjson", json_line)
_WHOLE = Encoding("application/json", json_line)


def error_event(error: Exception, dialect: Dialect, caller: Caller) -> bytes:
    """Encode a failure as the last event of a stream."""
    _, body = error_body(error, dialect, caller.request_id)
    return json_line(body) if dialect == "ollama" else sse(body, "error" if dialect == "anthropic" else None)


class EventStream(Response):
    """Sends events as they are made, `idle` after every KEEP_ALIVE_S of silence, and a failure as the last event.

    The error that ends a request (`running.py`) is such a failure, unless the client has left. `failed` encodes a
    failure if the dialect has its own event for it. `close` is always called, even if no event was requested, and
    before the last event is sent, because a client that does not read must not delay the end. An event is requested
    once the previous one has been sent. The connection drops a client that reads nothing (`TimedProtocol`).
    """

    def __init__(
        self,
        parts: AsyncIterator[bytes],
        caller: Caller,
        close: Callable[[], None] = lambda: None,
        *,
        encoding: Encoding = SSE,
        idle: bytes = COMMENT,
        failed: Callable[[Exception], bytes] | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(
            headers={"x-accel-buffering": "no", **(headers or {})}, media_type=encoding.media_type
        )
        del self.headers["content-length"]
        self._parts = parts
        self._close = close
        self._caller = caller
        self._idle = idle
        self._failed = failed or (lambda error: error_event(error, "openai", caller))
        self._written_at = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def write(data: bytes, more: bool = True) -> None:
            self._written_at = time.monotonic()
            await send({"type": "http.response.body", "body": data, "more_body": more})

        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            failure = await self._send_parts(write)
        finally:
            self._close()
        self._caller.let_finish()
        if failure is not None:
            await write(self._failed(failure))
        await write(b"", more=False)

    async def _send_parts(self, write: Callable[[bytes], Awaitable[None]]) -> Exception | None:
        """Send the parts until they end; return the error that ended them early, if any."""
        keeping_alive = asyncio.ensure_future(self._keep_alive(write))
        try:
            async for part in self._parts:
                await write(part)
                # Even if parts are ready, let other tasks run, and let `Run.watch` notice that the client has left.
                await asyncio.sleep(0)
        except asyncio.CancelledError:
            ended = self._caller.ended
            if ended is None or isinstance(ended, GoneAway):
                raise
            return ended
        except Exception as error:
            report(error, self._caller.request_id)
            return error
        finally:
            # not awaited, because ending the request at that point would break off the answer
            keeping_alive.cancel()
            await self._parts.aclose()  # type: ignore[attr-defined]
        return None

    async def _keep_alive(self, write: Callable[[bytes], Awaitable[None]]) -> None:
        """One timer for the whole stream, because tokens are far more frequent than keep-alives."""
        while True:
            idle_s = time.monotonic() - self._written_at
            if idle_s >= KEEP_ALIVE_S:
                await write(self._idle)
                idle_s = 0.0
            await asyncio.sleep(KEEP_ALIVE_S - idle_s)


async def answer_whole(
    answer: Coroutine[Any, Any, Response],
    caller: Caller,
    close: Callable[[], None] = lambda: None,
    *,
    dialect: Dialect,
    headers: dict[str, str] | None = None,
) -> Response:
    """Send an unstreamed JSON answer: plainly within WHOLE_S, otherwise after newlines.

    After the first newline the status is 200, so a failure shows only in the body. The time counts from the
    request's arrival, because its client has heard nothing while its model was loaded or while a router waited for
    a server.

    Args:
        close: called if the request is ended or its answer comes late.
        headers: of an answer that comes late.

    Raises what `answer` raises within WHOLE_S.
    """
    answering = asyncio.ensure_future(answer)

    def stop() -> None:
        answering.cancel()
        close()

    async def parts() -> AsyncIterator[bytes]:
        response = await answering
        if isinstance(response, StreamingResponse):
            async for part in response.body_iterator:
                yield bytes(part)  # type: ignore[arg-type]
        else:
            yield bytes(response.body)

    try:
        await asyncio.wait({answering}, timeout=max(0.0, caller.began + WHOLE_S - time.monotonic()))
    except BaseException:
        stop()
        raise
    if answering.done():
        return answering.result()
    return EventStream(
        parts(), caller, stop, encoding=_WHOLE, idle=b"\n", headers=headers,
        failed=lambda error: json_line(error_body(error, dialect, caller.request_id)[1]),
    )  # fmt: skip
