"""Anthropic's Messages: POST /v1/messages and /v1/messages/count_tokens.

A stream has one content block for each tool call, for each stretch of text and of thoughts, opened and closed in turn.
Claude Code writes a line into the system prompt that changes with each conversation, and would have every prompt
computed anew; it is taken out before the prompt is made, unless the server was told to keep it (`--keep-billing-line`).

Elsewhere: what an answer is, is `core.py`; how it goes out is `streams.py`.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from argosy.config import SamplingParams
from argosy.errors import UsageError
from argosy.prompt.formats.events import Event as SaidEvent
from argosy.prompt.formats.events import (
    ReasoningDelta,
    TextDelta,
    ToolCallArguments,
    ToolCallBegin,
    ToolCallEnd,
)
from argosy.serve.core import Answers, ChatRequest, Ended, Said, Service
from argosy.serve.fields import Flag, Share, Stop, Strict, Temperature, Tokens, TopK
from argosy.serve.gate import Caller
from argosy.serve.streams import EventStream, sse, until_gone

BILLING_LINE = "x-anthropic-billing-header:"
IGNORED = ("metadata", "service_tier", "context_management", "output_config", "container", "cache_control")


class CountBody(Strict):
    model: str | None = Field(None, max_length=256)
    messages: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=4096)]
    system: str | Annotated[list[dict[str, Any]], Field(max_length=256)] | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=512)] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    context_management: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None
    cache_control: dict[str, Any] | None = None

    def request(self, params: SamplingParams, *, keep_billing_line: bool) -> ChatRequest:
        system = "\n".join(_texts(self.system or "", "system"))
        if not keep_billing_line and system.startswith(BILLING_LINE):
            system = system.partition("\n")[2]
        messages = [{"role": "system", "content": system}] if system else []
        for at, message in enumerate(self.messages):
            messages += _messages(message, f"messages.{at}")
        choice, parallel = _choice(self.tool_choice or {"type": "auto"})
        return ChatRequest(
            messages=messages,
            params=params,
            tools=[_tool(tool, f"tools.{at}") for at, tool in enumerate(self.tools or ())],
            tool_choice=choice,
            parallel=parallel,
            effort="none" if (self.thinking or {}).get("type") == "disabled" else None,
        )


class MessagesBody(CountBody):
    max_tokens: Tokens
    temperature: Temperature | None = None
    top_p: Share | None = None
    top_k: TopK | None = None
    stop_sequences: Annotated[list[Stop], Field(max_length=16)] | None = None
    stream: Flag | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = Field(None, max_length=64)
    container: str | None = Field(None, max_length=256)

    def params(self) -> SamplingParams:
        return SamplingParams(
            max_tokens=self.max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(0, self.top_k or 0),
            stop=tuple(self.stop_sequences or ()),
        )


def _texts(given: object, where: str) -> list[str]:
    """The texts of a string, or of a list of text blocks."""
    if isinstance(given, str):
        return [given]
    if not isinstance(given, list):
        raise UsageError(f"{where}: expected text, or a list of text blocks")
    texts = []
    for block in given:
        if (
            not isinstance(block, dict)
            or block.get("type") != "text"
            or not isinstance(block.get("text"), str)
        ):
            raise UsageError(
                f"{where}: only blocks of type text are taken here, and this model takes text only"
            )
        texts.append(block["text"])
    return texts


def _messages(message: dict[str, Any], where: str) -> list[dict[str, Any]]:
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant", "system") or message.keys() - {"role", "content"}:
        raise UsageError(f"{where}: expected role (user or assistant) and content")
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    if not isinstance(content, list):
        raise UsageError(f"{where}: content is neither text nor a list of blocks")
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    made: list[dict[str, Any]] = []
    for block in content:
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "thinking" and role == "assistant":
            thoughts.append(str(block.get("thinking") or ""))
        elif kind == "redacted_thinking" and role == "assistant":
            continue  # of another model: nobody here can read it
        elif kind == "tool_use" and role == "assistant":
            function = {"name": block.get("name"), "arguments": block.get("input")}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind == "tool_result" and role == "user":
            text = "\n".join(_texts(block.get("content") or "", where))
            made.append({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": text})
        else:
            texts += _texts([block], where)
    if role == "assistant":
        said: dict[str, Any] = {"role": role, "content": "".join(texts)}
        if thoughts:
            said["reasoning_content"] = "".join(thoughts)
        if calls:
            said["tool_calls"] = calls
        return [said]
    if texts or not made:
        made.append({"role": role, "content": "\n".join(texts)})
    return made


def _tool(tool: dict[str, Any], where: str) -> dict[str, Any]:
    if tool.get("type", "custom") != "custom":
        raise UsageError(
            f"{where}: tools that the server would run are not here; type is {tool.get('type')!r}"
        )
    function = {
        "name": tool.get("name"),
        "description": tool.get("description"),
        "parameters": tool.get("input_schema"),
    }
    return {"type": "function", "function": function}


def _choice(given: dict[str, Any]) -> tuple[str | tuple[str, str], bool]:
    parallel = given.get("disable_parallel_tool_use") is not True
    match given:
        case {"type": "auto" | "none" as kind}:
            return str(kind), parallel
        case {"type": "any"}:
            return "required", parallel
        case {"type": "tool", "name": str(name)}:
            return ("named", name), parallel
    raise UsageError("tool_choice is of no known type; known: auto, any, tool with a name, none")


async def count_tokens(body: CountBody, request: Request) -> dict[str, int]:
    """How many tokens a conversation has."""
    service: Service = request.app.state.service
    key = request.state.caller.key
    wanted = body.request(SamplingParams(), keep_billing_line=service.keep_billing_line)
    prompt = await asyncio.to_thread(service.build, wanted, "" if key is None else key.id)
    return {"input_tokens": len(prompt.token_ids or ())}


async def messages(body: MessagesBody, request: Request) -> Response:
    """Answer a conversation."""
    service: Service = request.app.state.service
    caller: Caller = request.state.caller
    wanted = body.request(body.params(), keep_billing_line=service.keep_billing_line)
    answers = await service.open(wanted, "" if caller.key is None else caller.key.id)
    ignored = [name for name in IGNORED if getattr(body, name) is not None]
    headers = {"x-ignored-params": ", ".join(ignored)} if ignored else {}
    dialect = _Messages(service, answers, caller)
    if body.stream:
        return EventStream(dialect.stream(), answers.cancel, dialect="anthropic", headers=headers)
    return JSONResponse(await until_gone(request, dialect.whole(), answers.cancel), headers=headers)


class _Messages:
    def __init__(self, service: Service, answers: Answers, caller: Caller) -> None:
        self._service, self._answers, self._caller = service, answers, caller
        self._id = "msg_" + secrets.token_hex(12)
        self._index = -1
        self._open: str | None = None  # type of the block that is open

    async def whole(self) -> dict[str, Any]:
        end: dict[str, Any] = {}
        async with self._answers as answers:
            async for step in answers.steps():
                if isinstance(step, Ended):
                    end = _end(step)
        said = self._answers.said(0)
        content: list[dict[str, Any]] = []
        if said.reasoning:
            content.append({"type": "thinking", "thinking": said.reasoning, "signature": ""})
        if said.text or not said.calls:
            content.append({"type": "text", "text": said.text})
        content += [
            {"type": "tool_use", "id": call.id, "name": call.name, "input": json.loads(call.arguments)}
            for call in said.calls
        ]
        return self._message(content) | end | {"usage": self._usage()}

    async def stream(self) -> AsyncIterator[bytes]:
        async with self._answers as answers:
            yield _event("message_start", message=self._message([]))
            async for step in answers.steps():
                match step:
                    case Said():
                        for said in step.events:
                            for part in self._parts(said):
                                yield part
                    case Ended():
                        for part in self._close():
                            yield part
                        yield _event("message_delta", delta=_end(step), usage=self._usage())
                        yield _event("message_stop")

    def _parts(self, said: SaidEvent) -> list[bytes]:
        match said:
            case TextDelta():
                begun = self._begin("text", {"type": "text", "text": ""})
                return [*begun, self._delta({"type": "text_delta", "text": said.text})]
            case ReasoningDelta():
                begun = self._begin("thinking", {"type": "thinking", "thinking": "", "signature": ""})
                return [*begun, self._delta({"type": "thinking_delta", "thinking": said.text})]
            case ToolCallBegin():
                block = {"type": "tool_use", "id": said.id, "name": said.name, "input": {}}
                return [*self._close(), *self._begin("tool_use", block)]
            case ToolCallArguments():
                return [self._delta({"type": "input_json_delta", "partial_json": said.json_fragment})]
            case ToolCallEnd():
                return self._close()

    def _begin(self, kind: str, block: dict[str, Any]) -> list[bytes]:
        if self._open == kind:
            return []
        closed = self._close()
        self._index, self._open = self._index + 1, kind
        return [*closed, _event("content_block_start", index=self._index, content_block=block)]

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _event("content_block_delta", index=self._index, delta=delta)

    def _close(self) -> list[bytes]:
        was, self._open = self._open, None
        return [] if was is None else [_event("content_block_stop", index=self._index)]

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id, "type": "message", "role": "assistant", "model": self._service.model.id,
            "content": content, "stop_reason": None, "stop_sequence": None, "usage": self._usage(),
        }  # fmt: skip

    def _usage(self) -> dict[str, int]:
        """Tokens; those that were found computed are not among the input tokens, as the dialect has it."""
        answers = self._answers
        self._caller.num_prompt_tokens, self._caller.num_new_tokens = (
            answers.num_prompt_tokens,
            answers.num_new_tokens,
        )
        cached = answers.num_cached_tokens
        return {
            "input_tokens": answers.num_prompt_tokens - cached, "output_tokens": answers.num_new_tokens,
            "cache_read_input_tokens": cached, "cache_creation_input_tokens": 0,
        }  # fmt: skip


def _end(step: Ended) -> dict[str, Any]:
    stopped_by = step.result.stopped_by
    if step.finish == "stop" and isinstance(stopped_by, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": stopped_by}
    reasons: dict[str, Literal["end_turn", "max_tokens", "tool_use"]] = {
        "stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use",
    }  # fmt: skip
    return {"stop_reason": reasons[step.finish], "stop_sequence": None}


def _event(kind: str, **more: Any) -> bytes:
    return sse({"type": kind, **more}, kind)
