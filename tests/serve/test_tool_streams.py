"""Two tool calls in one answer, as each dialect streams them: the mistakes that broke clients elsewhere."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

from pydantic import TypeAdapter

from argosy.engine.ledger import Ledger
from argosy.engine.sequence import Result
from argosy.prompt.formats.events import (
    ReasoningDelta,
    TextDelta,
    ToolCallArguments,
    ToolCallBegin,
    ToolCallEnd,
    collect,
)
from argosy.serve.anthropic_messages import Event as MessagesEvent
from argosy.serve.anthropic_messages import _Messages
from argosy.serve.core import Ended, Said
from argosy.serve.kept_items import KeptItems
from argosy.serve.openai_chat import ChatBody, ChatChunk, _Chat
from argosy.serve.openai_responses import Event as ResponsesEvent
from argosy.serve.openai_responses import ResponsesBody, _Responses

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
SERVICE: Any = SimpleNamespace(model=SimpleNamespace(id="m"), tokenizer=None, kept=KeptItems())


class FakeAnswers:
    """An answer of EVENTS."""

    num_prompt_tokens, num_new_tokens, num_cached_tokens, num_reasoning_tokens = 5, 2, 3, 1
    results = (RESULT,)

    async def __aenter__(self) -> FakeAnswers:
        return self

    async def __aexit__(self, *_: object) -> None: ...

    def said(self, _: int) -> object:
        return collect(EVENTS)

    async def steps(self) -> AsyncIterator[object]:
        for event in EVENTS:
            yield Said(0, (event,), "", None)
        yield Ended(0, "tool_calls", RESULT)


def sent(stream: AsyncIterator[bytes], kind: Any) -> list[dict[str, Any]]:
    documented = TypeAdapter[Any](kind)

    async def read() -> list[bytes]:
        return [part async for part in stream]

    texts = [part.decode().partition("data: ")[2].strip() for part in asyncio.run(read())]
    events = [json.loads(text) for text in texts if text != "[DONE]"]
    for event in events:
        documented.validate_python(event, strict=True)
    return events


def test_chat_sends_id_and_name_before_arguments_and_keeps_the_index() -> None:
    body = ChatBody.model_validate({"messages": [{"role": "user", "content": ""}]})
    events = sent(_Chat(SERVICE, body, FakeAnswers()).stream(), ChatChunk)  # type: ignore[arg-type]
    calls = [call for event in events for call in event["choices"][0]["delta"].get("tool_calls", ())]
    assert [(call["index"], call.get("id"), call["function"]["arguments"]) for call in calls] == [
        (0, "call_a", ""), (0, None, '{"at":'), (0, None, "1}"), (1, "call_b", ""), (1, None, '{"at":2}'),
    ]  # fmt: skip
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_messages_has_one_block_for_each_call_and_drops_no_argument() -> None:
    events = sent(_Messages(SERVICE, FakeAnswers()).stream(), MessagesEvent)  # type: ignore[arg-type]
    starts = [event["content_block"]["type"] for event in events if event["type"] == "content_block_start"]
    assert starts == ["thinking", "text", "tool_use", "tool_use"]
    assert [e["index"] for e in events if e["type"] == "content_block_stop"] == [0, 1, 2, 3]
    deltas = [
        (e["index"], e["delta"]["partial_json"]) for e in events if "partial_json" in e.get("delta", {})
    ]
    assert deltas == [(2, '{"at":'), (2, "1}"), (3, '{"at":2}')]
    assert events[-2]["delta"]["stop_reason"] == "tool_use"


def test_responses_sends_both_the_deltas_and_the_whole_of_arguments() -> None:
    body = ResponsesBody.model_validate({"input": "x"})
    events = sent(_Responses(SERVICE, body, "a").stream(FakeAnswers()), ResponsesEvent)  # type: ignore[arg-type]
    done = [e["arguments"] for e in events if e["type"] == "response.function_call_arguments.done"]
    assert done == ['{"at":1}', '{"at":2}']
    assert sum(e["type"] == "response.function_call_arguments.delta" for e in events) == 3
    assert [item["type"] for item in events[-1]["response"]["output"]] == [
        "reasoning", "message", "function_call", "function_call",
    ]  # fmt: skip
    assert [e["sequence_number"] for e in events] == list(range(len(events)))
