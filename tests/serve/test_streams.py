"""Streams end what they began, also when nobody is there to hear the first event."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request

from argosy.serve.gate import GoneAway
from argosy.serve.streams import EventStream, until_gone


async def _endless() -> AsyncIterator[bytes]:
    while True:
        await asyncio.sleep(3600)
        yield b""


async def _gone() -> dict[str, Any]:
    return {"type": "http.disconnect"}


async def _nowhere(_: Any) -> None:
    await asyncio.sleep(3600)  # a client that reads nothing


def test_a_stream_whose_client_is_gone_before_the_first_event_is_closed() -> None:
    closed: list[bool] = []
    stream = EventStream(_endless(), lambda: closed.append(True))
    asyncio.run(asyncio.wait_for(stream({"type": "http"}, _gone, _nowhere), 10))  # type: ignore[arg-type]
    assert closed == [True]


def test_a_whole_answer_whose_client_is_gone_is_closed() -> None:
    closed: list[bool] = []

    async def work() -> None:
        await asyncio.sleep(3600)

    async def ask() -> None:
        request = Request({"type": "http", "headers": []}, _gone)  # type: ignore[arg-type]
        try:
            await until_gone(request, work(), lambda: closed.append(True))
        except GoneAway:
            closed.append(False)

    asyncio.run(asyncio.wait_for(ask(), 10))
    assert closed == [True, False]
