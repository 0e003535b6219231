"""Every kind of end reaches every kind of work, before its next token or event, and leaves nothing behind.

    ENDS x WORKS  ->  how the client learns of it: a status, or the last event of its stream; or that the work goes on

`python -m tests.serve.test_running` prints the matrix.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import httpx
import pytest

from argosy.guard.audit import Audit, AuditSettings
from argosy.guard.keys import KeyFile, KeyRing
from argosy.guard.limits import Limits
from argosy.guard.verdict import CheckFailed
from argosy.open.engine import Engine
from argosy.prompt.reranking import RerankForm, Reranking
from argosy.serve.admin.key_watch import KeyWatch
from argosy.serve.answer.service import Service
from argosy.serve.app import make_app
from argosy.serve.dialects import body
from argosy.serve.guards.audited import Auditor
from argosy.serve.guards.governing import Governing
from argosy.serve.guards.guarding import Guarding
from argosy.serve.http.gate import Gate
from argosy.serve.http.work import WorkQueue
from tests.cli.tiny_chat_model import write_chat_model
from tests.serve.conftest import only, serving, start

PERSON = "eve"
GOES_ON = {"logit_bias": {"2": -100, "0": -100}}  # forbids the tokens that end an answer
MOST = 7000
# Ollama's API has no option that keeps an answer from ending; the greedy answer of this model repeats for ever.
GOES_ON_IN_OLLAMA = {"num_predict": MOST, "temperature": 0}
CHAT = {"messages": [{"role": "user", "content": "hello"}], "user": PERSON, "max_tokens": MOST, **GOES_ON}
FORM = (
    b'--b\r\ncontent-disposition: form-data; name="model"\r\n\r\nwhisper-1\r\n'
    b'--b\r\ncontent-disposition: form-data; name="stream"\r\n\r\n%b\r\n'
    b'--b\r\ncontent-disposition: form-data; name="file"; filename="a.wav"\r\n\r\nRIFF\r\n--b--\r\n'
)
POLICY = """
default = "plain"
[policies.plain]
may-choose = ["asked"]
[policies.asked]
input = ["slow"]
[checks.slow]
url = "http://127.0.0.1:{port}/v1/moderations"
timeout-s = 60
"""

Told = Literal["status", "event", "goes on"]


@dataclass(frozen=True)
class Work:
    """A request that runs until it is ended.

    has_tokens: tokens were counted before its end.
    """

    path: str
    body: Mapping[str, Any] | bytes | None
    told: Told = "status"
    headers: Mapping[str, str] = field(default_factory=dict)
    has_person: bool = False
    model: str = "tiny"
    has_tokens: bool = True


ASKED = {"x-argosy-policy": "asked"}
WORKS = {
    "chat, streamed": Work("/v1/chat/completions", {**CHAT, "stream": True}, "event", has_person=True),
    "chat, whole": Work("/v1/chat/completions", CHAT, has_person=True),
    "responses, streamed": Work(
        "/v1/responses",
        {"input": "hello", "safety_identifier": PERSON, "max_output_tokens": MOST, "ignore_eos": True, "stream": True},
        "event", has_person=True,
    ),
    "messages, streamed": Work(
        "/v1/messages",
        {
            "messages": CHAT["messages"], "metadata": {"user_id": PERSON}, "max_tokens": MOST, "ignore_eos": True,
            "stream": True,
        },
        "event", has_person=True,
    ),
    "completions, whole": Work(
        "/v1/completions", {"prompt": "hello", "prompt_cache_key": PERSON, "max_tokens": MOST, **GOES_ON},
        has_person=True,
    ),
    "ollama, streamed": Work(
        "/api/generate", {"prompt": "hello", "options": GOES_ON_IN_OLLAMA}, "event"
    ),
    "embeddings": Work("/v1/embeddings", {"input": ["hello"] * 2000, "user": PERSON}, has_person=True),
    "rerank": Work("/v1/rerank", {"query": "a", "documents": ["b"] * 1000}),
    "transcription, whole": Work("/v1/audio/transcriptions", FORM % b"false", model="ears"),
    "transcription, streamed": Work("/v1/audio/transcriptions", FORM % b"true", "event", model="ears"),
    "transcription, waiting": Work(
        "/v1/audio/transcriptions", FORM % b"true", model="ears", has_tokens=False
    ),
    "a prompt being made": Work(
        "/v1/chat/completions",
        {**CHAT, "messages": [{"role": "user", "content": "#slow"}], "metadata": {"long": "x" * 40_000}},
        has_person=True, has_tokens=False,
    ),
    "a check of a request": Work("/v1/chat/completions", CHAT, headers=ASKED, has_person=True, has_tokens=False),
    "moderations": Work("/v1/moderations", {"input": "hello"}, headers=ASKED, model="", has_tokens=False),
    "engine events": Work("/v1/engine/events", None, "event", model="", has_tokens=False),
    "waiting for a thread": Work("/v1/chat/completions", CHAT, has_person=True, has_tokens=False),
}  # fmt: skip
WAITS = "waiting for a thread"
ENDS = {
    "revoked key": (401, "the key was revoked"),
    "stopped key": (403, "has stopped this key"),
    "stopped person": (403, "does not accept requests of this user"),
    "stopped model": (403, "has stopped this model"),
    "erased key": (503, "the data of this key was erased"),
    "client gone": (0, ""),
    "shutdown": (503, "the server is stopping"),
}


def expected(end: str, work: Work) -> str:
    """How the client learns of an end."""
    if (end == "stopped person" and not work.has_person) or (end == "stopped model" and not work.model):
        return "goes on"
    if end == "client gone":
        return "gone"
    return "event" if work.told == "event" else str(ENDS[end][0])


class Ears:
    """Transcribes for as long as it is asked to go on; one piece has five tokens."""

    name = "ears"
    files = SimpleNamespace(config=SimpleNamespace(text_positions=64))

    def transcribe(self, content: Any, options: Any, *, report: Callable[[Any], None]) -> Any:
        segments = [SimpleNamespace(text="hello", token_ids=(1, 2, 3, 4, 5))]
        while True:
            report(SimpleNamespace(segments=segments))
            time.sleep(0.005)

    def forget(self, tenant: str) -> None: ...


class Client:
    """Sends a request and reads until the server closes the connection."""

    def __init__(self, url: str, secret: str, work: Work) -> None:
        host, _, port = url.removeprefix("http://").partition(":")
        self._socket = socket.create_connection((host, int(port)))
        head = {
            "host": "localhost",
            "connection": "close",
            "authorization": f"Bearer {secret}",
            **work.headers,
        }
        data = b""
        if isinstance(work.body, bytes):
            data, head["content-type"] = work.body, "multipart/form-data; boundary=b"
        elif work.body is not None:
            data, head["content-type"] = json.dumps(work.body).encode(), "application/json"
        head["content-length"] = str(len(data))
        lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
        method = "GET" if work.body is None else "POST"
        self._socket.sendall(f"{method} {work.path} HTTP/1.1\r\n{lines}\r\n".encode() + data)
        self.received, self.has_ended = b"", False
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        with suppress(OSError):
            while data := self._socket.recv(1 << 16):
                self.received += data
        self.has_ended = True

    def leave(self) -> None:
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self._socket.close()

    def outcome(self, reason: str) -> str:
        """How the answer ended; it must say why."""
        status = int(self.received.split(b" ", 2)[1])
        assert reason.encode() in self.received, self.received[-500:]
        return "event" if status == 200 else str(status)


def wait_for(is_so: Callable[[], bool], what: str = "", seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < until, what
        time.sleep(0.005)


@dataclass
class Server:
    url: str
    app: Gate
    engine: Engine
    service: Service
    limits: Limits
    keys: KeyFile
    admin: dict[str, str]
    audit: Audit
    may_go_on: threading.Event
    num_held: list[str]  # requests that wait for `may_go_on`

    def post(self, path: str, body: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, headers=self.admin, timeout=30)

    def stop(self, kind: str, name: str, *, is_stopped: bool = True) -> httpx.Response:
        return self.post("/v1/engine/stops", {"kind": kind, "name": name, "is_stopped": is_stopped})

    @property
    def events(self) -> asyncio.AbstractEventLoop:
        assert self.app.running._events is not None
        return self.app.running._events

    def tenants(self) -> set[str]:
        """The tenants that anything runs for."""
        running = self.app.running
        return {
            *(run.tenant for run in tuple(running._runs)), *running._at_work, *self.limits._running,
            *(sequence.tenant for sequence in list(self.engine._sequences)),
        }  # fmt: skip


@contextmanager
def serve(root: Path) -> Iterator[Server]:
    """A server whose work does not end by itself."""
    may_go_on, held, entered = threading.Event(), list[str](), ExitStack()
    with entered:
        patch = entered.enter_context(pytest.MonkeyPatch.context())
        patch.setattr("argosy.guard.keys._LOOK_AGAIN_S", 0.01)
        patch.setattr("argosy.serve.admin.key_watch.LOOK_S", 0.01)
        door = entered.enter_context(socket.create_server(("127.0.0.1", 0)))  # a check that never answers
        policy = root / "policy.toml"
        policy.write_text(POLICY.format(port=door.getsockname()[1]))
        keys = KeyFile(root / "keys.json")
        _, secret = keys.add("boss", scopes=("admin",))
        model = write_chat_model(root / "model", context_tokens=8192)
        engine = entered.enter_context(Engine.open(model, memory="2GiB", threads=1, max_waiting=256))
        step, build = engine.step, None
        patch.setattr(engine, "step", lambda: (time.sleep(0.004), step())[1])
        service = entered.enter_context(serving(engine))
        build = service.prompts.build

        def slow_build(given: Any, *args: Any, **named: Any) -> Any:
            if isinstance(given, list) and "#slow" in str(given):
                held.append("prompt")
                may_go_on.wait(60)
            return build(given, *args, **named)

        patch.setattr(service.prompts, "build", slow_build)
        form = RerankForm(before="", between="\n", after="\n", yes="a", no="b")
        ranking = Reranking(form, service.tokenizer, context_tokens=8192)  # type: ignore[arg-type]
        patch.setattr(service, "reranking", ranking)
        patch.setattr(service, "ears", Ears())
        patch.setattr(service.work, "ears", WorkQueue(num_threads=2))  # a third transcription waits

        def judge(check: Any, text: str) -> Any:
            held.append("check")
            may_go_on.wait(60)
            raise CheckFailed("released")

        patch.setattr("argosy.serve.guards.check_over_http.judge", judge)
        ring, limits, guarding = KeyRing(keys), Limits(), Guarding(policy)
        audit = Audit(AuditSettings(directory=root / "audit", with_content=True), facts={})
        entered.callback(audit.close)
        app = make_app(
            only(service),
            ring,
            block_tokens=16,
            max_sequences=16,
            limits=limits,
            governance=Governing(guarding=guarding, auditor=Auditor(audit, policy="none")),
        )
        admin = {"authorization": f"Bearer {secret}"}
        with KeyWatch(ring, limits, app.running, service.revoke):
            for url in start(app):
                yield Server(url, app, engine, service, limits, keys, admin, audit, may_go_on, held)
                may_go_on.set()


def walk(server: Server, end: str, works: Mapping[str, Work] = WORKS) -> dict[str, str]:
    """Run all kinds of work at once, end them, and tell how each client learned of it. Nothing of them is left."""
    server.may_go_on.clear()
    server.num_held.clear()
    ids: dict[str, str] = {}
    clients: dict[str, Client] = {}

    def begin(name: str) -> None:
        scopes = ("infer", "metrics")
        key, secret = server.keys.add(f"{name} {secrets.token_hex(4)}", scopes=scopes)
        wait_for(lambda: server.app._ring.id_of(key.id) is not None)
        ids[name], clients[name] = key.id, Client(server.url, secret, works[name])

    for name in works:
        if name != WAITS:
            begin(name)
    held = sum(name in works for name in ("a prompt being made", "a check of a request", "moderations"))
    wait_for(lambda: len(server.num_held) == held, "requests are held")
    for name, work in works.items():
        if work.told == "event":
            wait_for(lambda name=name: b"\r\n\r\n" in clients[name].received, name)  # type: ignore[misc]
        if work.has_tokens:
            wait_for(lambda name=name: server.limits._uses[ids[name]].tokens_today > 0, name)  # type: ignore[misc]
    blocked = []
    if WAITS in works:
        queue = server.service.work._small
        for _ in range(2):
            waits = queue.run("blocker", server.may_go_on.wait, 60)
            blocked.append(asyncio.run_coroutine_threadsafe(waits, server.events))
        begin(WAITS)
        wait_for(lambda: ids[WAITS] in queue._waiting, WAITS)
    assert not any(client.has_ended for client in clients.values())
    concerned = [name for name, work in works.items() if expected(end, work) != "goes on"]
    erasures = []
    last_first = [*works][::-1]  # what waits for others ends before them
    with ThreadPoolExecutor(len(works)) as threads:
        match end:
            case "revoked key":
                for name in last_first:
                    server.keys.revoke(ids[name])
            case "stopped key":
                for name in last_first:
                    assert server.stop("key", ids[name]).status_code == 200
            case "stopped person":
                server.stop("user", PERSON)
            case "stopped model":
                assert server.stop("model", "tiny").status_code == 200
                assert server.stop("model", "ears").status_code == 200
            case "erased key":
                url = f"{server.url}/v1/engine/data/"
                for name in last_first:
                    erasures.append(
                        threads.submit(httpx.delete, url + ids[name], headers=server.admin, timeout=60)
                    )
                    wait_for(lambda name=name: clients[name].has_ended, f"{end}: {name}")  # type: ignore[misc]
            case "client gone":
                for name in last_first:
                    clients[name].leave()
            case "shutdown":
                server.events.call_soon_threadsafe(server.app.running.stop)
        # Those that are held in a thread are answered while they are held.
        wait_for(lambda: all(clients[name].has_ended for name in concerned), f"{end}: answers")
        left = {ids[name] for name in works if name not in concerned}
        wait_for(lambda: {run.tenant for run in tuple(server.app.running._runs)} <= left, f"{end}: runs")
        going_on = {name: not clients[name].has_ended for name in works if name not in concerned}
        server.may_go_on.set()
        assert all(erasure.result().status_code == 200 for erasure in erasures)
    for job in blocked:
        job.result(20)
    wait_for(lambda: server.tenants() <= left, f"{end}: leaves nothing")
    made = {}
    for name, work in works.items():
        if name not in concerned:
            made[name] = "goes on" if going_on[name] else "has ended"
        else:
            made[name] = "gone" if end == "client gone" else clients[name].outcome(ENDS[end][1])
        if work.has_tokens and end != "revoked key":
            assert server.limits._uses[ids[name]].tokens_today > 0
        clients[name].leave()
    assert end != "revoked key" or not server.limits._uses.keys() & set(ids.values())
    if end == "erased key":  # what ended is recorded, and what it said is not kept
        wait_for(server.audit._items.empty)
        assert {key_id: server.audit._contents.size(key_id)[0] for key_id in ids.values()} == dict.fromkeys(
            ids.values(), 0
        )
    wait_for(lambda: not server.tenants(), f"{end}: nothing runs any more")
    wait_for(lambda: server.app.bodies.num_bytes == 0, f"{end}: no memory is held")
    for kind, name in (("user", PERSON), ("model", "tiny"), ("model", "ears")):
        if end in ("stopped person", "stopped model"):
            server.stop(kind, name, is_stopped=False)
    for key_id in ids.values() if end == "stopped key" else ():
        server.stop("key", key_id, is_stopped=False)
    server.app.running._is_over = False
    return made


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(tmp_path_factory.mktemp("running")) as server:
        yield server


@pytest.mark.parametrize("end", ENDS)
def test_every_end_reaches_all_work_that_it_concerns_and_leaves_nothing(server: Server, end: str) -> None:
    assert walk(server, end) == {name: expected(end, work) for name, work in WORKS.items()}


def test_a_key_is_stopped_by_its_name_and_an_unknown_one_and_the_own_are_refused(server: Server) -> None:
    key, secret = server.keys.add("by name")
    wait_for(lambda: server.app._ring.id_of(key.id) is not None)
    assert server.stop("key", "by name").json()["key"] == [key.id]
    models, headers = f"{server.url}/v1/models", {"authorization": f"Bearer {secret}"}
    assert httpx.get(models, headers=headers).status_code == 403
    assert server.stop("key", "by name", is_stopped=False).json()["key"] == []
    assert httpx.get(models, headers=headers).status_code == 200
    assert server.stop("key", "by nmae").status_code == 404
    assert server.stop("key", "boss").status_code == 400
    assert server.stop("key", "boss", is_stopped=False).status_code == 200


def test_a_request_that_ends_while_its_prompt_is_made_does_not_reach_the_engine(server: Server) -> None:
    name = "a prompt being made"
    before = server.service.loop.snapshot().engine.totals.prompt_tokens
    assert walk(server, "stopped key", {name: WORKS[name]}) == {name: "403"}
    assert server.service.loop.snapshot().engine.totals.prompt_tokens == before


def test_a_body_that_a_thread_reads_after_its_client_has_left_holds_no_memory(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_read, may_go_on, count = threading.Event(), threading.Event(), body.count_values

    def slow_count(data: bytes) -> tuple[int, int]:
        is_read.set()
        may_go_on.wait(20)
        return count(data)

    monkeypatch.setattr(body, "count_values", slow_count)
    _, secret = server.keys.add("leaves")
    wait_for(lambda: server.app._ring.find(secret) is not None)
    client = Client(server.url, secret, WORKS["a prompt being made"])  # its body is long
    assert is_read.wait(20)
    client.leave()
    wait_for(lambda: not server.tenants() - set(server.app.running._at_work))
    may_go_on.set()
    wait_for(lambda: not server.tenants())
    assert server.app.bodies.num_bytes == 0


def main() -> None:
    """Print the matrix."""
    import tempfile

    with tempfile.TemporaryDirectory() as root, serve(Path(root)) as server:
        made = {end: walk(server, end) for end in ENDS}
    widths = [max(map(len, WORKS)), *map(len, ENDS)]
    print("  ".join(cell.ljust(width) for cell, width in zip(["", *ENDS], widths, strict=True)).rstrip())
    for name in WORKS:
        row = [name, *(made[end][name] for end in ENDS)]
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    sys.exit(main())
