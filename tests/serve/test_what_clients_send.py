"""Fields that clients and tools send beyond those of a dialect: each takes effect, is named as idle, or is refused."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import pytest
from pydantic import BaseModel

from argosy.errors import PromptTooLong
from argosy.serve.answer.sampling_fields import ForOpenAI, Neutral
from argosy.serve.answer.service import Service
from argosy.serve.app import ROUTES
from argosy.serve.http.failures import error_body
from tests.serve.dialects import DIALECTS, MAX_TOKENS, PATHS, TOOLS, greedy
from tests.serve.record import read_events
from tests.serve.speaking import CONTEXT_TOKENS, END, WEATHER

OPENAI = ("chat", "completions", "responses")
BODIES = {route.rule.path: route.body for route in ROUTES if route.body is not None}


def body(dialect: str, said: str = "How are you?", **more: Any) -> dict[str, Any]:
    return greedy(dialect, said, 12) | more


def ask(speaker: httpx.Client, dialect: str, said: str = "How are you?", **more: Any) -> httpx.Response:
    answer = speaker.post(PATHS[dialect], json=body(dialect, said, **more))
    assert answer.status_code == 200, answer.text
    return answer


def ignored(answer: httpx.Response) -> set[str]:
    return set(answer.headers.get("x-ignored-params", "").split(", ")) - {""}


def text_of(dialect: str, answer: httpx.Response) -> str:
    found = answer.json()
    if dialect == "completions":
        return str(found["choices"][0]["text"])
    if dialect == "chat":
        return str(found["choices"][0]["message"]["content"])
    if dialect == "responses":
        return "".join(part["text"] for item in found["output"] for part in item.get("content", ()))
    return "".join(block.get("text", "") for block in found["content"])


def num_new(answer: httpx.Response) -> int:
    usage = answer.json()["usage"]
    return int(usage.get("completion_tokens", usage.get("output_tokens")))


# ── null ────────────────────────────────────────────────────────────────────────────────────────────────────────────

OPTIONAL = [
    (dialect, name)
    for dialect in DIALECTS
    for name, field in BODIES[PATHS[dialect]].model_fields.items()
    if not field.is_required()
]


@pytest.mark.parametrize(("dialect", "name"), OPTIONAL)
def test_null_is_accepted_for_every_optional_field(dialect: str, name: str) -> None:
    model = BODIES[PATHS[dialect]]
    plain = model.model_validate(body(dialect))
    given = body(dialect)
    given[name] = None
    if given.keys() == body(dialect).keys():  # a field that the plain body also has
        assert getattr(model.model_validate(given), name) is None
    else:
        assert model.model_validate(given) == plain
        assert name not in model.model_validate(given).ignored()


def models_in(kind: Any, found: set[type[BaseModel]]) -> set[type[BaseModel]]:
    """All models that a type contains."""
    if isinstance(kind, type) and issubclass(kind, BaseModel) and kind not in found:
        found.add(kind)
        for field in kind.model_fields.values():
            models_in(field.annotation, found)
    for part in getattr(kind, "__args__", ()):
        models_in(part, found)
    return found


def test_no_part_of_a_body_treats_null_specially() -> None:
    parts = {model for kind in BODIES.values() for model in models_in(kind, set())}
    assert len(parts) > 40
    for model in parts:
        needed = {field.alias or name for name, field in model.model_fields.items() if field.is_required()}
        names = {field.alias or name for name, field in model.model_fields.items()} | {"nobody_knows"}
        optional = dict.fromkeys(sorted(names - needed))
        if not needed:
            assert model.model_validate(optional) == model.model_validate({})


@pytest.mark.parametrize("dialect", DIALECTS)
def test_null_for_a_required_field_is_refused_by_name(speaker: httpx.Client, dialect: str) -> None:
    name = {"completions": "prompt", "responses": "input"}.get(dialect, "messages")
    answer = speaker.post(PATHS[dialect], json=body(dialect, **{name: None}))
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(f"{name}: expected")
    assert "found null" in answer.json()["error"]["message"]


def test_null_inside_a_message_is_ignored(speaker: httpx.Client) -> None:
    plain = {"role": "user", "content": [{"type": "text", "text": "#plain"}]}
    nulls = {
        "role": "user",
        "name": None,
        "content": [{"type": "text", "text": "#plain", "cache_control": None}],
    }
    counts = {
        ask(speaker, "chat", messages=[turn]).json()["usage"]["prompt_tokens"] for turn in (plain, nulls)
    }
    assert len(counts) == 1
    ask(speaker, "responses", input=[{"type": None, "role": "user", "content": "#plain", "id": None}])


# ── idle fields ─────────────────────────────────────────────────────────────────────────────────────────────────────

VALUES: dict[str, Any] = {
    "user": "u", "metadata": {"a": "b"}, "client_metadata": {}, "safety_identifier": "s", "service_tier": "auto",
    "store": True, "prompt_cache_key": "k", "prompt_cache_retention": "24h", "prompt_cache_options": {},
    "cache_prompt": True, "cache_control": {"type": "ephemeral"}, "prediction": {"type": "content", "content": "x"},
    "provider_specific_fields": {"x": 1}, "web_search_options": {},
    "max_tool_calls": 3, "verbosity": "low", "guided_decoding_backend": "auto",
}  # fmt: skip


@pytest.mark.parametrize("dialect", OPENAI)
def test_every_idle_field_is_accepted_changes_nothing_and_is_named(
    speaker: httpx.Client, dialect: str
) -> None:
    assert VALUES.keys() == ForOpenAI.model_fields.keys()
    plain, answer = ask(speaker, dialect), ask(speaker, dialect, **VALUES)
    assert text_of(dialect, answer) == text_of(dialect, plain)
    assert ignored(answer) == VALUES.keys() - ({"store"} if dialect == "responses" else set())
    assert ignored(plain) == set()


def test_idle_fields_of_messages_parts_calls_and_tools_are_accepted_and_named(speaker: httpx.Client) -> None:
    """LiteLLM and OpenRouter's clients send such fields back."""
    note = {"cache_control": {"type": "ephemeral"}}
    fields = {"provider_specific_fields": {"a": 1}}
    call = {
        "id": "c", "type": "function", **fields,
        "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}', **fields},
    }  # fmt: skip
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "#weather", **note}], "id": "m1"},
        {
            "role": "assistant",
            "content": None,
            "id": "m2",
            "reasoning_details": [{"type": "x"}],
            "tool_calls": [call],
        },
        {"role": "tool", "tool_call_id": "c", "content": "#sunny", **note},
    ]
    tools = [TOOLS["chat"][0] | note]
    answer = ask(speaker, "chat", messages=messages, tools=tools, max_tokens=60)
    assert text_of("chat", answer) == "It is sunny in both."
    assert ignored(answer) == {
        "messages.id", "messages.content.cache_control", "messages.reasoning_details", "messages.cache_control",
        "messages.tool_calls.provider_specific_fields", "messages.tool_calls.function.provider_specific_fields",
        "tools.cache_control",
    }  # fmt: skip


