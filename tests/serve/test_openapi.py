"""The OpenAPI document, and a server checked against it with valid and invalid data."""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import httpx
import jsonschema_rs
import pytest
from pydantic import TypeAdapter

from argosy.budget.memory_plan import MemoryPlan
from argosy.config import SamplingParams
from argosy.engine.loop import Event, LoopFacts
from argosy.errors import UsageError
from argosy.guard.keys import KeyFile, KeyRing
from argosy.prompt.infill import Infill, InfillForm
from argosy.prompt.prompt import Prompt
from argosy.prompt.replay import ReplayMemory
from argosy.prompt.reranking import RerankForm, Reranking
from argosy.serve.admin.cluster import WorkerState
from argosy.serve.answer.fields import MAX_ANSWERS
from argosy.serve.answer.service import Service
from argosy.serve.app import ROUTES, make_app
from argosy.serve.guards.governing import Governing
from argosy.serve.guards.guarding import Guarding
from argosy.serve.http.access import dialect_of
from argosy.serve.http.failures import AnthropicError, OllamaError, OpenAIError
from argosy.serve.http.route import Route
from argosy.serve.http.streams import DONE
from tests.serve import record
from tests.serve.conftest import only, start


class ShortLoop:
    """The engine's loop with answers cut to two tokens, because these tests are about the API."""

    def __init__(self, loop: Any) -> None:
        self._loop, self.engine = loop, loop.engine

    def submit(
        self, prompt: Prompt, params: SamplingParams | None, on_event: Callable[[Event], None], **more: Any
    ) -> Any:
        assert params is not None
        most = 2 if params.max_tokens is None else min(2, params.max_tokens)
        return self._loop.submit(prompt, replace(params, max_tokens=most), on_event, **more)

    def submit_embedding(self, *given: Any, **more: Any) -> Any:
        return self._loop.submit_embedding(*given, **more)

    def cancel(self, request: Any) -> None:
        self._loop.cancel(request)

    def erase(self, tenant: str) -> None:
        self._loop.erase(tenant)

    def revoke(self, tenant: str) -> None:
        self._loop.revoke(tenant)

    def resize(self, budget_bytes: int, **more: Any) -> MemoryPlan:
        plan: MemoryPlan = self._loop.resize(budget_bytes, **more)
        return plan

    def snapshot(self) -> LoopFacts:
        facts: LoopFacts = self._loop.snapshot()
        return facts


class OneWorker:
    """A group as the server sees it, of the worker that the document's example names; every other host is refused."""

    HOST = "10.0.0.2:7070"

    def __init__(self) -> None:
        self._state: Literal["ready", "draining"] = "ready"

    def status(self) -> list[WorkerState]:
        return [{
            "host": self.HOST, "state": self._state, "why": "", "experts_owned": 4, "slots": 4, "resident": 4,
            "hit_rate": None, "bytes_read": 0, "peak_bytes": 1, "budget_bytes": 2, "disk_bytes_per_s": 1e9,
            "p50_us": 100.0, "p99_us": 200.0, "bytes_out": 0, "bytes_in": 0, "experts_run": 0, "experts_rerouted": 0,
            "late_answers": 0, "verified": 0, "mismatches": 0, "connections": 1,
        }]  # fmt: skip

    def add(self, host: str) -> None:
        self._require(host)
        self._state = "ready"

    def drain(self, host: str) -> None:
        self._require(host)
        self._state = "draining"

    def _require(self, host: str) -> None:
        if host != self.HOST:
            raise UsageError("there is no such worker")


