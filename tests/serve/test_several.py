"""Three tiny models on one server: each says what it says alone, whatever is loaded and unloaded between."""

from __future__ import annotations

import json
import re
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from argosy import Engine, SamplingParams
from argosy.config import MIB, Claim
from argosy.engine.shared import Ready, make_ready
from argosy.guard.keys import KeyRing
from argosy.open.models import configure, open_files
from argosy.serve.answer.kept_items import KeptItems
from argosy.serve.answer.service import Common
from argosy.serve.answer.work import Work
from argosy.serve.app import make_app
from argosy.serve.claims import server_claims
from argosy.serve.models.entry import Entry, Offer
from argosy.serve.models.models import Models
from tests.models.tiny import qwen3_moe, write_model
from tests.prompt.tokenizers_for_tests import CHATML, byte_level_json, write_tokenizer
from tests.serve.conftest import start
from tests.serve.test_run import end, served

SERVER = (*server_claims(keeps_content=False), Claim("replay_bytes", MIB))
NAMES = ("one", "two", "three")
PROMPTS = ("The sea", "A short story about", "x", "Once upon a time there was a small ship")
NUM_NEW = 12


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for seed, name in enumerate(NAMES, start=3):
        found[name] = directory = tmp_path_factory.mktemp("several") / name
        write_model(directory, qwen3_moe(vocab_size=512, max_position_embeddings=256), seed=seed)
        write_tokenizer(directory, byte_level_json(), {"eos_token": "<|im_end|>", "chat_template": CHATML})
    return found


@pytest.fixture(scope="module")
def alone(paths: dict[str, Path]) -> dict[tuple[str, str], str]:
    """The answers of each model in a process of its own."""
    said = {}
    params = SamplingParams(max_tokens=NUM_NEW, ignore_eos=True)
    for name, path in paths.items():
        with Engine.open(path, memory="2GiB", threads=1) as engine:
            for prompt in PROMPTS:
                ids = engine.prompts.tokenize(prompt)
                said[name, prompt] = engine.generate(ids, params).text
    assert len(set(said.values())) == len(said)  # the models differ
    return said


@dataclass
class Several:
    url: str
    models: Models
    ready: list[Ready]
    opened: list[str]  # names of models, whenever one was opened

    def say(self, name: str, prompt: str) -> str:
        body = {"model": name, "prompt": prompt, "max_tokens": NUM_NEW, "temperature": 0, "ignore_eos": True}
        answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        text: str = answer.json()["choices"][0]["text"]
        return text

    def states(self) -> dict[str, str]:
        data = httpx.get(f"{self.url}/v1/models").json()["data"]
        return {one["id"]: one["state"] for one in data}


@pytest.fixture(scope="module")
def several(paths: dict[str, Path]) -> Iterator[Several]:
    """A server with room for two floors, and for all experts of these two."""
    ready, process_bytes = made_ready(paths)
    floors = [one.floor_bytes for one in ready]
    common = Common(ring=None, kept=KeptItems(), work=Work())
    opened: list[str] = []
    models = Models(
        list(map(Offer.of_ready, ready)), partial(Entry, common=common, note_use=opened.append), common,
        budget_bytes=process_bytes + floors[0] + floors[1] + floors[2] // 2, process_bytes=process_bytes,
    )  # fmt: skip
    for url in start(make_app(models, KeyRing(None), block_tokens=16, max_sequences=4)):
        yield Several(url, models, ready, opened)
    for entry in models.loader.entries:
        entry.close()


def test_models_are_listed_before_they_are_loaded(several: Several) -> None:
    data = httpx.get(f"{several.url}/v1/models").json()["data"]
    assert [one["id"] for one in data] == list(NAMES)
    for one in data:
        assert (one["state"], one["context_length"], one["capabilities"]["tools"]) == (
            "unloaded",
            256,
            "generic",
        )
        assert httpx.get(f"{several.url}/v1/models/{one['id']}").json() == one
    assert [httpx.get(several.url + path).status_code for path in ("/health", "/ready")] == [200, 200]
    state = httpx.get(f"{several.url}/v1/engine/state").json()
    assert state["model"]["id"] == "one"
    assert state["memory"]["budget_bytes"] == several.models.budget_bytes
    unknown = httpx.post(f"{several.url}/v1/completions", json={"model": "four", "prompt": "x"})
    assert unknown.status_code == 404
    assert "this server has: one, two, three" in unknown.json()["error"]["message"]


