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
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from typing_extensions import TypedDict

from argosy.config import SamplingParams
from argosy.prompt.formats.events import Event as SaidEvent
from argosy.prompt.formats.events import (
    ReasoningDelta,
    TextDelta,
    ToolCallArguments,
    ToolCallBegin,
    ToolCallEnd,
)
from argosy.serve.core import Answers, ChatRequest, Ended, Said, Service
from argosy.serve.fields import (
    Flag,
    Lenient,
    Messages,
    ObjectSchema,
    Sampling,
    Short,
    Stop,
    Strict,
    Text,
    Tokens,
    ToolName,
    Tools,
    closed,
    ignored_header,
    schema_form,
    strays,
)  # fmt: skip
from argosy.serve.gate import Caller
from argosy.serve.streams import EventStream, error_event, sse, until_gone
from argosy.serve.tool_use import ToolChoice

BILLING_LINE = "x-anthropic-billing-header:"


class TextBlock(Lenient):
    type: Literal["text"]
    text: Text


class ThinkingBlock(Lenient):
    type: Literal["thinking"]
    thinking: Text
    signature: str | None = None


class RedactedThinkingBlock(Lenient):
    """Of another model: nobody here can read it."""

    type: Literal["redacted_thinking"]


class ToolUseBlock(Lenient):
    type: Literal["tool_use"]
    id: Short
    name: Short
    input: dict[str, Any]


class ToolResultBlock(Lenient):
    type: Literal["tool_result"]
    tool_use_id: Short
    content: Text | list[TextBlock] | None = None


AskingBlock = Annotated[TextBlock | ToolResultBlock, Field(discriminator="type")]
AnsweringBlock = Annotated[
    TextBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock, Field(discriminator="type")
]


class AskingMessage(Strict):
    role: Literal["user"]
    content: Text | list[AskingBlock]


class SystemMessage(Strict):
    role: Literal["system"]
    content: Text | list[TextBlock]


class AnsweringMessage(Strict):
    role: Literal["assistant"]
    content: Text | list[AnsweringBlock]


class ClientTool(Lenient):
    type: Literal["custom"] | None = None
    name: ToolName
    description: Text | None = None
    input_schema: ObjectSchema
    strict: Flag | None = None


class FreeChoice(Strict):
    type: Literal["auto", "any", "none"]
    disable_parallel_tool_use: Flag | None = None

    def asked(self) -> ToolChoice:
        return ToolChoice("required" if self.type == "any" else self.type)


class NamedChoice(Strict):
    type: Literal["tool"]
    name: ToolName
    disable_parallel_tool_use: Flag | None = None

    def asked(self) -> ToolChoice:
        return ToolChoice("required", (self.name,))


