"""Grammars: an answer that must call a tool can say nothing else, and the parser reads it as a call."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from argosy.config import Grammar
from argosy.engine.grammar.constraint import _Schemas
from argosy.errors import GrammarError, UsageError
from argosy.prompt.formats import Format, ToolCallBegin, collect, find_format
from argosy.prompt.prompt import Prompt
from argosy.prompt.tokenizer import Tokenizer
from argosy.prompt.tools import Tool, check_tools
from tests.prompt.families import EVERY_FAMILY as FAMILIES
from tests.prompt.families import TOOLS, Family

CALLING = [name for name in FAMILIES if name not in ("chatml", "kimi_vl")]
CHECKED = check_tools(TOOLS)
WEATHER, CLOCK = CHECKED


def format_of(name: str) -> Format:
    return find_format(FAMILIES[name].tokenizer, FAMILIES[name].template)


@cache
def words_of(tokenizer: Tokenizer) -> LLTokenizer:
    return LLTokenizer(
        tokenizer._core.to_str(), n_vocab=tokenizer.vocab_size, eos_token=list(tokenizer.eos_ids)
    )


def matcher(family: Family, grammar: str) -> LLMatcher:
    # as the engine writes it
    made = LLMatcher(words_of(family.tokenizer), _Schemas(is_lenient=False).bind(grammar))
    assert not made.is_error(), made.get_error()
    return made


def ids_of(family: Family, text: str) -> list[int]:
    return family.tokenizer.encode_segments([(False, text)])


def takes(name: str, grammar: str, text: str) -> bool:
    """Whether the grammar accepts `text` as a complete answer."""
    found, ids = matcher(FAMILIES[name], grammar), ids_of(FAMILIES[name], text)
    return found.try_consume_tokens(ids) == len(ids) and found.is_accepting()


def refuses_at(name: str, grammar: str, text: str) -> str:
    """The text up to the token that the grammar refuses."""
    found, ids = matcher(FAMILIES[name], grammar), ids_of(FAMILIES[name], text)
    taken = found.try_consume_tokens(ids)
    assert taken < len(ids), "nothing is refused"
    return FAMILIES[name].tokenizer.decode(ids[:taken], keep_special=True)


OSLO = '{"city": "Oslo"}'
ONE = {
    "qwen3": '<tool_call>\n{"name": "get_weather", "arguments": ' + OSLO + "}\n</tool_call>",
    "qwen3_coder": "<tool_call>\n<function=get_weather>\n<parameter=city>\nOslo\n</parameter>\n"
    "</function>\n</tool_call>",
    "deepseek_v3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
    + OSLO
    + "\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "deepseek_v31": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>"
    + OSLO
    + "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "kimi_k2": "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
    + OSLO
    + "<|tool_call_end|><|tool_calls_section_end|>",
    "glm": "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n</tool_call>",
    "glm47": "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Oslo</arg_value></tool_call>",
    "gemma4": '<|tool_call>call:get_weather{city:<|"|>Oslo<|"|>}<tool_call|>',
    "harmony": "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>" + OSLO,
    "mistral": '[TOOL_CALLS] [{"name": "get_weather", "arguments": ' + OSLO + "}]",
    "mistral_args": "[TOOL_CALLS]get_weather[ARGS]" + OSLO,
    "minimax_m2": '<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">Oslo</parameter>\n'
    "</invoke>\n</minimax:tool_call>",
}
ONE |= {
    "hunyuan": '<tool_calls>[{"name": "get_weather", "arguments": ' + OSLO + "}]</tool_calls>",
    "granite": '<|tool_call|>[{"name": "get_weather", "arguments": ' + OSLO + "}]",
    "cohere2": '<|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": "get_weather", "parameters": '
    + OSLO
    + "}\n]<|END_ACTION|>",
    "gigachat": '<|function_call|>{"name": "get_weather", "arguments": ' + OSLO + "}",
    "solar": "<|tool_calls|><|tool_call:begin|>a1b2c3d4e5<|tool_call:name|>get_weather<|tool_call:args|>"
    + OSLO
    + "<|tool_call:end|>",
    "lfm2": '<|tool_call_start|>[get_weather(city="Oslo")]<|tool_call_end|>',
    "llama4": '<|python_start|>[get_weather(city="Oslo")]<|python_end|>',
    "deepseek_v4": '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="get_weather">\n'
    '<｜DSML｜parameter name="city" string="true">Oslo</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>',
    "hy3": "<tool_calls>\n<tool_call>get_weather<tool_sep>\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n"
    "</tool_call>\n</tool_calls>".replace(">", ":opensource>"),
    "hy4": "<tool_calls><tool_call>get_weather<arg_key>city</arg_key><arg_value>Oslo</arg_value></tool_call>"
    "</tool_calls>".replace(">", ":6124c78e>"),
}
_M3 = "]<]minimax[>[<"
ONE["minimax_m3"] = (
    f'{_M3}tool_call>\n{_M3}invoke name="get_weather">{_M3}city>Oslo{_M3}/city>{_M3}/invoke>\n{_M3}/tool_call>'
)
ONE["kimi_k3"] = (
    '<|open|>tools<|sep|><|open|>call tool="get_weather" index="1"<|sep|>'
    '<|open|>argument key="city" type="string"<|sep|>Oslo<|close|>argument<|sep|><|close|>call<|sep|>'
    "<|close|>tools<|sep|>"
)
ONE["ernie"] = ONE["granite4"] = ONE["qwen3"]
ONE["nemotron3"] = ONE["step3"] = ONE["qwen3_coder"]
ONE["laguna"] = ONE["glm"]
ONE["laguna_s"], ONE["ling2"] = ONE["glm47"], ONE["qwen3"]
ONE["ling3"] = ONE["glm"]
ONE["youtu"] = ONE["exaone"] = ONE["qwen3"].replace("\n", "")
ONE["minimax_m1"] = '<tool_calls>\n{"name": "get_weather", "arguments": ' + OSLO + "}\n</tool_calls>"
ONE["llama3"] = '{"name": "get_weather", "parameters": ' + OSLO + "}"
ONE["deepseek_v32"] = ONE["deepseek_v4"].replace("tool_calls>", "function_calls>")
ONE["deepseek_v41"] = ONE["deepseek_v4"].replace("tool_calls>", "calls>").replace("｜DSML｜", "｜DSML｜ ")
ONE["qwen2_5"] = ONE["qwen3"]
ONE["minimax_spelled"] = ONE["minimax_m2"]

TWO = {
    "qwen3": ONE["qwen3"] + '\n<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>',
    "qwen3_coder": ONE["qwen3_coder"] + "\n<tool_call>\n<function=clock>\n</function>\n</tool_call>",
    "deepseek_v3": ONE["deepseek_v3"].removesuffix("<｜tool▁calls▁end｜>")
    + "\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>clock\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "deepseek_v31": ONE["deepseek_v31"].removesuffix("<｜tool▁calls▁end｜>")
    + "<｜tool▁call▁begin｜>clock<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "kimi_k2": ONE["kimi_k2"].removesuffix("<|tool_calls_section_end|>")
    + "<|tool_call_begin|>functions.clock:1<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>",
    "glm": ONE["glm"] + "\n<tool_call>clock\n</tool_call>",
    "glm47": ONE["glm47"] + "<tool_call>clock</tool_call>",
    "gemma4": ONE["gemma4"] + "<|tool_call>call:clock{}<tool_call|>",
    "mistral": ONE["mistral"].removesuffix("]") + ', {"name": "clock", "arguments": {}}]',
    "mistral_args": ONE["mistral_args"] + "[TOOL_CALLS]clock[ARGS]{}",
    "minimax_m2": ONE["minimax_m2"].replace("</minimax", '<invoke name="clock">\n</invoke>\n</minimax'),
}
TWO["minimax_m3"] = ONE["minimax_m3"].replace(
    f"{_M3}/tool", f'{_M3}invoke name="clock">{_M3}/invoke>\n{_M3}/tool'
)
_CLOCK = ', {"name": "clock", "arguments": {}}]'
TWO |= {
    "ernie": TWO["qwen3"],
    "granite4": TWO["qwen3"],
    "nemotron3": TWO["qwen3_coder"],
    "step3": TWO["qwen3_coder"],
    "laguna": TWO["glm"],
    "laguna_s": TWO["glm47"],
    "ling2": TWO["qwen3"],
    "youtu": TWO["qwen3"].replace("\n", ""),
    "exaone": ONE["exaone"] + '\n<tool_call>{"name": "clock", "arguments": {}}</tool_call>',
    "ling3": ONE["ling3"] + "\n<tool_call>clock\n\n</tool_call>",
    "minimax_m1": ONE["minimax_m1"].replace("}\n</", '}\n{"name": "clock", "arguments": {}}\n</'),
    "hunyuan": ONE["hunyuan"].replace("]", _CLOCK),
    "granite": ONE["granite"].replace("]", _CLOCK),
    "cohere2": ONE["cohere2"].replace(
        "\n]", ',\n    {"tool_call_id": "1", "tool_name": "clock", "parameters": {}}\n]'
    ),
    "solar": ONE["solar"]
    + "<|tool_call:begin|>0123456789<|tool_call:name|>clock<|tool_call:args|>{}<|tool_call:end|>",
    **{name: ONE[name].replace("]", ", clock()]") for name in ("lfm2", "llama4")},
    **{
        name: ONE[name].replace(
            "</｜DSML｜invoke>\n", '</｜DSML｜invoke>\n<｜DSML｜invoke name="clock">\n</｜DSML｜invoke>\n'
        )
        for name in ("deepseek_v32", "deepseek_v4")
    },
    "hy3": ONE["hy3"].replace(
        "\n</tool_calls",
        "\n<tool_call:opensource>clock<tool_sep:opensource>\n</tool_call:opensource>\n</tool_calls",
    ),
    "hy4": ONE["hy4"].replace("</tool_calls", "<tool_call:6124c78e>clock</tool_call:6124c78e></tool_calls"),
}
TWO["deepseek_v41"] = TWO["deepseek_v4"].replace("tool_calls>", "calls>").replace("｜DSML｜", "｜DSML｜ ")
TWO["qwen2_5"] = TWO["qwen3"]
TWO["minimax_spelled"] = TWO["minimax_m2"]


def read(name: str, text: str, tools: Sequence[Tool] = CHECKED) -> list[tuple[str, Any]]:
    """The calls that a parser finds in an answer."""
    family = FAMILIES[name]
    parser, stream = format_of(name).parser(tools), family.tokenizer.stream()
    events = [
        event for token_id in ids_of(family, text) for event in parser.push(token_id, stream.push(token_id))
    ]
    answer = collect([*events, *parser.finish()])
    assert not answer.text
    return [(call.name, json.loads(call.arguments)) for call in answer.calls]


@pytest.mark.parametrize("name", CALLING)
def test_a_well_formed_call_is_accepted_and_parsed(name: str) -> None:
    grammar = format_of(name).grammar(CHECKED)
    assert takes(name, grammar, ONE[name])
    assert read(name, ONE[name]) == [("get_weather", {"city": "Oslo"})]


@pytest.mark.parametrize("name", TWO)
def test_parallel_calls_are_accepted_only_if_they_are_allowed(name: str) -> None:
    form = format_of(name)
    assert takes(name, form.grammar(CHECKED), TWO[name])
    assert read(name, TWO[name]) == [("get_weather", {"city": "Oslo"}), ("clock", {})]
    assert not takes(name, form.grammar(CHECKED, parallel=False), TWO[name])
    assert takes(name, form.grammar(CHECKED, parallel=False), ONE[name])


@pytest.mark.parametrize("name", CALLING)
def test_only_the_chosen_tool_can_be_called(name: str) -> None:
    form = format_of(name)
    assert takes(name, form.grammar((WEATHER,)), ONE[name])
    refuses_at(name, form.grammar((CLOCK,)), ONE[name])


@pytest.mark.parametrize("name", CALLING)
def test_text_that_is_no_call_is_refused_where_it_departs_from_one(name: str) -> None:
    grammar = format_of(name).grammar(CHECKED)
    assert refuses_at(name, grammar, "Hello") == ""
    for wrong in (
        ONE[name].replace("get_weather", "rm"),
        ONE[name].replace("city", "town"),
        ONE[name][:-1] + "x",
    ):
        refuses_at(name, grammar, wrong)
    # Only the end of the turn may follow, and the turn may not end earlier.
    family = FAMILIES[name]
    found, ids = matcher(family, grammar), ids_of(family, ONE[name])
    assert found.try_consume_tokens(ids[:-1]) == len(ids) - 1
    assert not found.is_accepting()
    assert found.try_consume_tokens(ids[-1:]) == 1
    assert found.is_accepting()
    assert found.validate_tokens(ids_of(family, "Hello")) == 0


JSON_FORMATS = ["qwen3", "deepseek_v3", "deepseek_v31", "kimi_k2", "harmony", "mistral", "mistral_args"]
JSON_FORMATS += ["llama3", "hunyuan", "granite", "cohere2", "gigachat", "solar"]


@pytest.mark.parametrize("name", JSON_FORMATS)
@pytest.mark.parametrize(
    ("arguments", "is_taken"),
    [
        ('{"city": "Zürich \\"Süd\\" 🙂\\n"}', True),
        (
            '{"city": "x", "days": 3, "unit": "celsius", "exact": true, "places": ["a"], "more": {"k": 1}, '
            '"limit": null}',
            True,
        ),
        ('{"days": 3}', False),
        ('{"city": 3}', False),
        ('{"city": "x", "days": "3"}', False),
        ('{"city": "x", "unit": "kelvin"}', False),
        ('{"city": "x", "other": 1}', False),
        ('{"city": "x"', False),
    ],
)
def test_arguments_must_match_their_schema(name: str, arguments: str, is_taken: bool) -> None:
    grammar = format_of(name).grammar(CHECKED)
    assert takes(name, grammar, ONE[name].replace(OSLO, arguments)) == is_taken


def written(name: str, arguments: Sequence[tuple[str, str]]) -> str:
    """A call of get_weather in a format that writes each value by itself."""
    if name == "qwen3_coder":
        inside = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments)
        return f"<tool_call>\n<function=get_weather>\n{inside}</function>\n</tool_call>"
    if name.startswith("minimax"):
        inside = "".join(f'<parameter name="{key}">{value}</parameter>\n' for key, value in arguments)
        return f'<minimax:tool_call>\n<invoke name="get_weather">\n{inside}</invoke>\n</minimax:tool_call>'
    line = "\n" if name == "glm" else ""
    inside = "".join(
        f"<arg_key>{key}</arg_key>{line}<arg_value>{value}</arg_value>{line}" for key, value in arguments
    )
    return f"<tool_call>get_weather{line}{inside}</tool_call>"


@pytest.mark.parametrize("name", ["qwen3_coder", "glm", "glm47", "minimax_m2", "minimax_spelled"])
@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        ([("city", 'a\nb <b> é🙂 "')], {"city": 'a\nb <b> é🙂 "'}),
        (
            [("city", "42"), ("days", "3"), ("unit", "celsius"), ("exact", "true"), ("places", '["a", "b"]')],
            {"city": "42", "days": 3, "unit": "celsius", "exact": True, "places": ["a", "b"]},
        ),
        (
            [("city", "x"), ("more", '{"k": [1, null]}'), ("limit", "null")],
            {"city": "x", "more": {"k": [1, None]}, "limit": None},
        ),
        ([("days", "3")], None),
        ([("city", "x"), ("days", "soon")], None),
        ([("city", "x"), ("unit", "kelvin")], None),
        ([("city", "x"), ("exact", "maybe")], None),
        ([("city", "x"), ("other", "1")], None),
    ],
)
def test_values_written_one_by_one_must_match_their_schemas(
    name: str, arguments: list[tuple[str, str]], value: dict[str, Any] | None
) -> None:
    grammar = format_of(name).grammar(CHECKED)
    text = written(name, arguments)
    assert takes(name, grammar, text) == (value is not None)
    if value is not None:
        assert read(name, text) == [("get_weather", value)]


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        ('city="a\\nb é🙂"', {"city": "a\nb é🙂"}),
        (
            'city="x", days=3, unit="celsius", exact=true, places=["a"], more={"k": [1, null]}, limit=null',
            {
                "city": "x", "days": 3, "unit": "celsius", "exact": True, "places": ["a"], "more": {"k": [1, None]},
                "limit": None,
            },
        ),
        ("days=3", None),
        ("city=3", None),
        ('city="x", days="3"', None),
        ('city="x", unit="kelvin"', None),
        ('city="x", other=1', None),
        ('city="x", ', None),
    ],
)  # fmt: skip
def test_arguments_of_a_pythonic_call_must_match_their_schema(
    arguments: str, value: dict[str, Any] | None
) -> None:
    for name in ("lfm2", "llama4"):
        text = ONE[name].replace('city="Oslo"', arguments)
        assert takes(name, format_of(name).grammar(CHECKED), text) == (value is not None)
        if value is not None:
            assert read(name, text) == [("get_weather", value)]


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        ([("city", "true", 'a\nb <b> "')], {"city": 'a\nb <b> "'}),
        (
            [
                ("city", "true", "42"),
                ("days", "false", "3"),
                ("exact", "false", "true"),
                ("limit", "false", "null"),
            ],
            {"city": "42", "days": 3, "exact": True, "limit": None},
        ),
        ([("days", "false", "3")], None),
        ([("city", "false", "3")], None),
        ([("city", "true", "x"), ("days", "true", "3")], None),
        ([("city", "true", "x"), ("unit", "true", "kelvin")], None),
    ],
)
def test_values_of_deepseek_s_tags_must_match_their_schemas(
    arguments: list[tuple[str, str, str]], value: dict[str, Any] | None
) -> None:
    inside = "".join(
        f'<｜DSML｜parameter name="{key}" string="{is_string}">{text}</｜DSML｜parameter>\n'
        for key, is_string, text in arguments
    )
    for name in ("deepseek_v32", "deepseek_v4", "deepseek_v41"):
        mark = "｜DSML｜ " if name == "deepseek_v41" else "｜DSML｜"
        first, last = ONE[name].index(f"<{mark}parameter"), ONE[name].index(f"</{mark}invoke")
        text = ONE[name][:first] + inside.replace("｜DSML｜", mark) + ONE[name][last:]
        assert takes(name, format_of(name).grammar(CHECKED), text) == (value is not None)
        if value is not None:
            assert read(name, text) == [("get_weather", value)]


def test_the_marks_around_a_text_may_stand_around_a_form() -> None:
    grammar = format_of("cohere2").grammar((), form=WORDS)
    assert takes("cohere2", grammar, "<|START_THINKING|>hm<|END_THINKING|><|START_TEXT|>ab/<|END_TEXT|>")
    refuses_at("cohere2", grammar, "<|START_TEXT|>ab//<|END_TEXT|>")


GEMMA = "<|tool_call>call:get_weather{{{}}}<tool_call|>"


def quoted(text: str) -> str:
    return f'<|"|>{text}<|"|>'


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        (f"city:{quoted('a b, {c}: ]')}", {"city": "a b, {c}: ]"}),
        (
            f"city:{quoted('x')},days:3,exact:true,limit:null,more:{{k:[1,{quoted('y')}]}},"
            f"places:[{quoted('a')},{quoted('b')}],unit:{quoted('celsius')}",
            {
                "city": "x", "days": 3, "exact": True, "limit": None, "more": {"k": [1, "y"]},
                "places": ["a", "b"], "unit": "celsius",
            },
        ),
        ("days:3", None),
        ("city:x", None),
        (f"city:{quoted('x')},days:soon", None),
        (f"city:{quoted('x')},days:{quoted('3')}", None),
        (f"city:{quoted('x')},unit:{quoted('kelvin')}", None),
        (f"city:{quoted('x')},places:[1]", None),
        (f"city:{quoted('x')},other:1", None),
        (f"city:{quoted('x')},more:{{a]b:1}}", None),  # brackets and commas of a bare key would be read as structure
        (f"city:{quoted('x')},more:{{a,b:1}}", None),
        (f"city:{quoted('x')},", None),
    ],
)  # fmt: skip
def test_gemma_s_values_must_match_their_schemas(arguments: str, value: dict[str, Any] | None) -> None:
    grammar, text = format_of("gemma4").grammar(CHECKED), GEMMA.format(arguments)
    assert takes("gemma4", grammar, text) == (value is not None)
    if value is not None:
        assert read("gemma4", text) == [("get_weather", value)]


def test_any_optional_values_of_gemma_may_be_left_out() -> None:
    properties = {name: {"type": "integer"} for name in "abcde"}
    for required in ([], ["c"], ["a", "e"], list("abcde")):
        tool = Tool("get_weather", "", {"type": "object", "properties": properties, "required": required})
        grammar = format_of("gemma4").grammar((tool,))
        for names in map(
            "".join, (itertools.compress("abcde", chosen) for chosen in itertools.product((0, 1), repeat=5))
        ):
            text = GEMMA.format(",".join(f"{name}:1" for name in names))
            assert takes("gemma4", grammar, text) == set(required).issubset(names), (required, names)


@pytest.mark.parametrize(
    ("form", "call"),
    [
        ("gemma4", "<|tool_call>call:find{{{}:1}}<tool_call|>"),
        ("llama4", "<|python_start|>[find({}=1)]<|python_end|>"),
        ("lfm2", "<|tool_call_start|>[find({}=1)]<|tool_call_end|>"),
    ],
)
def test_a_name_that_reads_as_something_else_stands_in_quotes(form: str, call: str) -> None:
    mark = '<|"|>' if form == "gemma4" else '"'
    for name in (
        "filter[id]",
        "x,y",
        "a:b",
        "{a}",
        "a=b",
        " a ",
        "a b",
        "None",
        'say "hi"',
        "größe",
        "a-b",
        "$top",
    ):
        schema = {"type": "object", "properties": {name: {"type": "integer"}}, "required": [name]}
        tools = check_tools([{"type": "function", "function": {"name": "find", "parameters": schema}}])
        grammar = format_of(form).grammar(tools)
        written = name if form == "gemma4" else json.dumps(name, ensure_ascii=False)[1:-1]
        texts = [call.format(key) for key in (name, f"{mark}{written}{mark}")]
        taken = [text for text in texts if takes(form, grammar, text)]
        assert len(taken) == 1, name
        assert read(form, taken[0], tools) == [("find", {name: 1})], name


def test_a_strict_tool_of_gemma_needs_schemas_that_can_be_enforced() -> None:
    point = {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]}
    properties: dict[str, object] = {"to": point}
    tool = Tool("get_weather", "", {"type": "object", "properties": properties, "required": ["to"]}, True)
    grammar = format_of("gemma4").grammar((tool,))
    assert takes("gemma4", grammar, GEMMA.format("to:{x:1.5}"))
    assert not takes("gemma4", grammar, GEMMA.format("to:{}"))
    properties["to"] = {"anyOf": [point, {"type": "null"}]}
    with pytest.raises(GrammarError, match="strict tool 'get_weather' have a schema that cannot be enforced"):
        format_of("gemma4").grammar((tool,))
    grammar = format_of("gemma4").grammar((replace(tool, is_strict=False),))
    assert takes("gemma4", grammar, GEMMA.format("to:{y:[]}"))


# Thoughts


@pytest.mark.parametrize("name", ["qwen3", "deepseek_v31", "kimi_k2", "glm", "minimax_m2"])
def test_thoughts_may_come_first_unless_the_prompt_has_closed_them(name: str) -> None:
    family, form = FAMILIES[name], format_of(name)
    thought = "I need\n\nthe weather. <b> </thin"

    def after(text: str) -> str:
        prompt = Prompt(tuple(ids_of(family, text)), text)
        return form.grammar(CHECKED, prompt=prompt)

    assert takes(name, after("ai\n"), f"<think>\n{thought}\n</think>\n\n{ONE[name]}")
    assert takes(name, after("ai\n"), ONE[name])
    assert takes(name, after("ai\n<think>\n"), f"{thought}</think>\n{ONE[name]}")
    refuses_at(name, after("ai\n<think>\n"), f"{thought}</think>Hello")
    assert takes(name, after("<think>\n\n</think>\n\n"), ONE[name])
    refuses_at(name, after("<think>\n\n</think>\n\n"), f"<think>{thought}</think>{ONE[name]}")


def test_thoughts_also_end_at_a_mark_spelled_as_text() -> None:
    name = "minimax_spelled"
    grammar = format_of(name).grammar(CHECKED, prompt=Prompt((1,), "]~b]ai\n<think>\n"))
    assert takes(name, grammar, f"hm </thin</think>\n\n{ONE[name]}")
    refuses_at(name, grammar, "hm</think>\nHello")


def test_gemma_may_think_on_a_channel_first_unless_the_prompt_has_closed_it() -> None:
    thought = f"<|channel>thought\nhm\n<channel|>{ONE['gemma4']}"
    assert takes("gemma4", format_of("gemma4").grammar(CHECKED), thought)
    closed = "<|turn>model\n<|channel>thought\n<channel|>"
    prompt = Prompt(tuple(ids_of(FAMILIES["gemma4"], closed)), closed)
    refuses_at("gemma4", format_of("gemma4").grammar(CHECKED, prompt=prompt), thought)


def test_gpt_oss_may_think_on_its_channel_first() -> None:
    grammar = format_of("harmony").grammar(CHECKED)
    assert takes(
        "harmony", grammar, f"<|channel|>analysis<|message|>hm\n<|end|><|start|>assistant{ONE['harmony']}"
    )
    refuses_at("harmony", grammar, "<|channel|>final<|message|>Hello")


# Forms


WORDS = Grammar(kind="regex", text="[a-z]+/?")
SUMS = Grammar(
    kind="lark", text='%ignore / /\nstart: r0 ("+" r0)* # `r0` is a name of ours, too\nr0: /[0-9]+/'
)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_answer_without_calls_has_its_form_and_nothing_around_it(name: str) -> None:
    head = {"harmony": "<|channel|>final<|message|>", "solar": "<|content|>"}.get(name, "")
    tail = "<|end|>" if name == "solar" else ""
    for form, taken, refused in ((WORDS, "ab/", "ab//"), (SUMS, "1 + 22", "1 + a")):
        for tools in (CHECKED, ()) if name in CALLING else ((),):
            grammar = format_of(name).grammar(tools, form=form)
            assert takes(name, grammar, head + taken + tail)
            refuses_at(name, grammar, head + refused)
            refuses_at(name, grammar, f"{head}\n{taken}")
            assert not tools or takes(name, grammar, ONE[name])


@pytest.mark.parametrize("name", ["qwen3", "deepseek_v31", "kimi_k2", "glm"])
def test_thoughts_may_come_before_a_form(name: str) -> None:
    for form, said in ((WORDS, "ab/"), (SUMS, "1+2")):
        grammar = format_of(name).grammar((), form=form)
        assert takes(name, grammar, f"<think>\nhm 1\n</think>\n\n{said}")
        assert takes(name, grammar, said)


# All kinds of schemas


def test_any_names_values_and_schemas_make_a_valid_grammar() -> None:
    properties = {
        'k"\\/é🙂': {"type": "string", "description": '"\n\\'},
        "ref": {"$ref": "#/$defs/point"},
        "either": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        "any": {},
        "words": {"enum": ['a"b', "", "c\nd", "é/"]},
        "flag": True,
    }
    schema = {
        "type": "object",
        "properties": properties,
        "required": ["ref"],
        "$defs": {"point": {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]}},
    }
    tools = (
        Tool("a-b.c_9", "", schema),
        Tool("open", "", {"type": "object", "additionalProperties": {"type": "integer"}}),
    )
    for name in CALLING:
        matcher(FAMILIES[name], format_of(name).grammar(tools))
    grammar = format_of("glm47").grammar(tools)
    call = "<tool_call>a-b.c_9{}<arg_key>ref</arg_key><arg_value>{}</arg_value>{}</tool_call>"
    first = '<arg_key>k"\\/é🙂</arg_key><arg_value>v</arg_value>'
    words = "<arg_key>words</arg_key><arg_value>{}</arg_value>"
    assert takes("glm47", grammar, call.format(first, '{"x": 1.5}', words.format("c\nd")))
    assert takes("glm47", grammar, call.format("", '{"x": 1}', words.format("")))
    assert not takes("glm47", grammar, call.format("", '{"y": 1}', ""))
    grammar = format_of("glm47").grammar(
        (Tool("f", "", {"properties": {"<tool_call>": {"type": "string"}}}),)
    )
    assert '"<tool_call>"' in grammar  # a name is never a control token
    grammar = format_of("qwen3").grammar(tools)
    assert takes("qwen3", grammar, '<tool_call>\n{"name": "open", "arguments": {"k": 1}}\n</tool_call>')


def test_a_grammar_defines_each_tool_once_however_many_calls_it_allows() -> None:
    tools = tuple(Tool(f"tool_{number}", "", WEATHER.parameters) for number in range(50))
    for name in CALLING:
        grammar = format_of(name).grammar(tools)
        assert grammar.count("celsius") <= len(tools)
        matcher(FAMILIES[name], grammar)


def test_a_call_grammar_needs_tools_and_a_model_that_can_call_them() -> None:
    with pytest.raises(UsageError, match="requires a tool call, and there are no tools"):
        format_of("qwen3").grammar(())
    with pytest.raises(UsageError, match="this model cannot call tools"):
        format_of("chatml").grammar(CHECKED)


def test_a_builder_makes_the_grammar_of_its_prompt() -> None:
    builder = FAMILIES["qwen3"].shared_builder
    prompt = builder.build(
        [{"role": "user", "content": "x"}], tools=TOOLS, variables={"enable_thinking": False}
    )
    grammar = builder.grammar(prompt, TOOLS[1:], must_call=True)
    assert grammar is not None
    assert takes("qwen3", grammar.text, '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>')
    assert grammar.text == format_of("qwen3").grammar((CLOCK,), prompt=prompt)
    assert not grammar.is_lenient
    assert builder.grammar(prompt) is None
    lazy = builder.grammar(prompt, TOOLS)
    assert lazy is not None
    assert lazy.is_lenient
    assert lazy.trigger is not None
    parser = builder.parser(prompt, TOOLS)
    events = parser.push(None, "Hi")
    assert not any(isinstance(event, ToolCallBegin) for event in events)