def test_clients_of_ollama_and_llama_server_see_all_models_without_loading_any(several: Several) -> None:
    tags = httpx.get(f"{several.url}/api/tags").json()["models"]
    assert [one["name"] for one in tags] == [f"{name}:latest" for name in NAMES]
    assert all(one["size"] > 0 for one in tags)
    assert httpx.get(f"{several.url}/api/ps").json() == {"models": []}
    for name in NAMES:
        shown = httpx.post(f"{several.url}/api/show", json={"model": f"{name}:latest"}).json()
        assert shown["capabilities"] == ["completion", "tools"]
        assert shown["template"] == CHATML
        assert shown["model_info"]["qwen3_moe.context_length"] == 256
    for query, found in (
        ("", "one"),
        ("?model=", "one"),
        ("?model=two", "two"),
        ("?model=two:latest", "two"),
    ):
        props = httpx.get(f"{several.url}/props{query}").json()
        assert (props["model_alias"], props["chat_template"], props["eos_token"]) == (
            found,
            CHATML,
            "<|im_end|>",
        )
        slots = httpx.get(f"{several.url}/slots{query}").json()
        assert slots == [{"id": at, "is_processing": False, "n_ctx": 256} for at in range(4)]
    for path in ("/props?model=four", "/slots?model=four"):
        assert httpx.get(several.url + path).status_code == 404
    assert httpx.post(f"{several.url}/api/show", json={"model": "four"}).status_code == 404
    assert set(several.states().values()) == {"unloaded"}


def test_each_model_says_what_it_says_alone_whatever_is_loaded_and_unloaded(
    several: Several, alone: dict[tuple[str, str], str]
) -> None:
    for name in ("one", "two", "three", "one", "two", "three", "three", "one"):
        for prompt in PROMPTS:
            assert several.say(name, prompt) == alone[name, prompt]
        states = several.states()
        assert states[name] == "ready"
        assert list(states.values()).count("ready") <= 2  # a third floor does not fit
    assert set(several.opened) == set(NAMES)
    assert len(several.opened) > len(NAMES)  # each time
    # A route that names no model means the first one.
    assert httpx.get(f"{several.url}/tokenizer_info").json()["eos_token"] == "<|im_end|>"


