"""Optional tool calls: text before a call is free, and from its mark on the call is constrained to its tool."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from argosy.config import Grammar, Trigger
from argosy.engine.grammar.constraint import Constraint, GrammarCompiler
from argosy.errors import GrammarError, Overloaded, UsageError
from argosy.prompt.prompt import Prompt
from tests.prompt.families import EVERY_FAMILY as FAMILIES
from tests.prompt.families import TOOLS
from tests.prompt.test_grammars import CALLING, OSLO, TWO, ids_of
from tests.prompt.test_grammars import ONE as ONE_FORCED

# In gpt-oss the header of an optional call is free; the call is constrained from its recipient on.
ONE = ONE_FORCED | {
    "harmony": "<|channel|>analysis<|message|>hm<|end|><|start|>assistant" + ONE_FORCED["harmony"]
}
FREE = "Let me look: "


def grammar_of(name: str, tools: Any = TOOLS, text: str = "ai\n", **more: Any) -> Grammar:
    builder = FAMILIES[name].shared_builder
    prompt = Prompt(tuple(ids_of(FAMILIES[name], text)), text)
    grammar = builder.grammar(prompt, tools, **more)
    assert grammar is not None
    return grammar


def constraint_of(name: str, grammar: Grammar) -> Constraint:
    tokenizer = FAMILIES[name].tokenizer
    end_ids = list(tokenizer.eos_ids) or [0]
    return GrammarCompiler(tokenizer, vocab_size=tokenizer.vocab_size, end_ids=end_ids).compile(grammar)


def follow(constraint: Constraint, name: str, text: str) -> str:
    """Return how much of `text` is accepted: all of it, or up to the first forbidden token."""
    taken = []
    for token_id in ids_of(FAMILIES[name], text):
        allowed = constraint.allowed()
        if (allowed is not None and not allowed[token_id]) or not constraint.accept(token_id):
            break
        taken.append(token_id)
    return FAMILIES[name].tokenizer.decode(taken, keep_special=True)


def may_end(constraint: Constraint, name: str) -> bool:
    allowed = constraint.allowed()
    return (
        constraint.is_finished
        or allowed is None
        or bool(allowed[list(FAMILIES[name].tokenizer.eos_ids)].all())
    )


@pytest.mark.parametrize("name", CALLING)
def test_text_is_free_up_to_the_mark_and_a_call_is_accepted_after_it(name: str) -> None:
    constraint = constraint_of(name, grammar_of(name))
    assert follow(constraint, name, FREE) == FREE
    assert constraint.allowed() is None
    assert may_end(constraint, name)
    assert follow(constraint, name, ONE[name]) == ONE[name]
    assert constraint.allowed() is not None
    assert may_end(constraint, name)


@pytest.mark.parametrize("name", CALLING)
def test_an_unknown_tool_or_argument_cannot_be_written_after_the_mark(name: str) -> None:
    for right, wrong in (("get_weather", "rm"), ("city", "town")):
        text = ONE[name].replace(right, wrong)
        taken = follow(constraint_of(name, grammar_of(name)), name, text)
        assert len(taken) < text.index(wrong) + len(wrong)


@pytest.mark.parametrize("name", sorted(TWO))
def test_one_call_ends_the_answer_when_calls_are_not_parallel(name: str) -> None:
    constraint = constraint_of(name, grammar_of(name))
    assert follow(constraint, name, FREE + TWO[name]) == FREE + TWO[name]
    alone = constraint_of(name, grammar_of(name, parallel=False))
    taken = follow(alone, name, FREE + TWO[name])
    assert taken.count("get_weather") == 1
    assert "clock" not in taken
    # If marks around all calls are still open, they must be closed; otherwise nothing more may follow.
    assert follow(alone, name, (FREE + ONE[name]).removeprefix(taken)) == (FREE + ONE[name]).removeprefix(
        taken
    )
    assert alone.is_finished


@pytest.mark.parametrize("name", ["qwen3", "deepseek_v31", "kimi_k2", "glm", "minimax_m2", "minimax_spelled"])
def test_a_mark_among_thoughts_does_not_start_a_call(name: str) -> None:
    mark = next(iter(FAMILIES[name].shared_builder.format.blocks))  # type: ignore[attr-defined]
    for prompt, opening in (("ai\n", "<think>"), ("ai\n<think>\n", "")):
        constraint = constraint_of(name, grammar_of(name, text=prompt))
        thought = f"{opening}I could write {mark} here</think>"
        assert follow(constraint, name, thought) == thought
        assert constraint.allowed() is None
        assert follow(constraint, name, ONE[name]) == ONE[name]
        assert constraint.allowed() is not None


def test_gpt_oss_text_is_free_and_only_a_recipient_is_constrained() -> None:
    said = "<|channel|>final<|message|>Write to=functions.rm and <|end|>"
    constraint = constraint_of("harmony", grammar_of("harmony"))
    assert follow(constraint, "harmony", said) == said
    assert constraint.allowed() is None
    for header in (
        "<|start|>assistant to=functions.get_weather<|channel|>commentary<|message|>",
        "<|start|>assistant<|channel|>commentary to=functions.get_weather<|message|>",
        "<|start|>assistant<|channel|>commentary to=functions.get_weather json<|message|>",
    ):
        constraint = constraint_of("harmony", grammar_of("harmony"))
        assert follow(constraint, "harmony", said + header + OSLO) == said + header + OSLO
        assert constraint.is_finished


def test_qwen_coder_may_leave_out_the_mark_around_a_function() -> None:
    bare = "<function=get_weather>\n<parameter=city>\nOslo\n</parameter>\n</function>"
    constraint = constraint_of("qwen3_coder", grammar_of("qwen3_coder"))
    assert follow(constraint, "qwen3_coder", FREE + bare) == FREE + bare
    assert may_end(constraint, "qwen3_coder")
    constraint = constraint_of("qwen3_coder", grammar_of("qwen3_coder"))
    assert "rm>" not in follow(constraint, "qwen3_coder", FREE + bare.replace("get_weather", "rm"))


# Schemas that cannot be followed


def tool(name: str, value: dict[str, Any], *, strict: bool | None = None, **more: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"value": value}, "required": ["value"]}
    return {"type": "function", "function": {"name": name, "parameters": parameters | more, "strict": strict}}


def call(name: str, value: object) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {{"value": {json.dumps(value)}}}}}\n</tool_call>'


odd_schemas = pytest.mark.parametrize(
    "odd",
    [
        {"type": "string", "pattern": "^(?=a)b"}, {"$ref": "#/nope"}, {"type": "text"}, {"$ref": "http://127.0.0.1/x"},
        {"type": "string", "pattern": "a" * 2000},
    ],
)  # fmt: skip


@odd_schemas
def test_a_schema_that_cannot_be_followed_leaves_only_its_tool_unconstrained(odd: dict[str, Any]) -> None:
    tools = [tool("odd", odd), tool("even", {"type": "integer"})]
    grammar = grammar_of("qwen3", tools)
    assert follow(constraint_of("qwen3", grammar), "qwen3", call("odd", "b")) == call("odd", "b")
    assert follow(constraint_of("qwen3", grammar), "qwen3", call("even", 3)) == call("even", 3)
    assert follow(constraint_of("qwen3", grammar), "qwen3", call("even", "three")) != call("even", "three")
    with pytest.raises(GrammarError):
        constraint_of("qwen3", grammar_of("qwen3", tools, must_call=True))


@odd_schemas
def test_a_strict_tool_is_constrained_or_refused_and_leaves_the_others_unconstrained(
    odd: dict[str, Any],
) -> None:
    tools = [tool("odd", odd), tool("even", {"type": "integer"}, strict=True)]
    grammar = grammar_of("qwen3", tools)
    assert follow(constraint_of("qwen3", grammar), "qwen3", FREE + call("odd", "b")) == FREE + call(
        "odd", "b"
    )
    assert follow(constraint_of("qwen3", grammar), "qwen3", call("even", 3)) == call("even", 3)
    assert follow(constraint_of("qwen3", grammar), "qwen3", call("even", "three")) != call("even", "three")
    with pytest.raises(GrammarError):
        constraint_of("qwen3", grammar_of("qwen3", [tool("odd", odd, strict=True), tools[1]]))


def test_a_strict_tool_follows_every_keyword_and_is_refused_when_memory_is_short() -> None:
    unique = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}
    with pytest.raises(GrammarError, match="uniqueItems"):
        constraint_of("qwen3", grammar_of("qwen3", [tool("f", unique, strict=True)]))
    assert not grammar_of("qwen3", [tool("f", {}, strict=True), tool("g", {})]).is_lenient
    tokenizer = FAMILIES["qwen3"].tokenizer
    compiler = GrammarCompiler(tokenizer, vocab_size=tokenizer.vocab_size, end_ids=tokenizer.eos_ids)
    large = [{"enum": [f"word {number} {at}" for at in range(6000)]} for number in range(3)]
    followed = [compiler.compile(grammar_of("qwen3", [tool("f", schema)])) for schema in large[:2]]
    with pytest.raises(Overloaded, match="take all the memory for grammars"):
        compiler.compile(grammar_of("qwen3", [tool("f", large[2], strict=True)]))
    assert followed


@pytest.mark.parametrize("name", CALLING)
def test_a_strict_tool_can_be_called_in_every_format(name: str) -> None:
    tools = [{**one, "function": {**one["function"], "strict": True}} for one in TOOLS]
    for given in (tools, [tools[0], *TOOLS[1:]], [*TOOLS[:1], *tools[1:]]):
        constraint = constraint_of(name, grammar_of(name, given))
        assert follow(constraint, name, FREE + ONE[name]) == FREE + ONE[name]
        taken = follow(constraint_of(name, grammar_of(name, given)), name, ONE[name].replace("city", "town"))
        assert "town" not in taken


def test_a_keyword_that_cannot_be_followed_is_left_out_of_its_schema() -> None:
    tools = [tool("f", {"type": "array", "items": {"type": "integer"}, "uniqueItems": True})]
    grammar = grammar_of("qwen3", tools)
    assert follow(constraint_of("qwen3", grammar), "qwen3", call("f", [1, 1])) == call("f", [1, 1])
    assert follow(constraint_of("qwen3", grammar), "qwen3", call("f", ["1"])) != call("f", ["1"])


def test_many_tools_with_long_descriptions_all_follow_their_schemas() -> None:
    more = {"description": "long " * 500}
    tools = [tool(f"tool_{number}", {"type": "integer", **more}, **more) for number in range(200)]
    grammar = grammar_of("qwen3", tools)
    assert "long" not in grammar.text
    assert follow(constraint_of("qwen3", grammar), "qwen3", call("tool_199", 1)) == call("tool_199", 1)
    assert follow(constraint_of("qwen3", grammar), "qwen3", call("tool_7", "x")) != call("tool_7", "x")


def test_a_parameter_that_is_called_description_is_not_a_description() -> None:
    tools = [
        tool(
            "f",
            {"type": "integer"},
            properties={"description": {"type": "integer", "title": "x"}},
            required=[],
        )
    ]
    grammar = grammar_of("qwen3", tools)
    text = '<tool_call>\n{"name": "f", "arguments": {"description": 3}}\n</tool_call>'
    assert follow(constraint_of("qwen3", grammar), "qwen3", text) == text
    assert "title" not in grammar.text


def test_a_lenient_grammar_that_takes_too_much_work_stops_constraining_the_answer() -> None:
    class Broken:
        def __init__(self, matcher: Any) -> None:
            self.matcher = matcher

        def is_error(self) -> bool:
            return True

        def get_error(self) -> str:
            return "too much"

        def __getattr__(self, name: str) -> Any:
            return getattr(self.matcher, name)

    for is_lenient in (True, False):
        grammar = replace(grammar_of("qwen3"), is_lenient=is_lenient)
        constraint = constraint_of("qwen3", grammar)
        assert follow(constraint, "qwen3", "<tool_call>") == "<tool_call>"
        constraint._matcher = Broken(constraint._matcher)
        if not is_lenient:
            with pytest.raises(GrammarError, match="too much"):
                constraint.allowed()
            continue
        assert constraint.allowed() is None
        assert constraint.accept(3)
        assert not constraint.is_finished


def test_the_memory_of_all_followed_grammars_is_bounded() -> None:
    tokenizer = FAMILIES["qwen3"].tokenizer
    compiler = GrammarCompiler(tokenizer, vocab_size=tokenizer.vocab_size, end_ids=tokenizer.eos_ids)

    def tools(number: int) -> list[dict[str, Any]]:
        words = [f"word {number} {at}" for at in range(6000)]
        return [tool("f", {"enum": words}), tool("g", {"type": "integer"})]

    def compiled(number: int, **more: Any) -> Constraint:
        return compiler.compile(grammar_of("qwen3", tools(number), **more))

    followed = [compiled(number) for number in range(2)]
    assert follow(followed[0], "qwen3", call("f", "other")) != call("f", "other")
    with pytest.raises(Overloaded, match="take all the memory for grammars"):
        compiled(2, must_call=True)
    # Without room the schema is not followed, and the answer is not refused.
    assert follow(compiled(3), "qwen3", call("f", "other")) == call("f", "other")
    # A grammar that is followed already needs no more room.
    assert follow(compiled(1), "qwen3", call("f", "other")) != call("f", "other")
    followed.pop()
    assert follow(compiled(3), "qwen3", call("f", "other")) != call("f", "other")
    small = grammar_of("qwen3")
    assert follow(compiler.compile(small), "qwen3", ONE["qwen3"]) == ONE["qwen3"]


# Triggers


def test_the_first_of_several_words_triggers_the_grammar_and_is_part_of_it_if_so_declared() -> None:
    tokenizer = FAMILIES["qwen3"].tokenizer
    compiler = GrammarCompiler(tokenizer, vocab_size=tokenizer.vocab_size, end_ids=tokenizer.eos_ids)

    def start(text: str, **more: Any) -> Constraint:
        return compiler.compile(Grammar(kind="lark", text=text, trigger=Trigger(("<<a", "<<"), **more)))

    part = start('start: ("<<a" | "<<") "x"', is_part=True)
    assert follow(part, "qwen3", "b <<ax") == "b <<ax"
    assert part.is_finished
    behind = start('start: "x"')
    assert follow(behind, "qwen3", "b <<x") == "b <<x"
    assert behind.is_finished
    allowed = start('start: "x"')
    follow(allowed, "qwen3", "b <<")
    mask = allowed.allowed()
    assert mask is not None
    assert {tokenizer.token_bytes(int(i)) for i in np.flatnonzero(mask)} == {b"x"}


def test_pauses_and_resumes_are_found_across_tokens_and_within_one() -> None:
    tokenizer = FAMILIES["qwen3"].tokenizer
    compiler = GrammarCompiler(tokenizer, vocab_size=tokenizer.vocab_size, end_ids=tokenizer.eos_ids)
    trigger = Trigger(("GO",), pauses=("[[",), resumes=("]]",), is_paused=True)
    constraint = compiler.compile(Grammar(kind="regex", text="x", trigger=trigger))
    free = "GO ]] [[ GO [[ ]]]] [ [GO"
    for text in ("GO ]", "] a [", "[ GO [[ ]", "] [ [ G"):
        assert follow(constraint, "qwen3", text) == text
        assert constraint.allowed() is None, free
    follow(constraint, "qwen3", "O")
    assert constraint.allowed() is not None


def test_an_invalid_trigger_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match="a trigger needs a word"):
        Trigger(())
    for words in (
        {"words": ("",)},
        {"words": ("a",), "pauses": ("",)},
        {"words": ((1, ""),)},
        {"words": ((),)},
    ):
        with pytest.raises(UsageError, match="a trigger must hold at least one character"):
            Trigger(**words)
