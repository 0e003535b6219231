"""Tools for chat templates without tool support: every template prints them, and no caller text becomes a marker."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import tokenizers

from argosy.errors import UsageError
from argosy.prompt.builder import PromptBuilder
from argosy.prompt.formats import collect
from argosy.prompt.replay import ReplayMemory
from argosy.prompt.tokenizer import Tokenizer
from tests.prompt.families import FAMILIES, SHORT, TOOLS
from tests.prompt.templates_for_tests import LLAMA2, MIXTRAL
from tests.prompt.test_tool_prompts import everywhere, hostile
from tests.prompt.tokenizers_for_tests import CHATML, byte_level_json

IGNORES_SYSTEM = (
    "{% for m in messages %}{% if m.role in ['user', 'assistant'] %}{{ '<|im_start|>' + m.role + '\n' + m.content "
    "+ '<|im_end|>\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "llama2": LLAMA2, "mixtral": MIXTRAL, "ignores_system": IGNORES_SYSTEM}
ALL_TOKENS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")


def builder_of(
    template: str, structural: tuple[str, ...], memory: ReplayMemory | None = None
) -> PromptBuilder:
    core = tokenizers.Tokenizer.from_str(byte_level_json(structural=()))
    core.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in structural])
    config = {"eos_token": "<|im_end|>", "bos_token": "<|endoftext|>"}
    tokenizer = Tokenizer(core, config=config, chat_template=template)
    return PromptBuilder(tokenizer, vocab_size=tokenizer.vocab_size, memory=memory)


BUILDERS: dict[tuple[str, bool], PromptBuilder] = {}


@pytest.fixture(scope="module", autouse=True)
def builders() -> Iterator[None]:
    for name, template in TEMPLATES.items():
        for has_tokens in (False, True):
            BUILDERS[name, has_tokens] = builder_of(template, ALL_TOKENS if has_tokens else ())
    yield
    for builder in BUILDERS.values():
        builder.close()


KINDS = [(name, has_tokens) for name in TEMPLATES for has_tokens in (False, True)]


def call(arguments: object, call_id: str) -> dict[str, object]:
    return {"id": call_id, "type": "function", "function": {"name": "get_weather", "arguments": arguments}}


CONVERSATION: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": "Let me look.",
        "tool_calls": [call({"city": "Oslo"}, "call_1"), call('{"city": "Rome"}', "call_2")],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    {"role": "tool", "tool_call_id": "call_2", "content": "sun"},
    {"role": "user", "content": "And now?"},
]
CALLS = """Let me look.
<tool_call>
{"name": "get_weather", "arguments": {"city": "Oslo"}}
</tool_call>
<tool_call>
{"name": "get_weather", "arguments": {"city": "Rome"}}
</tool_call>"""
RESULTS = """<tool_response>
rain
</tool_response>

<tool_response>
sun
</tool_response>

