"""The official `openai` client: Chat Completions, Responses and Completions in a scripted conversation."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from tests.clients.conftest import Server
from tests.serve.speaking import WEATHER

TOOLS: Any = [{"type": "function", "function": WEATHER}]
CALLS = [("get_weather", {"city": "Oslo"}), ("get_weather", {"city": "Rome", "days": 2})]


class Reply(BaseModel):
    answer: int


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        yield client


def said(text: str) -> Any:
    return [{"role": "user", "content": text}]


def test_chat_plain_and_streamed(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="tiny", messages=said("#think"))
    assert whole.choices[0].message.content == "It is well."
    assert whole.usage is not None
    assert whole.usage.completion_tokens_details is not None
    assert whole.usage.completion_tokens_details.reasoning_tokens
    with client.chat.completions.create(
        model="tiny", messages=said("#think"), stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "It is well."
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_a_preset_is_a_model_of_its_own_name(client: openai.OpenAI, server: Server) -> None:
    with server.preset("brief", 'system = "#plain"\ntemperature = 0\n'):
        listed = {one.id: (one.model_extra or {}).get("parent") for one in client.models.list()}
        assert listed == {"tiny": None, "brief": "tiny"}
        assert client.models.retrieve("brief").id == "brief"
        chat = client.chat.completions.create(model="brief", messages=said("Hi"))
        assert (chat.model, chat.choices[0].message.content) == ("brief", "It is well, thank you.")
        response = client.responses.create(model="brief", input="Hi")
        assert (response.model, response.output_text) == ("brief", "It is well, thank you.")
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="brief", messages=said("Hi"))


def test_chat_streams_parallel_tool_calls_and_continues_with_their_results(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="tiny", messages=said("#weather"), tools=TOOLS) as stream:
        done = [e for e in stream if e.type == "tool_calls.function.arguments.done"]
        message = stream.get_final_completion().choices[0].message
    assert [(event.name, json.loads(event.arguments)) for event in done] == CALLS
    assert message.content == "Let me look."
    calls: Any = message.tool_calls
    assert [(call.function.name, json.loads(call.function.arguments)) for call in calls] == CALLS
    results = [{"role": "tool", "tool_call_id": call.id, "content": "#sunny"} for call in calls]
    back: Any = [*said("#weather"), message, *results]  # as the client's documentation shows it
    second = client.chat.completions.create(model="tiny", messages=back, tools=TOOLS)
    assert second.choices[0].message.content == "It is sunny in both."


def test_chat_accepts_its_own_message_back_with_its_thoughts(client: openai.OpenAI) -> None:
    first = (
        client.chat.completions.create(model="tiny", messages=said("#thoughtful"), tools=TOOLS)
        .choices[0]
        .message
    )
    assert first.model_extra == {"reasoning_content": "Two cities."}
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": "#sunny"} for call in first.tool_calls or ()
    ]
    back: Any = [*said("#thoughtful"), first, *results]
    second = client.chat.completions.create(model="tiny", messages=back, tools=TOOLS)
    assert second.choices[0].message.content == "It is sunny in both."


def test_chat_parses_a_schema_and_returns_log_probabilities(client: openai.OpenAI) -> None:
    parsed = client.chat.completions.parse(model="tiny", messages=said("#json"), response_format=Reply)
    assert parsed.choices[0].message.parsed == Reply(answer=42)
    scored = client.chat.completions.create(
        model="tiny", messages=said("#quote"), logprobs=True, top_logprobs=2, temperature=0
    ).choices[0]
    assert scored.logprobs is not None
    assert all(len(one.top_logprobs) == 2 and one.logprob < 0 for one in scored.logprobs.content or ())
    assert scored.message.content == 'He said "é🙂" and left.'


def test_responses_stream_parallel_tool_calls_and_accept_their_results(client: openai.OpenAI) -> None:
    tools: Any = [{"type": "function", "strict": False, **WEATHER}]
    with client.responses.stream(model="tiny", input="#thoughtful", tools=tools) as stream:
        kinds = [event.type for event in stream]
        first = stream.get_final_response()
    assert kinds.count("response.function_call_arguments.done") == 2
    assert [item.type for item in first.output] == ["reasoning", "function_call", "function_call"]
    calls: Any = first.output[1:]
    assert [(item.name, json.loads(item.arguments)) for item in calls] == CALLS
    results = [
        {"type": "function_call_output", "call_id": item.call_id, "output": "#sunny"} for item in calls
    ]
    back: Any = [*said("#thoughtful"), *first.output, *results]
    assert (
        client.responses.create(model="tiny", input=back, tools=tools).output_text == "It is sunny in both."
    )


def test_responses_parse_a_schema_and_return_log_probabilities(client: openai.OpenAI) -> None:
    parsed = client.responses.parse(model="tiny", input="#json", text_format=Reply)
    assert parsed.output_parsed == Reply(answer=42)
    scored: Any = client.responses.create(
        model="tiny", input="#plain", include=["message.output_text.logprobs"], top_logprobs=1, temperature=0
    )
    assert "".join(one.token for one in scored.output[0].content[0].logprobs) == scored.output_text


def test_completions_echo_and_score(client: openai.OpenAI) -> None:
    scored = client.completions.create(model="tiny", prompt="a b c", echo=True, logprobs=1, max_tokens=0)
    assert scored.choices[0].text == "a b c"
    assert scored.choices[0].logprobs is not None
    assert (scored.choices[0].logprobs.token_logprobs or [0])[0] is None


@pytest.mark.parametrize("dialect", ["chat", "responses", "completions"])
def test_leaving_a_stream_frees_the_engine(client: openai.OpenAI, server: Server, dialect: str) -> None:
    before = server.num_new_tokens
    stream: Any
    if dialect == "chat":
        stream = client.chat.completions.create(model="tiny", messages=said("#long"), stream=True)
    elif dialect == "responses":
        stream = client.responses.create(model="tiny", input="#long", stream=True)
    else:
        stream = client.completions.create(model="tiny", prompt="#long", stream=True, max_tokens=1000)
    for _ in range(6):
        next(stream)
    stream.close()
    server.require_freed(before)


def test_cancelling_a_whole_answer_frees_the_engine(server: Server) -> None:
    async def give_up() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            asking = asyncio.create_task(client.chat.completions.create(model="tiny", messages=said("#long")))
            while server.is_idle:
                await asyncio.sleep(0.002)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    before = server.num_new_tokens
    asyncio.run(give_up())
    server.require_freed(before)


def test_chat_returns_a_truncated_call_and_accepts_it_back(client: openai.OpenAI) -> None:
    more: Any = {"model": "tiny", "tools": TOOLS, "max_tokens": 125}
    whole = client.chat.completions.create(messages=said("#thoughtful"), **more).choices[0]
    assert whole.finish_reason == "length"
    assert not whole.message.content
    first, cut = (call.function.arguments for call in whole.message.tool_calls or ())  # type: ignore[union-attr]
    assert json.loads(first) == CALLS[0][1]
    assert cut.startswith('{"city": "Rome"')
    with pytest.raises(json.JSONDecodeError):
        json.loads(cut)
    message = whole.message.to_dict()
    calls: Any = message["tool_calls"]
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "#sunny"} for call in calls]
    again = client.chat.completions.create(messages=[*said("#weather"), message, *results], **more)  # type: ignore[list-item]
    assert again.choices[0].message.content == "It is sunny in both."


def test_embeddings_in_both_encodings(client: openai.OpenAI) -> None:
    """The client asks for base64 unless it is told otherwise, and decodes it."""
    texts = ["How are you?", "I am well."]
    decoded = client.embeddings.create(model="tiny", input=texts)
    assert [one.index for one in decoded.data] == [0, 1]
    assert decoded.usage.prompt_tokens == decoded.usage.total_tokens > 0
    numbers = client.embeddings.create(model="tiny", input=texts, encoding_format="float")
    for one, other in zip(decoded.data, numbers.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding, rel=1e-6)
        assert sum(value * value for value in one.embedding) == pytest.approx(1, abs=1e-5)
    short = client.embeddings.create(model="tiny", input=texts[0], dimensions=4)
    assert len(short.data[0].embedding) == 4
    with pytest.raises(openai.BadRequestError, match="dimensions must be from 1 to"):
        client.embeddings.create(model="tiny", input="a", dimensions=4096)


def test_a_response_is_retrieved_listed_and_deleted(client: openai.OpenAI) -> None:
    made = client.responses.create(model="tiny", input="#plain", store=True)
    found = client.responses.retrieve(made.id)
    assert found.output_text == made.output_text == "It is well, thank you."
    items = list(client.responses.input_items.list(made.id))
    assert [item.content[0].text for item in items] == ["#plain"]  # type: ignore[union-attr]
    client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)


def test_completions_refuse_a_suffix_by_name_if_the_model_cannot_fill_in(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="cannot fill in a text"):
        client.completions.create(model="tiny", prompt="a", suffix="b")
