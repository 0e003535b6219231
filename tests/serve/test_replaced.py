"""A block that the model cannot read becomes a note in the history, and is refused by name in a new turn."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.serve.dialects import MAX_TOKENS, PATHS, TOOLS

DATA = "aGVsbG8gd29ybGQ" * 100
CHATTING = ("chat", "responses", "messages")
NOTE = "omitted: this model reads text only]"


def image(dialect: str) -> dict[str, Any]:
    return {
        "chat": {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{DATA}"}},
        "responses": {"type": "input_image", "image_url": f"data:image/png;base64,{DATA}"},
        "messages": {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": DATA}},
    }[dialect]


def text(dialect: str, said: str) -> dict[str, Any]:
    return {"type": "input_text" if dialect == "responses" else "text", "text": said}


def read_tool(dialect: str, found: list[dict[str, Any]], more: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A conversation in which a tool has read `found`; `more` are parts that the user adds."""
    asked = {"role": "user", "content": "Read it."}
    if dialect == "chat":
        function = {"name": "get_weather", "arguments": "{}"}
        return [
            asked,
            {"role": "assistant", "tool_calls": [{"id": "a", "type": "function", "function": function}]},
            {"role": "tool", "tool_call_id": "a", "content": found},
            *([{"role": "user", "content": more}] if more else []),
        ]
    if dialect == "responses":
        return [
            asked,
            {"type": "function_call", "call_id": "a", "name": "get_weather", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "a", "output": found},
            *([{"role": "user", "content": more}] if more else []),
        ]
    return [
        asked,
        {
            "role": "assistant",
            "content": [{"type": "tool_use", "id": "a", "name": "get_weather", "input": {}}],
        },
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": found}, *more]},
    ]


def post(
    speaker: httpx.Client, dialect: str, conversation: list[dict[str, Any]], **more: Any
) -> httpx.Response:
    name = "input" if dialect == "responses" else "messages"
    body = {name: conversation, MAX_TOKENS[dialect]: 40, "temperature": 0, "tools": TOOLS[dialect]}
    return speaker.post(PATHS[dialect], json=body | more)


@pytest.mark.parametrize("dialect", CHATTING)
@pytest.mark.parametrize("has_question", [False, True])
def test_an_image_read_by_a_tool_becomes_a_note_and_the_session_continues(
    speaker: httpx.Client, dialect: str, has_question: bool
) -> None:
    more = [text(dialect, "And now? #plain")] if has_question else []
    found = [text(dialect, "#plain"), image(dialect), image(dialect)]
    answer = post(speaker, dialect, read_tool(dialect, found, more))
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-replaced-blocks"] == f"2 {image(dialect)['type']}"
    assert "It is well" in answer.text


@pytest.mark.parametrize("dialect", CHATTING)
def test_an_image_in_an_earlier_turn_becomes_a_note_and_a_new_one_is_refused_by_name(
    speaker: httpx.Client, dialect: str
) -> None:
    with_image = {"role": "user", "content": [text(dialect, "What is it?"), image(dialect)]}
    later = [with_image, {"role": "assistant", "content": "A cat."}, {"role": "user", "content": "#plain"}]
    answer = post(speaker, dialect, later)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-replaced-blocks"] == f"1 {image(dialect)['type']}"
    refused = post(speaker, dialect, [with_image])
    assert refused.status_code == 400
    said = refused.json()["error"]["message"]
    assert f"'{image(dialect)['type']}'" in said
    assert "this model reads text only" in said
    assert "describe it in words" in said
    assert DATA not in said


def counted(speaker: httpx.Client, content: Any) -> int:
    body = {"messages": [{"role": "user", "content": content}]}
    answer = speaker.post("/v1/messages/count_tokens", json=body)
    assert answer.status_code == 200, answer.text
    return int(answer.json()["input_tokens"])


def test_a_text_document_becomes_text_with_its_title(speaker: httpx.Client) -> None:
    source = {"type": "text", "media_type": "text/plain", "data": "Rain falls."}
    told = {
        "title": ("<title>Weather</title>\n", {"title": "Weather"}),
        "context": ("<context>Oslo</context>\n", {"context": "Oslo", "title": None}),
        "nothing": ("", {"citations": {"enabled": False}, "cache_control": {"type": "ephemeral"}}),
    }
    for head, more in told.values():
        expected = f"<document>\n{head}<document_content>\nRain falls.\n</document_content>\n</document>\nWhat falls?"
        for given in (source, {"type": "content", "content": [text("messages", "Rain falls.")]}):
            block = {"type": "document", "source": given, **more}
            assert counted(speaker, [block, text("messages", "What falls?")]) == counted(speaker, expected)


