"""`structured_outputs`: answers follow the constraint, some constraints need a scope, excessive ones are refused."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from argosy.guard.keys import SCOPES, KeyFile, KeyRing
from argosy.serve.answer.service import Service
from argosy.serve.app import make_app
from tests.engine.test_grammar_bounds import BOMBS, REFUSED
from tests.serve.conftest import only, start
from tests.serve.record import read_events

PATHS = ("/v1/chat/completions", "/v1/completions")
each_path = pytest.mark.parametrize("path", PATHS)
SUM = """
start: sum
sum: part (("+" | "-") part){1,3}
part: NUMBER | "(" sum ")"
NUMBER: /[0-9]{1,2}/
"""


def said(path: str, choice: dict[str, Any]) -> str:
    return str(choice["text"] if path == "/v1/completions" else choice["message"]["content"])


def body_of(service: Service, path: str, form: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A request that forbids thinking, because the random model's thoughts would fill its context."""
    assert service.tokenizer is not None
    asked: dict[str, Any] = (
        {"prompt": "Hi"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "Hi"}]}
    )
    bias = {str(service.tokenizer.control_id("<think>")): -100}
    return {
        **asked, "max_tokens": 150, "temperature": 1, "seed": 1, "logit_bias": bias, "structured_outputs": form, **more
    }  # fmt: skip


def texts(client: httpx.Client, service: Service, path: str, form: dict[str, Any], **more: Any) -> list[str]:
    answer = client.post(path, json=body_of(service, path, form, **more))
    assert answer.status_code == 200, answer.text
    assert all(choice["finish_reason"] == "stop" for choice in answer.json()["choices"])
    return [said(path, choice) for choice in answer.json()["choices"]]


def refusal(answer: httpx.Response, status: int = 400) -> str:
    assert answer.status_code == status, answer.text
    assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
    return str(answer.json()["error"]["message"])


# ── answers ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@each_path
@pytest.mark.parametrize(
    "regex",
    [
        r"[a-c]{4}", r"^\d{3}-[a-z]{1,9}\.$", r"(yes|no|a/b)\s?(!{1,2}|\?)", r"[^\n]{3,8}", r"(?i)straße{1,3}|\u00e9\n",
        r"(?:(?P<word>[A-Z][a-z]{1,3}) ?){2}",
    ],
)  # fmt: skip
def test_every_answer_fully_matches_the_expression(
    client: httpx.Client, service: Service, path: str, regex: str
) -> None:
    found = texts(client, service, path, {"regex": regex}, n=3)
    assert len(found) == 3
    for text in found:
        assert re.fullmatch(regex, text), text


@each_path
def test_every_answer_is_in_the_language_of_the_grammar(
    client: httpx.Client, service: Service, path: str
) -> None:
    for seed in range(3):
        for text in texts(client, service, path, {"grammar": SUM}, seed=seed, n=2, logit_bias=None):
            assert re.fullmatch(r"[0-9+()-]+", text)
            assert isinstance(eval(re.sub(r"\b0+(?=\d)", "", text)), int)  # noqa: S307  digits and signs


@each_path
def test_an_answer_is_one_of_the_choices_or_json_of_the_schema(
    client: httpx.Client, service: Service, path: str
) -> None:
    choices = ["yes", "no", 'a "quoted"\\ one\n\x7f', "<|im_end|>", "ja, é🙂"]
    found = {
        text for seed in range(8) for text in texts(client, service, path, {"choice": choices}, seed=seed)
    }
    assert found <= set(choices)
    assert len(found) > 1
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]} | {
        "additionalProperties": False
    }
    (text,) = texts(client, service, path, {"json": schema})
    assert json.loads(text)["a"] in (1, 2)


@each_path
@pytest.mark.parametrize("form", [{"regex": "[a-f]{3}( [a-f]{3}){5}"}, {"grammar": SUM}])
def test_a_stream_has_the_text_of_the_whole_answer(
    client: httpx.Client, service: Service, path: str, form: dict[str, str]
) -> None:
    whole = texts(client, service, path, form, n=2)
    streamed = ["", ""]
    answer = client.post(path, json=body_of(service, path, form, n=2, stream=True))
    for event in read_events(answer.text):
        for choice in event["data"]["choices"] if event["data"] != "[DONE]" else ():
            part = choice["text"] if path == "/v1/completions" else choice["delta"].get("content")
            streamed[choice["index"]] += part or ""
    assert streamed == whole


@each_path
def test_a_stop_string_ends_an_answer_before_its_constraint_does(
    client: httpx.Client, service: Service, path: str
) -> None:
    found = texts(client, service, path, {"regex": "[ab]{3}x[ab]{3}"}, stop="x")
    assert re.fullmatch("[ab]{3}", found[0])