# What SillyTavern, KoboldAI Lite, the page of llama-server and vLLM's clients send when their user has chosen nothing.
NEUTRAL: dict[str, Any] = {
    "typical_p": 1.0, "typical": 1, "typ_p": 1.0, "tfs": 1, "tfs_z": 1.0, "top_a": 0, "top_n_sigma": -1, "nsigma": 0,
    "epsilon_cutoff": 0, "eta_cutoff": 0, "skew": 0.0, "smoothing_factor": 0, "smoothing_curve": 1,
    "dynamic_temperature": False, "dynatemp_range": 0, "dynatemp_exponent": 1, "xtc_probability": 0,
    "xtc_threshold": 0.1, "mirostat": 0, "mirostat_mode": 0, "mirostat_tau": 5, "mirostat_eta": 0.1,
    "dry_multiplier": 0, "dry_base": 1.75, "dry_allowed_length": 2, "dry_penalty_last_n": -1,
    "dry_sequence_breakers": ["\n", ":"], "repeat_last_n": 64, "encoder_repetition_penalty": 1,
    "no_repeat_ngram_size": 0, "penalty_alpha": 0, "use_beam_search": False, "num_beams": 1, "length_penalty": 1.0,
    "early_stopping": False, "guidance_scale": 1, "negative_prompt": "", "ban_eos_token": False,
    "custom_token_bans": "", "banned_tokens": "", "banned_strings": [], "min_length": 0, "priority": 0, "lora": [],
    "include_stop_str_in_output": False, "samplers": ["top_k", "temperature"], "sampler_priority": ["top_k"],
    "sampler_order": [6, 0, 1], "reasoning_format": "auto", "timings_per_token": True, "keep_alive": "5m", "n_keep": 0,
    "n_probs": 0, "id_slot": -1, "repetition_penalty_range": 0, "rep_pen_range": 0, "rep_pen_slope": 1,
    "do_sample": True, "add_bos_token": True, "spaces_between_special_tokens": True, "grammar_string": "",
    "max_tokens_second": 0, "temperature_last": False, "truncation_length": 8192, "num_ctx": 8192, "api_type": "ooba",
    "api_server": "http://127.0.0.1:8080", "legacy_api": False,
}  # fmt: skip
CHANGING: dict[str, Any] = {
    "typical_p": 0.9, "top_a": 0.2, "top_n_sigma": 1, "xtc_probability": 0.5, "mirostat": 2, "dry_multiplier": 0.8,
    "use_beam_search": True, "num_beams": 4, "length_penalty": True, "early_stopping": True, "priority": False,
    "negative_prompt": "no", "banned_tokens": ["x"], "banned_strings": ["x"], "lora": [{"id": 0, "scale": 1}],
    "reasoning_format": "none", "logit_bias": [1], "do_sample": False, "add_bos_token": False, "max_tokens_second": 3,
    "grammar_string": "root ::= x",
}  # fmt: skip


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_neutral_value_is_accepted_in_every_dialect_changes_nothing_and_is_named(
    speaker: httpx.Client, dialect: str
) -> None:
    assert NEUTRAL.keys() == Neutral.model_fields.keys()
    plain, answer = ask(speaker, dialect), ask(speaker, dialect, **NEUTRAL, logit_bias=[])
    assert text_of(dialect, answer) == text_of(dialect, plain)
    assert len(ignored(answer)) == 32  # at most that many are named
    assert ignored(answer) <= NEUTRAL.keys()


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("name", CHANGING)
def test_a_value_that_would_change_the_answer_is_refused_by_name(
    speaker: httpx.Client, dialect: str, name: str
) -> None:
    answer = speaker.post(PATHS[dialect], json=body(dialect, **{name: CHANGING[name]}))
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(f"{name}")


