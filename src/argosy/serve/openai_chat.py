"""OpenAI's Chat Completions: POST /v1/chat/completions.

A stream sends the role once, a call's id and name before its arguments, the same index throughout, and with
`include_usage` one last chunk without choices. `x-ignored-params` names what was accepted and has no effect.

Elsewhere: what an answer is, is `core.py`; how it goes out is `streams.py`.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal, NotRequired, cast

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from typing_extensions import TypedDict

from argosy.config import Grammar, SamplingParams
from argosy.engine.sequence import TokenLogprob
from argosy.errors import UsageError
from argosy.prompt.formats.events import Event as SaidEvent
from argosy.prompt.formats.events import ReasoningDelta, TextDelta, ToolCallArguments, ToolCallBegin
from argosy.serve.core import Answers, ChatRequest, Ended, Finish, Progress, Said, Service
from argosy.serve.fields import (
    LEAST_LOGPROB,
    Effort,
    Flag,
    FreeForm,
    Messages,
    Nullable,
    NumBest,
    ObjectSchema,
    OpenAISampling,
    ReadOfPrompt,
    Setting,
    Short,
    Strict,
    Text,
    ThoughtTokens,
    Timings,
    Tokens,
    ToolName,
    Tools,
    Usage,
    closed,
    ignored_header,
    schema_form,
)  # fmt: skip
from argosy.serve.gate import Caller
from argosy.serve.streams import DONE, EventStream, sse, until_gone
from argosy.serve.structured_outputs import StructuredOutputs, form_of
from argosy.serve.tool_use import ToolChoice, ToolMode


class TextPart(Strict):
    type: Literal["text"]
    text: Text


Content = Text | list[TextPart]


class CalledFunction(Strict):
    name: Short
    arguments: Text | dict[str, Any]  # JSON, or its text
    parsed_arguments: Any = None  # a copy that OpenAI's client makes


CallIndex = Annotated[int, Field(ge=0, lt=4096, strict=True)]


class CalledTool(Strict):
    id: Short
    type: Literal["function"] = "function"
    index: CallIndex | None = None
    function: CalledFunction


class AskingTurn(Nullable):
    role: Literal["system", "developer", "user"]
    content: Content
    name: Short | None = None


class AnsweringTurn(Nullable):
    role: Literal["assistant"]
    content: Content | None = None
    name: Short | None = None
    reasoning_content: Text | None = None
    reasoning: Text | None = None
    tool_calls: list[CalledTool] | None = None
    parsed: Any = None  # a copy that OpenAI's client makes
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None


class ToolTurn(Nullable):
    role: Literal["tool"]
    content: Content
    name: Short | None = None
    tool_call_id: Short


Turn = Annotated[AskingTurn | AnsweringTurn | ToolTurn, Field(discriminator="role")]


class OfferedFunction(Strict):
    name: ToolName
    description: Text | None = None
    parameters: ObjectSchema | None = None
    strict: Flag | None = None


class OfferedTool(Strict):
    type: Literal["function"]
    function: OfferedFunction


class NamedFunction(Strict):
    name: ToolName


class ChosenTool(Strict):
    type: Literal["function"]
    function: NamedFunction

    def asked(self) -> ToolChoice:
        return ToolChoice("required", (self.function.name,))


class ChosenTools(Strict):
    mode: Literal["auto", "required"]
    tools: Annotated[list[ChosenTool], Tools]


class AllowedTools(Strict):
    type: Literal["allowed_tools"]
    allowed_tools: ChosenTools

    def asked(self) -> ToolChoice:
        allowed = self.allowed_tools
        return ToolChoice(allowed.mode, tuple(tool.function.name for tool in allowed.tools))


class SchemaForm(Strict):
    name: str | None = Field(None, max_length=256)
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: Flag | None = None


class JsonSchemaForm(Strict):
    type: Literal["json_schema"]
    json_schema: SchemaForm

    def asked(self) -> Grammar:
        return schema_form(self.json_schema.schema_)


class ChatBody(OpenAISampling):
    # What these would change is not there, or is the client's own book-keeping.
    IGNORED = (
        "service_tier", "verbosity", "prediction", "web_search_options", "store", "metadata", "safety_identifier",
        "prompt_cache_key", "prompt_cache_retention", "prompt_cache_options", "user",
    )  # fmt: skip

    messages: Annotated[list[Turn], Messages]
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    logprobs: Flag | None = None
    top_logprobs: NumBest | None = None
    tools: Annotated[list[OfferedTool], Tools] | None = None
    tool_choice: ToolMode | Annotated[ChosenTool | AllowedTools, Field(discriminator="type")] | None = None
    parallel_tool_calls: Flag | None = None
    response_format: Annotated[FreeForm | JsonSchemaForm, Field(discriminator="type")] | None = None
    structured_outputs: StructuredOutputs | None = None
    reasoning_effort: Effort | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    chat_template_kwargs: dict[Short, Setting] | None = Field(None, max_length=16)
    service_tier: str | None = Field(None, max_length=64)
    verbosity: str | None = Field(None, max_length=64)
    prediction: dict[str, Any] | None = None
    web_search_options: dict[str, Any] | None = None
    store: Flag | None = None
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = Field(None, max_length=512)
    prompt_cache_key: str | None = Field(None, max_length=512)
    prompt_cache_retention: str | None = Field(None, max_length=64)
    prompt_cache_options: dict[str, Any] | None = None

    def request(self, caller: Caller) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise UsageError("top_logprobs needs logprobs to be true", param="top_logprobs")
        params = SamplingParams(
            max_tokens=self.max_completion_tokens or self.max_tokens,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            **self.sampling(self.stops),
        )
        choice = ToolChoice.of(self.tool_choice)
        if self.structured_outputs is not None and choice.mode == "required":
            raise UsageError(
                "the answer cannot be a call and have a form: leave out structured_outputs, or let tool_choice be auto",
                param="structured_outputs",
            )
        own = None if self.response_format is None else self.response_format.asked()
        return ChatRequest(
            messages=[turn.sent() for turn in self.messages],
            params=params,
            tools=[tool.model_dump(exclude_unset=True) for tool in self.tools or ()],
            tool_choice=choice,
            parallel=self.parallel_tool_calls is not False,
            form=form_of(self.structured_outputs, own, caller),
            effort=self.reasoning_effort,
            variables=self.chat_template_kwargs or {},
            num_answers=self.n or 1,
        )


@closed
class Function(TypedDict):
    name: str
    arguments: str


@closed
class Call(TypedDict):
    id: str
    type: Literal["function"]
    function: Function


@closed
class Token(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


@closed
class ScoredToken(Token):
    """A token, its log-probability and the best ones, as Chat Completions and Responses have them."""

    top_logprobs: list[Token]


@closed
class Scores(TypedDict):
    content: list[ScoredToken]
    refusal: None


@closed
class ChatMessage(TypedDict):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[Call]]


@closed
class Choice(TypedDict):
    index: int
    message: ChatMessage
    finish_reason: Finish
    logprobs: Scores | None


@closed
class ChatUsage(Usage):
    completion_tokens_details: ThoughtTokens
    timings: NotRequired[Timings]


@closed
class ChatCompletion(TypedDict):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: ChatUsage
    timings: NotRequired[Timings]


@closed
class FunctionDelta(TypedDict):
    name: NotRequired[str]
    arguments: str


@closed
class CallDelta(TypedDict):
    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: FunctionDelta


@closed
class Delta(TypedDict):
    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[CallDelta]]


@closed
class ChoiceDelta(TypedDict):
    index: int
    delta: Delta
    finish_reason: Finish | None
    logprobs: NotRequired[Scores]


@closed
class ChatChunk(TypedDict):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChoiceDelta]
    usage: NotRequired[ChatUsage]
    timings: NotRequired[Timings]
    prompt_progress: NotRequired[ReadOfPrompt]


async def chat_completions(body: ChatBody, request: Request) -> Response:
    """Answer a conversation."""
    service: Service = request.app.state.service
    caller: Caller = request.state.caller
    wanted = await asyncio.to_thread(body.request, caller)  # schemas and grammars can be long
    answers = await service.open(wanted, caller)
    ignored = body.ignored()
    if service.ignored_effort(wanted):
        ignored.append("reasoning_effort")
    headers = ignored_header(ignored)
    dialect = _Chat(service, body, answers)
    if body.stream:
        return EventStream(dialect.stream(), caller, answers.cancel, headers=headers)
    return JSONResponse(await until_gone(request, dialect.whole(), answers.cancel), headers=headers)


class _Chat:
    def __init__(self, service: Service, body: ChatBody, answers: Answers) -> None:
        self._service, self._body, self._answers = service, body, answers
        self._id = "chatcmpl-" + secrets.token_hex(12)
        self._created = int(time.time())

    async def whole(self) -> ChatCompletion:
        logprobs: dict[int, list[ScoredToken]] = {}
        finish: dict[int, Finish] = {}
        async with self._answers as answers:
            async for step in answers.steps():
                match step:
                    case Said(logprob=TokenLogprob() as found):
                        logprobs.setdefault(step.answer, []).append(self._logprob(found))
                    case Ended():
                        finish[step.answer] = step.finish
        choices: list[Choice] = []
        for number in range(len(finish)):
            said = self._answers.said(number)
            message: ChatMessage = {"role": "assistant", "content": said.text or None, "refusal": None}
            if not said.calls:
                message["content"] = said.text
            if said.reasoning:
                message["reasoning_content"] = said.reasoning
            if said.calls:
                message["tool_calls"] = [
                    {
                        "id": call.id,
                        "type": "function",
                        "function": {"name": call.name, "arguments": call.arguments},
                    }
                    for call in said.calls
                ]
            choice: Choice = {
                "index": number, "message": message, "finish_reason": finish[number], "logprobs": None,
            }  # fmt: skip
            if self._body.logprobs:
                choice["logprobs"] = {"content": logprobs.get(number, []), "refusal": None}
            choices.append(choice)
        usage, timings = self._last()
        whole: ChatCompletion = {
            "id": self._id, "object": "chat.completion", "created": self._created, "model": self._service.model.id,
            "choices": choices, "usage": usage,
        }  # fmt: skip
        return whole if timings is None else {**whole, "timings": timings}

    async def stream(self) -> AsyncIterator[bytes]:
        async with self._answers as answers:
            for number in range(self._body.n or 1):
                yield self._said(number, {"role": "assistant", "content": ""})
            async for step in answers.steps():
                match step:
                    case Progress() if self._body.return_progress:
                        yield sse({**self._chunk([]), "prompt_progress": step.as_dict()})
                    case Said():
                        deltas = [delta for event in step.events if (delta := _delta(event))]
                        if step.logprob is not None and not deltas:
                            deltas = [{}]
                        for at, delta in enumerate(deltas):
                            yield self._said(step.answer, delta, logprob=step.logprob if at == 0 else None)
                    case Ended():
                        yield self._said(step.answer, {}, finish=step.finish)
            last, (usage, timings) = self._chunk([]), self._last()
            if self._body.stream_options and self._body.stream_options.include_usage:
                last["usage"] = usage
            if timings is not None:
                last["timings"] = timings
            if "usage" in last or "timings" in last:
                yield sse(last)
            yield sse(DONE)

    def _said(
        self, number: int, delta: Delta, *, finish: Finish | None = None, logprob: TokenLogprob | None = None
    ) -> bytes:
        choice: ChoiceDelta = {"index": number, "delta": delta, "finish_reason": finish}
        if logprob is not None:
            choice["logprobs"] = {"content": [self._logprob(logprob)], "refusal": None}
        return sse(self._chunk([choice]))

    def _chunk(self, choices: list[ChoiceDelta]) -> ChatChunk:
        return {
            "id": self._id, "object": "chat.completion.chunk", "created": self._created,
            "model": self._service.model.id, "choices": choices,
        }  # fmt: skip

    def _last(self) -> tuple[ChatUsage, Timings | None]:
        """What is known at the end: usage, and the ledger where it was asked for."""
        prompt, new = self._answers.num_prompt_tokens, self._answers.num_new_tokens
        usage: ChatUsage = {
            "prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": self._answers.num_cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": self._answers.num_reasoning_tokens},
        }  # fmt: skip
        first = self._answers.results[0]
        if not self._body.timings or first is None:
            return usage, None
        timings = cast(Timings, first.ledger.as_dict())
        return {**usage, "timings": timings}, timings

    def _logprob(self, found: TokenLogprob) -> ScoredToken:
        return spell_logprob(self._service, found, self._body.top_logprobs or 0)


def spell_logprob(service: Service, found: TokenLogprob, num_best: int) -> ScoredToken:
    """A token with its log-probability and the best ones."""

    def token(token_id: int, logprob: float) -> Token:
        text = service.prompts.detokenize([token_id])
        return {"token": text, "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(text.encode())}

    best = [token(token_id, logprob) for token_id, logprob in found.top]
    return {**token(found.token_id, found.logprob), "top_logprobs": best[:num_best]}


def _delta(event: SaidEvent) -> Delta | None:
    match event:
        case TextDelta():
            return {"content": event.text}
        case ReasoningDelta():
            return {"reasoning_content": event.text}
        case ToolCallBegin():
            function: FunctionDelta = {"name": event.name, "arguments": ""}
            call: CallDelta = {"index": event.index, "id": event.id, "type": "function", "function": function}
            return {"tool_calls": [call]}
        case ToolCallArguments():
            return {"tool_calls": [{"index": event.index, "function": {"arguments": event.json_fragment}}]}
    return None