def test_thoughts_come_before_the_constrained_text_and_are_not_constrained(speaker: httpx.Client) -> None:
    for script, form in (
        ("#think", {"regex": r"It is [a-z]{2,8}\."}),
        ("#think", {"choice": ["It is so.", "No."]}),
    ):
        asked = {"messages": [{"role": "user", "content": script}], "max_tokens": 200, "temperature": 0}
        message = speaker.post(PATHS[0], json=asked | {"structured_outputs": form}).json()["choices"][0][
            "message"
        ]
        assert message["reasoning_content"].strip() == "Let me see."
        expected = form.get("regex") or "|".join(map(re.escape, form["choice"]))
        assert re.fullmatch(str(expected), message["content"]), message


def test_with_tools_an_answer_is_a_call_or_follows_the_constraint(speaker: httpx.Client) -> None:
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
    for form in (
        {"regex": r"It is [a-z]{2,8}\."},
        {"grammar": '%ignore " "\nstart: "It" "is" /[a-z]{2,8}/ "."'},
    ):
        for script, calls in (("#wrong", True), ("#sunny", False)):
            asked = {"messages": [{"role": "user", "content": script}], "max_tokens": 200, "temperature": 0}
            asked |= {"structured_outputs": form, "tools": [tool]}
            message = speaker.post(PATHS[0], json=asked).json()["choices"][0]["message"]
            assert ("tool_calls" in message) == calls, message
            assert calls or re.fullmatch("It ?is ?[a-z]{2,8} ?[.]", message["content"]), message


# ── scopes ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def keyed(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, KeyFile]]:
    keys = KeyFile(tmp_path_factory.mktemp("keys") / "keys.json")
    keys.add("first")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("argosy.guard.keys._LOOK_AGAIN_S", 0.01)
        for url in start(make_app(only(service), KeyRing(keys), block_tokens=16, max_sequences=8)):
            yield url, keys


@each_path
def test_only_expressions_and_grammars_need_the_scope(
    keyed: tuple[str, KeyFile], service: Service, path: str
) -> None:
    url, keys = keyed
    forms: dict[str, Any] = {"regex": "[a-c]{4}", "grammar": SUM, "choice": ["a", "b"], "json": {"const": 1}}
    for scopes in (("infer",), ("infer", "grammar"), ("infer", "metrics"), ("admin",)):
        key, secret = keys.add("-".join(scopes), scopes=scopes)
        time.sleep(0.05)
        headers = {"Authorization": f"Bearer {secret}"}
        for name, form in forms.items():
            body = body_of(service, path, {name: form})
            answer = httpx.post(url + path, json=body, headers=headers)
            if name in ("regex", "grammar") and not {"grammar", "admin"} & set(scopes):
                assert refusal(answer, 403) == (
                    f"the key lacks scope 'grammar', which structured_outputs.{name} needs\n"
                    "hint: `argosy keys add NAME --scope infer --scope grammar` makes a key that has it"
                )
                assert answer.json()["error"]["type"] == "permission_error"
                assert answer.json()["error"]["param"] == f"structured_outputs.{name}"
            else:
                assert answer.status_code == 200, answer.text
        keys.revoke(key.id)
    assert "grammar" in SCOPES


# ── refusals ────────────────────────────────────────────────────────────────────────────────────────────────────────


@each_path
@pytest.mark.parametrize(
    ("form", "sentence"),
    [
        ({}, "needs exactly one of json, choice, regex and grammar, found 0"),
        ({"regex": None}, "needs exactly one of json, choice, regex and grammar, found 0"),
        ({"regex": "a", "json": {}}, "needs exactly one of json, choice, regex and grammar, found 2"),
        ({"regex": "a", "backend": "x"}, "unknown field 'structured_outputs.backend'"),
        ({"structural_tag": "x"}, "unknown field 'structured_outputs.structural_tag'"),
        ({"regex": ""}, "structured_outputs.regex: expected at least 1 character"),
        ({"regex": "a" * 1025}, "structured_outputs.regex: expected at most 1024 characters"),
        ({"regex": 5}, "structured_outputs.regex: expected a valid string, found 5"),
        ({"regex": "(?=a)b"}, "invalid regex"),
        ({"regex": "[a"}, "invalid regex"),
        ({"grammar": "x" * (1 << 15) + "y"}, "structured_outputs.grammar: expected at most 32768 characters"),
        ({"grammar": 'start: "x" | r'}, "the grammar cannot be followed"),
        ({"choice": []}, "structured_outputs.choice: expected at least 1 item"),
        ({"choice": [""]}, "structured_outputs.choice.0: expected at least 1 character"),
        ({"choice": ["a"] * 513}, "structured_outputs.choice: expected at most 512 items"),
        ({"json": "{"}, "structured_outputs.json: the text is not JSON"),
        ({"json": [1]}, "structured_outputs.json: expected an object or a valid string, found a list of 1"),
        ({"json": {"$ref": "file:///etc/passwd"}}, "a reference in a schema must be a path like"),
    ],
)  # fmt: skip
def test_an_invalid_constraint_is_refused_by_name(
    client: httpx.Client, service: Service, path: str, form: dict[str, Any], sentence: str
) -> None:
    assert sentence in refusal(client.post(path, json=body_of(service, path, form)))


