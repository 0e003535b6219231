"""Answers on the wire: whole, or as server-sent events; whoever hangs up cancels.

Elsewhere: what is sent is each dialect's own.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from argosy.errors import ArgosyError
from argosy.serve.gate import Dialect, GoneAway, error_body

KEEP_ALIVE_S = 10.0
DONE = "[DONE]"  # OpenAI's last event

T = TypeVar("T")


def sse(data: object, event: str | None = None) -> bytes:
    """One event."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    head = b"" if event is None else f"event: {event}\n".encode()
    return head + f"data: {text}\n\n".encode("utf-8", "replace")


async def until_gone(request: Request, work: Coroutine[Any, Any, T], close: Callable[[], None]) -> T:
    """The result of `work`, unless the client hangs up before: then it is cancelled. `close` is called at the end.

    Raises:
        GoneAway: it hung up.
    """
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return await working
        raise GoneAway
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)
        close()  # cancelled before it began, `work` has closed nothing


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Events as they come, a comment every KEEP_ALIVE_S while none does, and an error as the last event.

    `close` is called at the end, also when the client was gone before the first event was asked for. The next event is
    asked for when the last is on its way; who reads nothing is cut off by the connection (`run.TimedProtocol`).
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        parts: AsyncIterator[bytes],
        close: Callable[[], None] = lambda: None,
        *,
        dialect: Dialect = "openai",
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(headers={"x-accel-buffering": "no", **(headers or {})})
        del self.headers["content-length"]
        self._parts = parts
        self._close = close
        self._dialect: Dialect = dialect

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.ensure_future(_gone(receive))
        sending = asyncio.ensure_future(self._send(send))
        try:
            await asyncio.wait({gone, sending}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                await sending
        finally:
            for task in (gone, sending):
                task.cancel()
            await asyncio.gather(gone, sending, return_exceptions=True)
            self._close()

    async def _send(self, send: Send) -> None:
        async def write(data: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        upcoming: asyncio.Future[bytes] | None = None
        try:
            while True:
                upcoming = asyncio.ensure_future(anext(self._parts))
                while not (await asyncio.wait({upcoming}, timeout=KEEP_ALIVE_S))[0]:
                    await write(b": keep-alive\n\n")
                await write(await upcoming)
        except StopAsyncIteration:
            await write(b"", more=False)
        except ArgosyError as error:
            _, body = error_body(error, self._dialect)
            await write(sse(body, "error" if self._dialect == "anthropic" else None), more=False)
        finally:
            if upcoming is not None:
                upcoming.cancel()
                await asyncio.gather(upcoming, return_exceptions=True)
            await self._parts.aclose()  # type: ignore[attr-defined]
