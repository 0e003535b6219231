"""Bounds on requests: the rows of the survey's tables on request bounds, each in every dialect."""

from __future__ import annotations

import functools
import logging
import math
import sys
import time
from collections.abc import Iterator
from typing import Annotated, Any

import httpx
import pytest
from pydantic import BaseModel, Field, ValidationError

from argosy.errors import DiskFull, Overloaded, ReadFailed
from argosy.prompt.builder import PromptBuilder
from argosy.serve.answer.answers import Answers, Said
from argosy.serve.answer.fields import MAX_FIELDS
from argosy.serve.answer.media_parts import content_of, media_in
from argosy.serve.answer.sampling_fields import Neutral
from argosy.serve.answer.service import Service
from argosy.serve.app import ROUTES
from argosy.serve.dialects.anthropic_messages_bodies import MessagesBody
from argosy.serve.dialects.body import refusal
from argosy.serve.dialects.openai_chat_bodies import ChatBody
from argosy.serve.dialects.openai_completions import CompletionBody
from argosy.serve.dialects.openai_responses_bodies import ResponsesBody
from argosy.serve.dialects.tokens import DetokenizeBody
from tests.serve.bodies import BODIES
from tests.serve.fake_server import POLICY
from tests.serve.record import read_events

# Each dialect's route and a valid request, with the dialect's name for the number of tokens.
SAY = [{"role": "user", "content": "Hi"}]
DIALECTS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": SAY, "max_tokens": 1},
    "/v1/completions": {"prompt": "Hi", "max_tokens": 1},
    "/v1/responses": {"input": "Hi", "max_output_tokens": 1},
    "/v1/messages": {"messages": SAY, "max_tokens": 1},
}
every_dialect = pytest.mark.parametrize("path", DIALECTS)


def refused(answer: httpx.Response, path: str) -> str:
    """The message of a refusal, which must have the dialect's own shape."""
    assert answer.status_code == 400, answer.text
    body = answer.json()
    if path.startswith("/v1/messages"):
        assert body.keys() == {"type", "error"}
        assert body["type"] == "error"
        assert body["error"].keys() == {"type", "message"}
    else:
        assert body.keys() == {"error"}
        assert body["error"].keys() == {"message", "type", "param", "code"}
    assert body["error"]["type"] == "invalid_request_error"
    return str(body["error"]["message"])


def post(client: httpx.Client, path: str, body: bytes) -> httpx.Response:
    return client.post(path, content=body, headers={"content-type": "application/json"})


NOT_JSON: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "the body: expected a value, found nothing"),
    "text": (b"Hi", "the body cannot be read: it is not JSON: Expecting value at character 0"),
    "half of it": (b'{"messages": [', "it is not JSON"),
    "two of them": (b"{} {}", "it is not JSON"),
    "not an object": (b"[1]", "the body: expected an object, found a list of 1"),
    "bad UTF-8": (b'{"model": "\xff"}', "the body is not UTF-8 text: byte 11 is invalid"),
    "UTF-16": ('{"model": "m"}'.encode("utf-16"), "the body is not UTF-8 text"),
    "an overlong slash": (b'{"model": "\xc0\xaf"}', "the body is not UTF-8 text"),
    "half a character": (b'{"model": "\\ud800"}', "it holds half a character"),
    "half a character as a key": (b'{"\\udfff": 1}', "it holds half a character"),
    "a key twice": (b'{"model": "a", "model": "b"}', "it has a duplicate key"),
    "a key twice, inside": (b'{"metadata": {"a": 1, "a": 2}}', "it has a duplicate key"),
    "NaN": (b'{"temperature": NaN}', "it holds NaN, which is not JSON"),
    "infinity": (b'{"top_p": -Infinity}', "it holds -Infinity, which is not JSON"),
    "a number beyond all floats": (b'{"temperature": 1e999}', "it holds a number that is too large"),
    "a number of many digits": (b'{"seed": ' + b"9" * 5000 + b"}", "it holds a number that is too large"),
    "a number of some digits": (b'{"seed": ' + b"9" * 400 + b"}", "it holds a number that is too large"),
    "deep lists": (b'{"metadata": ' + b"[" * 500 + b"]" * 500 + b"}", "it is nested deeper than 64"),
    "lists without end": (b"[" * 100_000, "it is nested deeper than 64"),
    "more lists than are read": (
        b"[" * 1_000_000,
        "it has more than 131072 objects, lists and strings, which is the limit",
    ),
    "deep objects": (b'{"a":' * 66 + b"1" + b"}" * 66, "it is nested deeper than 64"),
}


