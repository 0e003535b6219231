"""Messages and tools as clients send them: each is understood as intended, or refused by name."""

from __future__ import annotations

import json
import math
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from argosy.errors import UsageError
from argosy.prompt.json_text import plain_json, read_json, read_object, write_json
from argosy.prompt.messages import Call, Turn, check_messages
from argosy.prompt.tools import Tool, check_tools, tool_named, types_of, value_of
from tests.prompt.families import TOOLS, WEATHER

Message = dict[str, Any]
HI: list[Message] = [{"role": "user", "content": "Hi"}]
CALL: Message = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
ASKS: list[Message] = [*HI, {"role": "assistant", "tool_calls": [CALL]}]
ANSWER: Message = {"role": "tool", "tool_call_id": "c1", "content": "4"}


def with_call(**changes: object) -> list[Message]:
    return [*HI, {"role": "assistant", "tool_calls": [CALL | changes]}, ANSWER]


def with_arguments(arguments: object) -> list[Message]:
    return with_call(function={"name": "f", "arguments": arguments})


def deep(levels: int) -> object:
    made: object = 1
    for _ in range(levels):
        made = {"a": made}
    return made


def test_a_turn_holds_everything_a_client_sends() -> None:
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "user", "content": "q", "name": "Ann"},
        {
            "role": "assistant",
            "content": None,
            "reasoning": "hm",
            "refusal": None,
            "tool_calls": [CALL | {"index": 0}],
        },
        {"role": "tool", "content": "4", "tool_call_id": "c1", "name": "f"},
    ]
    assert check_messages(messages) == (
        Turn("developer", "a\nb"),
        Turn("user", "q", name="Ann"),
        Turn("assistant", "", reasoning="hm", calls=(Call("c1", "f", {}, "{}"),)),
        Turn("tool", "4", name="f", answers="c1"),
    )


def test_arguments_may_be_an_object_or_its_json_and_the_json_is_kept() -> None:
    for given_, arguments, text in (
        ('{"a":1.50}', {"a": 1.5}, '{"a":1.50}'),
        ({"a": [1, "é"]}, {"a": [1, "é"]}, '{"a": [1, "é"]}'),
        ("", {}, "{}"),
    ):
        assert check_messages(with_arguments(given_))[1].calls[0] == Call("c1", "f", arguments, text)


