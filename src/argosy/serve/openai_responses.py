"""OpenAI's Responses: POST /v1/responses, without state: the client sends the whole conversation each time.

A stream numbers its events; each piece of an answer is an output item that is added, filled by deltas, and done. The
last event is `response.completed`, `response.incomplete` or `response.failed`. Tools that OpenAI would run itself are
left out, and named in `x-ignored-params`.

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
from argosy.errors import ArgosyError, UsageError
from argosy.prompt.formats.events import Event as SaidEvent
from argosy.prompt.formats.events import (
    ReasoningDelta,
    TextDelta,
    ToolCallArguments,
    ToolCallBegin,
    ToolCallEnd,
)
from argosy.serve.core import Answers, ChatRequest, Ended, Said, Service
from argosy.serve.fields import Flag, Share, Strict, Temperature, Tokens
from argosy.serve.gate import Caller, error_body
from argosy.serve.streams import EventStream, sse, until_gone

IGNORED = (
    "store", "metadata", "include", "truncation", "service_tier", "prompt_cache_key", "prompt_cache_retention",
    "safety_identifier", "user", "stream_options", "client_metadata",
)  # fmt: skip


class ResponsesBody(Strict):
    model: str | None = Field(None, max_length=256)
    input: str | Annotated[list[dict[str, Any]], Field(min_length=1, max_length=4096)]
    instructions: str | None = None
    max_output_tokens: Tokens | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    stream: Flag | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=512)] | None = None
    tool_choice: Literal["auto", "none", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: Flag | None = None
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    store: Flag | None = None
    metadata: dict[str, Any] | None = None
    client_metadata: dict[str, Any] | None = None
    include: Annotated[list[str], Field(max_length=32)] | None = None
    truncation: Literal["disabled"] | None = None
    service_tier: str | None = Field(None, max_length=64)
    prompt_cache_key: str | None = Field(None, max_length=512)
    prompt_cache_retention: str | None = Field(None, max_length=64)
    safety_identifier: str | None = Field(None, max_length=512)
    user: str | None = Field(None, max_length=512)
    stream_options: dict[str, Any] | None = None

    def request(self) -> ChatRequest:
        messages = [{"role": "system", "content": self.instructions}] if self.instructions else []
        if isinstance(self.input, str):
            messages.append({"role": "user", "content": self.input})
        else:
            messages += _messages(self.input)
        effort = (self.reasoning or {}).get("effort")
        if effort is not None and effort not in ("none", "minimal", "low", "medium", "high", "xhigh", "max"):
            raise UsageError("reasoning.effort is of no known value", param="reasoning.effort")
        return ChatRequest(
            messages=messages,
            params=SamplingParams(
                max_tokens=self.max_output_tokens,
                temperature=1.0 if self.temperature is None else self.temperature,
                top_p=1.0 if self.top_p is None else self.top_p,
            ),
            tools=[_tool(tool) for tool in self.tools or () if tool.get("type") == "function"],
            tool_choice=_choice(self.tool_choice),
            parallel=self.parallel_tool_calls is not False,
            schema=_schema((self.text or {}).get("format")),
            effort=effort,
        )

    def ignored(self) -> list[str]:
        names = [name for name in IGNORED if getattr(self, name) is not None]
        names += [f"text.{name}" for name in ("verbosity",) if name in (self.text or {})]
        hosted = {str(tool.get("type"))[:32] for tool in self.tools or () if tool.get("type") != "function"}
        return names + sorted(f"tools.{kind}" for kind in hosted if kind.isidentifier())


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    function = {name: tool[name] for name in ("name", "description", "parameters", "strict") if name in tool}
    return {"type": "function", "function": function}


def _choice(given: str | dict[str, Any] | None) -> str | tuple[str, str]:
    match given:
        case None:
            return "auto"
        case str():
            return given
        case {"type": "function", "name": str(name)}:
            return "named", name
    raise UsageError("tool_choice names a function: {type: function, name}", param="tool_choice")


def _schema(given: object) -> str | None:
    match given:
        case None | {"type": "text"}:
            return None
        case {"type": "json_object"}:
            return ""
        case {"type": "json_schema", "schema": dict(schema)}:
            return json.dumps(schema)
    raise UsageError(
        "text.format is of no known type; known: text, json_object, json_schema", param="text.format"
    )


def _messages(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Items as messages: thoughts, text and calls of the assistant that follow each other are one."""
    made: list[dict[str, Any]] = []
    for at, item in enumerate(items):
        where, kind = f"input.{at}", item.get("type", "message")
        if kind == "function_call_output":
            text = _text(item.get("output"), where)
            made.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": text})
        elif kind == "message" and item.get("role") != "assistant":
            made.append({"role": item.get("role"), "content": _text(item.get("content"), where)})
        elif kind in ("message", "function_call", "reasoning"):
            if not made or made[-1]["role"] != "assistant":
                made.append({"role": "assistant", "content": ""})
            _add(made[-1], kind, item, where)
        else:
            raise UsageError(f"{where}: items of this type are not taken here", param=where)
    return made


