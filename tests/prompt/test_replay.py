"""Exact replay: an answer keeps its tokens when its conversation comes back, but only where the two match."""

from __future__ import annotations

import json
from array import array
from typing import Any

import pytest

from argosy.prompt.builder import PromptBuilder
from argosy.prompt.formats import Answer, AnsweredCall
from argosy.prompt.messages import check_messages
from argosy.prompt.prompt import Prompt, Trace
from argosy.prompt.replay import Remembered, Rendered, ReplayMemory, read_answer, text_digest
from argosy.prompt.tools import check_tools
from tests.prompt.families import FAMILIES, TOOLS, Family

Message = dict[str, Any]

USER: list[Message] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Weather?"}]


def start(name: str) -> list[Message]:
    """Mistral's template moves the system message to the last question, so with one the prefix changes every turn."""
    return USER[1:] if name == "mistral" else list(USER)


# A model may write arguments with spacing that no template uses, and in any order.
ARGUMENTS = '{"days":2,  "city":"Zürich"}'
CALLING = {
    "qwen2_5": f'<tool_call>{{"name":"get_weather","arguments":{ARGUMENTS}}}</tool_call>',
    "qwen3": f'<think>\n\nhm \n</think>\n<tool_call>\n{{"arguments": {ARGUMENTS}, "name": "get_weather"}}</tool_call>',
    "qwen3_coder": "\n\n<tool_call> <function=get_weather>\n<parameter=days>\n 2\n</parameter>\n\n"
    "<parameter=city>\nZürich\n</parameter></function></tool_call>",
    "deepseek_v3": f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather"
    f"\n```json\n{ARGUMENTS}\n```"
    "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "deepseek_v31": f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{ARGUMENTS}"
    "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "kimi_k2": "<think>hm </think><|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:3"
    f"<|tool_call_argument_begin|>{ARGUMENTS}<|tool_call_end|><|tool_calls_section_end|>",
    "glm": "\n<think>hm</think>\n\n<tool_call>get_weather\n<arg_key>days</arg_key>\n<arg_value>2 </arg_value>\n"
    "<arg_key>city</arg_key><arg_value>Zürich</arg_value></tool_call>",
    "glm47": "\n<think>hm</think><tool_call>get_weather<arg_key>days</arg_key>\n<arg_value>2</arg_value>"
    "<arg_key>city</arg_key><arg_value>Zürich</arg_value></tool_call>",
    "gemma4": "<|channel>thought\nhm\n<channel|>"
    '<|tool_call>call:get_weather{days:2, city:<|"|>Zürich<|"|>}<tool_call|>',
    "harmony": "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary "
    f"to=functions.get_weather <|constrain|>json<|message|>{ARGUMENTS}<|call|>",
    "mistral": f'[TOOL_CALLS][{{"name":"get_weather","arguments":{ARGUMENTS}}}]',
    "mistral_args": f"[THINK]hm[/THINK]\n[TOOL_CALLS]get_weather[ARGS] {ARGUMENTS}",
    "minimax_m2": 'hm\n\n</think>\n<minimax:tool_call><invoke name="get_weather"><parameter name="days">2</parameter>'
    '<parameter name="city">Zürich</parameter></invoke></minimax:tool_call>',
}
TEXTS = {
    "qwen2_5": "It rains.\n",
    "deepseek_v31": "It rains. \n",
    "kimi_k2": "<think></think> It rains.",
    "mistral": "It  rains.",
}


@pytest.fixture
def memory() -> ReplayMemory:
    return ReplayMemory()


@pytest.fixture
def builders(memory: ReplayMemory) -> dict[str, PromptBuilder]:
    return {name: family.shared_builder.remembering(memory) for name, family in FAMILIES.items()}


def sampled_of(family: Family, text: str) -> list[int]:
    """The tokens of an answer, one per character outside marks, so they never equal the encoder's tokens."""
    ids: list[int] = []
    marks = sorted(family.marks, key=len, reverse=True)
    while text:
        mark = next((mark for mark in marks if text.startswith(mark)), None)
        ids += family.tokenizer.encode(text[0]) if mark is None else [family.tokenizer.control_id(mark) or 0]
        text = text[len(mark or "x") :]
    end = family.tokenizer.control_id(family.ends[-1])
    assert end is not None
    return ids if ids[-1] == end else [*ids, end]