def test_penalties_over_the_last_tokens_only_are_refused(speaker: httpx.Client) -> None:
    for more in ({"repeat_last_n": -1, "repeat_penalty": 1.1}, {"repeat_last_n": 64, "repeat_penalty": 1.0}):
        ask(speaker, "chat", **more)
    answer = speaker.post(PATHS["chat"], json=body("chat", repeat_last_n=64, repeat_penalty=1.1))
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("repeat_last_n: expected -1")


def test_sillytaverns_text_completion_is_accepted_as_it_is_with_its_default_settings(
    speaker: httpx.Client,
) -> None:
    """What `getTextGenGenerationData` makes for the types Default and vLLM, here with a limit of 20 tokens."""
    stop = ["\nAnn:", "thank"]
    default: dict[str, Any] = {
        "prompt": "#plain", "model": "tiny", "max_new_tokens": 20, "max_tokens": 20, "temperature": 0, "top_p": 0.5,
        "typical_p": 1, "typical": 1, "sampler_seed": -1, "min_p": 0, "repetition_penalty": 1.2,
        "frequency_penalty": 0, "presence_penalty": 0, "top_k": 40, "skew": 0, "min_length": 0, "min_tokens": 0,
        "num_beams": 1, "length_penalty": 1, "early_stopping": False, "add_bos_token": True, "smoothing_factor": 0,
        "smoothing_curve": 1, "dry_allowed_length": 2, "dry_multiplier": 0, "dry_base": 1.75,
        "dry_sequence_breakers": '["\\n", ":", "\\"", "*"]', "dry_penalty_last_n": 0, "max_tokens_second": 0,
        "sampler_priority": ["temperature", "top_k"], "stopping_strings": stop, "stop": stop,
        "truncation_length": 8192, "ban_eos_token": False, "skip_special_tokens": True, "top_a": 0, "tfs": 1,
        "epsilon_cutoff": 0, "eta_cutoff": 0, "mirostat_mode": 0, "mirostat_tau": 5, "mirostat_eta": 0.1,
        "custom_token_bans": "", "banned_strings": [], "api_type": "ooba", "api_server": "http://127.0.0.1:8080",
        "legacy_api": False, "xtc_threshold": 0.1, "xtc_probability": 0, "rep_pen": 1.2, "rep_pen_range": 0,
        "repetition_penalty_range": 0, "encoder_repetition_penalty": 1, "no_repeat_ngram_size": 0, "penalty_alpha": 0,
        "temperature_last": True, "do_sample": True, "seed": -1, "guidance_scale": 1, "negative_prompt": "",
        "grammar_string": "", "repeat_penalty": 1.2, "tfs_z": 1, "repeat_last_n": 0, "n_predict": 20,
        "num_predict": 20, "num_ctx": 8192, "mirostat": 0, "ignore_eos": False, "rep_pen_slope": 1,
    }  # fmt: skip
    vllm = (
        "prompt",
        "model",
        "max_tokens",
        "temperature",
        "top_p",
        "stop",
        "top_k",
        "min_p",
        "repetition_penalty",
    )
    filtered = {name: default[name] for name in vllm} | {
        "n": 1, "best_of": 1, "length_penalty": 1, "ignore_eos": False, "spaces_between_special_tokens": True,
        "skip_special_tokens": True,
    }  # fmt: skip
    for asked in (default, filtered):
        answer = speaker.post("/v1/completions", json=asked)
        assert answer.status_code == 200, answer.text
        assert text_of("completions", answer) == "It is well, "
    for more in (
        {"max_new_tokens": 21},
        {"rep_pen": 1.1},
        {"rep_pen_range": 64},
        {"stopping_strings": ["x"]},
    ):
        refused = speaker.post("/v1/completions", json=default | more)
        assert refused.status_code == 400
        assert next(iter(more)) in refused.json()["error"]["message"]


