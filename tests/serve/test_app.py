"""Routes outside the dialects: model names, health and readiness, and the page's icon."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from argosy import Engine
from argosy.engine.loop import SILENT_S
from argosy.guard.keys import KeyRing
from argosy.serve.answer.service import Common, Service
from argosy.serve.app import ROUTES, make_app
from tests.cli.tiny_chat_model import write_chat_model
from tests.serve.bodies import BODIES
from tests.serve.conftest import only, serving, start

# These need a reranker or a model that fills in: `test_embeddings.py`. A moderation's model is a check.
ELSEWHERE = {"/rerank", "/v1/rerank", "/infill", "/v1/moderations"}
ELSEWHERE |= {"/v1/load_lora_adapter", "/v1/unload_lora_adapter"}  # these need adapters: `test_adapters.py`
# Every other route whose body names a model; forms: `test_audio.py`.
NAMING = {
    route.rule.path: BODIES[route.rule.path]("Hi")
    | ({"stream": False} if "stream" in route.body.model_fields else {})
    for route in ROUTES
    if not route.rule.takes_form and "model" in getattr(route.body, "model_fields", ())
    if route.rule.path not in ELSEWHERE
}
TOLD = (
    'the model "gpt-4o" does not exist; this server has: tiny\n'
    "hint: `argosy serve --any-model` accepts every model name"
)


@pytest.mark.parametrize("path", NAMING)
def test_an_unknown_model_is_not_found_and_the_served_model_or_no_name_is_accepted(
    client: httpx.Client, path: str
) -> None:
    answer = client.post(path, json=NAMING[path] | {"model": "gpt-4o"})
    assert answer.status_code == 404
    if path.startswith("/v1/messages"):
        assert answer.json() == {"type": "error", "error": {"type": "not_found_error", "message": TOLD}}
    elif path.startswith("/api/"):
        assert answer.json() == {"error": TOLD}
    else:
        known = {"type": "not_found_error", "param": "model", "code": "model_not_found"}
        assert answer.json() == {"error": {"message": TOLD, **known}}
        assert client.get("/v1/models/gpt-4o").json() == answer.json()
    for named in ({}, {"model": "tiny"}, {"model": None}):
        assert client.post(path, json=NAMING[path] | named).status_code == 200
    assert client.post(path, json=NAMING[path] | {"model": ""}).status_code == 404


@pytest.fixture(scope="module")
def lenient(service: Service) -> Iterator[str]:
    any_model = Service(
        service.loop, service.prompts, service.tokenizer, service.model, Common(any_model=True)
    )
    yield from start(make_app(only(any_model), KeyRing(None), block_tokens=16, max_sequences=8))


@pytest.mark.parametrize("path", NAMING)
def test_with_any_model_every_name_means_the_served_model(lenient: str, path: str) -> None:
    answer = httpx.post(lenient + path, json=NAMING[path] | {"model": "claude-opus-4-5"})
    assert answer.status_code == 200
    assert answer.json().get("model", "tiny") == "tiny"
    assert httpx.get(f"{lenient}/v1/models/claude-opus-4-5").json()["id"] == "tiny"


def test_clients_of_llama_server_find_the_context_and_the_slots_and_no_path_or_content(
    client: httpx.Client, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    props = client.get("/props").json()
    context_tokens = service.model.context_tokens
    assert props["default_generation_settings"]["n_ctx"] == context_tokens
    assert props["model_path"] == props["model_alias"] == "tiny"
    assert props["modalities"] == {"vision": False, "audio": False}
    assert props["chat_template"] == client.get("/tokenizer_info").json()["chat_template"]
    assert props["total_slots"] == 8
    facts = service.loop.snapshot()
    two_run = replace(facts, engine=replace(facts.engine, num_running=2))
    monkeypatch.setattr(service.loop, "snapshot", lambda: two_run)
    slots = [{"id": at, "is_processing": at < 2, "n_ctx": context_tokens} for at in range(8)]
    assert client.get("/slots").json() == slots


def test_the_icon_is_at_the_path_that_browsers_request(client: httpx.Client) -> None:
    icon = client.get("/favicon.ico")
    assert icon.headers["content-type"].startswith("image/svg+xml")
    assert icon.content == client.get("/page/icon.svg").content


def test_curl_without_a_content_type_is_told_which_header_to_send(client: httpx.Client) -> None:
    form = {"content-type": "application/x-www-form-urlencoded"}
    for headers in (form, {}):
        answer = client.post("/tokenize", content=b'{"content": "a"}', headers=headers)
        assert answer.status_code == 415
        assert "-H 'content-type: application/json'" in answer.json()["error"]["message"]


def test_a_server_whose_engine_or_queue_has_stopped_is_healthy_and_not_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_chat_model(tmp_path / "model")
    with Engine.open(model, memory="2GiB", threads=1) as engine, serving(engine) as service:
        silent = replace(service.loop.snapshot(), silent_s=SILENT_S + 1)
        may_go_on = threading.Event()
        for url in start(make_app(only(service), KeyRing(None), block_tokens=16, max_sequences=8)):

            def answers(url: str = url) -> list[httpx.Response]:
                return [httpx.get(url + path) for path in ("/health", "/ready")]

            with monkeypatch.context() as patched:
                patched.setattr(service.loop, "snapshot", lambda: silent)
                health, ready = answers()
                assert (health.status_code, ready.status_code) == (200, 503)
                assert "has shown no sign of life for 301 s" in ready.json()["error"]["message"]
                assert ready.headers["retry-after"] == "30"
            monkeypatch.setattr(service.prompts, "tokenize", lambda *_, **__: may_go_on.wait(20) and [])
            monkeypatch.setattr(service.work._small, "_job_s", 0.0)
            with ThreadPoolExecutor(3) as clients:
                asked = [
                    clients.submit(httpx.post, f"{url}/tokenize", json={"content": "a"}) for _ in range(3)
                ]
                until = time.monotonic() + 20
                while (found := answers())[1].status_code == 200:
                    assert time.monotonic() < until
                assert found[0].status_code == 200
                assert "wait for a thread that does not come" in found[1].json()["error"]["message"]
                may_go_on.set()
                assert [one.result().status_code for one in asked] == [200] * 3
            assert answers()[1].status_code == 200


def test_a_server_with_a_failed_engine_is_neither_ready_nor_healthy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_chat_model(tmp_path / "model")
    with Engine.open(model, memory="2GiB", threads=1) as engine, serving(engine) as service:
        for url in start(make_app(only(service), KeyRing(None), block_tokens=16, max_sequences=8)):
            assert [httpx.get(url + path).status_code for path in ("/health", "/ready")] == [200, 200]
            monkeypatch.setattr("argosy.engine.loop._AFTER_FAILURE_S", 0.0)
            # A class of its own: idle loops of other engines in this process look at `is_writing` every second.
            failing = type("Failing", (Engine,), {"is_writing": property(lambda _: 1 / 0)})
            monkeypatch.setattr(engine, "__class__", failing)
            service.loop.revoke("nobody")  # starts a round of the engine's loop
            until = time.monotonic() + 20
            while httpx.get(f"{url}/health").status_code == 200:
                assert time.monotonic() < until
            for path in ("/health", "/ready"):
                answer = httpx.get(url + path)
                assert answer.status_code == 503
                assert "the engine has failed" in answer.json()["error"]["message"]
            answer = httpx.post(f"{url}/v1/completions", json=BODIES["/v1/completions"]("Hi"))
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "30")