def message_of(answer: Answer, **changes: object) -> Message:
    """The message that a client sends back: parsed and serialised again, without thoughts."""
    message: Message = {"role": "assistant", "content": answer.text or None}
    if answer.calls:
        message["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": json.loads(call.arguments)},
            }
            for call in answer.calls
        ]
    return message | changes


def asked(
    builder: PromptBuilder, messages: list[Message], tenant: str | None = "me", **options: Any
) -> Prompt:
    if (
        builder.format.name == "gemma4"
    ):  # otherwise it writes empty thoughts, and leaves them out of earlier turns
        options["variables"] = {"enable_thinking": True}
    return builder.build(messages, tools=TOOLS, tenant=tenant, **options)


def answered(family: Family, builder: PromptBuilder, prompt: Prompt, text: str) -> tuple[list[int], Answer]:
    ids = sampled_of(family, text)
    return ids, read_answer(ids, builder.format, family.tokenizer, check_tools(TOOLS), prompt)


def result_of(answer: Answer, text: str = "rain") -> list[Message]:
    return [{"role": "tool", "tool_call_id": call.id, "content": text} for call in answer.calls]


@pytest.mark.parametrize("name", CALLING)
def test_a_call_keeps_its_tokens(name: str, builders: dict[str, PromptBuilder]) -> None:
    family, builder = FAMILIES[name], builders[name]
    first = asked(builder, start(name))
    ids, answer = answered(family, builder, first, CALLING[name])
    assert [(call.name, json.loads(call.arguments)) for call in answer.calls] == [
        ("get_weather", {"city": "Zürich", "days": 2})
    ]
    assert builder.remember("me", first, ids, answer, TOOLS)
    conversation = [*start(name), message_of(answer), *result_of(answer)]

    again = asked(builder, conversation)
    plain = asked(builder, conversation, tenant=None)
    assert first.token_ids is not None
    assert again.token_ids is not None
    assert plain.token_ids is not None
    kept = [*first.token_ids, *ids[:-1]]
    assert list(again.token_ids[: len(kept)]) == kept
    assert list(plain.token_ids[: len(kept)]) != kept

    # The template writes the rest: it ends the turn and adds the result.
    rest = family.tokenizer.decode(again.token_ids[len(kept) :], keep_special=True)
    assert again.text.endswith(rest)
    assert "rain" in rest
    assert again.token_ids[len(kept)] in family.tokenizer.eos_ids


# DeepSeek-V3's template prompts for the answer to a result in one form and prints that answer in another, so the answer
# is rendered.
@pytest.mark.parametrize("name", [name for name in CALLING if name != "deepseek_v3"])
def test_a_loop_of_calls_keeps_all_its_tokens(name: str, builders: dict[str, PromptBuilder]) -> None:
    family, builder = FAMILIES[name], builders[name]
    conversation = start(name)
    before: tuple[int, ...] = ()
    for number in range(4):
        prompt = asked(builder, conversation)
        assert prompt.token_ids is not None
        assert prompt.token_ids[: len(before)] == before
        ids, answer = answered(family, builder, prompt, CALLING[name].replace("Zürich", f"Zürich {number}"))
        assert builder.remember("me", prompt, ids, answer, TOOLS)
        before = (*prompt.token_ids, *ids[:-1])
        conversation += [message_of(answer), *result_of(answer, f"rain {number}")]


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_answer_keeps_its_tokens(name: str, builders: dict[str, PromptBuilder]) -> None:
    family, builder = FAMILIES[name], builders[name]
    first = builder.build(start(name), tenant="me")
    ids = sampled_of(family, TEXTS[name])
    answer = read_answer(ids, builder.format, family.tokenizer, (), first)
    assert builder.remember("me", first, ids, answer)
    said = [{"role": "assistant", "content": answer.text.strip()}, {"role": "user", "content": "And?"}]
    conversation = [*start(name), *said]
    again = builder.build(conversation, tenant="me")
    assert first.token_ids is not None
    assert again.token_ids is not None
    kept = (*first.token_ids, *ids[:-1])
    assert again.token_ids[: len(kept)] == kept
    assert builder.build(conversation).token_ids[: len(kept)] != kept  # type: ignore[index]
    # The same words in another conversation are a different answer.
    other = [{"role": "user", "content": "Hello?"}, *said]
    assert builder.build(other, tenant="me").token_ids == builder.build(other).token_ids