@pytest.fixture(scope="module")
def keyed(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """A server that requires keys, and a key that opens everything."""
    keys = KeyFile(tmp_path_factory.mktemp("keys") / "keys.json")
    _, secret = keys.add("all", scopes=("infer", "metrics", "admin"))
    policy = tmp_path_factory.mktemp("policy") / "policy.toml"
    policy.with_name("words.txt").write_text("a phrase that no fuzzer writes\n")
    policy.write_text('default = "a"\n[policies.a]\ninput = ["w"]\n[checks.w]\nwords = "words.txt"\n')
    form = RerankForm(before="", between="\n", after="\n", yes="a", no="b")
    assert service.tokenizer is not None
    prompts = service.prompts.remembering(ReplayMemory())
    gap = InfillForm(("<|im_start|>", "before", "<|im_end|>", "after", "<|endoftext|>"))
    prompts.__dict__["_infill"] = Infill(
        service.tokenizer, gap
    )  # the vocabulary has no tokens of a maker's form
    short = Service(
        ShortLoop(service.loop), prompts, service.tokenizer, service.model,
        reranking=Reranking(form, service.tokenizer, context_tokens=service.model.context_tokens),
    )  # fmt: skip
    app = make_app(
        only(short),
        KeyRing(keys),
        block_tokens=16,
        max_sequences=8,
        workers=OneWorker(),
        governance=Governing(guarding=Guarding(policy)),
    )
    for url in start(app):
        yield url, secret


adapter: Callable[[Any], TypeAdapter[Any]] = functools.cache(TypeAdapter)  # making one takes 20 ms


def route_of(path: str) -> Route:
    return next(route for route in ROUTES if route.rule.path == path)


def test_the_document_has_exactly_the_routes_of_the_table(client: httpx.Client) -> None:
    found = client.get("/openapi.json").json()
    operations = {(method.upper(), path) for path, item in found["paths"].items() for method in item}
    assert operations == {(route.rule.method, route.rule.path) for route in ROUTES}
    # "__" would mark two schemas of one name.
    assert not [name for name in found["components"]["schemas"] if "__" in name]
    for route in ROUTES:
        operation = found["paths"][route.rule.path][route.rule.method.lower()]
        assert ("security" in operation) == (route.rule.scope is not None)
        assert ("requestBody" in operation) == (route.rule.method == "POST")


def test_bounds_in_the_document_are_the_enforced_ones(client: httpx.Client) -> None:
    body = client.get("/openapi.json").json()["components"]["schemas"]["ChatBody"]["properties"]
    assert body["n"]["anyOf"][0] == {"type": "integer", "minimum": 1, "maximum": MAX_ANSWERS}
    assert body["seed"]["anyOf"][0] == {"type": "integer", "minimum": 0, "exclusiveMaximum": 2**63}


FOLDER = Path(__file__).parent
SAY = [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"content": "a", "prompt": "a"}),
        ("/tokenize", {"content": None, "prompt": None}),
        ("/v1/completions", {"prompt": "a", "structured_outputs": {}}),
        ("/v1/completions", {"prompt": "a", "structured_outputs": {"choice": ["a"], "regex": "a"}}),
        ("/v1/completions", {"prompt": "a", "guided_choice": ["a"], "guided_regex": "a"}),
        ("/v1/completions", {"prompt": "a", "logit_bias": {"a": 1}}),
        ("/v1/chat/completions", {"messages": SAY, "top_logprobs": 1}),
        ("/v1/chat/completions", {"messages": SAY, "tools": [], "functions": []}),
        ("/v1/chat/completions", {"messages": [{"role": "assistant", "content": None}, *SAY]}),
        ("/v1/messages", {"messages": SAY, "max_tokens": 1, "tools": [{"type": "bash_20250124"}]}),
    ],
)
def test_the_document_says_which_fields_exclude_or_need_each_other(
    client: httpx.Client, path: str, body: dict[str, Any]
) -> None:
    found = client.get("/openapi.json").json()
    schema = found["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    checked = jsonschema_rs.validator_for(schema | {"components": found["components"]})
    assert not checked.is_valid(body)
    assert client.post(path, json=body).status_code == 400


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": SAY, "max_tokens": 1.0, "n": 1.0, "seed": 3.0}),
        ("/v1/completions", {"prompt": [1.0, 2.0], "max_tokens": 1.0}),
        ("/v1/completions", {"prompt": "a", "seed": 2**63 - 1, "max_tokens": 1}),
        ("/detokenize", {"tokens": [1.0]}),
    ],
)
def test_an_integer_may_be_written_with_a_zero_fraction(
    client: httpx.Client, path: str, body: dict[str, Any]
) -> None:
    assert client.post(path, json=body).status_code == 200


