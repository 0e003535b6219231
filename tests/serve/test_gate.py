"""Admission: who may send requests, and which requests are refused before any route runs."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.responses import Response

from argosy import _native
from argosy.errors import UsageError
from argosy.guard.keys import KeyFile, KeyRing
from argosy.guard.limits import Limits
from argosy.serve.answer.service import Service
from argosy.serve.app import ROUTES, make_app
from argosy.serve.governance import Governance
from argosy.serve.http.access import RouteRule
from argosy.serve.http.caller import Caller, Hook, Watch
from argosy.serve.http.failures import Refused
from argosy.serve.http.gate import Gate, _Pace
from argosy.serve.http.held import Pool
from argosy.serve.run import require_keys
from tests.serve.conftest import only, start
from tests.serve.fake_server import POLICY

JSON = {"content-type": "application/json"}
ASK = {"messages": [{"role": "user", "content": "canary-71d"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> KeyFile:
    return KeyFile(tmp_path_factory.mktemp("keys") / "keys.json")


@pytest.fixture(scope="module")
def keyed(service: Service, keys: KeyFile) -> Iterator[tuple[str, str]]:
    _, secret = keys.add("one", requests_per_minute=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("argosy.guard.keys._LOOK_AGAIN_S", 0.01)
        for url in start(make_app(only(service), KeyRing(keys), block_tokens=16, max_sequences=8)):
            yield url, secret


@pytest.mark.parametrize("route", [route for route in ROUTES if route.rule.scope], ids=lambda r: r.rule.path)
def test_every_route_with_a_scope_refuses_a_request_without_a_valid_key(
    keyed: tuple[str, str], route: object
) -> None:
    rule = route.rule  # type: ignore[attr-defined]
    for headers in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Basic x"},
        {"x-api-key": "wrong"},
    ):
        answer = httpx.request(rule.method, keyed[0] + rule.path.replace("{id}", "x"), headers=headers)
        assert answer.status_code == 401


def test_a_key_is_limited_by_its_scope_its_rate_and_its_revocation(
    keyed: tuple[str, str], keys: KeyFile
) -> None:
    url, secret = keyed
    headers = {"Authorization": f"Bearer {secret}"}
    assert httpx.get(f"{url}/v1/models", headers=headers).status_code == 200
    for path in ("/metrics", "/slots"):
        assert httpx.get(url + path, headers=headers).status_code == 403
    statuses = [httpx.post(f"{url}/tokenize", json={"content": "a"}, headers=headers) for _ in range(4)]
    assert [answer.status_code for answer in statuses] == [200, 200, 200, 429]
    assert int(statuses[-1].headers["Retry-After"]) > 0
    keys.revoke("one")
    time.sleep(0.05)
    assert httpx.get(f"{url}/v1/models", headers=headers).status_code == 401


def test_tokens_generated_before_a_client_hangs_up_count_against_its_quota(
    keyed: tuple[str, str], keys: KeyFile
) -> None:
    url, _ = keyed
    _, secret = keys.add("quota", tokens_per_day=12)
    time.sleep(0.05)
    headers = {"Authorization": f"Bearer {secret}"}
    ask = {"prompt": "abc", "max_tokens": 200, "stream": True, "logit_bias": {"2": -100, "0": -100}}
    with httpx.stream("POST", f"{url}/v1/completions", json=ask, headers=headers) as answer:
        assert answer.status_code == 200
        lines = (line for line in answer.iter_lines() if line)
        for _ in range(12):
            next(lines)
    until = time.monotonic() + 10
    small = {"content": "a"}  # counts as a request, and uses no tokens
    while (again := httpx.post(f"{url}/tokenize", json=small, headers=headers)).status_code == 200:
        assert time.monotonic() < until
    assert again.status_code == 429
    assert "12 tokens per day" in again.json()["error"]["message"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Content-Type": "text/plain"}, 415),
    ],
)
def test_requests_that_a_foreign_page_could_send_are_refused(
    client: httpx.Client, headers: dict[str, str], status: int
) -> None:
    assert client.post("/tokenize", json={"content": "a"}, headers=headers).status_code == status


@pytest.mark.parametrize("path", ["/redoc", "/api/none", "/page/../app.py", "/page/%2e%2e%2fapp.py"])
def test_a_path_that_is_not_in_the_table_is_not_found(client: httpx.Client, path: str) -> None:
    assert client.get(path).status_code == 404


def test_a_wrong_method_is_answered_with_the_allowed_ones(
    client: httpx.Client,
) -> None:
    answer = client.request("TRACE", "/tokenize")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert answer.json()["error"]["message"] == "this path accepts POST"


def test_without_keys_only_this_machine_may_connect() -> None:
    require_keys("127.0.0.1", None)
    require_keys("::1", None)
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.com"):
        with pytest.raises(UsageError, match="no keys"):
            require_keys(host, None)


def test_a_key_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "keys.json")
    file.add("one")
    assert file.path.stat().st_mode & 0o777 == 0o600
    file.path.chmod(0o644)
    with pytest.raises(UsageError, match="other users"):
        file.read()


def test_no_text_from_a_client_is_logged(client: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        assert client.post("/v1/chat/completions", json=ASK).status_code == 200
        client.post("/v1/chat/completions", json=ASK | {"canary-71d": 1})
        client.get("/canary-71d")
    ours = [record.getMessage() for record in caplog.records if not record.name.startswith("http")]
    assert not any("canary-71d" in message for message in ours)
    assert "POST /v1/chat/completions 200" in caplog.text


def test_the_state_has_the_facts_that_the_page_reads_and_metrics_name_no_expert(client: httpx.Client) -> None:
    state = client.get("/v1/engine/state").json()
    assert state.keys() == {
        "models", "model", "memory", "speed", "experts", "recent", "time", "queue", "running", "waiting", "kv", "heat",
        "privacy", "workers",
    }  # fmt: skip
    assert state["time"]["wall_s"] == pytest.approx(sum(state["time"]["parts"].values()))
    experts = state["experts"]
    assert (experts["total"], experts["slots"], experts["resident"]) == (18, 18, 18)
    assert "argosy_experts_resident 18.0" in client.get("/metrics").text
    assert "argosy_requests_total" in client.get("/metrics").text
    assert 'expert="' not in client.get("/metrics").text
    page = client.get("/")
    assert page.headers["content-security-policy"] == POLICY
    assert client.get("/page/app.js").status_code == 200


def test_metrics_say_how_much_ran_on_amx_where_there_is_amx(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_native, "amx_formats", list)
    assert client.post("/v1/chat/completions", json=ASK).status_code == 200
    assert "\nargosy_amx_operations_total " not in client.get("/metrics").text
    monkeypatch.setattr(_native, "amx_formats", lambda: ["q4"])
    assert client.post("/v1/chat/completions", json=ASK).status_code == 200
    lines = dict(line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines())
    in_tiles, all_of_them = (float(lines[f"argosy_{name}_operations_total"]) for name in ("amx", "product"))
    assert 0 <= in_tiles <= all_of_them


def raw(url: str, *parts: bytes) -> bytes:
    """Send the parts; return everything the server sends until it closes the connection."""
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        for part in parts:
            connection.sendall(part)
        connection.settimeout(10)
        answer = b""
        while part := connection.recv(1 << 16):
            answer += part
        return answer


def test_too_large_a_body_is_refused_by_its_announced_length(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("argosy.serve.http.incoming._DISCARD_S", 0.1)
    head = b"POST /tokenize HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    assert raw(url, head + b"Content-Length: 99999999\r\n\r\n").startswith(b"HTTP/1.1 413")


def test_a_client_that_does_not_finish_its_head_or_body_is_cut_off(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("argosy.serve.http.server.HEADER_S", 0.15)
    monkeypatch.setattr("argosy.serve.http.incoming.BODY_STALL_S", 0.15)
    assert raw(url, b"GET /health HTTP/1.1\r\nHo") == b""
    head = b"POST /tokenize HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    assert raw(url, head + b"Content-Length: 50\r\n\r\n{").startswith(b"HTTP/1.1 408")


def test_all_bodies_together_are_bounded_and_their_memory_is_released(service: Service) -> None:
    gate = make_app(only(service), KeyRing(None), block_tokens=16, max_sequences=8)
    gate.bodies = Pool(12_000)
    size = {"content": "a" * 1500}

    def wait_until_free() -> None:  # a request frees its body only after its client has received the end
        until = time.monotonic() + 10
        while gate.bodies.num_bytes:
            assert time.monotonic() < until
            time.sleep(0.01)

    for url in start(gate):
        with httpx.Client(base_url=url, timeout=60) as client:
            for _ in range(5):
                assert client.post("/tokenize", json=size).status_code == 200
                wait_until_free()
            refused = client.post("/tokenize", json={"content": "a" * 4000})
            assert refused.status_code == 413
            assert "parsing the body would take " in refused.json()["error"]["message"]
            wait_until_free()
            slow = {
                "prompt": "b" * 150,
                "max_tokens": 90,
                "stream": True,
                "logit_bias": {"2": -100, "0": -100},
            }
            with client.stream(
                "POST", "/v1/completions", content=json.dumps(slow).ljust(2900), headers=JSON
            ) as answer:
                assert answer.status_code == 200
                refused = client.post("/tokenize", json=size)
                assert (refused.status_code, refused.headers["connection"]) == (503, "close")
                assert int(refused.headers["retry-after"]) > 0
            wait_until_free()
            assert client.post("/tokenize", json=size).status_code == 200


def test_a_burst_begins_over_many_turns_of_the_event_loop_in_the_order_of_arrival() -> None:
    """What is ready in between, such as a probe of /health, is answered in between."""
    began: list[int] = []

    async def burst() -> None:
        pace, turns = _Pace(), 0
        asked = [asyncio.ensure_future(begin(pace, number)) for number in range(100)]
        asked[50].cancel()
        while not all(one.done() for one in asked):
            await asyncio.sleep(0)
            turns += 1
        assert began == [number for number in range(100) if number != 50]
        assert turns >= 99

    async def begin(pace: _Pace, number: int) -> None:
        await pace.begin()
        began.append(number)

    asyncio.run(asyncio.wait_for(burst(), 20))


def test_a_request_that_ends_while_the_rest_of_its_body_is_read_is_told_why() -> None:
    """Its refusal waits for the rest, so nothing of it has been sent."""

    async def test() -> None:
        is_discarding, sent = asyncio.Event(), list[Any]()

        async def receive() -> dict[str, Any]:
            if not is_discarding.is_set():
                is_discarding.set()
                await asyncio.sleep(60)
            return {"type": "http.request"}

        async def send(message: Any) -> None:
            sent.append(message)

        gate = Gate(
            Response(status_code=400),
            [RouteRule(method="POST", path="/a", scope="infer")],
            KeyRing(None),
            Limits(),
        )
        head = {"host": "localhost", "content-type": "application/json", "transfer-encoding": "chunked"}
        scope = {
            "type": "http", "method": "POST", "path": "/a", "scheme": "http", "state": {},
            "headers": [(name.encode(), value.encode()) for name, value in head.items()],
        }  # fmt: skip
        answering = asyncio.create_task(gate(scope, receive, send))
        await is_discarding.wait()
        gate.running.stop()
        await answering
        assert [message.get("status") for message in sent] == [503, None]
        assert b"the server is stopping" in sent[1]["body"]

    asyncio.run(asyncio.wait_for(test(), 20))


class Noting(Hook, Watch):
    """Notes what a hook and its watch hear of one request; refuses it in the phase `refuses`."""

    def __init__(self, refuses: str = "") -> None:
        self.heard: list[str] = []
        self._refuses = refuses

    def _note(self, phase: str) -> None:
        self.heard.append(phase)
        if phase == self._refuses:
            raise Refused(409, f"not in {phase}")

    def arrive(self, caller: Caller, rule: RouteRule, headers: Mapping[str, str]) -> Watch | None:
        self._note("arrive" if caller.key is None else "arrive, with a key")
        return self

    def admit(self, caller: Caller, rule: RouteRule, headers: Mapping[str, str]) -> Watch | None:
        self._note("admit" if caller.key is not None else "admit, without a key")
        return None

    def begin(self) -> None:
        self._note("begin")

    def asked(self, data: bytes) -> None:
        self._note(f"asked {data.decode()}")

    def sent(self, data: bytes) -> None:
        self.heard.append("sent")

    def after(self, status: int, seconds: float) -> None:
        self.heard.append(f"after {status}")


@pytest.mark.parametrize("refuses", ["", "arrive", "admit", "begin"])
def test_a_hook_hears_the_phases_of_a_request_in_order_and_may_refuse_it(refuses: str) -> None:
    hook = Noting(refuses)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await Response("{}")(scope, receive, send)

    async def test() -> None:
        gate = Gate(
            app, [RouteRule(method="POST", path="/a", scope="infer")], KeyRing(None), Limits(), hooks=[hook]
        )
        transport = httpx.ASGITransport(gate)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            answer = await client.post("/a", content=b"[]", headers=JSON)
        assert answer.status_code == (409 if refuses else 200)

    asyncio.run(asyncio.wait_for(test(), 20))
    phases = ["arrive", "admit", "begin", "asked []", "sent", "after 200"]
    if refuses:
        phases = [*phases[: phases.index(refuses) + 1], "sent", "after 409"]
    if refuses == "arrive":  # its watch was never made
        phases = ["arrive"]
    assert hook.heard == phases


class Failing(Hook, Watch):
    """Fails in a phase in which it may not."""

    def __init__(self, phase: str) -> None:
        def fail(*args: object, **named: object) -> None:
            raise RuntimeError("canary-71d")

        setattr(self, phase, fail)

    def arrive(self, caller: Caller, rule: RouteRule, headers: Mapping[str, str]) -> Watch | None:
        return self


@pytest.mark.parametrize("phase", ["token", "ended", "count"])
def test_an_answer_ends_with_an_error_if_a_watch_fails(service: Service, phase: str) -> None:
    governance = Governance()
    governance.hooks = (Failing(phase),)
    app = make_app(only(service), KeyRing(None), block_tokens=16, max_sequences=8, governance=governance)
    for url in start(app):
        whole = httpx.post(f"{url}/v1/chat/completions", json=ASK, timeout=20)
        assert (whole.status_code, whole.json()["error"]["type"]) == (500, "server_error")
        stream = httpx.post(f"{url}/v1/chat/completions", json={**ASK, "stream": True}, timeout=20)
        assert "internal error" in stream.text
        assert "canary-71d" not in whole.text + stream.text


def test_a_watch_that_fails_after_a_request_hides_it_from_nobody(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "argosy.serve")
    other = Noting()

    async def test() -> None:
        hooks = [Failing("after"), other]
        gate = Gate(
            Response("{}"),
            [RouteRule(method="GET", path="/a", scope="infer")],
            KeyRing(None),
            Limits(),
            hooks=hooks,
        )
        transport = httpx.ASGITransport(gate)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            assert (await client.get("/a")).status_code == 200

    asyncio.run(asyncio.wait_for(test(), 20))
    assert other.heard[-1] == "after 200"
    assert "internal error: RuntimeError" in caplog.text
    assert "GET /a 200" in caplog.text
