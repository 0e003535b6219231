"""DeepSeek-V4 and V4.1 have no chat template: they get one that writes what the code in their repository writes."""

from __future__ import annotations

import json
import os
from itertools import product
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

from argosy.prompt.builder import PromptBuilder
from argosy.prompt.formats import find_format
from argosy.prompt.own_templates import (
    _TOOLS,
    _TOOLS_END,
    DEEPSEEK_V4,
    DEEPSEEK_V41,
    K3_PICTURE,
    K3_ROWS,
    KIMI_K3,
    V4_PICTURE,
    with_pictures,
)
from argosy.prompt.template_worker import render_segments
from argosy.prompt.tokenizer import Tokenizer, has_chat_template
from argosy.prompt.tools import Tool
from tests.prompt.tokenizers_for_tests import byte_level_json, write_tokenizer

LLAMA_CPP = os.environ.get("ARGOSY_LLAMA_CPP", "")
TOOLS = [{"type": "function", "function": {"name": "get_weather", "description": "It's", "parameters": {}}}]
CALLS = [{"function": {"name": "get_weather", "arguments": {"city": "Oslo", "days": 3, "at": [1, "a"]}}}]
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": "", "reasoning_content": "Ask.", "tool_calls": CALLS},
    {"role": "tool", "content": "rain"},
    {"role": "user", "content": "And now?"},
]
TALK = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b", "reasoning_content": "why"},
    {"role": "user", "content": "c"},
]

SEEN = [{"role": "user", "content": [
    {"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"},
]}]  # fmt: skip