@pytest.mark.parametrize("name", ["logits_processors", "bad_words", "suffix", "grammar"])
def test_an_unsupported_field_that_would_change_the_answer_is_refused_by_name(
    speaker: httpx.Client, name: str
) -> None:
    answer = speaker.post(PATHS["chat"], json=body("chat", **{name: 1}))
    assert answer.status_code == 400
    assert f"unknown field '{name}'" in answer.json()["error"]["message"]
    assert "hint: " in answer.json()["error"]["message"]


# ── fields with an effect ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dialect", DIALECTS)
def test_ignore_eos_min_tokens_and_stop_token_ids_change_where_an_answer_ends(
    speaker: httpx.Client, speaking_service: Service, dialect: str
) -> None:
    limit = {MAX_TOKENS[dialect]: 40}
    assert num_new(ask(speaker, dialect, "#plain", **limit)) < 40
    assert num_new(ask(speaker, dialect, "#plain", ignore_eos=True, **limit)) == 40
    assert num_new(ask(speaker, dialect, "#plain", min_tokens=30, **limit)) >= 30
    assert speaking_service.tokenizer is not None
    stop = speaking_service.tokenizer.encode("It is well")[-1]
    answer = ask(speaker, dialect, "#plain", stop_token_ids=[stop], **limit)
    assert text_of(dialect, answer).startswith("It")
    assert "thank" not in text_of(dialect, answer)