@pytest.mark.parametrize("given_", ["[1]", '{"a": 1', '{"a": NaN}', '{"a": 1, "a": 2}'])
def test_the_arguments_of_a_truncated_call_do_not_end_the_conversation(given_: str) -> None:
    (call,) = check_messages(with_arguments(given_))[1].calls
    assert call.arguments == {"INVALID_JSON": given_}
    assert json.loads(call.text) == call.arguments


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([], "at least one message"),
        ([{"role": "user"}], "message 0: no 'content'"),
        ([{"role": "user", "content": None}], "message 0: no 'content'"),
        ([{"content": "x"}], "message 0: no 'role'"),
        ([{"role": 1, "content": "x"}], "role is a int, expected text"),
        (
            [{"role": "robot", "content": "x"}],
            "unknown role 'robot'; known: system, developer, user, assistant, tool",
        ),
        ([{"role": "user", "content": 3}], "content is a int, expected text"),
        ([*HI, {"role": "user", "content": "x", "cache": 1}], "message 1: unknown key 'cache' for role user"),
        ([{"role": "user", "content": "x", "tool_calls": [CALL]}], "unknown key 'tool_calls' for role user"),
        ([*ASKS, ANSWER | {"reasoning_content": "x"}], "unknown key 'reasoning_content' for role tool"),
        (ASKS, "the last message calls tools, so there is nothing to answer"),
        (
            [{"role": "assistant", "content": []}, {"role": "assistant", "content": " "}],
            "every message is an empty one from the assistant, so there is nothing to answer",
        ),
        (
            [{"role": "assistant", "content": " "}],
            "an empty one from the assistant, so there is nothing to answer",
        ),
        ([*HI, {"role": "assistant", "content": "", "reasoning": "x"}], "only text can be continued"),
        ([{"role": "user", "content": "\udc00"}], "lone surrogate"),
        ([{"role": "user", "content": "x", "name": "\udc00"}], "message 0: name holds half a character"),
        ([{"role": "user", "content": "x", "name": ""}], "name has 0 characters, expected 1 to 256"),
        ([{"role": "user", "content": ["x"]}], "part 0 is a str, expected an object with a type"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            "part 0 is of type 'image_url'; known: text, image, audio, video",
        ),
        (
            [{"role": "user", "content": [{"type": "input_audio"}]}],
            "'input_audio'; known: text, image, audio, video",
        ),
        ([{"role": "user", "content": [{"type": "text", "text": 1}]}], "part 0: text is a int"),
        ([*HI, {"role": "assistant", "tool_calls": "x"}], "tool_calls is a str, expected a list"),
        (
            [*HI, {"role": "assistant", "tool_calls": ["x"]}],
            "message 1: tool call 0 is a str, expected an object",
        ),
        ([*HI, {"role": "assistant", "tool_calls": []}, *HI], "message 1: no 'content'"),
        (with_call(type="custom"), "tool call 0: type is 'custom'; known: 'function'"),
        (with_call(name="f"), "tool call 0: unknown key 'name'; known: id, type, index, function"),
        (with_call(function="f"), "tool call 0: no 'function' with name and arguments"),
        (
            with_call(function={"name": "f", "arguments": {}, "x": 1}),
            "unknown key 'x'; known: name, arguments",
        ),
        (with_call(function={"arguments": {}}), "name is a NoneType, expected text"),
        (with_call(id=None), "id is a NoneType, expected text"),
        (with_call(id="x" * 257), "id has 257 characters"),
        (with_arguments(None), "arguments are a NoneType, expected an object or its JSON text"),
        (with_arguments({"a": float("nan")}), "arguments holds a number that is too large"),
        (with_arguments({"a": 10**400}), "arguments holds a number that is too large"),
        (with_arguments({"a": {"\ud800": 1}}), "arguments holds half a character"),
        (with_arguments({1: 2}), "arguments has the key 1, expected text"),
        (with_arguments({"a": {1, 2}}), "arguments holds a set, which JSON cannot represent"),
        (with_arguments(deep(65)), "arguments is nested deeper than 64"),
        ([*HI, ANSWER], "message 1: tool_call_id 'c1' matches no call in an earlier message"),
        (
            [*HI, {"role": "assistant", "tool_calls": [CALL, CALL]}, ANSWER],
            "message 1: tool call 1 has the id 'c1' of an earlier call in this message",
        ),
        ([*ASKS[:1], ANSWER, ASKS[1], ANSWER], "tool_call_id 'c1' matches no call in an earlier message"),
        (
            [*HI, {"role": "assistant", "content": "x", "reasoning": "a", "reasoning_content": "b"}, *HI],
            "reasoning_content and reasoning differ",
        ),
    ],
)
def test_invalid_messages_are_refused_with_the_reason(messages: list[Message], sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_messages(messages)
    assert sentence in str(caught.value)


def tool(**function: object) -> Message:
    return {"type": "function", "function": {"name": "f", **function}}


def test_tools_are_read_in_openai_s_form() -> None:
    weather, clock = check_tools(TOOLS)
    assert (weather.name, weather.description, weather.required) == (
        "get_weather",
        "Weather of a city",
        ("city",),
    )
    assert list(weather.properties) == ["city", "days", "unit", "exact", "places", "more", "limit"]
    assert clock.as_template_reads_it() == {
        "type": "function",
        "function": {
            "name": "clock",
            "description": "The time",
            "parameters": {"type": "object", "properties": {}},
        },
    }
    assert check_tools([weather, clock]) == (weather, clock)
    assert check_tools([tool(parameters={"required": 3}, strict=True)])[0].required == ()


@pytest.mark.parametrize(
    ("tools", "sentence"),
    [
        (["f"], "tool 0 is a str, expected an object"),
        ([{"type": "web_search"}], "tool 0: type is 'web_search'; known: 'function'"),
        ([{"type": "function", "name": "f"}], "tool 0: no 'function'"),
        ([tool(returns={})], "unknown key 'returns'; known: name, description, parameters, strict"),
        ([tool() | {"x": 1}], "unknown key 'x'"),
        ([tool(name="<|im_end|>")], "name '<|im_end|>' is not 1 to 128 of the characters A-Z a-z 0-9 _ - ."),
        ([tool(name="")], "is not 1 to 128"),
        ([tool(name="a\n")], "is not 1 to 128"),
        ([tool(name=None)], "name None is not"),
        ([tool(description=1)], "description is a int"),
        ([tool(description="\ud800")], "half a character"),
        ([tool(parameters="x")], "not the JSON schema of an object"),
        ([tool(parameters={"type": "string"})], "not the JSON schema of an object"),
        ([tool(parameters={"properties": []})], "properties of its parameters are not an object"),
        ([tool(parameters=deep(70))], "parameters is nested deeper than 64"),
        ([tool(), tool()], "tool 1: the name 'f' is used twice"),
    ],
)
def test_invalid_tools_are_refused_with_the_reason(tools: list[Any], sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_tools(tools)
    assert sentence in str(caught.value)


def test_a_tool_is_found_by_name_or_refused_with_the_known_names() -> None:
    tools = check_tools(TOOLS)
    assert tool_named(tools, "clock") is tools[1]
    with pytest.raises(UsageError, match="names 'x', which is not among the tools: get_weather, clock"):
        tool_named(tools, "x")
    with pytest.raises(UsageError, match="among the tools: none"):
        tool_named((), "x")


# Values that models write without quotes


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ("5", {"type": "string"}, "5"),
        ("5", {"type": "integer"}, 5),
        ("5.0", {"type": "number"}, 5.0),
        ("5", {"type": "number"}, 5),
        ("5.5", {"type": "integer"}, "5.5"),
        (" true ", {"type": "boolean"}, True),
        ("True", {"type": "boolean"}, True),
        ("False", {"type": "string"}, "False"),
        ("None", {"type": ["string", "null"]}, None),
        ("null", {"anyOf": [{"type": "string"}, {"type": "null"}]}, None),
        ("[1]", {"type": "array"}, [1]),
        ("[1", {"type": "array"}, "[1"),
        ('{"a": 1}', {"$ref": "#/$defs/o"}, {"a": 1}),
        ('{"a": 1}', {"$ref": "#/$defs/loop"}, {"a": 1}),
        ("3", {"enum": [1, 2, 3]}, 3),
        ("3", {"const": "3"}, "3"),
        ("3", {}, "3"),
        ("3", None, "3"),
        ('{"a": 1}', None, {"a": 1}),
        ("02134", {"type": "integer"}, "02134"),
        ("NaN", {"type": "number"}, "NaN"),
        ("", {"type": "string"}, ""),
    ],
)
def test_the_schema_decides_the_type_of_an_unquoted_value(text: str, schema: object, value: object) -> None:
    root = {"$defs": {"o": {"type": "object"}, "loop": {"$ref": "#/$defs/loop"}}}
    found = value_of(text, schema, root)
    assert (found, type(found)) == (value, type(value))