def compiled(source: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    environment.filters["from_json"] = json.loads
    return environment.from_string(source)


def rendered(messages: list[dict[str, Any]], **variables: Any) -> str:
    fixed = {"bos_token": "<BOS>", "add_generation_prompt": True}
    return compiled(DEEPSEEK_V4).render(messages=messages, **fixed | variables)


def test_what_callers_wrote_stays_apart() -> None:
    fixed = {"bos_token": "<BOS>", "add_generation_prompt": True}
    found = render_segments(
        DEEPSEEK_V4, TURNS, fixed=fixed, variables={"thinking": True}, max_characters=1 << 20, tools=TOOLS
    )
    assert "".join(text for _, text in found) == rendered(TURNS, thinking=True, tools=TOOLS)
    assert not any(is_callers and "｜" in text for is_callers, text in found)


@pytest.mark.parametrize("template", [DEEPSEEK_V4, DEEPSEEK_V41, KIMI_K3])
def test_a_chat_without_tools_is_rendered(template: str) -> None:
    found = render_segments(
        template, TALK, fixed={"bos_token": None}, variables={}, max_characters=1 << 20, tools=None
    )
    assert "a" in [text for is_callers, text in found if is_callers]


def test_calls_and_their_results_are_written_as_the_model_writes_them() -> None:
    assert rendered(TURNS, thinking=True) == (
        "<BOS>Be brief.<｜User｜>Weather?<｜Assistant｜><think>Ask.</think>\n\n<｜DSML｜tool_calls>\n"
        '<｜DSML｜invoke name="get_weather">\n<｜DSML｜parameter name="city" string="true">Oslo</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="at" string="false">[1, "a"]</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
        "</｜DSML｜tool_calls><｜end▁of▁sentence｜><｜User｜><tool_result>rain</tool_result>\n\nAnd now?"
        "<｜Assistant｜><think>"
    )


def test_thoughts_of_earlier_turns_are_dropped_without_tools() -> None:
    assert (
        rendered(TALK)
        == "<BOS><｜User｜>a<｜Assistant｜></think>b<｜end▁of▁sentence｜><｜User｜>c<｜Assistant｜></think>"
    )
    assert "why" not in rendered(TALK, thinking=True)
    assert "<think>why</think>b" in rendered(TALK, thinking=True, tools=TOOLS)
    assert rendered(TALK, enable_thinking=True) == rendered(TALK, thinking=True)


EFFORT = " (range 1-100, the higher the value, the more thorough the reasoning)\n\n"


def newest(messages: list[dict[str, Any]], **variables: Any) -> str:
    return compiled(DEEPSEEK_V41).render(messages=messages, bos_token="<BOS>", **variables)


def test_v4_1_writes_spaces_in_tags_and_keeps_system_messages_in_their_place() -> None:
    turns = [*TURNS, {"role": "system", "content": "Now in verse."}, {"role": "assistant", "content": "Wet."}]
    assert newest(turns, thinking=False) == (
        "<BOS><｜System｜>Be brief.<｜User｜>Weather?<｜Assistant｜></think>\n\n<｜DSML｜ calls>\n"
        '<｜DSML｜ invoke name="get_weather">\n'
        '<｜DSML｜ parameter name="city" string="true">Oslo</｜DSML｜ parameter>\n'
        '<｜DSML｜ parameter name="days" string="false">3</｜DSML｜ parameter>\n'
        '<｜DSML｜ parameter name="at" string="false">[1, "a"]</｜DSML｜ parameter>\n</｜DSML｜ invoke>\n'
        "</｜DSML｜ calls><｜end▁of▁sentence｜><｜User｜><tool_result>rain</tool_result>\n\nAnd now?"
        "<｜System｜>Now in verse.<｜Assistant｜></think>Wet.<｜end▁of▁sentence｜>"
    )
    with_tools = newest(TALK, tools=TOOLS, thinking=False)
    assert with_tools.startswith("<BOS><｜System｜>\n\n## Tools\n\nYou have")
    assert '<｜DSML｜ invoke name="$TOOL_NAME">' in with_tools
    assert "tool_calls" not in with_tools
    assert newest(TALK[:1], thinking=False) == "<BOS><｜User｜>a"


@pytest.mark.parametrize(
    ("effort", "number"),
    [(None, 75), ("low", 50), ("high", 75), ("max", 100), (1, 1), (100, 100), (101, 75), ("xhigh", 75)],
)
def test_v4_1_s_efforts_are_numbers(effort: str | int | None, number: int) -> None:
    given = {} if effort is None else {"reasoning_effort": effort}
    begin = f"<BOS><｜System｜>Reasoning Effort: {number}{EFFORT}"
    assert newest(TALK, **given, add_generation_prompt=True) == (
        f"{begin}<｜User｜>a<｜Assistant｜></think>b<｜end▁of▁sentence｜><｜User｜>c<｜Assistant｜><think>"
    )
    assert newest(TURNS, **given).startswith(f"{begin}Be brief.<｜User｜>")
    assert "Effort" not in newest(TURNS, enable_thinking=False, **given)


@pytest.mark.parametrize(
    ("model_type", "template"),
    [("deepseek_v4", DEEPSEEK_V4), ("deepseek_v41", DEEPSEEK_V41), ("deepseek_v3", "")],
)
def test_a_checkpoint_without_a_template_gets_it(model_type: str, template: str, tmp_path: Path) -> None:
    core = tokenizers.Tokenizer.from_str(byte_level_json())
    core.add_special_tokens(["｜DSML｜"])
    write_tokenizer(tmp_path, core.to_str(), {"eos_token": "<|im_end|>"})
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    tokenizer = Tokenizer.open(tmp_path)
    assert tokenizer is not None
    assert has_chat_template(tmp_path) == bool(template)
    assert (tokenizer.chat_template or "") == template
    if template:
        assert find_format(tokenizer, template).name == model_type
    (tmp_path / "chat_template.jinja").write_text(f"own {K3_PICTURE}")
    own = Tokenizer.open(tmp_path)
    assert own is not None
    assert own.chat_template == f"own {K3_ROWS}"


def test_a_template_that_llama_cpp_adds_to_v4_prints_pictures() -> None:
    theirs = with_pictures(
        "{%- set dsml_token = '｜DSML｜' -%}{%- for message in messages -%}"
        "{{- '<' + (message['content'] or '') + '>' + message['role'] -}}{%- endfor -%}"
    )
    messages = [*SEEN, {"role": "assistant", "content": None}]
    assert compiled(theirs).render(messages=messages) == f"<a\n\n{V4_PICTURE}\n\nb>user<>assistant"


@pytest.mark.skipif(not LLAMA_CPP, reason="ARGOSY_LLAMA_CPP does not name llama.cpp's sources")
def test_it_renders_as_the_template_that_llama_cpp_adds() -> None:
    source = (Path(LLAMA_CPP) / "models/templates/deepseek-ai-DeepSeek-V4.jinja").read_text()
    theirs = compiled(with_pictures(source))
    cases = ([], TALK, TALK[:2], TURNS, TURNS[1:3], [{"role": "developer", "content": "d"}, *TURNS], SEEN)
    for messages, tools, thinking, effort in product(
        cases, ([], TOOLS), (None, True, False), (None, "max", "high")
    ):
        given = {"tools": tools, "thinking": thinking, "reasoning_effort": effort, "bos_token": "<BOS>"}
        given = {name: value for name, value in given.items() if value is not None}
        assert rendered(messages, **given) == theirs.render(
            messages=messages, add_generation_prompt=True, **given
        )


@pytest.mark.skipif(not LLAMA_CPP, reason="ARGOSY_LLAMA_CPP does not name llama.cpp's sources")
def test_kimi_k3_s_renders_as_the_template_that_llama_cpp_adds() -> None:
    ours, source = compiled(KIMI_K3), (Path(LLAMA_CPP) / "models/templates/Kimi-K3.jinja").read_text()
    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = lambda value, ensure_ascii=False: json.dumps(
        value, ensure_ascii=ensure_ascii
    )
    theirs = environment.from_string(source)
    calls = [
        {"id": "a", **CALLS[0]},
        {"id": "b", "function": {"name": 'cl&"ock', "arguments": {"on": True, "x": None, "o": {"k": 1.5}}}},
    ]
    results = [{"role": "tool", "tool_call_id": one, "content": one} for one in "ab"]
    seen = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}]
    turns = [*TURNS[:2], TURNS[2] | {"tool_calls": calls}, *results, {**TURNS[4], "name": "al"}, *seen]
    for messages, tools, thinking, effort, prompts in product(
        ([], TALK, TALK[:2], turns), ([], TOOLS), (None, True, False), (None, "low", "max"), (True, False)
    ):
        given = {"tools": tools, "thinking": thinking, "thinking_effort": effort}
        given = {name: value for name, value in given.items() if value is not None}
        fixed = {"messages": messages, "add_generation_prompt": prompts}
        made = theirs.render(**fixed, **given).replace(K3_PICTURE, K3_ROWS)
        assert ours.render(**fixed, **given) == made


