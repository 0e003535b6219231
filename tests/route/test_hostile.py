"""Servers that lie, and clients that send what no server takes: every one gets an error, and nothing grows."""

from __future__ import annotations

import json
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

import httpx
import pytest

from argosy.route.events import MOST_EVENT_BYTES
from argosy.serve.http.streams import sse
from tests.route.conftest import RunningRouter, routing

Answer = Callable[[socket.socket], None]
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
ASKED = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "stream": True}


class FakeServer(socketserver.ThreadingTCPServer):
    """Says that it is ready, and answers a POST with what a test wants."""

    allow_reuse_address = daemon_threads = True

    def __init__(self, answer: Answer) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer = answer
        self.ready = 200  # the status of GET /ready
        self.bodies: list[bytes] = []
        self.heads: list[bytes] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(socketserver.StreamRequestHandler):
    server: FakeServer

    def handle(self) -> None:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            line = self.rfile.readline()
            if not line:
                return
            head += line
        if head.startswith(b"GET /ready"):
            self.connection.sendall(b"HTTP/1.1 %d x\r\ncontent-length: 0\r\n\r\n" % self.server.ready)
            return
        length = next(
            (line for line in head.lower().splitlines() if line.startswith(b"content-length:")), b":0"
        )
        self.server.heads.append(head)
        self.server.bodies.append(self.rfile.read(int(length.partition(b":")[2])))
        with suppress(OSError):  # the router has left
            self.server.answer(self.connection)


@contextmanager
def faking(*answers: Answer) -> Iterator[tuple[RunningRouter, list[FakeServer]]]:
    with ExitStack() as stack:
        servers = [stack.enter_context(FakeServer(answer)) for answer in answers]
        for server in servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
            stack.callback(server.shutdown)
        yield stack.enter_context(routing([server.url for server in servers])), servers


