"""Conversations with tools are rendered as the template intends, and no caller text becomes a marker."""

from __future__ import annotations

import copy
import datetime
import json
import unicodedata
from collections import Counter
from dataclasses import replace
from functools import cache
from typing import Any

import jinja2
import pytest
import tokenizers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from argosy.errors import CheckpointError, UsageError
from argosy.prompt.builder import PromptBuilder
from argosy.prompt.chat import ChatTemplate
from argosy.prompt.messages import Call, Turn, check_messages
from argosy.prompt.template_worker import _Generation, render_segments
from argosy.prompt.tokenizer import Tokenizer
from argosy.prompt.tools import check_tools
from tests.prompt.families import FAMILIES, TOOLS, WEATHER, Family
from tests.prompt.tokenizers_for_tests import CHATML, byte_level_json

NOW = datetime.datetime(2026, 1, 2, 3, 4, 5)
CALLING = [family for family in FAMILIES.values() if family.name != "chatml"]

BUILDERS = {family.name: family.shared_builder for family in FAMILIES.values()}


def call(name: str, arguments: object, call_id: str = "call_1") -> dict[str, object]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


CONVERSATION: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": None,
        "reasoning_content": "Oslo, then.",
        "tool_calls": [
            call("get_weather", {"city": "Oslo", "days": 2, "more": {"a": [True, None, "é"]}}, "call_1"),
            call("clock", "{}", "call_2"),
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "rain\n"},
    {"role": "tool", "tool_call_id": "call_2", "content": "12:00"},
]