@pytest.mark.parametrize("dialect", OPENAI)
def test_special_tokens_are_shown_on_request(
    speaker: httpx.Client, speaking_service: Service, dialect: str
) -> None:
    assert speaking_service.tokenizer is not None
    end = speaking_service.tokenizer.control_id(END)
    more = {"ignore_eos": True, "logit_bias": {str(end): 100}, MAX_TOKENS[dialect]: 3}
    assert text_of(dialect, ask(speaker, dialect, **more)).count(END) == 0
    assert text_of(dialect, ask(speaker, dialect, skip_special_tokens=False, **more)) == END * 3


@pytest.mark.parametrize("dialect", OPENAI)
def test_minus_one_means_no_limit_and_a_random_seed(speaker: httpx.Client, dialect: str) -> None:
    name = MAX_TOKENS[dialect]
    answer = ask(speaker, dialect, "#long", **{name: -1, "seed": -1})
    assert num_new(answer) > 300
    for value in (-2, -1.5, 0 if dialect != "completions" else -3, True):
        refused = speaker.post(PATHS[dialect], json=body(dialect, **{name: value}))
        assert refused.status_code == 400, value
    texts = {text_of(dialect, ask(speaker, dialect, temperature=1, seed=-1)) for _ in range(4)}
    assert len(texts) > 1


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_repetition_penalty_has_two_names(speaker: httpx.Client, dialect: str) -> None:
    more = {MAX_TOKENS[dialect]: 60}
    one = text_of(dialect, ask(speaker, dialect, repetition_penalty=3.0, **more))
    assert text_of(dialect, ask(speaker, dialect, repeat_penalty=3.0, **more)) == one
    both = body(dialect, repeat_penalty=3.0, repetition_penalty=2.0)
    refused = speaker.post(PATHS[dialect], json=both)
    assert refused.status_code == 400
    assert "repeat_penalty" in refused.json()["error"]["message"]


GUIDED = [
    ("guided_json", {"type": "object", "properties": {"answer": {"const": 42}}, "required": ["answer"]}),
    ("guided_json", '{"type": "object", "properties": {"answer": {"const": 42}}, "required": ["answer"]}'),
    ("guided_choice", ['{"answer": 42}', "no"]),
    ("guided_regex", r'\{"answer": 4[0-9]\}'),
    ("guided_grammar", 'start: "{\\"answer\\": 42}"'),
]


@pytest.mark.parametrize("dialect", ["chat", "completions"])
@pytest.mark.parametrize(("name", "value"), GUIDED)
def test_a_constraint_may_be_given_by_its_older_name(
    speaker: httpx.Client, dialect: str, name: str, value: Any
) -> None:
    answer = ask(speaker, dialect, "#json", max_tokens=40, **{name: value})
    assert json.loads(text_of(dialect, answer)) == {"answer": 42}
    assert ignored(answer) == set()
    other = {"guided_regex": "a"} if name == "guided_choice" else {"guided_choice": ["a"]}
    for more in ({"structured_outputs": {"choice": ["a"]}}, other):
        refused = speaker.post(PATHS[dialect], json=body(dialect, **{name: value}, **more))
        assert refused.status_code == 400
        assert "an answer can have only one form" in refused.json()["error"]["message"]