LOOK = Tool("f", "It's")
DECLARED = "\n\n" + (
    _TOOLS + json.dumps(LOOK.as_template_reads_it()["function"], ensure_ascii=False) + "\n" + _TOOLS_END
).replace("｜DSML｜tool_", "｜DSML｜").replace("｜DSML｜", "｜DSML｜ ")


def encoded(messages: list[dict[str, Any]], tools: list[Tool], effort: int | None) -> str:
    """What DeepSeek-V4.1's own `encoding.py` writes; `effort` is None if it does not think."""
    runs: list[dict[str, Any]] = []
    order: dict[str, int] = {}
    for message in messages:
        if message["role"] not in ("user", "tool"):
            runs.append(message)
        elif runs and runs[-1]["role"] == "user":
            runs[-1]["parts"].append(message)
        else:
            runs.append({"role": "user", "parts": [message]})
    last = max(
        (at for at, run in enumerate(runs) if run["role"] == "user" or (run["role"] == "system" and at)),
        default=-1,
    )
    text = "<BOS>"
    if effort is not None or tools or messages[0]["role"] == "system":
        text += "<｜System｜>"
    if effort is not None:
        text += f"Reasoning Effort: {effort} (range 1-100, the higher the value, the more thorough the reasoning)\n\n"
    if tools and messages[0]["role"] != "system":
        text += DECLARED
    for at, run in enumerate(runs):
        thinks = effort is not None and (bool(tools) or at > last)
        if run["role"] == "system":
            text += "<｜System｜>" if at else ""
            text += run["content"] + (DECLARED if tools and not at else "")
        elif run["role"] == "user":
            results = [one for one in run["parts"] if one["role"] == "tool"]
            ranked = iter(sorted(results, key=lambda one: order.get(one["tool_call_id"], 0)))
            parts = [next(ranked) if one["role"] == "tool" else one for one in run["parts"]]
            text += "<｜User｜>" + "\n\n".join(
                f"<tool_result>{one['content']}</tool_result>" if one["role"] == "tool" else one["content"]
                for one in parts
            )
        else:
            calls = run.get("tool_calls", [])
            order = {call["id"]: number for number, call in enumerate(calls)} if calls else order
            text += (
                (run["reasoning_content"] if thinks else "") + ("</think>" if thinks else "") + run["content"]
            )
            if calls:
                said = ['<｜DSML｜ invoke name="f">\n\n</｜DSML｜ invoke>' for _ in calls]
                text += "\n\n<｜DSML｜ calls>\n" + "\n".join(said) + "\n</｜DSML｜ calls>"
            text += "<｜end▁of▁sentence｜>"
        follows = runs[at + 1]["role"] if at + 1 < len(runs) else "assistant"
        if follows == "assistant" and (run["role"] == "user" or (run["role"] == "system" and at)):
            is_open = effort is not None and (bool(tools) or at >= last)
            text += "<｜Assistant｜>" + ("<think>" if is_open else "</think>")
    return text