RENDERED = {
    "qwen2_5": """<|im_start|>assistant
<tool_call>
{"name": "get_weather", "arguments": {"city": "Oslo", "days": 2, "more": {"a": [true, null, "é"]}}}
</tool_call>
<tool_call>
{"name": "clock", "arguments": {}}
</tool_call><|im_end|>
<|im_start|>user
<tool_response>
rain

</tool_response>
<tool_response>
12:00
</tool_response><|im_end|>
<|im_start|>assistant
""",
    "qwen3": """<|im_start|>assistant
<think>
Oslo, then.
</think>

<tool_call>
{"name": "get_weather", "arguments": {"city": "Oslo", "days": 2, "more": {"a": [true, null, "é"]}}}
</tool_call>
<tool_call>
{"name": "clock", "arguments": {}}
</tool_call><|im_end|>
<|im_start|>user
<tool_response>
rain

</tool_response>
<tool_response>
12:00
</tool_response><|im_end|>
<|im_start|>assistant
""",
    "qwen3_coder": """<|im_start|>assistant
<tool_call>
<function=get_weather>
<parameter=city>
Oslo
</parameter>
<parameter=days>
2
</parameter>
<parameter=more>
{"a": [true, null, "é"]}
</parameter>
</function>
</tool_call>
<tool_call>
<function=clock>
</function>
</tool_call><|im_end|>
<|im_start|>user
<tool_response>
rain

</tool_response>
<tool_response>
12:00
</tool_response>
<|im_end|>
<|im_start|>assistant
""",
    "deepseek_v3": """<｜Assistant｜><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather
```json
{"city": "Oslo", "days": 2, "more": {"a": [true, null, "é"]}}
```<｜tool▁call▁end｜>
<｜tool▁call▁begin｜>function<｜tool▁sep｜>clock
```json
{}
```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜><｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>rain
<｜tool▁output▁end｜>
<｜tool▁output▁begin｜>12:00<｜tool▁output▁end｜><｜tool▁outputs▁end｜>""",
    "deepseek_v31": """<｜Assistant｜></think><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>\
{"city": "Oslo", "days": 2, "more": {"a": [true, null, "é"]}}<｜tool▁call▁end｜>\
<｜tool▁call▁begin｜>clock<｜tool▁sep｜>{}\
<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜><｜tool▁output▁begin｜>rain
<｜tool▁output▁end｜><｜tool▁output▁begin｜>12:00<｜tool▁output▁end｜>""",
    "kimi_k2": """<|im_assistant|>assistant<|im_middle|><think>Oslo, then.</think><|tool_calls_section_begin|>\
<|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>{"city": "Oslo", "days": 2, \
"more": {"a": [true, null, "é"]}}<|tool_call_end|><|tool_call_begin|>functions.clock:1<|tool_call_argument_begin|>{}\
<|tool_call_end|><|tool_calls_section_end|><|im_end|><|im_system|>tool<|im_middle|>## Return of functions.get_weather:0
rain
<|im_end|><|im_system|>tool<|im_middle|>## Return of functions.clock:1
12:00<|im_end|><|im_assistant|>assistant<|im_middle|>""",
    "glm": """<|assistant|>
<think>Oslo, then.</think>
<tool_call>get_weather
<arg_key>city</arg_key>
<arg_value>Oslo</arg_value>
<arg_key>days</arg_key>
<arg_value>2</arg_value>
<arg_key>more</arg_key>
<arg_value>{"a": [true, null, "é"]}</arg_value>
</tool_call>
<tool_call>clock
</tool_call><|observation|>
<tool_response>
rain

</tool_response>
<tool_response>
12:00
</tool_response><|assistant|>""",
    "gemma4": """<|turn>model
<|channel>thought
Oslo, then.
<channel|><|tool_call>call:get_weather{city:<|"|>Oslo<|"|>,days:2,more:{a:[true,null,<|"|>é<|"|>]}}<tool_call|>\
<|tool_call>call:clock{}<tool_call|><|tool_response>response:get_weather{value:<|"|>rain
<|"|>}<tool_response|><|tool_response>response:clock{value:<|"|>12:00<|"|>}<tool_response|>""",
    "harmony": """<|start|>assistant<|channel|>analysis<|message|>Oslo, then.<|end|><|start|>assistant \
to=functions.get_weather<|channel|>commentary json<|message|>{"city": "Oslo", "days": 2, \
"more": {"a": [true, null, "é"]}}<|call|>\
<|start|>functions.get_weather to=assistant<|channel|>commentary<|message|>"rain\\n"<|end|>\
<|start|>assistant to=functions.clock<|channel|>commentary json<|message|>{}<|call|>\
<|start|>functions.clock to=assistant<|channel|>commentary<|message|>"12:00"<|end|><|start|>assistant""",
    "minimax_m2": """]~b]ai
<think>
Oslo, then.
</think>


<minimax:tool_call>
<invoke name="get_weather">
<parameter name="city">Oslo</parameter>
<parameter name="days">2</parameter>
<parameter name="more">{"a": [true, null, "é"]}</parameter>
</invoke>
<invoke name="clock">
</invoke>
</minimax:tool_call>[e~[
]~b]tool
<response>rain
</response>
<response>12:00</response>[e~[
]~b]ai
<think>
""",
    "mistral_args": """[TOOL_CALLS]get_weather[ARGS]{"city": "Oslo", "days": 2, "more": {"a": [true, null, "é"]}}\
[TOOL_CALLS]clock[ARGS]{}</s>""",
}


@pytest.mark.parametrize("name", RENDERED)
def test_calls_results_and_thoughts_appear_where_the_template_puts_them(name: str) -> None:
    text = BUILDERS[name].apply_template(CONVERSATION, tools=TOOLS)
    assert RENDERED[name] in text
    assert "get_weather" in text[: text.index(RENDERED[name])]  # the prompt describes the tool


def test_calls_and_results_get_the_kind_of_ids_the_template_needs() -> None:
    text = BUILDERS["mistral"].apply_template(CONVERSATION, tools=TOOLS)
    found = json.loads(text[text.index("[TOOL_CALLS]") + 12 : text.index("</s>")])
    ids = [each["id"] for each in found]
    assert all(len(own) == 9 and own.isalnum() for own in ids)
    assert len(set(ids)) == 2
    assert [f'"call_id": "{own}"' in text for own in ids] == [True, True]

    kept = [CONVERSATION[1], {"role": "assistant", "tool_calls": [call("clock", {}, "functions.clock:7")]}]
    kept.append({"role": "tool", "tool_call_id": "functions.clock:7", "content": "12"})
    assert "## Return of functions.clock:7\n12" in BUILDERS["kimi_k2"].apply_template(kept, tools=TOOLS)