def test_models_that_answer_at_once_take_turns_and_one_beyond_the_memory_is_refused(
    several: Several, alone: dict[tuple[str, str], str]
) -> None:
    wrong: list[str] = []
    num_refused = 0

    def ask(name: str, seed: int) -> None:
        nonlocal num_refused
        body = {"model": name, "max_tokens": NUM_NEW, "temperature": 0, "ignore_eos": True}
        for number in range(6):
            prompt = PROMPTS[(seed + number) % len(PROMPTS)]
            while True:
                answer = httpx.post(
                    f"{several.url}/v1/completions", json=body | {"prompt": prompt}, timeout=60
                )
                if answer.status_code != 503:
                    break
                num_refused += 1
                assert int(answer.headers["retry-after"]) > 0
                assert "models that answer now leave" in answer.json()["error"]["message"]
                time.sleep(0.01)
            if answer.json()["choices"][0]["text"] != alone[name, prompt]:
                wrong.append(f"{name}: {answer.text}")

    threads = [threading.Thread(target=ask, args=(name, seed)) for seed in range(2) for name in NAMES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert num_refused > 0


def test_a_client_of_ollama_unloads_a_model_and_loads_it_again(several: Several) -> None:
    several.say("one", PROMPTS[0])
    several.say("two", PROMPTS[0])
    loaded = {one["name"]: one for one in httpx.get(f"{several.url}/api/ps").json()["models"]}
    assert loaded.keys() == {"one:latest", "two:latest"}
    held = {one.facts.id: one.memory_bytes for one in several.models.facts()}
    assert loaded["two:latest"]["size"] == held["two"] > several.ready[1].floor_bytes
    assert loaded["two:latest"]["expires_at"].startswith("9999-")
    stop = {"model": "two", "keep_alive": 0}
    for path in ("/api/generate", "/api/chat"):  # the second time it is not in memory, and is not loaded
        answer = httpx.post(several.url + path, json=stop)
        assert answer.json().items() >= {"model": "two", "done": True, "done_reason": "unload"}.items()
        assert "x-ignored-params" not in answer.headers
        assert several.states() == {"one": "ready", "two": "unloaded", "three": "unloaded"}
    assert httpx.post(f"{several.url}/api/chat", json={"model": "four", "keep_alive": 0}).status_code == 404
    answer = httpx.post(f"{several.url}/api/generate", json={"model": "two", "keep_alive": "5m"})
    assert answer.json()["done_reason"] == "load"
    assert answer.headers["x-ignored-params"] == "keep_alive"
    assert several.states()["two"] == "ready"


def test_a_response_is_kept_while_its_model_is_not_in_memory(several: Several) -> None:
    made = httpx.post(
        f"{several.url}/v1/responses",
        json={"model": "two", "input": "Hi", "max_output_tokens": 4},
        timeout=60,
    ).json()
    for name in NAMES:
        assert httpx.post(f"{several.url}/api/chat", json={"model": name, "keep_alive": 0}).status_code == 200
    address = f"{several.url}/v1/responses/{made['id']}"
    assert httpx.get(address).json()["output"] == made["output"]
    assert httpx.get(f"{address}/input_items").json()["data"][0]["role"] == "user"
    more = {"model": "one", "input": "And?", "previous_response_id": made["id"], "max_output_tokens": 4}
    assert httpx.post(f"{several.url}/v1/responses", json=more, timeout=60).status_code == 200
    assert httpx.delete(address).json()["deleted"] is True
    assert httpx.get(address).status_code == 404


def test_a_model_in_use_is_not_unloaded(several: Several) -> None:
    body = {"model": "one", "prompt": "x", "options": {"num_predict": 200, "temperature": 0}}
    with httpx.stream("POST", f"{several.url}/api/generate", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        stop = httpx.post(f"{several.url}/api/generate", json={"model": "one", "keep_alive": "0s"})
        assert stop.json()["done_reason"] == "load"  # it still is
        assert stop.headers["x-ignored-params"] == "keep_alive"
        assert json.loads(list(lines)[-1])["done_reason"] in ("stop", "length")
    assert several.states()["one"] == "ready"


def test_the_state_and_metrics_tell_models_apart(several: Several) -> None:
    several.say("one", PROMPTS[0])
    several.say("two", PROMPTS[0])
    state = httpx.get(f"{several.url}/v1/engine/state").json()
    assert state["model"]["id"] == "two"  # the one used last
    ready = {one["id"]: one for one in state["models"] if one["state"] == "ready"}
    assert ready.keys() == {"one", "two"}
    assert sum(line["bytes"] for line in state["memory"]["lines"]) == several.models.held_bytes
    assert ready["one"]["memory_bytes"] > several.ready[0].floor_bytes
    metrics = httpx.get(f"{several.url}/metrics").text
    for name in ("one", "two"):
        assert re.search(rf'^argosy_new_tokens_total{{model="{name}"}} [1-9]', metrics, re.MULTILINE)
        assert f'argosy_seconds_total{{model="{name}",part="router"}}' in metrics
    assert 'argosy_seconds_total{model="three"' not in metrics  # it is not in memory


def made_ready(paths: dict[str, Path]) -> tuple[list[Ready], int]:
    options: dict[str, Any] = {
        "memory": 1 << 32, "threads": 1, "grammars": True, "max_sequences": 4, "claims": (Claim("replay_bytes", MIB),),
    }  # fmt: skip
    wanted = []
    for name, path in paths.items():
        files = open_files(path)
        wanted.append((name, files, configure(path, files, **options)))
    return make_ready(wanted, claims=SERVER, recorder=None)


def test_a_model_shrinks_and_grows_between_the_tokens_of_an_answer(
    paths: dict[str, Path], alone: dict[tuple[str, str], str]
) -> None:
    (ready, *_), _ = made_ready({"one": paths["one"]})
    plan = ready.plan
    fewest, most = plan.slots.own, plan.slots.num_experts
    assert fewest == ready.model.experts_per_token
    shares = {fewest: 0, fewest + 3: 7 * plan.slots.slot_bytes // 2, most: ready.most_bytes}
    params = SamplingParams(max_tokens=NUM_NEW, ignore_eos=True)
    for _ in range(2):  # it opens again after it was closed
        engine = ready.open(ready.most_bytes)
        for prompt in PROMPTS:
            sequence = engine.submit(engine.prompts.tokenize(prompt), params)
            for num_slots in (fewest, fewest + 3, most) * NUM_NEW:
                engine.step()
                if sequence.result is not None:
                    break
                plan = engine.resize(ready.budget_bytes(shares[num_slots]), is_share=True)
                facts = engine.facts()
                assert plan.slots.own == num_slots <= facts.expert_slots <= plan.slots.reachable
                assert facts.num_resident <= facts.expert_slots
            assert sequence.result is not None
            assert sequence.result.text == alone["one", prompt]
        ready.close(engine)


def test_the_command_serves_several_models_and_unloads_idle_ones(paths: dict[str, Path]) -> None:
    with served(
        paths["one"],
        str(paths["two"]),
        "--name",
        "a",
        "--name",
        "b/c",
        "--preload",
        "b/c",
        "--idle-unload",
        "1s",
        constants={"argosy.serve.models.loading.LOOK_S": 0.05},
    ) as (url, process):
        data = httpx.get(f"{url}/v1/models").json()["data"]
        assert [(one["id"], one["state"]) for one in data] == [("a", "unloaded"), ("b/c", "ready")]
        ask = {"model": "a", "messages": [{"role": "user", "content": "canary"}], "max_tokens": 3}
        assert httpx.post(f"{url}/v1/chat/completions", json=ask, timeout=60).status_code == 200
        for one in httpx.get(f"{url}/api/ps").json()["models"]:
            assert datetime.fromisoformat(one["expires_at"]) < datetime.now(UTC) + timedelta(seconds=1)
        until = time.monotonic() + 20
        while "ready" in [one["state"] for one in httpx.get(f"{url}/v1/models").json()["data"]]:
            assert time.monotonic() < until
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        log = end(process)
        assert process.returncode == 0
    assert "models: b/c is loaded" in log
    assert "models: a is unloaded" in log
    assert "canary" not in log