def test_null_beside_an_items_id_is_ignored(client: httpx.Client) -> None:
    answer = client.post("/v1/responses/input_tokens", json={"input": [{"id": "a", "status": None}]})
    assert answer.json()["error"]["message"].startswith("Item with id 'a' not found.")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (
            "/v1/chat/completions",
            {"messages": SAY, "n": 2, "logprobs": True, "top_logprobs": 1, "timings": True},
        ),
        ("/v1/completions", {"prompt": ["a", "b"], "logprobs": 2, "timings": True}),
        ("/v1/responses", {"input": "Hi", "max_output_tokens": 3, "top_logprobs": 1}),
        ("/v1/messages", {"messages": SAY, "max_tokens": 3}),
    ],
)
def test_answers_and_events_match_the_document(client: httpx.Client, path: str, body: dict[str, Any]) -> None:
    more = {} if "max_output_tokens" in body else {"max_tokens": 3}
    if "completions" in path:
        more |= {"stream_options": {"include_usage": True}}
        more |= {"return_progress": True}
    whole = client.post(path, json=body | more).json()
    adapter(route_of(path).answer).validate_python(whole, strict=True)
    events = adapter(route_of(path).events)
    parts = client.post(path, json=body | more | {"stream": True}).text.strip().split("\n\n")
    data = [
        part.rpartition("data: ")[2] for part in parts if "data: " in part and not part.endswith("[DONE]")
    ]
    assert len(data) > 3
    for text in data:
        events.validate_python(json.loads(text), strict=True)


@pytest.mark.parametrize(
    ("path", "asked"), [("/api/chat", {"messages": SAY}), ("/api/generate", {"prompt": "Hi"})]
)
def test_lines_of_json_match_the_document(client: httpx.Client, path: str, asked: dict[str, Any]) -> None:
    body = asked | {"options": {"num_predict": 3, "temperature": 0}, "logprobs": True, "top_logprobs": 1}
    whole = client.post(path, json=body | {"stream": False}).json()
    adapter(route_of(path).answer).validate_python(whole, strict=True)
    lines = record.read_lines(client.post(path, json=body).text)
    assert len(lines) > 3
    for line in lines:
        adapter(route_of(path).events).validate_python(json.loads(line), strict=True)


@pytest.mark.parametrize("name", record.CASES)
def test_every_transcript_matches_the_document(name: str) -> None:
    transcript = record.load(name)
    route = route_of(transcript["request"]["path"])
    if transcript["status"] != 200:
        errors = {"openai": OpenAIError, "anthropic": AnthropicError, "ollama": OllamaError}
        refused = errors[dialect_of(route.rule.path)]
        adapter(refused).validate_python(transcript["body"], strict=True)
    elif "body" in transcript:
        adapter(route.answer).validate_python(transcript["body"], strict=True)
    for event in transcript.get("events", ()):
        if event["data"] != DONE:
            adapter(route.events).validate_python(event["data"], strict=True)
        else:
            assert route.has_done


# Operations that schemathesis tries without its coverage phase, and the ones whose coverage stands for theirs.
COVERED_BY = {
    "/v1/responses/input_tokens": "/v1/responses",
    "/v1/messages/count_tokens": "/v1/messages",
    "/apply-template": "/v1/chat/completions",
    "/rerank": "/v1/rerank",
}