def remembered(
    builders: dict[str, PromptBuilder], name: str = "qwen3"
) -> tuple[PromptBuilder, list[Message], Answer]:
    builder = builders[name]
    first = asked(builder, USER)
    ids, answer = answered(FAMILIES[name], builder, first, CALLING[name])
    assert builder.remember("me", first, ids, answer, TOOLS)
    conversation = [*USER, message_of(answer), *result_of(answer)]
    assert asked(builder, conversation).token_ids != asked(builder, conversation, tenant=None).token_ids
    return builder, conversation, answer


def is_plain(builder: PromptBuilder, conversation: list[Message], tenant: str = "me", **options: Any) -> bool:
    built = asked(builder, conversation, tenant, **options)
    plain = asked(builder, conversation, None, **options)
    return (built.token_ids, built.text) == (plain.token_ids, plain.text)


def test_another_tenant_does_not_get_the_answer_back(builders: dict[str, PromptBuilder]) -> None:
    builder, conversation, _ = remembered(builders)
    assert is_plain(builder, conversation, "you")


def test_a_changed_answer_is_rendered(builders: dict[str, PromptBuilder]) -> None:
    builder, conversation, answer = remembered(builders)
    at = len(USER)
    call = conversation[at]["tool_calls"][0]
    other = call | {"function": {"name": "get_weather", "arguments": {"city": "Rome", "days": 2}}}
    renamed = call | {"function": call["function"] | {"name": "clock"}}
    for changed in (
        message_of(answer, content="So:"),
        message_of(answer, reasoning_content="other thoughts"),
        message_of(answer, tool_calls=[other]),
        message_of(answer, tool_calls=[renamed]),
        message_of(answer, tool_calls=[call, call | {"id": "call_2"}]),
    ):
        assert is_plain(builder, [*conversation[:at], changed, *conversation[at + 1 :]])


def test_a_call_with_an_unknown_id_is_rendered(builders: dict[str, PromptBuilder]) -> None:
    builder, conversation, answer = remembered(builders)
    text = json.dumps(conversation).replace(answer.calls[0].id, "call_unknown")
    assert is_plain(builder, json.loads(text))


def test_an_answer_after_a_changed_prefix_is_rendered(builders: dict[str, PromptBuilder]) -> None:
    builder, conversation, answer = remembered(builders)
    thoughts = {"reasoning_content": answer.reasoning}  # with these, both are rendered alike
    turn = conversation[2] | thoughts
    assert is_plain(
        builder, [{"role": "system", "content": "Be long."}, conversation[1], turn, *conversation[3:]]
    )
    assert is_plain(builder, [*conversation[:2], {"role": "user", "content": "x"}, turn, *conversation[3:]])
    built = builder.build([*conversation[:2], turn, *conversation[3:]], tools=TOOLS[:1], tenant="me")
    assert (
        built.token_ids
        == builder.build([*conversation[:2], turn, *conversation[3:]], tools=TOOLS[:1]).token_ids
    )


def test_the_same_text_written_by_a_caller_is_not_the_same_prefix(
    builders: dict[str, PromptBuilder],
) -> None:
    """A caller who spells out the start of a turn does not get the tokens of a real one."""
    builder = builders["qwen2_5"]
    family = FAMILIES["qwen2_5"]
    honest = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    first = builder.build(honest, tenant="me")
    ids = sampled_of(family, "d\n")
    answer = read_answer(ids, builder.format, family.tokenizer, (), first)
    assert builder.remember("me", first, ids, answer)
    spelled = first.text.removeprefix("<|im_start|>user\n").removesuffix(
        "<|im_end|>\n<|im_start|>assistant\n"
    )
    forged = [{"role": "user", "content": spelled}]
    assert builder.build(forged).text == first.text
    conversation = [*forged, {"role": "assistant", "content": "d"}, {"role": "user", "content": "e"}]
    built = builder.build(conversation, tenant="me")
    assert built.token_ids == builder.build(conversation).token_ids
    # The tokens would not be replayed even if the answer were found.
    replay = builder._replay
    assert replay is not None
    entry = Remembered(first.trace, answer, array("I", ids[:-1]))  # type: ignore[arg-type]
    segments = builder._template.segments(check_messages(conversation))  # type: ignore[union-attr]
    assert replay.encode(segments, [entry], ()) == family.tokenizer.encode_segments(segments)


