"""A new dialect: the minimum that it must define, and everything that `respond` provides."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import Response

from argosy.config import SamplingParams
from argosy.guard.keys import KeyRing
from argosy.serve import app
from argosy.serve.answer import respond as respond_module
from argosy.serve.answer.answers import Said, Step
from argosy.serve.answer.fields import NoEffect, Text, Tokens
from argosy.serve.answer.request import ChatRequest, Read
from argosy.serve.answer.respond import Exchange, respond
from argosy.serve.answer.sampling_fields import Sampling
from argosy.serve.answer.service import Service
from argosy.serve.dialects.anthropic_messages_bodies import CountBody, MessagesBody
from argosy.serve.dialects.ollama_bodies import GenerateBody, OllamaChatBody
from argosy.serve.dialects.openai_chat_bodies import ChatBody
from argosy.serve.dialects.openai_completions import CompletionBody
from argosy.serve.dialects.openai_responses_bodies import ResponsesBody
from argosy.serve.http.closed import Closed
from argosy.serve.http.route import Route, post_route
from argosy.serve.http.streams import EventStream
from tests.serve.conftest import only, start
from tests.serve.record import read_events


class PlainBody(Sampling):
    ask: Text
    most: Tokens = 200
    mood: NoEffect[Text] = None

    def request(self) -> ChatRequest:
        return ChatRequest(
            messages=[{"role": "user", "content": self.ask}],
            params=SamplingParams(max_tokens=self.most, **self.sampling()),
            ignored=self.ignored(),
        )


class PlainEvent(Closed):
    text: str


class PlainAnswer(Closed):
    text: str
    num_tokens: int


class PlainExchange(Exchange[PlainBody, PlainEvent]):
    _text = ""

    def reads(self) -> list[Read]:
        return [self.body.request]

    def take(self, step: Step) -> list[PlainEvent]:
        return [{"text": step.text}] if isinstance(step, Said) and step.text else []

    def fold(self, event: PlainEvent) -> None:
        self._text += event["text"]

    def whole(self) -> PlainAnswer:
        return {"text": self._text, "num_tokens": self.answers.num_new_tokens}


async def plain(body: PlainBody, request: Request) -> Response:
    """Answer a question."""
    return await respond(PlainExchange, body, request)


ROUTE: Route = post_route("/v1/plain", plain, PlainAnswer, screens="answers", events=PlainEvent)


@pytest.fixture
def plainly(speaking_service: Service, monkeypatch: pytest.MonkeyPatch) -> Iterator[httpx.Client]:
    monkeypatch.setattr(app, "ROUTES", (*app.ROUTES, ROUTE))
    for url in start(app.make_app(only(speaking_service), KeyRing(None), block_tokens=16, max_sequences=8)):
        with httpx.Client(base_url=f"{url}/v1", timeout=60) as client:
            yield client


def test_a_new_dialect_streams_the_text_of_its_whole_answer(plainly: httpx.Client) -> None:
    asked = {"ask": "#plain", "temperature": 0, "mood": "cheerful"}
    whole = plainly.post("/plain", json=asked)
    assert whole.json() == {"text": "It is well, thank you.", "num_tokens": whole.json()["num_tokens"]}
    streamed = plainly.post("/plain", json={**asked, "stream": True})
    events = [event["data"] for event in read_events(streamed.text)]
    assert len(events) > 3
    assert "".join(event["text"] for event in events) == whole.json()["text"]
    for answer in (whole, streamed):
        assert answer.headers["x-ignored-params"] == "mood"
        assert answer.headers["x-ai-generated"] == "1"


def test_a_new_dialect_refuses_and_fails_like_the_others(plainly: httpx.Client) -> None:
    refused = plainly.post("/plain", json={"ask": "#plain", "frobnicate": 1})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "frobnicate")
    too_long = plainly.post("/plain", json={"ask": "Ω" * 5000, "stream": True})
    assert (too_long.status_code, too_long.json()["error"]["code"]) == (400, "context_length_exceeded")
    failed = plainly.post("/plain", json={"ask": "#fail", "temperature": 0})
    assert failed.status_code == 400
    *said, last = read_events(
        plainly.post("/plain", json={"ask": "#fail", "temperature": 0, "stream": True}).text
    )
    assert "".join(event["data"]["text"] for event in said) == "It is"
    assert last["data"] == json.loads(failed.text)


def test_a_whole_answer_that_comes_late_follows_line_breaks_and_a_late_failure_has_only_its_body(
    plainly: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients wait five or ten minutes for the head of an answer, and as long for each part of it."""
    asked = {"ask": "#plain", "temperature": 0, "mood": "cheerful"}
    failing = {"ask": "#fail", "temperature": 0}
    soon, failed = plainly.post("/plain", json=asked), plainly.post("/plain", json=failing)
    keep_alive, folded, has_begun = EventStream._keep_alive, respond_module.folded, asyncio.Event()

    async def at_once(self: EventStream, write: Any) -> None:
        await write(self._idle)
        has_begun.set()
        await keep_alive(self, write)

    async def late_folded(exchange: PlainExchange) -> Any:
        await has_begun.wait()
        has_begun.clear()
        return await folded(exchange)

    monkeypatch.setattr("argosy.serve.http.streams.WHOLE_S", 0)
    monkeypatch.setattr(EventStream, "_keep_alive", at_once)
    monkeypatch.setattr(respond_module, "folded", late_folded)
    late = plainly.post("/plain", json=asked)
    assert (late.status_code, late.text) == (200, "\n" + soon.text)
    assert late.headers["content-type"] == soon.headers["content-type"]
    assert late.headers["x-ignored-params"] == "mood"
    assert late.json() == soon.json()
    late = plainly.post("/plain", json=failing)
    assert (failed.status_code, late.status_code) == (400, 200)
    assert late.text.startswith("\n")
    assert late.json() == failed.json()


