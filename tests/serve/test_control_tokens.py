"""No text from a client becomes a control token, in any dialect and anywhere in a request."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from argosy.errors import UsageError
from argosy.guard.keys import KeyRing
from argosy.prompt.prompt import Prompt
from argosy.serve.answer.facts import ModelFacts
from argosy.serve.answer.service import Common, Service
from argosy.serve.app import make_app
from tests.prompt.families import FAMILIES
from tests.serve.conftest import only


class Listener:
    """An engine loop that records the last prompt and runs nothing; `loop` provides its snapshot."""

    prompt: Prompt

    def __init__(self, loop: Any) -> None:
        self.snapshot = loop.snapshot

    def submit(self, prompt: Prompt, *_: object, **__: object) -> None:
        self.prompt = prompt
        raise UsageError("heard")


def schema(said: str) -> dict[str, Any]:
    return {
        "type": "object", "description": said,
        "properties": {said: {"type": "string", "description": said, "enum": [said], "default": said}},
    }  # fmt: skip


def chat(said: str) -> dict[str, Any]:
    function = {"name": "f", "arguments": {said: [said]}}
    return {
        "model": said, "user": said, "stop": [said],
        "messages": [
            {"role": "system", "content": said},
            {"role": "user", "content": [{"type": "text", "text": said}, {"type": "text", "text": said}]},
            {
                "role": "assistant", "content": said, "reasoning_content": said,
                "tool_calls": [{"id": "call_1", "type": "function", "function": function}],
            },
            {"role": "tool", "tool_call_id": "call_1", "content": said},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "description": said, "parameters": schema(said)}}],
    }  # fmt: skip


def responses(said: str) -> dict[str, Any]:
    return {
        "model": said, "instructions": said, "metadata": {"a": said},
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": said}]},
            {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": said}]},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": said}]},
            {"type": "function_call", "call_id": "call_1", "name": "f", "arguments": '{"a": 1}'},
            {"type": "function_call_output", "call_id": "call_1", "output": said},
        ],
        "tools": [{"type": "function", "name": "f", "description": said, "parameters": schema(said)}],
    }  # fmt: skip


def messages(said: str) -> dict[str, Any]:
    return {
        "model": said, "max_tokens": 1, "system": [{"type": "text", "text": said}], "stop_sequences": [said],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": said}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": said, "signature": said},
                    {"type": "text", "text": said},
                    {"type": "tool_use", "id": "call_1", "name": "f", "input": {said: said}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "call_1", "content": [{"type": "text", "text": said}]}
                ],
            },
        ],
        "tools": [{"name": "f", "description": said, "input_schema": schema(said)}],
    }  # fmt: skip


CONVERSATIONS: dict[str, Callable[[str], dict[str, Any]]] = {
    "/v1/chat/completions": chat, "/v1/responses": responses, "/v1/messages": messages,
}  # fmt: skip
PLACEHOLDERS = (
    "<|image_pad|>",
    "<|vision_start|>",
    "<image>",
    "[IMG]",
    "<|media_pad|>",
    "<|audio_start|>",
    "<unk>",
)


@pytest.fixture(scope="module", params=["qwen3", "deepseek_v31", "harmony", "glm", "kimi_k2"])
def family(request: pytest.FixtureRequest) -> Any:
    return FAMILIES[request.param]


def heard(family: Any, service: Service, path: str, bodies: list[dict[str, Any]]) -> list[Counter[int]]:
    """The control tokens in the prompt of each request."""
    builder, loop = family.shared_builder, Listener(service.loop)
    model = ModelFacts(
        id="m", family="f", context_tokens=1 << 20, num_layers=1, num_experts=1, experts_per_token=1,
        vocab_size=family.tokenizer.vocab_size,
    )  # fmt: skip
    app = make_app(
        only(Service(loop, builder, family.tokenizer, model, Common(any_model=True))),
        KeyRing(None), block_tokens=16, max_sequences=8,
    )  # fmt: skip

    async def ask() -> list[Counter[int]]:
        found = []
        transport = httpx.ASGITransport(app)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            for body in bodies:
                answer = await client.post(path, json=body)
                assert answer.json()["error"]["message"] == "heard", answer.text
                ids = loop.prompt.token_ids or ()
                found.append(Counter(id for id in ids if id in family.tokenizer.control_ids))
        return found

    return asyncio.run(ask())


@pytest.mark.parametrize("path", CONVERSATIONS)
def test_a_marker_anywhere_in_a_conversation_is_not_a_control_token(
    family: Any, service: Service, path: str
) -> None:
    make = CONVERSATIONS[path]
    said = [*family.marks, *(f"{mark}\n{mark}" for mark in family.marks[:3]), *PLACEHOLDERS]
    plain, *found = heard(family, service, path, [make("x"), *(make(text) for text in said)])
    assert plain
    assert [text for text, ids in zip(said, found, strict=True) if ids != plain] == []


def test_a_marker_in_text_to_be_continued_is_not_a_control_token(family: Any, service: Service) -> None:
    said = [*family.marks, *PLACEHOLDERS]
    plain, *found = heard(family, service, "/v1/completions", [{"prompt": text} for text in ("x", *said)])
    assert [text for text, ids in zip(said, found, strict=True) if ids != plain] == []


@pytest.mark.parametrize("path", CONVERSATIONS)
@pytest.mark.parametrize("name", ["<|im_end|>", "f\n", "f<think>", "", "f" * 129, "é", 'f"'])
def test_a_tool_name_with_a_character_of_a_marker_is_refused(
    client: httpx.Client, path: str, name: str
) -> None:
    body = CONVERSATIONS[path]("x")
    tool = body["tools"][0]
    tool.get("function", tool)["name"] = name
    answer = client.post(path, json=body)
    assert answer.status_code == 400
    assert "tools.0" in answer.json()["error"]["message"]
