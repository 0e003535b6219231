"""Ollama's API: POST /api/chat, /api/generate, /api/embed and /api/embeddings.

An answer is a stream of JSON lines unless the request says `"stream": false`. A call is sent when it is complete,
with its arguments as an object and without an id; a call that the token limit cuts off is therefore not sent. A
request without a prompt or messages loads the model; with `"keep_alive": 0` it unloads the model, if the server may
load it again and no other request uses it.

Elsewhere: request bodies are `ollama_bodies.py`; lists of models are `ollama_models.py`; the path of a request is
`serve/answer/respond.py`; JSON lines are `serve/http/streams.py`; vectors are `serve/answer/embedding.py`; loading
and unloading is `serve/models/models.py`.
"""

from __future__ import annotations

import json
import time
from abc import abstractmethod
from collections.abc import AsyncIterator, Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, Literal, NotRequired, TypeVar, cast

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from argosy.prompt.formats.events import (
    ReasoningDelta,
    TextDelta,
    ToolCallArguments,
    ToolCallBegin,
    ToolCallEnd,
)
from argosy.prompt.json_text import read_object
from argosy.prompt.messages import UNREADABLE
from argosy.serve.answer.answers import Ended, Said, Step
from argosy.serve.answer.embedding import Embedded, json_items, json_numbers
from argosy.serve.answer.embedding import embed as embed_texts
from argosy.serve.answer.fields import ignored_header, without_effect
from argosy.serve.answer.logprobs import ScoredToken, Speller
from argosy.serve.answer.request import Read
from argosy.serve.answer.respond import Exchange, respond
from argosy.serve.answer.service import Service, service_of
from argosy.serve.dialects.ollama_bodies import (
    EmbedBody,
    GenerateBody,
    OldEmbedBody,
    OllamaBody,
    OllamaChatBody,
)
from argosy.serve.dialects.ollama_models import time_text
from argosy.serve.http.caller import Caller
from argosy.serve.http.closed import Closed
from argosy.serve.http.failures import OllamaError
from argosy.serve.http.route import post_route
from argosy.serve.http.streams import JSON_LINES, answer_whole, json_line
from argosy.serve.models.models import models_of

HINTS = {
    "/api/pull": "this API fetches no models: run `argosy pull NAME` on the server's machine",
    "/api/delete": "this API deletes no models: run `argosy rm NAME` on the server's machine",
    "/api/copy": "this API renames no models: run `argosy alias` on the server's machine",
    "/api/create": "this API makes no models: run `argosy pack` on the server's machine",
    "/api/blobs": "this API makes no models: run `argosy pack` on the server's machine",
    "/api/push": "Argosy uploads no models",
}
_NS = 1_000_000_000


class OllamaFunction(Closed):
    name: str
    arguments: dict[str, Any]


class OllamaCall(Closed):
    function: OllamaFunction


class Reply(Closed):
    role: Literal["assistant"]
    content: str
    thinking: NotRequired[str]
    tool_calls: NotRequired[list[OllamaCall]]


class Line(Closed):
    """A line of a stream, or a whole answer. Times are in nanoseconds, in the last line."""

    model: str
    created_at: str
    done: bool
    done_reason: NotRequired[Literal["stop", "length", "content_filter", "load", "unload"]]
    total_duration: NotRequired[int]
    load_duration: NotRequired[int]
    prompt_eval_count: NotRequired[int]
    prompt_eval_duration: NotRequired[int]
    eval_count: NotRequired[int]
    eval_duration: NotRequired[int]
    logprobs: NotRequired[list[ScoredToken]]


class ChatLine(Line):
    message: Reply


class GenerateLine(Line):
    response: str
    thinking: NotRequired[str]


Body = TypeVar("Body", bound=OllamaBody)
AnyLine = TypeVar("AnyLine", bound=Line)


