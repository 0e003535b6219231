"""Every reader of strangers' data, with the shapes of input that could make it slow: the rows of `growth.py`."""

# ruff: noqa: E501  (a shape of input is read best on one line)

from __future__ import annotations

import base64
import functools
import itertools
import json
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tokenizers
from pydantic import BaseModel

from argosy.config import Grammar
from argosy.engine.grammar import grammar_bounds
from argosy.engine.grammar.closed_schema import close_objects
from argosy.media.parts import Image
from argosy.prompt import json_text, messages, replay, taint, template_worker, tools
from argosy.prompt.stop import StopStrings
from argosy.prompt.tokenizer import Tokenizer
from argosy.route import asked, events, prefixes
from argosy.serve.answer.kept_items import KeptItems
from argosy.serve.answer.media_parts import Intake, content_of, media_in
from argosy.serve.app import ROUTES
from argosy.serve.dialects import openai_chat, openai_chunks
from argosy.serve.dialects.body import validated
from argosy.serve.guards import check_over_http
from argosy.serve.http import gate
from argosy.serve.http.caller import Caller
from argosy.serve.http.held import Held, Pool
from argosy.serve.http.streams import SSE
from argosy.strict_json import parse_json
from tests.abuse.growth import Row
from tests.prompt.families import EVERY_FAMILY as FAMILIES
from tests.prompt.families import TOOLS
from tests.prompt.tokenizers_for_tests import byte_level_json, llama_json, unigram_json, word_piece_json

Read = Callable[[Any], object]

# Runs of one text. What stands between the bars is repeated; the rest stands once.
_RUNS = (
    " | |", "|\n|", "|`|", '|"|', "|\\|", "|<|", "|[|", "|{|", "|1|x", "|a|", "|\u200b|", "|\u0301\u0316|", "|😀|", "|\0|", "|a |",
    "|ab\n|", "|a\u200b|", '|\\"|', "|[]|", "|1.|", "|1 |", "|</|", "|&#|", "|a@|", "|a.|", "|://|", "x| |x", "|-----|",
)  # fmt: skip


