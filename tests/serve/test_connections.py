"""Limits on connections: their number, and how long one may be idle."""

from __future__ import annotations

import resource
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import httpx
import pytest

from argosy.errors import UsageError
from argosy.guard.keys import KeyRing
from argosy.serve.answer.service import Service
from argosy.serve.app import make_app
from argosy.serve.http import server as http_server
from tests.serve.conftest import only, start
from tests.serve.dialects import DIALECTS, PATHS, greedy

MOST = 3


@pytest.fixture
def address(service: Service) -> Iterator[tuple[str, int]]:
    app = make_app(only(service), KeyRing(None), block_tokens=16, max_sequences=8)
    for url in start(app, max_connections=MOST):
        host, _, port = url.removeprefix("http://").partition(":")
        yield host, int(port)


def connect(address: tuple[str, int], stack: ExitStack) -> socket.socket:
    """A connection that the server has accepted, because it has answered one request."""
    connection = stack.enter_context(socket.create_connection(address, timeout=20))
    connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    found = b""
    while b'{"status":"ok"}' not in found:
        part = connection.recv(1 << 16)
        assert part, found
        found += part
    return connection


@pytest.mark.parametrize("dialect", DIALECTS)
def test_one_connection_too_many_gets_a_503_in_its_dialect_and_is_closed(
    address: tuple[str, int], dialect: str
) -> None:
    url = f"http://{address[0]}:{address[1]}{PATHS[dialect]}"
    with ExitStack() as stack:
        idle = [connect(address, stack) for _ in range(MOST)]
        answer = httpx.post(url, json=greedy(dialect, "Hi", 1), timeout=20)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert answer.headers["connection"] == "close"
        error = answer.json()
        assert error["error"]["type"] == "overloaded_error"
        assert error["error"]["message"] == "the server has reached its limit on connections"
        assert ("type" in error) == (dialect == "messages")
        idle[0].close()  # makes room for another client
        deadline = time.monotonic() + 20
        while httpx.post(url, json=greedy(dialect, "Hi", 1), timeout=20).status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_connections_far_beyond_the_limit_are_closed_without_an_answer(
    address: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "_TOLD_CONNECTIONS", 2)
    with ExitStack() as stack:
        idle = [stack.enter_context(socket.create_connection(address, timeout=20)) for _ in range(MOST + 2)]
        assert idle
        more = stack.enter_context(socket.create_connection(address, timeout=20))
        with suppress(ConnectionResetError):
            assert more.recv(1) == b""


def test_an_idle_connection_is_closed(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "KEEP_ALIVE_S", 0.2)
    for url in start(make_app(only(service), KeyRing(None), block_tokens=16, max_sequences=8)):
        host, _, port = url.removeprefix("http://").partition(":")
        with ExitStack() as stack:
            connection = connect((host, int(port)), stack)
            began = time.monotonic()
            assert connection.recv(1) == b""
            assert time.monotonic() - began < 10 < http_server.HEADER_S


def test_more_connections_than_open_files_allow_are_refused_at_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    raised: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 1024))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: raised.append(limits))
    monkeypatch.setattr(http_server, "_num_open_files", lambda: 40)
    with pytest.raises(
        UsageError, match="5000 connections need 5360 open files, and the limit is 1024"
    ) as refused:
        http_server.make_room_for_files(5000)
    assert "--max-connections 664" in str(refused.value)
    http_server.make_room_for_files(512)
    assert set(raised) == {(1024, 1024)}
    monkeypatch.setattr(http_server, "_num_open_files", lambda: 40 + 2 * 163)  # a model in 163 parts
    with pytest.raises(UsageError, match="512 connections need 1198 open files"):
        http_server.make_room_for_files(512)
