"""Anthropic's Messages: POST /v1/messages and /v1/messages/count_tokens.

A stream has one content block for each tool call and for each stretch of text or thoughts, opened and closed in turn.

Elsewhere: the path of a request is `serve/answer/respond.py`; answers are `serve/answer/answers.py`.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from typing import Any, Literal

from pydantic_core import from_json
from starlette.requests import Request
from starlette.responses import Response

from argosy.prompt.formats.events import Event as SaidEvent
from argosy.prompt.formats.events import (
    ReasoningDelta,
    TextDelta,
    ToolCallArguments,
    ToolCallBegin,
    ToolCallEnd,
)
from argosy.serve.answer.answers import Ended, Said, Step
from argosy.serve.answer.opening import Opening
from argosy.serve.answer.request import ChatRequest, Read
from argosy.serve.answer.respond import Exchange, respond
from argosy.serve.answer.service import Service, service_of
from argosy.serve.dialects.anthropic_messages_bodies import CountBody, MessagesBody
from argosy.serve.http.caller import Caller
from argosy.serve.http.closed import Closed
from argosy.serve.http.failures import AnthropicError
from argosy.serve.http.route import post_route


class Counted(Closed):
    input_tokens: int


class SaidText(Closed):
    type: Literal["text"]
    text: str


class SaidThinking(Closed):
    type: Literal["thinking"]
    thinking: str
    signature: str


class SaidToolUse(Closed):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


SaidBlock = SaidText | SaidThinking | SaidToolUse


class ThinkingTokens(Closed):
    thinking_tokens: int


class TokenUse(Closed):
    """Token counts. As Anthropic defines them, input tokens exclude those read from the prefix cache."""

    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int
    output_tokens_details: ThinkingTokens


class End(Closed):
    stop_reason: Literal["end_turn", "max_tokens", "tool_use", "stop_sequence", "refusal"] | None
    stop_sequence: str | None


class Message(End):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[SaidBlock]
    usage: TokenUse


class MessageStart(Closed):
    type: Literal["message_start"]
    message: Message


class BlockStart(Closed):
    type: Literal["content_block_start"]
    index: int
    content_block: SaidBlock


class TextPiece(Closed):
    type: Literal["text_delta"]
    text: str


class ThinkingPiece(Closed):
    type: Literal["thinking_delta"]
    thinking: str


class InputPiece(Closed):
    type: Literal["input_json_delta"]
    partial_json: str


class BlockDelta(Closed):
    type: Literal["content_block_delta"]
    index: int
    delta: TextPiece | ThinkingPiece | InputPiece


class BlockStop(Closed):
    type: Literal["content_block_stop"]
    index: int


class MessageDelta(Closed):
    type: Literal["message_delta"]
    delta: End
    usage: TokenUse


class MessageStop(Closed):
    type: Literal["message_stop"]


Event = MessageStart | BlockStart | BlockDelta | BlockStop | MessageDelta | MessageStop


def _reading(body: CountBody, service: Service, caller: Caller) -> Callable[[], ChatRequest]:
    return lambda: body.request(service.intake(caller), keep_billing_line=service.keep_billing_line)


async def count_tokens(body: CountBody, request: Request) -> Counted:
    """Count the tokens of a conversation."""
    service = service_of(request)
    caller: Caller = request.state.caller
    tokens, _ = await Opening(service, caller).tokens(_reading(body, service, caller))
    return {"input_tokens": len(tokens)}


async def messages(body: MessagesBody, request: Request) -> Response:
    """Answer a conversation."""
    return await respond(MessagesExchange, body, request)


class MessagesExchange(Exchange[MessagesBody, Event]):
    errors = "anthropic"
    names_events = True

    _message: Message  # the whole answer so far, if it is folded

    def __init__(self, body: MessagesBody, service: Service, caller: Caller) -> None:
        super().__init__(body, service, caller)
        self._num_closed = 0  # blocks
        self._open: str | None = None  # the type of the open block
        self._pieces: list[str] = []  # pieces of the block being folded

    def reads(self) -> list[Read]:
        return [_reading(self.body, self.service, self.caller)]

    def begin(self) -> list[Event]:
        message: Message = {
            "id": "msg_" + secrets.token_hex(12), "type": "message", "role": "assistant",
            "model": self.service.model.id, "content": [], "stop_reason": None, "stop_sequence": None,
            "usage": self._usage(),
        }  # fmt: skip
        return [{"type": "message_start", "message": message}]

    def take(self, step: Step) -> list[Event]:
        match step:
            case Said():
                return [event for said in step.events for event in self._say(said)]
            case Ended():
                is_empty = self._num_closed == 0 and self._open is None
                begun = self._begin({"type": "text", "text": ""}) if is_empty else []
                end: MessageDelta = {"type": "message_delta", "delta": _end(step), "usage": self._usage()}
                return [*begun, *self._close(), end, {"type": "message_stop"}]
        return []

    def fold(self, event: Event) -> None:
        match event["type"]:
            case "message_start":
                self._message = event["message"]
            case "content_block_start":
                self._message["content"].append(event["content_block"])
                self._pieces = []
            case "content_block_delta":
                *_, piece = event["delta"].values()
                self._pieces.append(str(piece))
            case "content_block_stop":
                content = self._message["content"]
                content[-1] = _filled(content[-1], "".join(self._pieces))
            case "message_delta":
                self._message = {**self._message, **event["delta"], "usage": event["usage"]}

    def whole(self) -> Message:
        return self._message

    def _say(self, said: SaidEvent) -> list[Event]:
        match said:
            case TextDelta():
                begun = self._begin({"type": "text", "text": ""})
                return [*begun, self._more({"type": "text_delta", "text": said.text})]
            case ReasoningDelta():
                begun = self._begin({"type": "thinking", "thinking": "", "signature": ""})
                return [*begun, self._more({"type": "thinking_delta", "thinking": said.text})]
            case ToolCallBegin():
                shut = self._close()
                call: SaidToolUse = {"type": "tool_use", "id": said.id, "name": said.name, "input": {}}
                return [*shut, *self._begin(call)]
            case ToolCallArguments():
                return [self._more({"type": "input_json_delta", "partial_json": said.json_fragment})]
            case ToolCallEnd():
                return self._close()

    def _begin(self, block: SaidBlock) -> list[Event]:
        """Open `block`, unless a block of the same type is open."""
        if self._open == block["type"]:
            return []
        shut = self._close()
        self._open = block["type"]
        start: BlockStart = {
            "type": "content_block_start", "index": self._num_closed, "content_block": block,
        }  # fmt: skip
        return [*shut, start]

    def _more(self, delta: TextPiece | ThinkingPiece | InputPiece) -> BlockDelta:
        return {"type": "content_block_delta", "index": self._num_closed, "delta": delta}

    def _close(self) -> list[Event]:
        if self._open is None:
            return []
        stop: BlockStop = {"type": "content_block_stop", "index": self._num_closed}
        self._num_closed, self._open = self._num_closed + 1, None
        return [stop]

    def _usage(self) -> TokenUse:
        answers = self.answers
        cached = answers.num_cached_tokens
        return {
            "input_tokens": answers.num_prompt_tokens - cached, "output_tokens": answers.num_new_tokens,
            "cache_read_input_tokens": cached, "cache_creation_input_tokens": 0,
            "output_tokens_details": {"thinking_tokens": answers.num_reasoning_tokens},
        }  # fmt: skip


def _filled(block: SaidBlock, said: str) -> SaidBlock:
    """The block that results from joining all of its pieces."""
    match block["type"]:
        case "text":
            return {"type": "text", "text": said}
        case "thinking":
            return {"type": "thinking", "thinking": said, "signature": ""}
    return {"type": "tool_use", "id": block["id"], "name": block["name"], "input": _input(said)}


def _input(text: str) -> dict[str, Any]:
    """The arguments of a call; if the token limit cut it off, only the complete ones, as Anthropic's clients parse
    them.
    """
    try:
        value = json.loads(text or "{}")
    except ValueError:
        try:
            value = from_json(text, allow_partial=True)
        except ValueError:
            return {}
    return value if isinstance(value, dict) else {}


def _end(step: Ended) -> End:
    stopped_by = step.result.stopped_by
    if step.finish == "stop" and isinstance(stopped_by, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": stopped_by}
    reasons: dict[str, Literal["end_turn", "max_tokens", "tool_use", "refusal"]] = {
        "stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use", "content_filter": "refusal",
    }  # fmt: skip
    return {"stop_reason": reasons[step.finish], "stop_sequence": None}


ROUTES = (
    post_route(
        "/v1/messages", messages, Message, screens="answers", takes_media=True, events=Event | AnthropicError,
    ),
    post_route("/v1/messages/count_tokens", count_tokens, Counted, screens="nothing", takes_media=True),
)  # fmt: skip