def test_a_self_referential_schema_terminates() -> None:
    root = {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}] * 99 + [{"oneOf": [{"type": "null"}]}]}}}
    assert types_of({"$ref": "#/$defs/a"}, root) == {"null"}


# JSON


@given(
    value=st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
        max_leaves=8,
    )
)
def test_json_round_trips(value: object) -> None:
    try:
        plain = plain_json(value, "it")
    except UsageError as error:
        assert "half a character" in error.message or "too large" in error.message  # noqa: PT017
        return
    assert read_json(write_json(plain)) == plain == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "{} {}",
        "[NaN]",
        "[1e999]",
        '{"a": 1, "a": 2}',
        "[" * 100000,
        '["\\ud800"]',
        "1" * 5000,
        "'a'",
    ],
)
def test_text_that_json_parsers_may_read_differently_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        read_json(text)
    assert read_object(text) is None


def test_a_caller_s_values_are_refused_for_the_same_reasons_as_json_text() -> None:
    endless: list[object] = []
    endless.append(endless)
    deep: object = 0
    for _ in range(65):
        deep = [deep]
    for value, sentence in (
        (endless, "it is nested deeper than 64"),
        (deep, "it is nested deeper than 64"),
        ({"a": ["\ud800"]}, r"it holds half a character \(a lone surrogate\)"),
        ([1 << 1024], "it holds a number that is too large"),
        ([-math.inf], "it holds a number that is too large"),
        ([math.nan], "it holds a number that is too large"),
    ):
        with pytest.raises(UsageError, match=sentence):
            plain_json(value, "it")
    with pytest.raises(ValueError, match="it is nested deeper than 64"):
        read_json("[" * 65 + "0" + "]" * 65)
    assert plain_json(MappingProxyType({"a": (1, True, None)}), "it") == {"a": [1, True, None]}


def test_a_value_is_copied() -> None:
    schema = WEATHER["function"]["parameters"]  # type: ignore[index]
    checked = check_tools([WEATHER])[0].parameters
    assert checked == schema
    assert json.dumps(checked) == json.dumps(schema)
    assert checked["properties"] is not schema["properties"]
    assert isinstance(check_tools([WEATHER])[0], Tool)


def test_redundant_fields_that_clients_add_are_ignored() -> None:
    function = {"name": "f", "arguments": "{}"}

    def turns(copied: dict[str, object], **more: object) -> tuple[Turn, ...]:
        call = {"id": "c", "type": "function", "function": function | copied}
        said = {"role": "assistant", "content": "x", "tool_calls": [call], **more}
        return check_messages([said, {"role": "tool", "tool_call_id": "c", "content": "y"}])

    plain = turns({})
    assert turns({"parsed_arguments": {"a": 1}}, parsed={"b": 2}, annotations=[], refusal=None) == plain
    with pytest.raises(UsageError, match="unknown key 'annotations'"):
        turns({}, annotations=[{"type": "url_citation"}])