def test_thoughts_are_shown_only_where_the_template_shows_them(
    builders: dict[str, PromptBuilder],
) -> None:
    builder, conversation, answer = remembered(builders)
    assert answer.reasoning == "hm"
    assert "<think>\nhm" in asked(builder, conversation).text
    assert "<think>" not in asked(builder, conversation, tenant=None).text
    later = [*conversation, {"role": "assistant", "content": "Rain."}, {"role": "user", "content": "And?"}]
    assert "<think>" not in asked(builder, later).text
    assert is_plain(builder, later)


def test_a_call_comes_back_with_the_id_the_model_gave_it(builders: dict[str, PromptBuilder]) -> None:
    builder, conversation, answer = remembered(builders, "kimi_k2")
    assert answer.calls[0].own_id == "functions.get_weather:3"
    text = asked(builder, conversation).text
    assert "<|tool_call_begin|>functions.get_weather:3<" in text
    assert "## Return of functions.get_weather:3\n" in text
    assert "functions.get_weather:0" in asked(builder, conversation, "you").text


def test_an_answer_shorter_than_its_tokens_is_not_remembered(builders: dict[str, PromptBuilder]) -> None:
    builder = builders["qwen2_5"]
    first = builder.build(USER, tenant="me")
    ids = sampled_of(FAMILIES["qwen2_5"], "one STOP two")
    assert not builder.remember("me", first, ids, Answer("one "))
    assert builder.remember("me", first, ids, Answer("one STOP two"))
    assert not builder.remember("me", first, ids[-1:], Answer(""))


def test_the_template_ends_an_answer_that_has_no_end_token(builders: dict[str, PromptBuilder]) -> None:
    builder = builders["qwen2_5"]
    first = builder.build(USER, tenant="me")
    ids = sampled_of(FAMILIES["qwen2_5"], "It rains")[:-1]
    assert builder.remember("me", first, ids, Answer("It rains"))
    conversation = [*USER, {"role": "assistant", "content": "It rains"}, {"role": "user", "content": "x"}]
    again = builder.build(conversation, tenant="me").token_ids
    assert first.token_ids is not None
    assert again is not None
    kept = (*first.token_ids, *ids)
    assert again[: len(kept)] == kept
    assert again[len(kept)] in FAMILIES["qwen2_5"].tokenizer.eos_ids


def test_nothing_is_remembered_without_messages_or_a_memory(builders: dict[str, PromptBuilder]) -> None:
    builder = builders["qwen2_5"]
    assert not builder.remember("me", builder.build([1, 2]), [3], Answer("x"))
    assert not builder.remember("me", builder.build(USER), [3], Answer("x"))
    bare = FAMILIES["qwen2_5"].shared_builder
    prompt = bare.build(USER, tenant="me")
    assert prompt == builder.build(USER)
    assert not bare.remember("me", prompt, [3], Answer("x"))


def test_a_forgotten_tenant_and_a_forgotten_answer_are_rendered(
    builders: dict[str, PromptBuilder], memory: ReplayMemory
) -> None:
    builder, conversation, _ = remembered(builders)
    memory.forget("me")
    assert is_plain(builder, conversation)
    assert memory.num_turns == memory.nbytes == 0