@every_dialect
@pytest.mark.parametrize("what", NOT_JSON)
def test_invalid_or_ambiguous_json_is_refused(client: httpx.Client, path: str, what: str) -> None:
    body, sentence = NOT_JSON[what]
    assert sentence in refused(post(client, path, body), path)


def test_a_long_body_is_parsed_as_strictly_as_a_short_one(client: httpx.Client) -> None:
    body = b'{"messages": [], "user": "' + b"x" * 100_000 + b'", "user": ""}'
    path = "/v1/chat/completions"
    assert "it has a duplicate key" in refused(post(client, path, body), path)


@every_dialect
def test_a_refusal_names_the_field_what_was_expected_and_what_was_found(
    client: httpx.Client, path: str
) -> None:
    answered = DIALECTS[path]
    unknown = refused(client.post(path, json=answered | {"temprature": 1}), path)
    assert unknown.startswith("unknown field 'temprature'; did you mean 'temperature'?")
    wild = refused(client.post(path, json=answered | {"zzzz": 1}), path)
    assert wild.partition("\n")[0] == "unknown field 'zzzz'"
    hot = refused(client.post(path, json=answered | {"temperature": 9}), path)
    assert hot == "temperature: expected less than or equal to 2, found 9"
    wordy = refused(client.post(path, json=answered | {"temperature": "x" * 1000}), path)
    assert wordy == "temperature: expected a valid number, found text of 1000 characters"
    assert refused(client.post(path, json=answered | {"stream": 1}), path) == (
        "stream: expected a valid boolean, found 1"
    )


# Numbers

EDGES = (
    -(10**30), -(2**63) - 1, -(2**63), -(2**31) - 1, -1, 0, 1, 2**31 - 1, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64,
    10**300, 1e308, -1e308, 5e-324, 0.5, True, "1", [1], {}, None,
)  # fmt: skip
MODELS: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatBody, "/v1/completions": CompletionBody, "/v1/responses": ResponsesBody,
    "/v1/messages": MessagesBody,
}  # fmt: skip