class Thinking(Lenient):
    """How much to think: "adaptive" leaves it to the model, a budget of tokens does not bound it."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]


class OutputFormat(Lenient):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Lenient):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class CountBody(Sampling):
    IGNORED: ClassVar[tuple[str, ...]] = ("context_management", "cache_control")

    messages: Annotated[
        list[Annotated[AskingMessage | AnsweringMessage | SystemMessage, Field(discriminator="role")]],
        Messages,
    ]
    system: Text | Annotated[list[TextBlock], Field(max_length=256)] | None = None
    tools: Annotated[list[ClientTool], Tools] | None = None
    tool_choice: Annotated[FreeChoice | NamedChoice, Field(discriminator="type")] | None = None
    thinking: Thinking | None = None
    context_management: dict[str, Any] | None = None
    output_config: OutputConfig | None = None
    cache_control: dict[str, Any] | None = None

    def request(self, params: SamplingParams, *, keep_billing_line: bool) -> ChatRequest:
        system = _text(self.system or "")
        if not keep_billing_line and system.startswith(BILLING_LINE):
            system = system.partition("\n")[2]
        messages = [{"role": "system", "content": system}] if system else []
        for message in self.messages:
            messages += _messages(message)
        choice, config = self.tool_choice, self.output_config
        form = None if config is None else config.format
        return ChatRequest(
            messages=messages,
            params=params,
            tools=[_tool(tool) for tool in self.tools or ()],
            tool_choice=ToolChoice.of(choice),
            parallel=choice is None or choice.disable_parallel_tool_use is not True,
            form=None if form is None else schema_form(form.schema_),
            effort=self.effort(),
        )

    def effort(self) -> str | None:
        """How much the model is to think."""
        kind = None if self.thinking is None else self.thinking.type
        asked = None if self.output_config is None else self.output_config.effort
        if kind == "disabled":
            return "none"
        return "medium" if asked is None and kind == "enabled" else asked

    def ignored(self) -> list[str]:
        names = super().ignored()
        blocks = [
            block for message in self.messages if not isinstance(message.content, str) for block in message.content
        ]  # fmt: skip
        nested = [
            inner for block in blocks if isinstance(block, ToolResultBlock) and isinstance(block.content, list)
            for inner in block.content
        ]  # fmt: skip
        names += strays("system", () if isinstance(self.system, str) else self.system or ())
        names += strays("messages.content", [*blocks, *nested])
        names += strays("tools", self.tools or ())
        names += strays("thinking", (self.thinking,))
        config = self.output_config
        names += strays("output_config", (config,))
        return names + strays("output_config.format", () if config is None else (config.format,))


class MessagesBody(CountBody):
    IGNORED = (*CountBody.IGNORED, "metadata", "service_tier", "container", "inference_geo")

    max_tokens: Tokens
    stop_sequences: Annotated[list[Stop], Field(max_length=16)] | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = Field(None, max_length=64)
    container: str | None = Field(None, max_length=256)
    inference_geo: str | None = Field(None, max_length=64)

    def params(self) -> SamplingParams:
        return SamplingParams(max_tokens=self.max_tokens, **self.sampling(self.stop_sequences or ()))


def _text(given: str | Sequence[TextBlock]) -> str:
    return given if isinstance(given, str) else "\n".join(block.text for block in given)


def _messages(message: AskingMessage | AnsweringMessage | SystemMessage) -> list[dict[str, Any]]:
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    made: list[dict[str, Any]] = []
    for block in message.content:
        match block:
            case TextBlock():
                texts.append(block.text)
            case ThinkingBlock():
                thoughts.append(block.thinking)
            case ToolUseBlock():
                function = {"name": block.name, "arguments": block.input}
                calls.append({"id": block.id, "type": "function", "function": function})
            case ToolResultBlock():
                content = _text(block.content or "")
                made.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": content})
    if message.role == "assistant":
        said: dict[str, Any] = {"role": "assistant", "content": "".join(texts)}
        if thoughts:
            said["reasoning_content"] = "".join(thoughts)
        if calls:
            said["tool_calls"] = calls
        return [said]
    if texts or not made:
        made.append({"role": message.role, "content": "\n".join(texts)})
    return made


def _tool(tool: ClientTool) -> dict[str, Any]:
    function = {
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.input_schema.model_dump(exclude_unset=True),
        "strict": tool.strict,
    }
    return {"type": "function", "function": function}


@closed
class Counted(TypedDict):
    input_tokens: int


@closed
class SaidText(TypedDict):
    type: Literal["text"]
    text: str


@closed
class SaidThinking(TypedDict):
    type: Literal["thinking"]
    thinking: str
    signature: str


@closed
class SaidToolUse(TypedDict):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


SaidBlock = SaidText | SaidThinking | SaidToolUse


@closed
class ThinkingTokens(TypedDict):
    thinking_tokens: int


@closed
class TokenUse(TypedDict):
    """Tokens; those that were found computed are not among the input tokens, as the dialect has it."""

    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int
    output_tokens_details: ThinkingTokens


@closed
class End(TypedDict):
    stop_reason: Literal["end_turn", "max_tokens", "tool_use", "stop_sequence"] | None
    stop_sequence: str | None


@closed
class Message(End):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[SaidBlock]
    usage: TokenUse


@closed
class MessageStart(TypedDict):
    type: Literal["message_start"]
    message: Message


@closed
class BlockStart(TypedDict):
    type: Literal["content_block_start"]
    index: int
    content_block: SaidBlock


@closed
class TextPiece(TypedDict):
    type: Literal["text_delta"]
    text: str


@closed
class ThinkingPiece(TypedDict):
    type: Literal["thinking_delta"]
    thinking: str


@closed
class InputPiece(TypedDict):
    type: Literal["input_json_delta"]
    partial_json: str


@closed
class BlockDelta(TypedDict):
    type: Literal["content_block_delta"]
    index: int
    delta: TextPiece | ThinkingPiece | InputPiece


@closed
class BlockStop(TypedDict):
    type: Literal["content_block_stop"]
    index: int


@closed
class MessageDelta(TypedDict):
    type: Literal["message_delta"]
    delta: End
    usage: TokenUse


@closed
class MessageStop(TypedDict):
    type: Literal["message_stop"]


Event = MessageStart | BlockStart | BlockDelta | BlockStop | MessageDelta | MessageStop


async def count_tokens(body: CountBody, request: Request) -> Counted:
    """How many tokens a conversation has."""
    service: Service = request.app.state.service
    caller: Caller = request.state.caller
    wanted = body.request(SamplingParams(), keep_billing_line=service.keep_billing_line)
    prompt = await asyncio.to_thread(service.build, wanted, caller.tenant)
    return {"input_tokens": len(prompt.token_ids or ())}


async def messages(body: MessagesBody, request: Request) -> Response:
    """Answer a conversation."""
    service: Service = request.app.state.service
    caller: Caller = request.state.caller
    wanted = await asyncio.to_thread(body.request, body.params(), keep_billing_line=service.keep_billing_line)
    answers = await service.open(wanted, caller)
    ignored = body.ignored()
    if service.ignored_effort(wanted):
        has_effort = body.output_config is not None and body.output_config.effort is not None
        ignored.append("output_config.effort" if has_effort else "thinking")
    headers = ignored_header(ignored)
    dialect = _Messages(service, answers)
    if body.stream:
        return EventStream(
            dialect.stream(), caller, answers.cancel, headers=headers,
            failed=lambda error: error_event(error, "anthropic", caller),
        )  # fmt: skip
    return JSONResponse(await until_gone(request, dialect.whole(), answers.cancel), headers=headers)


class _Messages:
    def __init__(self, service: Service, answers: Answers) -> None:
        self._service, self._answers = service, answers
        self._id = "msg_" + secrets.token_hex(12)
        self._index = -1
        self._open: str | None = None  # type of the block that is open

    async def whole(self) -> Message:
        end: End = {"stop_reason": None, "stop_sequence": None}
        async with self._answers as answers:
            async for step in answers.steps():
                if isinstance(step, Ended):
                    end = _end(step)
        said = self._answers.said(0)
        content: list[SaidBlock] = []
        if said.reasoning:
            content.append({"type": "thinking", "thinking": said.reasoning, "signature": ""})
        if said.text or not said.calls:
            content.append({"type": "text", "text": said.text})
        content += [
            {"type": "tool_use", "id": call.id, "name": call.name, "input": json.loads(call.arguments)}
            for call in said.calls
        ]
        return {**self._message(content), **end, "usage": self._usage()}

    async def stream(self) -> AsyncIterator[bytes]:
        async with self._answers as answers:
            yield _sent({"type": "message_start", "message": self._message([])})
            async for step in answers.steps():
                match step:
                    case Said():
                        for said in step.events:
                            for part in self._parts(said):
                                yield part
                    case Ended():
                        if self._index < 0:  # as the whole answer has it
                            for part in self._begin("text", {"type": "text", "text": ""}):
                                yield part
                        for part in self._close():
                            yield part
                        yield _sent({"type": "message_delta", "delta": _end(step), "usage": self._usage()})
                        yield _sent({"type": "message_stop"})

    def _parts(self, said: SaidEvent) -> list[bytes]:
        match said:
            case TextDelta():
                begun = self._begin("text", {"type": "text", "text": ""})
                return [*begun, self._delta({"type": "text_delta", "text": said.text})]
            case ReasoningDelta():
                begun = self._begin("thinking", {"type": "thinking", "thinking": "", "signature": ""})
                return [*begun, self._delta({"type": "thinking_delta", "thinking": said.text})]
            case ToolCallBegin():
                block: SaidToolUse = {"type": "tool_use", "id": said.id, "name": said.name, "input": {}}
                return [*self._close(), *self._begin("tool_use", block)]
            case ToolCallArguments():
                return [self._delta({"type": "input_json_delta", "partial_json": said.json_fragment})]
            case ToolCallEnd():
                return self._close()

    def _begin(self, kind: str, block: SaidBlock) -> list[bytes]:
        if self._open == kind:
            return []
        shut = self._close()
        self._index, self._open = self._index + 1, kind
        start: BlockStart = {"type": "content_block_start", "index": self._index, "content_block": block}
        return [*shut, _sent(start)]

    def _delta(self, delta: TextPiece | ThinkingPiece | InputPiece) -> bytes:
        return _sent({"type": "content_block_delta", "index": self._index, "delta": delta})

    def _close(self) -> list[bytes]:
        was, self._open = self._open, None
        return [] if was is None else [_sent({"type": "content_block_stop", "index": self._index})]

    def _message(self, content: list[SaidBlock]) -> Message:
        return {
            "id": self._id, "type": "message", "role": "assistant", "model": self._service.model.id,
            "content": content, "stop_reason": None, "stop_sequence": None, "usage": self._usage(),
        }  # fmt: skip

    def _usage(self) -> TokenUse:
        answers = self._answers
        cached = answers.num_cached_tokens
        return {
            "input_tokens": answers.num_prompt_tokens - cached, "output_tokens": answers.num_new_tokens,
            "cache_read_input_tokens": cached, "cache_creation_input_tokens": 0,
            "output_tokens_details": {"thinking_tokens": answers.num_reasoning_tokens},
        }  # fmt: skip


def _end(step: Ended) -> End:
    stopped_by = step.result.stopped_by
    if step.finish == "stop" and isinstance(stopped_by, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": stopped_by}
    reasons: dict[str, Literal["end_turn", "max_tokens", "tool_use"]] = {
        "stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use",
    }  # fmt: skip
    return {"stop_reason": reasons[step.finish], "stop_sequence": None}


def _sent(event: Event) -> bytes:
    return sse(event, event["type"])