And now?"""


@pytest.mark.parametrize("kind", KINDS)
def test_tools_calls_and_results_appear_where_the_template_prints_messages(kind: tuple[str, bool]) -> None:
    builder = BUILDERS[kind]
    assert builder.tool_calling == "generic"
    text = builder.apply_template(CONVERSATION, tools=TOOLS)
    places = [
        text.index(part) for part in ("Be brief.", "<tools>\n", "\n</tools>", "Weather?", CALLS, RESULTS)
    ]
    assert places == sorted(places)
    told = text[places[1] + len("<tools>") : places[2]].strip().splitlines()
    assert [json.loads(line)["function"]["name"] for line in told] == ["get_weather", "clock"]


def test_without_system_messages_the_instructions_go_into_the_first_user_message() -> None:
    text = BUILDERS["mixtral", False].apply_template(CONVERSATION, tools=TOOLS)
    assert text.startswith("<|endoftext|> [INST] Be brief.\n\n# Tools")
    assert text.count("[INST]") == 2
    text = BUILDERS["ignores_system", False].apply_template(CONVERSATION[1:2], tools=TOOLS)
    assert text.startswith("<|im_start|>user\n# Tools")


@pytest.mark.parametrize("is_apart", [False, pytest.param(True, marks=pytest.mark.full)])
@pytest.mark.parametrize("kind", KINDS)
def test_no_marker_becomes_a_control_token_wherever_a_caller_writes_it(
    kind: tuple[str, bool], is_apart: bool
) -> None:
    builder = BUILDERS[kind]
    tokenizer = builder._needed("a test")

    def controls(said: str) -> Counter[int]:
        messages, tools = everywhere(said)
        prompt = builder.build(messages, tools=tools)
        return Counter(i for i in prompt.token_ids or () if i in tokenizer.control_ids)

    expected = controls("x")
    for mark in (*ALL_TOKENS, "<|im_end|>", "<|im_start|>", "<|endoftext|>"):
        for said in hostile(mark, is_apart):
            assert controls(said) == expected, (mark, said)


@pytest.mark.parametrize("name", TEMPLATES)
def test_marks_are_tokens_where_the_model_has_them(name: str) -> None:
    builder = BUILDERS[name, True]
    tokenizer = builder._needed("a test")
    found = Counter(builder.build(CONVERSATION, tools=TOOLS).token_ids or ())
    assert found[tokenizer.control_id("<tool_call>") or 0] == 4  # two in the instructions, two calls
    assert found[tokenizer.control_id("</tool_response>") or 0] == 2


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_in_hermes_format_is_parsed_and_replayed(kind: tuple[str, bool]) -> None:
    name, has_tokens = kind
    builder = builder_of(TEMPLATES[name], ALL_TOKENS if has_tokens else (), ReplayMemory())
    tokenizer = builder._needed("a test")
    asked = CONVERSATION[1:2]
    prompt = builder.build(asked, tools=TOOLS, tenant="me")
    said = '<tool_call>{"arguments":{"days": 2,"city":"Oslo"}, "name":"get_weather"}</tool_call>'
    ids = tokenizer.encode_segments([(False, said)])
    parser, stream = builder.parser(prompt, TOOLS), tokenizer.stream()
    events = [event for token_id in ids for event in parser.push(token_id, stream.push(token_id))]
    answer = collect([*events, *parser.finish()])
    assert [(c.name, json.loads(c.arguments)) for c in answer.calls] == [
        ("get_weather", {"city": "Oslo", "days": 2})
    ]
    assert not answer.text
    assert builder.remember("me", prompt, ids, answer, TOOLS)
    found = {"role": "assistant", "content": None, "tool_calls": [
        call(json.loads(answer.calls[0].arguments), answer.calls[0].id)
    ]}  # fmt: skip
    result = {"role": "tool", "tool_call_id": answer.calls[0].id, "content": "rain"}
    again = builder.build([*asked, found, result], tools=TOOLS, tenant="me").token_ids or ()
    # Mixtral's template prints a space before an answer but does not end a prompt with one.
    if name in ("chatml", "ignores_system"):
        assert again[: len(prompt.token_ids or ()) + len(ids)] == (*(prompt.token_ids or ()), *ids)
    builder.close()


@pytest.mark.parametrize("kind", KINDS)
def test_call_grammars_are_those_of_hermes(kind: tuple[str, bool]) -> None:
    builder = BUILDERS[kind]
    prompt = builder.build(CONVERSATION[:2], tools=TOOLS)
    lazy = builder.grammar(prompt, TOOLS)
    must = builder.grammar(prompt, TOOLS, must_call=True)
    assert lazy is not None
    assert must is not None
    assert lazy.trigger is not None
    mark = builder._needed("a test").control_id("<tool_call>")
    assert lazy.trigger.words == ("<tool_call>" if mark is None else mark,)
    assert '{\\"name\\": \\"get_weather\\", \\"arguments\\": ' in must.text


def test_a_model_whose_template_supports_tools_keeps_its_template() -> None:
    for family in FAMILIES.values():
        builder = family.builder()
        assert builder.tool_calling == ("generic" if family.name == "chatml" else "native"), family.name
        builder.close()


def test_a_format_without_calls_gets_them_generically_even_if_the_template_has_tools() -> None:
    kimi = SHORT["kimi_vl"]
    for template in (kimi.template, FAMILIES["kimi_k2"].template):
        builder = replace(kimi, template=template).builder()
        assert builder.format.name == "kimi_vl"
        assert builder.tool_calling == "generic"
        builder.close()


def test_without_a_chat_template_there_are_no_tools() -> None:
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(byte_level_json()))
    builder = PromptBuilder(tokenizer, vocab_size=tokenizer.vocab_size)
    assert builder.tool_calling == "none"
    with pytest.raises(UsageError, match="no chat template"):
        builder.build([{"role": "user", "content": "x"}], tools=TOOLS)


def test_without_tools_and_calls_a_conversation_is_printed_as_before() -> None:
    plain = [
        {"role": "system", "content": "A"},
        {"role": "user", "content": "B"},
        {"role": "user", "content": "C"},
    ]
    text = BUILDERS["chatml", False].apply_template(plain)
    assert text.count("<|im_start|>user") == 2
