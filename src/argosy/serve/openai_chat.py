"""OpenAI's Chat Completions: POST /v1/chat/completions.

A stream sends the role once, a call's id and name before its arguments, the same index throughout, and with
`include_usage` one last chunk without choices. `x-ignored-params` names what was accepted and has no effect.

Elsewhere: what an answer is, is `core.py`; how it goes out is `streams.py`.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from argosy.config import SamplingParams
from argosy.engine.sequence import TokenLogprob
from argosy.errors import UsageError
from argosy.prompt.formats.events import Event as SaidEvent
from argosy.prompt.formats.events import ReasoningDelta, TextDelta, ToolCallArguments, ToolCallBegin
from argosy.serve.core import Answers, ChatRequest, Ended, Progress, Said, Service
from argosy.serve.fields import Flag, NumBest, Sampling, Tokens
from argosy.serve.gate import Caller
from argosy.serve.streams import EventStream, sse, until_gone

# Accepted and without effect: what they would change is not there, or is the client's own book-keeping.
IGNORED = (
    "service_tier", "verbosity", "prediction", "web_search_options", "store", "metadata", "safety_identifier",
    "prompt_cache_key", "prompt_cache_retention", "prompt_cache_options", "user",
)  # fmt: skip


class ChatBody(Sampling):
    messages: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=4096)]
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    logprobs: Flag | None = None
    top_logprobs: NumBest | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=512)] | None = None
    tool_choice: Literal["auto", "none", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: Flag | None = None
    response_format: dict[str, Any] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    chat_template_kwargs: dict[str, bool | int | str] | None = Field(None, max_length=16)
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

    def request(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise UsageError("top_logprobs needs logprobs to be true", param="top_logprobs")
        params = SamplingParams(
            max_tokens=self.max_completion_tokens or self.max_tokens,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            **self.sampling(),
        )
        return ChatRequest(
            messages=self.messages,
            params=params,
            tools=self.tools or (),
            tool_choice=_choice(self.tool_choice),
            parallel=self.parallel_tool_calls is not False,
            schema=schema_of(self.response_format),
            effort=self.reasoning_effort,
            variables=self.chat_template_kwargs or {},
            num_answers=self.n or 1,
        )


def _choice(given: str | dict[str, Any] | None) -> str | tuple[str, str]:
    if not isinstance(given, dict):
        return given or "auto"
    function = given.get("function")
    if (
        given.get("type") != "function"
        or not isinstance(function, dict)
        or not isinstance(function.get("name"), str)
    ):
        raise UsageError(
            "tool_choice names a function: {type: function, function: {name}}", param="tool_choice"
        )
    return "named", function["name"]


def schema_of(given: dict[str, Any] | None) -> str | None:
    """`ChatRequest.schema` of a response_format."""
    match given:
        case None | {"type": "text"}:
            return None
        case {"type": "json_object"}:
            return ""
        case {"type": "json_schema", "json_schema": {"schema": dict(schema)}}:
            return json.dumps(schema)
    raise UsageError(
        "response_format is of no known type; known: text, json_object, json_schema with json_schema.schema",
        param="response_format",
    )


async def chat_completions(body: ChatBody, request: Request) -> Response:
    """Answer a conversation."""
    service: Service = request.app.state.service
    caller: Caller = request.state.caller
    wanted = body.request()
    answers = await service.open(wanted, "" if caller.key is None else caller.key.id)
    ignored = [name for name in IGNORED if name in body.model_fields_set and getattr(body, name) is not None]
    if service.ignored_effort(wanted):
        ignored.append("reasoning_effort")
    headers = {"x-ignored-params": ", ".join(ignored)} if ignored else {}
    dialect = _Chat(service, body, answers, caller)
    if body.stream:
        return EventStream(dialect.stream(), answers.cancel, headers=headers)
    return JSONResponse(await until_gone(request, dialect.whole(), answers.cancel), headers=headers)


class _Chat:
    def __init__(self, service: Service, body: ChatBody, answers: Answers, caller: Caller) -> None:
        self._service, self._body, self._answers, self._caller = service, body, answers, caller
        self._id = "chatcmpl-" + secrets.token_hex(12)
        self._created = int(time.time())

    async def whole(self) -> dict[str, Any]:
        logprobs: dict[int, list[dict[str, Any]]] = {}
        finish: dict[int, str] = {}
        async with self._answers as answers:
            async for step in answers.steps():
                match step:
                    case Said(logprob=TokenLogprob() as found):
                        logprobs.setdefault(step.answer, []).append(self._logprob(found))
                    case Ended():
                        finish[step.answer] = step.finish
        choices = []
        for number in range(len(finish)):
            said = self._answers.said(number)
            message: dict[str, Any] = {"role": "assistant", "content": said.text or None, "refusal": None}
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
            choice = {"index": number, "message": message, "finish_reason": finish[number], "logprobs": None}
            if self._body.logprobs:
                choice["logprobs"] = {"content": logprobs.get(number, []), "refusal": None}
            choices.append(choice)
        return self._head("chat.completion") | {"choices": choices} | self._last()

    async def stream(self) -> AsyncIterator[bytes]:
        async with self._answers as answers:
            for number in range(self._body.n or 1):
                yield self._chunk(number, {"role": "assistant", "content": ""})
            async for step in answers.steps():
                match step:
                    case Progress() if self._body.return_progress:
                        progress = {"processed": step.processed, "total": step.total, "cache": step.cached}
                        yield sse(
                            self._head("chat.completion.chunk") | {"choices": [], "prompt_progress": progress}
                        )
                    case Said():
                        deltas = [delta for event in step.events if (delta := _delta(event))]
                        if step.logprob is not None and not deltas:
                            deltas = [{}]
                        for at, delta in enumerate(deltas):
                            yield self._chunk(step.answer, delta, logprob=step.logprob if at == 0 else None)
                    case Ended():
                        yield self._chunk(step.answer, {}, finish=step.finish)
            last = self._last()
            if not (self._body.stream_options and self._body.stream_options.include_usage):
                last.pop("usage")
            if last:
                yield sse(self._head("chat.completion.chunk") | {"choices": []} | last)
            yield sse("[DONE]")

    def _chunk(
        self,
        number: int,
        delta: dict[str, Any],
        *,
        finish: str | None = None,
        logprob: TokenLogprob | None = None,
    ) -> bytes:
        choice: dict[str, Any] = {"index": number, "delta": delta, "finish_reason": finish}
        if logprob is not None:
            choice["logprobs"] = {"content": [self._logprob(logprob)], "refusal": None}
        return sse(self._head("chat.completion.chunk") | {"choices": [choice]})

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._service.model.id}

    def _last(self) -> dict[str, Any]:
        """What is known at the end: usage, and the ledger where it was asked for."""
        prompt, new = self._answers.num_prompt_tokens, self._answers.num_new_tokens
        self._caller.num_prompt_tokens, self._caller.num_new_tokens = prompt, new
        usage: dict[str, Any] = {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
        }
        usage["prompt_tokens_details"] = {"cached_tokens": self._answers.num_cached_tokens}
        first = self._answers.results[0]
        if not self._body.timings or first is None:
            return {"usage": usage}
        timings = first.ledger.as_dict()
        return {"usage": usage | {"timings": timings}, "timings": timings}

    def _logprob(self, found: TokenLogprob) -> dict[str, Any]:
        best = [self._token(token_id, logprob) for token_id, logprob in found.top]
        best = best[: self._body.top_logprobs or 0]
        return self._token(found.token_id, found.logprob) | {"top_logprobs": best}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        text = self._service.prompts.detokenize([token_id])
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode())}


def _delta(event: SaidEvent) -> dict[str, Any] | None:
    match event:
        case TextDelta():
            return {"content": event.text}
        case ReasoningDelta():
            return {"reasoning_content": event.text}
        case ToolCallBegin():
            function = {"name": event.name, "arguments": ""}
            return {
                "tool_calls": [
                    {"index": event.index, "id": event.id, "type": "function", "function": function}
                ]
            }
        case ToolCallArguments():
            return {"tool_calls": [{"index": event.index, "function": {"arguments": event.json_fragment}}]}
    return None