def _add(message: dict[str, Any], kind: str, item: dict[str, Any], where: str) -> None:
    if kind == "message":
        message["content"] += _text(item.get("content"), where)
    elif kind == "reasoning":
        thought = _text(item.get("content") or "", where)
        message["reasoning_content"] = message.get("reasoning_content", "") + thought
    else:
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        message.setdefault("tool_calls", []).append(call)


def _text(content: object, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise UsageError(f"{where}: expected text, or a list of parts", param=where)
    texts = []
    for part in content:
        known = ("input_text", "output_text", "reasoning_text", "text")
        if (
            not isinstance(part, dict)
            or part.get("type") not in known
            or not isinstance(part.get("text"), str)
        ):
            raise UsageError(f"{where}: this model takes parts of text only", param=where)
        texts.append(part["text"])
    return "".join(texts)


async def responses(body: ResponsesBody, request: Request) -> Response:
    """Answer a conversation."""
    service: Service = request.app.state.service
    caller: Caller = request.state.caller
    wanted, ignored = body.request(), body.ignored()
    answers = await service.open(wanted, "" if caller.key is None else caller.key.id)
    if service.ignored_effort(wanted):
        ignored.append("reasoning.effort")
    headers = {"x-ignored-params": ", ".join(ignored)} if ignored else {}
    dialect = _Responses(service, body, answers, caller)
    if body.stream:
        return EventStream(dialect.stream(), answers.cancel, headers=headers)
    return JSONResponse(await until_gone(request, dialect.whole(), answers.cancel), headers=headers)


class _Responses:
    """The stream's events build the items that a whole response has, so both say the same."""

    def __init__(self, service: Service, body: ResponsesBody, answers: Answers, caller: Caller) -> None:
        self._service, self._body, self._answers, self._caller = service, body, answers, caller
        self._id = "resp_" + secrets.token_hex(16)
        self._created = int(time.time())
        self._number = 0
        self._items: list[dict[str, Any]] = []
        self._is_open = False

    async def whole(self) -> dict[str, Any]:
        last: dict[str, Any] = {}
        async with self._answers as answers:
            async for step in answers.steps():
                for _, data in self._take(step):
                    last = data
        response: dict[str, Any] = last["response"]
        return response

    async def stream(self) -> AsyncIterator[bytes]:
        async with self._answers as answers:
            for kind in ("response.created", "response.in_progress"):
                yield sse(self._event(kind, response=self._response("in_progress"))[1], kind)
            try:
                async for step in answers.steps():
                    for kind, data in self._take(step):
                        yield sse(data, kind)
            except ArgosyError as error:
                said = error_body(error, "openai")[1]["error"]
                failed = self._response("failed") | {
                    "error": {"code": "server_error", "message": said["message"]}
                }
                kind, data = self._event("response.failed", response=failed)
                yield sse(data, kind)

    def _take(self, step: object) -> list[tuple[str, dict[str, Any]]]:
        match step:
            case Said():
                return [event for said in step.events for event in self._say(said)]
            case Ended():
                closed = self._close()
                status = "incomplete" if step.finish == "length" else "completed"
                return [*closed, self._event(f"response.{status}", response=self._response(status))]
        return []

    def _say(self, said: SaidEvent) -> list[tuple[str, dict[str, Any]]]:
        match said:
            case TextDelta():
                return self._more("message", "output_text", said.text)
            case ReasoningDelta():
                return self._more("reasoning", "reasoning_text", said.text)
            case ToolCallBegin():
                item = {"type": "function_call", "call_id": said.id, "name": said.name, "arguments": ""}
                return [*self._close(), self._begin("fc_", item)]
            case ToolCallArguments():
                self._items[-1]["arguments"] += said.json_fragment
                return [
                    self._event(
                        "response.function_call_arguments.delta", **self._at(), delta=said.json_fragment
                    )
                ]
            case ToolCallEnd():
                return self._close()

    def _more(self, kind: str, part: str, text: str) -> list[tuple[str, dict[str, Any]]]:
        events = []
        if not self._is_open or self._items[-1]["type"] != kind:
            item: dict[str, Any] = {"type": kind, "content": []}
            if kind == "message":
                item["role"] = "assistant"
            else:
                item["summary"] = []
            events = [*self._close(), self._begin("msg_" if kind == "message" else "rs_", item)]
            content: dict[str, Any] = {"type": part, "text": ""}
            if kind == "message":
                content |= {"annotations": [], "logprobs": []}
            events.append(
                self._event("response.content_part.added", **self._at(), content_index=0, part=dict(content))
            )
            self._items[-1]["content"].append(content)
        self._items[-1]["content"][0]["text"] += text
        more: dict[str, Any] = {"logprobs": []} if kind == "message" else {}
        events.append(
            self._event(f"response.{part}.delta", **self._at(), content_index=0, delta=text, **more)
        )
        return events

    def _begin(self, prefix: str, item: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        self._is_open = True
        self._items.append({"id": prefix + secrets.token_hex(12), "status": "in_progress", **item})
        at = len(self._items) - 1
        shown = json.loads(json.dumps(self._items[-1]))  # as it is now; it grows
        return self._event("response.output_item.added", output_index=at, item=shown)

    def _close(self) -> list[tuple[str, dict[str, Any]]]:
        if not self._is_open:
            return []
        self._is_open = False
        item = self._items[-1]
        item["status"] = "completed"
        at = self._at()
        if item["type"] == "function_call":
            named = {"name": item["name"], "arguments": item["arguments"]}
            events = [self._event("response.function_call_arguments.done", **at, **named)]
        else:
            part = item["content"][0]
            more: dict[str, Any] = {"logprobs": []} if item["type"] == "message" else {}
            events = [
                self._event(
                    f"response.{part['type']}.done", **at, content_index=0, text=part["text"], **more
                ),
                self._event("response.content_part.done", **at, content_index=0, part=part),
            ]
        return [*events, self._event("response.output_item.done", output_index=at["output_index"], item=item)]

    def _at(self) -> dict[str, Any]:
        return {"output_index": len(self._items) - 1, "item_id": self._items[-1]["id"]}

    def _event(self, kind: str, **data: Any) -> tuple[str, dict[str, Any]]:
        self._number += 1
        return kind, {"type": kind, "sequence_number": self._number - 1, **data}

    def _response(self, status: str) -> dict[str, Any]:
        body, answers = self._body, self._answers
        usage = None
        if status in ("completed", "incomplete"):
            prompt, new = answers.num_prompt_tokens, answers.num_new_tokens
            self._caller.num_prompt_tokens, self._caller.num_new_tokens = prompt, new
            usage = {
                "input_tokens": prompt, "input_tokens_details": {"cached_tokens": answers.num_cached_tokens},
                "output_tokens": new, "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": prompt + new,
            }  # fmt: skip
        return {
            "id": self._id, "object": "response", "created_at": self._created, "status": status, "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions, "model": self._service.model.id, "output": list(self._items),
            "parallel_tool_calls": body.parallel_tool_calls is not False, "previous_response_id": None,
            "store": False, "temperature": 1.0 if body.temperature is None else body.temperature,
            "top_p": 1.0 if body.top_p is None else body.top_p, "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [], "max_output_tokens": body.max_output_tokens, "metadata": {}, "usage": usage,
        }  # fmt: skip