def chunked(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(text: str) -> bytes:
    return sse(
        {"id": "chatcmpl-1", "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}
    )


def whole(*texts: str) -> Answer:
    def answer(connection: socket.socket) -> None:
        connection.sendall(HEAD + b"".join(chunked(event(text)) for text in texts))
        connection.sendall(chunked(sse("[DONE]")) + b"0\r\n\r\n")

    return answer


def then(answer: bytes) -> Answer:
    """Two good events, then something else."""
    return lambda connection: connection.sendall(HEAD + chunked(event("Hel")) + chunked(event("lo")) + answer)


def endless(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nx-endless: ")
    while True:
        connection.sendall(b"x" * 65536)


def endless_event(connection: socket.socket) -> None:
    connection.sendall(HEAD + chunked(event("Hel")) + chunked(event("lo")))
    for _ in range(MOST_EVENT_BYTES // 65536 + 2):
        connection.sendall(chunked(b"x" * 65536))


LIARS: dict[str, Answer] = {
    "no answer": lambda connection: None,
    "half a head": lambda connection: connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-"),
    "garbage": lambda connection: connection.sendall(b"\x00\xff" * 1000),
    "another protocol": lambda connection: connection.sendall(b"220 mail.example.org ESMTP\r\n"),
    "endless header": endless,
    "many interim answers": lambda connection: connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n" * 100),
    "endless event": endless_event,
    "cut chunk": then(b"ff\r\ndata: {"),
    "bad chunk": then(b"zz\r\n"),
    "endless chunk head": then(b"1" * 100_000),
    "cut event": then(chunked(b'data: {"choices"') + b"0\r\n\r\n"),
    "no JSON": then(chunked(b"data: {]\n\n")),
    "a list": then(chunked(b"data: []\n\n")),
    "deep JSON": then(chunked(b"data: " + b'{"a":' * 5000 + b"\n\n")),
    "odd choices": then(chunked(sse({"choices": [[1]]})) + chunked(b"data: garbage\n\n")),
    "another line": then(chunked(b"HTTP/1.1 200 OK\n\n")),
}


def texts(response: httpx.Response) -> tuple[str, list[str]]:
    said, errors = "", []
    for line in response.text.splitlines():
        if line.startswith("data: {"):
            data = json.loads(line[6:])
            if "error" in data:
                errors.append(data["error"]["message"])
            elif isinstance(data["choices"][0], dict):
                said += data["choices"][0]["delta"]["content"]
    return said, errors


@pytest.mark.parametrize("lie", sorted(LIARS.keys() - {"odd choices"}))  # no honest server says that
def test_an_honest_server_continues_the_answer_of_one_that_lies(lie: str) -> None:
    with faking(LIARS[lie], whole("H", "ello, ", "world")) as (router, servers):
        honest = next(one for one in router.fleet.servers if str(one.address) == servers[1].url)
        honest.last_chosen = 100  # so the other one is asked first
        with router.client() as client:
            response = client.post("/v1/chat/completions", json=ASKED)
        assert texts(response) == ("Hello, world", [])
        assert response.text.endswith("data: [DONE]\n\n")
        assert all(len(server.bodies) == 1 for server in servers)
        router.until_idle()


@pytest.mark.parametrize("lie", LIARS)
def test_liars_alone_get_a_client_an_error(lie: str) -> None:
    with faking(LIARS[lie], LIARS[lie], LIARS[lie], LIARS[lie]) as (router, servers):
        with router.client() as client:
            response = client.post("/v1/chat/completions", json=ASKED)
        said, errors = (
            texts(response) if response.status_code == 200 else ("", [response.json()["error"]["message"]])
        )
        assert said in ("", "Hello")
        assert "the request failed 3 times" in errors[0]
        assert "Hel" not in errors[0]
        assert (
            sum(len(server.bodies) for server in servers) == 3
        )  # a request that kills servers kills no more


def silent(connection: socket.socket) -> None:
    """Take the request, and send nothing until the router has left."""
    connection.settimeout(20)
    with suppress(OSError):
        connection.recv(1)


@pytest.mark.parametrize(("streams", "deadline"), [(True, "HEAD_S"), (False, "ANSWER_S")])
def test_another_server_answers_for_one_that_says_ready_and_stays_silent(
    streams: bool, deadline: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"argosy.route.upstream.{deadline}", 0.2)
    with faking(silent, whole("Hello")) as (router, servers):
        router.fleet.servers[1].last_chosen = 100
        with router.client() as client:
            response = client.post("/v1/chat/completions", json=ASKED | {"stream": streams})
        assert "Hello" in response.text or "another form" in response.text
        assert [len(server.bodies) for server in servers] == [1, 1]


def test_another_server_answers_for_one_that_is_not_ready_and_stays_silent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("argosy.route.servers.NOT_READY_S", 0.2)
    with faking(silent, whole("Hello")) as (router, servers):

        def stop(connection: socket.socket) -> None:
            servers[0].ready = 503
            silent(connection)

        servers[0].answer = stop
        router.fleet.servers[1].last_chosen = 100
        with router.client() as client:
            assert texts(client.post("/v1/chat/completions", json=ASKED)) == ("Hello", [])
        assert [server.state for server in router.fleet.servers] == ["draining", "up"]


def test_a_server_that_refuses_the_router_is_down_and_the_log_says_why(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with faking(whole("Hello"), whole("Hello")) as (router, servers):
        servers[0].ready = 403
        until = time.monotonic() + 20
        while router.fleet.servers[0].state != "down":
            assert time.monotonic() < until
            time.sleep(0.01)
    assert f"{servers[0].url} is down: {servers[0].url} answers GET /ready with 403" in caplog.text


def test_another_answer_ends_with_a_clear_error_and_none_of_its_text() -> None:
    with faking(then(b""), then(b""), whole("Help", " me")) as (router, _):
        router.fleet.servers[2].last_chosen = 100
        with router.client() as client:
            response = client.post("/v1/chat/completions", json=ASKED)
    said, errors = texts(response)
    assert said == "Hello"
    assert "another server gives a different answer" in errors[0]


def test_a_shorter_answer_ends_with_a_clear_error() -> None:
    with faking(then(b""), whole("Hel")) as (router, _):
        router.fleet.servers[1].last_chosen = 100
        with router.client() as client:
            said, errors = texts(client.post("/v1/chat/completions", json=ASKED))
    assert said == "Hello"
    assert "answer" in errors[0]


def test_a_request_that_only_one_server_may_answer_fails_with_it() -> None:
    body = {"input": "And?", "previous_response_id": "resp_1", "stream": True}
    with faking(then(b""), whole("Hello")) as (router, servers):
        router.fleet.servers[1].last_chosen = 100
        with router.client() as client:
            response = client.post("/v1/responses", json=body)
        assert len(servers[1].bodies) == 0
    assert "only that server keeps" in response.text
    assert '"type":"error"' in response.text


def seeds(server: FakeServer, path: str, body: str) -> list[object]:
    with routing([server.url]) as router, router.client() as client:
        for _ in range(2):
            client.post(path, content=body, headers={"content-type": "application/json"})
    found = [json.loads(one) for one in server.bodies]
    return [one.get("options", one).get("seed") for one in found]


@pytest.mark.parametrize(
    ("path", "body", "own"),
    [
        ("/v1/chat/completions", '{"messages":[],"n":1}', None),
        ("/v1/chat/completions", '{}', None),
        ("/v1/completions", '{"prompt":"\\u00e9{","seed":null}', None),
        ("/v1/completions", '{"seed":-1}', None),
        ("/v1/messages", '{"messages":[],"seed":7}', 7),
        ("/v1/responses", '{"input":"x","seed":0}', 0),
        ("/api/chat", '{"messages":[{}]}', None),
        ("/api/generate", '{"prompt":"x","options":{"temperature":1e-3}}', None),
        ("/api/generate", '{"prompt":"x","options":{"seed":3}}', 3),
    ],
)  # fmt: skip
def test_a_request_without_a_seed_gets_one_and_keeps_the_rest(path: str, body: str, own: int | None) -> None:
    with faking(whole("x")) as (_, (server,)):
        found = seeds(server, path, body)
        sent = json.loads(server.bodies[0])
    if own is None:
        assert all(type(seed) is int and 0 <= seed < 1 << 63 for seed in found)
        assert found[0] != found[1]
    else:
        assert found == [own, own]
    asked = json.loads(body)
    for holder in (sent, sent.get("options", {}), asked, asked.get("options", {})):
        holder.pop("seed", None)
    assert {**sent, "options": sent.get("options") or None} == {
        **asked,
        "options": asked.get("options") or None,
    }


def test_other_bodies_are_passed_on_byte_for_byte() -> None:
    with faking(whole("x")) as (router, (server,)):
        body = b' {"input" : ["a", 1e2],\n"model": "tiny"}'
        with router.client() as client:
            client.post("/v1/embeddings", content=body, headers={"content-type": "application/json"})
        assert server.bodies == [body]


def test_keys_are_passed_on_and_neither_connections_nor_origins() -> None:
    with faking(whole("x")) as (router, (server,)):
        headers = {
            "authorization": "Bearer secret-key", "x-api-key": "secret-key", "anthropic-version": "2023-06-01",
            "origin": router.url, "x-forwarded-for": "10.1.1.1", "accept-encoding": "gzip", "connection": "keep-alive",
        }  # fmt: skip
        with router.client() as client:
            assert client.post("/v1/chat/completions", json=ASKED, headers=headers).status_code == 200
    lines = server.heads[0].lower().splitlines()
    assert b"authorization: bearer secret-key" in lines
    assert b"anthropic-version: 2023-06-01" in lines
    assert b"accept-encoding: identity" in lines
    assert b"connection: close" in lines
    assert not any(line.startswith((b"origin:", b"x-forwarded-for:")) for line in lines)


@pytest.mark.parametrize(
    ("content", "status"),
    [(b"", 400), (b"[]", 400), (b"{", 400), (b'{"a":1,"a":2}', 400), (b'{"a":NaN}', 400), (b"\xff", 400),
     (b'{"a":"\\ud800"}', 400), (b"[" * 100_000, 400), (b'{"a":' + b"[" * 200 + b"]" * 200 + b"}", 400),
     (b'{"a":' + b"1" * 10_000 + b"}", 400), (b"x" * (48 << 20) + b"x", 413)],
)  # fmt: skip
def test_a_body_that_no_server_takes_reaches_no_server(content: bytes, status: int) -> None:
    with faking(whole("x")) as (router, (server,)):
        with router.client() as client:
            headers = {"content-type": "application/json"}
            refused = client.post("/v1/chat/completions", content=content, headers=headers)
        assert refused.status_code == status
        assert refused.json()["error"]["type"] == "invalid_request_error"
        assert server.bodies == []


def test_pages_of_other_sites_and_unknown_hosts_are_refused() -> None:
    with faking(whole("x")) as (router, (server,)), router.client() as client:
        assert (
            client.post(
                "/v1/chat/completions", json=ASKED, headers={"origin": "http://evil.example"}
            ).status_code
            == 403
        )
        assert client.get("/v1/models", headers={"host": "evil.example"}).status_code == 403
        assert server.bodies == []


def test_a_client_that_leaves_frees_its_server() -> None:
    left = threading.Event()

    def answer(connection: socket.socket) -> None:
        connection.sendall(HEAD + chunked(event("Hel")))
        while connection.recv(1024):
            pass
        left.set()

    with faking(answer) as (router, _):
        with router.client() as client, client.stream("POST", "/v1/chat/completions", json=ASKED) as response:
            next(response.iter_lines())
        assert left.wait(10)
        router.until_idle()
        assert router.fleet.servers[0].owed_tokens == pytest.approx(0.0)


def test_a_whole_answer_of_a_server_that_stops_after_its_head_is_given_by_another() -> None:
    """Its status was sent before it knew its end."""
    servers: list[FakeServer] = []
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"

    def answer(connection: socket.socket) -> None:
        asked = [server for server in servers if server.bodies]
        if len(asked) == 1:
            asked[0].ready = 503
            said = b'{"error": {"message": "the server is stopping"}}'
        else:
            said = b'{"choices": []}'
        connection.sendall(head + chunked(b"\n\n") + chunked(said + b"\n") + chunked(b""))

    with faking(answer, answer) as (router, made), router.client() as client:
        servers += made
        got = client.post("/v1/chat/completions", json=ASKED | {"stream": False})
    assert (got.status_code, got.json()) == (200, {"choices": []})
    assert all(server.bodies for server in servers)
