"""Request smuggling, byte by byte: no ambiguous request end hides a second request."""

from __future__ import annotations

import re
import socket
import time
from contextlib import suppress

import pytest

from argosy.serve.http import access, incoming
from argosy.serve.http import server as http_server

HEAD = b"POST /tokenize HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
HIDDEN = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
BODY = b'{"content": "a"}'


def connect(url: str) -> socket.socket:
    host, _, port = url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=10)


def answers(url: str, *parts: bytes) -> bytes:
    """Send the parts; return everything the server sends until it closes the connection."""
    with connect(url) as connection:
        for part in parts:
            connection.sendall(part)
        found = b""
        with suppress(ConnectionResetError):
            while part := connection.recv(1 << 16):
                found += part
        return found


def statuses(found: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", found)]


CHUNKED = b"Transfer-Encoding: chunked\r\n"
SMUGGLED = {
    "both, and the chunks end first": (
        HEAD + b"Content-Length: %d\r\n" % (5 + len(HIDDEN)) + CHUNKED + b"\r\n0\r\n\r\n" + HIDDEN
    ),
    "both, and the length ends first": (
        HEAD + b"Content-Length: 4\r\n" + CHUNKED + b"\r\n%x\r\n" % len(HIDDEN) + HIDDEN + b"\r\n0\r\n\r\n"
    ),
    "both, and both are right": (
        HEAD + b"Content-Length: 26\r\n" + CHUNKED + b"\r\n10\r\n" + BODY + b"\r\n0\r\n\r\n" + HIDDEN
    ),
    "chunks in HTTP/1.0": (
        HEAD.replace(b"HTTP/1.1", b"HTTP/1.0") + b"Connection: keep-alive\r\n" + CHUNKED
        + b"\r\n10\r\n" + BODY + b"\r\n0\r\n\r\n" + HIDDEN
    ),
    "two lengths": HEAD + b"Content-Length: 0\r\nContent-Length: %d\r\n\r\n" % len(HIDDEN) + HIDDEN,
    "lengths in one header": HEAD + b"Content-Length: 0, %d\r\n\r\n" % len(HIDDEN) + HIDDEN,
    "a length with a sign": HEAD + b"Content-Length: +0\r\n\r\n" + HIDDEN,
    "a length below zero": HEAD + b"Content-Length: -1\r\n\r\n" + HIDDEN,
    "a length in another base": HEAD + b"Content-Length: 0x0\r\n\r\n" + HIDDEN,
    "a length of 5,000 digits": HEAD + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n" + HIDDEN,
    "a length with a space before its colon": HEAD + b"Content-Length : 0\r\n\r\n" + HIDDEN,
    "another coding": HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n" + HIDDEN,
    "a coding twice": HEAD + CHUNKED + CHUNKED + b"\r\n0\r\n\r\n" + HIDDEN,
    "a coding that nobody knows": HEAD + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + HIDDEN,
    "a size of a chunk with an underscore": HEAD + CHUNKED + b"\r\n1_0\r\n" + BODY + b"\r\n0\r\n\r\n" + HIDDEN,
    "a size of a chunk below zero": HEAD + CHUNKED + b"\r\n-1\r\n\r\n" + HIDDEN,
    "a size of a chunk beyond 64 bits": HEAD + CHUNKED + b"\r\n" + b"f" * 40 + b"\r\n" + HIDDEN,
    "a chunk longer than its size": HEAD + CHUNKED + b"\r\n1\r\n" + BODY + b"\r\n0\r\n\r\n" + HIDDEN,
    "a zero byte in a header": HEAD + b"X: a\x00b\r\nContent-Length: 0\r\n\r\n" + HIDDEN,
    "a carriage return in a header": HEAD + b"X: a\rContent-Length: 0\r\n\r\n" + HIDDEN,
    "two hosts": HEAD + b"Host: localhost\r\nContent-Length: 0\r\n\r\n" + HIDDEN,
    "two content types": HEAD + b"Content-Type: application/json\r\nContent-Length: 0\r\n\r\n" + HIDDEN,
}  # fmt: skip


@pytest.mark.parametrize("name", SMUGGLED)
def test_a_request_hidden_in_another_is_never_answered(url: str, name: str) -> None:
    found = answers(url, SMUGGLED[name])
    assert b'{"status":"ok"}' not in found
    assert statuses(found) in ([400], [501]), found


def test_pipelined_requests_are_answered_in_order(url: str) -> None:
    whole = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
    pieces = HEAD + CHUNKED + b"\r\n8\r\n" + BODY[:8] + b"\r\n8\r\n" + BODY[8:] + b"\r\n0\r\n\r\n"
    found = answers(url, whole + pieces + HIDDEN)
    assert statuses(found) == [200, 200, 200]
    assert found.endswith(b'{"status":"ok"}')


def test_an_endless_head_is_refused_long_before_the_timeout(url: str) -> None:
    with connect(url) as connection:
        began = time.monotonic()
        connection.sendall(b"GET /health HTTP/1.1\r\nX: " + b"a" * (40 << 10))
        assert connection.recv(12) == b"HTTP/1.1 400"
        assert time.monotonic() - began < http_server.HEADER_S / 2


REFUSED = {
    "a host that is not ours": (HEAD.replace(b"127.0.0.1", b"evil.example"), 403),
    "another site": (HEAD + b"Origin: http://evil.example\r\n", 403),
    "no JSON": (HEAD.replace(b"application/json", b"text/plain"), 415),
    "no such path": (HEAD.replace(b"/tokenize", b"/nothing"), 404),
    "another method": (HEAD.replace(b"/tokenize", b"/health"), 405),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_request_keeps_its_connection_open_only_if_its_whole_body_was_read(
    url: str, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(incoming, "_DISCARD_S", 0.2)
    head, status = REFUSED[name]
    length = b"Content-Length: %d\r\n\r\n" % len(HIDDEN)
    whole = answers(url, head + length + HIDDEN + HIDDEN)  # the first is the body
    assert statuses(whole) == [status, 200]
    half = answers(url, head + length + HIDDEN[:20], HIDDEN)
    assert statuses(half)[0] == status
    cut = answers(url, head + b"Content-Length: 5000\r\n\r\n" + HIDDEN)
    assert statuses(cut) == [status]
    assert b"\r\nconnection: close\r\n" in cut.lower()
    awaited = answers(url, head + b"Expect: 100-continue\r\nContent-Length: 50\r\n\r\n")
    assert statuses(awaited) == [status]  # no 100 Continue for a refused request
    assert b"\r\nconnection: close\r\n" in awaited.lower()


def test_a_refused_client_gets_its_answer_even_after_a_large_body(url: str) -> None:
    """If the server closed the connection first, the client's system would drop the answer."""
    size = 4 << 20
    head = REFUSED["no JSON"][0] + b"Content-Length: %d\r\n\r\n" % size
    with connect(url) as connection:
        connection.sendall(head + b"a" * size)
        assert connection.recv(12) == b"HTTP/1.1 415"


def test_a_client_with_too_large_a_body_gets_a_413(url: str) -> None:
    size = access.MAX_BODY_BYTES + (8 << 20)
    with connect(url) as connection:
        connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % size + b"a" * size)
        assert connection.recv(12) == b"HTTP/1.1 413"


def test_an_endless_body_is_abandoned(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(incoming, "_MOST_DISCARDED_BYTES", 100_000)
    with connect(url) as connection:
        connection.sendall(REFUSED["no JSON"][0] + CHUNKED + b"\r\n")
        with suppress(ConnectionError):
            for _ in range(10_000):
                connection.sendall(b"8000\r\n" + b"a" * 0x8000 + b"\r\n")
            raise AssertionError("300 MB were taken")


# ── HEAD ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "path",
    ["/", "/health", "/ready", "/openapi.json", "/page/app.js", "/favicon.ico", "/v1/models", "/metrics"],
)
def test_head_is_answered_like_get_without_the_body(url: str, path: str) -> None:
    ask = b" %s HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" % path.encode()
    given, _, body = answers(url, b"GET" + ask + HIDDEN).partition(b"\r\n\r\n")
    head, _, rest = answers(url, b"HEAD" + ask + HIDDEN).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert body
    assert rest.startswith(b"HTTP/1.1 200")  # the answer to the next request, so HEAD has no body
    assert fields(head) == fields(given)
    assert b"content-length" in fields(head)


def fields(head: bytes) -> dict[bytes, bytes]:
    """The header fields, with values that vary between requests left empty."""
    found = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:])
    varies = {b"x-request-id"} | (
        {b"content-length"} if found[b"content-type"].startswith(b"text/plain") else set()
    )
    return {name: b"" if name in varies else value for name, value in found.items()}


def test_head_on_a_stream_route_ends_and_closes_the_stream(url: str) -> None:
    found = answers(url, b"HEAD /v1/engine/events HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" + HIDDEN)
    assert statuses(found) == [200, 200]
    assert b"text/event-stream" in found
    assert b"\ndata:" not in found


def test_head_is_refused_wherever_get_is(url: str) -> None:
    for path, status in ((b"/nothing", 404), (b"/v1/messages", 405), (b"/v1/models/nothing", 404)):
        found = answers(url, b"HEAD %s HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" % path + HIDDEN)
        assert statuses(found) == [status, 200]
        assert found.count(b"{") == 1  # only the answer to the second request has a body