def test_an_answer_has_only_one_constraint(client: httpx.Client, service: Service) -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    named = {"type": "function", "function": {"name": "f"}}
    for more, sentence in (
        ({"response_format": {"type": "json_object"}}, "an answer can have only one form"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
            "an answer can have only one form",
        ),
        ({"tools": [tool], "tool_choice": "required"}, "the answer cannot be a tool call and have a form"),
        ({"tools": [tool], "tool_choice": named}, "the answer cannot be a tool call and have a form"),
    ):
        for form in ({"regex": "a"}, {"json": {}}):
            answer = client.post(PATHS[0], json=body_of(service, PATHS[0], form, **more))
            assert sentence in refusal(answer)
            assert answer.json()["error"]["param"] == "structured_outputs"
    text = body_of(service, PATHS[0], {"regex": "a"}, response_format={"type": "text"})
    assert client.post(PATHS[0], json=text).status_code == 200


def chain(depth: int) -> dict[str, Any]:
    parts = {str(at): {"items": {"$ref": f"#/$defs/{at + 1}"}} for at in range(depth)}
    return {"$defs": parts | {str(depth): {"type": "string"}}, "$ref": "#/$defs/0"}


LADEN: dict[str, dict[str, Any]] = {
    "regex: goes back": {"regex": "(a+)+b"},
    "regex: repeats": {"regex": "(a{1000}){1000}"},
    "regex: repeats repeats": {"regex": "((a{1000}){1000}){1000}"},
    "regex: automaton": {"regex": "(.*a.{30}){30}"},
    "regex: deep": {"regex": "(" * 500 + ")" * 500},
    "regex: letters": {"regex": r"(?i)[a-z\p{L}]{0,50}" * 20},
    "json: a chain": {"json": chain(2500)},
    "choice: many": {"choice": [f"{at:04}" * 250 for at in range(512)]},
    **{f"grammar: {name}": {"grammar": text} for name, (text, _) in REFUSED.items()},
    **{f"grammar: {name}": {"grammar": text} for name, text in BOMBS.items()},
}


# In `make test`, each on one of the paths.
LADEN_PATHS = [
    pytest.param(path, what, marks=pytest.mark.full if (turn + at) % len(PATHS) else ())
    for at, path in enumerate(PATHS)
    for turn, what in enumerate(LADEN)
]


@pytest.mark.parametrize(("path", "what"), LADEN_PATHS)
def test_a_hostile_constraint_is_followed_or_refused_soon_and_the_next_request_is_answered(
    client: httpx.Client, service: Service, path: str, what: str
) -> None:
    began = time.monotonic()
    answer = client.post(path, json=body_of(service, path, LADEN[what], max_tokens=8))
    assert time.monotonic() - began < 10
    # The grammar of the previous request is abandoned soon.
    while answer.status_code == 503 and time.monotonic() - began < 10:
        time.sleep(0.02)
        answer = client.post(path, json=body_of(service, path, LADEN[what], max_tokens=8))
    if answer.status_code != 200 or what.removeprefix("grammar: ") in REFUSED:
        sentence = refusal(answer)
        assert "Traceback" not in sentence
        assert len(sentence) < 500
    assert client.post(path, json=body_of(service, path, {"regex": "[a-c]{4}"})).status_code == 200


def test_too_long_a_chain_of_references_is_refused_in_fields_without_a_scope_too(
    client: httpx.Client,
) -> None:
    schema = {"schema": chain(2500)}
    say = [{"role": "user", "content": "Hi"}]
    asked: dict[str, dict[str, Any]] = {
        PATHS[0]: {"messages": say, "response_format": {"type": "json_schema", "json_schema": schema}},
        "/v1/responses": {"input": "Hi", "text": {"format": {"type": "json_schema", "name": "x", **schema}}},
    }
    for path, body in asked.items():
        assert "levels deep" in refusal(client.post(path, json=body))
