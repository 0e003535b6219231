"""The OpenAPI document, and a server checked against it with valid and invalid data."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import pytest
from pydantic import TypeAdapter

from argosy.config import SamplingParams
from argosy.engine.loop import Event, LoopFacts
from argosy.guard.keys import KeyFile, KeyRing
from argosy.prompt.prompt import Prompt
from argosy.serve.app import ROUTES, make_app
from argosy.serve.core import Service
from argosy.serve.fields import MAX_ANSWERS
from argosy.serve.gate import AnthropicError, OpenAIError, dialect_of
from argosy.serve.openapi import Route
from argosy.serve.streams import DONE
from tests.serve import record
from tests.serve.conftest import start


class ShortLoop:
    """The engine's loop with answers cut to two tokens, because these tests are about the API."""

    def __init__(self, loop: Any) -> None:
        self._loop = loop

    def submit(
        self, prompt: Prompt, params: SamplingParams | None, on_event: Callable[[Event], None], **more: Any
    ) -> Any:
        assert params is not None
        most = 2 if params.max_tokens is None else min(2, params.max_tokens)
        return self._loop.submit(prompt, replace(params, max_tokens=most), on_event, **more)

    def cancel(self, request: Any) -> None:
        self._loop.cancel(request)

    def revoke(self, tenant: str) -> None:
        self._loop.revoke(tenant)

    def snapshot(self) -> LoopFacts:
        facts: LoopFacts = self._loop.snapshot()
        return facts


@pytest.fixture(scope="module")
def keyed(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """A server that requires keys, and a key that opens everything."""
    keys = KeyFile(tmp_path_factory.mktemp("keys") / "keys.json")
    _, secret = keys.add("all", scopes=("infer", "metrics", "admin"))
    short = Service(ShortLoop(service.loop), service.prompts, service.tokenizer, service.model)
    for url in start(make_app(short, KeyRing(keys), block_tokens=16, max_sequences=8)):
        yield url, secret


def route_of(path: str) -> Route:
    return next(route for route in ROUTES if route.policy.path == path)


def test_the_document_has_exactly_the_routes_of_the_table(client: httpx.Client) -> None:
    found = client.get("/openapi.json").json()
    operations = {(method.upper(), path) for path, item in found["paths"].items() for method in item}
    assert operations == {(route.policy.method, route.policy.path) for route in ROUTES}
    # "__" would mark two schemas of one name.
    assert not [name for name in found["components"]["schemas"] if "__" in name]
    for route in ROUTES:
        operation = found["paths"][route.policy.path][route.policy.method.lower()]
        assert ("security" in operation) == (route.policy.scope is not None)
        assert ("requestBody" in operation) == (route.policy.method == "POST")


def test_bounds_in_the_document_are_the_enforced_ones(client: httpx.Client) -> None:
    body = client.get("/openapi.json").json()["components"]["schemas"]["ChatBody"]["properties"]
    assert body["n"]["anyOf"][0] == {"type": "integer", "minimum": 1, "maximum": MAX_ANSWERS}
    assert body["seed"]["anyOf"][0] == {"type": "integer", "minimum": 0, "exclusiveMaximum": 2**63}


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
        ("/v1/completions", {"prompt": "a", "max_tokens": 0, "echo": True}),
        ("/v1/completions", {"prompt": "a", "echo": True, "logprobs": 0, "stream": True}),
        ("/v1/completions", {"prompt": "a", "logit_bias": {"a": 1}}),
        ("/v1/chat/completions", {"messages": SAY, "top_logprobs": 1}),
        ("/v1/chat/completions", {"messages": SAY, "tools": [], "functions": []}),
        ("/v1/chat/completions", {"messages": SAY, "tool_choice": "auto", "function_call": "auto"}),
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
    TypeAdapter(route_of(path).answer).validate_python(whole, strict=True)
    events = TypeAdapter(route_of(path).events)
    parts = client.post(path, json=body | more | {"stream": True}).text.strip().split("\n\n")
    data = [
        part.rpartition("data: ")[2] for part in parts if "data: " in part and not part.endswith("[DONE]")
    ]
    assert len(data) > 3
    for text in data:
        events.validate_python(json.loads(text), strict=True)


@pytest.mark.parametrize("name", record.CASES)
def test_every_transcript_matches_the_document(name: str) -> None:
    transcript = record.load(name)
    route = route_of(transcript["request"]["path"])
    if transcript["status"] != 200:
        refused = AnthropicError if dialect_of(route.policy.path) == "anthropic" else OpenAIError
        TypeAdapter(refused).validate_python(transcript["body"], strict=True)
    elif "body" in transcript:
        TypeAdapter(route.answer).validate_python(transcript["body"], strict=True)
    for event in transcript.get("events", ()):
        if event["data"] != DONE:
            TypeAdapter(route.events).validate_python(event["data"], strict=True)
        else:
            assert route.has_done


# The least number of requests that schemathesis sends; set SCHEMATHESIS_CASES=10000 for a long run.
NUM_CASES = int(os.environ.get("SCHEMATHESIS_CASES", "1500"))
MAX_EXAMPLES = 15  # per operation and round
FOLDER = Path(__file__).parent


def statuses(url: str, secret: str) -> Counter[tuple[str, str]]:
    """The number of requests by route and status."""
    answered: Counter[tuple[str, str]] = Counter()
    metrics = httpx.get(f"{url}/metrics", headers={"Authorization": f"Bearer {secret}"}).text
    for path, status, number in re.findall(r'requests_total\{route="(.+?)",status="(\d+)"\} (\d+)', metrics):
        answered[path, status] += int(number)
    return answered


@pytest.mark.timeout(600 + NUM_CASES // 2)
def test_every_answer_to_schemathesis_is_in_the_document(
    keyed: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Schemathesis, which knows only the document, tries every field at and beyond its edges, and random data.

    All of its checks run, and one of ours: allowed data is refused only for reasons that the guide gives.
    """
    url, secret = keyed
    monkeypatch.setattr("argosy.serve.app._STATE_S", 0.01)
    monkeypatch.setenv("SCHEMATHESIS_HOOKS", str(FOLDER / "schemathesis_refusals.py"))
    for seed in itertools.count(1):
        command = [
            sys.executable, "-m", "schemathesis.cli", f"--config-file={FOLDER / 'schemathesis.toml'}",
            "run", f"{url}/openapi.json",
            f"--header=Authorization: Bearer {secret}", f"--header=x-api-key: {secret}",
            f"--seed={seed}", f"--max-examples={MAX_EXAMPLES}", "--generation-database=none",
            "--phases=examples,coverage,fuzzing,stateful" if seed == 1 else "--phases=fuzzing,stateful",
            "--continue-on-failure", "--suppress-health-check=all", "--request-timeout=30",
            "--warnings=off", "--no-color",
        ]  # fmt: skip
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout.replace(secret, "...")[-20_000:]
        answered = statuses(url, secret)
        if answered.total() >= NUM_CASES:
            break
    assert not [key for key in answered if key[1][0] == "5"]
    for route in ROUTES:
        if route.policy.path == "/page/{name}":  # the document does not list the names
            continue
        if route.policy.takes_form:  # this server has no ears; `test_audio.py` has
            continue
        assert answered[route.policy.path, "200"], f"nothing but refusals at {route.policy.path}"
        if route.policy.method == "POST":
            assert answered[route.policy.path, "400"]
            assert answered[route.policy.path, "401"]
            assert answered[route.policy.path, "415"]
