"""The official `anthropic` client: Messages in a scripted conversation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from pydantic import BaseModel

from tests.clients.conftest import Server
from tests.serve.speaking import WEATHER

TOOLS: Any = [
    {"name": WEATHER["name"], "description": WEATHER["description"], "input_schema": WEATHER["parameters"]}
]
CALLS = [("get_weather", {"city": "Oslo"}), ("get_weather", {"city": "Rome", "days": 2})]


@pytest.fixture
def client(server: Server) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="none") as client:
        yield client


def said(text: str) -> Any:
    return [{"role": "user", "content": text}]


def test_plain_and_streamed(client: anthropic.Anthropic) -> None:
    whole: Any = client.messages.create(model="tiny", max_tokens=100, messages=said("#think"))
    assert [block.type for block in whole.content] == ["thinking", "text"]
    assert whole.content[1].text == "It is well."
    assert whole.usage.output_tokens_details.thinking_tokens
    with client.messages.stream(model="tiny", max_tokens=100, messages=said("#think")) as stream:
        assert "".join(stream.text_stream) == "It is well."
        final: Any = stream.get_final_message()
    assert final.content[0].thinking == "Let me see."
    assert final.stop_reason == "end_turn"
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_parallel_tool_calls_are_streamed_and_their_results_are_accepted(client: anthropic.Anthropic) -> None:
    more: Any = {"model": "tiny", "max_tokens": 300, "tools": TOOLS}
    with client.messages.stream(messages=said("#weather"), **more) as stream:
        blocks = [event.content_block for event in stream if event.type == "content_block_stop"]
        final: Any = stream.get_final_message()
    assert [block.type for block in blocks] == ["text", "tool_use", "tool_use"]
    assert [(block.name, block.input) for block in final.content[1:]] == CALLS
    assert final.stop_reason == "tool_use"
    results = [
        {"type": "tool_result", "tool_use_id": block.id, "content": "#sunny"} for block in final.content[1:]
    ]
    earlier = {"role": "assistant", "content": [block.to_dict() for block in final.content]}
    second: Any = client.messages.create(
        messages=[*said("#weather"), earlier, {"role": "user", "content": results}], **more
    )
    assert second.content[0].text == "It is sunny in both."


def test_there_is_one_call_when_parallel_calls_are_disabled(client: anthropic.Anthropic) -> None:
    one: Any = {"type": "any", "disable_parallel_tool_use": True}
    answer: Any = client.messages.create(
        model="tiny", max_tokens=300, tools=TOOLS, tool_choice=one, messages=said("#thoughtful")
    )
    assert [(block.name, block.input) for block in answer.content if block.type == "tool_use"] == CALLS[:1]


def test_a_schema_is_parsed(client: anthropic.Anthropic) -> None:
    class Reply(BaseModel):
        answer: int

    parsed = client.messages.parse(model="tiny", max_tokens=200, messages=said("#json"), output_format=Reply)
    assert parsed.parsed_output == Reply(answer=42)


def test_tokens_are_counted(client: anthropic.Anthropic) -> None:
    usage = client.messages.create(model="tiny", max_tokens=9, messages=said("#plain")).usage
    counted = client.messages.count_tokens(model="tiny", messages=said("#plain"))
    assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)


def test_leaving_a_stream_frees_the_engine(client: anthropic.Anthropic, server: Server) -> None:
    before = server.num_new_tokens
    with client.messages.create(model="tiny", max_tokens=1500, messages=said("#long"), stream=True) as stream:
        for _ in range(6):
            next(stream)
    server.require_freed(before)


def test_a_final_assistant_turn_is_continued(client: anthropic.Anthropic) -> None:
    begun: Any = [*said("#plain"), {"role": "assistant", "content": "Well: it"}]
    whole: Any = client.messages.create(model="tiny", max_tokens=100, messages=begun)
    assert [block.text for block in whole.content] == ["It is well, thank you."]
    spaced: Any = [*said("#plain"), {"role": "assistant", "content": "Well: "}]
    with pytest.raises(anthropic.BadRequestError, match="trailing whitespace"):
        client.messages.create(model="tiny", max_tokens=100, messages=spaced)


def test_interleaved_blocks_are_equal_whole_and_streamed(client: anthropic.Anthropic) -> None:
    more: Any = {"model": "tiny", "max_tokens": 100, "messages": said("#interleaved")}
    whole: Any = client.messages.create(**more)
    with client.messages.stream(**more) as stream:
        final: Any = stream.get_final_message()
    assert [block.type for block in whole.content] == ["text", "thinking", "text", "thinking", "text"]
    assert [block.to_dict() for block in final.content] == [block.to_dict() for block in whole.content]


def test_a_truncated_call_is_equal_whole_and_streamed(client: anthropic.Anthropic) -> None:
    more: Any = {"model": "tiny", "max_tokens": 125, "messages": said("#thoughtful"), "tools": TOOLS}
    whole: Any = client.messages.create(**more)
    with client.messages.stream(**more) as stream:
        final: Any = stream.get_final_message()
    for message in (whole, final):
        assert [block.type for block in message.content] == ["thinking", "tool_use", "tool_use"]
        assert message.stop_reason == "max_tokens"
    assert [block.input for block in whole.content[1:]] == [block.input for block in final.content[1:]]
    used = [block.to_dict() for block in whole.content[1:]]
    results = [{"type": "tool_result", "tool_use_id": block["id"], "content": "#sunny"} for block in used]
    history: Any = [
        *said("#weather"),
        {"role": "assistant", "content": used},
        {"role": "user", "content": results},
    ]
    second: Any = client.messages.create(**more | {"messages": history})
    assert second.content[0].text == "It is sunny in both."


def test_an_image_read_by_a_tool_does_not_end_the_session(client: anthropic.Anthropic) -> None:
    source = {"type": "base64", "media_type": "image/png", "data": "aGVsbG8="}
    used = {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"city": "Oslo"}}
    found = [{"type": "text", "text": "#sunny"}, {"type": "image", "source": source}]
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": found}
    history: Any = [
        *said("Look."),
        {"role": "assistant", "content": [used]},
        {"role": "user", "content": [result]},
    ]
    more: Any = {"model": "tiny", "max_tokens": 100, "tools": TOOLS}
    raw: Any = client.messages.with_raw_response.create(messages=history, **more)
    assert raw.headers["x-replaced-blocks"] == "1 image"
    assert raw.parse().content[0].text == "It is sunny in both."
    asked: Any = [{"role": "user", "content": [{"type": "image", "source": source}]}]
    with pytest.raises(anthropic.BadRequestError, match="reads text only"):
        client.messages.create(messages=asked, **more)
