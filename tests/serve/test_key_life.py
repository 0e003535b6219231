"""The life of a key: tokens count against it however an answer ends, and a revoked key leaves nothing behind."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from argosy import Engine
from argosy.engine.loop import EngineLoop
from argosy.errors import Revoked
from argosy.guard.keys import Key, KeyFile, KeyRing
from argosy.guard.limits import Limits, UseFile
from argosy.prompt.builder import PromptBuilder
from argosy.prompt.replay import ReplayMemory
from argosy.serve.admin.key_watch import KeyWatch
from argosy.serve.answer.facts import ModelFacts
from argosy.serve.answer.service import Service
from argosy.serve.app import make_app
from argosy.serve.http.running import Run, Running
from tests.cli.tiny_chat_model import write_chat_model
from tests.serve.conftest import only, start

PROMPT = "A prompt of some length, so that it has blocks that are kept, in memory and in files. " * 2
ASK = {"prompt": PROMPT, "max_tokens": 40, "temperature": 0, "logit_bias": {"2": -100, "0": -100}}


@dataclass
class Server:
    url: str
    engine: Engine
    service: Service
    limits: Limits
    keys: KeyFile
    kv_dir: Path
    memory: ReplayMemory

    def add(self, name: str, **limits: Any) -> tuple[str, dict[str, str]]:
        key, secret = self.keys.add(name, **limits)
        headers = {"Authorization": f"Bearer {secret}"}
        wait_for(lambda: httpx.get(f"{self.url}/v1/models", headers=headers).status_code == 200)
        return key.id, headers

    def tokens_of(self, key_id: str) -> int:
        return self.limits._uses[key_id].tokens_today

    @property
    def tokens_run(self) -> int:
        """Prompt and answer tokens that the engine has counted, read once it is idle."""
        wait_for(lambda: not self.engine.has_work)
        totals = self.engine.facts().totals
        return totals.prompt_tokens + totals.new_tokens


def wait_for(is_so: Callable[[], bool], seconds: float = 10.0) -> None:
    until = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("keys")
    keys = KeyFile(root / "keys.json")
    keys.add("first")
    model = write_chat_model(root / "model", context_tokens=8192)
    limits = Limits(file=UseFile(root / "keys.json.use"))
    with (
        pytest.MonkeyPatch.context() as patch,
        Engine.open(model, memory="2GiB", threads=2, grammars=True, kv_dir=root / "kv") as engine,
    ):
        patch.setattr("argosy.guard.keys._LOOK_AGAIN_S", 0.02)
        patch.setattr("argosy.serve.admin.key_watch.LOOK_S", 0.02)
        facts = ModelFacts(
            id="tiny", family="", context_tokens=8192, num_layers=1, num_experts=1, experts_per_token=1, vocab_size=512
        )  # fmt: skip
        memory = ReplayMemory()
        prompts = PromptBuilder(engine.tokenizer, vocab_size=512, memory=memory)
        ring = KeyRing(keys)
        with EngineLoop(engine) as loop:
            service = Service(loop, prompts, engine.tokenizer, facts)
            app = make_app(only(service), ring, block_tokens=16, max_sequences=8, limits=limits)
            with KeyWatch(ring, limits, app.running, service.revoke):
                for url in start(app):
                    yield Server(url, engine, service, limits, keys, root / "kv", memory)
        prompts.close()
    limits.close()


def hang_up(url: str, path: str, body: dict[str, Any], headers: dict[str, str], *, lines: int) -> None:
    """Send a request, and close the connection after `lines` lines of the answer."""
    with httpx.stream("POST", url + path, json=body, headers=headers, timeout=30) as answer:
        for _, _line in zip(range(lines), answer.iter_lines(), strict=False):
            pass


def hang_up_unread(
    url: str, path: str, body: dict[str, Any], headers: dict[str, str], wait: Callable[[], None]
) -> None:
    """Send a request, wait, and close the connection without reading the answer."""
    request = httpx.Request("POST", url + path, json=body, headers=headers)
    head = f"POST {path} HTTP/1.1\r\n" + "".join(
        f"{name}: {value}\r\n" for name, value in request.headers.items()
    )
    with socket.create_connection((request.url.host, request.url.port or 80)) as connection:
        connection.sendall(head.encode() + b"\r\n" + request.read())
        wait()


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"])
@pytest.mark.parametrize(
    "how", ["ended", "streamed", "hung up in a stream", "hung up before an answer", "failed"]
)
def test_the_tokens_of_an_answer_count_however_it_ends(
    server: Server, monkeypatch: pytest.MonkeyPatch, path: str, how: str
) -> None:
    key_id, headers = server.add(f"{path} {how}")
    body: dict[str, Any] = {"max_tokens": 60, "temperature": 1.0}
    if path == "/v1/completions":
        body["prompt"] = f"{path} {how}"
    elif path == "/v1/responses":
        body["input"] = f"{path} {how}"
        body["max_output_tokens"] = body.pop("max_tokens")
    else:
        body["messages"] = [{"role": "user", "content": f"{path} {how}"}]
    before = server.tokens_run
    if how == "ended":
        assert httpx.post(server.url + path, json=body, headers=headers).status_code == 200
    elif how == "streamed":
        hang_up(server.url, path, body | {"stream": True}, headers, lines=10_000)
    elif how == "hung up in a stream":
        hang_up(server.url, path, body | {"stream": True}, headers, lines=8)
    elif how == "hung up before an answer":
        new_tokens = server.engine.facts().totals.new_tokens
        hang_up_unread(
            server.url,
            path,
            body,
            headers,
            lambda: wait_for(lambda: server.engine.facts().totals.new_tokens > new_tokens),
        )
    else:
        steps = iter(range(6))
        commit = server.engine._commit

        def fails(*given: Any) -> Any:
            if next(steps, None) is None:
                raise RuntimeError
            return commit(*given)

        monkeypatch.setattr(server.engine, "_commit", fails)
        assert httpx.post(server.url + path, json=body, headers=headers).status_code in (200, 500)
        monkeypatch.undo()
    wait_for(lambda: server.limits._running == {})
    # The step in which the client hung up has ended, but may not be counted yet.
    run = server.tokens_run - before
    wait_for(lambda: server.tokens_of(key_id) == run > 0)


def test_a_key_whose_data_cannot_be_deleted_does_not_keep_those_of_others() -> None:
    gone, deleted, limits = [["a", "b"]], list[str](), Limits()
    ring: Any = SimpleNamespace(look=lambda: gone.pop() if gone else [], fault=None)
    running = Running()

    def delete(key_id: str) -> None:
        deleted.append(key_id)
        if deleted == ["a"]:
            raise OSError("the drive is full")

    watch = KeyWatch(ring, limits, running, delete)
    with running.at_work("b"):
        watch._turn()
        assert deleted == ["a", "b"]
        assert all(
            isinstance(running.why_not(Run(key=Key(id=i, name=i, sha256="0" * 64))), Revoked) for i in "ab"
        )
    watch._turn()
    assert deleted == ["a", "b", "a", "b"]  # a thread worked for b, and may have kept something
    watch._turn()
    assert len(deleted) == 4


def test_answers_abandoned_early_use_up_the_days_tokens(server: Server) -> None:
    _, headers = server.add("greedy", tokens_per_day=60)
    for _ in range(2):
        hang_up(server.url, "/v1/completions", ASK | {"stream": True}, headers, lines=2)
    assert httpx.post(f"{server.url}/v1/completions", json=ASK, headers=headers).status_code == 429


def test_a_client_that_hung_up_frees_its_concurrent_request(server: Server) -> None:
    _, headers = server.add("narrow", concurrent_requests=1)
    for seconds in (0.0, 0.02, 0.05):
        hang_up_unread(server.url, "/v1/completions", ASK, headers, partial(time.sleep, seconds))
        wait_for(lambda: server.limits._running == {})
    assert httpx.post(f"{server.url}/v1/completions", json=ASK, headers=headers).status_code == 200


def test_a_revoked_key_leaves_nothing_and_other_keys_lose_nothing(server: Server) -> None:
    stays, others_headers = server.add("stays")
    gone, headers = server.add("gone")
    chat = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 30, "temperature": 0}
    chat |= {"response_format": {"type": "json_object"}}
    for own in (headers, others_headers):
        assert httpx.post(f"{server.url}/v1/chat/completions", json=chat, headers=own).status_code == 200
        assert httpx.post(f"{server.url}/v1/completions", json=ASK, headers=own).status_code == 200
    files = server.engine._started.cache._files
    assert files is not None
    wait_for(lambda: not server.engine.is_writing)

    def held(tenant: str) -> dict[str, int]:
        return {
            "blocks": sum(
                c is not None and c.tenant == tenant for c in server.engine._started.cache.blocks._contents
            ),
            "files": len(list((server.kv_dir / files._tenant(tenant)[1]).glob("*.kv"))),
            "grammars": sum(
                key[0] == tenant for key in server.engine.requests._vocabulary.grammars._compiled
            ),  # type: ignore[union-attr]
            "counts": int(tenant in server.limits._uses),
        }

    wait_for(lambda: held(gone) == held(stays) and all(held(gone).values()))
    before = held(stays)
    long = ASK | {"prompt": PROMPT[:90], "max_tokens": 150, "stream": True}
    with httpx.stream(
        "POST", f"{server.url}/v1/completions", json=long, headers=headers, timeout=30
    ) as answer:
        lines = answer.iter_lines()
        next(lines)
        server.engine._lock.acquire()  # no step runs until the key is revoked
        server.keys.revoke("gone")
        wait_for(lambda: gone in server.service.loop._revoked)  # type: ignore[attr-defined]
        server.engine._lock.release()
        last = [line for line in lines if line][-1]
    assert "the key was revoked" in last
    assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == 401
    wait_for(lambda: not any(held(gone).values()))
    assert held(stays) == before
    again = httpx.post(f"{server.url}/v1/completions", json=ASK, headers=others_headers).json()
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 100
