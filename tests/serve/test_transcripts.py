"""Every dialect answers as recorded, except for ids and times, and no transcript breaks a wire rule."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.serve import record
from tests.serve.record import CASES, FOLDER, Transcript, load
from tests.serve.wire_rules import RULES, data_of

KEPT = {path.stem: load(path.stem) for path in sorted(FOLDER.glob("*.json"))}


@pytest.fixture(scope="module")
def replayed() -> dict[str, Transcript]:
    """All cases, replayed in the order of recording, because prefix-cache hits depend on it."""
    with record.own_server() as client:
        return {name: record.record(client, name) for name in CASES}


def same(ours: Any, kept: Any) -> bool:
    """Whether both are equal; numbers computed from logits may differ slightly between instruction sets."""
    if isinstance(kept, dict):
        return (
            isinstance(ours, dict)
            and ours.keys() == kept.keys()
            and all(same(ours[key], kept[key]) for key in kept)
        )
    if isinstance(kept, list):
        return isinstance(ours, list) and len(ours) == len(kept) and all(map(same, ours, kept))
    if isinstance(kept, float):
        return isinstance(ours, float) and abs(ours - kept) < 0.01
    return type(ours) is type(kept) and bool(ours == kept)


@pytest.mark.parametrize("name", CASES)
def test_a_transcript_is_answered_as_recorded(name: str, replayed: dict[str, Transcript]) -> None:
    ours, kept = replayed[name], KEPT[name]
    assert same(ours, kept), (
        f"{json.dumps(ours)[:4000]}\n{json.dumps(kept)[:4000]}\nif this is meant: python -m tests.serve.record"
    )


def test_every_case_has_a_transcript_and_every_transcript_a_case() -> None:
    assert sorted(KEPT) == sorted(CASES)


@pytest.mark.parametrize("rule", RULES)
def test_no_transcript_breaks_the_rule(rule: str) -> None:
    found = [name for name, transcript in KEPT.items() if RULES[rule].is_for(name, transcript)]
    assert found
    for name in found:
        RULES[rule].check(KEPT[name], KEPT.get(name.removesuffix("_stream")))


# Each rule refuses a transcript that breaks it

Edit = Callable[[Transcript], None]


def event(transcript: Transcript, kind: str, at: int = 0) -> dict[str, Any]:
    """The data of one event of this type."""
    found: dict[str, Any] = [data for data in data_of(transcript) if data.get("type") == kind][at]
    return found


def choice(transcript: Transcript, at: int) -> dict[str, Any]:
    """The choice of a chunk."""
    found: dict[str, Any] = data_of(transcript)[at]["choices"][0]
    return found


def calls(transcript: Transcript) -> list[dict[str, Any]]:
    """The parts of tool calls in the chunks."""
    chunks = (data["choices"] for data in data_of(transcript) if data["choices"])
    return [part for (one,) in chunks for part in one["delta"].get("tool_calls", ())]


def without(kind: str) -> Edit:
    """Remove the events of this type."""

    def edit(transcript: Transcript) -> None:
        transcript["events"] = [
            e for e in transcript["events"] if e["data"] == "[DONE]" or e["data"].get("type") != kind
        ]

    return edit


def put(path: str, value: Any) -> Edit:
    """Put another value into a body."""

    def edit(transcript: Transcript) -> None:
        *steps, last = path.split(".")
        target: Any = transcript
        for step in steps:
            target = target[int(step) if step.isdecimal() else step]
        target[int(last) if last.isdecimal() else last] = value

    return edit


def repeat(at: int) -> Edit:
    return lambda transcript: transcript["events"].insert(at, copy.deepcopy(transcript["events"][at]))


def drop(at: int) -> Edit:
    return lambda transcript: transcript["events"].__delitem__(at)


def swap(at: int) -> Edit:
    return lambda transcript: transcript["events"].insert(at, transcript["events"].pop(at + 1))


BREAKS: list[tuple[str, str, Edit]] = [
    ("a_stream_says_that_it_is_one_and_anything_else_is_json", "chat_plain_stream",
     put("headers.content-type", "text/plain")),
    ("a_stream_says_that_it_is_one_and_anything_else_is_json", "chat_plain", put("headers.cache-control", "public")),
    ("an_error_has_its_dialects_shape", "messages_unknown_field", put("body.error.code", None)),
    ("an_error_has_its_dialects_shape", "chat_unknown_field", put("body.type", "error")),
    ("an_error_has_its_dialects_shape", "responses_unknown_field", put("status", 500)),
    ("a_prompt_that_is_too_long_says_both_numbers", "chat_too_long",
     put("body.error.message", "it has 9 tokens too many")),
    ("a_prompt_that_is_too_long_says_both_numbers", "chat_too_long", put("body.error.code", None)),
    ("an_error_is_the_last_event", "chat_failed_stream", swap(-2)),
    ("an_error_is_the_last_event", "responses_failed_stream", repeat(-1)),
    ("a_stream_says_what_the_whole_answer_says", "chat_plain_stream", drop(3)),
    ("a_stream_says_what_the_whole_answer_says", "chat_logprobs_stream", lambda t: choice(t, 3).pop("logprobs")),
    ("a_stream_says_what_the_whole_answer_says", "completions_plain_stream", drop(3)),
    ("a_stream_says_what_the_whole_answer_says", "messages_tools_stream", without("content_block_delta")),
    ("a_stream_says_what_the_whole_answer_says", "responses_tools_stream",
     lambda t: event(t, "response.completed")["response"]["output"].pop()),
    ("usage_adds_up", "chat_plain", put("body.usage.total_tokens", 1)),
    ("usage_adds_up", "responses_plain", put("body.usage.total_tokens", 1)),
    ("usage_adds_up", "messages_plain", put("body.usage.input_tokens", 0)),
    ("streamed_usage_adds_up_and_is_that_of_the_whole_answer", "chat_several_stream",
     lambda t: data_of(t)[-1]["usage"].update(completion_tokens=1, total_tokens=26)),
    ("chunks_of_a_chat_have_one_id_time_and_model_and_no_field_of_our_own", "chat_plain_stream",
     lambda t: data_of(t)[2].update(id="chatcmpl-9")),
    ("chunks_of_a_chat_have_one_id_time_and_model_and_no_field_of_our_own", "chat_plain_stream",
     lambda t: data_of(t)[2].update(timings={})),
    ("the_role_comes_once_and_first", "chat_plain_stream", lambda t: choice(t, 2)["delta"].update(role="assistant")),
    ("the_role_comes_once_and_first", "chat_plain_stream", drop(0)),
    ("a_delta_says_something_unless_it_ends_the_choice_or_has_scores", "chat_plain_stream",
     lambda t: choice(t, 2)["delta"].update(content="")),
    ("a_calls_id_and_name_come_before_its_arguments_and_once", "chat_tools_stream",
     lambda t: calls(t)[1].update(id="x")),
    ("a_calls_id_and_name_come_before_its_arguments_and_once", "chat_tools_stream", swap(-6)),
    ("calls_are_numbered_from_zero_one_after_the_other", "chat_tools_stream",
     lambda t: [part.update(index=part["index"] + 1) for part in calls(t)]),
    ("calls_are_numbered_from_zero_one_after_the_other", "chat_tools_stream", lambda t: calls(t)[1].update(index=5)),
    ("arguments_are_text_and_together_the_json_of_an_object", "chat_tools_stream",
     lambda t: calls(t)[1]["function"].update(arguments={"city": "Oslo"})),
    ("arguments_are_text_and_together_the_json_of_an_object", "chat_tools_stream",
     lambda t: calls(t)[1]["function"].update(arguments="{")),
    ("a_choice_ends_once_with_an_empty_delta_and_the_right_reason", "chat_tools_stream",
     lambda t: choice(t, -1).update(finish_reason="stop")),
    ("a_choice_ends_once_with_an_empty_delta_and_the_right_reason", "chat_plain_stream",
     lambda t: choice(t, 3).update(finish_reason="stop")),
    ("a_choice_ends_once_with_an_empty_delta_and_the_right_reason", "chat_plain_stream", drop(-2)),
    ("a_whole_message_has_a_role_and_text_or_calls", "chat_plain", put("body.choices.0.message.content", None)),
    ("a_whole_message_has_a_role_and_text_or_calls", "chat_tools", put("body.choices.0.finish_reason", "stop")),
    ("usage_of_a_chat_counts_thoughts_where_there_are_some", "chat_thoughts",
     put("body.usage.completion_tokens_details.reasoning_tokens", 0)),
    ("usage_of_a_chat_counts_thoughts_where_there_are_some", "chat_usage_stream",
     lambda t: data_of(t)[-1]["usage"]["completion_tokens_details"].update(reasoning_tokens=0)),
    ("a_chat_ends_with_done", "chat_plain_stream", drop(-1)),
    ("a_chat_ends_with_done", "chat_plain_stream", repeat(-1)),
    ("usage_of_a_chat_comes_in_a_last_chunk_without_choices_if_it_was_asked_for", "chat_usage_stream", drop(-2)),
    ("usage_of_a_chat_comes_in_a_last_chunk_without_choices_if_it_was_asked_for", "chat_usage_stream", swap(-3)),
    ("a_completion_ends_with_done", "completions_plain_stream", drop(-1)),
    ("usage_of_a_completion_comes_in_a_last_chunk_without_choices", "completions_several_stream", drop(-2)),
    ("a_completion_is_text_and_one_end", "completions_plain_stream", drop(-2)),
    ("a_completion_is_text_and_one_end", "completions_plain_stream", lambda t: choice(t, 1).update(text=None)),
    ("scores_of_a_completion_stand_side_by_side", "completions_echo", put("body.choices.0.logprobs.text_offset.3", 0)),
    ("scores_of_a_completion_stand_side_by_side", "completions_echo",
     lambda t: t["body"]["choices"][0]["logprobs"]["token_logprobs"].pop()),
    ("an_event_is_named_after_its_type", "messages_plain_stream", put("events.2.event", "delta")),
    ("a_message_starts_and_stops_once", "messages_plain_stream", drop(-1)),
    ("a_message_starts_and_stops_once", "messages_plain_stream", repeat(0)),
    ("a_message_starts_empty", "messages_plain_stream",
     lambda t: event(t, "message_start")["message"].update(content=[1])),
    ("blocks_open_and_close_in_turn_and_are_numbered_from_zero", "messages_tools_stream",
     without("content_block_stop")),
    ("blocks_open_and_close_in_turn_and_are_numbered_from_zero", "messages_tools_stream",
     lambda t: [data.update(index=0) for data in data_of(t) if "index" in data]),
    ("blocks_open_and_close_in_turn_and_are_numbered_from_zero", "messages_empty_stream",
     without("content_block_start")),
    ("deltas_are_of_their_blocks_kind_and_say_something", "messages_tools_stream",
     lambda t: event(t, "content_block_delta", -1)["delta"].update(type="text_delta")),
    ("each_call_has_a_block_of_its_own_whose_pieces_are_an_object", "messages_tools_stream",
     lambda t: event(t, "content_block_start", -1)["content_block"].update(input={"city": "Oslo"})),
    ("each_call_has_a_block_of_its_own_whose_pieces_are_an_object", "messages_tools_stream",
     lambda t: event(t, "content_block_delta", -1)["delta"].update(partial_json='{"city":')),
    ("each_call_has_a_block_of_its_own_whose_pieces_are_an_object", "messages_tools_stream",
     lambda t: event(t, "message_delta")["delta"].update(stop_reason="end_turn")),
    ("a_whole_message_has_blocks_and_the_reason_it_stopped_for", "messages_tools", put("body.stop_reason", "end_turn")),
    ("a_whole_message_has_blocks_and_the_reason_it_stopped_for", "messages_stop", put("body.stop_sequence", None)),
    ("events_of_a_response_are_numbered_from_zero_and_named_after_their_type", "responses_plain_stream", drop(3)),
    ("events_of_a_response_are_numbered_from_zero_and_named_after_their_type", "responses_plain_stream",
     put("events.2.event", "response.delta")),
    ("a_response_is_created_in_progress_and_ends_once", "responses_plain_stream", drop(-1)),
    ("a_response_is_created_in_progress_and_ends_once", "responses_length_stream",
     lambda t: event(t, "response.incomplete")["response"].update(incomplete_details=None)),
    ("items_are_added_and_done_in_turn_and_are_those_of_the_last_event", "responses_tools_stream",
     without("response.output_item.done")),
    ("items_are_added_and_done_in_turn_and_are_those_of_the_last_event", "responses_tools_stream",
     lambda t: event(t, "response.output_item.added", 1).update(output_index=0)),
    ("arguments_come_as_deltas_and_whole_and_are_the_same", "responses_tools_stream",
     without("response.function_call_arguments.delta")),
    ("arguments_come_as_deltas_and_whole_and_are_the_same", "responses_tools_stream",
     without("response.function_call_arguments.done")),
    ("parts_are_added_filled_and_done", "responses_plain_stream", without("response.content_part.added")),
    ("parts_are_added_filled_and_done", "responses_plain_stream",
     lambda t: event(t, "response.output_text.done").update(text="")),
    ("a_whole_response_has_items_with_ids_and_ends_in_a_status", "responses_plain", put("body.status", "in_progress")),
    ("a_stream_says_that_it_is_one_and_anything_else_is_json", "ollama_plain_stream",
     put("headers.content-type", "text/event-stream")),
    ("an_error_has_its_dialects_shape", "ollama_unknown_field", put("body.error", {"message": "x"})),
    ("a_prompt_that_is_too_long_says_both_numbers", "ollama_too_long", put("body.error", "9 tokens too many")),
    ("a_stream_says_what_the_whole_answer_says", "ollama_tools_stream", drop(3)),
    ("only_the_last_line_is_done_and_all_name_the_model", "ollama_plain_stream", drop(-1)),
    ("only_the_last_line_is_done_and_all_name_the_model", "ollama_plain_stream", put("events.1.data.model", "x")),
    ("a_line_says_something_unless_it_is_the_last_or_has_scores", "ollama_plain_stream",
     put("events.1.data.message.content", "")),
    ("a_call_comes_whole_with_an_object_and_without_an_id", "ollama_tools",
     lambda t: t["body"]["message"]["tool_calls"][0].update(id="call_1")),
    ("a_call_comes_whole_with_an_object_and_without_an_id", "ollama_tools",
     lambda t: t["body"]["message"]["tool_calls"][0]["function"].update(arguments="{}")),
    ("the_last_line_has_the_reason_counts_and_times", "ollama_plain_stream",
     lambda t: data_of(t)[-1].pop("eval_duration")),
    ("the_last_line_has_the_reason_counts_and_times", "ollama_plain_stream",
     put("events.1.data.done_reason", "stop")),
    ("the_last_line_has_the_reason_counts_and_times", "ollama_plain", put("body.eval_count", 0)),
    ("every_text_has_a_vector_of_length_one", "ollama_embed", put("body.embeddings.1.0", 1.5)),
    ("every_text_has_a_vector_of_length_one", "ollama_embed", put("body.embeddings", [])),
    ("every_text_has_a_vector_of_length_one", "ollama_embed", put("body.prompt_eval_count", 0)),
    ("every_text_has_a_vector_of_length_one", "ollama_embeddings", put("body.embedding", [])),
]  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "name", "edit"), BREAKS, ids=[f"{at}-{rule}" for at, (rule, _, _) in enumerate(BREAKS)]
)
def test_a_transcript_that_breaks_the_rule_is_refused(rule: str, name: str, edit: Edit) -> None:
    broken = copy.deepcopy(KEPT[name])
    assert RULES[rule].is_for(name, broken)
    edit(broken)
    with pytest.raises((AssertionError, KeyError, IndexError, TypeError, ValueError)):
        RULES[rule].check(broken, KEPT.get(name.removesuffix("_stream")))


def test_every_rule_refuses_some_broken_transcript() -> None:
    assert {rule for rule, _, _ in BREAKS} == set(RULES)