class LineExchange(Exchange[Body, AnyLine]):
    """An exchange whose events are lines; a subclass says where a line holds the model's text."""

    errors = "ollama"
    encoding = JSON_LINES

    def __init__(self, body: Body, service: Service, caller: Caller) -> None:
        super().__init__(body, service, caller)
        self._began_ns = time.perf_counter_ns()
        self._speller = Speller(service.tokenizer, keep_special=False)
        self._called: dict[int, tuple[str, list[str]]] = {}  # open calls: name, pieces of arguments
        # The whole answer so far.
        self._last: AnyLine | None = None
        self._texts: list[str] = []
        self._thoughts: list[str] = []
        self._calls: list[OllamaCall] = []
        self._scores: list[ScoredToken] = []

    @abstractmethod
    def said(self, text: str, thinking: str, calls: Sequence[OllamaCall]) -> dict[str, Any]:
        """The fields of a line for a part of the answer."""

    @abstractmethod
    def parts(self, line: AnyLine) -> tuple[str, str, Sequence[OllamaCall]]:
        """Recover from a line the arguments that `said` was given."""

    def line(
        self, text: str = "", thinking: str = "", calls: Sequence[OllamaCall] = (), **more: Any
    ) -> AnyLine:
        """A line with a part of the answer and further fields."""
        made = {"model": self.service.model.id, "created_at": time_text(datetime.now(UTC))}
        return cast(AnyLine, {**made, **self.said(text, thinking, calls), "done": False, **more})

    def idle(self) -> bytes:
        return json_line(self.line())  # an empty line of the stream would not be JSON

    def take(self, step: Step) -> Iterable[AnyLine]:
        match step:
            case Said():
                made = self._lines(step)
                if step.logprob is not None:
                    made = made or [self.line()]
                    scored = self._speller.scored(step.logprob, self.body.top_logprobs or 0)
                    made[0]["logprobs"] = [scored]
                return made
            case Ended():
                return [self._end(step)]
        return ()

    def fold(self, event: AnyLine) -> None:
        text, thinking, calls = self.parts(event)
        self._texts.append(text)
        self._thoughts.append(thinking)
        self._calls += calls
        self._scores += cast(Line, event).get("logprobs", ())
        self._last = event

    def whole(self) -> AnyLine:
        assert self._last is not None
        scores = {"logprobs": self._scores} if self._scores else {}
        said = self.said("".join(self._texts), "".join(self._thoughts), self._calls)
        return cast(AnyLine, {**self._last, **said, **scores})

    def _lines(self, step: Said) -> list[AnyLine]:
        made: list[AnyLine] = []
        for event in step.events:
            match event:
                case TextDelta():
                    made.append(self.line(event.text))
                case ReasoningDelta():
                    made.append(self.line(thinking=event.text))
                case ToolCallBegin():
                    self._called[event.index] = (event.name, [])
                case ToolCallArguments():
                    self._called[event.index][1].append(event.json_fragment)
                case ToolCallEnd():
                    name, pieces = self._called.pop(event.index)
                    made.append(self.line(calls=[_made_call(name, "".join(pieces))]))
        return made

    def _end(self, step: Ended) -> AnyLine:
        ledger, total_ns = step.result.ledger, time.perf_counter_ns() - self._began_ns
        first_s = ledger.wall_s if ledger.time_to_first_token_s is None else ledger.time_to_first_token_s
        return self.line(
            done=True, done_reason="stop" if step.finish == "tool_calls" else step.finish,
            total_duration=total_ns, load_duration=0,
            prompt_eval_count=self.answers.num_prompt_tokens, prompt_eval_duration=_ns(first_s),
            eval_count=self.answers.num_new_tokens, eval_duration=_ns(ledger.decode_s or 0.0),
        )  # fmt: skip


def _ns(seconds: float) -> int:
    """Nanoseconds, at least one, because clients divide by them."""
    return max(1, int(seconds * _NS))


def _made_call(name: str, text: str) -> OllamaCall:
    arguments = read_object(text or "{}")
    return {"function": {"name": name, "arguments": {UNREADABLE: text} if arguments is None else arguments}}


class OllamaChatExchange(LineExchange[OllamaChatBody, ChatLine]):
    def reads(self) -> list[Read]:
        return [lambda: self.body.request(self.service.intake(self.caller))]

    def said(self, text: str, thinking: str, calls: Sequence[OllamaCall]) -> dict[str, Any]:
        message: Reply = {"role": "assistant", "content": text}
        if thinking:
            message["thinking"] = thinking
        if calls:
            message["tool_calls"] = list(calls)
        return {"message": message}

    def parts(self, line: ChatLine) -> tuple[str, str, Sequence[OllamaCall]]:
        message = line["message"]
        return message["content"], message.get("thinking", ""), message.get("tool_calls", ())


class GenerateExchange(LineExchange[GenerateBody, GenerateLine]):
    def reads(self) -> list[Read]:
        return [lambda: self.body.request(self.service.intake(self.caller))]

    def said(self, text: str, thinking: str, calls: Sequence[OllamaCall]) -> dict[str, Any]:
        return {"response": text, **({"thinking": thinking} if thinking else {})}

    def parts(self, line: GenerateLine) -> tuple[str, str, Sequence[OllamaCall]]:
        return line["response"], line.get("thinking", ""), ()

    def _lines(self, step: Said) -> list[GenerateLine]:
        if self.body.is_text:  # a text is not parsed
            return [self.line(step.text)] if step.text else []
        return super()._lines(step)