@cache
def plain_template(source: str) -> jinja2.Template:
    """Compile as the hub does: with plain jinja2 and none of our code."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = lambda value, ensure_ascii=False, **form: json.dumps(
        value, ensure_ascii=ensure_ascii, **form
    )
    environment.globals["strftime_now"] = NOW.strftime
    environment.globals["raise_exception"] = lambda said: 1 / 0
    return environment.from_string(source)


def plainly(family: Family, messages: list[dict[str, Any]], tools: object) -> str:
    return plain_template(family.template).render(
        **family.tokenizer.special_tokens, messages=messages, tools=tools, add_generation_prompt=True
    )


nice = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**6), 10**6)
    | st.floats(allow_nan=False, allow_infinity=False)
    | nice,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(nice, inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=80)
@given(
    name=st.sampled_from([family.name for family in CALLING]),
    arguments=st.dictionaries(nice, values, max_size=3),
    said=st.lists(nice, min_size=6, max_size=6),
    schema=st.dictionaries(nice, values, max_size=2),
)
def test_any_call_renders_as_in_plain_jinja(
    name: str, arguments: dict[str, object], said: list[str], schema: dict[str, object]
) -> None:
    family = FAMILIES[name]
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": said[0]},
        {"role": "user", "content": said[1]},
        {"role": "assistant", "reasoning_content": said[2], "tool_calls": [call(f"f{said[3]}", arguments)]},
        {"role": "tool", "tool_call_id": "call_1", "content": said[4]},
    ]
    properties = {
        said[5]: {
            "type": "string",
            "description": said[3],
            **{f"x{key}": value for key, value in schema.items()},
        }
    }
    tools = check_tools(
        [{"type": "function", "function": {"name": "t", "parameters": {"properties": properties}}}]
    )
    builder = BUILDERS[name]
    assert builder._template is not None
    turns = builder._with_own_ids(check_messages(messages), {})
    shaped = builder._template.shape.messages(turns)
    made = [tool.as_template_reads_it() for tool in tools]
    segments = render_segments(
        family.template,
        shaped,
        tools=made,
        fixed={**family.tokenizer.special_tokens, "add_generation_prompt": True},
        variables={},
        max_characters=1 << 20,
        now=NOW,
    )
    assert "".join(text for _, text in segments) == plainly(family, shaped, made)


# No caller text becomes a marker


def everywhere(said: str, number: int = 1) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A conversation, and its tools, with `said` in every place where a caller may write text."""
    parameters = {
        "type": "object",
        "description": said,
        "properties": {
            f"a{said}": {
                "type": "string",
                "description": said,
                "enum": [said, "b"],
                "default": said,
                said: said,
            },
            "b": {"type": ["string", "null"], "title": f"{said}{said}"},
            "c": {
                "type": "object",
                "properties": {said: {"type": "array", "items": {"type": "string", "enum": [said]}}},
            },
        },
        "required": [f"a{said}"],
    }
    tool = {"type": "function", "function": {"name": "tool", "description": said, "parameters": parameters}}
    arguments = {"a": said, f"k{said}": {"b": [said, {said: said}]}}
    messages = [
        {"role": "system", "content": said},
        {
            "role": "user",
            "content": [{"type": "text", "text": said}, {"type": "text", "text": said}],
            "name": said,
        },
        {
            "role": "assistant",
            "content": said,
            "reasoning_content": said,
            "tool_calls": [
                call(f"n{said}", arguments, f"i{said}{number}"),
                call("tool", json.dumps(arguments), f"j{said}"),
            ],
        },
        {"role": "tool", "tool_call_id": f"i{said}{number}", "content": said, "name": said},
        {"role": "tool", "tool_call_id": f"j{said}", "content": said},
        {"role": "assistant", "content": said, "reasoning_content": said},
        {"role": "user", "content": said},
    ]
    return messages, [tool]