@pytest.mark.parametrize("dialect", ["chat", "completions"])
@pytest.mark.parametrize("value", ["{", "[1]", '{"a": 1, "a": 2}'])
def test_a_schema_as_text_is_parsed_strictly(speaker: httpx.Client, dialect: str, value: str) -> None:
    refused = speaker.post(PATHS[dialect], json=body(dialect, guided_json=value))
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "guided_json"


@pytest.mark.parametrize("dialect", ["chat", "completions"])
def test_usage_comes_with_every_chunk_on_request(speaker: httpx.Client, dialect: str) -> None:
    def usages(options: dict[str, bool]) -> tuple[httpx.Response, list[Any]]:
        answer = ask(speaker, dialect, "#plain", stream=True, stream_options=options)
        data = [event["data"] for event in read_events(answer.text)]
        return answer, [chunk.get("usage") for chunk in data if chunk != "[DONE]"]

    _, found = usages({"include_usage": True, "continuous_usage_stats": True})
    assert all(found)
    counts = [usage["completion_tokens"] for usage in found]
    assert counts == sorted(counts)
    assert counts[-1] > len(set(counts)) - 1 > counts[-1] / 2  # a chunk may have the text of two tokens
    assert len({usage["prompt_tokens"] for usage in found}) == 1
    answer, found = usages({"continuous_usage_stats": True})
    assert not any(found)
    assert ignored(answer) == {"stream_options.continuous_usage_stats"}


SWITCHES = [
    {"enable_thinking": False}, {"thinking": False}, {"thinking": {"type": "disabled"}},
    {"reasoning": {"enabled": False}}, {"reasoning": {"effort": "none"}},
]  # fmt: skip


@pytest.mark.parametrize("switch", SWITCHES)
def test_thinking_is_switched_off_by_the_fields_of_other_servers(
    speaker: httpx.Client, switch: dict[str, Any]
) -> None:
    expected = ask(speaker, "chat", reasoning_effort="none").json()["usage"]["prompt_tokens"]
    answer = ask(speaker, "chat", **switch)
    assert answer.json()["usage"]["prompt_tokens"] == expected
    assert ignored(answer) == set()
    if switch.keys() <= {"thinking", "enable_thinking"}:
        assert ask(speaker, "responses", **switch).json()["usage"]["input_tokens"] == expected
        assert ignored(ask(speaker, "completions", **switch)) == switch.keys()


def test_a_switch_unknown_to_the_template_is_named(client: httpx.Client) -> None:
    answer = client.post("/v1/chat/completions", json=body("chat", enable_thinking=False, max_tokens=2))
    assert ignored(answer) == {"enable_thinking"}
    answer = client.post(
        "/v1/chat/completions", json=body("chat", reasoning={"enabled": True, "max_tokens": 9})
    )
    assert ignored(answer) == {"reasoning.enabled", "reasoning.max_tokens"}
    answer = client.post("/v1/responses", json=body("responses", thinking={"type": "enabled"}))
    assert ignored(answer) == {"thinking"}


@pytest.mark.parametrize("hidden", [{"include_reasoning": False}, {"reasoning": {"exclude": True}}])
@pytest.mark.parametrize("stream", [False, True])
def test_thoughts_are_omitted_from_a_chat_on_request(
    speaker: httpx.Client, hidden: dict[str, Any], stream: bool
) -> None:
    shown = ask(speaker, "chat", "#think", max_tokens=60, stream=stream)
    answer = ask(speaker, "chat", "#think", max_tokens=60, stream=stream, **hidden)
    assert "reasoning_content" in shown.text
    assert "reasoning_content" not in answer.text
    assert ignored(answer) == set()
    if not stream:
        assert text_of("chat", answer) == "It is well."
        assert answer.json()["usage"] | {"prompt_tokens_details": 0} == shown.json()["usage"] | {
            "prompt_tokens_details": 0
        }