def test_an_answer_is_rendered_if_an_earlier_one_is_forgotten() -> None:
    family = FAMILIES["qwen2_5"]
    memory = ReplayMemory(max_turns=1)
    builder = family.shared_builder.remembering(memory)
    conversation = list(USER)
    for _ in range(2):
        prompt = asked(builder, conversation)
        ids, answer = answered(family, builder, prompt, CALLING["qwen2_5"])
        assert builder.remember("me", prompt, ids, answer, TOOLS)
        conversation += [message_of(answer), *result_of(answer)]
    assert memory.num_turns == 1
    assert is_plain(builder, conversation)


# The memory


def turn(num_ids: int = 10, text: str = "x") -> Remembered:
    calls = (AnsweredCall("i", "f", "{}"),)
    return Remembered(Trace(1, b"", b"", b""), Answer(text, "", calls), array("I", range(num_ids)))


def test_the_memory_is_bounded_by_count_and_by_bytes() -> None:
    memory = ReplayMemory(max_turns=3)
    for number in range(5):
        memory.put("a", b"%d" % number, turn())
    assert memory.num_turns == 3
    assert [memory.get("a", b"%d" % number) is not None for number in range(5)] == [
        False,
        False,
        True,
        True,
        True,
    ]
    memory = ReplayMemory(max_bytes=3 * turn(1000).nbytes)
    for number in range(9):
        memory.put("a", b"%d" % number, turn(1000))
        memory.put("a", b"%d" % number, turn(1000))  # storing the same answer again counts once
    assert memory.num_turns == 3
    assert memory.nbytes == 3 * turn(1000).nbytes
    memory.put("a", b"huge", turn(10**6))
    assert memory.num_turns == 0


def test_used_answers_stay_and_one_tenant_does_not_evict_another() -> None:
    memory = ReplayMemory(max_turns=4)
    memory.put("quiet", b"only", turn())
    for number in range(20):
        memory.put("busy", b"%d" % number, turn())
        memory.touch("busy", [b"0", b"none"])
        memory.touch("nobody", [b"0"])
        assert memory.get("busy", b"0") is not None
    assert memory.get("quiet", b"only") is not None
    assert memory.num_turns == 4


def test_the_start_of_a_conversation_is_forgotten_last() -> None:
    family = FAMILIES["qwen2_5"]
    memory = ReplayMemory(max_turns=3)
    builder = family.shared_builder.remembering(memory)
    conversation = list(USER)
    said = []
    for _ in range(6):
        prompt = asked(builder, conversation)
        ids, answer = answered(family, builder, prompt, CALLING["qwen2_5"])
        assert builder.remember("me", prompt, ids, answer, TOOLS)
        conversation += [message_of(answer), *result_of(answer)]
        said.append(answer.calls[0].id)
    kept = [memory.get("me", b"call " + call_id.encode()) is not None for call_id in said]
    assert kept == [True, True, False, False, False, True]
    assert not is_plain(builder, conversation)
    builder.close()


def test_a_changed_prefix_costs_one_encoding(
    builders: dict[str, PromptBuilder], monkeypatch: pytest.MonkeyPatch
) -> None:
    family, builder = FAMILIES["qwen2_5"], builders["qwen2_5"]
    conversation = list(USER)
    for _ in range(5):
        prompt = asked(builder, conversation)
        ids, answer = answered(family, builder, prompt, CALLING["qwen2_5"])
        assert builder.remember("me", prompt, ids, answer, TOOLS)
        conversation += [message_of(answer), *result_of(answer)]
    calls: list[int] = []
    encode = family.tokenizer.encode_segments
    monkeypatch.setattr(
        family.tokenizer,
        "encode_segments",
        lambda segments, **more: calls.append(1) or encode(segments, **more),
    )
    asked(builder, [{"role": "system", "content": "Be long."}, *conversation[1:]])
    assert len(calls) == 1


def test_a_slice_of_segments_keeps_who_wrote_what() -> None:
    segments = [(False, "ab"), (True, "cde"), (False, "f")]
    assert Rendered(segments).cut(1, 4) == [(False, "b"), (True, "cd")]
    assert Rendered(segments).cut(0, 6) == segments
    assert Rendered(segments).cut(3, 3) == []
    assert text_digest([(False, "ab")]) != text_digest([(True, "ab")])
    assert text_digest([(False, "a"), (True, "b")]) != text_digest([(False, "ab")])