async def _load_or_unload(body: OllamaBody, request: Request, **said: Any) -> Response:
    """Answer a request that only loads or unloads the model; `said` is the rest of its line."""
    models, ignored = models_of(request), body.ignored()
    name, preset = await models.named(body.model)
    model = models.standing(name, preset)
    is_unloaded = body.unloads and await models.unload(name)
    if is_unloaded:
        ignored.remove("keep_alive")
    line = {
        "model": model.facts.id, "created_at": time_text(datetime.now(UTC)), **said, "done": True,
        "done_reason": "unload" if is_unloaded else "load",
    }  # fmt: skip
    return JSONResponse(line, headers=ignored_header(ignored))


async def chat(body: OllamaChatBody, request: Request) -> Response:
    """Answer a conversation, as Ollama does."""
    if body.is_empty:
        return await _load_or_unload(body, request, message={"role": "assistant", "content": ""})
    return await respond(OllamaChatExchange, body, request)


async def generate(body: GenerateBody, request: Request) -> Response:
    """Answer a prompt, as Ollama does; a raw prompt is continued, and with a suffix a gap is filled in."""
    if body.is_empty:
        return await _load_or_unload(body, request, response="")
    return await respond(GenerateExchange, body, request)


# Embeddings


class OllamaEmbeddings(Closed):
    """Vectors of length 1; times are in nanoseconds."""

    model: str
    embeddings: list[list[float]]
    total_duration: int
    load_duration: int
    prompt_eval_count: int


class OldEmbedding(Closed):
    """A vector of length 1; empty without a prompt."""

    embedding: list[float]


async def embed(body: EmbedBody, request: Request) -> Response:
    """Embed texts, as Ollama does."""
    return await answer_whole(_embed(body, request), request.state.caller, dialect="ollama")


async def _embed(body: EmbedBody, request: Request) -> Response:
    service, began_ns = service_of(request), time.perf_counter_ns()
    cuts = body.truncate is not False
    made = await _embedded(request, body.texts, "input", dimensions=body.dimensions, cuts=cuts)
    end = {
        "total_duration": time.perf_counter_ns() - began_ns, "load_duration": 0,
        "prompt_eval_count": 0 if made is None else made.num_tokens,
    }  # fmt: skip

    async def written() -> AsyncIterator[bytes]:
        yield f'{{"model":{json.dumps(service.model.id)},"embeddings":['.encode()
        if made is not None:
            for piece in json_items(made.vectors, lambda _, vector: json_numbers(vector)):
                yield piece
        yield f"],{json.dumps(end)[1:]}".encode()

    headers = ignored_header(without_effect(body)) | ({} if made is None else made.header())
    return StreamingResponse(written(), media_type="application/json", headers=headers)


async def old_embed(body: OldEmbedBody, request: Request) -> Response:
    """Embed a text, as Ollama did before /api/embed: its beginning, if it does not fit the context."""
    return await answer_whole(_old_embed(body, request), request.state.caller, dialect="ollama")


async def _old_embed(body: OldEmbedBody, request: Request) -> Response:
    made = await _embedded(request, [body.prompt] if body.prompt else [], "prompt", cuts=True)
    vector = "[]" if made is None else json_numbers(made.vectors[0])
    headers = ignored_header(without_effect(body)) | ({} if made is None else made.header())
    return Response(f'{{"embedding":{vector}}}', media_type="application/json", headers=headers)


async def _embedded(
    request: Request, texts: Sequence[str], param: str, *, dimensions: int | None = None, cuts: bool = False
) -> Embedded | None:
    """Embed texts; a request without any only loads the model."""
    if not texts:
        return None
    return await embed_texts(
        service_of(request), request.state.caller, texts, dimensions=dimensions, param=param, cuts=cuts
    )


ROUTES = (
    post_route(
        "/api/chat", chat, ChatLine, screens="answers", takes_media=True,
        events=ChatLine | OllamaError, encoding=JSON_LINES,
    ),
    post_route(
        "/api/generate", generate, GenerateLine, screens="answers", takes_media=True,
        events=GenerateLine | OllamaError, encoding=JSON_LINES,
    ),
    post_route("/api/embed", embed, OllamaEmbeddings, screens="texts"),
    post_route("/api/embeddings", old_embed, OldEmbedding, screens="texts"),
)  # fmt: skip
