"""The document of all routes, and a server held against it with data that it allows and data that it does not."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
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
    """The engine, whose answers are cut: what is tested is what is around them."""

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
    """A server that wants keys, and one that opens everything."""
    keys = KeyFile(tmp_path_factory.mktemp("keys") / "keys.json")
    _, secret = keys.add("all", scopes=("infer", "metrics", "admin"))
    short = Service(ShortLoop(service.loop), service.prompts, service.tokenizer, service.model)
    for url in start(make_app(short, KeyRing(keys), block_tokens=16, max_sequences=8)):
        yield url, secret


def route_of(path: str) -> Route:
    return next(route for route in ROUTES if route.policy.path == path)


def test_the_document_has_every_route_of_the_table_and_nothing_else(client: httpx.Client) -> None:
    found = client.get("/openapi.json").json()
    operations = {(method.upper(), path) for path, item in found["paths"].items() for method in item}
    assert operations == {(route.policy.method, route.policy.path) for route in ROUTES}
    assert not [name for name in found["components"]["schemas"] if "__" in name]  # two of the same name
    for route in ROUTES:
        operation = found["paths"][route.policy.path][route.policy.method.lower()]
        assert ("security" in operation) == (route.policy.scope is not None)
        assert ("requestBody" in operation) == (route.policy.method == "POST")


def test_numbers_of_the_document_are_those_that_are_checked(client: httpx.Client) -> None:
    body = client.get("/openapi.json").json()["components"]["schemas"]["ChatBody"]["properties"]
    assert body["n"]["anyOf"][0] == {"type": "integer", "minimum": 1, "maximum": MAX_ANSWERS}
    assert body["seed"]["anyOf"][0] == {"type": "integer", "minimum": 0, "exclusiveMaximum": 2**63}


SAY = [{"role": "user", "content": "Hi"}]


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
def test_answers_and_events_are_what_the_document_says(
    client: httpx.Client, path: str, body: dict[str, Any]
) -> None:
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
def test_a_transcript_is_what_the_document_says(name: str) -> None:
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


NUM_CASES = 1500


def test_no_request_has_an_answer_that_is_not_in_the_document(
    keyed: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every field at its edges and beyond them, and data at random: schemathesis knows only the document."""
    url, secret = keyed
    monkeypatch.setattr("argosy.serve.app._STATE_S", 0.01)
    (tmp_path / "schemathesis.toml").write_text("max-stream-events = 3\n")  # the engine's events do not end
    command = [
        sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json",
        f"--header=Authorization: Bearer {secret}", f"--header=x-api-key: {secret}",
        "--mode=all", "--phases=coverage,fuzzing", "--max-examples=15", "--generation-deterministic",
        # What the document allows may still not be meant: the result of a call that nobody made.
        "--exclude-checks=positive_data_acceptance",
        "--continue-on-failure", "--suppress-health-check=all", "--request-timeout=30", "--warnings=off", "--no-color",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout.replace(secret, "...")[-20_000:]

    answered: Counter[tuple[str, str]] = Counter()
    metrics = httpx.get(f"{url}/metrics", headers={"Authorization": f"Bearer {secret}"}).text
    for path, status, number in re.findall(r'requests_total\{route="(.+?)",status="(\d+)"\} (\d+)', metrics):
        answered[path, status] += int(number)
    assert sum(answered.values()) >= NUM_CASES
    assert not [key for key in answered if key[1][0] == "5"]
    for route in ROUTES:
        if route.policy.path == "/page/{name}":  # its names are no part of the document
            continue
        assert answered[route.policy.path, "200"], f"nothing but refusals at {route.policy.path}"
        if route.policy.method == "POST":
            assert answered[route.policy.path, "400"]
            assert answered[route.policy.path, "401"]
            assert answered[route.policy.path, "415"]
