"""Two tool calls in one answer, streamed in each dialect without the mistakes that broke clients of other servers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from types import SimpleNamespace
from typing import Any

from pydantic import TypeAdapter

from argosy.config import SamplingDefaults
from argosy.engine.ledger import Ledger
from argosy.engine.sequence import Result
from argosy.prompt.formats.events import Event as SaidEvent
from argosy.prompt.formats.events import (
    ReasoningDelta,
    TextDelta,
    ToolCallArguments,
    ToolCallBegin,
    ToolCallEnd,
)
from argosy.serve.answer.answers import Ended, Said, Step
from argosy.serve.answer.kept_items import KeptItems
from argosy.serve.answer.respond import Exchange, folded, streamed
from argosy.serve.dialects.anthropic_messages import Event as MessagesEvent
from argosy.serve.dialects.anthropic_messages import Message, MessagesExchange
from argosy.serve.dialects.anthropic_messages_bodies import MessagesBody
from argosy.serve.dialects.openai_chat import ChatChunk, ChatCompletion, ChatExchange
from argosy.serve.dialects.openai_chat_bodies import ChatBody
from argosy.serve.dialects.openai_responses import Answer, ResponsesExchange
from argosy.serve.dialects.openai_responses import Event as ResponsesEvent
from argosy.serve.dialects.openai_responses_bodies import ResponsesBody
from argosy.serve.http.caller import Caller

EVENTS = (
    ReasoningDelta("Hm."),
    TextDelta("Let me look."),
    *(
        ToolCallBegin(0, "call_a", "look"),
        ToolCallArguments(0, '{"at":'),
        ToolCallArguments(0, "1}"),
        ToolCallEnd(0),
    ),
    *(ToolCallBegin(1, "call_b", "look"), ToolCallArguments(1, '{"at":2}'), ToolCallEnd(1)),
)
RESULT = Result("", [1, 2], "stop", None, {}, 0, Ledger())
MESSAGES = MessagesBody.model_validate({"messages": [{"role": "user", "content": ""}], "max_tokens": 9})
SERVICE: Any = SimpleNamespace(
    model=SimpleNamespace(id="m", sampling=SamplingDefaults()), tokenizer=None, kept=KeptItems()
)


class FakeAnswers:
    """Answers made of `events`."""

    num_prompt_tokens, num_new_tokens, num_cached_tokens, num_reasoning_tokens = 5, 2, 3, 1
    results = (RESULT,)

    def __init__(self, events: Sequence[SaidEvent]) -> None:
        self._events = events

    def cancel(self) -> None: ...

    def prompt_tokens(self) -> dict[str, int]:
        return {"cached_tokens": self.num_cached_tokens}

    async def steps(self) -> AsyncGenerator[Step, None]:
        for event in self._events:
            yield Said(0, (event,), "", None)
        yield Ended(0, "tool_calls", RESULT)


def exchange(kind: Any, body: Any, events: Sequence[SaidEvent] = EVENTS) -> Exchange[Any, Any]:
    made: Exchange[Any, Any] = kind(body, SERVICE, Caller())
    made.answers = FakeAnswers(events)  # type: ignore[assignment]
    return made


def sent(exchange: Exchange[Any, Any], kind: Any) -> list[dict[str, Any]]:
    """The events of a stream, each checked against its documented type."""
    documented = TypeAdapter[Any](kind)

    async def read() -> list[bytes]:
        return [part async for part in streamed(exchange)]

    texts = [part.decode().partition("data: ")[2].strip() for part in asyncio.run(read())]
    events = [json.loads(text) for text in texts if text != "[DONE]"]
    for event in events:
        documented.validate_python(event, strict=True)
    return events


def whole(exchange: Exchange[Any, Any], kind: Any) -> dict[str, Any]:
    """The whole answer, checked against its documented type."""
    made: dict[str, Any] = json.loads(json.dumps(asyncio.run(folded(exchange))))
    TypeAdapter[Any](kind).validate_python(made, strict=True)
    return made


def test_chat_sends_id_and_name_before_arguments_and_keeps_the_index() -> None:
    body = ChatBody.model_validate({"messages": [{"role": "user", "content": ""}]})
    events = sent(exchange(ChatExchange, body), ChatChunk)
    calls = [call for event in events for call in event["choices"][0]["delta"].get("tool_calls", ())]
    assert [(call["index"], call.get("id"), call["function"]["arguments"]) for call in calls] == [
        (0, "call_a", ""), (0, None, '{"at":'), (0, None, "1}"), (1, "call_b", ""), (1, None, '{"at":2}'),
    ]  # fmt: skip
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_messages_sends_one_block_for_each_call_and_drops_no_argument() -> None:
    events = sent(exchange(MessagesExchange, MESSAGES), MessagesEvent)
    starts = [event["content_block"]["type"] for event in events if event["type"] == "content_block_start"]
    assert starts == ["thinking", "text", "tool_use", "tool_use"]
    assert [e["index"] for e in events if e["type"] == "content_block_stop"] == [0, 1, 2, 3]
    deltas = [
        (e["index"], e["delta"]["partial_json"]) for e in events if "partial_json" in e.get("delta", {})
    ]
    assert deltas == [(2, '{"at":'), (2, "1}"), (3, '{"at":2}')]
    assert events[-2]["delta"]["stop_reason"] == "tool_use"


def test_responses_sends_arguments_both_as_deltas_and_whole() -> None:
    body = ResponsesBody.model_validate({"input": "x"})
    events = sent(exchange(ResponsesExchange, body), ResponsesEvent)
    done = [e["arguments"] for e in events if e["type"] == "response.function_call_arguments.done"]
    assert done == ['{"at":1}', '{"at":2}']
    assert sum(e["type"] == "response.function_call_arguments.delta" for e in events) == 3
    assert [item["type"] for item in events[-1]["response"]["output"]] == [
        "reasoning", "message", "function_call", "function_call",
    ]  # fmt: skip
    assert [e["sequence_number"] for e in events] == list(range(len(events)))


INTERLEAVED = (
    TextDelta("First. "),
    TextDelta("I look."),
    *(ToolCallBegin(0, "call_a", "look"), ToolCallArguments(0, '{"at":1}'), ToolCallEnd(0)),
    ReasoningDelta("Hm."),
    TextDelta("Then this."),
    *(ToolCallBegin(1, "call_b", "look"), ToolCallArguments(1, "{}"), ToolCallEnd(1)),
    TextDelta("Last."),
)


def test_a_whole_message_keeps_the_order_of_text_thoughts_and_calls() -> None:
    made = whole(exchange(MessagesExchange, MESSAGES, INTERLEAVED), Message)
    assert made["content"] == [
        {"type": "text", "text": "First. I look."},
        {"type": "tool_use", "id": "call_a", "name": "look", "input": {"at": 1}},
        {"type": "thinking", "thinking": "Hm.", "signature": ""},
        {"type": "text", "text": "Then this."},
        {"type": "tool_use", "id": "call_b", "name": "look", "input": {}},
        {"type": "text", "text": "Last."},
    ]
    assert made["stop_reason"] == "tool_use"


def test_a_whole_response_is_the_response_of_the_last_event() -> None:
    body = ResponsesBody.model_validate({"input": "x"})
    made = exchange(ResponsesExchange, body, INTERLEAVED)
    response = whole(made, Answer)
    assert [item["type"] for item in response["output"]] == [
        "message", "function_call", "reasoning", "message", "function_call", "message",
    ]  # fmt: skip
    assert [item["status"] for item in response["output"]] == ["completed"] * 6
    assert response["usage"]["total_tokens"] == 7


def test_a_whole_chat_completion_joins_the_deltas_of_each_call() -> None:
    body = ChatBody.model_validate({"messages": [{"role": "user", "content": ""}]})
    (choice,) = whole(exchange(ChatExchange, body), ChatCompletion)["choices"]
    assert choice == {
        "index": 0,
        "message": {
            "role": "assistant",
            "content": "Let me look.",
            "refusal": None,
            "reasoning_content": "Hm.",
            "tool_calls": [
                {"id": "call_a", "type": "function", "function": {"name": "look", "arguments": '{"at":1}'}},
                {"id": "call_b", "type": "function", "function": {"name": "look", "arguments": '{"at":2}'}},
            ],
        },
        "finish_reason": "tool_calls",
        "logprobs": None,
    }