def test_thoughts_are_omitted_from_a_response_on_request(speaker: httpx.Client) -> None:
    more = {"max_output_tokens": 60}
    assert [item["type"] for item in ask(speaker, "responses", "#think", **more).json()["output"]] == [
        "reasoning",
        "message",
    ]
    answer = ask(speaker, "responses", "#think", include_reasoning=False, **more)
    assert [item["type"] for item in answer.json()["output"]] == ["message"]


# ── functions, the older form of tools ──────────────────────────────────────────────────────────────────────────────


def test_a_function_is_called_in_the_older_form(speaker: httpx.Client) -> None:
    more: dict[str, Any] = {"functions": [WEATHER], "max_tokens": 200}
    choice = ask(speaker, "chat", "#weather", **more).json()["choices"][0]
    assert choice["finish_reason"] == "function_call"
    called = choice["message"]["function_call"]
    assert (called["name"], json.loads(called["arguments"])) == ("get_weather", {"city": "Oslo"})
    assert "tool_calls" not in choice["message"]

    events = read_events(ask(speaker, "chat", "#weather", stream=True, **more).text)
    chunks = [event["data"]["choices"][0] for event in events if event["data"] != "[DONE]"]
    parts = [chunk["delta"]["function_call"] for chunk in chunks if "function_call" in chunk["delta"]]
    assert [part.get("name") for part in parts] == ["get_weather", None]
    assert "".join(part["arguments"] for part in parts) == called["arguments"]
    assert chunks[-1]["finish_reason"] == "function_call"

    messages = [
        {"role": "user", "content": "#weather"},
        {"role": "assistant", "content": None, "function_call": called},
        {"role": "function", "name": "get_weather", "content": "#sunny"},
    ]
    answer = ask(speaker, "chat", messages=messages, **more)
    assert text_of("chat", answer) == "It is sunny in both."
    assert answer.json()["choices"][0]["finish_reason"] == "stop"


def test_functions_are_chosen_like_tools_and_cannot_be_combined_with_them(speaker: httpx.Client) -> None:
    more: dict[str, Any] = {"functions": [WEATHER], "max_tokens": 200}
    choice = ask(speaker, "chat", "#thoughtful", function_call={"name": "get_weather"}, **more).json()[
        "choices"
    ][0]
    assert choice["message"]["function_call"]["name"] == "get_weather"
    choice = ask(speaker, "chat", "#json", function_call="none", **more).json()["choices"][0]
    assert "function_call" not in choice["message"]
    for both in ({"tools": TOOLS["chat"]}, {"function_call": "auto", "tool_choice": "auto"}):
        refused = speaker.post(PATHS["chat"], json=body("chat", **more | both))
        assert refused.status_code == 400
        assert "older version" in refused.json()["error"]["message"]


# ── beyond the context length ───────────────────────────────────────────────────────────────────────────────────────