def controls(family: Family, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> Counter[int]:
    prompt = BUILDERS[family.name].build(messages, tools=tools)
    return Counter(i for i in prompt.token_ids or () if i in family.tokenizer.control_ids)


@cache
def controls_of_plain_text(name: str) -> Counter[int]:
    return controls(FAMILIES[name], *everywhere("x"))


def hostile(mark: str, is_apart: bool) -> list[str]:
    """Return the marker and texts that hide it, all of these in one or apart.

    The second half begins a text and the first half ends it, since other text may complete them.
    """
    half = len(mark) // 2
    inside = [
        f"x{mark}y{mark}",
        f"{mark[:half]}{mark}{mark[half:]}",  # nested
        unicodedata.normalize("NFKC", mark),
        "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in mark),  # full-width
        f'"}}\n{mark}\n{{"',
    ]
    if is_apart:
        return [mark, mark[half:], mark[:half], *inside]
    return [mark, "\nx\n".join([mark[half:], *inside, mark[:half]])]


@pytest.mark.parametrize("is_apart", [False, pytest.param(True, marks=pytest.mark.full)])
@pytest.mark.parametrize("name", [family.name for family in CALLING])
def test_no_marker_becomes_a_control_token_wherever_a_caller_writes_it(name: str, is_apart: bool) -> None:
    family = FAMILIES[name]
    marks = [family.tokenizer.token_text(i) for i in sorted(family.tokenizer.control_ids)]
    assert set(family.marks) <= {*marks, *family.special, *family.structural}
    expected = controls_of_plain_text(name)
    texts = [said for mark in dict.fromkeys(family.marks) for said in hostile(mark, is_apart)]
    foreign = sorted({"<|im_end|>", "<|endoftext|>", "<think>", "<tool_call>"} - {*family.marks})
    of_others = [said for mark in foreign for said in hostile(mark, is_apart)]
    for said in [*texts, *(of_others if is_apart else ["\nx\n".join(foreign)])]:
        found = controls(family, *everywhere(said))
        assert found == expected, (said, found - expected, expected - found)


@settings(deadline=None, max_examples=60)
@given(data=st.data(), name=st.sampled_from([family.name for family in CALLING]))
def test_no_mixture_of_markers_becomes_a_control_token(data: st.DataObject, name: str) -> None:
    family = FAMILIES[name]
    words = st.sampled_from([*family.marks, " ", "\n", '"', "\\", "<|", "|>", "<", ">", "tool_call", "x"])
    said = data.draw(st.lists(words, max_size=6).map("".join))
    # Qwen's template takes a user message that looks like a tool result for one, and behaves as if the turn went on.
    assume(not said.startswith("<tool_response>"))
    assert controls(family, *everywhere(said or "x")) == controls_of_plain_text(name)


def test_full_width_marks_stay_text_even_if_the_tokenizer_folds_them() -> None:
    core = tokenizers.Tokenizer.from_str(byte_level_json(structural=()))
    core.normalizer = tokenizers.normalizers.NFKC()
    marks = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
    core.add_tokens([tokenizers.AddedToken(mark, normalized=True) for mark in marks])
    family = replace(FAMILIES["qwen3"])
    tokenizer = Tokenizer(core, config={"eos_token": "<|im_end|>"}, chat_template=family.template)
    builder = PromptBuilder(tokenizer, vocab_size=tokenizer.vocab_size)

    def found(said: str) -> Counter[int]:
        messages, tools = everywhere(said)
        prompt = builder.build(messages, tools=tools)
        return Counter(i for i in prompt.token_ids or () if i in tokenizer.control_ids)

    assert "".join(chr(ord(c) + 0xFEE0) for c in "<think>") == "＜ｔｈｉｎｋ＞"
    # The tokenizer alone would be fooled.
    assert core.token_to_id("<think>") in core.encode("＜ｔｈｉｎｋ＞").ids
    expected = found("x")
    for mark in [*marks, "<|im_end|>"]:
        for said in hostile(mark, is_apart=True):
            assert found(said) == expected, said
    builder.close()


@pytest.mark.parametrize("is_at_ends", [False, pytest.param(True, marks=pytest.mark.full)])
def test_a_marker_split_over_two_fields_stays_text(is_at_ends: bool) -> None:
    def split(first: str, second: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        parts = [{"type": "text", "text": first}, {"type": "text", "text": second}]
        tool = copy.deepcopy(WEATHER)
        tool["function"]["description"] = second
        tool["function"]["parameters"]["properties"] = {first: {"type": "string", "description": second}}
        return [{"role": "user", "content": parts}], [tool]

    for family in CALLING:
        expected = controls(family, *split("x", "x"))
        for mark in family.marks:
            for at in {1, len(mark) - 1} if is_at_ends else {len(mark) // 2}:
                assert controls(family, *split(mark[:at], mark[at:])) == expected, (mark, at)


# Features that a template lacks


def test_a_model_with_channels_refuses_tools_if_its_template_has_none() -> None:
    """Its answers are messages on channels, so a call inside a message's text would be read as text."""
    family = replace(FAMILIES["harmony"], template=CHATML)
    builder = family.builder()
    assert builder.tool_calling == "none"
    with pytest.raises(UsageError, match="chat template does not support tools") as caught:
        builder.build([{"role": "user", "content": "x"}], tools=TOOLS)
    assert "leave `tools` out" in str(caught.value.hint)
    with pytest.raises(UsageError, match="does not support tool calls and their results"):
        builder.build(CONVERSATION)
    builder.close()


def test_a_model_whose_call_format_is_unknown_gets_the_generic_tool_prompt() -> None:
    template = "{{ tools | tojson }}{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(byte_level_json()), chat_template=template)
    builder = PromptBuilder(tokenizer, vocab_size=tokenizer.vocab_size)
    text = builder.apply_template([{"role": "user", "content": "x"}], tools=TOOLS)
    assert text.startswith("null# Tools")
    assert text.count("get_weather") == 1
    builder.close()


def test_a_turn_with_text_and_calls_is_split_if_the_template_prints_only_one() -> None:
    conversation = [dict(message) for message in CONVERSATION]
    conversation[2]["content"] = "Looking."
    text = BUILDERS["deepseek_v3"].apply_template(conversation, tools=TOOLS)
    assert "<｜Assistant｜>Looking.<｜end▁of▁sentence｜><｜Assistant｜><｜tool▁calls▁begin｜>" in text
    text = BUILDERS["harmony"].apply_template(conversation, tools=TOOLS)
    assert "analysis<|message|>Oslo, then.\n\nLooking.<|end|>" in text
    text = BUILDERS["mistral"].apply_template(conversation, tools=TOOLS)  # this template cannot print both
    assert "Looking." not in text
    assert '[TOOL_CALLS] [{"name": "get_weather"' in text


def test_a_turn_is_shaped_so_that_no_template_prints_it_twice() -> None:
    """DeepSeek-R1's distilled models do so: given empty content, they print an empty answer after the calls."""
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' and m.tool_calls %}{% for c in m.tool_calls %}"
        "{{ '<calls>' + c.function.name + c.function.arguments }}{% endfor %}{% endif %}"
        "{% if m.role == 'assistant' and m.content is not none %}{{ '<answer>' + m.content }}{% endif %}"
        "{% if m.role != 'assistant' %}{{ m.content }}{% endif %}{% endfor %}"
    )
    chat = ChatTemplate(template)
    turns = check_messages([CONVERSATION[1], CONVERSATION[2] | {"content": "Hm."}, *CONVERSATION[3:]])
    text = "".join(text for _, text in chat.segments(turns))
    assert text.startswith("Weather?<answer>Hm.<calls>get_weather{")
    assert text.count("<answer>") == 1
    chat.close()


def test_instructions_are_joined_if_the_template_takes_one_message() -> None:
    first = [{"role": "system", "content": "A"}, {"role": "developer", "content": "B"}]
    user = {"role": "user", "content": "x"}
    assert "# Instructions\n\nA\n\nB" in BUILDERS["harmony"].apply_template([*first, user])
    with pytest.raises(UsageError, match=r"message 1: .* takes instructions \(system\) only at the start"):
        BUILDERS["harmony"].apply_template([user, first[0], user])
    assert "<|im_start|>system\nB<|im_end|>" in BUILDERS["qwen3"].apply_template([*first, user])


def test_a_developer_message_becomes_a_system_message_if_the_template_has_no_such_role() -> None:
    messages = [{"role": "developer", "content": "B"}, {"role": "user", "content": "x"}]
    assert "<|im_start|>system\nB<|im_end|>" in BUILDERS["qwen3"].apply_template(messages)
    assert "<|start|>developer<|message|># Instructions\n\nB" in BUILDERS["harmony"].apply_template(messages)


def test_variables_reach_the_template() -> None:
    user = [{"role": "user", "content": "x"}]
    assert BUILDERS["deepseek_v31"].apply_template(user).endswith("</think>")
    assert BUILDERS["deepseek_v31"].apply_template(user, variables={"thinking": True}).endswith("<think>")
    assert "Reasoning: high" in BUILDERS["harmony"].apply_template(
        user, variables={"reasoning_effort": "high"}
    )
    with pytest.raises(UsageError, match="'thinking'; it reads: model_identity, reasoning_effort"):
        BUILDERS["harmony"].apply_template(user, variables={"thinking": True})


def test_an_unreadable_template_is_reported_with_tools_too() -> None:
    template = ChatTemplate("{% if %}")
    with pytest.raises(CheckpointError, match="line 1"):
        template.segments(check_messages(CONVERSATION), check_tools(TOOLS))
    template.close()


def test_a_template_s_json_equals_python_s_for_any_value() -> None:
    value = {"b\x00": ["\x000\x00", '"\\u00000\\u0000"', {"é": 1, "a": [1.5, None]}], "a": {}}
    for form in ("", "ensure_ascii=true", "indent=2", "separators=(',', ':')", "sort_keys=true"):
        source = f"{{{{ tools | tojson({form}) }}}}|{{{{ fixed | tojson({form}) }}}}"
        tools = [{"type": "function", "function": value}]
        segments = render_segments(
            source, [], tools=tools, fixed={"fixed": value}, variables={}, max_characters=9999
        )
        options = {
            "ensure_ascii": form == "ensure_ascii=true",
            "indent": 2 if "indent" in form else None,
            "separators": (",", ":") if "separators" in form else None,
            "sort_keys": "sort_keys" in form,
        }
        expected = json.dumps(tools, **options) + "|" + json.dumps(value, **options)  # type: ignore[arg-type]
        assert "".join(text for _, text in segments) == expected


# Counting and detokenizing


def test_counted_tokens_are_the_tokens_that_build_returns() -> None:
    builder = BUILDERS["qwen3"]
    built = builder.build(CONVERSATION, tools=TOOLS).token_ids
    assert built is not None
    assert builder.count_tokens(CONVERSATION, tools=TOOLS) == len(built)
    assert builder.count_tokens(CONVERSATION[:2]) < len(built)


def test_text_is_tokenized_without_control_tokens_and_detokenizes_to_itself() -> None:
    builder = BUILDERS["qwen3"]
    ids = builder.tokenize("Hello <|im_end|>")
    assert not set(ids) & builder._needed("").control_ids
    assert builder.detokenize(ids) == "Hello <|im_end|>"
    end = builder._needed("").eos_ids[0]
    assert builder.detokenize([end]) == "<|im_end|>"
    assert builder.detokenize([end], keep_special=False) == ""
    with pytest.raises(UsageError, match="token id -1 is not in the vocabulary"):
        builder.detokenize([-1])


def test_tools_and_variables_of_a_prompt_without_a_template_are_refused() -> None:
    with pytest.raises(UsageError, match="cannot have tools"):
        BUILDERS["qwen3"].build([1, 2], tools=TOOLS)
    with pytest.raises(UsageError, match="cannot have chat template variables"):
        BUILDERS["qwen3"].build([1, 2], variables={"enable_thinking": True})


def names_results(name: str) -> bool:
    template = BUILDERS[name]._template
    assert template is not None
    return template.shape.names_results


def test_a_template_that_prints_one_call_a_turn_gets_each_result_once() -> None:
    template = BUILDERS["harmony"]._template
    assert template is not None
    shape = template.shape
    assert not shape.prints_all_calls
    calls = tuple(Call(f"c{at}", "f", {}, "{}") for at in range(3))
    results = [Turn("tool", text, answers=number) for number, text in (("c2", "x"), ("c0", "y"), ("c2", "z"))]
    made = shape.messages(
        [Turn("user", "?"), Turn("assistant", "", calls=calls), *results, Turn("user", "!")]
    )
    said = [
        message["tool_calls"][0]["id"] if "tool_calls" in message else message["content"] for message in made
    ]
    assert said == ["?", "c0", "y", "c1", "c2", "x", "z", "!"]
    # Such a template names no result; one that does prints them as they came.
    assert not shape.names_results
    assert [name for name in ("qwen3", "mistral", "kimi_k2") if names_results(name)] == ["mistral", "kimi_k2"]
    # Even if two calls have one id, which `check_messages` refuses, the messages do not multiply.
    same = shape.messages([Turn("assistant", "", calls=(calls[0],) * 50), *[results[1]] * 50])
    assert len(same) == 100
