"""Bodies that cost a server far more than they cost their sender: name -> (path, body, number at once, refusal)."""

from __future__ import annotations

import json
from collections.abc import Callable


def _content(part: str, num_bytes: int) -> bytes:
    parts = ",".join([part] * (num_bytes // (len(part) + 1)))
    return f'{{"messages":[{{"role":"user","content":[{parts}]}}],"max_tokens":1}}'.encode()


def _chat(text: str) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": text}], "max_tokens": 1}).encode()


def _schema(num_leaves: int) -> bytes:
    schema = {
        "type": "object",
        "properties": {f"p{at}": {"type": "null"} for at in range(num_leaves)},
    }
    return json.dumps({
        "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
    }).encode()  # fmt: skip


def _tokens(item: str) -> bytes:
    return ('{"tokens":[' + ",".join([item] * 500_000) + "]}").encode()


def _metadata(item: str, num_bytes: int) -> bytes:
    items = ",".join([item] * (num_bytes // (len(item) + 1)))
    return f'{{"messages":[{{"role":"user","content":"Hi"}}],"max_tokens":1,"metadata":{{"a":[{items}]}}}}'.encode()


def _fields(count: int) -> bytes:
    fields = ",".join(f'"a{at}":1' for at in range(count))
    return f'{{"messages":[{{"role":"user","content":"Hi",{fields}}}],"max_tokens":1}}'.encode()


def _lines(text: str) -> bytes:
    return json.dumps(
        {"messages": [{"role": "user", "content": text}], "options": {"num_predict": 1}}
    ).encode()


def _options(count: int) -> bytes:
    options = ",".join(f'"a{at}":1' for at in range(count))
    return f'{{"messages":[{{"role":"user","content":"Hi"}}],"options":{{{options}}}}}'.encode()


def _pictures(count: int) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": "Hi", "images": ["a"] * count}]}).encode()


PROSE = "The quick brown fox jumps over the lazy dog, and 12 more.\n"
CHAT = "/v1/chat/completions"
OLLAMA = "/api/chat"
SPEAKING_OF_BRACES = _chat('{"a": [1, 2, {}], ' * 40_000)
_COUNTED = "more than 131072 tokens, and counting stops there"
_MANY, _LONG = "more than 131072 objects, lists and strings", "maximum context length is 256 tokens"
ATTACKS: dict[str, tuple[str, Callable[[], bytes], int, str]] = {
    "0.18 MB of {} as content": (
        CHAT,
        lambda: _content("{}", 180_000),
        1,
        "content.0: expected an object with type",
    ),
    "four bodies of 8 MB of {}": (CHAT, lambda: _content("{}", 8_300_000), 4, _MANY),
    "/detokenize with texts": ("/detokenize", lambda: _tokens('"a"'), 1, _MANY),
    "lists in metadata": (CHAT, lambda: _metadata("[]", 8_000_000), 1, _MANY),
    "unknown fields of a message": (CHAT, lambda: _fields(150_000), 1, _MANY),
    "six chats of 2 MB": (CHAT, lambda: _chat(PROSE * 35_000), 6, _LONG),
    "/tokenize of 1.6 MB": (
        "/tokenize",
        lambda: json.dumps({"content": PROSE * 28_000}).encode(),
        1,
        _COUNTED,
    ),
    "2 MB of one letter": (CHAT, lambda: _chat("a" * 2_000_000), 1, _LONG),
    "2 MB of spaces": (CHAT, lambda: _chat(" " * 2_000_000), 1, _LONG),
    "a schema of 160,000 leaves": (CHAT, lambda: _schema(160_000), 1, _MANY),
    "Ollama: four bodies of 8 MB of {}": (OLLAMA, lambda: _content("{}", 8_300_000), 4, _MANY),
    "Ollama: 150,000 options": (OLLAMA, lambda: _options(150_000), 1, _MANY),
    "Ollama: 2 MB of one letter": (OLLAMA, lambda: _lines("a" * 2_000_000), 1, _LONG),
    "Ollama: 100,000 pictures": (OLLAMA, lambda: _pictures(100_000), 1, "at most 256 items"),
}
