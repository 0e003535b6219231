"""Rules that every transcript of a dialect keeps, whatever the model says; they come from failures of other servers.

A rule is a function named after its sentence. It gets a transcript, and raises AssertionError if the transcript breaks
it. `RULES` holds the rules with the transcripts they apply to.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jiter

Transcript = dict[str, Any]
Data = dict[str, Any]


@dataclass(frozen=True)
class Rule:
    """A check, and the transcripts it applies to: by dialect, and by whether they are streams."""

    check: Callable[..., None]
    dialect: str
    streamed: bool | None

    def is_for(self, name: str, transcript: Transcript) -> bool:
        fits = self.dialect in ("", name.partition("_")[0])
        return fits and self.streamed in (None, "events" in transcript)


RULES: dict[str, Rule] = {}


def rule(
    dialect: str = "", *, streamed: bool | None = True
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def add(check: Callable[..., None]) -> Callable[..., None]:
        RULES[check.__name__] = Rule(check, dialect, streamed)
        return check

    return add


def require_rules(name: str, transcript: Transcript, others: Mapping[str, Transcript]) -> None:
    for title, each in RULES.items():
        if each.is_for(name, transcript):
            try:
                each.check(transcript, others.get(name.removesuffix("_stream")))
            except AssertionError as error:
                raise AssertionError(f"{name}: {title}: {error}") from error


def data_of(transcript: Transcript) -> list[Data]:
    return [event["data"] for event in transcript["events"] if event["data"] != "[DONE]"]


def is_ollama(transcript: Transcript) -> bool:
    return str(transcript["request"]["path"]).startswith("/api/")


def embeds(transcript: Transcript) -> bool:
    return str(transcript["request"]["path"]).startswith("/api/embed")


def has_failed(transcript: Transcript) -> bool:
    return transcript["request"]["body"].get("frobnicate") is not None or any(
        "error" in data and data["error"] for data in data_of(transcript)
    )


def is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def require_calls(texts: list[str], end: str | None, whole: str, cut: str) -> None:
    """Require objects as arguments and `whole` as the end of the answer; if the last call is cut, require `cut`."""
    assert all(map(is_object, texts[:-1]))
    if texts and not is_object(texts[-1]):
        assert end == cut
    else:
        assert (end == whole) == bool(texts)


def choices_of(transcript: Transcript) -> dict[int, list[Data]]:
    """The chunks of each choice."""
    found: dict[int, list[Data]] = {}
    for data in data_of(transcript):
        for choice in data.get("choices", ()):
            found.setdefault(choice["index"], []).append(choice)
    return found


def wants_usage(transcript: Transcript) -> bool:
    options = transcript["request"]["body"].get("stream_options") or {}
    return bool(options.get("include_usage"))


# All dialects


@rule(streamed=None)
def a_stream_says_that_it_is_one_and_anything_else_is_json(transcript: Transcript, _: Any) -> None:
    kind = transcript["headers"]["content-type"].partition(";")[0]
    stream = "application/x-ndjson" if is_ollama(transcript) else "text/event-stream"
    assert kind == (stream if "events" in transcript else "application/json")
    assert transcript["headers"]["cache-control"] == "no-store"
    asked = transcript["request"]["body"]
    answers = is_ollama(transcript) and not embeds(transcript)
    loads = answers and not (asked.get("messages") or asked.get("prompt"))
    wanted = asked.get("stream", answers and not loads)
    assert ("events" in transcript) == (transcript["status"] == 200 and wanted)


@rule(streamed=False)
def an_error_has_its_dialects_shape(transcript: Transcript, _: Any) -> None:
    if transcript["status"] == 200:
        assert "error" not in transcript["body"] or transcript["body"]["error"] is None
        return
    assert 400 <= transcript["status"] < 500
    body = transcript["body"]
    if is_ollama(transcript):
        assert body.keys() == {"error"}
        assert isinstance(body["error"], str)
        assert body["error"]
        return
    if "/messages" in transcript["request"]["path"]:
        assert body.keys() == {"type", "error"}
        assert body["type"] == "error"
        assert body["error"].keys() == {"type", "message"}
    else:
        assert body.keys() == {"error"}
        assert body["error"].keys() == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    assert "Traceback" not in body["error"]["message"]


@rule(streamed=False)
def a_prompt_that_is_too_long_says_both_numbers(transcript: Transcript, _: Any) -> None:
    if len(json.dumps(transcript["request"])) < 10_000:
        return
    assert transcript["status"] == 400
    error = transcript["body"]["error"]
    error = {"message": error} if is_ollama(transcript) else error
    assert len([word for word in error["message"].split() if word.isdecimal()]) >= 2
    assert error.get("code", "context_length_exceeded") == "context_length_exceeded"


@rule()
def an_error_is_the_last_event(transcript: Transcript, _: Any) -> None:
    errors = [at for at, event in enumerate(transcript["events"]) if _is_error(event["data"])]
    assert errors in ([], [len(transcript["events"]) - 1])


def _is_error(data: Any) -> bool:
    return isinstance(data, dict) and (
        ("choices" not in data and "error" in data) or data.get("type") in ("error", "response.failed")
    )


@rule()
def a_stream_says_what_the_whole_answer_says(transcript: Transcript, whole: Transcript | None) -> None:
    if whole is None or "body" not in whole or whole["status"] != 200:
        return
    body, path = whole["body"], transcript["request"]["path"]
    if is_ollama(transcript):
        assert _collect_lines(data_of(transcript)) == body
    elif path == "/v1/messages":
        assert _collect_message(transcript) == (body["content"], body["stop_reason"], body["stop_sequence"])
    elif path == "/v1/responses":
        last = data_of(transcript)[-1]["response"]
        assert _without_ids(last["output"]) == _without_ids(body["output"])
        assert (last["status"], last["incomplete_details"]) == (body["status"], body["incomplete_details"])
    elif path == "/v1/completions":
        for number, chunks in choices_of(transcript).items():
            choice = body["choices"][number]
            assert "".join(chunk["text"] for chunk in chunks) == choice["text"]
            assert chunks[-1]["finish_reason"] == choice["finish_reason"]
    else:
        for number, chunks in choices_of(transcript).items():
            choice = body["choices"][number]
            assert _collect_chat(chunks) == _without_ids(
                {key: value for key, value in choice["message"].items() if value is not None}
            )
            assert chunks[-1]["finish_reason"] == choice["finish_reason"]
            if choice["logprobs"] is not None:
                said = [one for chunk in chunks for one in (chunk.get("logprobs") or {}).get("content", ())]
                assert said == choice["logprobs"]["content"]


def _collect_lines(lines: list[Data]) -> Data:
    """The whole answer that lines make: texts joined, calls and scores in order, the rest from the last line."""
    made = dict(lines[-1])
    scores = [one for line in lines for one in line.get("logprobs", ())]
    if "response" in made:
        made["response"] = "".join(line["response"] for line in lines)
        thinking, calls = "".join(line.get("thinking", "") for line in lines), []
        holder = made
    else:
        messages = [line["message"] for line in lines]
        holder = {"role": "assistant", "content": "".join(one["content"] for one in messages)}
        thinking = "".join(one.get("thinking", "") for one in messages)
        calls = [call for one in messages for call in one.get("tool_calls", ())]
        made["message"] = holder
    holder |= {"thinking": thinking} if thinking else {}
    holder |= {"tool_calls": calls} if calls else {}
    return made | ({"logprobs": scores} if scores else {})


def _without_ids(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _without_ids(part) for key, part in value.items() if key not in ("id", "call_id", "item_id")
        }
    return [_without_ids(part) for part in value] if isinstance(value, list) else value


def _collect_chat(chunks: list[Data]) -> Data:
    message: Data = {}
    calls: dict[int, Data] = {}
    for delta in (chunk["delta"] for chunk in chunks):
        for key in ("content", "reasoning_content"):
            if key in delta:
                message[key] = message.get(key, "") + delta[key]
        message |= {"role": delta["role"]} if "role" in delta else {}
        for part in delta.get("tool_calls", ()):
            made = calls.setdefault(
                part["index"], {"type": "function", "function": {"name": "", "arguments": ""}}
            )
            made["function"]["name"] += part["function"].get("name", "")
            made["function"]["arguments"] += part["function"]["arguments"]
        if "function_call" in delta:
            called = message.setdefault("function_call", {"name": "", "arguments": ""})
            called["name"] += delta["function_call"].get("name", "")
            called["arguments"] += delta["function_call"]["arguments"]
    if calls:
        message["tool_calls"] = [calls[at] for at in sorted(calls)]
    if (calls or "function_call" in message) and not message["content"]:
        del message["content"]
    return message


def _collect_message(transcript: Transcript) -> tuple[list[Data], str, str | None]:
    blocks: list[Data] = []
    texts: list[str] = []
    end: Data = {}
    for data in data_of(transcript):
        if data["type"] == "content_block_start":
            blocks.append(dict(data["content_block"]))
            texts.append("")
        elif data["type"] == "content_block_delta":
            texts[data["index"]] += next(value for key, value in data["delta"].items() if key != "type")
        elif data["type"] == "message_delta":
            end = data["delta"]
    for number, (block, text) in enumerate(zip(blocks, texts, strict=True)):
        if block["type"] == "tool_use":
            # Anthropic's client parses partial JSON, too.
            read = jiter.from_json((text or "{}").encode(), partial_mode=True)
            block |= {"input": read, "id": f"call_{number}"}
        else:
            block[block["type"]] += text
    return _with_numbers(blocks), end["stop_reason"], end["stop_sequence"]


def _with_numbers(blocks: list[Data]) -> list[Data]:
    """Number the ids of calls like a transcript, where the message has the first number."""
    number = 0
    for block in blocks:
        if block["type"] == "tool_use":
            number += 1
            block["id"] = f"call_{number}"
    return blocks


@rule(streamed=False)
def usage_adds_up(transcript: Transcript, _: Any) -> None:
    if transcript["status"] == 200 and not is_ollama(transcript):
        _check_usage(transcript["body"]["usage"])


@rule()
def streamed_usage_adds_up_and_is_that_of_the_whole_answer(
    transcript: Transcript, whole: Transcript | None
) -> None:
    if is_ollama(transcript):
        return
    found = [data["usage"] for data in data_of(transcript) if data.get("usage")]
    found += [
        data["response"]["usage"] for data in data_of(transcript) if (data.get("response") or {}).get("usage")
    ]
    for usage in found:
        _check_usage(usage)
    if found and whole is not None and whole["status"] == 200:
        new = ("completion_tokens", "output_tokens")
        assert [found[-1].get(name) for name in new] == [whole["body"]["usage"].get(name) for name in new]


def _check_usage(usage: Data) -> None:
    if "prompt_tokens" in usage:
        prompt, new, cached = (
            usage["prompt_tokens"],
            usage["completion_tokens"],
            usage["prompt_tokens_details"],
        )
        assert usage["total_tokens"] == prompt + new
        assert 0 <= cached["cached_tokens"] < prompt
        assert usage.get("completion_tokens_details", {"reasoning_tokens": 0})["reasoning_tokens"] <= new
    elif "input_tokens_details" in usage:
        assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
        assert 0 <= usage["input_tokens_details"]["cached_tokens"] < usage["input_tokens"]
        assert usage["output_tokens_details"]["reasoning_tokens"] <= usage["output_tokens"]
    else:
        assert usage["input_tokens"] > 0  # cached tokens are counted separately
        assert usage["cache_read_input_tokens"] >= 0
        assert usage["output_tokens_details"]["thinking_tokens"] <= usage["output_tokens"]


# Chat Completions


@rule("chat")
def chunks_of_a_chat_have_one_id_time_and_model_and_no_field_of_our_own(
    transcript: Transcript, _: Any
) -> None:
    chunks = [data for data in data_of(transcript) if "choices" in data]
    assert {(data["id"], data["created"], data["model"], data["object"]) for data in chunks} == {
        (chunks[0]["id"], 0, "tiny", "chat.completion.chunk")
    }
    asked = transcript["request"]["body"]
    known = {"id", "object", "created", "model", "choices"} | (
        {"usage"} if wants_usage(transcript) else set()
    )
    known |= {"prompt_progress"} if asked.get("return_progress") else set()
    assert all(data.keys() <= known for data in chunks)


@rule("chat")
def the_role_comes_once_and_first(transcript: Transcript, _: Any) -> None:
    for chunks in choices_of(transcript).values():
        assert ["role" in chunk["delta"] for chunk in chunks] == [True] + [False] * (len(chunks) - 1)
        assert chunks[0]["delta"] == {"role": "assistant", "content": ""}


@rule("chat")
def a_delta_says_something_unless_it_ends_the_choice_or_has_scores(transcript: Transcript, _: Any) -> None:
    for chunks in choices_of(transcript).values():
        for chunk in chunks[1:]:
            assert all(chunk["delta"].values())
            assert chunk["delta"] or chunk["finish_reason"] or chunk.get("logprobs")


@rule("chat")
def a_calls_id_and_name_come_before_its_arguments_and_once(transcript: Transcript, _: Any) -> None:
    for chunks in choices_of(transcript).values():
        begun: set[int] = set()
        for part in (part for chunk in chunks for part in chunk["delta"].get("tool_calls", ())):
            if part["index"] not in begun:
                begun.add(part["index"])
                assert part.keys() == {"index", "id", "type", "function"}
                assert part["type"] == "function"
                assert part["function"].keys() == {"name", "arguments"}
                assert part["function"]["name"]
                assert part["function"]["arguments"] == ""
            else:
                assert part.keys() == {"index", "function"}
                assert part["function"].keys() == {"arguments"}


@rule("chat")
def calls_are_numbered_from_zero_one_after_the_other(transcript: Transcript, _: Any) -> None:
    for chunks in choices_of(transcript).values():
        numbers = [part["index"] for chunk in chunks for part in chunk["delta"].get("tool_calls", ())]
        assert numbers == sorted(numbers)
        assert sorted(set(numbers)) == list(range(len(set(numbers))))


@rule("chat")
def arguments_are_text_and_together_the_json_of_an_object(transcript: Transcript, _: Any) -> None:
    for chunks in choices_of(transcript).values():
        texts: dict[int, str] = {}
        for part in (part for chunk in chunks for part in chunk["delta"].get("tool_calls", ())):
            assert isinstance(part["function"]["arguments"], str)
            texts[part["index"]] = texts.get(part["index"], "") + part["function"]["arguments"]
        if not has_failed(transcript):
            require_calls(list(texts.values()), chunks[-1]["finish_reason"], "tool_calls", "length")


@rule("chat")
def a_choice_ends_once_with_an_empty_delta_and_the_right_reason(transcript: Transcript, _: Any) -> None:
    for chunks in choices_of(transcript).values():
        reasons = [chunk["finish_reason"] for chunk in chunks]
        if has_failed(transcript):
            assert not any(reasons)
            continue
        assert not any(reasons[:-1])
        assert chunks[-1]["delta"] == {}
        calls = any("tool_calls" in chunk["delta"] for chunk in chunks)
        assert calls == (reasons[-1] == "tool_calls") or (calls and reasons[-1] == "length")
        function = any("function_call" in chunk["delta"] for chunk in chunks)
        assert function == (reasons[-1] == "function_call") or (function and reasons[-1] == "length")
        assert reasons[-1] in ("stop", "length", "tool_calls", "function_call")


@rule("chat", streamed=False)
def a_whole_message_has_a_role_and_text_or_calls(transcript: Transcript, _: Any) -> None:
    for choice in transcript["body"].get("choices", ()):
        message = choice["message"]
        assert message["role"] == "assistant"
        called = message.get("tool_calls") or message.get("function_call")
        assert isinstance(message["content"], str) or (message["content"] is None and called)
        assert (choice["finish_reason"] == "function_call") == ("function_call" in message)
        calls = message.get("tool_calls", [])
        texts = [call["function"]["arguments"] for call in calls]
        require_calls(texts, choice["finish_reason"], "tool_calls", "length")
        assert all(call.keys() == {"id", "type", "function"} for call in calls)


@rule("chat", streamed=None)
def usage_of_a_chat_counts_thoughts_where_there_are_some(transcript: Transcript, _: Any) -> None:
    if "events" in transcript:
        usages = [data["usage"] for data in data_of(transcript) if "usage" in data]
        has_thoughts = any(
            "reasoning_content" in c["delta"] for cs in choices_of(transcript).values() for c in cs
        )
    else:
        usages = [transcript["body"]["usage"]] if transcript["status"] == 200 else []
        has_thoughts = any("reasoning_content" in c["message"] for c in transcript["body"].get("choices", ()))
    for usage in usages:
        assert (usage["completion_tokens_details"]["reasoning_tokens"] > 0) == has_thoughts


def _ends_as_openai(transcript: Transcript) -> None:
    done = [at for at, event in enumerate(transcript["events"]) if event["data"] == "[DONE]"]
    assert done == ([] if has_failed(transcript) else [len(transcript["events"]) - 1])
    assert all(event["event"] is None for event in transcript["events"])


@rule("chat")
def a_chat_ends_with_done(transcript: Transcript, _: Any) -> None:
    _ends_as_openai(transcript)


def _usage_comes_last(transcript: Transcript) -> None:
    chunks = data_of(transcript)
    with_usage = [at for at, data in enumerate(chunks) if "usage" in data]
    options = transcript["request"]["body"].get("stream_options") or {}
    if wants_usage(transcript) and options.get("continuous_usage_stats"):
        assert with_usage == list(range(len(chunks)))
        counts = [data["usage"]["completion_tokens"] for data in chunks]
        assert counts == sorted(counts)
        assert chunks[-1]["choices"] == []
        return
    assert with_usage == ([len(chunks) - 1] if wants_usage(transcript) else [])
    assert all(chunks[at]["choices"] == [] for at in with_usage)


@rule("chat")
def usage_of_a_chat_comes_in_a_last_chunk_without_choices_if_it_was_asked_for(
    transcript: Transcript, _: Any
) -> None:
    _usage_comes_last(transcript)


# Completions


@rule("completions")
def a_completion_ends_with_done(transcript: Transcript, _: Any) -> None:
    _ends_as_openai(transcript)


@rule("completions")
def usage_of_a_completion_comes_in_a_last_chunk_without_choices(transcript: Transcript, _: Any) -> None:
    _usage_comes_last(transcript)


@rule("completions")
def a_completion_is_text_and_one_end(transcript: Transcript, _: Any) -> None:
    for chunks in choices_of(transcript).values():
        assert all(isinstance(chunk["text"], str) for chunk in chunks)
        assert not any(chunk["finish_reason"] for chunk in chunks[:-1])
        assert has_failed(transcript) or chunks[-1]["finish_reason"] in ("stop", "length")
    assert {data.get("object", "text_completion") for data in data_of(transcript)} == {"text_completion"}


@rule("completions", streamed=False)
def scores_of_a_completion_stand_side_by_side(transcript: Transcript, _: Any) -> None:
    for choice in transcript["body"].get("choices", ()):
        scores = choice["logprobs"]
        if scores is None:
            continue
        assert scores.keys() == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
        assert len({len(part) for part in scores.values()}) == 1
        offsets, text = scores["text_offset"], choice["text"]
        assert offsets == sorted(offsets)
        for token, at, end in zip(scores["tokens"], offsets, offsets[1:], strict=False):
            assert token.startswith((text[at:end], "bytes:"))
        first = 1 if transcript["request"]["body"].get("echo") else 0
        assert [value is None for value in scores["token_logprobs"]].count(True) == first
        said = b"".join(map(_bytes_of, scores["tokens"]))
        assert said.startswith(text.encode())


def _bytes_of(token: str) -> bytes:
    """The bytes of a token; a token that is not a whole character is spelled by its bytes."""
    if not token.startswith("bytes:"):
        return token.encode()
    return token.removeprefix("bytes:").encode().decode("unicode_escape").encode("latin-1")


# Anthropic's Messages


@rule("messages")
def an_event_is_named_after_its_type(transcript: Transcript, _: Any) -> None:
    assert all(event["event"] == event["data"]["type"] for event in transcript["events"])


@rule("messages")
def a_message_starts_and_stops_once(transcript: Transcript, _: Any) -> None:
    kinds = [data["type"] for data in data_of(transcript)]
    assert kinds[0] == "message_start"
    assert kinds.count("message_start") == 1
    if not has_failed(transcript):
        assert kinds[-2:] == ["message_delta", "message_stop"]
        assert kinds.count("message_delta") == kinds.count("message_stop") == 1


@rule("messages")
def a_message_starts_empty(transcript: Transcript, _: Any) -> None:
    message = data_of(transcript)[0]["message"]
    assert message["content"] == []
    assert (message["type"], message["role"]) == ("message", "assistant")
    assert message["stop_reason"] is None
    assert message["usage"]["output_tokens"] == 0


@rule("messages")
def blocks_open_and_close_in_turn_and_are_numbered_from_zero(transcript: Transcript, _: Any) -> None:
    number, is_open = -1, False
    for data in data_of(transcript):
        kind = data["type"]
        if kind == "content_block_start":
            assert not is_open
            number, is_open = number + 1, True
        if kind.startswith("content_block"):
            assert is_open
            assert data["index"] == number
        if kind == "content_block_stop":
            is_open = False
    assert number >= 0
    assert has_failed(transcript) or not is_open


@rule("messages")
def deltas_are_of_their_blocks_kind_and_say_something(transcript: Transcript, _: Any) -> None:
    fits = {"text": ("text_delta", "text"), "thinking": ("thinking_delta", "thinking"),
            "tool_use": ("input_json_delta", "partial_json")}  # fmt: skip
    kind = ""
    for data in data_of(transcript):
        if data["type"] == "content_block_start":
            kind = data["content_block"]["type"]
        if data["type"] == "content_block_delta":
            name, field = fits[kind]
            assert data["delta"].keys() == {"type", field}
            assert data["delta"]["type"] == name
            assert data["delta"][field]


@rule("messages")
def each_call_has_a_block_of_its_own_whose_pieces_are_an_object(transcript: Transcript, _: Any) -> None:
    texts: dict[int, str] = {}
    for data in data_of(transcript):
        if data["type"] == "content_block_start" and data["content_block"]["type"] == "tool_use":
            block = data["content_block"]
            assert block.keys() == {"type", "id", "name", "input"}
            assert block["input"] == {}
            texts[data["index"]] = ""
        elif data["type"] == "content_block_delta" and "partial_json" in data["delta"]:
            texts[data["index"]] += data["delta"]["partial_json"]
    end = [data["delta"]["stop_reason"] for data in data_of(transcript) if data["type"] == "message_delta"]
    if not has_failed(transcript):
        require_calls(list(texts.values()), end[0], "tool_use", "max_tokens")


@rule("messages", streamed=False)
def a_whole_message_has_blocks_and_the_reason_it_stopped_for(transcript: Transcript, _: Any) -> None:
    if transcript["status"] != 200:
        return
    body = transcript["body"]
    kinds = [block["type"] for block in body["content"]]
    assert kinds
    assert body["stop_reason"] in (("tool_use", "max_tokens") if "tool_use" in kinds else ENDS_WITHOUT_CALLS)
    assert (body["stop_reason"] == "stop_sequence") == (body["stop_sequence"] is not None)
    assert all(isinstance(block["input"], dict) for block in body["content"] if block["type"] == "tool_use")


ENDS_WITHOUT_CALLS = ("end_turn", "max_tokens", "stop_sequence")

# Responses


@rule("responses")
def events_of_a_response_are_numbered_from_zero_and_named_after_their_type(
    transcript: Transcript, _: Any
) -> None:
    assert [data["sequence_number"] for data in data_of(transcript)] == list(range(len(transcript["events"])))
    assert all(event["event"] == event["data"]["type"] for event in transcript["events"])


@rule("responses")
def a_response_is_created_in_progress_and_ends_once(transcript: Transcript, _: Any) -> None:
    kinds = [data["type"] for data in data_of(transcript)]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    ends = [
        at for at, kind in enumerate(kinds) if kind.split(".")[1] in ("completed", "incomplete", "failed")
    ]
    assert ends == [len(kinds) - 1]
    last = data_of(transcript)[-1]["response"]
    assert kinds[-1] == f"response.{last['status']}"
    assert (last["usage"] is None) == (last["status"] == "failed")
    assert (last["error"] is None) == (last["status"] != "failed")
    assert (last["incomplete_details"] is None) == (last["status"] != "incomplete")


@rule("responses")
def items_are_added_and_done_in_turn_and_are_those_of_the_last_event(transcript: Transcript, _: Any) -> None:
    done: list[Data] = []
    begun: Data | None = None
    for data in data_of(transcript):
        if data["type"] == "response.output_item.added":
            assert begun is None
            begun = data["item"]
            assert data["output_index"] == len(done)
            assert begun["status"] == "in_progress"
            assert not begun.get("content")
            assert not begun.get("arguments")
        elif data["type"] == "response.output_item.done":
            assert begun is not None
            assert (data["output_index"], data["item"]["id"]) == (len(done), begun["id"])
            done.append(data["item"])
            begun = None
        elif "item_id" in data:
            assert begun is not None
            assert (data["output_index"], data["item_id"]) == (len(done), begun["id"])
    last = data_of(transcript)[-1]["response"]
    if not has_failed(transcript) and last["status"] != "failed":
        assert last["output"] == done
        _only_what_was_cut_off_is_incomplete(last)


def _only_what_was_cut_off_is_incomplete(response: Data) -> None:
    statuses = [item["status"] for item in response["output"]]
    assert statuses[:-1] == ["completed"] * len(statuses[:-1])
    kinds = [item["type"] for item in response["output"]]
    if kinds and kinds[-1] != "function_call":  # a call may be complete although the answer is cut off
        assert statuses[-1] == response["status"]


@rule("responses")
def arguments_come_as_deltas_and_whole_and_are_the_same(transcript: Transcript, _: Any) -> None:
    deltas: dict[str, str] = {}
    whole: dict[str, str] = {}
    for data in data_of(transcript):
        if data["type"] == "response.function_call_arguments.delta":
            deltas[data["item_id"]] = deltas.get(data["item_id"], "") + data["delta"]
        elif data["type"] == "response.function_call_arguments.done":
            whole[data["item_id"]] = data["arguments"]
    calls = {
        data["item"]["id"]: data["item"]["arguments"]
        for data in data_of(transcript)
        if data["type"] == "response.output_item.done" and data["item"]["type"] == "function_call"
    }
    assert deltas == whole == calls
    is_cut = data_of(transcript)[-1]["type"] == "response.incomplete"
    assert all(map(is_object, list(whole.values())[: -1 if is_cut else None]))


@rule("responses")
def parts_are_added_filled_and_done(transcript: Transcript, _: Any) -> None:
    text: str | None = None
    for data in data_of(transcript):
        kind = data["type"]
        if kind == "response.content_part.added":
            assert text is None
            assert data["part"]["text"] == ""
            text = ""
        elif kind in ("response.output_text.delta", "response.reasoning_text.delta"):
            assert text is not None
            assert data["delta"]
            text += data["delta"]
        elif kind in ("response.output_text.done", "response.reasoning_text.done"):
            assert data["text"] == text
        elif kind == "response.content_part.done":
            assert data["part"]["text"] == text
            text = None
    assert text is None or has_failed(transcript) or data_of(transcript)[-1]["type"] == "response.failed"


@rule("responses", streamed=False)
def a_whole_response_has_items_with_ids_and_ends_in_a_status(transcript: Transcript, _: Any) -> None:
    if transcript["status"] != 200:
        return
    body = transcript["body"]
    assert body["status"] in ("completed", "incomplete")
    _only_what_was_cut_off_is_incomplete(body)
    assert body["object"] == "response"
    for item in body["output"]:
        assert item["id"]
        assert item["type"] in ("message", "reasoning", "function_call")
        if item["type"] == "function_call":
            is_last = item is body["output"][-1]
            assert is_object(item["arguments"]) or (is_last and body["status"] == "incomplete")
            assert item["call_id"] != item["id"]


# Ollama


def _said(line: Data) -> Data:
    """The content of a line: its message, or the same of a generated text."""
    found = line.get("message") or {"content": line["response"], "thinking": line.get("thinking", "")}
    return {key: value for key, value in found.items() if key != "role" and value}


@rule("ollama")
def only_the_last_line_is_done_and_all_name_the_model(transcript: Transcript, _: Any) -> None:
    lines = [line for line in data_of(transcript) if "error" not in line]
    assert {line["model"] for line in lines} == {"tiny"}
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [not has_failed(transcript)]


@rule("ollama")
def a_line_says_something_unless_it_is_the_last_or_has_scores(transcript: Transcript, _: Any) -> None:
    for line in data_of(transcript):
        if "error" not in line and not line["done"]:
            assert _said(line) or line.get("logprobs")
            assert len(_said(line)) <= 1


@rule("ollama", streamed=None)
def a_call_comes_whole_with_an_object_and_without_an_id(transcript: Transcript, _: Any) -> None:
    lines = data_of(transcript) if "events" in transcript else [transcript["body"]]
    for call in (call for line in lines for call in (line.get("message") or {}).get("tool_calls", ())):
        assert call.keys() == {"function"}
        assert call["function"].keys() == {"name", "arguments"}
        assert isinstance(call["function"]["arguments"], dict)


@rule("ollama", streamed=None)
def the_last_line_has_the_reason_counts_and_times(transcript: Transcript, _: Any) -> None:
    lines = data_of(transcript) if "events" in transcript else [transcript["body"]]
    if embeds(transcript):
        return
    counts = {"prompt_eval_count", "eval_count"}
    times = {"total_duration", "load_duration", "prompt_eval_duration", "eval_duration"}
    for line in lines[:-1]:
        assert not line.keys() & (counts | times | {"done_reason"})
    if "error" in lines[-1]:
        return
    assert lines[-1]["done"] is True
    if "events" in transcript:
        assert not _said(lines[-1])
    if lines[-1]["done_reason"] == "load":
        assert not lines[-1].keys() & (counts | times)
        return
    assert lines[-1]["done_reason"] in ("stop", "length")
    assert lines[-1].keys() >= counts | times
    assert all(lines[-1][name] > 0 for name in counts)


@rule("ollama", streamed=False)
def every_text_has_a_vector_of_length_one(transcript: Transcript, _: Any) -> None:
    if not embeds(transcript) or transcript["status"] != 200:
        return
    asked, body = transcript["request"]["body"], transcript["body"]
    given = asked.get("input") or asked.get("prompt") or []
    texts = [given] if isinstance(given, str) else given
    if transcript["request"]["path"] == "/api/embeddings":
        assert body.keys() == {"embedding"}
        vectors = [body["embedding"]] if texts else []
        assert texts or body["embedding"] == []
    else:
        assert body.keys() == {"model", "embeddings", "total_duration", "load_duration", "prompt_eval_count"}
        assert body["model"] == "tiny"
        assert body["prompt_eval_count"] >= len(texts)
        vectors = body["embeddings"]
    assert len(vectors) == len(texts)
    for vector in vectors:
        assert len(vector) == asked.get("dimensions", len(vector))
        assert abs(math.hypot(*vector) - 1) < 0.001