def numbers(path: str) -> dict[str, list[dict[str, Any]]]:
    """Each field of a body that takes numbers only, and the schemas of the number."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name, schema in MODELS[path].model_json_schema()["properties"].items():
        if any(branch.get("type") == "string" for branch in schema.get("anyOf", ())):
            continue
        for branch in (schema, *schema.get("anyOf", ())):
            if branch.get("type") in ("integer", "number"):
                found.setdefault(name, []).append(branch)
    return found


def is_within(value: object, schemas: list[dict[str, Any]]) -> bool:
    return any(is_within_one(value, schema) for schema in schemas)


def is_within_one(value: object, schema: dict[str, Any]) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value is None
    if schema["type"] == "integer" and not isinstance(value, int):
        return False
    return (
        schema.get("minimum", value) <= value <= schema.get("maximum", value)
        and not value <= schema.get("exclusiveMinimum", -math.inf)
        and not value >= schema.get("exclusiveMaximum", math.inf)
    )


OTHER_LIMITS = ("max_new_tokens", "n_predict", "num_predict")  # other names of max_tokens


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.full) for part in range(1, 8))])
@every_dialect
def test_every_number_is_accepted_within_its_bounds_and_refused_beyond_them(
    client: httpx.Client, path: str, part: int
) -> None:
    """A part tries each field at an eighth of the edges, and each edge in an eighth of the fields."""
    found = numbers(path)
    assert {"temperature", "top_p"} < found.keys()
    for turn, (name, schemas) in enumerate(found.items()):
        for value in EDGES[(part + turn) % 8 :: 8]:
            body = DIALECTS[path] | {name: value}
            if name in OTHER_LIMITS:
                body.pop("max_tokens", None)
            if name == "top_logprobs" and "chat" in path:
                body["logprobs"] = True
            if name == "best_of" and is_within(value, schemas):
                body["n"] = value
            answer = client.post(path, json=body)
            if not is_within(value, schemas) or (
                value is None and name in MODELS[path].model_json_schema()["required"]
            ):
                assert refused(answer, path).startswith(f"{name}: expected "), (name, value)
            elif not (name in ("max_tokens", *OTHER_LIMITS) and value == 0):  # 0 is only for scoring a prompt
                assert answer.status_code == 200, (name, value, answer.text)


def test_every_number_of_a_request_has_bounds(client: httpx.Client) -> None:
    """At any depth, except inside a JSON schema or a tool's arguments, which are the caller's own."""
    document = client.get("/openapi.json").json()
    seen: set[str] = set()

    def visit(schema: Any, where: str) -> None:
        if isinstance(schema, list):
            for item in schema:
                visit(item, where)
        if not isinstance(schema, dict):
            return
        if schema.get("type") in ("integer", "number"):
            assert {"minimum", "exclusiveMinimum"} & schema.keys(), where
            assert {"maximum", "exclusiveMaximum"} & schema.keys(), where
        reference = schema.get("$ref", "").removeprefix("#/components/schemas/")
        if reference and reference not in seen:
            seen.add(reference)
            visit(document["components"]["schemas"][reference], reference)
        for key, item in schema.items():
            visit(item, f"{where}.{key}")

    for methods in document["paths"].values():
        for operation in methods.values():
            visit(operation.get("requestBody"), operation["operationId"])
    assert {"ChatBody", "CalledTool", "MessagesBody"} < seen


@pytest.mark.parametrize("key", ["-1", "1e3", "٣", "0x1", "9999999999", "", " 1", "1" * 400])
def test_a_key_of_logit_bias_is_a_token_id(client: httpx.Client, key: str) -> None:
    for path in ("/v1/chat/completions", "/v1/completions"):
        refused(client.post(path, json=DIALECTS[path] | {"logit_bias": {key: 1}}), path)


# Templates, expressions, paths, addresses and tensors are not accepted

FOREIGN = (
    "chat_template", "template", "documents", "add_generation_prompt", "grammar", "structured_outputs",
    "regex", "ebnf", "logits_processors", "prompt_embeds", "input_embeds", "mm_processor_kwargs",
    "media_io_kwargs", "mm_hashes", "image_data", "multi_modal_data", "lora", "lora_path", "adapter",
    "model_path", "path", "file", "file_id", "filename", "url", "id_slot", "n_discard", "cache_salt",
    "kv_transfer_params", "use_beam_search", "extra_body", "timeout",
)  # fmt: skip


@every_dialect
@pytest.mark.parametrize("name", FOREIGN)
def test_there_is_no_field_for_a_template_an_expression_a_path_an_address_or_a_tensor(
    client: httpx.Client, path: str, name: str
) -> None:
    sentence = refused(client.post(path, json=DIALECTS[path] | {name: "x"}), path)
    if name == "structured_outputs" and "completions" in path:
        assert sentence == 'structured_outputs: expected an object, found "x"'
    elif name == "add_generation_prompt" and "chat" in path:  # a flag about the last turn
        assert sentence == 'add_generation_prompt: expected a valid boolean, found "x"'
    else:
        idle = name in Neutral.model_fields
        assert sentence.startswith(f"{name}: expected" if idle else f"unknown field '{name}'")


@pytest.mark.parametrize(
    "variables",
    [
        {"chat_template": "x"}, {"messages": "x"}, {"tools": "x"}, {"bos_token": "x"}, {"__class__": "x"},
        {"reasoning_effort": "x" * 65}, {"reasoning_effort": 2**63}, {"thinking": [1]}, {"x" * 300: 1},
    ],
)  # fmt: skip
def test_only_known_and_small_template_variables_are_accepted(
    client: httpx.Client, variables: dict[str, Any]
) -> None:
    path = "/v1/chat/completions"
    refused(client.post(path, json=DIALECTS[path] | {"chat_template_kwargs": variables}), path)


ADDRESSES = (
    "http://127.0.0.1:9/x.png",
    "https://example.org/x.png",
    "file:///etc/passwd",
    "data:image/png;base64,AA==",
)


@pytest.mark.parametrize("address", ADDRESSES)
def test_no_dialect_follows_an_address(
    client: httpx.Client, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts: dict[str, list[dict[str, Any]]] = {
        "/v1/chat/completions": [
            {"type": "image_url", "image_url": {"url": address}},
            {"type": "input_audio", "input_audio": {"data": address, "format": "wav"}},
            {"type": "video_url", "video_url": {"url": address}},
            {"type": "file", "file": {"file_id": address}},
            {"type": "text", "text": "a", "image_url": {"url": address}},
        ],
        "/v1/responses": [
            {"type": "input_image", "image_url": address}, {"type": "input_file", "file_url": address},
        ],
        "/v1/messages": [
            {"type": "image", "source": {"type": "url", "url": address}},
            {"type": "document", "source": {"type": "url", "url": address}},
            {"type": "container_upload", "file_id": address},
        ],
    }  # fmt: skip
    for path, several in parts.items():
        where = "input" if path == "/v1/responses" else "messages"
        for part in several:
            body = DIALECTS[path] | {where: [{"role": "user", "content": [part]}]}
            sentence = refused(client.post(path, json=body), path)
            assert sentence.startswith((f"{where}.0.content.0", "unknown field"))
            assert "passwd" not in sentence


@pytest.mark.parametrize(
    "content", ["see http://127.0.0.1:9/x", "![a](http://127.0.0.1:9/x.png)", "file:///etc/passwd"]
)
@every_dialect
def test_an_address_inside_text_is_plain_text(client: httpx.Client, path: str, content: str) -> None:
    name = next(name for name in ("messages", "prompt", "input") if name in DIALECTS[path])
    value: Any = [{"role": "user", "content": content}] if name == "messages" else content
    assert client.post(path, json=DIALECTS[path] | {name: value}).status_code == 200


@every_dialect
def test_a_model_name_is_not_used_as_a_path(client: httpx.Client, path: str) -> None:
    answer = client.post(path, json=DIALECTS[path] | {"model": "../../../etc/passwd"})
    assert answer.status_code == 404
    assert "this server has: tiny" in answer.text
    refused(client.post(path, json=DIALECTS[path] | {"model": "x" * 257}), path)


@pytest.mark.parametrize(
    "name", ["%2e%2e", "..%2f..%2fetc%2fpasswd", "%00", "a" * 300, "tiny%0d%0ax: y", "%ff"]
)
def test_an_unknown_name_in_a_path_is_not_found(client: httpx.Client, name: str) -> None:
    for route in ("/v1/models/", "/page/"):
        answer = client.get(route + name)
        assert answer.status_code == 404, route
        assert answer.json()["error"]["type"] == "not_found_error"


# Schemas and grammars

BOMBS: dict[str, Any] = {
    "nesting": functools.reduce(
        lambda inner, _: {"type": "array", "items": inner}, range(40), {"type": "string"}
    ),
    "an expression of many repetitions": {"type": "string", "pattern": "((a{1,1000}){1,1000}){1,1000}"},
    "an expression that goes back": {"type": "string", "pattern": "(a+)+b" * 50},
    "a long expression": {"type": "string", "pattern": "a" * 2000},
    "a long expression of a name": {"type": "object", "patternProperties": {"a" * 2000: {}}},
    "names that are none": {"type": "object", "patternProperties": 5},
    "properties that are none": {"type": "object", "properties": [1], "required": 3},
    "a reference to a file": {"$ref": "file:///etc/passwd"},
    "a reference to an address": {"$ref": "http://127.0.0.1:9/schema"},
    "a reference to itself": {"$ref": "#"},
    "a length beyond all": {"type": "string", "minLength": 10**9, "maxLength": 10**9},
    "a number beyond all": {"type": "integer", "minimum": 10**300, "maximum": 10**301},
    "many branches": {"anyOf": [{"const": str(number)} for number in range(20_000)]},
    "no type of any kind": {"type": "x", "enum": 5},
}


@pytest.mark.parametrize("part", [0, pytest.param(1, marks=pytest.mark.full)])
@pytest.mark.parametrize("what", BOMBS)
def test_a_hostile_schema_is_followed_or_refused_soon_in_every_dialect_that_takes_one(
    client: httpx.Client, what: str, part: int
) -> None:
    """A part tries every other form, and each form with half of the schemas."""
    schema = BOMBS[what]
    tool = {"name": "f", "parameters": {"type": "object", "properties": {"a": schema}}}
    forms: list[tuple[str, dict[str, Any]]] = [
        (
            "/v1/chat/completions",
            {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}},
        ),
        ("/v1/responses", {"text": {"format": {"type": "json_schema", "schema": schema}}}),
        (
            "/v1/chat/completions",
            {"tools": [{"type": "function", "function": tool}], "tool_choice": "required"},
        ),
        ("/v1/responses", {"tools": [{"type": "function", **tool}], "tool_choice": "required"}),
        (
            "/v1/messages",
            {"tools": [{"name": "f", "input_schema": tool["parameters"]}], "tool_choice": {"type": "any"}},
        ),
    ]
    for path, more in forms[(list(BOMBS).index(what) + part) % 2 :: 2]:
        began = time.monotonic()
        answer = client.post(path, json=DIALECTS[path] | more)
        assert time.monotonic() - began < 10
        if answer.status_code != 200:
            sentence = refused(answer, path)
            assert "Traceback" not in sentence
            assert "/" not in sentence.replace("/openapi.json", "").replace("application/json", "")[:20]


# Fields without effect

HINTS: dict[str, tuple[dict[str, Any], str]] = {
    "/v1/chat/completions": ({"user": "u", "store": True, "reasoning_effort": "low"}, "user, store, reasoning_effort"),
    "/v1/completions": ({"user": "u", "timings": True}, "user"),
    "/v1/responses": (
        {
            "text": {"verbosity": "low"}, "tools": [{"type": "web_search", "x": 1}],
            "input": [{"role": "user", "content": "Hi", "phase": "x", "bad\r\nx-evil": "1"}],
        },
        "text.verbosity, tools.web_search, input.phase",
    ),
    "/v1/messages": (
        {
            "metadata": {}, "system": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}],
            "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi", "citations": [], "\r\nx": 1}]}],
        },
        "metadata, system.cache_control, messages.content.citations",
    ),
}  # fmt: skip


@every_dialect
@pytest.mark.parametrize("stream", [False, True])
def test_fields_without_effect_are_listed_in_a_header(client: httpx.Client, path: str, stream: bool) -> None:
    more, listed = HINTS[path]
    plain = client.post(path, json=DIALECTS[path] | {"stream": stream})
    assert "x-ignored-params" not in plain.headers
    answer = client.post(path, json=DIALECTS[path] | more | {"stream": stream})
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-ignored-params"] == listed
    assert "x-evil" not in answer.headers


# Failures and early refusals

FAILURES: dict[type[Exception], str] = {
    RuntimeError: "internal error",
    ReadFailed: "ReadFailed: the answer could not be finished",
    DiskFull: "DiskFull: the answer could not be finished",
}


@every_dialect
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", FAILURES)
def test_an_internal_failure_reveals_nothing_but_its_kind(
    client: httpx.Client, service: Service, monkeypatch: pytest.MonkeyPatch, path: str, stream: bool,
    kind: type[Exception],
) -> None:  # fmt: skip
    def fail(*_: object, **__: object) -> None:
        raise kind("/srv/models/secret.gguf: EIO")

    monkeypatch.setattr(service.loop, "submit", fail)
    answer = client.post(path, json=DIALECTS[path] | {"stream": stream})
    assert answer.status_code >= 500
    assert "secret" not in answer.text
    shape = answer.json()
    is_anthropic = path.startswith("/v1/messages")
    request_id = answer.headers["request-id" if is_anthropic else "x-request-id"]
    assert shape["error"]["message"] == f"{FAILURES[kind]} (request {request_id})"
    assert shape.get("request_id") == (request_id if is_anthropic else None)
    assert ("type" in shape) == path.startswith("/v1/messages")
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["content-security-policy"] == POLICY


@every_dialect
def test_a_broken_stream_ends_with_an_error_and_the_log_says_where_without_any_text(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    parse, said = Answers._step, "-".join(("canary", "4e1"))  # joined, because source lines are logged

    def breaks(self: Answers, event: Any) -> Any:
        steps = parse(self, event)
        if any(isinstance(step, Said) for step in steps):
            try:
                int(said)
            except ValueError as error:
                raise RuntimeError(said) from error
        return steps

    monkeypatch.setattr(Answers, "_step", breaks)
    caplog.set_level("INFO", "argosy.serve")
    answer = client.post(path, json=DIALECTS[path] | {"stream": True})
    assert answer.status_code == 200
    is_anthropic = path.startswith("/v1/messages")
    request_id = answer.headers["request-id" if is_anthropic else "x-request-id"]
    last = list(read_events(answer.text))[-1]
    message = f"internal error (request {request_id})"
    shape = {"type": "server_error", "message": message, "param": None, "code": None}
    match path:
        case "/v1/messages":
            error = {"type": "api_error", "message": message}
            assert last == {
                "event": "error",
                "data": {"type": "error", "error": error, "request_id": request_id},
            }
        case "/v1/responses":
            assert last["event"] == last["data"]["type"] == "response.failed"
            assert last["data"]["response"]["status"] == "failed"
            assert last["data"]["response"]["error"] == {"code": "server_error", "message": message}
        case _:
            assert last == {"event": None, "data": {"error": shape}}
    logged = next(m for m in map(logging.LogRecord.getMessage, caplog.records) if request_id in m)
    assert logged.startswith(f"{request_id} internal error: RuntimeError\n")
    assert "in breaks" in logged
    assert "because of ValueError\n" in logged
    assert said not in caplog.text


@every_dialect
def test_a_busy_engine_says_when_to_retry(
    client: httpx.Client, service: Service, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise Overloaded("all places are taken", retry_after_s=7)

    monkeypatch.setattr(service.loop, "submit", fail)
    answer = client.post(path, json=DIALECTS[path])
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "7")
    assert answer.json()["error"]["type"] == "overloaded_error"


REFUSED_EARLY = {
    "no such method": (405, lambda client, path: client.put(path, json={})),
    "another content type": (
        415,
        lambda client, path: client.post(path, content=b"{}", headers={"sec-fetch-site": "none"}),
    ),
    "another site": (
        403,
        lambda client, path: client.post(path, json={}, headers={"origin": "http://evil.example"}),
    ),
    "another host": (403, lambda client, path: client.post(path, json={}, headers={"host": "evil.example"})),
    "no such path": (404, lambda client, path: client.post(path + "/x/y", json={})),
    "too large": (413, lambda client, path: client.post(path, content=b" " * (9 << 20), headers=JSON)),
}
JSON = {"content-type": "application/json"}


@every_dialect
@pytest.mark.parametrize("what", REFUSED_EARLY)
def test_a_refusal_by_the_gate_has_the_shape_of_the_dialect(
    client: httpx.Client, path: str, what: str
) -> None:
    status, ask = REFUSED_EARLY[what]
    answer = ask(client, path)
    assert answer.status_code == status
    error = answer.json()
    if path.startswith("/v1/messages"):
        assert error.keys() == {"type", "error"}
        assert error["error"].keys() == {"type", "message"}
    else:
        assert error["error"].keys() == {"message", "type", "param", "code"}


# Lists and objects


def unbounded(schema: Any, seen: set[int], where: str) -> Iterator[str]:
    """Yield lists and objects without a bound, and lists that are validated past their first wrong item."""
    if isinstance(schema, list | tuple):
        for at, inner in enumerate(schema):
            yield from unbounded(inner, seen, f"{where}.{at}")
    if not isinstance(schema, dict) or id(schema) in seen:
        return
    seen.add(id(schema))
    kind = schema.get("type")
    if kind in ("list", "set", "frozenset") and not ("max_length" in schema and schema.get("fail_fast")):
        yield where
    if kind in ("dict", "generator", "tuple") and "max_length" not in schema:
        yield where
    for key, inner in schema.items():
        if key != "metadata":
            yield from unbounded(inner, seen, f"{where}.{key}")


def test_every_list_and_object_of_a_request_is_bounded_and_validation_stops_at_the_first_wrong_item() -> None:
    with_body = [route for route in ROUTES if route.body is not None]
    assert {route.rule.path for route in with_body if not route.rule.takes_form} == BODIES.keys()
    models = [route.body for route in with_body]
    seen: set[int] = set()
    for model in models:
        assert list(unbounded(model.__pydantic_core_schema__, seen, model.__name__)) == []
    assert len(seen) > 500


def test_a_list_without_a_bound_is_detected() -> None:
    class Forgotten(BaseModel):
        items: list[int]
        entries: dict[str, int]
        slow: Annotated[list[int], Field(max_length=3)]

    found = list(unbounded(Forgotten.__pydantic_core_schema__, set(), "F"))
    assert [name for name in ("items", "entries", "slow") for where in found if f".{name}." in where] == [
        "items", "entries", "slow",
    ]  # fmt: skip


WRONG: dict[str, dict[str, Any]] = {
    "items": {"messages": [{"role": "user", "content": [{}] * 4000}]},
    "more items than may be": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 5000}]
    },
    "unknown fields": {"messages": SAY, **{f"a{at}": 1 for at in range(20_000)}},
    "unknown fields of a turn": {"messages": [SAY[0] | {f"a{at}": 1 for at in range(20_000)}]},
    "unknown fields of a part": {
        "messages": [{"role": "user", "content": [{"type": "text"} | {f"a{at}": 1 for at in range(20_000)}]}]
    },
    "biases": {"messages": SAY, "logit_bias": {str(at): "x" for at in range(20_000)}},
    "settings": {"messages": SAY, "chat_template_kwargs": {f"a{at}": [] for at in range(20_000)}},
    "identifiers": {"tokens": ["a"] * 20_000},
    "prompts": {"prompt": [["a"] * 1000] * 20},
}


@pytest.mark.parametrize("what", WRONG)
def test_a_body_with_very_many_mistakes_gives_few_errors(what: str) -> None:
    model: type[BaseModel] = ChatBody
    if "messages" not in WRONG[what]:
        model = CompletionBody if "prompt" in WRONG[what] else DetokenizeBody
    with pytest.raises(ValidationError) as caught:
        model.model_validate(WRONG[what])
    assert caught.value.error_count() <= 2 * MAX_FIELDS
    assert str(refusal(caught.value.errors(), WRONG[what], model))


def test_the_texts_of_a_message_are_joined_in_time_that_grows_with_them() -> None:
    def seconds(num_parts: int) -> float:
        began = time.process_time()
        content_of(["x" * 4000] * num_parts, between="\n")
        return time.process_time() - began

    seconds(64)
    short = max(min(seconds(256) for _ in range(3)), 1e-3)
    assert seconds(2048) < 32 * short  # 8 times the text; copying it for each part would be 64 times the work


def test_a_list_of_token_ids_is_not_walked_id_by_id() -> None:
    """Bodies are searched for media in the event loop."""

    def num_calls(num_ids: int) -> int:
        body, calls = CompletionBody(prompt=[[1] * num_ids] * 2), [0]  # type: ignore[list-item, call-arg]

        def count(frame: object, event: str, argument: object) -> None:
            calls[0] += 1

        sys.setprofile(count)
        try:
            assert not list(media_in(body))
            PromptBuilder(None, vocab_size=9).build([1] * num_ids)
        finally:
            sys.setprofile(None)
        return calls[0]

    num_calls(10)  # fills caches of classes
    assert num_calls(10_000) == num_calls(10)
