"""Each request that does work leaves an envelope in the audit; data of a key can be erased while the server runs."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from argosy.errors import Overloaded, UsageError
from argosy.guard.audit import Audit, AuditSettings
from argosy.guard.chain import verify
from argosy.guard.keys import KeyFile, KeyRing
from argosy.guard.sealed import SealedContents
from argosy.serve.answer.service import Service
from argosy.serve.app import make_app
from argosy.serve.guards import audited
from argosy.serve.guards.audited import Auditor, SaidOfRequest
from argosy.serve.guards.governing import Governing
from argosy.serve.guards.transparency import Practice
from argosy.serve.http.access import RouteRule
from argosy.serve.http.caller import Caller
from argosy.serve.http.held import Pool
from argosy.serve.http.server import Endpoint
from argosy.serve.run import ServerSettings
from tests.serve.conftest import only, start

TRACE = "0af7651916cd43dd8448eb211c80319c"
ASK = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3, "temperature": 0}


@dataclass
class Server:
    url: str
    headers: dict[str, str]
    admin: dict[str, str]
    key_id: str
    audit: Audit
    directory: Path

    def post(self, path: str, body: dict[str, Any], **headers: str) -> httpx.Response:
        return httpx.post(self.url + path, json=body, headers=self.headers | headers, timeout=60)

    def lines(self) -> list[dict[str, Any]]:
        """The lines of requests, once all that were answered are written."""
        found: list[dict[str, Any]] = []
        report = verify(
            self.directory,
            (self.directory / "key").read_bytes(),
            see=lambda line: found.append(dict(line.facts)),
        )
        assert report.is_valid, report.faults
        return [line for line in found if line["kind"] == "request"]

    def line_of(self, answer: httpx.Response) -> dict[str, Any]:
        request_id = answer.headers.get("x-request-id") or answer.headers["request-id"]
        wait_for(lambda: any(line["request_id"] == request_id for line in self.lines()))
        return next(line for line in self.lines() if line["request_id"] == request_id)


def wait_for(is_so: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.fixture(scope="module")
def server(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("audited")
    keys = KeyFile(root / "keys.json")
    key, secret = keys.add("one", scopes=("infer", "grammar"))
    _, admin = keys.add("admin", scopes=("admin",))
    audit = Audit(AuditSettings(directory=root / "audit", with_content=True), facts={})
    auditor = Auditor(audit, policy="p" * 64)
    app = make_app(
        only(service), KeyRing(keys), block_tokens=16, max_sequences=8, governance=Governing(auditor=auditor)
    )
    for url in start(app):
        yield Server(
            url, {"Authorization": f"Bearer {secret}"}, {"Authorization": f"Bearer {admin}"}, key.id, audit,
            root / "audit",
        )  # fmt: skip
    audit.close()


def test_an_envelope_says_who_asked_for_what_and_how_it_ended(server: Server) -> None:
    answer = server.post("/v1/chat/completions", ASK, traceparent=f"00-{TRACE}-b7ad6b7169203331-01")
    line = server.line_of(answer)
    usage = answer.json()["usage"]
    for name in ("seq", "time", "prev", "mac", "seconds", "content"):
        del line[name]
    template = line.pop("template_sha256")
    assert line == {
        "kind": "request", "key": server.key_id, "request_id": answer.headers["x-request-id"], "trace_id": TRACE,
        "method": "POST", "route": "/v1/chat/completions", "status": 200, "model": "tiny", "policy": "p" * 64,
        "prompt_tokens": usage["prompt_tokens"], "new_tokens": usage["completion_tokens"], "marked_tokens": 0,
        "finish": ["length"], "verdicts": [],
    }  # fmt: skip
    assert len(template) == 64


def test_the_json_log_has_the_trace_id_of_a_client_that_sent_one(server: Server) -> None:
    logged: list[dict[str, Any]] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.facts)  # type: ignore[method-assign,attr-defined]
    log = logging.getLogger("argosy.serve")
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        with_trace = server.post("/tokenize", {"content": "a"}, traceparent=f"00-{TRACE}-b7ad6b7169203331-01")
        without = server.post("/tokenize", {"content": "a"})
        server.line_of(without)
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
    by_id = {line["request_id"]: line for line in logged}
    assert by_id[with_trace.headers["x-request-id"]]["trace_id"] == TRACE
    assert "trace_id" not in by_id[without.headers["x-request-id"]]


@pytest.mark.parametrize(
    "header",
    [
        "", "00", f"00-{TRACE}", f"00-{'0' * 32}-b7ad6b7169203331-01", f"ff-{TRACE}-b7ad6b7169203331-01",
        f"00-{TRACE.upper()}-b7ad6b7169203331-01", "00-canary-b7ad6b7169203331-01",
    ],
)  # fmt: skip
def test_a_header_that_is_no_trace_leaves_nothing(server: Server, header: str) -> None:
    answer = server.post("/tokenize", {"content": "a"}, traceparent=header)
    assert server.line_of(answer)["trace_id"] is None


def test_refusals_are_recorded_and_reading_is_not(server: Server) -> None:
    refused = server.post("/v1/chat/completions", {"messages": 7})
    assert (server.line_of(refused)["status"], server.line_of(refused)["new_tokens"]) == (400, 0)
    forbidden = httpx.delete(f"{server.url}/v1/engine/data/x", headers=server.headers)
    assert (server.line_of(forbidden)["status"], server.line_of(forbidden)["key"]) == (403, server.key_id)
    listed = httpx.get(f"{server.url}/v1/models", headers=server.headers)
    server.line_of(server.post("/tokenize", {"content": "a"}))
    assert listed.headers["x-request-id"] not in {line["request_id"] for line in server.lines()}


def test_requests_without_a_valid_key_are_counted_in_one_line(service: Service, tmp_path: Path) -> None:
    keys = KeyFile(tmp_path / "keys.json")
    _, secret = keys.add("one")
    audit = Audit(AuditSettings(directory=tmp_path / "audit"), facts={})
    auditor = Auditor(audit, policy="")
    for url in start(
        make_app(
            only(service),
            KeyRing(keys),
            block_tokens=16,
            max_sequences=8,
            governance=Governing(auditor=auditor),
        )
    ):
        with httpx.Client(base_url=url) as client:
            for _ in range(8):
                assert client.post("/tokenize", json={"content": "a"}).status_code == 401
            headers = {"Authorization": f"Bearer {secret}", "Origin": "https://elsewhere.example"}
            assert client.post("/tokenize", json={"content": "a"}, headers=headers).status_code == 403
    audit.close()
    report = verify(tmp_path / "audit", (tmp_path / "audit" / "key").read_bytes())
    assert report.is_valid, report.faults
    assert report.kinds["request"] == 0
    assert report.num_refused == 9
    assert report.kinds["refused"] == 1


def test_a_client_that_leaves_is_recorded_with_the_tokens_made(server: Server) -> None:
    ask = {"prompt": "abc", "max_tokens": 300, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=ask, headers=server.headers) as answer:
        next(answer.iter_lines())
    line = server.line_of(answer)
    assert 0 < line["new_tokens"] < 300


@pytest.mark.parametrize("stream", [False, True])
def test_content_is_what_was_on_the_wire(server: Server, stream: bool) -> None:
    body = {**ASK, "stream": stream, "user": "someone"}
    answer = server.post("/v1/chat/completions", body)
    line = server.line_of(answer)
    contents = SealedContents(server.directory, (server.directory / "key").read_bytes())
    data = contents.get(server.key_id, line["request_id"])
    assert data is not None
    sizes, _, said = data.partition(b"\n")
    asked = answer.request.content
    assert said == asked + answer.content
    assert json.loads(sizes) == {
        "asked_bytes": len(asked), "answered_bytes": len(answer.content), "is_cut": False,
    }  # fmt: skip
    assert line["content"]["bytes"] == len(data)


def test_the_memory_of_contents_is_bounded_and_given_back() -> None:
    pool = Pool(3 << 20)
    first, second = SaidOfRequest(pool.share()), SaidOfRequest(pool.share())
    first.ask(bytes(3 << 20))
    first.answer(b"x")
    second.ask(bytes(1 << 20))  # there is no room for two of them
    second.answer(b"end")
    assert pool.num_bytes <= 3 << 20
    for said, sizes in ((first, (1 << 20, 1)), (second, (0, 3))):
        content = said.content()
        told = json.loads(content.parts[0])
        assert (told["asked_bytes"], told["answered_bytes"], told["is_cut"]) == (*sizes, True)
        content.release()
    assert pool.num_bytes == 0


def test_a_request_that_cannot_be_recorded_is_refused(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise Overloaded("the audit cannot be written", retry_after_s=2)

    monkeypatch.setattr(server.audit, "require_room", refuse)
    answer = server.post("/v1/chat/completions", ASK)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
    assert httpx.post(f"{server.url}/v1/chat/completions", json=ASK).status_code == 503  # without a key, too
    assert httpx.get(f"{server.url}/v1/models", headers=server.headers).status_code == 200
    monkeypatch.undo()
    server.line_of(server.post("/tokenize", {"content": "a"}))
    assert answer.headers["x-request-id"] not in {line["request_id"] for line in server.lines()}


def test_erasing_a_key_removes_responses_answers_prefixes_and_contents(server: Server) -> None:
    stored = server.post("/v1/responses", {"input": "keep this", "max_output_tokens": 3}).json()["id"]
    path = f"{server.url}/v1/responses/{stored}"
    assert httpx.get(path, headers=server.headers).status_code == 200
    prompt = {
        "prompt": "a prefix long enough to fill a block of the cache, and some more of it " * 2,
        "max_tokens": 1,
    }

    def cached() -> int:
        answer = server.post("/v1/completions", prompt)
        assert answer.status_code == 200, answer.text
        usage = answer.json()["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    cached()
    assert cached() > 0
    server.line_of(server.post("/tokenize", {"content": "a"}))

    done = httpx.delete(f"{server.url}/v1/engine/data/one", headers=server.admin)
    assert done.status_code == 200
    erased = done.json()
    assert erased["key"] == server.key_id
    assert erased["responses"] > 0
    assert erased["audit_contents"] > 0
    assert httpx.get(path, headers=server.headers).status_code == 404
    assert cached() == 0
    later = server.post("/v1/responses", {"input": "more", "max_output_tokens": 3}).json()["id"]
    assert httpx.get(f"{server.url}/v1/responses/{later}", headers=server.headers).status_code == 200
    key = (server.directory / "key").read_bytes()
    report = verify(server.directory, key, check_object=SealedContents(server.directory, key).is_same)
    assert report.is_valid, report.faults
    assert report.num_erased == erased["audit_contents"]


def test_a_text_that_is_not_a_key_does_not_get_into_the_audit(server: Server) -> None:
    answer = httpx.delete(f"{server.url}/v1/engine/data/what anna said", headers=server.admin)
    assert (server.line_of(answer)["status"], "anna" in json.dumps(server.lines())) == (404, False)
    gone = httpx.delete(
        f"{server.url}/v1/engine/data/key-0123abcd", headers=server.admin
    )  # was revoked, perhaps
    assert (gone.status_code, gone.json()["audit_contents"]) == (200, 0)


def test_the_state_says_whether_prompts_and_answers_are_kept(service: Service, tmp_path: Path) -> None:
    for with_content in (False, True):
        practice = Practice(audit=AuditSettings(directory=tmp_path, with_content=with_content))
        app = make_app(
            only(service),
            KeyRing(None),
            block_tokens=16,
            max_sequences=8,
            governance=Governing(practice=practice),
        )
        for url in start(app):
            assert httpx.get(f"{url}/v1/engine/state").json()["privacy"]["logging"] is with_content


def test_erasing_a_key_ends_its_running_requests(server: Server) -> None:
    ask = {"prompt": "abc", "max_tokens": 400, "stream": True, "ignore_eos": True}
    with httpx.stream(
        "POST", f"{server.url}/v1/completions", json=ask, headers=server.headers, timeout=60
    ) as answer:
        lines = (line for line in answer.iter_lines() if line)
        next(lines)
        assert (
            httpx.delete(f"{server.url}/v1/engine/data/{server.key_id}", headers=server.admin).status_code
            == 200
        )
        rest = list(lines)
    assert any("was erased" in line for line in rest) or rest[-1] == "data: [DONE]"


def test_a_content_has_no_more_than_its_part_of_the_plan() -> None:
    assert 2 * audited.MOST_SAID_BYTES * 2 <= audited.AUDIT_BYTES


def test_a_verdict_is_in_a_line_once_and_the_first_decision_is_first() -> None:
    lines: list[dict[str, Any]] = []
    audit: Any = SimpleNamespace(
        require_room=lambda: None, settings=AuditSettings(directory=Path("audit")),
        record=lambda facts, content: lines.append(facts),
    )  # fmt: skip
    rule = RouteRule(method="POST", path="/a", scope="infer", is_counted=True)
    caller = Caller(key=KeyRing(None).find(None))
    watch = Auditor(audit, policy="p").arrive(caller, rule, {})
    assert watch is not None
    for verdict in ("policy a", "input pii:email", "output words", "input pii:email"):
        watch.found(verdict)
    watch.after(200, 0.5)
    (line,) = lines
    assert line["verdicts"] == ["policy a", "input pii:email", "output words"]
    assert list(line) == [
        "key", "request_id", "trace_id", "method", "route", "status", "seconds", "model", "policy",
        "prompt_tokens", "new_tokens", "marked_tokens", "finish", "verdicts",
    ]  # fmt: skip


def test_an_audit_that_nothing_here_would_write_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("argosy.serve.run.GUARDS", None)  # as in an installation without `serve/guards`
    with pytest.raises(UsageError, match=r"without `argosy\.serve\.guards`, so it records no requests"):
        ServerSettings(endpoint=Endpoint(host="127.0.0.1"), audit=AuditSettings(directory=tmp_path))