def run(pattern: str, n: int) -> str:
    """About `n` characters of a pattern."""
    before, repeated, after = pattern.split("|")
    return before + repeated * (n // len(repeated)) + after


def texts(reader: str, read: Read, *, most: int = 1 << 20, more: tuple[str, ...] = ()) -> Iterator[Row]:
    """A reader of text with every run, and with `more`."""
    for pattern in (*_RUNS, *more):
        yield Row(reader, ascii(pattern)[1:-1], functools.partial(run, pattern), read, most)


def _numbered(before: str, item: str, after: str, between: str = ",") -> Callable[[int], str]:
    return lambda n: before + between.join(item.replace("#", str(at)) for at in range(n)) + after


# ── JSON ────────────────────────────────────────────────────────────────────────────────────────────────────────────

_JSONS: dict[str, Callable[[int], str]] = {
    "different keys": _numbered("{", '"k#":0', "}"),
    "one key": _numbered("{", '"k":0', "}"),
    "its first key twice": _numbered('{"k0":1,', '"k#":0', "}"),
    "its last key twice": _numbered("{", '"k#":0', ',"k0":1}'),
    "keys that are equal once read": _numbered("{", '"k#":0', ',"\\u006b1":1}'),
    "nested lists": lambda n: "[" * n + "]" * n,
    "nested objects": lambda n: '{"a":' * n + "1" + "}" * n,
    "unclosed lists": lambda n: "[" * n,
    "empty lists": _numbered("[", "[]", "]"),
    "empty objects": _numbered("[", "{}", "]"),
    "empty texts": _numbered("[", '""', "]"),
    "numbers": _numbered("[", "#", "]"),
    "a long number": lambda n: "1" * n,
    "a long fraction": lambda n: "0." + "1" * n,
    "a long exponent": lambda n: "1e" + "1" * n,
    "long numbers": _numbered("[", "1" * 4000, "]"),
    "escapes": lambda n: '"' + "\\u0041" * n + '"',
    "pairs of surrogates": lambda n: '"' + "\\ud83d\\ude00" * n + '"',
    "a lone surrogate": lambda n: '"' + "a" * n + '\\ud83d"',
    "backslashes": lambda n: '"' + "\\\\" * n + '"',
    "quotes": lambda n: '"' + '\\"' * n + '"',
    "an open text": lambda n: '"' + "a" * n,
    "an open text of backslashes": lambda n: '"' + "\\" * (2 * n + 1),
    "spaces": lambda n: "[" + " " * n + "]",
    "wide characters": lambda n: '"' + "😀" * n + '"',
    "base64": lambda n: '{"data":"' + "QUJD" * n + '"}',
    "commas": lambda n: "[" + "," * n,
}


def jsons(reader: str, read: Read, *, most: int = 1 << 18, encode: bool = False) -> Iterator[Row]:
    for shape, make in _JSONS.items():
        if encode:
            yield Row(reader, shape, lambda n, make=make: make(n).encode(errors="surrogatepass"), read, most)
        else:
            yield Row(reader, shape, make, read, most)


def json_rows() -> Iterator[Row]:
    yield from jsons("strict_json.parse_json", parse_json)
    yield from jsons("json_text.count_values", json_text.count_values, encode=True, most=1 << 20)
    yield from jsons("json_text.read_object", json_text.read_object, most=1 << 16)


# ── bodies ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _chat(content: Any) -> Any:
    return {"messages": [{"role": "user", "content": content}]}


def _many(n: int, item: str) -> list[Any]:
    return [json.loads(item.replace("#", str(at))) for at in range(n)]


_CALL = '{"id":"c#","type":"function","function":{"name":"f","arguments":"{}"}}'
_RESULT = '{"role":"tool","tool_call_id":"c#","content":"r"}'
_TOOL = '{"type":"function","function":{"name":"f#","parameters":{"type":"object","properties":{"a":{"type":"string"}}}}}'
_SCHEMA = '{"type":"object","properties":{"a":{"type":"string"}}}'


def _properties(n: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{at}": {"type": "string"} for at in range(n)}}


def _same_reference(n: int) -> dict[str, Any]:
    """Many properties, all described by one long definition."""
    return {
        "type": "object",
        "properties": {f"p{at}": {"$ref": "#/$defs/x"} for at in range(n)},
        "$defs": {"x": {"anyOf": [{"type": "integer", "minimum": at} for at in range(n)]}},
    }


def _aliases(n: int) -> dict[str, Any]:
    """Many spellings of references to one long definition."""
    spelled = [
        "#/$defs/"
        + "".join(
            f"%{ord(letter):x}" if at >> bit & 1 else letter for bit, letter in enumerate("abcdefghijklmnop")
        )
        for at in range(n)
    ]
    return {
        "anyOf": [{"$ref": reference} for reference in spelled],
        "$defs": {"abcdefghijklmnop": {"enum": [[at] for at in range(n)]}},
    }


def _chain(n: int) -> dict[str, Any]:
    return {
        "$defs": {f"d{at}": {"items": {"$ref": f"#/$defs/d{at + 1}"}} for at in range(n)},
        "$ref": "#/$defs/d0",
    }


def _all_to_all(n: int) -> dict[str, Any]:
    side = int(n**0.5)
    return {
        "$defs": {
            f"d{at}": {"anyOf": [{"$ref": f"#/$defs/d{to}"} for to in range(side)]} for at in range(side)
        },
        "$ref": "#/$defs/d0",
    }


SCHEMAS: dict[str, Callable[[int], dict[str, Any]]] = {
    "many properties": _properties,
    "many required properties": lambda n: _properties(n) | {"required": [f"p{at}" for at in range(n)]},
    "one definition for many properties": _same_reference,
    "many names of one definition": _aliases,
    "a chain of definitions": _chain,
    "all definitions refer to all": _all_to_all,
    "a long enum": lambda n: {"enum": [f"v{at}" for at in range(n)]},
    "equal items in an enum": lambda n: {"enum": ["v"] * n},
    "many alternatives": lambda n: {"anyOf": [{"const": at} for at in range(n)]},
    "parts of parts": lambda n: {
        "$ref": "#/$defs/d0",
        "$defs": {
            f"d{at}": {
                "allOf": [{"$ref": f"#/$defs/d{at + 1}"}, {"properties": {f"p{at}": {"type": "integer"}}}]
            }
            for at in range(n)
        },
    },
    "one part of many": lambda n: {
        "properties": {f"p{at}": {"allOf": [{"$ref": "#/$defs/d"}, {"required": ["r"]}]} for at in range(n)},
        "$defs": {"d": _properties(n)},
    },
    "long descriptions": lambda n: {"type": "object", "description": "d" * n},
    "empty objects": lambda n: {"enum": [{}] * n},
    "references to itself": lambda n: {"anyOf": [{"$ref": "#"}] * n},
    "long references": lambda n: {"$ref": "#" + "/a" * n},
    "many types": lambda n: {"type": ["string"] * n},
    "properties with definitions of their own": lambda n: {
        "type": "object",
        "properties": {f"p{at}": {"type": "integer", "minimum": at} for at in range(n)},
        "$defs": {f"d{at}": {"type": "integer"} for at in range(n)},
    },
}

_CHATS: dict[str, Callable[[int], Any]] = {
    "small parts": lambda n: _chat([{"type": "text", "text": "x"}] * n),
    "long parts": lambda n: _chat([{"type": "text", "text": "x" * 4000}] * n),
    "messages": lambda n: {"messages": [{"role": "user", "content": "x"}] * n},
    "messages of the assistant": lambda n: {
        "messages": [{"role": "assistant", "content": "x" * 100}] * n + [{"role": "user", "content": "x"}]
    },
    "calls and results": lambda n: {
        "messages": [
            {"role": "user", "content": "u"},
            {"role": "assistant", "tool_calls": _many(n, _CALL)},
            *_many(n, _RESULT),
        ]
    },
    "one call's id": lambda n: {
        "messages": [
            {"role": "user", "content": "u"},
            {"role": "assistant", "tool_calls": _many(n, _CALL.replace("#", ""))},
            *_many(n, _RESULT.replace("#", "")),
        ]
    },
    "arguments": lambda n: {
        "messages": [
            {"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": json.dumps({f"k{at}": at for at in range(n)})}}]},
            {"role": "tool", "tool_call_id": "c", "content": "r"},
        ]
    },
    "system messages": lambda n: {"messages": [{"role": "system", "content": "x"}] * n + [{"role": "user", "content": "x"}]},
    "pictures": lambda n: _chat([{"type": "image_url", "image_url": {"url": "data:image/png;base64,QUJD"}}] * n),
    "unknown fields": lambda n: {f"u{at}": 1 for at in range(n)} | _chat("x"),
    "metadata": lambda n: _chat("x") | {"metadata": {"a": [[]] * n}},
    "biases": lambda n: _chat("x") | {"logit_bias": {str(at): 1 for at in range(n)}},
    "stop strings": lambda n: _chat("x") | {"stop": ["x" * 1000] * n},
    "tools": lambda n: _chat("x") | {"tools": _many(n, _TOOL)},
    "tools of one name": lambda n: _chat("x") | {"tools": _many(n, _TOOL.replace("f#", "f"))},
    "a tool's properties": lambda n: _chat("x") | {"tools": [{"type": "function", "function": {"name": "f", "parameters": _properties(n)}}]},
    "a schema": lambda n: _chat("x") | {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": _properties(n)}}},
    "choices": lambda n: _chat("x") | {"structured_outputs": {"choice": [f"c{at}" for at in range(n)]}},
    "a grammar": lambda n: _chat("x") | {"structured_outputs": {"grammar": "start: " + '"a" ' * n}},
    "a last part that is wrong": lambda n: _chat([{"type": "text", "text": "x"}] * n + [{"type": "text", "text": 1}]),
    "parts that are wrong": lambda n: _chat([{"type": "nothing"}] * n),
}  # fmt: skip
_RESPONSES: dict[str, Callable[[int], Any]] = {
    "items": lambda n: {"input": [{"role": "user", "content": "x"}] * n},
    "items of the assistant": lambda n: {
        "input": [*[{"type": "message", "role": "assistant", "content": "x" * 500}] * n, {"role": "user", "content": "x"}]
    },
    "thoughts": lambda n: {
        "input": [*[{"type": "reasoning", "content": "x" * 500}] * n, {"role": "user", "content": "x"}]
    },
    "references": lambda n: {
        "input": [*[{"type": "item_reference", "id": "msg_1"}] * n, {"role": "user", "content": "x"}]
    },
    "parts": lambda n: {"input": [{"role": "user", "content": [{"type": "input_text", "text": "x" * 500}] * n}]},
    "calls": lambda n: {
        "input": [
            *({"type": "function_call", "call_id": f"c{at}", "name": "f", "arguments": "{}"} for at in range(n)),
            *({"type": "function_call_output", "call_id": f"c{at}", "output": "r"} for at in range(n)),
        ]
    },
    "tools": lambda n: {
        "input": "x",
        "tools": [{"type": "function", "name": f"f{at}", "parameters": _properties(4)} for at in range(n)],
    },
    "included names": lambda n: {"input": "x", "include": ["a"] * n},
}  # fmt: skip
_ANTHROPIC: dict[str, Callable[[int], Any]] = {
    "blocks": lambda n: {
        "max_tokens": 1, "messages": [{"role": "user", "content": [{"type": "text", "text": "x" * 500}] * n}]
    },
    "uses and results of tools": lambda n: {
        "max_tokens": 1,
        "messages": [
            {"role": "user", "content": "u"},
            {"role": "assistant", "content": [{"type": "tool_use", "id": f"c{at}", "name": "f", "input": {}} for at in range(n)]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": f"c{at}", "content": "r"} for at in range(n)]},
        ],
    },
    "thoughts": lambda n: {
        "max_tokens": 1,
        "messages": [
            {"role": "user", "content": "u"},
            {"role": "assistant", "content": [*[{"type": "thinking", "thinking": "x" * 500, "signature": ""}] * n, {"type": "text", "text": "a"}]},
            {"role": "user", "content": "u"},
        ],
    },
    "texts of the assistant": lambda n: {
        "max_tokens": 1,
        "messages": [
            {"role": "user", "content": "u"},
            {"role": "assistant", "content": [{"type": "text", "text": "x" * 500}] * n},
            {"role": "user", "content": "u"},
        ],
    },
    "system texts": lambda n: {
        "max_tokens": 1, "system": [{"type": "text", "text": "x" * 500}] * n, "messages": [{"role": "user", "content": "u"}]
    },
    "tools": lambda n: {
        "max_tokens": 1, "messages": [{"role": "user", "content": "u"}],
        "tools": [{"name": f"f{at}", "input_schema": _properties(4)} for at in range(n)],
    },
    "tools that run elsewhere": lambda n: {
        "max_tokens": 1, "messages": [{"role": "user", "content": "u"}],
        "tools": [{"type": f"web_search_{at}", "name": f"f{at}"} for at in range(n)],
    },
    "documents": lambda n: {
        "max_tokens": 1,
        "messages": [{"role": "user", "content": [{"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "x" * 500}}] * n}],
    },
}  # fmt: skip


def _kept() -> KeptItems:
    kept = KeptItems(max_bytes=4 << 20)
    item = {
        "id": "msg_1", "status": "completed", "type": "message", "role": "assistant",
        "content": [{"type": "output_text", "text": "word " * 40, "annotations": [], "logprobs": []}],
    }  # fmt: skip
    kept.keep(
        "t",
        "resp_1",
        None,
        [{"type": "message", "role": "user", "content": "hi"}],
        [item],
        answer={"id": "resp_1"},
    )
    return kept


def _asked_of(model: type[BaseModel]) -> Callable[[Any, Caller], object]:
    """What a dialect does with a body once it is parsed."""

    match model.__name__:
        case "ResponsesBody":
            return lambda body, caller: body.request(_kept(), "t", Intake((), caller.held.share))
        case "MessagesBody":
            return lambda body, caller: body.request(Intake((), caller.held.share), keep_billing_line=False)
        case "OllamaChatBody":
            return lambda body, caller: body.request(Intake((), caller.held.share))
        case "ChatBody":
            return lambda body, caller: body.request(caller, Intake((), caller.held.share))
    return lambda body, caller: list(media_in(body))


def body_rows() -> Iterator[Row]:
    from argosy.serve.dialects.anthropic_messages_bodies import MessagesBody
    from argosy.serve.dialects.llama_infill import InfillBody
    from argosy.serve.dialects.ollama_bodies import EmbedBody, GenerateBody, OllamaChatBody
    from argosy.serve.dialects.openai_completions import CompletionBody
    from argosy.serve.dialects.openai_embeddings import EmbeddingsBody
    from argosy.serve.dialects.openai_responses_bodies import ResponsesBody
    from argosy.serve.dialects.rerank import RerankBody
    from argosy.serve.dialects.tokens import DetokenizeBody, TokenizeBody
    from argosy.serve.guards.moderations import ModerationBody

    def rows_of(model: type[BaseModel], shapes: dict[str, Callable[[int], Any]]) -> Iterator[Row]:
        asked_of = _asked_of(model)

        def read(data: bytes) -> object:
            caller = Caller(held=Held(share=Pool(1 << 30).share()))
            body = validated(data, model, caller.held.share)
            list(media_in(body))
            made: Any = asked_of(body, caller)
            if hasattr(made, "messages"):
                return messages.check_messages(made.messages), tools.check_tools(made.tools)
            return made

        for shape, make in shapes.items():
            yield Row(
                f"body of {model.__name__}",
                shape,
                lambda n, make=make: json.dumps(make(n)).encode(),
                read,
                4096,
            )

    yield from rows_of(openai_chat.ChatBody, _CHATS)
    yield from rows_of(ResponsesBody, _RESPONSES)
    yield from rows_of(MessagesBody, _ANTHROPIC)
    yield from rows_of(OllamaChatBody, {name: _CHATS[name] for name in ("messages", "tools", "unknown fields")} | {
        "calls": lambda n: {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}] * n}, {"role": "user", "content": "x"}]},
        "pictures": lambda n: {"messages": [{"role": "user", "content": "Hi", "images": ["a"] * n}]},
        "options": lambda n: {"messages": [{"role": "user", "content": "Hi"}], "options": {f"o{at}": 1 for at in range(n)}},
    })  # fmt: skip
    yield from rows_of(GenerateBody, {
        "context": lambda n: {"prompt": "x", "context": list(range(n))}, "a long prompt": lambda n: {"prompt": "x" * 1000 * n},
    })  # fmt: skip
    yield from rows_of(CompletionBody, {
        "ids": lambda n: {"prompt": list(range(100 * n))}, "prompts": lambda n: {"prompt": ["x"] * n},
        "lists of ids": lambda n: {"prompt": [[1]] * n}, "a long prompt": lambda n: {"prompt": "x" * 1000 * n},
    })  # fmt: skip
    yield from rows_of(EmbedBody, {"texts": lambda n: {"model": "m", "input": ["x"] * n}})
    yield from rows_of(
        EmbeddingsBody, {"texts": lambda n: {"input": ["x"] * n}, "ids": lambda n: {"input": [[1] * 100] * n}}
    )
    yield from rows_of(
        ModerationBody,
        {
            "texts": lambda n: {"input": ["x"] * n},
            "parts": lambda n: {"input": [{"type": "text", "text": "x"}] * n},
        },
    )
    yield from rows_of(RerankBody, {"documents": lambda n: {"query": "q", "documents": ["x"] * n}})
    yield from rows_of(
        InfillBody,
        {
            "extras": lambda n: {
                "input_prefix": "a",
                "input_suffix": "b",
                "input_extra": [{"text": "x", "filename": "f"}] * n,
            }
        },
    )
    yield from rows_of(TokenizeBody, {"a long text": lambda n: {"content": "x" * 1000 * n}})
    yield from rows_of(DetokenizeBody, {"ids": lambda n: {"tokens": list(range(100 * n))}})
    yield from jsons(
        "body of ChatBody",
        lambda data: validated(data, openai_chat.ChatBody, Pool(1 << 30).share()),
        encode=True,
        most=1 << 16,
    )
    yield Row(
        "media_parts.content_of",
        "texts",
        lambda n: ["x" * 100] * n,
        lambda pieces: content_of(pieces, between="\n"),
        1 << 18,
    )
    yield Row(
        "media_parts.content_of",
        "texts between media",
        lambda n: ["x" * 100, {"type": "image"}] * (n // 2),
        lambda pieces: content_of(pieces, between="\n"),
        1 << 18,
    )


# ── connections ─────────────────────────────────────────────────────────────────────────────────────────────────────


def connection_rows() -> Iterator[Row]:
    from python_multipart.multipart import parse_options_header
    from starlette.datastructures import QueryParams
    from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

    from argosy.serve.dialects import form
    from argosy.serve.dialects.openai_audio import TranscriptionBody
    from argosy.serve.http import incoming, origins

    most = 32 << 10  # the longest head of a request

    def headers(data: str) -> object:
        raw = [(b"host", b"localhost"), *((b"x", data.encode("utf-8", "replace")),)]
        found = incoming.read_headers({"headers": raw, "http_version": "1.1"})
        found |= dict.fromkeys(
            ("traceparent", "host", "authorization", "origin", "access-control-request-headers"), found["x"]
        )
        incoming.trace_of(found)
        gate._AUTHORITY.fullmatch(found["host"])
        incoming.secret_of(found)
        origins.granted("GET", found)
        origins._ORIGIN.fullmatch(found["origin"])
        return gate._is_address(found["host"])

    yield from texts(
        "gate: headers", headers, most=most, more=("00-|a|", "|a, |", "|::|", "a|,a|", "Bearer| |x", "|a-|,")
    )
    yield Row(
        "gate: many headers",
        "different",
        lambda n: [(b"x%d" % at, b"y") for at in range(n)],
        lambda raw: incoming.read_headers({"headers": raw, "http_version": "1.1"}),
        most,
    )
    yield Row(
        "gate: many headers",
        "equal",
        lambda n: [(b"x", b"y")] * n,
        lambda raw: incoming.read_headers({"headers": raw, "http_version": "1.1"}),
        most,
    )
    table = [(route.rule, gate._pattern(route.rule)) for route in ROUTES]
    yield from texts(
        "gate: path",
        lambda path: [rule for rule, pattern in table if pattern.fullmatch("/v1/responses/" + path)],
        most=most,
    )
    yield from texts(
        "query string",
        lambda text: QueryParams(text.encode("utf-8", "replace")),
        most=most,
        more=("|a&|", "|a=b&|", "|%41|", "|+|"),
    )
    yield from texts(
        "content-disposition",
        lambda text: parse_options_header(text.encode("utf-8", "replace")),
        most=most,
        more=('form-data|; a="b"|', 'form-data; a="|\\"|', "form-data|;|", "form-data; a|*0=b; a|", "a|;a=|"),
    )

    async def nothing(*given: Any) -> None: ...

    proxied = ProxyHeadersMiddleware(nothing, trusted_hosts=["127.0.0.1"])

    def forward(value: str) -> object:
        scope = {
            "type": "http",
            "client": ("127.0.0.1", 1),
            "scheme": "http",
            "headers": [
                (b"x-forwarded-for", value.encode("utf-8", "replace")),
                (b"x-forwarded-proto", b"https"),
            ],
        }
        return _drive(proxied(scope, nothing, nothing))

    yield from texts("x-forwarded-for", forward, most=most, more=("|127.0.0.1,|", "|127.0.0.1,|8.8.8.8"))

    def parts(data: bytes) -> object:
        from python_multipart.multipart import MultipartParser

        made = form._Form()
        parser = MultipartParser(b"x", made.callbacks())
        for at in range(0, len(data), 1 << 16):
            parser.write(data[at : at + (1 << 16)])
        return form._values(made.parts, TranscriptionBody)

    def one_by_one(data: bytes) -> object:
        from python_multipart.multipart import MultipartParser

        made = form._Form()
        parser = MultipartParser(b"x", made.callbacks())
        for at in range(len(data)):
            parser.write(data[at : at + 1])
        return made

    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
    for name, read in (("form", parts), ("form, byte by byte", one_by_one)):
        for shape, make in {
            "a file of line ends": lambda n: head + b"\r\n" * n + b"\r\n--x--\r\n",
            "a file of beginnings of its boundary": lambda n: head + b"\r\n--" * n + b"\r\n--x--\r\n",
            "a file of zeros": lambda n: head + bytes(n) + b"\r\n--x--\r\n",
            "many parts": lambda n: (
                (b'--x\r\nContent-Disposition: form-data; name="a[]"\r\n\r\nb\r\n') * n + b"--x--\r\n"
            ),
            "a long header": lambda n: b"--x\r\nA: " + b"b" * n + b"\r\n\r\n",
            "a long name of a header": lambda n: b"--x\r\n" + b"A" * n + b": b\r\n\r\n",
            "many headers": lambda n: (
                b"--x\r\n" + b"A: b\r\n" * n + b'Content-Disposition: form-data; name="a"\r\n\r\n'
            ),
            "line ends before it": lambda n: b"\r\n" * n + head,
        }.items():
            yield Row(name, shape, make, read, 1 << 20)

    import h11

    def head_of(data: bytes) -> object:
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=32 << 10)
        try:
            for at in range(0, len(data), 64):
                connection.receive_data(data[at : at + 64])
                if connection.next_event() is h11.NEED_DATA:
                    continue
        except h11.RemoteProtocolError:
            return None
        return None

    for shape, make in {
        "one long header": lambda n: b"GET / HTTP/1.1\r\nA: " + b"b" * n,
        "many headers": lambda n: b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * (n // 6),
        "spaces": lambda n: b"GET / HTTP/1.1\r\nA: " + b" " * n + b"\r\n\r\n",
        "folded lines": lambda n: b"GET / HTTP/1.1\r\nA: b" + b"\r\n b" * (n // 4) + b"\r\n\r\n",
        "line ends": lambda n: b"\n" * n,
        "carriage returns": lambda n: b"GET / HTTP/1.1\r\n" + b"\r" * n,
        "a long path": lambda n: b"GET /" + b"a" * n,
    }.items():
        yield Row("h11: head in small pieces", shape, make, head_of, 32 << 10)
    for shape, make in {
        "chunks of one byte": lambda n: (
            b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\na\r\n" * n
        ),
        "a long chunk extension": lambda n: (
            b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1;" + b"a" * n
        ),
        "many trailers": lambda n: (
            b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n" + b"A: b\r\n" * n
        ),
    }.items():
        yield Row("h11: a body in chunks", shape, make, _whole_request, 1 << 20)


def _whole_request(data: bytes) -> None:
    import h11

    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=32 << 10)
    try:
        for at in range(0, len(data), 1 << 16):
            connection.receive_data(data[at : at + (1 << 16)])
            while connection.next_event() not in (h11.NEED_DATA, h11.PAUSED):
                pass
    except h11.RemoteProtocolError:
        pass


def _drive(made: Any) -> None:
    try:
        made.send(None)
    except StopIteration:
        return
    raise AssertionError("it waits")


# ── prompts ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@functools.cache
def _tokenizers() -> dict[str, Tokenizer]:
    sources = {
        "byte level": byte_level_json(), "llama": llama_json(), "llama, first": llama_json("first"), "unigram": unigram_json(),
        "word piece": word_piece_json(),
    }  # fmt: skip
    return {name: Tokenizer(tokenizers.Tokenizer.from_str(text)) for name, text in sources.items()}


def prompt_rows() -> Iterator[Row]:
    for name, tokenizer in _tokenizers().items():
        yield from texts(
            f"tokenizer {name}: encode",
            tokenizer.encode,
            most=1 << 18,
            more=("|<think>|", "|<unk>|", "|<s>|", "|<think|"),
        )
        yield Row(
            f"tokenizer {name}: decode",
            "ids",
            lambda n: [at % 100 for at in range(n)],
            tokenizer.decode,
            1 << 18,
        )
        yield Row(f"tokenizer {name}: decode", "one id", lambda n: [60] * n, tokenizer.decode, 1 << 18)
        yield Row(
            f"tokenizer {name}: segments",
            "alternating",
            lambda n: [(at % 2 == 0, f"word{at} ") for at in range(n)],
            tokenizer.encode_segments,
            1 << 16,
        )
        yield Row(
            f"tokenizer {name}: segments", "markers across", lambda n: [(at % 2 == 0, "<think" if at % 2 else ">") for at in range(n)],
            tokenizer.encode_segments, 1 << 16,
        )  # fmt: skip

    def tainted(text: str) -> object:
        made = taint.ShadowMap().taint(text)
        made.split("a")
        made.split()
        made.strip()
        made.splitlines()
        made.replace("x", "y")
        made.partition(" ")
        return made._shadows.segments(str.__str__(made)), made.upper()

    yield from texts("taint", tainted, most=1 << 18, more=("|\U00040000|", "|\U000b0000|a"))
    yield Row(
        "taint",
        "different shadows",
        lambda n: "".join(chr(0x40000 + at) for at in range(n)),
        tainted,
        1 << 17,
    )

    for template in (
        "qwen3",
        "harmony",
        "deepseek_v31",
        "glm",
        "kimi_k2",
        "mistral",
        "minimax_m2",
        "qwen3_coder",
        "chatml",
    ):
        family = FAMILIES[template]
        fixed = {"bos_token": "", "eos_token": "", **family.config}

        def render(given: Any, source: str = family.template, fixed: dict[str, Any] = fixed) -> object:
            try:
                return template_worker.render_segments(
                    source, given, fixed=fixed, variables={}, max_characters=1 << 26
                )
            except template_worker.Refused as refusal:
                raise ValueError(str(refusal)) from None

        for shape, make in {
            "a long text": lambda n: [{"role": "user", "content": "x " * n}],
            "line ends": lambda n: [{"role": "user", "content": "\n" * n}],
            "thoughts": lambda n: [{"role": "user", "content": "u"}, {"role": "assistant", "content": "<think>a</think>" * n}, {"role": "user", "content": "u"}],
            "turns": lambda n: [{"role": ("user", "assistant")[at % 2], "content": "x"} for at in range(2 * (n // 2) + 1)],
            "calls": lambda n: [m for at in range(n) for m in ({"role": "user", "content": "u"}, {"role": "assistant", "content": "", "tool_calls": [{"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": {"a": "b"}}}]}, {"role": "tool", "content": "r", "tool_call_id": "abcdefghi"})] + [{"role": "user", "content": "u"}],
        }.items():  # fmt: skip
            # gpt-oss's own template reads all turns before each call; its time is bounded in `chat.py`.
            most = 64 if (template, shape) == ("harmony", "calls") else 1 << 12
            yield Row(f"template {template}", shape, make, render, most)

    shape_of = FAMILIES["harmony"].shared_builder._template
    assert shape_of is not None

    def shaped(given: Any) -> object:
        return shape_of.shape.messages(messages.check_messages(given))

    for name, make in _CHATS.items():
        if name in (
            "calls and results",
            "one call's id",
            "messages",
            "system messages",
            "small parts",
            "long parts",
        ):
            yield Row("template shape", name, lambda n, make=make: make(n)["messages"], shaped, 1 << 12)
    yield Row("messages.joined", "texts", lambda n: [(True, "x" * 100)] * n, messages.joined, 1 << 18)
    yield Row(
        "messages.joined",
        "texts and media",
        lambda n: [(True, "x" * 100), (True, "y"), Image(b"")] * (n // 3),
        messages.joined,
        1 << 18,
    )

    def checked(given: Any) -> object:
        return messages.check_messages(given)

    yield Row(
        "messages",
        "parts",
        lambda n: [{"role": "user", "content": [{"type": "text", "text": "x" * 100}] * n}],
        checked,
        1 << 16,
    )
    yield Row(
        "messages",
        "results",
        lambda n: [{"role": "assistant", "content": "", "tool_calls": _many(n, _CALL)}, *_many(n, _RESULT)],
        checked,
        1 << 16,
    )
    for name, schema in SCHEMAS.items():

        def tool(n, schema=schema):
            return {
                "type": "function",
                "function": {"name": "f", "parameters": {"type": "object"} | schema(n)},
            }

        yield Row("tools.check_tools", name, lambda n, tool=tool: [tool(n)], tools.check_tools, 1 << 13)
        for form in ("glm", "qwen3_coder", "hermes", "harmony"):
            family = FAMILIES[{"hermes": "qwen3"}.get(form, form)]

            def read(given, family=family):
                return family.shared_builder.format.lazy_grammar(tools.check_tools(given))

            yield Row(f"grammar of tools, {form}", name, lambda n, tool=tool: [tool(n)], read, 1 << 13)
    yield Row(
        "grammar of tools, glm",
        "many tools",
        lambda n: _many(n, _TOOL),
        lambda given: FAMILIES["glm"].shared_builder.format.lazy_grammar(tools.check_tools(given)),
        512,
    )

    for stops in (
        ("x" * 1024,),
        ("ab" * 512,),
        tuple("a" * at for at in range(1, 17)),
        ("a" * 1023 + "b",) * 16,
    ):
        for pattern in ("|a|", "|x|", "|ab|", "|aab|", "|abab a|"):

            def feed(text: str, stops: tuple[str, ...] = stops) -> object:
                made = StopStrings(stops)
                return [made.push(letter) for letter in text]

            yield Row(
                "stop strings",
                f"{stops[0][:4]} x {len(stops)}: {pattern}",
                functools.partial(run, pattern),
                feed,
                1 << 16,
            )

    def feed_one(given: tuple[str, str]) -> object:
        made = StopStrings([given[1]])
        return [made.push(letter) for letter in given[0]]

    for pattern in ("|a|", "|ab|"):
        yield Row(
            "stop strings",
            f"a long one of {pattern}",
            lambda n, pattern=pattern: (run(pattern, n), run(pattern, n) + "!"),
            feed_one,
            1024,
        )


def answer_rows() -> Iterator[Row]:
    """Parsers of answers, fed one character at a time, and all at once."""
    checked = tools.check_tools(TOOLS)
    for name, family in FAMILIES.items():
        form = family.shared_builder.format
        ids = {str(mark): token_id for token_id, mark in form.lexer.ids.items()}
        spelled = [*form.lexer.spelled]

        def feed(lexemes: list[tuple[int | None, str]], form: Any = form, is_cut: bool = False) -> object:
            parser = form.parser(checked, None)
            found = [event for token_id, text in lexemes for event in parser.push(token_id, text)]
            return found + list(parser.finish(is_cut=is_cut))

        def cut(lexemes: Any, feed: Any = feed) -> object:
            return feed(lexemes, is_cut=True)

        def pieces(text: str, ids: dict[str, int] = ids) -> list[tuple[int | None, str]]:
            """A text as tokens: marks as theirs, all else character by character."""
            import re

            pattern = "|".join(map(re.escape, sorted(ids, key=len, reverse=True)))
            parts = re.split(f"({pattern})", text) if pattern else [text]
            return [
                one for part in parts
                for one in ([(ids[part], part)] if part in ids else [(None, letter) for letter in part])
            ]  # fmt: skip

        marks = [*ids, *spelled]
        for pattern in ("| |", "|\n|", "|x |", "|<|", "|{|", '|"|', "|`|", "|</|"):
            yield Row(
                f"answers {name}",
                ascii(pattern)[1:-1],
                lambda n, pattern=pattern: [(None, letter) for letter in run(pattern, n)],
                feed,
                1 << 16,
            )
            opening = next(iter(getattr(form, "blocks", {})), None)
            if opening is not None:
                yield Row(
                    f"answers {name}",
                    f"a call of {ascii(pattern)[1:-1]}",
                    lambda n, pattern=pattern, pieces=pieces, opening=opening: pieces(
                        opening + run(pattern, n)
                    ),
                    feed,
                    1 << 16,
                )
                yield Row(
                    f"answers {name}",
                    f"a cut call of {ascii(pattern)[1:-1]}",
                    lambda n, pattern=pattern, pieces=pieces, opening=opening: pieces(
                        opening + run(pattern, n)
                    ),
                    cut,
                    1 << 16,
                )
        for mark in marks:
            yield Row(
                f"answers {name}",
                f"{mark} x n",
                lambda n, mark=mark, pieces=pieces: pieces(mark * n),
                feed,
                1 << 14,
            )
            yield Row(
                f"answers {name}",
                f"{mark} a x n",
                lambda n, mark=mark, pieces=pieces: pieces((mark + "a ") * n),
                feed,
                1 << 14,
            )
        for first, second in itertools.pairwise(marks):
            yield Row(
                f"answers {name}",
                f"{first}{second}",
                lambda n, both=first + second, pieces=pieces: pieces((both + "a") * n),
                feed,
                1 << 13,
            )
        for shape, call in CALLS.get(name, {}).items():
            yield Row(
                f"answers {name}", shape, lambda n, call=call, pieces=pieces: pieces(call(n)), feed, 1 << 13
            )
            yield Row(
                f"answers {name}",
                f"{shape}, cut",
                lambda n, call=call, pieces=pieces: pieces(call(n)),
                cut,
                1 << 13,
            )

    def fold(deltas: list[Any]) -> object:
        whole = dict[str, Any]()
        for delta in deltas:
            openai_chunks.join(whole, delta)
        return openai_chunks.joined(whole)

    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    for shape, make in {
        "texts": lambda n: [{"index": 0, "delta": {"content": "four" * 64}}] * n,
        "arguments": lambda n: [{"tool_calls": [{"index": 0, "function": {"arguments": "four" * 64}}]}] * n,
        "calls": lambda n: [{"tool_calls": [call | {"index": at}]} for at in range(n)],
        "scores": lambda n: [{"logprobs": {"content": [{"token": "a", "top_logprobs": []}]}}] * n,
    }.items():
        yield Row("a whole answer", shape, make, fold, 1 << 17)


def _joined_calls(before: str, call: str, after: str, between: str = "") -> Callable[[int], str]:
    return lambda n: before + between.join(call.replace("#", str(at)) for at in range(n)) + after


_QWEN_CODER = {
    "parameters": _joined_calls("<tool_call>\n<function=clock>\n", "<parameter=p#>\nv\n</parameter>\n", "</function>\n</tool_call>"),
    "closing tags in a value": _joined_calls("<tool_call>\n<function=clock>\n<parameter=p>\n", "</parameter>\n ", ""),
    "tags that may go on": _joined_calls("<tool_call>\n<function=clock>\n<parameter=p>\n", "</parameter><parameter=", ""),
    "functions": _joined_calls("<tool_call>\n", "<function=clock>\n</function>\n", "</tool_call>"),
    "calls": _joined_calls("", "<tool_call>\n<function=clock>\n</function>\n</tool_call>\n", ""),
    "closing marks": _joined_calls('<tool_call>\n<function=clock>\n<parameter=p>\n', "</tool_call>", ""),
}  # fmt: skip
_MINIMAX = {
    "parameters": _joined_calls('<minimax:tool_call>\n<invoke name="clock">\n', '<parameter name="p#">v</parameter>\n', "</invoke>\n</minimax:tool_call>"),
    "tags that may go on": _joined_calls('<minimax:tool_call>\n<invoke name="clock">\n<parameter name="p">', '</parameter><parameter name="', ""),
    "an open tag": _joined_calls('<minimax:tool_call>\n<invoke name="clock">\n<parameter name="', "p", ""),
}  # fmt: skip
_GLM_CALLS = {
    "arguments": _joined_calls("<tool_call>clock\n", "<arg_key>p#</arg_key>\n<arg_value>v</arg_value>\n", "</tool_call>"),
    "one key": _joined_calls("<tool_call>clock\n", "<arg_key>p</arg_key>\n<arg_value>v</arg_value>\n", "</tool_call>"),
    "values": _joined_calls("<tool_call>get_weather\n", "<arg_key>p#</arg_key>\n<arg_value>[1]</arg_value>\n", ""),
}  # fmt: skip
CALLS: dict[str, dict[str, Callable[[int], str]]] = {
    "qwen3_coder": _QWEN_CODER,
    "minimax_m2": _MINIMAX,
    "minimax_spelled": _MINIMAX,
    "glm": _GLM_CALLS,
    "glm47": _GLM_CALLS,
    "mistral": {
        "a list of calls": _joined_calls("[TOOL_CALLS][", '{"name":"clock","arguments":{"p":#}}', "", ", "),
        "an open list": _joined_calls("[TOOL_CALLS][", '{"name":"clock","arguments":{"p":#}}', ', {"name":"clock","arg', ", "),
    },
    "mistral_args": {"calls": _joined_calls("", '[TOOL_CALLS]clock[ARGS]{"p":#}', "")},
    "qwen3": {
        "calls": _joined_calls("", '<tool_call>\n{"name":"clock","arguments":{"p":#}}\n</tool_call>\n', ""),
        "closing marks in a text": _joined_calls('<tool_call>\n{"name":"clock","arguments":{"p":"', "</tool_call>", ""),
        "a long argument": _joined_calls('<tool_call>\n{"name":"clock","arguments":{"p":"', "\\\\", '"}}\n</tool_call>'),
        "spaces in a call": _joined_calls('<tool_call>\n{"name"', " ", ""),
    },
    "harmony": {
        "messages": _joined_calls("", "<|channel|>final<|message|>a<|end|><|start|>assistant", ""),
        "a long header": _joined_calls("<|channel|>commentary", " to=x#", "<|message|>a"),
        "a call": _joined_calls("<|channel|>commentary to=functions.clock <|constrain|>json<|message|>{", '"p#":1', "}<|call|>", ","),
        "channels": _joined_calls("", "<|channel|>", ""),
    },
    "deepseek_v31": {
        "calls": _joined_calls("<｜tool▁calls▁begin｜>", '<｜tool▁call▁begin｜>clock<｜tool▁sep｜>{"p":#}<｜tool▁call▁end｜>', "<｜tool▁calls▁end｜>"),
        "fences": _joined_calls("<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>clock\n```json\n", "\n```", "x<｜tool▁call▁end｜>"),
        "spaces": _joined_calls("<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>clock", " ", "x<｜tool▁call▁end｜>"),
    },
    "gemma4": {
        "calls": _joined_calls("", "<|tool_call>call:clock{p:#}<tool_call|>", ""),
        "keys": _joined_calls("<|tool_call>call:clock{", "p#:1", "}<tool_call|>", ","),
        "texts": _joined_calls("<|tool_call>call:clock{p:[", '<|"|>a<|"|>', "]}<tool_call|>", ","),
        "open objects": _joined_calls("<|tool_call>call:clock{", "a:{", "<tool_call|>"),
        "closing brackets": _joined_calls("<|tool_call>call:clock{", "}", "<tool_call|>"),
        "closing marks in a text": _joined_calls('<|tool_call>call:clock{p:<|"|>', "<tool_call|>", ""),
        "channels": _joined_calls("", "<|channel>thought\na<channel|>b", ""),
    },
    "kimi_k2": {
        "calls": _joined_calls("<|tool_calls_section_begin|>", '<|tool_call_begin|>functions.clock:#<|tool_call_argument_begin|>{"p":1}<|tool_call_end|>', "<|tool_calls_section_end|>"),
        "an id": _joined_calls("<|tool_calls_section_begin|><|tool_call_begin|>functions.", ":1", "x<|tool_call_argument_begin|>{}<|tool_call_end|>"),
    },
}  # fmt: skip


def replay_rows() -> Iterator[Row]:
    """A conversation of many remembered answers."""
    from argosy.prompt.replay import Replay, ReplayMemory

    family = FAMILIES["qwen3"]
    builder = family.shared_builder

    @functools.cache
    def remembered(n: int) -> Any:
        memory = ReplayMemory(max_turns=1 << 20, max_bytes=1 << 30)
        own = Replay(memory, family.tokenizer, lambda offered: builder.format)
        segments: list[tuple[bool, str]] = []
        found = []
        ids: list[int] = []
        for at in range(n):
            more = [
                (False, "<|im_start|>user\n"),
                (True, f"question {at}"),
                (False, "<|im_end|>\n<|im_start|>assistant\n"),
            ]
            segments += more
            ids += family.tokenizer.encode_segments(more)
            said = family.tokenizer.encode(f"answer {at}")
            trace = replay.Trace(
                sum(len(text) for _, text in segments),
                replay.text_digest(segments),
                replay.ids_digest(ids),
                b"",
                "",
            )
            answer = replay.read_answer(said, builder.format, family.tokenizer, (), None)
            found.append(replay.Remembered(trace, answer, __import__("array").array("I", said)))
            segments += [(True, f"answer {at}"), (False, "<|im_end|>\n")]
            ids += said
            ids += family.tokenizer.encode_segments([(False, "<|im_end|>\n")])
        return own, segments, found

    yield Row(
        "replay.encode",
        "remembered answers",
        remembered,
        lambda given: given[0].encode(given[1], given[2], ()),
        2048,
    )


# ── grammars ────────────────────────────────────────────────────────────────────────────────────────────────────────


def grammar_rows() -> Iterator[Row]:
    most = grammar_bounds.MAX_CALLERS_CHARACTERS
    lark = (
        "|start: a\n|",
        "start:|(|",
        "start:| a|",
        'start: |"a" |',
        "start: |/a/ |",
        "|a: b\n|",
        "start: |[|",
        "|%json {}|",
        "%json |[|",
        "|//\n|",
        '|"\\|',
        "|/\\|",
        "a|~|",
        "|<[1]>|",
        "|@a|",
    )
    yield from texts("grammar_bounds.require_plain", grammar_bounds.require_plain, most=most, more=lark)
    yield from texts(
        "grammar_bounds.read_lark",
        lambda text: grammar_bounds.require_lark_bounds(grammar_bounds.read_lark(text)),
        most=1 << 17,
        more=lark,
    )
    for shape, make in {
        "a chain of rules": _numbered("start: a0\n", "a#: b#", "", "\n"),
        "rules that lead on": lambda n: (
            "start: a0\n" + "".join(f"a{at}: a{at + 1}\n" for at in range(n)) + f'a{n}: "x"'
        ),
        "rules that refer to all": lambda n: (
            "\n".join(
                f"a{at}: " + " ".join(f"a{to}" for to in range(int(n**0.5))) for at in range(int(n**0.5))
            )
            + "\nstart: a0"
        ),
    }.items():
        yield Row("grammar_bounds.require_plain", shape, make, grammar_bounds.require_plain, most // 12)
    for shape, schema in SCHEMAS.items():
        yield Row(
            "grammar_bounds.require_schema_bounds",
            shape,
            schema,
            grammar_bounds.require_schema_bounds,
            1 << 14,
        )
        yield Row("fields.schema_form", shape, schema, _schema_form, 1 << 13)
        yield Row("closed_schema.close_objects", shape, schema, close_objects, 1 << 13)


def _schema_form(schema: Any) -> Grammar:
    from argosy.serve.answer.fields import schema_form

    return schema_form(schema)


# ── routes, guards ──────────────────────────────────────────────────────────────────────────────────────────────────


def route_rows() -> Iterator[Row]:
    def split(pieces: list[bytes]) -> object:
        splitter = events.Splitter(SSE, lambda num_bytes: None)
        return [event for piece in pieces for event in splitter.feed(piece)]

    for pattern in ("|\n|", "|data: {}\n\n|", "|a|", "|\r\n|", "|: \n|"):
        yield Row(
            "route: events, byte by byte",
            ascii(pattern)[1:-1],
            lambda n, pattern=pattern: [bytes([b]) for b in run(pattern, n).encode()],
            split,
            1 << 18,
        )
        yield Row(
            "route: events",
            ascii(pattern)[1:-1],
            lambda n, pattern=pattern: [run(pattern, n).encode()],
            split,
            1 << 20,
        )
        yield Row(
            "route: one event",
            ascii(pattern)[1:-1],
            lambda n, pattern=pattern: run(pattern, n).encode(),
            _quiet(events.parse_event),
            1 << 20,
        )

    def follow(data: Any) -> object:
        transcript = events.Transcript(SSE)
        made = [transcript.take(b"", events.Event(None, one)) for one in data]
        transcript.begin_replay()
        return made

    yield Row(
        "route: transcript",
        "chunks",
        lambda n: [{"id": "a", "choices": [{"index": 0, "delta": {"content": "x"}}]} for at in range(n)],
        follow,
        1 << 14,
    )
    yield Row(
        "route: transcript",
        "ids",
        lambda n: [{"id": f"i{at}", "item_id": f"j{at}"} for at in range(n)],
        follow,
        1 << 13,
    )
    yield Row(
        "route: transcript",
        "an event of many ids",
        lambda n: [{"a": [{"id": f"i{at}"} for at in range(n)]}],
        follow,
        1 << 13,
    )
    yield Row(
        "route: transcript",
        "choices",
        lambda n: [{"choices": [{"index": at, "delta": {"content": "x"}}]} for at in range(n)],
        follow,
        1 << 13,
    )
    yield Row(
        "route: transcript",
        "texts of one event",
        lambda n: [{"a": [{"text": "x"} for at in range(n)]}],
        follow,
        1 << 13,
    )

    def read(route: str) -> Read:
        def reading(data: bytes) -> object:
            made = asked.Asked(route=route, method="POST", path=route, headers=(), body=data)
            asked.read_asked(made, Pool(1 << 30).share(), lambda num_bytes: None, prefixes.Prefixes(), b"")
            return made

        return reading

    for name, make in {
        "messages": _CHATS["messages"],
        "small parts": _CHATS["small parts"],
        "tools": _CHATS["tools"],
        "metadata": _CHATS["metadata"],
    }.items():
        yield Row(
            "route.asked",
            name,
            lambda n, make=make: json.dumps(make(n)).encode(),
            read("/v1/chat/completions"),
            1 << 14,
        )
    for name in ("items", "references"):
        yield Row(
            "route.asked",
            name,
            lambda n, name=name: json.dumps(_RESPONSES[name](n)).encode(),
            read("/v1/responses"),
            1 << 14,
        )
    yield from jsons("route.asked", read("/v1/chat/completions"), encode=True, most=1 << 15)


def _quiet(read: Read) -> Read:
    def reading(given: Any) -> object:
        try:
            return read(given)
        except Exception as error:
            raise ValueError(str(error)) from None

    return reading


def library_rows() -> Iterator[Row]:
    from argosy.library import modelfile

    def read(text: str) -> object:
        return modelfile.read(text.encode(errors="surrogatepass"), Path("/nowhere"))

    instructions = (
        'FROM x\nSYSTEM """|a |', 'FROM x\nSYSTEM """|"\n|', 'FROM x\nSYSTEM "|\n |', "FROM x|\nPARAMETER stop x|",
        "FROM x|\nMESSAGE user x|", "FROM x|\nSYSTEM y|", "|#\n|FROM x", "FROM |x/|", "FROM x\nPARAMETER seed |9|",
        "FROM x\nPARAMETER |a|", "FROM x|\r\n|", "FROM x|\nLICENSE z|",
    )  # fmt: skip
    yield from texts("modelfile", read, most=1 << 16, more=instructions)


def guard_rows() -> Iterator[Row]:
    from argosy.cluster import copied, member
    from argosy.guard import chain, guard_models, keys, stops, view
    from argosy.guard.pii import spelling
    from argosy.guard.word_list import WordList

    words = WordList("blue moon\nsecret\none two three four\n", "f", category="x")
    scripts = ("|坏|", "|काम |", "|ผู้|", "|م\u064b|", "blue| |moon", "blue|.|moon", "blue|x|moon")
    yield from texts("guard: word list", words.judge, most=1 << 17, more=scripts)

    def read(text: str) -> object:
        stream = words.stream()
        return [stream.push(letter) for letter in text], stream.finish()

    yield from texts("guard: word list, letter by letter", read, most=1 << 15, more=scripts)

    yield from texts(
        "guard: a word list's file",
        lambda text: WordList(text, "f", category="x"),
        most=1 << 18,
        more=("|sha256:|", "|sha256:" + "a" * 64 + "\n|"),
    )
    yield from texts("guard: plain spelling", spelling.plain, most=1 << 18)
    for name, form in guard_models.GUARD_FORMS.items():
        yield from texts(
            f"guard: answer of {name}",
            _quiet(form.read),
            most=1 << 16,
            more=(
                "unsafe\n|S1,|",
                "Safety: Unsafe\nCategories: a| |b",
                "|Categories: a\n|",
                "|Safety: Safe |",
                "{|{|}",
                "|{}|",
            ),
        )
    yield from texts(
        "guard: a line of the audit",
        _quiet(lambda text: chain.open_line(text.encode(), None)),
        most=64 << 10,
        more=('{"seq":|,"mac":"|', '{"seq":| |'),
    )
    yield from texts("guard: an anchor", _quiet(chain.Head.parse), more=("|1|:",))
    for name, make in {
        "keys": lambda n: [{"id": f"i{at}", "name": f"n{at}", "sha256": f"{at:064x}"} for at in range(n)],
        "one name": lambda n: [{"id": f"i{at}", "name": "n", "sha256": f"{at:064x}"} for at in range(n)],
        "one digest": lambda n: [{"id": f"i{at}", "name": f"n{at}", "sha256": "0" * 64} for at in range(n)],
    }.items():
        yield Row(
            "guard: a keys file",
            name,
            lambda n, make=make: json.dumps({"version": 1, "keys": make(n)}).encode(),
            keys._keys_in,
            1 << 12,
        )

    for name, make in {
        "names": lambda n: {"version": 1, "model": [], "key": [], "user": [f"u{at}" for at in range(n)]},
        "long names": lambda n: {"version": 1, "model": [], "key": [], "user": ["u" * 500] * n},
    }.items():
        yield Row(
            "guard: a file of stops",
            name,
            lambda n, make=make: json.dumps(make(n)).encode(),
            stops._names_in,
            1 << 13,
        )
    yield from jsons("guard: a file of stops", stops._names_in, encode=True)
    yield from jsons(
        "guard: a moderator's answer", _quiet(check_over_http._verdict), encode=True, most=1 << 15
    )
    yield Row(
        "guard: a moderator's answer",
        "scores",
        lambda n: json.dumps(
            {"results": [{"flagged": False, "category_scores": {f"c{at}": 0.5 for at in range(n)}}]}
        ).encode(),
        _quiet(check_over_http._verdict),
        1 << 12,
    )
    yield from jsons("cluster: a worker's numbers", member._numbers, encode=True)
    yield from jsons("cluster: a list of files", copied._parse_list, encode=True)
    for name, file in {"names": '["f#",1,0]', "one name": '["f",1,0]'}.items():
        yield Row(
            "cluster: a list of files",
            name,
            lambda n, file=file: _numbered('{"opens":"","shards":1,"files":[', file, "]}")(n).encode(),
            copied._parse_list,
            1 << 13,
        )

    yield from jsons("guard: arguments", lambda text: view.call_visited(text, view.Collector()), most=1 << 15)

    from argosy.guard.pii.finder import Finder
    from argosy.guard.pii.placeholders import Placeholders, Restorer
    from argosy.guard.pii.stream import FindingStream

    finder = Finder(regions=("US", "DE"))
    more = (
        "|a@b.co |", "|+49 30 1234567 |", "|4111 1111 1111 1111 |", "|<EMAIL_1>|", "|-----BEGIN PRIVATE KEY-----|", "|key=|", "|(at)|",
        "|1-2-3 |", "|1 2 3 4 5 6 7 |", "|DE89 3704 0044 0532 0130 00 |", "|::1 |", "|1.1.1.1 |", "|sk-a|", "|eyJ|", "|a b@|", "|00:|",
        "|password |", "|api_key = |", "|a at |", "|dot |",
    )  # fmt: skip
    yield from texts(
        "guard: personal data", lambda text: Placeholders(finder).redact(text), most=1 << 17, more=more
    )

    def found(text: str) -> object:
        made = FindingStream(finder)
        return [made.push(letter) for letter in text], made.finish()

    yield from texts("guard: personal data, letter by letter", found, most=1 << 12, more=more)

    def restored(text: str) -> object:
        made = Restorer(Placeholders(finder))
        return [made.push(letter) for letter in text], made.finish()

    yield from texts(
        "guard: placeholders, letter by letter",
        restored,
        most=1 << 15,
        more=("|<A|", "|<EMAIL_|", "|<EMAIL_1|"),
    )
    yield from texts(
        "guard: reserved placeholders",
        lambda text: Placeholders(finder).reserve([text]),
        more=("|<EMAIL_1>|", "<|A|", "|<A_|"),
    )
    yield Row(
        "guard: placeholders of one text",
        "literal ones before them",
        lambda n: (" ".join(f"<EMAIL_{at}>" for at in range(n)), " ".join(f"a{at}@b.co" for at in range(n))),
        lambda given: _redacted(finder, given),
        1 << 12,
    )


def _redacted(finder: Any, given: tuple[str, str]) -> object:
    from argosy.guard.pii.placeholders import Placeholders

    made = Placeholders(finder)
    made.reserve([given[0]])
    return made.redact(given[1])


# ── files ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _of_file(folder: Path, name: str, read: Callable[[Path], object]) -> Read:
    """A reader of a file, given its content; the file's name is always the same."""
    path = folder / name

    def reading(content: bytes) -> object:
        path.write_bytes(content)
        path.chmod(0o600)
        return read(path)

    return reading


def _safetensors(header: str) -> bytes:
    return len(header.encode()).to_bytes(8, "little") + header.encode()


def _gguf(num_tensors: int, num_entries: int, rest: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_entries) + rest


def _gguf_text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _gguf_array(key: str, items: list[str]) -> bytes:
    return _gguf_text(key) + struct.pack("<IIQ", 9, 8, len(items)) + b"".join(map(_gguf_text, items))


def _vocabulary(n: int, merge: Callable[[int], str]) -> bytes:
    from argosy.checkpoint.vocabulary.byte_level import spelling_of_bytes

    tokens = [*spelling_of_bytes(), *(f"t{at}" for at in range(n))]
    entries = [
        _gguf_text("tokenizer.ggml.model") + struct.pack("<I", 8) + _gguf_text("gpt2"),
        _gguf_text("tokenizer.ggml.pre") + struct.pack("<I", 8) + _gguf_text("gpt-2"),
        _gguf_array("tokenizer.ggml.tokens", tokens),
        _gguf_array("tokenizer.ggml.merges", [merge(at) for at in range(n)]),
    ]
    return _gguf(0, len(entries), b"".join(entries))


def file_rows(folder: Path) -> Iterator[Row]:
    from argosy.checkpoint import (
        gguf,
        gguf_names,
        hub,
        manifest,
        pooling,
        safetensors,
        sampling,
        untrusted_file,
    )
    from argosy.checkpoint.vocabulary import gguf_tokenizer, tekken, tiktoken_model
    from argosy.cli.commands import chat_files
    from argosy.cli.shared import edit_file, output
    from argosy.evaluate import questions, reports
    from argosy.experts.hit_rate import WorkingSet
    from argosy.guard.policy import read_policies
    from argosy.library import kept, places, search
    from argosy.media import worker
    from argosy.model.reading.quantization import read_quantization
    from argosy.observe import texts as labelled

    def rows_of(
        reader: str,
        name: str,
        read: Callable[[Path], object],
        shapes: dict[str, Callable[[int], Any]],
        most: int = 1 << 16,
    ) -> Iterator[Row]:
        reading = _quiet(_of_file(folder, name, read))
        for shape, make in shapes.items():
            yield Row(
                reader,
                shape,
                lambda n, make=make: (
                    made.encode("utf-8", "replace") if isinstance(made := make(n), str) else made
                ),
                reading,
                most,
            )

    tensor = '"t#":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    yield from rows_of("safetensors: header", "model.safetensors", safetensors.read_header, {
        "tensors": lambda n: _safetensors(_numbered("{", tensor, "}")(n)),
        "one name": lambda n: _safetensors(_numbered("{", tensor.replace("#", ""), "}")(n)),
        "long shapes": lambda n: _safetensors('{"t":{"dtype":"U8","shape":[' + "1," * n + '0],"data_offsets":[0,0]}}'),
        "a long name": lambda n: _safetensors('{"' + "layers.1." * n + '":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'),
        "metadata": lambda n: _safetensors(_numbered('{"__metadata__":{', '"m#":"x"', "}}")(n)),
        "spaces": lambda n: _safetensors("{" + " " * n + "}"),
        "nesting": lambda n: _safetensors('{"a":' * n),
    })  # fmt: skip
    yield from rows_of("safetensors: index", safetensors.INDEX_FILE, lambda path: safetensors.open_tensors(path.parent), {
        "tensors": _numbered('{"weight_map":{', '"t#":"a.safetensors"', "}}"),
        "shards": _numbered('{"weight_map":{', '"t#":"a#.safetensors"', "}}"),
    })  # fmt: skip
    tensor_of = lambda at: _gguf_text(f"t{at}") + struct.pack("<IQIQ", 1, 32, 0, 128 * at)  # noqa: E731
    yield from rows_of("gguf: header", "m.gguf", gguf.read_gguf, {
        "keys": lambda n: _gguf(0, n, b"".join(_gguf_text(f"k{at}") + struct.pack("<II", 4, at) for at in range(n))),
        "one key": lambda n: _gguf(0, n, (_gguf_text("k") + struct.pack("<II", 4, 1)) * n),
        "an array of texts": lambda n: _gguf(0, 1, _gguf_array("a", ["x"] * n)),
        "arrays": lambda n: _gguf(0, n, b"".join(_gguf_text(f"k{at}") + struct.pack("<IIQ", 9, 4, 0) for at in range(n))),
        "tensors": lambda n: _gguf(n, 0, b"".join(map(tensor_of, range(n)))) + bytes(32 + 128 * n),
        "tensors of one name": lambda n: _gguf(n, 0, tensor_of(0) * n) + bytes(32 + 128 * n),
        "a long text": lambda n: _gguf(0, 1, _gguf_text("k") + struct.pack("<I", 8) + _gguf_text("x" * n)),
        "a count beyond its end": lambda n: _gguf(1 << 40, 1 << 40, _gguf_text("k") * n),
    }, 1 << 14)  # fmt: skip
    yield from rows_of("gguf: tokenizer", "v.gguf", lambda path: gguf_tokenizer.read_tokenizer(gguf.read_gguf(path)), {
        "tokens and merges": lambda n: _vocabulary(n, lambda at: f"t {at % 10}"),
        "merges of one pair": lambda n: _vocabulary(n, lambda at: "t 1"),
    }, 1 << 13)  # fmt: skip
    for stem in ("|Q1_A|", "a|-Q4_K|!", "|_Q1|x", "|IQ2_|", "|-|", "|00001-of-00002-|"):
        yield Row(
            "gguf: a file's name",
            stem,
            functools.partial(run, stem),
            lambda text: (gguf_names.format_in_name(text), gguf_names.PART_NAME.fullmatch(text)),
        )
    yield from rows_of("tiktoken.model", "tiktoken.model", tiktoken_model._read_ranks, {
        "ranks": lambda n: b"".join(base64.b64encode(b"%d" % (1000 + at)) + b" %d\n" % at for at in range(n)),
        "one rank": lambda n: b"YQ== 1\n" * n, "one token": lambda n: b"".join(b"YQ== %d\n" % at for at in range(n)),
        "empty lines": lambda n: b"\n" * n, "a long line": lambda n: b"a" * n,
    })  # fmt: skip

    def tekken_file(tokens, special):
        vocab = [bytes([byte]) for byte in range(256)] + tokens
        config = {
            "pattern": ".",
            "default_vocab_size": len(vocab) + len(special),
            "default_num_special_tokens": len(special),
        }
        listed = [{"rank": at, "token_bytes": base64.b64encode(one).decode()} for at, one in enumerate(vocab)]
        named = [{"rank": at, "token_str": one} for at, one in enumerate(special)]
        return json.dumps({"config": config, "vocab": listed, "special_tokens": named}).encode()

    yield from rows_of("tekken.json", "tekken.json", tekken.read_tekken, {
        "tokens": lambda n: tekken_file([b"%d" % (1000 + at) for at in range(n)], []),
        "special tokens": lambda n: tekken_file([], [f"<{at}>" for at in range(n)]),
        "one special token": lambda n: tekken_file([], [f"<{at}>" for at in range(n)] + ["<0>"]),
    })  # fmt: skip
    yield from rows_of(
        "config.json",
        "config.json",
        untrusted_file.read_object,
        dict(_JSONS.items()),
    )

    def excluded(n):
        return {
            "quantization_config": {
                "quant_method": "mxfp4",
                "modules_to_not_convert": [f"model.layers.{at}.x" for at in range(n)],
            }
        }

    yield Row(
        "quantization: excluded modules",
        "names",
        excluded,
        _quiet(read_quantization),
        1 << 12,
    )

    def own_settings(n):
        own = {f"model.layers.{at}.x": {"bits": 2 + at % 5, "group_size": 64} for at in range(n)}
        return {"quantization": {"bits": 4, "group_size": 64} | own}

    yield Row(
        "quantization: MLX's settings of modules",
        "paths",
        own_settings,
        _quiet(read_quantization),
        1 << 12,
    )

    def layers(n):
        return {
            "quantization_config": {
                "quant_method": "modelopt",
                "quant_algo": "MIXED_PRECISION",
                "quantized_layers": {f"model.layers.{at}.x": {"quant_algo": "FP8"} for at in range(n)},
            }
        }

    def globs(n):
        return {
            "quantization_config": {
                "quant_method": "modelopt",
                "quant_algo": "FP8",
                "ignore": [f"model.layers.{at}*" for at in range(n)],
            }
        }

    def scheme(raw):
        found = read_quantization(raw)
        assert found is not None
        for at in range(64):
            found.scheme_of(f"model.layers.{at}.mlp.experts.{at}.up_proj")

    yield Row("quantization: schemes of modules", "names", layers, _quiet(scheme), 1 << 12)
    yield Row("quantization: schemes of modules", "globs", globs, _quiet(scheme), 1 << 12)
    for pattern in ("|[|", "|\\|", "|(|", "|a|", "|.*|", "|[]|", "[|a|", "|(?:|", "|^|"):
        made = functools.partial(run, "re:" + pattern)
        yield Row(
            "quantization: an expression",
            pattern,
            lambda n, made=made: {
                "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": [made(n)]}
            },
            _quiet(read_quantization),
            1 << 14,
        )
    yield from rows_of(
        "a pack's manifest",
        manifest.MANIFEST_FILE,
        lambda path: manifest.read_manifest(path.parent),
        {name: make for name, make in _JSONS.items() if "key" in name or "nested" in name},
    )
    yield from rows_of(
        "generation_config.json",
        "generation_config.json",
        _quiet(
            lambda path: sampling.declared_sampling(
                SimpleNamespace(path=path.parent, header=None, ollama_params={})
            )
        ),
        dict(_JSONS.items()),
    )
    yield from rows_of(
        "modules.json",
        "modules.json",
        pooling._modules,
        {
            "modules": _numbered(
                "[", '{"idx":#,"name":"#","path":"","type":"sentence_transformers.models.Transformer"}', "]"
            )
        },
    )
    yield from rows_of("Ollama's manifest", "latest", places.manifest_digests, {
        "layers": _numbered('{"layers":[', '{"mediaType":"a","digest":"sha256:' + "0" * 64 + '","size":1}', "]}"),
    }, 1 << 10)  # fmt: skip
    yield from rows_of("what was pulled", "kept.json", lambda path: kept._parse(path.read_bytes(), path), {
        "aliases": _numbered('{"version":1,"aliases":{', '"a#":"b"', '},"pulled":[],"used":{}}'), **{name: make for name, make in _JSONS.items() if "key" in name},
    }, 1 << 13)  # fmt: skip
    yield from rows_of("guard: a policy file", "policy.toml", read_policies, {
        "policies": _numbered("", "[policies.p#]\npii-input = 'block'\n", "", ""),
        "checks": _numbered("", "[checks.c#]\nurl = 'http://127.0.0.1:9/'\n", "", ""),
        "keys": lambda n: "default = 'a'\n[policies.a]\n[keys]\n" + "".join(f"k{at} = 'a'\n" for at in range(n)),
        "blocked users": _numbered("blocked-users = [", "'u#'", "]"),
        "tables inline": lambda n: "a = " + "{a = " * n + "1" + "}" * n,
        "an open text": lambda n: 'a = """' + "a" * n,
        "empty lines": lambda n: "\n" * n,
    }, 1 << 13)  # fmt: skip
    yield from rows_of("evaluate: questions", "q.jsonl", lambda path: questions.read_questions(path, most=1 << 20), {
        "lines": _numbered("", '{"context":"c","question":"q","ans0":"a","ans1":"b","ans2":"c","label":0}', "", "\n"),
        "empty lines": lambda n: "\n" * n, "a long line": lambda n: "a" * n,
    })  # fmt: skip
    yield from rows_of(
        "evaluate: a report",
        "r.json",
        reports.read_report,
        {name: make for name, make in _JSONS.items() if "key" in name or "nested" in name},
    )
    yield from rows_of("observe: texts", "t.jsonl", lambda path: labelled.read_texts([path], most_bytes=1 << 24), {
        "lines": _numbered("", '{"domain":"a","text":"x"}', "", "\n"), "empty lines": lambda n: "\n" * n, "domains": _numbered("", '{"domain":"d#","text":"x"}', "", "\n"),
    })  # fmt: skip
    yield from rows_of(
        "observe: a working set",
        "w.json",
        WorkingSet.read,
        {name: make for name, make in _JSONS.items() if "key" in name or "nested" in name},
    )
    history = lambda n: json.dumps({"version": 1, "messages": [{"role": "user", "content": "x"}] * n})  # noqa: E731
    yield from rows_of(
        "a saved chat",
        "chat.json",
        chat_files.load,
        {"messages": history, **{name: make for name, make in _JSONS.items() if "key" in name}},
        1 << 13,
    )
    yield from texts(
        "settings in JSON",
        _quiet(lambda text: edit_file.merge_json(text, {"a": 1})),
        most=1 << 14,
        more=("{|\n |", '{\n|  |"a":1}'),
    )
    yield from texts(
        "settings of an environment",
        _quiet(lambda text: edit_file.merge_environment(text, {"A": "b"})),
        most=1 << 11,
        more=("|A=b\n|", "A=|'|", "|A=\n|"),
    )

    def fenced(text: str) -> object:
        code = output.FencedCode()
        return [code.push(letter) for letter in text], output.FencedCode().push(text)

    yield from texts(
        "fences of an answer", fenced, most=1 << 15, more=("|~|", "|~|x`", "|```\n|", "|   |", "|`` |")
    )
    chunk = lambda n: b"RIFF\0\0\0\0WAVE" + b"LIST\0\0\0\0" * n  # noqa: E731
    yield Row("media: WAV", "chunks", chunk, _quiet(worker._check_wav), 1 << 18)
    yield Row(
        "media: WAV",
        "no format",
        lambda n: b"RIFF\0\0\0\0WAVE" + b"fmt" * n,
        _quiet(lambda data: worker._is_eight_bits("WAV", data)),
        1 << 18,
    )

    class Listed(hub.Hub):
        def __init__(self, answer: bytes) -> None:
            self.source = hub.Source("https://hub.example", "one/model")
            self.answer = answer

        def _fetch(self, url: str, start: int | None, most_bytes: int) -> hub.Range:
            return hub.Range(self.answer, len(self.answer))

    read_hits = _quiet(
        lambda answer: [
            search._hit(entry) for entry in Listed(answer).search([], 1 << 22) if isinstance(entry, dict)
        ]
    )
    yield from jsons("hub: list of models", read_hits, encode=True)
    for shape, tags in (("models", ["gguf"] * 4), ("licences", ["license:" + "x" * 99] * 40)):
        yield Row(
            "hub: list of models",
            shape,
            lambda n, tags=tags: json.dumps(
                [{"id": f"a/{at}", "tags": tags, "gguf": {"total": at}} for at in range(n)]
            ).encode(),
            read_hits,
            5000,
        )
    read_list = _quiet(lambda answer: Listed(answer).list_files())
    yield from jsons("hub: list of files", read_list, encode=True)
    for shape, name, licence in (
        ("same name", lambda at: "a.gguf", "mit"),
        ("names", lambda at: f"{at}.gguf", "mit"),
        ("folders", lambda at: "a/" * (at % 100) + str(at), "mit"),
        ("dots", lambda at: "." * (at % 100 + 3), "mit"),
        ("spaces", lambda at: " " * (at % 100), " " * 100),
    ):
        yield Row(
            "hub: list of files",
            shape,
            lambda n, name=name, licence=licence: json.dumps(
                {
                    "sha": "0" * 40,
                    "siblings": [{"rfilename": name(at), "size": at} for at in range(n)],
                    "cardData": {"license": [licence] * n},
                    "tags": [f"license:{licence}"] * n,
                }
            ).encode(),
            read_list,
            5000,
        )
    limits = {"side": 4096, "pixels": 1 << 20, "decode_bytes": 1 << 26}
    for shape, make in {
        "PNG of chunks": lambda n: _png(*[(b"tEXt", b"a\0b")] * n),
        "PNG of empty chunks": lambda n: _png(*[(b"abCd", b"")] * n),
        "PNG of texts": lambda n: _png(*((b"tEXt", b"k%d\0b" % at) for at in range(n))),
        "GIF of extensions": lambda n: b"GIF89a\1\0\1\0\0\0\0" + b"!\xfe\1a\0" * n,
        "GIF of a long comment": lambda n: b"GIF89a\1\0\1\0\0\0\0!\xfe" + b"\1a" * n,
        "JPEG of segments": lambda n: b"\xff\xd8" + b"\xff\xe1\0\4ab" * n,
        "JPEG of comments": lambda n: b"\xff\xd8" + b"\xff\xfe\0\4ab" * n,
        "JPEG of profiles": lambda n: (
            b"\xff\xd8" + b"".join(b"\xff\xe2\0\x12ICC_PROFILE\0%c%c" % (at % 256, 255) for at in range(n))
        ),
        "JPEG of fill bytes": lambda n: b"\xff\xd8" + b"\xff" * n,
        "zeros": lambda n: b"\xff\xd8" + bytes(n),
    }.items():
        yield Row(
            "media: a picture's header",
            shape,
            make,
            _quiet(lambda data: worker.Picture(data, limits)),
            1 << 16,
        )


def _png(*chunks: tuple[bytes, bytes]) -> bytes:
    whole = [(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)), *chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in whole
    )


def rows(folder: Path) -> Iterator[Row]:
    """All rows; files are written to `folder`."""
    yield from file_rows(folder)
    for some in (
        json_rows,
        body_rows,
        connection_rows,
        prompt_rows,
        answer_rows,
        replay_rows,
        grammar_rows,
        route_rows,
        guard_rows,
        library_rows,
    ):
        yield from some()
