"""What may be in a request: the rows of the survey's tables on request bounds, each in every dialect."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

# Each dialect's route, a request that is answered, and where it has a number of tokens.
SAY = [{"role": "user", "content": "Hi"}]
DIALECTS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": SAY, "max_tokens": 1},
    "/v1/completions": {"prompt": "Hi", "max_tokens": 1},
    "/v1/responses": {"input": "Hi", "max_output_tokens": 1},
    "/v1/messages": {"messages": SAY, "max_tokens": 1},
}
every_dialect = pytest.mark.parametrize("path", DIALECTS)


def refused(answer: httpx.Response, path: str) -> str:
    """The sentence of a refusal that has the dialect's own shape."""
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
    "bad UTF-8": (b'{"model": "\xff"}', "the body is not UTF-8 text: byte 11 is wrong"),
    "UTF-16": ('{"model": "m"}'.encode("utf-16"), "the body is not UTF-8 text"),
    "an overlong slash": (b'{"model": "\xc0\xaf"}', "the body is not UTF-8 text"),
    "half a character": (b'{"model": "\\ud800"}', "it holds half a character"),
    "half a character as a key": (b'{"\\udfff": 1}', "it holds half a character"),
    "a key twice": (b'{"model": "a", "model": "b"}', "it gives a key twice"),
    "a key twice, inside": (b'{"metadata": {"a": 1, "a": 2}}', "it gives a key twice"),
    "NaN": (b'{"temperature": NaN}', "it holds NaN, which is not JSON"),
    "infinity": (b'{"top_p": -Infinity}', "it holds -Infinity, which is not JSON"),
    "a number beyond all floats": (b'{"temperature": 1e999}', "it holds a number that is too large"),
    "a number of many digits": (b'{"seed": ' + b"9" * 5000 + b"}", "it holds a number that is too large"),
    "a number of some digits": (b'{"seed": ' + b"9" * 400 + b"}", "it holds a number that is too large"),
    "deep lists": (b'{"metadata": ' + b"[" * 500 + b"]" * 500 + b"}", "it is nested deeper than 64"),
    "lists without end": (b"[" * 1_000_000, "it is nested deeper than 64"),
    "deep objects": (b'{"a":' * 66 + b"1" + b"}" * 66, "it is nested deeper than 64"),
}


@every_dialect
@pytest.mark.parametrize("what", NOT_JSON)
def test_json_that_two_readers_could_read_in_two_ways_is_refused(
    client: httpx.Client, path: str, what: str
) -> None:
    body, sentence = NOT_JSON[what]
    assert sentence in refused(post(client, path, body), path)


def test_a_long_body_is_read_as_strictly_as_a_short_one(client: httpx.Client) -> None:
    body = b'{"messages": [], "user": "' + b"x" * 100_000 + b'", "user": ""}'
    path = "/v1/chat/completions"
    assert "it gives a key twice" in refused(post(client, path, body), path)


@every_dialect
def test_a_refusal_says_where_and_what_is_needed_and_what_was_found(client: httpx.Client, path: str) -> None:
    answered = DIALECTS[path]
    unknown = refused(client.post(path, json=answered | {"temprature": 1}), path)
    assert unknown.startswith("unknown field 'temprature'; known: model, ")
    assert "temperature" in unknown
    hot = refused(client.post(path, json=answered | {"temperature": 9}), path)
    assert hot == "temperature: expected less than or equal to 2, found 9"
    wordy = refused(client.post(path, json=answered | {"temperature": "x" * 1000}), path)
    assert wordy == "temperature: expected a valid number, found text of 1000 characters"
    assert refused(client.post(path, json=answered | {"stream": 1}), path) == (
        "stream: expected a valid boolean, found 1"
    )
