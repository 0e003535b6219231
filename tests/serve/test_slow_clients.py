"""Slow clients: each has a time limit, and no other client waits for it."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from argosy.serve.answer.service import Service
from argosy.serve.http.server import TimedProtocol

SAY = [{"role": "user", "content": "How are you?"}]
# Every dialect's longest stream: eight answers, or as many tokens as fit the context.
STREAMS: dict[str, dict[str, Any]] = {
    # Log-probabilities come token by token. A busy machine sends text in so few deltas that buffers hold all of them.
    "/v1/chat/completions": {
        "messages": SAY,
        "n": 8,
        "logit_bias": {"2": -100, "0": -100},
        "logprobs": True,
        "top_logprobs": 20,
    },
    "/v1/completions": {
        "prompt": ["How are you?"] * 4,
        "n": 2,
        "max_tokens": 200,
        "logit_bias": {"2": -100, "0": -100},
        "logprobs": 5,
    },
    "/v1/responses": {
        "input": "How are you?",
        "temperature": 0,
        "include": ["message.output_text.logprobs"],
        "top_logprobs": 20,
    },
    "/v1/messages": {"messages": SAY, "max_tokens": 200, "temperature": 0},
}
every_dialect = pytest.mark.parametrize("path", STREAMS)


@contextmanager
def asked(url: str, path: str, body: dict[str, Any]) -> Iterator[socket.socket]:
    """A connection that has sent a request, with as small a receive buffer as possible."""
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.settimeout(20)
        connection.connect((host, int(port)))
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        yield connection


def rest(connection: socket.socket) -> bytes:
    """Everything that still arrives until the server closes the connection."""
    found = b""
    try:
        while part := connection.recv(1 << 16):
            found += part
    except ConnectionResetError:
        pass
    return found


def wait_until_free(service: Service) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        facts = service.loop.snapshot().engine
        if not (facts.num_running or facts.num_waiting or facts.kv_blocks_held):
            return
        time.sleep(0.02)
    raise AssertionError((facts.num_running, facts.num_waiting, facts.kv_blocks_held))


@pytest.fixture
def lost(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The port of each client whose connection the server has given up."""
    lost, lose = list[int](), TimedProtocol.connection_lost

    def noticed(protocol: TimedProtocol, error: Exception | None) -> None:
        lost.append(protocol.client[1] if protocol.client else 0)
        lose(protocol, error)

    monkeypatch.setattr(TimedProtocol, "connection_lost", noticed)
    return lost


def wait_until_lost(connection: socket.socket, lost: list[int]) -> None:
    port = connection.getsockname()[1]
    until = time.monotonic() + 20
    while port not in lost:
        assert time.monotonic() < until
        time.sleep(0.01)


@every_dialect
def test_a_client_that_does_not_read_a_stream_is_cut_off_and_delays_nobody(
    url: str,
    client: httpx.Client,
    service: Service,
    monkeypatch: pytest.MonkeyPatch,
    lost: list[int],
    path: str,
) -> None:
    monkeypatch.setattr("argosy.serve.http.server.STUCK_S", 0.2)
    monkeypatch.setattr("argosy.serve.http.server._SEND_BUFFER_BYTES", 4096)
    with asked(url, path, STREAMS[path] | {"stream": True}) as connection:
        began = time.monotonic()
        assert client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2}).status_code == 200
        assert time.monotonic() - began < 5
        wait_until_free(service)
        wait_until_lost(connection, lost)
        found = rest(connection)
    assert found.startswith(b"HTTP/1.1 200")
    assert not found.endswith(b"0\r\n\r\n")  # the stream was cut off


@every_dialect
def test_events_queued_for_a_slow_reader_are_bounded_and_its_answer_ends(
    url: str, service: Service, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    submitted, submit = threading.Event(), service.loop.submit

    def noted(*given: Any, **more: Any) -> Any:
        request = submit(*given, **more)
        submitted.set()
        return request

    monkeypatch.setattr(service.loop, "submit", noted)
    monkeypatch.setattr("argosy.serve.answer.answers.MOST_UNREAD", 20)
    monkeypatch.setattr("argosy.serve.http.server._SEND_BUFFER_BYTES", 4096)
    with asked(url, path, STREAMS[path] | {"stream": True}) as connection:
        assert submitted.wait(20)
        wait_until_free(service)  # the client reads nothing while the answer is generated
        found = rest_of_stream(connection)
    assert "the client read the answer too slowly: more than 20 events waited" in found


def rest_of_stream(connection: socket.socket) -> str:
    found = b""
    while not found.endswith(b"0\r\n\r\n"):
        part = connection.recv(1 << 16)
        assert part
        found += part
    return found.decode()


def test_a_client_that_does_not_read_a_whole_answer_is_cut_off(
    url: str, monkeypatch: pytest.MonkeyPatch, lost: list[int]
) -> None:
    monkeypatch.setattr("argosy.serve.http.server.STUCK_S", 0.1)
    with asked(url, "/detokenize", {"tokens": [40] * 400_000}) as connection:
        found = connection.recv(1)  # waits for the answer, however long it takes
        wait_until_lost(connection, lost)
        found += rest(connection)
    head, _, body = found.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    assert len(body) < length


def test_a_client_that_reads_slowly_but_steadily_is_not_cut_off(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("argosy.serve.http.server.STUCK_S", 0.2)
    monkeypatch.setattr("argosy.serve.http.server._SEND_BUFFER_BYTES", 4096)
    with asked(url, "/detokenize", {"tokens": [40] * 60_000}) as connection:
        found = b""
        length = None
        while length is None or len(found) < length:
            time.sleep(0.01)
            part = connection.recv(4096)
            assert part
            found += part
            head, end, _ = found.partition(b"\r\n\r\n")
            if end and length is None:
                size = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
                length = len(head) + 4 + size
    assert found.endswith(b"}")


def trickle(url: str, data: bytes, seconds: float) -> bytes:
    """Send byte after byte until the server hangs up; return its answer."""
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        deadline = time.monotonic() + seconds
        try:
            for at in range(len(data)):
                assert time.monotonic() < deadline, "nobody stopped it"
                connection.sendall(data[at : at + 1])
                time.sleep(0.02)
        except (ConnectionResetError, BrokenPipeError):
            pass
        return rest(connection)


def test_a_trickling_head_has_a_total_time_limit(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("argosy.serve.http.server.HEADER_S", 0.2)
    assert trickle(url, b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"x" * 1000, 5) == b""


@every_dialect
def test_a_trickling_body_has_a_total_time_limit(
    url: str, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr("argosy.serve.http.incoming.BODY_S", 0.2)
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n".encode()
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(head + b"Content-Length: 1000\r\n\r\n")
        began = time.monotonic()
        connection.settimeout(0.02)
        found = b""
        while time.monotonic() - began < 5 and not found:
            connection.sendall(b" ")
            try:
                found = connection.recv(1 << 16)
            except TimeoutError:
                continue
        connection.settimeout(10)
        while not found.partition(b"\r\n\r\n")[2]:  # the head may arrive alone
            found += connection.recv(1 << 16)
    assert found.startswith(b"HTTP/1.1 408")
    error = json.loads(found.partition(b"\r\n\r\n")[2])
    assert error["error"]["message"] == "the body took too long to arrive"
    assert ("type" in error) == path.startswith("/v1/messages")