def test_an_operation_without_coverage_of_its_own_takes_the_fields_of_one_that_has_it(
    client: httpx.Client,
) -> None:
    document = client.get("/openapi.json").json()

    def fields(path: str) -> dict[str, Any]:
        schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        named = document["components"]["schemas"].get(schema.get("$ref", "").rpartition("/")[2], schema)
        found: dict[str, Any] = named["properties"]
        return found

    settings = tomllib.loads((FOLDER / "schemathesis.toml").read_text())["operations"]
    (uncovered,) = [one["include-name"] for one in settings if "phases" in one]
    assert set(uncovered) == {f"POST {path}" for path in COVERED_BY}
    for path, other in COVERED_BY.items():
        known = fields(other)
        assert [name for name, schema in fields(path).items() if schema != known.get(name)] == []
        assert client.post(path, content=b"{}", headers={"sec-fetch-site": "none"}).status_code == 415


# The least number of requests that schemathesis sends with coverage; set SCHEMATHESIS_CASES=10000 for a long run.
NUM_CASES = int(os.environ.get("SCHEMATHESIS_CASES", "1500"))


def statuses(url: str, secret: str) -> Counter[tuple[str, str]]:
    """The number of requests by route and status."""
    answered: Counter[tuple[str, str]] = Counter()
    metrics = httpx.get(f"{url}/metrics", headers={"Authorization": f"Bearer {secret}"}).text
    for path, status, number in re.findall(r'requests_total\{route="(.+?)",status="(\d+)"\} (\d+)', metrics):
        answered[path, status] += int(number)
    return answered


@pytest.mark.timeout(600 + NUM_CASES // 2)
@pytest.mark.parametrize(
    ("phases", "examples", "num_cases"),
    [
        ("examples,fuzzing", 2, 200),
        pytest.param("examples,coverage,fuzzing,stateful", 15, NUM_CASES, marks=pytest.mark.full),
    ],
    ids=["short", "whole"],
)
def test_every_answer_to_schemathesis_is_in_the_document(
    keyed: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    phases: str,
    examples: int,
    num_cases: int,
) -> None:
    """Schemathesis, which knows only the document, tries every field at and beyond its edges, and random data.

    All of its checks run, and one of ours: allowed data is refused only for reasons that the guide gives.

    Args:
        phases: those of the first round; coverage tries the edges and takes nine tenths of the time.
        examples: for each operation and round.
        num_cases: the least number of requests; there are as many rounds as it takes.
    """
    url, secret = keyed
    monkeypatch.setattr("argosy.serve.admin.engine._STATE_S", 0.01)
    monkeypatch.setenv("SCHEMATHESIS_HOOKS", str(FOLDER / "schemathesis_refusals.py"))
    for seed in itertools.count(1):
        command = [
            sys.executable, "-m", "schemathesis.cli", f"--config-file={FOLDER / 'schemathesis.toml'}",
            "run", f"{url}/openapi.json",
            f"--header=Authorization: Bearer {secret}", f"--header=x-api-key: {secret}",
            f"--seed={seed}", f"--max-examples={examples}", "--generation-database=none",
            f"--phases={phases}" if seed == 1 else "--phases=fuzzing,stateful",
            "--continue-on-failure", "--suppress-health-check=all", "--request-timeout=30",
            "--warnings=off", "--no-color",
        ]  # fmt: skip
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout.replace(secret, "...")[-20_000:]
        answered = statuses(url, secret)
        if answered.total() >= num_cases:
            break
    assert not [key for key in answered if key[1][0] == "5"]
    for route in ROUTES:
        if route.rule.path == "/page/{name}":  # the document does not list the names
            continue
        if route.rule.takes_form:  # this server has no ears; `test_audio.py` has
            continue
        if route.rule.path == "/v1/engine/data/{key}":  # the document does not list the keys
            continue
        if route.rule.path.endswith("load_lora_adapter"):  # this server has none; `test_adapters.py` has
            continue
        assert answered[route.rule.path, "200"], f"nothing but refusals at {route.rule.path}"
        if route.rule.method == "POST":
            assert answered[route.rule.path, "400"]
            assert answered[route.rule.path, "401"]
            if "coverage" in phases and not (
                route.rule.path in COVERED_BY or dialect_of(route.rule.path) == "ollama"
            ):
                assert answered[route.rule.path, "415"]
