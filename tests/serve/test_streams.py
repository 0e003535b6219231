"""Streams close what they opened, even if the client is gone before the first event or never reads the last."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from starlette.responses import Response

from argosy.errors import Revoked
from argosy.serve.http.caller import Caller
from argosy.serve.http.running import GoneAway
from argosy.serve.http.streams import WHOLE_S, EventStream, answer_whole
from tests.serve.conftest import start


async def _endless() -> AsyncIterator[bytes]:
    while True:
        await asyncio.sleep(3600)
        yield b""


async def _gone() -> dict[str, Any]:
    return {"type": "http.disconnect"}


async def _nowhere(_: Any) -> None:
    await asyncio.sleep(3600)  # the client reads nothing


def test_a_stream_whose_client_is_gone_before_the_first_event_is_closed() -> None:
    closed: list[bool] = []
    caller = Caller()
    stream = EventStream(_endless(), caller, lambda: closed.append(True))
    with pytest.raises(GoneAway):
        asyncio.run(asyncio.wait_for(run(stream, caller, _gone, _nowhere), 10))
    assert closed == [True]


async def run(stream: EventStream, caller: Caller, receive: Any, send: Any) -> None:
    """Send a stream as the gate does, until it ends or its client leaves."""
    with caller.running.entered(caller):
        caller.watch(receive)
        await stream({"type": "http"}, receive, send)


def sent_by(stream: EventStream) -> list[bytes]:
    """The bodies of the messages that a stream sends until it ends."""
    bodies: list[bytes] = []

    async def send(message: Any) -> None:
        bodies.append(message.get("body", b"the head"))

    async def receive() -> Any:
        await asyncio.sleep(3600)

    asyncio.run(asyncio.wait_for(stream({"type": "http"}, receive, send), 10))  # type: ignore[arg-type]
    return bodies


def test_a_stream_sends_keep_alives_only_while_it_has_no_events(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("argosy.serve.http.streams.KEEP_ALIVE_S", 0.2)

    async def parts() -> AsyncIterator[bytes]:
        for number in range(10):
            yield b"%d" % number
            await asyncio.sleep(0.025)
        await asyncio.sleep(0.3)
        yield b"late"

    sent = sent_by(EventStream(parts(), Caller()))
    assert sent[:11] == [b"the head", *(b"%d" % number for number in range(10))]
    assert set(sent[11:-2]) == {b": keep-alive\n\n"}
    assert sent[-2:] == [b"late", b""]


def test_a_whole_answer_begins_at_once_if_its_client_has_waited_long_enough_before() -> None:
    """Behind a router, whose server has begun after as long, the client would wait twice."""

    async def begun() -> Response:
        has_begun = asyncio.Event()

        async def answer() -> Response:
            await has_begun.wait()
            return Response(b"{}")

        caller = Caller(began=time.monotonic() - WHOLE_S)
        response = await answer_whole(answer(), caller, lambda: None, dialect="openai", headers={})
        has_begun.set()
        return response

    response = asyncio.run(asyncio.wait_for(begun(), WHOLE_S - 5))
    assert isinstance(response, EventStream)


def test_a_client_that_reads_nothing_of_its_answer_is_disconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("argosy.serve.http.server.STUCK_S", 0.1)
    size, heard, has_heard = 16 << 20, list[str](), threading.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x" * size, "more_body": True})
        await receive()
        heard.append((await receive())["type"])
        has_heard.set()

    for url in start(app):
        host, _, port = url.removeprefix("http://").partition(":")
        with socket.create_connection((host, int(port)), timeout=10) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            assert has_heard.wait(10)
            assert heard == ["http.disconnect"]
            received = 0
            with contextlib.suppress(ConnectionResetError):
                while part := client.recv(1 << 20):
                    received += len(part)
            assert received < size


def test_a_client_that_has_sent_another_request_and_leaves_ends_the_first() -> None:
    has_begun, has_heard, heard = threading.Event(), threading.Event(), list[str]()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        has_begun.set()
        heard.append((await receive())["type"])
        has_heard.set()

    for url in start(app):
        host, _, port = url.removeprefix("http://").partition(":")
        with socket.create_connection((host, int(port)), timeout=10) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            assert has_begun.wait(10)
            client.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert has_heard.wait(10)
        assert heard == ["http.disconnect"]


@pytest.mark.parametrize("num_turns", range(12))
def test_a_client_that_leaves_during_a_burst_of_events_ends_the_stream(num_turns: int) -> None:
    """The client leaves some turns of the event loop later: the end of a write must not lose the cancellation."""
    closed: list[bool] = []
    num_sent = asyncio.run(asyncio.wait_for(_leave(num_turns, lambda: closed.append(True)), 20))
    assert num_sent < 50
    assert closed == [True]


async def _leave(num_turns: int, close: Callable[[], None]) -> int:
    """The number of events sent to a client that leaves `num_turns` turns of the event loop after the tenth event."""
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

    caller = Caller()
    with pytest.raises(GoneAway):
        await run(EventStream(parts(), caller, close), caller, receive, send)
    return count


def test_a_stream_that_is_ended_stops_its_work_before_its_client_reads_the_end() -> None:
    closed, sent = list[str](), list[bytes]()

    async def parts() -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"data: 1\n\n"
        finally:
            closed.append("parts")

    async def test() -> None:
        reads, is_full = asyncio.Event(), asyncio.Event()

        async def send(message: Any) -> None:
            if "body" in message:
                is_full.set()
                await reads.wait()
                sent.append(message["body"])

        caller = Caller()
        stream = EventStream(parts(), caller, lambda: closed.append("stream"))
        answering = asyncio.create_task(run(stream, caller, asyncio.Event().wait, send))
        await is_full.wait()
        caller.end(Revoked("the key was revoked"))
        for _ in range(20):
            await asyncio.sleep(0)
        assert (closed, sent) == (["parts", "stream"], [])
        reads.set()
        await answering
        assert b"the key was revoked" in sent[0]
        assert sent[1:] == [b""]

    asyncio.run(asyncio.wait_for(test(), 10))


@pytest.mark.parametrize("num_turns", range(12))
def test_a_stream_that_is_ended_near_its_own_end_is_complete(num_turns: int) -> None:
    """Some turns of the event loop after its only part, and each message takes a turn."""
    sent: list[Any] = []

    async def parts() -> AsyncIterator[bytes]:
        yield b"data: 1\n\n"

    async def test() -> None:
        has_begun = asyncio.Event()

        async def send(message: Any) -> None:
            has_begun.set()
            await asyncio.sleep(0)
            sent.append(message)

        caller = Caller()
        answering = asyncio.create_task(run(EventStream(parts(), caller), caller, asyncio.Event().wait, send))
        await has_begun.wait()
        for _ in range(num_turns):
            await asyncio.sleep(0)
        caller.end(Revoked("the key was revoked"))
        with contextlib.suppress(Revoked):  # before its head was sent
            await answering

    asyncio.run(asyncio.wait_for(test(), 10))
    assert not sent or sent[-1]["more_body"] is False