def test_a_refused_prompt_cancels_the_prompts_before_it(
    speaker: httpx.Client, speaking_service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, ended = speaking_service.loop, list[object]()
    cancel = loop.cancel
    monkeypatch.setattr(loop, "cancel", lambda request: [ended.append(request), cancel(request)])
    prompts = {"prompt": ["#long", "#long", "Ω" * 5000], "max_tokens": 400}
    answer = speaker.post("/v1/completions", json=prompts)
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert len(ended) == 2


SAY = [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    ("path", "body", "kind", "method"),
    [
        ("/v1/chat/completions", {"messages": SAY, "max_tokens": 1}, ChatBody, "request"),
        ("/v1/completions", {"prompt": "Hi", "max_tokens": 1}, CompletionBody, "params"),
        ("/v1/responses", {"input": "Hi", "max_output_tokens": 1}, ResponsesBody, "request"),
        ("/v1/responses/input_tokens", {"input": "Hi"}, ResponsesBody, "request"),
        ("/v1/messages", {"messages": SAY, "max_tokens": 1}, MessagesBody, "request"),
        ("/v1/messages/count_tokens", {"messages": SAY}, CountBody, "request"),
        ("/api/chat", {"messages": SAY, "options": {"num_predict": 1}}, OllamaChatBody, "request"),
        ("/api/generate", {"prompt": "Hi", "options": {"num_predict": 1}}, GenerateBody, "request"),
    ],
)
def test_a_body_is_converted_in_a_worker_thread(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch, path: str, body: Any, kind: type, method: str
) -> None:
    threads, convert = [], getattr(kind, method)

    def seen(*args: Any, **named: Any) -> Any:
        threads.append(threading.current_thread().name)
        return convert(*args, **named)

    monkeypatch.setattr(kind, method, seen)
    assert client.post(path, json=body).status_code == 200
    (name,) = threads
    assert name.startswith("argosy-work")
