"""Streams end what they began, also when nobody is there to hear the first event."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from starlette.requests import Request

from argosy.serve import streams
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


def test_a_comment_comes_while_nothing_else_does_and_no_event_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(streams, "KEEP_ALIVE_S", 0.01)
    sent: list[bytes] = []

    async def parts() -> AsyncIterator[bytes]:
        yield b"data: 1\n\n"
        await asyncio.sleep(0.1)
        yield b"data: 2\n\n"

    async def send(message: dict[str, Any]) -> None:
        sent.append(message.get("body", b""))

    async def receive() -> dict[str, str]:
        await asyncio.sleep(3600)
        return {"type": "http.disconnect"}

    asyncio.run(EventStream(parts())({"type": "http"}, receive, send))  # type: ignore[arg-type]
    assert [part for part in sent if part and not part.startswith(b":")] == [b"data: 1\n\n", b"data: 2\n\n"]
    assert 2 <= sent.count(b": keep-alive\n\n") <= 10
    assert sent.index(b"data: 1\n\n") < sent.index(b": keep-alive\n\n") < sent.index(b"data: 2\n\n")


@pytest.mark.parametrize("num_turns", range(12))
def test_a_client_that_goes_while_events_come_one_after_the_other_ends_the_stream(num_turns: int) -> None:
    """Whenever it goes, told in turns of the loop: a cancellation must not get lost with the end of a write."""
    closed: list[bool] = []
    num_sent = asyncio.run(asyncio.wait_for(_leave(num_turns, lambda: closed.append(True)), 20))
    assert num_sent < 50
    assert closed == [True]


async def _leave(num_turns: int, close: Callable[[], None]) -> int:
    """How many events were sent to a client that went so many turns of the loop after the tenth."""
    gone, count = asyncio.Event(), 0

    async def parts() -> AsyncIterator[bytes]:
        for _ in range(1000):
            yield b"data: 1\n\n"

    async def send(_: Any) -> None:
        nonlocal count
        count += 1
        if count == 10:
            gone.set()

    async def receive() -> dict[str, str]:
        await gone.wait()
        for _ in range(num_turns):
            await asyncio.sleep(0)
        return {"type": "http.disconnect"}

    await EventStream(parts(), close)({"type": "http"}, receive, send)  # type: ignore[arg-type]
    return count