OVERFLOW = {
    "openai": r"This model's maximum context length is (?P<limit>\d+) tokens\. However, you requested (?P<all>\d+)"
    r" tokens \((?P<prompt>\d+) in the messages, (?P<new>\d+) in the completion\)",
    "anthropic": r"prompt is too long: (?P<prompt>\d+) tokens > (?P<most>\d+) maximum",
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_too_long_a_prompt_is_refused_in_words_that_clients_recognize(
    speaker: httpx.Client, dialect: str
) -> None:
    said = "Ω" * 5000
    counted = speaker.post("/tokenize", json={"content": said}).json()["count"]
    answer = speaker.post(PATHS[dialect], json=body(dialect, said))
    assert answer.status_code == 400
    error = answer.json()["error"]
    kind = "anthropic" if dialect == "messages" else "openai"
    found = re.match(OVERFLOW[kind], error["message"])
    assert found, error["message"]
    numbers = {name: int(value) for name, value in found.groupdict().items()}
    assert numbers["prompt"] >= counted
    if kind == "anthropic":
        assert (error["type"], numbers["most"]) == ("invalid_request_error", CONTEXT_TOKENS - 1)
    else:
        assert error["code"] == "context_length_exceeded"
        assert (numbers["limit"], numbers["new"]) == (CONTEXT_TOKENS, 1)
        assert numbers["all"] == numbers["prompt"] + 1 > numbers["limit"]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_too_large_min_tokens_are_refused_with_the_sum(speaker: httpx.Client, dialect: str) -> None:
    more = {"min_tokens": CONTEXT_TOKENS, MAX_TOKENS[dialect]: CONTEXT_TOKENS}
    answer = speaker.post(PATHS[dialect], json=body(dialect, **more))
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    if dialect == "messages":
        found = re.match(
            r"input length and `min_tokens` exceed context limit: (\d+) \+ (\d+) > (\d+)", message
        )
        assert found
        assert [int(number) for number in found.groups()][1:] == [CONTEXT_TOKENS, CONTEXT_TOKENS]
    else:
        found = re.match(OVERFLOW["openai"], message)
        assert found
        assert int(found["new"]) == CONTEXT_TOKENS
        assert int(found["all"]) == int(found["prompt"]) + CONTEXT_TOKENS


@pytest.mark.parametrize("dialect", ["openai", "anthropic"])
def test_a_lower_bound_on_the_tokens_gives_the_same_words(dialect: Any) -> None:
    """A prompt may be refused before all its tokens are counted."""
    early = PromptTooLong("at least so much", needed=70_001, available=65_536, hint="shorten it")
    _, told = error_body(early, dialect, "req_1")
    found = re.match(OVERFLOW[dialect], told["error"]["message"])
    assert found
    assert found["prompt"] == "70000"
    assert told["error"]["message"].endswith("\nhint: shorten it")


def test_a_response_stream_reports_too_long_a_prompt_as_codex_expects_it(speaker: httpx.Client) -> None:
    answer = speaker.post(PATHS["responses"], json=body("responses", "Ω" * 5000, stream=True))
    assert answer.status_code == 200
    events = [event["data"] for event in read_events(answer.text)]
    assert [event["type"] for event in events] == [
        "response.created",
        "response.in_progress",
        "response.failed",
    ]
    error = events[-1]["response"]["error"]
    assert error["code"] == "context_length_exceeded"
    assert re.match(OVERFLOW["openai"], error["message"])


# ── truncated answers ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("said", ["#long", "#think"])
def test_a_truncated_item_is_incomplete_like_its_response(speaker: httpx.Client, said: str) -> None:
    more = {"max_output_tokens": 5}
    whole = ask(speaker, "responses", said, **more).json()
    assert (whole["status"], whole["output"][-1]["status"]) == ("incomplete", "incomplete")
    events = [
        event["data"] for event in read_events(ask(speaker, "responses", said, stream=True, **more).text)
    ]
    done = [event["item"]["status"] for event in events if event["type"] == "response.output_item.done"]
    assert done == ["incomplete"]
    assert events[-1]["response"]["output"][-1]["status"] == "incomplete"


def test_items_before_a_truncated_one_are_complete(speaker: httpx.Client) -> None:
    num_thought = (
        ask(speaker, "responses", "#think", max_output_tokens=60).json()["usage"]["output_tokens"] - 3
    )
    output = ask(speaker, "responses", "#think", max_output_tokens=num_thought).json()["output"]
    assert [(item["type"], item["status"]) for item in output] == [
        ("reasoning", "completed"),
        ("message", "incomplete"),
    ]


def test_scores_of_a_prompt_cannot_be_streamed(speaker: httpx.Client) -> None:
    asked = {"prompt": "a", "echo": True, "logprobs": 0, "stream": True, "max_tokens": 1}
    answer = speaker.post("/v1/completions", json=asked)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("log-probabilities of a prompt cannot be streamed")
    assert speaker.post("/v1/completions", json=asked | {"stream": False}).status_code == 200
