"""All servers behind a router are asked for what concerns all of them, and counted together."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from argosy.guard.keys import KeyFile, KeyRing
from argosy.guard.limits import Limits
from argosy.route.app import make_router
from argosy.route.everywhere import EVERYWHERE
from argosy.route.servers import Fleet
from argosy.route.upstream import parse_address
from argosy.serve.app import ROUTES
from argosy.serve.http.gate import Gate
from tests.route.conftest import RealServer, RunningRouter, free_port, routing
from tests.route.test_hostile import faking
from tests.serve.conftest import start

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}


def said(**answer: Any) -> Callable[[socket.socket], None]:
    """A server that gives this answer to everything."""
    body = json.dumps(answer).encode()
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
    return lambda connection: connection.sendall(head + body)


def test_a_stop_reaches_every_server_and_so_does_its_end(
    module_router: RunningRouter, servers: Sequence[RealServer]
) -> None:
    def direct() -> list[int]:
        return [httpx.post(f"{one.url}/v1/chat/completions", json=CHAT).status_code for one in servers]

    with module_router.client() as client:
        stop = {"kind": "model", "name": "tiny"}
        answer = client.post("/v1/engine/stops", json=stop)
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"] == ["tiny"]
        assert [one["server"] for one in answer.json()["servers"]] == [one.url for one in servers]
        assert direct() == [403, 403]
        assert client.get("/v1/engine/stops").json()["model"] == ["tiny"]
        assert client.post("/v1/engine/stops", json=stop | {"is_stopped": False}).json()["model"] == []
        assert direct() == [200, 200]


def test_a_server_that_is_down_makes_a_stop_fail_by_name_and_the_others_stop(
    module_router: RunningRouter, servers: Sequence[RealServer]
) -> None:
    stop, dead = {"kind": "user", "name": "eve"}, f"http://127.0.0.1:{free_port()}"
    with routing([servers[0].url, dead]) as router, router.client() as client:
        refused = client.post("/v1/engine/stops", json=stop)
        assert refused.status_code == 503
        message = refused.json()["error"]["message"]
        assert message.startswith(f"1 of 2 servers have done it. Not {dead}: it is down")
    address = f"{servers[0].url}/v1/engine/stops"
    assert httpx.get(address).json()["user"] == ["eve"]
    httpx.post(address, json=stop | {"is_stopped": False})


def test_what_all_servers_refuse_is_refused_as_they_do(module_router: RunningRouter) -> None:
    with module_router.client() as client:
        refused = client.post("/v1/engine/stops", json={"kind": "model", "name": "none"})
        assert refused.status_code == 404
        assert "none" in refused.json()["error"]["message"]
        assert client.post("/v1/engine/memory", json={"memory": 1}).status_code in (400, 409)


def test_an_erasure_is_the_sum_of_what_all_servers_have_erased() -> None:
    one = {"object": "erasure", "key": "key-1", "responses": 2, "answers": 1, "audit_contents": None}
    more = said(**one | {"responses": 5, "audit_contents": 3})
    with faking(said(**one), more) as (router, _), router.client() as client:
        answer = client.delete("/v1/engine/data/key-1").json()
    servers = answer.pop("servers")
    assert answer == one | {"responses": 7, "answers": 2, "audit_contents": 3}
    assert [entry["responses"] for entry in servers] == [2, 5]


@pytest.mark.parametrize("path", ["/api/generate", "/api/chat"])
def test_a_model_is_loaded_and_unloaded_on_every_server(path: str) -> None:
    answer = {"model": "tiny", "done": True}
    unloaded, busy = said(**answer, done_reason="unload"), said(**answer, done_reason="load")
    with faking(unloaded, unloaded, busy) as (router, fakes), router.client() as client:
        told = client.post(path, json={"model": "tiny", "keep_alive": 0})
        assert told.json() == answer | {"done_reason": "load"}  # one server still has it in memory
        assert [len(fake.bodies) for fake in fakes] == [1, 1, 1]
        client.post(
            path, json={"model": "tiny", "prompt": "x", "messages": [{"role": "user", "content": "x"}]}
        )
        assert sum(len(fake.bodies) for fake in fakes) == 4


def test_an_answer_that_cannot_be_read_counts_as_not_done() -> None:
    done, gone = said(model=[], is_saved=True), lambda connection: connection.close()
    with faking(done, gone) as (router, fakes), router.client() as client:
        refused = client.post("/v1/engine/stops", json={"kind": "user", "name": "eve"})
    assert refused.status_code == 503
    assert f"1 of 2 servers have done it. Not {fakes[1].url}: " in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/v1/cluster"), ("POST", "/v1/cluster/add"), ("POST", "/v1/cluster/drain")]
)
def test_workers_are_not_asked_of_a_server_by_chance(
    module_router: RunningRouter, method: str, path: str
) -> None:
    with module_router.client() as client:
        refused = client.request(method, path, json={"host": "127.0.0.1:7070"})
        assert refused.status_code == 409
        assert "workers belong to one server" in refused.json()["error"]["message"]


def test_every_route_for_admins_is_answered_by_all_servers_or_refused() -> None:
    paths = {route.rule.path for route in ROUTES if route.rule.scope == "admin"}
    assert {path for path in paths if not path.startswith("/v1/cluster")} == EVERYWHERE.keys()


def test_a_request_may_choose_its_policy_through_the_router() -> None:
    with faking(said(choices=[])) as (router, (fake,)), router.client() as client:
        answer = client.post("/v1/chat/completions", json=CHAT, headers={"x-argosy-policy": "strict"})
        assert answer.status_code == 200, answer.text
        assert b"x-argosy-policy: strict" in fake.heads[0].lower()


# Tokens per day


async def answer_with_tokens(scope: Scope, receive: Receive, send: Send) -> None:
    """An application whose every answer takes 60 tokens."""
    request = Request(scope, receive)
    if request.method == "POST":
        request.state.caller.count(prompt=10, new=50)
    await JSONResponse({"choices": []})(scope, receive, send)


@contextmanager
def counting(keys: KeyFile, num_servers: int) -> Iterator[tuple[list[str], list[Limits]]]:
    """Servers that only count."""
    with ExitStack() as stack:
        limits = [Limits() for _ in range(num_servers)]
        policies = [route.rule for route in ROUTES]
        gates = [Gate(answer_with_tokens, policies, KeyRing(keys), one) for one in limits]
        yield [stack.enter_context(contextmanager(start)(gate)) for gate in gates], limits


@contextmanager
def routing_with_keys(keys: KeyFile, urls: Sequence[str]) -> Iterator[str]:
    fleet = Fleet([parse_address(url) for url in urls])
    for server in fleet.servers:
        server.state = "up"
    with contextmanager(start)(make_router(fleet, KeyRing(keys))) as url:
        yield url


def test_the_tokens_of_a_day_are_those_that_all_servers_have_counted(tmp_path: Path) -> None:
    keys = KeyFile(tmp_path / "keys.json")
    one, secret = keys.add("app", tokens_per_day=200)
    headers = {"authorization": f"Bearer {secret}"}
    with counting(keys, 3) as (urls, limits):
        for already in (0, 2):  # another router, or one that was started again, knows what was used
            with routing_with_keys(keys, urls) as url:
                answers = []
                for _ in range(6 - already):
                    answers.append(httpx.post(f"{url}/v1/chat/completions", json=CHAT, headers=headers))
                    if already == 0 and len(answers) == 2:
                        break
        assert [answer.status_code for answer in answers] == [200, 200, 429, 429]
        assert sum(limit.used_today(one)[0] for limit in limits) == 240
        left = [answer.headers["x-ratelimit-remaining-tokens"] for answer in answers]
        assert left == ["80", "20", "0", "0"]
        assert 86_000 < int(answers[-1].headers["retry-after"]) <= 86_400


def test_the_requests_of_a_minute_are_counted_for_all_servers_together(tmp_path: Path) -> None:
    keys = KeyFile(tmp_path / "keys.json")
    secret = keys.add("app", requests_per_minute=3)[1]
    with counting(keys, 2) as (urls, _), routing_with_keys(keys, urls) as url:
        ask = {"json": CHAT, "headers": {"authorization": f"Bearer {secret}"}}
        found = [httpx.post(f"{url}/v1/chat/completions", **ask).status_code for _ in range(5)]  # type: ignore[arg-type]
    assert found == [200, 200, 200, 429, 429]


def test_a_server_that_does_not_answer_counts_with_what_it_said_last(tmp_path: Path) -> None:
    keys = KeyFile(tmp_path / "keys.json")
    secret = keys.add("app", tokens_per_day=100)[1]
    ask = {"json": CHAT, "headers": {"authorization": f"Bearer {secret}"}}
    with counting(keys, 1) as (urls, _):
        fleet = Fleet([parse_address(url) for url in (*urls, *urls)])
        fleet.servers[0].state = "up"
        with contextmanager(start)(make_router(fleet, KeyRing(keys))) as url:
            assert httpx.post(f"{url}/v1/chat/completions", **ask).status_code == 200  # type: ignore[arg-type]
            fleet.servers[1].used = {keys.read()[0].id: (60, 1e12)}
            assert httpx.post(f"{url}/v1/chat/completions", **ask).status_code == 429  # type: ignore[arg-type]
