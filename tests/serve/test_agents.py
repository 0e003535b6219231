"""Agents need three things from a server: continued turns, tools for every model, and a list of its capabilities."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.serve.dialects import MAX_TOKENS, PATHS, TOOLS

ASKED = {"role": "user", "content": "#plain"}
BEGUN = {"role": "assistant", "content": "Well: it"}
SAID = "It is well, thank you."


def said_by(answer: httpx.Response, dialect: str) -> str:
    assert answer.status_code == 200, answer.text
    if dialect == "chat":
        return str(answer.json()["choices"][0]["message"]["content"])
    return "".join(block["text"] for block in answer.json()["content"])


@pytest.mark.parametrize("dialect", ["chat", "messages"])
def test_a_final_assistant_turn_is_continued_and_not_repeated(speaker: httpx.Client, dialect: str) -> None:
    body = {"messages": [ASKED, BEGUN], "max_tokens": 40, "temperature": 0}
    assert said_by(speaker.post(PATHS[dialect], json=body), dialect) == SAID
    events = speaker.post(PATHS[dialect], json=body | {"stream": True}).text
    assert BEGUN["content"] not in events
    whole = {"role": "assistant", "content": BEGUN["content"] + SAID}
    later = speaker.post(PATHS[dialect], json=body | {"messages": [ASKED, whole, ASKED]})
    assert said_by(later, dialect) == SAID


def test_a_turn_is_continued_after_its_thoughts(speaker: httpx.Client) -> None:
    thought = BEGUN | {"reasoning_content": "Hm."}
    prompt = speaker.post("/apply-template", json={"messages": [ASKED, thought]}).json()["prompt"]
    assert prompt.endswith("<|im_start|>assistant\n<think>\nHm.\n</think>\n\nWell: it")
    answer = speaker.post(
        PATHS["chat"], json={"messages": [ASKED, thought], "max_tokens": 40, "temperature": 0}
    )
    assert said_by(answer, "chat") == SAID
    assert "reasoning_content" not in answer.json()["choices"][0]["message"]


def test_tokens_of_a_continued_turn_are_counted(speaker: httpx.Client) -> None:
    def count(*messages: dict[str, Any]) -> int:
        answer = speaker.post("/v1/messages/count_tokens", json={"messages": messages})
        return int(answer.json()["input_tokens"])

    assert count(ASKED, BEGUN) > count(ASKED)
    assert count(ASKED, {"role": "assistant", "content": ""}) == count(ASKED)


def test_trailing_whitespace_is_refused_as_by_anthropic_and_accepted_as_by_llama_cpp(
    speaker: httpx.Client,
) -> None:
    for content in ("Well: ", [{"type": "text", "text": "Well:"}, {"type": "text", "text": "\n"}]):
        body = {
            "messages": [ASKED, {"role": "assistant", "content": content}],
            "max_tokens": 40,
            "temperature": 0,
        }
        refused = speaker.post("/v1/messages", json=body)
        assert refused.status_code == 400
        assert "final assistant content cannot end with trailing whitespace" in refused.text
        assert said_by(speaker.post(PATHS["chat"], json=body), "chat") == SAID


@pytest.mark.parametrize(
    ("dialect", "more", "word"),
    [
        ("chat", {"response_format": {"type": "json_object"}}, "continues the assistant's last message"),
        (
            "chat",
            {"tools": TOOLS["chat"], "tool_choice": "required"},
            "continues the assistant's last message",
        ),
        ("chat", {"continue_final_message": False}, "continue_final_message"),
        (
            "messages",
            {"tools": TOOLS["messages"], "tool_choice": {"type": "any"}},
            "continues the assistant's last message",
        ),
    ],
)
def test_an_option_that_contradicts_a_continued_turn_is_refused_by_name(
    speaker: httpx.Client, dialect: str, more: dict[str, Any], word: str
) -> None:
    body = {"messages": [ASKED, BEGUN], "max_tokens": 40} | more
    answer = speaker.post(PATHS[dialect], json=body)
    assert answer.status_code == 400
    assert word in answer.json()["error"]["message"]


@pytest.mark.parametrize("name", ["continue_final_message", "add_generation_prompt"])
def test_vllms_flags_about_the_last_turn_must_match_it(speaker: httpx.Client, name: str) -> None:
    continuing = name == "continue_final_message"
    for messages, value, status in (
        ([ASKED, BEGUN], continuing, 200), ([ASKED], not continuing, 200), ([ASKED], continuing, 400),
    ):  # fmt: skip
        body = {"messages": messages, "max_tokens": 4, name: value}
        assert speaker.post(PATHS["chat"], json=body).status_code == status, (messages, value)


def test_the_responses_api_continues_no_turn(speaker: httpx.Client) -> None:
    refused = speaker.post("/v1/responses", json={"input": [ASKED, BEGUN]})
    assert refused.status_code == 400
    assert "nothing to answer" in refused.text


# Tools


@pytest.mark.parametrize("dialect", ["chat", "responses", "messages"])
def test_a_model_accepts_tools_even_if_its_template_has_none(client: httpx.Client, dialect: str) -> None:
    given: dict[str, Any] = {"tools": TOOLS[dialect], MAX_TOKENS[dialect]: 4, "temperature": 0}
    given |= {"input": "Hi"} if dialect == "responses" else {"messages": [{"role": "user", "content": "Hi"}]}
    short = {"name": "f", "description": "", "parameters": {"type": "object", "properties": {}}}
    tools = {
        "chat": [{"type": "function", "function": short}],
        "responses": [{"type": "function", **short}],
        "messages": [{"name": "f", "input_schema": short["parameters"]}],
    }
    answer = client.post(PATHS[dialect], json=given | {"tools": tools[dialect]})
    told = answer.json().get("error", {}) or {}
    # The tiny model's context is smaller than the prompt, so only its length may be refused.
    assert answer.status_code == 200 or "tokens" in told["message"], answer.text
    assert "does not support tools" not in answer.text


def test_models_report_how_tools_reach_them(client: httpx.Client, speaker: httpx.Client) -> None:
    for who, tools, thinking in ((client, "generic", "none"), (speaker, "native", "on-off")):
        (entry,) = who.get("/v1/models").json()["data"]
        assert entry["capabilities"] == {"tools": tools, "thinking": thinking, "sound": "none"}
        assert {"tools", "tool_choice", "max_tokens", "response_format"} <= set(entry["supported_parameters"])
        assert who.get(f"/v1/models/{entry['id']}").json() == entry
    assert json.dumps(entry)
