"""Every field that a request may have is accepted and takes effect, in each dialect that has it."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from argosy.serve.answer.service import Service
from tests.cluster.rigs import wait_until
from tests.serve.dialects import DIALECTS, MAX_TOKENS, PATHS, TOOLS, greedy
from tests.serve.speaking import ANSWER_SCHEMA, WEATHER

CHATTING = tuple(name for name in DIALECTS if name != "completions")
OPENAI_TOOL = TOOLS["chat"][0]


def body(dialect: str, said: str = "How are you?", **more: Any) -> dict[str, Any]:
    return greedy(dialect, said, 12) | more


def ask(speaker: httpx.Client, dialect: str, said: str = "How are you?", **more: Any) -> dict[str, Any]:
    answer = speaker.post(PATHS[dialect], json=body(dialect, said, **more))
    assert answer.status_code == 200, answer.text
    assert not set(more) & set(answer.headers.get("x-ignored-params", "").split(", "))
    found: dict[str, Any] = answer.json()
    return found


def text_of(dialect: str, answer: dict[str, Any]) -> str:
    if dialect == "completions":
        return str(answer["choices"][0]["text"])
    if dialect == "chat":
        message = answer["choices"][0]["message"]
        return str(message["content"] or "") + str(message.get("reasoning_content", ""))
    if dialect == "responses":
        return "".join(part["text"] for item in answer["output"] for part in item.get("content", ()))
    return "".join(block.get("text", "") + block.get("thinking", "") for block in answer["content"])


def says(speaker: httpx.Client, dialect: str, said: str = "How are you?", **more: Any) -> str:
    return text_of(dialect, ask(speaker, dialect, said, **more))


def calls_of(dialect: str, answer: dict[str, Any]) -> list[tuple[str, Any]]:
    if dialect == "chat":
        calls = [call["function"] for call in answer["choices"][0]["message"].get("tool_calls", ())]
        return [(call["name"], json.loads(call["arguments"])) for call in calls]
    if dialect == "responses":
        items = [item for item in answer["output"] if item["type"] == "function_call"]
        return [(item["name"], json.loads(item["arguments"])) for item in items]
    blocks = [block for block in answer["content"] if block["type"] == "tool_use"]
    return [(block["name"], block["input"]) for block in blocks]


def first_id(speaker: httpx.Client, service: Service, dialect: str) -> int:
    """The first token of the greedy answer."""
    assert service.tokenizer is not None
    return service.tokenizer.encode(says(speaker, dialect))[0]


# Sampling


@pytest.mark.parametrize("dialect", DIALECTS)
def test_an_answer_has_at_most_the_requested_number_of_tokens(speaker: httpx.Client, dialect: str) -> None:
    usage = ask(speaker, dialect, "#long", **{MAX_TOKENS[dialect]: 3})["usage"]
    assert usage.get("completion_tokens", usage.get("output_tokens")) == 3


def test_max_completion_tokens_overrides_max_tokens(speaker: httpx.Client) -> None:
    usage = ask(speaker, "chat", "#long", max_tokens=9, max_completion_tokens=4)["usage"]
    assert usage["completion_tokens"] == 4


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_seed_repeats_its_answer_and_another_seed_gives_another(
    speaker: httpx.Client, dialect: str
) -> None:
    first, again, other = (says(speaker, dialect, temperature=1, seed=seed) for seed in (5, 5, 6))
    assert first == again != other


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_sampling_from_one_candidate_is_greedy(
    speaker: httpx.Client, dialect: str, narrow: dict[str, float]
) -> None:
    greedy = says(speaker, dialect)
    assert says(speaker, dialect, temperature=1, seed=5, **narrow) == greedy
    assert says(speaker, dialect, temperature=1, seed=5) != greedy


@pytest.mark.parametrize("dialect", DIALECTS)
def test_penalties_and_biases_change_the_greedy_answer(
    speaker: httpx.Client, speaking_service: Service, dialect: str
) -> None:
    greedy = says(speaker, dialect)
    bias = {"logit_bias": {str(first_id(speaker, speaking_service, dialect)): -100}}
    assert says(speaker, dialect, **bias) != greedy
    long = {MAX_TOKENS[dialect]: 150}
    repeating = says(speaker, dialect, **long)
    for penalty in ({"repetition_penalty": 3.0}, {"presence_penalty": 2.0}, {"frequency_penalty": 2.0}):
        assert says(speaker, dialect, **penalty, **long) != repeating, penalty


@pytest.mark.parametrize(
    ("dialect", "name"), [("chat", "stop"), ("completions", "stop"), ("messages", "stop_sequences")]
)
def test_a_stop_string_ends_the_text_and_is_excluded_from_it(
    speaker: httpx.Client, dialect: str, name: str
) -> None:
    answer = ask(speaker, dialect, "#plain", **{name: ["thank", "zzz"]})
    assert text_of(dialect, answer) == "It is well, "
    if dialect == "messages":
        assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", "thank")
    else:
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert says(speaker, dialect, "#plain", stop="thank") == "It is well, "


@pytest.mark.parametrize("dialect", ["chat", "completions"])
def test_n_answers_have_indices_of_their_own(speaker: httpx.Client, dialect: str) -> None:
    choices = ask(speaker, dialect, n=3, temperature=1, seed=4)["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    assert len({json.dumps(choice.get("message", choice.get("text"))) for choice in choices}) == 3
    assert speaker.post(PATHS[dialect], json=body(dialect, n=9)).status_code == 400


def test_best_of_must_equal_n(speaker: httpx.Client) -> None:
    assert len(ask(speaker, "completions", n=2, best_of=2)["choices"]) == 2
    assert speaker.post("/v1/completions", json=body("completions", n=1, best_of=2)).status_code == 400


# Log-probabilities


def test_log_probabilities_have_each_dialects_form(speaker: httpx.Client) -> None:
    chat = ask(speaker, "chat", "#plain", logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]["content"]
    more = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    (item,) = ask(speaker, "responses", "#plain", **more)["output"]
    part = item["content"][0]
    (plain,) = ask(speaker, "responses", "#plain")["output"]
    assert plain["content"][0]["logprobs"] == []
    ended = chat.pop()  # the token that ends the turn, which has no text
    assert ended["token"] == "<|im_end|>"
    assert part["logprobs"] == chat
    assert "".join(each["token"] for each in chat) == "It is well, thank you."
    assert {len(each["top_logprobs"]) for each in chat} == {2}
    found = ask(speaker, "completions", "#plain", logprobs=2)["choices"][0]["logprobs"]
    assert "".join(found["tokens"][:-1]) == "It is well, thank you."
    assert found["text_offset"][:2] == [0, len(found["tokens"][0])]


def test_an_impossible_token_has_a_finite_log_probability(speaker: httpx.Client) -> None:
    scores = ask(speaker, "completions", "a b", echo=True, logprobs=1, max_tokens=0)["choices"][0]["logprobs"]
    assert scores["token_logprobs"][0] is None
    assert all(score > -10_000 for score in scores["token_logprobs"][1:])


def test_streamed_log_probabilities_of_a_completion_have_text_offsets(speaker: httpx.Client) -> None:
    text = speaker.post("/v1/completions", json=body("completions", "#plain", logprobs=1, stream=True)).text
    chunks = [json.loads(line[6:]) for line in text.split("\n\n") if line.startswith("data: {")]
    scored = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["logprobs"]]
    said = "It is well, thank you."
    for choice in scored[:-1]:
        (token,), (at,) = choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"]
        assert said[at : at + len(token)] == token


def test_streaming_the_scores_of_a_prompt_is_refused(speaker: httpx.Client) -> None:
    answer = speaker.post("/v1/completions", json=body("completions", echo=True, logprobs=1, stream=True))
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "echo"


# Schemas, tools, thoughts


def form(dialect: str) -> dict[str, Any]:
    named = {"name": "answer", "schema": ANSWER_SCHEMA, "strict": True}
    if dialect == "chat":
        return {"response_format": {"type": "json_schema", "json_schema": named}}
    if dialect == "responses":
        return {"text": {"format": {"type": "json_schema", **named}}}
    return {"output_config": {"format": {"type": "json_schema", "schema": ANSWER_SCHEMA}}}


@pytest.mark.parametrize("dialect", CHATTING)
def test_a_schema_is_followed_even_if_the_model_prefers_other_text(
    speaker: httpx.Client, dialect: str
) -> None:
    more = {MAX_TOKENS[dialect]: 400}
    assert json.loads(says(speaker, dialect, "#json", **form(dialect), **more)) == {"answer": 42}
    said = says(speaker, dialect, "#plain", **form(dialect), **more)
    assert not said.strip().startswith("It")


@pytest.mark.parametrize("dialect", ["chat", "responses"])
def test_an_answer_may_be_constrained_to_any_json_object(speaker: httpx.Client, dialect: str) -> None:
    kind = {"type": "json_object"}
    more = {"response_format": kind} if dialect == "chat" else {"text": {"format": kind}}
    assert json.loads(says(speaker, dialect, "#json", max_output_tokens=99, **more) if dialect == "responses" else
                      says(speaker, dialect, "#json", max_tokens=99, **more)) == {"answer": 42}  # fmt: skip


@pytest.mark.parametrize("dialect", ["chat", "responses"])
def test_a_json_object_may_name_its_schema(speaker: httpx.Client, dialect: str) -> None:
    """As llama.cpp and Together take it, and instructor sends it."""
    kind = {"type": "json_object", "schema": ANSWER_SCHEMA}
    more = {"response_format": kind} if dialect == "chat" else {"text": {"format": kind}}
    most = {MAX_TOKENS[dialect]: 400}
    assert json.loads(says(speaker, dialect, "#json", **most, **more)) == {"answer": 42}
    assert says(speaker, dialect, "#plain", **most, **more) == says(
        speaker, dialect, "#plain", **most, **form(dialect)
    )


Choice = Callable[[str], dict[str, Any]]
AUTO: Choice = lambda dialect: {}  # noqa: E731
NONE: Choice = lambda dialect: {"tool_choice": {"type": "none"} if dialect == "messages" else "none"}  # noqa: E731
MUST: Choice = lambda dialect: {"tool_choice": {"type": "any"} if dialect == "messages" else "required"}  # noqa: E731


def named(dialect: str) -> dict[str, Any]:
    spelled: dict[str, dict[str, Any]] = {
        "chat": {"type": "function", "function": {"name": "get_weather"}},
        "responses": {"type": "function", "name": "get_weather"},
        "messages": {"type": "tool", "name": "get_weather"},
    }
    return {"tool_choice": spelled[dialect]}


def one(dialect: str, choice: Any = None) -> dict[str, Any]:
    if dialect == "messages":
        return {"tool_choice": {**(choice or {"type": "auto"}), "disable_parallel_tool_use": True}}
    return {"parallel_tool_calls": False} | ({"tool_choice": choice} if choice else {})


CALLS = [("get_weather", {"city": "Oslo"}), ("get_weather", {"city": "Rome", "days": 2})]


@pytest.mark.parametrize("dialect", CHATTING)
@pytest.mark.parametrize(
    ("said", "choice", "expected"),
    [
        ("#weather", AUTO, CALLS), ("#plain", AUTO, []), ("#thoughtful", MUST, CALLS), ("#thoughtful", named, CALLS),
        ("#weather", one, CALLS[:1]), ("#thoughtful", one, CALLS[:1]), ("#json", NONE, []),
    ],
)  # fmt: skip
def test_tools_are_called_according_to_the_tool_choice(
    speaker: httpx.Client, dialect: str, said: str, choice: Choice, expected: list[Any]
) -> None:
    more = {MAX_TOKENS[dialect]: 200, "tools": TOOLS[dialect]}
    assert calls_of(dialect, ask(speaker, dialect, said, **more, **choice(dialect))) == expected


@pytest.mark.parametrize("dialect", CHATTING)
def test_tools_that_must_not_be_called_are_not_in_the_prompt(speaker: httpx.Client, dialect: str) -> None:
    def num_prompt(**more: Any) -> int:
        usage = ask(speaker, dialect, **more)["usage"]
        cached = usage.get("cache_read_input_tokens", 0)
        return int(usage.get("prompt_tokens", usage.get("input_tokens"))) + int(cached)

    without = num_prompt()
    assert num_prompt(tools=TOOLS[dialect], **NONE(dialect)) == without
    assert num_prompt(tools=TOOLS[dialect]) > without + 50


@pytest.mark.parametrize("dialect", CHATTING)
def test_a_call_of_a_tool_that_was_not_offered_is_text(speaker: httpx.Client, dialect: str) -> None:
    answer = ask(speaker, dialect, "#weather", **{MAX_TOKENS[dialect]: 200})
    assert calls_of(dialect, answer) == []
    assert "get_weather" in text_of(dialect, answer)


@pytest.mark.parametrize("dialect", ["chat", "responses"])
def test_with_allowed_tools_the_prompt_has_all_tools_and_the_answer_calls_only_allowed_ones(
    speaker: httpx.Client, dialect: str
) -> None:
    other = {"name": "clock", "description": "The time", "parameters": {"type": "object", "properties": {}}}
    both = {
        "chat": [OPENAI_TOOL, {"type": "function", "function": other}],
        "responses": [*TOOLS["responses"], {"type": "function", **other}],
    }[dialect]

    def allowed(name: str, mode: str) -> dict[str, Any]:
        if dialect == "chat":
            tools = [{"type": "function", "function": {"name": name}}]
            return {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}}
        return {
            "tool_choice": {
                "type": "allowed_tools",
                "mode": mode,
                "tools": [{"type": "function", "name": name}],
            }
        }

    more = {MAX_TOKENS[dialect]: 200, "tools": both}
    assert (
        calls_of(dialect, ask(speaker, dialect, "#weather", **more, **allowed("get_weather", "auto")))
        == CALLS
    )
    found = calls_of(dialect, ask(speaker, dialect, "#thoughtful", **more, **allowed("clock", "required")))
    assert {name for name, _ in found} == {"clock"}
    answer = speaker.post(PATHS[dialect], json=body(dialect, **more, **allowed("rm", "auto")))
    assert answer.status_code == 400


@pytest.mark.parametrize("dialect", CHATTING)
def test_a_tool_that_was_not_offered_cannot_be_chosen(speaker: httpx.Client, dialect: str) -> None:
    assert speaker.post(PATHS[dialect], json=body(dialect, **named(dialect))).status_code == 400
    assert speaker.post(PATHS[dialect], json=body(dialect, **MUST(dialect))).status_code == 400


@pytest.mark.parametrize("dialect", CHATTING)
def test_with_tools_and_a_schema_an_answer_is_a_call_or_follows_the_schema(
    speaker: httpx.Client, dialect: str
) -> None:
    more = {MAX_TOKENS[dialect]: 200, "tools": TOOLS[dialect], **form(dialect)}
    assert calls_of(dialect, ask(speaker, dialect, "#thoughtful", **more)) == CALLS
    assert json.loads(says(speaker, dialect, "#json", **more)) == {"answer": 42}


def test_an_argument_outside_the_schema_cannot_be_generated(speaker: httpx.Client) -> None:
    cities = {"type": "object", "properties": {"city": {"enum": ["Oslo"]}}, "required": ["city"]}
    tools = [{"type": "function", "function": WEATHER | {"parameters": cities}}]
    answer = ask(speaker, "chat", "#wrong", tools=tools, max_tokens=300, parallel_tool_calls=False)
    assert calls_of("chat", answer) == [("get_weather", {"city": "Oslo"})]


@pytest.mark.parametrize("dialect", CHATTING)
def test_an_optional_strict_tool_follows_its_schema_or_is_refused(
    speaker: httpx.Client, dialect: str
) -> None:
    def asked(city: dict[str, Any], *, strict: bool) -> dict[str, Any]:
        tools = copy.deepcopy(TOOLS[dialect])
        told = tools[0]["function"] if dialect == "chat" else tools[0]
        told["strict"] = strict
        schema = {"type": "object", "properties": {"city": city}, "required": ["city"]}
        told["input_schema" if dialect == "messages" else "parameters"] = schema
        return greedy(dialect, "#wrong", 300) | {"tools": tools}

    enum, look_ahead = {"enum": ["Oslo"]}, {"type": "string", "pattern": "^(?=O)O"}
    answer = speaker.post(PATHS[dialect], json=asked(enum, strict=True))
    assert answer.status_code == 200, answer.text
    assert calls_of(dialect, answer.json())[0] == ("get_weather", {"city": "Oslo"})
    assert "x-ignored-params" not in answer.headers
    assert speaker.post(PATHS[dialect], json=asked(look_ahead, strict=False)).status_code == 200
    refused = speaker.post(PATHS[dialect], json=asked(look_ahead, strict=True))
    assert refused.status_code == 400
    assert "grammar" in refused.json()["error"]["message"]


@pytest.mark.parametrize("said", ["How are you?", "#plain", "#think"])
def test_optional_tools_that_are_not_called_change_no_token(
    speaker: httpx.Client, speaking_service: Service, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    """The grammar waits for a mark and masks nothing before it."""
    more: dict[str, Any] = {"tools": TOOLS["chat"], "temperature": 1, "seed": 11, "max_tokens": 60}
    held = ask(speaker, "chat", said, **more)["choices"]
    monkeypatch.setattr(speaking_service.prompts, "grammar", lambda *_, **__: None)
    assert ask(speaker, "chat", said, **more)["choices"] == held


@pytest.mark.parametrize("dialect", CHATTING)
def test_thoughts_are_switched_on_and_off_and_counted(speaker: httpx.Client, dialect: str) -> None:
    off = {"chat": {"reasoning_effort": "none"}, "responses": {"reasoning": {"effort": "none"}},
           "messages": {"thinking": {"type": "disabled"}}}[dialect]  # fmt: skip
    on = {"chat": {"reasoning_effort": "high"}, "responses": {"reasoning": {"effort": "high"}},
          "messages": {"thinking": {"type": "enabled"}}}[dialect]  # fmt: skip
    more = {MAX_TOKENS[dialect]: 60}

    def usage(said: str, **asked: Any) -> tuple[int, int, int]:
        found = ask(speaker, dialect, said, **asked, **more)["usage"]
        details = found.get("completion_tokens_details") or found["output_tokens_details"]
        prompt = found.get("prompt_tokens", found.get("input_tokens")) + found.get(
            "cache_read_input_tokens", 0
        )
        new = found.get("completion_tokens", found.get("output_tokens"))
        return prompt, new, details.get("reasoning_tokens", details.get("thinking_tokens"))

    _, new, thought = usage("#think", **on)
    assert 0 < thought < new
    assert usage("#plain", **on) == usage("#plain")
    assert usage("#plain")[2] == 0
    # The template adds a closed block of thoughts.
    assert usage("#plain", **off)[0] > usage("#plain", **on)[0]


def test_a_template_variable_is_set_by_name(speaker: httpx.Client) -> None:
    plain = ask(speaker, "chat")["usage"]["prompt_tokens"]
    more = {"chat_template_kwargs": {"enable_thinking": False}}
    assert ask(speaker, "chat", **more)["usage"]["prompt_tokens"] > plain


# Usage, progress, fields without effect


@pytest.mark.parametrize("dialect", DIALECTS)
def test_cached_tokens_are_counted_in_each_dialects_field(speaker: httpx.Client, dialect: str) -> None:
    said = f"A beginning that {dialect} alone has, and that is long enough for several blocks. " * 3
    first, second = (ask(speaker, dialect, said)["usage"] for _ in range(2))
    if dialect == "messages":
        assert first["cache_read_input_tokens"] < second["cache_read_input_tokens"]
        assert sum(first[name] for name in ("input_tokens", "cache_read_input_tokens")) == sum(
            second[name] for name in ("input_tokens", "cache_read_input_tokens")
        )
    else:
        name = "input_tokens_details" if dialect == "responses" else "prompt_tokens_details"
        assert first[name]["cached_tokens"] < second[name]["cached_tokens"]


@pytest.mark.parametrize("dialect", ["chat", "completions"])
def test_progress_and_timings_are_sent_on_request(speaker: httpx.Client, dialect: str) -> None:
    def chunks(**more: Any) -> list[dict[str, Any]]:
        text = speaker.post(PATHS[dialect], json=body(dialect, stream=True, **more)).text
        return [json.loads(line[6:]) for line in text.split("\n\n") if line.startswith("data: {")]

    told = chunks(return_progress=True, timings=True)
    progress = [chunk["prompt_progress"] for chunk in told if "prompt_progress" in chunk]
    assert progress[-1]["processed"] == progress[-1]["total"] > 0
    assert told[-1]["choices"] == []
    assert told[-1]["timings"]["new_tokens"] == 12
    assert "usage" not in told[-1]
    assert not [chunk for chunk in chunks() if "prompt_progress" in chunk or "timings" in chunk]
    assert ask(speaker, dialect, timings=True)["timings"]["new_tokens"] == 12


IGNORED: dict[str, dict[str, Any]] = {
    "chat": {
        "service_tier": "auto", "verbosity": "low", "prediction": {"type": "content", "content": "x"},
        "web_search_options": {}, "store": True, "metadata": {"a": "b"}, "safety_identifier": "x",
        "prompt_cache_key": "k", "prompt_cache_retention": "24h", "prompt_cache_options": {"mode": "implicit"},
        "user": "u",
    },
    "completions": {"user": "u"},
    "responses": {
        "metadata": {"a": "b"}, "truncation": "disabled", "service_tier": "auto",
        "prompt_cache_key": "k", "prompt_cache_retention": "24h", "prompt_cache_options": {}, "safety_identifier": "s",
        "user": "u", "stream_options": {"include_obfuscation": False}, "max_tool_calls": 3,
    },
    "messages": {
        "metadata": {"user_id": "u"}, "service_tier": "auto", "cache_control": {"type": "ephemeral"}, "container": "c",
        "context_management": {"edits": []}, "inference_geo": "eu",
    },
}  # fmt: skip


@pytest.mark.parametrize("dialect", DIALECTS)
def test_fields_without_effect_are_named_in_a_header(speaker: httpx.Client, dialect: str) -> None:
    answer = speaker.post(PATHS[dialect], json=body(dialect) | IGNORED[dialect])
    assert answer.status_code == 200, answer.text
    assert set(answer.headers["x-ignored-params"].split(", ")) == set(IGNORED[dialect])
    assert "x-ignored-params" not in speaker.post(PATHS[dialect], json=body(dialect)).headers


def test_parts_without_effect_are_also_named(speaker: httpx.Client) -> None:
    more = {
        "include": ["reasoning.encrypted_content", "message.output_text.logprobs"], "text": {"verbosity": "low"},
        "reasoning": {"summary": "auto"}, "tools": [*TOOLS["responses"], {"type": "web_search"}],
    }  # fmt: skip
    answer = speaker.post("/v1/responses", json=body("responses", **more))
    assert answer.headers["x-ignored-params"].split(", ") == [
        "include.reasoning.encrypted_content", "text.verbosity", "reasoning.summary", "tools.web_search"
    ]  # fmt: skip
    answer = speaker.post(
        "/v1/messages", json=body("messages", thinking={"type": "enabled", "budget_tokens": 2000})
    )
    assert answer.headers["x-ignored-params"] == "thinking.budget_tokens"


@pytest.mark.parametrize("dialect", DIALECTS)
def test_an_unknown_field_is_refused_by_name(speaker: httpx.Client, dialect: str) -> None:
    answer = speaker.post(PATHS[dialect], json=body(dialect, frobnicate=1))
    assert answer.status_code == 400
    assert "frobnicate" in answer.json()["error"]["message"]


# Conversations


def test_thoughts_of_earlier_turns_are_accepted_under_both_names(speaker: httpx.Client) -> None:
    def prompt(name: str) -> str:
        call = {"id": "c", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}
        messages = [
            {"role": "user", "content": "x"}, {"role": "assistant", name: "I thought", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "content": "y"},
        ]  # fmt: skip
        return str(speaker.post("/apply-template", json={"messages": messages}).json()["prompt"])

    assert prompt("reasoning") == prompt("reasoning_content")
    assert "I thought" in prompt("reasoning")


def test_fields_that_openais_client_adds_to_a_turn_are_accepted(speaker: httpx.Client) -> None:
    function = {"name": "get_weather", "arguments": "{}"}
    plain: dict[str, Any] = {
        "role": "assistant",
        "content": "a",
        "tool_calls": [{"id": "c", "type": "function", "function": function}],
    }
    copied = plain | {
        "parsed": {"a": 1}, "annotations": [], "refusal": None, "audio": None,
        "tool_calls": [{"id": "c", "type": "function", "function": function | {"parsed_arguments": {}}}],
    }  # fmt: skip

    def prompt(turn: dict[str, Any]) -> str:
        messages = [
            {"role": "user", "content": "x"},
            turn,
            {"role": "tool", "tool_call_id": "c", "content": "y"},
        ]
        answer = speaker.post("/apply-template", json={"messages": messages})
        assert answer.status_code == 200, answer.text
        return str(answer.json()["prompt"])

    assert prompt(copied) == prompt(plain)


def test_responses_accepts_back_all_items_that_it_returns(speaker: httpx.Client) -> None:
    more = {"tools": TOOLS["responses"], "max_output_tokens": 200}
    first = ask(speaker, "responses", "#thoughtful", **more)
    assert [item["type"] for item in first["output"]] == ["reasoning", "function_call", "function_call"]
    results = [
        {"type": "function_call_output", "call_id": item["call_id"], "output": "#sunny"}
        for item in first["output"]
        if item["type"] == "function_call"
    ]
    conversation = [{"role": "user", "content": "#thoughtful"}, *first["output"], *results]
    second = ask(speaker, "responses", **more | {"input": conversation})
    assert text_of("responses", second) == "It is sunny in both."
    summary = {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "short"}]}
    ask(speaker, "responses", **more | {"input": [conversation[0], summary, *conversation[2:]]})


def test_messages_accepts_back_all_blocks_that_it_returns(speaker: httpx.Client) -> None:
    more = {"tools": TOOLS["messages"], "max_tokens": 200}
    first = ask(speaker, "messages", "#thoughtful", **more)
    assert [block["type"] for block in first["content"]] == ["thinking", "tool_use", "tool_use"]
    results = [
        {"type": "tool_result", "tool_use_id": block["id"], "content": "#sunny"}
        for block in first["content"]
        if block["type"] == "tool_use"
    ]
    conversation = [
        {"role": "user", "content": "#thoughtful"}, {"role": "assistant", "content": first["content"]},
        {"role": "user", "content": results},
    ]  # fmt: skip
    assert says(speaker, "messages", **more | {"messages": conversation}) == "It is sunny in both."


def test_an_abandoned_turn_does_not_race_the_next_one(
    speaker: httpx.Client, speaking_service: Service
) -> None:
    """Send the same conversation again before, while and after its first answer is abandoned."""
    asked = body("chat", "#long", max_tokens=100)
    whole = ask(speaker, "chat", **asked)["choices"]
    with ThreadPoolExecutor(1) as other:
        for num_events in range(2, 18):
            with speaker.stream("POST", PATHS["chat"], json=asked | {"stream": True}) as left:
                lines = left.iter_lines()
                for _ in range(num_events):
                    next(lines)
                again = other.submit(ask, speaker, "chat", **asked)
                time.sleep(num_events * 0.002)
            assert again.result()["choices"] == whole
    wait_until(
        lambda: speaking_service.loop.snapshot().engine.num_waiting == 0
    )  # the server sees a client leave
