"""The decoded view has every text that a client chooses, once, and puts back what its visitor returns."""

from __future__ import annotations

import json
from typing import Any

import pytest

from argosy.config import Grammar
from argosy.errors import UsageError
from argosy.guard.view import Shown, call_visited


class Shouting:
    """Writes words in capitals."""

    def text(self, text: str) -> str:
        return text.upper()

    def lines(self, lines: list[str]) -> list[str]:
        return [self.text(line) for line in lines]


class Renaming(Shouting):
    def text(self, text: str) -> str:
        return text.replace("joe@example.com", "<EMAIL_1>").replace("4930901820", "<PHONE_1>")


def test_every_text_of_a_conversation_is_in_the_view_and_fixed_words_are_not() -> None:
    picture = {"type": "image", "image": object()}
    function = {"name": "f", "arguments": {"k": ["v", 7, None]}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "name": "ann",
         "content": [{"type": "text", "text": "a"}, picture, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "reasoning_content": "d", "parsed": {"x": "y"},
         "tool_calls": [{"id": "call_1", "type": "function", "index": 0, "function": function}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "e"},
    ]  # fmt: skip
    shown = Shown(messages=messages, texts=["t"], variables={"reasoning_effort": "low", "thinking": True})
    assert shown.all_texts() == [
        "ann", "a\nb", "c", "d", "call_1", "f", "k", "v", "7", "call_1", "e", "t", "low",
    ]  # fmt: skip
    made = shown.visited(Shouting())
    assert made.messages[0]["content"] == [
        {"type": "text", "text": "A"},
        picture,
        {"type": "text", "text": "B"},
    ]
    assert made.messages[1]["tool_calls"][0]["id"] == made.messages[2]["tool_call_id"] == "CALL_1"
    assert made.messages[1]["tool_calls"][0]["function"] == {"name": "F", "arguments": {"K": ["V", 7, None]}}
    assert made.variables == {"reasoning_effort": "LOW", "thinking": True}


def test_a_schema_shows_all_but_its_keywords_and_types() -> None:
    schema = {
        "type": "object", "required": ["a", "b"], "$defs": {"d": {"$ref": "#/$defs/e", "type": ["string", "null"]}},
        "properties": {"a": {"type": "string", "name": "n", "title": "t"}, "b": {"type": "odd", "x-y": {"z": "w"}}},
    }  # fmt: skip
    tool = {"type": "function", "function": {"name": "f", "description": "about", "parameters": schema}}
    texts = Shown(tools=[tool]).all_texts()
    assert texts == ["f", "about", "a\nb", "d", "#/$defs/e", "a", "n", "t", "b", "odd", "x-y", "z", "w"]
    form = Grammar(kind="json_schema", text='{"enum": ["blue\\nmoon"], "type": "string"}')
    assert Shown(grammar=form).all_texts() == ["blue\nmoon"]


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("regex", r"blue\x20moon"), ("regex", r"blue\smoon"), ("regex", r"bl\u0075e moon"),
        ("regex", r"bl\u{75}e moon"),
        ("regex", r"bl\U00000075e\ moon"), ("lark", 'start: "a blue\\nmoon"'), ("lark", 'start: "bl\\u0075e moon"'),
    ],
)  # fmt: skip
def test_a_grammar_is_read_without_its_escapes(kind: Any, text: str) -> None:
    (shown,) = Shown(grammar=Grammar(kind=kind, text=text)).all_texts()
    assert "blue moon" in " ".join(shown.split())


def test_a_regular_expression_of_a_schema_is_read_without_its_escapes() -> None:
    for schema in ({"pattern": "blue\\x20moon"}, {"patternProperties": {"bl\\u0075e moon": {}}}):
        assert Shown(grammar=Grammar(kind="json_schema", text=json.dumps(schema))).all_texts() == [
            "blue moon"
        ]
        tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
        assert Shown(tools=[tool]).all_texts() == ["f", "blue moon"]
    schema = {"pattern": "\\d", "properties": {"pattern": {"type": "string"}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    assert Shown(tools=[tool]).visited(Renaming()).tools == [tool]


@pytest.mark.parametrize(
    "shown",
    [
        Shown(grammar=Grammar(kind="regex", text="joe@example\\.com")),
        Shown(tools=[{"type": "function", "function": {"name": "joe@example.com"}}]),
        Shown(grammar=Grammar(kind="json_schema", text='{"pattern": "joe@example\\\\.com"}')),
    ],
)
def test_a_value_is_refused_where_nothing_can_stand_for_it(shown: Shown) -> None:
    with pytest.raises(UsageError, match="the policy of this server replaces values"):
        shown.visited(Renaming())


def test_arguments_of_calls_are_rewritten_as_json() -> None:
    def made(text: str) -> str:
        return call_visited(text, Renaming())

    assert made('{"a": ["joe@example.com", 4930901820, true, null], "b":1}') == (
        '{"a": ["<EMAIL_1>", "<PHONE_1>", true, null], "b": 1}'
    )
    assert made('{"a":  "x"}') == '{"a":  "x"}'  # unchanged, so its spelling stays
    assert made('{"a": "joe@example.com') == '{"a": "<EMAIL_1>'  # cut off by the token limit
    assert made('{"a":"joe\\u0040example.com", "b": "\\n') == '{"a":"<EMAIL_1>", "b": "\\n'
    assert made("joe@example.com") == "<EMAIL_1>"
