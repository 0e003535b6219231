"""`langchain-openai`: a chat model in a scripted conversation."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from langchain_core.messages import AIMessageChunk, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel, SecretStr

from tests.clients.conftest import Server

CALLS = [("get_weather", {"city": "Oslo"}), ("get_weather", {"city": "Rome", "days": 2})]


class Reply(BaseModel):
    """The reply."""

    answer: int


@tool
def get_weather(city: str, days: int = 1) -> str:
    """Weather of a city"""
    return "#sunny"


@pytest.fixture(params=[False, True], ids=["chat", "responses"])
def model(server: Server, request: pytest.FixtureRequest) -> ChatOpenAI:
    return ChatOpenAI(
        base_url=f"{server.url}/v1", api_key=SecretStr("none"), model="tiny", use_responses_api=request.param,
        stream_usage=True,
    )  # fmt: skip


def test_plain_and_streamed(model: ChatOpenAI) -> None:
    whole = model.invoke("#plain")
    assert whole.text == "It is well, thank you."
    assert whole.usage_metadata is not None
    chunks = list(model.stream("#plain"))
    assert len(chunks) > 5
    assert "".join(chunk.text for chunk in chunks) == whole.text
    together = sum(chunks[1:], chunks[0])
    assert together.usage_metadata is not None
    assert together.usage_metadata["output_tokens"] == whole.usage_metadata["output_tokens"]


def test_parallel_tool_calls_are_streamed_and_their_results_are_accepted(model: ChatOpenAI) -> None:
    calling = model.bind_tools([get_weather])
    chunks: list[Any] = list(calling.stream("#weather"))
    first: AIMessageChunk = sum(chunks[1:], chunks[0])
    assert [(call["name"], call["args"]) for call in first.tool_calls] == CALLS
    results = [
        ToolMessage(get_weather.invoke(call["args"]), tool_call_id=call["id"]) for call in first.tool_calls
    ]
    second = calling.invoke([HumanMessage("#weather"), first, *results])
    assert second.text == "It is sunny in both."


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_a_schema_is_parsed(model: ChatOpenAI, method: Any) -> None:
    said = "#json" if method == "json_schema" else "#reply"
    answer = model.with_structured_output(Reply, method=method).invoke(said, temperature=0)
    assert answer == Reply(answer=42)


def test_log_probabilities(server: Server) -> None:
    model = ChatOpenAI(
        base_url=f"{server.url}/v1", api_key=SecretStr("none"), model="tiny", logprobs=True, temperature=0
    )
    scored = model.invoke("#plain").response_metadata["logprobs"]["content"]
    assert "".join(one["token"] for one in scored[:-1]) == "It is well, thank you."


def test_leaving_a_stream_frees_the_engine(model: ChatOpenAI, server: Server) -> None:
    async def leave() -> None:
        async for at in _numbered(model.astream("#long")):
            if at == 5:
                break

    async def _numbered(stream: Any) -> Any:
        at = 0
        async for _ in stream:
            yield at
            at += 1

    before = server.num_new_tokens
    asyncio.run(leave())
    server.require_freed(before)


def test_embeddings_find_the_document_that_was_stored(server: Server) -> None:
    """By default it sends token ids of OpenAI's own tokenizer; texts are what another model needs."""
    with httpx.Client() as own:  # one of its making would stay open
        model = OpenAIEmbeddings(
            base_url=f"{server.url}/v1", api_key=SecretStr("none"), model="tiny", check_embedding_ctx_length=False,
            http_client=own,
        )  # fmt: skip
        texts = [
            "The quick brown fox jumps over the lazy dog.",
            "Pack my box.",
            "def add(a, b): return a + b",
        ]
        store = InMemoryVectorStore.from_texts(texts, model)
        retriever = store.as_retriever(search_kwargs={"k": 1})
        assert [retriever.invoke(text)[0].page_content for text in texts] == texts
        assert len(model.embed_query("a")) == len(model.embed_documents(["a", "b"])[1])
