"""A conversation that ends with an assistant turn is continued: the prompt ends with that turn's text, and the answer
continues it.
"""

from __future__ import annotations

from typing import Any

import pytest

from argosy.config import Grammar
from argosy.errors import UsageError
from argosy.prompt.builder import PromptBuilder
from argosy.prompt.formats import Answer, collect
from argosy.prompt.prompt import Prompt
from argosy.prompt.replay import ReplayMemory
from tests.prompt.families import FAMILIES, TOOLS, Family
from tests.prompt.tokenizers_for_tests import CHATML

NAMES = [name for name in FAMILIES if name != "minimax_spelled"]
USER: list[dict[str, Any]] = [{"role": "user", "content": "Weather?"}]
BEGUN: dict[str, Any] = {"role": "assistant", "content": "It rains, and"}
REST = " it is cold."


@pytest.fixture
def builders() -> dict[str, PromptBuilder]:
    return {name: FAMILIES[name].shared_builder.remembering(ReplayMemory()) for name in NAMES}


def read(family: Family, builder: PromptBuilder, prompt: Prompt, text: str) -> tuple[list[int], Answer]:
    """The token ids and the parsed answer when the model writes `text`, one token per character, and an end token."""
    end = family.tokenizer.control_id(family.ends[0])
    assert end is not None
    ids = [*(token_id for letter in text for token_id in family.tokenizer.encode(letter)), end]
    parser, stream = builder.parser(prompt, TOOLS), family.tokenizer.stream()
    events = [event for token_id in ids for event in parser.push(token_id, stream.push(token_id))]
    return ids, collect([*events, *parser.finish()])


@pytest.mark.parametrize("name", NAMES)
def test_the_prompt_ends_where_the_last_turn_s_text_ends(
    name: str, builders: dict[str, PromptBuilder]
) -> None:
    builder, family = builders[name], FAMILIES[name]
    prompt = builder.build([*USER, BEGUN], tools=TOOLS)
    closed = builder.apply_template([*USER, BEGUN], tools=TOOLS, add_generation_prompt=False)
    assert prompt.is_continued
    assert prompt.text.endswith(BEGUN["content"])
    assert closed.startswith(prompt.text)
    assert closed.count(BEGUN["content"]) == 1
    assert family.tokenizer.decode(prompt.token_ids or (), keep_special=True) == prompt.text
    assert not builder.build(USER, tools=TOOLS).is_continued


@pytest.mark.parametrize("name", NAMES)
def test_the_answer_is_only_the_continuation_and_is_text(
    name: str, builders: dict[str, PromptBuilder]
) -> None:
    builder = builders[name]
    prompt = builder.build([*USER, BEGUN], tools=TOOLS)
    _, answer = read(FAMILIES[name], builder, prompt, REST)
    assert answer == Answer(REST)


# These templates print an earlier turn differently from a turn that is being continued.
CHANGING = ("deepseek_v31", "qwen3", "kimi_k2", "glm", "glm47", "minimax_m2", "harmony")


@pytest.mark.parametrize("name", [name for name in NAMES if name not in CHANGING])
def test_a_continued_turn_keeps_its_tokens_when_it_is_sent_back_as_one_turn(
    name: str, builders: dict[str, PromptBuilder]
) -> None:
    builder, family = builders[name], FAMILIES[name]
    first = builder.build([*USER, BEGUN], tenant="me")
    ids, answer = read(family, builder, first, REST)
    assert builder.remember("me", first, ids, answer)
    whole = {"role": "assistant", "content": BEGUN["content"] + REST}
    again = builder.build([*USER, whole, *USER], tenant="me").token_ids or ()
    kept = (*(first.token_ids or ()), *ids[:-1])
    assert again[: len(kept)] == kept
    plain = builder.build([*USER, whole, *USER]).token_ids or ()
    assert plain[: len(kept)] != kept


@pytest.mark.parametrize("name", ["qwen3", "chatml", "qwen2_5"])
def test_a_truncated_answer_is_continued_with_its_own_tokens(
    name: str, builders: dict[str, PromptBuilder]
) -> None:
    builder, family = builders[name], FAMILIES[name]
    first = builder.build(USER, tenant="me")
    said = "<think>\n\nhm\n\n</think>\n\nIt rains," if name == "qwen3" else "It rains,"
    ids = family.tokenizer.encode_segments([(False, said[: said.index("It")])]) if name == "qwen3" else []
    ids += [token_id for letter in "It rains," for token_id in family.tokenizer.encode(letter)]
    parser, stream = builder.parser(first), family.tokenizer.stream()
    events = [event for token_id in ids for event in parser.push(token_id, stream.push(token_id))]
    assert builder.remember("me", first, ids, collect([*events, *parser.finish(is_cut=True)]))
    more = builder.build([*USER, {"role": "assistant", "content": "It rains,"}], tenant="me")
    assert more.is_continued
    assert more.token_ids == (*(first.token_ids or ()), *ids)


def test_trailing_white_space_is_kept_even_if_the_template_trims(builders: dict[str, PromptBuilder]) -> None:
    for name in NAMES:
        begun = {"role": "assistant", "content": "```python\n"}
        assert builders[name].apply_template([*USER, begun]).endswith("```python\n"), name


def test_marks_in_a_continued_turn_remain_text(builders: dict[str, PromptBuilder]) -> None:
    for name in NAMES:
        family, builder = FAMILIES[name], builders[name]
        plain = builder.build([*USER, BEGUN]).token_ids or ()
        for mark in (*family.marks, "<|im_end|>"):
            if mark in ("<think>", "</think>"):
                continue  # templates remove thoughts from a turn
            begun = {"role": "assistant", "content": f"a {mark} b"}
            ids = builder.build([*USER, begun]).token_ids or ()
            assert [i for i in ids if i in family.tokenizer.control_ids] == [
                i for i in plain if i in family.tokenizer.control_ids
            ], (name, mark)


def test_an_empty_last_assistant_turn_is_ignored(builders: dict[str, PromptBuilder]) -> None:
    empty = {"role": "assistant", "content": ""}
    assert builders["qwen3"].build([*USER, empty]) == builders["qwen3"].build(USER)


def test_a_template_that_changes_the_turn_s_text_cannot_continue_it() -> None:
    shouting = CHATML.replace("message['content']", "message['content'] | upper")
    family = FAMILIES["chatml"]
    for template in (
        shouting,
        CHATML.replace("message['content']", "message['content'] ~ messages[0].content"),
    ):
        builder = type(family)("x", template, family.special, family.structural, family.ends).builder()
        with pytest.raises(UsageError, match="cannot be continued") as caught:
            builder.build([*USER, BEGUN])
        assert "a user message" in str(caught.value.hint)
        builder.close()


def test_a_continuation_cannot_be_forced_into_a_form_or_a_call_but_may_call(
    builders: dict[str, PromptBuilder],
) -> None:
    for name in NAMES:
        builder = builders[name]
        prompt = builder.build([*USER, BEGUN], tools=TOOLS)
        with pytest.raises(UsageError, match="continues the assistant's last message"):
            builder.grammar(prompt, TOOLS, must_call=True)
        with pytest.raises(UsageError, match="continues the assistant's last message"):
            builder.grammar(prompt, form=Grammar(kind="json_object"))
        lazy = builder.grammar(prompt, TOOLS)
        assert lazy is not None
        assert lazy.trigger is not None
        assert lazy.trigger.is_paused == (name == "harmony")