def random_messages(rng: np.random.Generator) -> list[dict[str, Any]]:
    """A conversation whose results come in any order, with further instructions and texts among them."""
    words = iter(f"{word}{at}" for at in range(1000) for word in "abc")
    messages: list[dict[str, Any]] = []
    if rng.random() < 0.5:
        messages.append({"role": "system", "content": next(words)})
    for _ in range(rng.integers(1, 5)):
        messages += [{"role": "user", "content": next(words)} for _ in range(rng.integers(1, 3))]
        if rng.random() < 0.3:
            messages.append({"role": "system", "content": next(words)})
        for _ in range(rng.integers(0, 3)):
            ids = [next(words) for _ in range(rng.integers(0, 4))]
            calls = [
                {"id": one, "type": "function", "function": {"name": "f", "arguments": "{}"}} for one in ids
            ]
            said = {"role": "assistant", "content": next(words), "reasoning_content": next(words)}
            messages.append(said | ({"tool_calls": calls} if calls else {}))
            for one in rng.permutation(ids).tolist():
                messages.append({"role": "tool", "tool_call_id": one, "content": next(words)})
                if rng.random() < 0.2:
                    messages.append({"role": "user", "content": next(words)})
            if not ids:
                break
    if messages[-1]["role"] == "assistant":
        messages.append({"role": "user", "content": next(words)})
    return messages


def test_v4_1_s_prompts_are_those_of_its_own_code() -> None:
    core = tokenizers.Tokenizer.from_str(byte_level_json())
    core.add_special_tokens(["<BOS>", "｜DSML｜"])
    config = {"bos_token": "<BOS>", "eos_token": "<|im_end|>"}
    builder = PromptBuilder(
        Tokenizer(core, config=config, chat_template=DEEPSEEK_V41), vocab_size=core.get_vocab_size()
    )
    rng = np.random.default_rng(3)
    for number in range(60):
        messages, tools = random_messages(rng), [LOOK][: number % 2]
        effort = None if number % 3 == 0 else int(rng.integers(1, 101))
        variables = {"thinking": effort is not None} | (
            {} if effort is None else {"reasoning_effort": effort}
        )
        found = builder.apply_template(messages, tools=tools, variables=variables)
        assert found == encoded(messages, tools, effort), messages
    builder.close()