def test_a_document_without_text_becomes_a_note_in_a_tool_result_and_is_refused_in_a_new_turn(
    speaker: httpx.Client,
) -> None:
    for source in (
        {"type": "base64", "media_type": "application/pdf", "data": DATA},
        {"type": "url", "url": "x"},
    ):
        block = {"type": "document", "source": source}
        answer = post(speaker, "messages", read_tool("messages", [block, text("messages", "#plain")], []))
        assert answer.headers["x-replaced-blocks"] == "1 document"
        refused = post(speaker, "messages", [{"role": "user", "content": [block]}])
        assert refused.status_code == 400
        assert "'document'" in refused.json()["error"]["message"]


def test_results_of_anthropics_tools_in_an_earlier_turn_become_notes(speaker: httpx.Client) -> None:
    used = {"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search", "input": {"query": "x"}}
    found = {"type": "web_search_tool_result", "tool_use_id": "srvtoolu_1", "content": []}
    said = {"role": "assistant", "content": [used, found, text("messages", "Found.")]}
    conversation = [{"role": "user", "content": "Search."}, said, {"role": "user", "content": "#plain"}]
    answer = post(speaker, "messages", conversation)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-replaced-blocks"] == "1 server_tool_use, 1 web_search_tool_result"


SEARCH = {"type": "web_search_20250305", "name": "web_search", "max_uses": 5}


def test_a_server_tool_is_ignored_beside_other_tools_and_refused_by_name_alone(speaker: httpx.Client) -> None:
    asked = [{"role": "user", "content": "#plain"}]
    answer = post(speaker, "messages", asked, tools=[*TOOLS["messages"], SEARCH])
    assert answer.status_code == 200, answer.text
    assert "tools.web_search_20250305" in answer.headers["x-ignored-params"]
    for more in (
        {"tools": [SEARCH]},
        {"tools": [*TOOLS["messages"], SEARCH], "tool_choice": {"type": "tool", "name": "web_search"}},
    ):
        refused = post(speaker, "messages", asked, **more)
        assert refused.status_code == 400
        assert "web_search_20250305 would run at Anthropic" in refused.json()["error"]["message"]
    refused = post(speaker, "messages", asked, tools=[{"type": "bash_20250124", "name": "bash"}])
    assert "only Anthropic's models know the parameters of bash_20250124" in refused.text


def test_idle_fields_of_anthropics_clients_are_accepted_and_named(speaker: httpx.Client) -> None:
    cached = {"cache_control": {"type": "ephemeral"}}
    nulls = dict.fromkeys(
        ["system", "tools", "tool_choice", "thinking", "metadata", "stop_sequences", "temperature", "top_k",
         "service_tier", "container", "mcp_servers", "context_management", "something_new"]
    )  # fmt: skip
    assert post(speaker, "messages", [{"role": "user", "content": "#plain"}], **nulls).status_code == 200
    said = {"id": "msg_1", "type": "message", "role": "assistant", "content": "Yes.", "usage": {}}
    answer = post(
        speaker,
        "messages",
        [
            {"role": "user", "content": "a"},
            said,
            {"role": "user", "content": [text("messages", "#plain") | cached]},
        ],
        system=[text("messages", "Be brief.") | cached],
        tools=[TOOLS["messages"][0] | cached | {"eager_input_streaming": None}],
        tool_choice={"type": "auto", **cached},
        thinking={"type": "adaptive", "display": "omitted"},
        betas=["x"],
        **cached,
    )
    assert answer.status_code == 200, answer.text
    named = answer.headers["x-ignored-params"].split(", ")
    for name in (
        "cache_control", "system.cache_control", "messages.id", "messages.content.cache_control",
        "tools.cache_control", "tool_choice.cache_control", "betas",
    ):  # fmt: skip
        assert name in named


@pytest.mark.parametrize(
    "more",
    [
        {"something_new": 1},
        {"mcp_servers": [{"type": "url", "url": "x", "name": "y"}]},
        {"messages": [{"role": "user", "content": [{
            "type": "document", "source": {"type": "text", "data": "x"}, "citations": {"enabled": True}
        }]}]},
    ],
)  # fmt: skip
def test_a_field_that_would_change_the_answer_is_refused_by_name(
    speaker: httpx.Client, more: dict[str, Any]
) -> None:
    answer = post(speaker, "messages", [{"role": "user", "content": "#plain"}], **more)
    assert answer.status_code == 400
    names = {"something_new", "mcp_servers", "citations.enabled"}
    assert any(name in answer.json()["error"]["message"] for name in names)


@pytest.mark.parametrize("name", ["content", "tool_result"])
def test_lists_of_blocks_are_bounded(speaker: httpx.Client, name: str) -> None:
    blocks: list[dict[str, Any]] = [text("messages", "x")] * 4097
    if name == "tool_result":
        blocks = [{"type": "tool_result", "tool_use_id": "a", "content": blocks}]
    answer = post(speaker, "messages", [{"role": "user", "content": blocks}])
    assert answer.status_code == 400
    assert "at most 4096 items" in answer.json()["error"]["message"]
