"""Objects of requested schemas have only the members that the schema names, wherever they stand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import tokenizers

from argosy import Engine, SamplingParams
from argosy.checkpoint.manifest import PACK_VERSION
from argosy.config import Grammar
from argosy.engine.grammar.closed_schema import close_objects
from argosy.engine.grammar.constraint import GrammarCompiler
from argosy.errors import GrammarError
from argosy.prompt.tokenizer import Tokenizer
from argosy.user_directories import cache_directory
from tests.engine.library_schemas import LIBRARY_SCHEMAS
from tests.helpers.examples import few_of
from tests.prompt.tokenizers_for_tests import byte_level_json

NAMED = {"properties": {"name": {"type": "string"}}, "required": ["name"], "type": "object"}
AGED = {"properties": {"age": {"type": "integer"}}, "required": ["age"], "type": "object"}
NODE = {"properties": {"next": {"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}]}}, "required": ["next"]}

A, B, ANY = '{"name":"x"}', '{"age":1}', '{"name":"x","more":1}'
CASES: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "an object": (NAMED, [A], [ANY]),
    "no type": ({"properties": NAMED["properties"]}, [A, "{}", "3"], [ANY]),
    "an integer": ({"type": ["integer", "null"]}, ["-8999999999999999999", "0", "null"], ["1" + "0" * 19]),
    "an integer with a limit": ({"type": "integer", "minimum": 5}, ["1" + "0" * 19], ["1"]),
    "nested": ({"properties": {"of": NAMED}, "required": ["of"]}, [f'{{"of":{A}}}'], [f'{{"of":{ANY}}}']),
    "items": ({"type": "array", "items": NAMED}, [f"[{A}]"], [f"[{ANY}]"]),
    "prefix items": ({"type": "array", "prefixItems": [NAMED]}, [f"[{A}]"], [f"[{ANY}]"]),
    "values": ({"type": "object", "additionalProperties": NAMED}, [f'{{"k":{A}}}'], [f'{{"k":{ANY}}}']),
    "a definition": ({"$ref": "#/$defs/N", "$defs": {"N": NAMED}}, [A], [ANY]),
    "a recursive definition": (
        {"$ref": "#/$defs/Node", "$defs": {"Node": NODE}},
        ['{"next":null}', '{"next":{"next":null}}'],
        ['{"next":{"next":null,"more":1}}'],
    ),
    "one of several": ({"anyOf": [NAMED, AGED]}, [A, B], [ANY, '{"name":"x","age":1}']),
    "all of one": ({"allOf": [{"$ref": "#/$defs/N"}], "description": "x", "$defs": {"N": NAMED}}, [A], [ANY]),
    "all of two": ({"allOf": [NAMED, AGED]}, ['{"name":"x","age":1}'], [A, '{"name":"x","age":1,"more":1}']),
    "inherited": (
        {
            "allOf": [{"$ref": "#/$defs/N"}, {"properties": {"age": {"type": "integer"}, "n": {"$ref": "#/$defs/N"}}}],
            "$defs": {"N": NAMED},
        },
        ['{"name":"x","age":1}', f'{{"name":"x","age":1,"n":{A}}}'],
        [ANY, f'{{"name":"x","age":1,"n":{ANY}}}'],
    ),
    "a recursive definition that is inherited": (
        {"allOf": [{"$ref": "#/$defs/Node"}, AGED], "$defs": {"Node": NODE}},
        ['{"next":{"next":null},"age":1}'],
        ['{"next":{"next":null,"more":1},"age":1}', '{"next":null,"age":1,"more":1}'],
    ),
    "own members and a choice": (
        {**NAMED, "anyOf": [AGED, {"properties": {"born": {"type": "integer"}}, "required": ["born"]}]},
        ['{"name":"x","age":1}', '{"name":"x","born":1}'],
        ['{"name":"x","age":1,"more":1}'],
    ),
    "a choice of required members": (
        {
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "type": "object",
            "anyOf": [{"required": ["a"]}, {"required": ["b"]}],
        },
        ['{"a":1}', '{"b":1}', '{"a":1,"b":1}'],
        ['{"a":1,"c":1}'],
    ),
    "a required member without a schema": ({**NAMED, "required": ["name", "x"]}, ['{"name":"x","x":[1]}'], [A]),
    "unevaluatedProperties": (
        {"allOf": [NAMED, AGED], "unevaluatedProperties": False},
        ['{"name":"x","age":1}'],
        ['{"name":"x","age":1,"more":1}'],
    ),
    "additionalProperties": ({**NAMED, "additionalProperties": True}, [A, ANY], []),
    "additionalProperties beside a choice": ({"anyOf": [NAMED, AGED], "additionalProperties": True}, [A, ANY], []),
    "additionalProperties of a part": (
        {"allOf": [{**NAMED, "additionalProperties": True}, AGED]}, ['{"name":"x","age":1,"more":1}'], []
    ),
    "patternProperties": (
        {**NAMED, "patternProperties": {"^m": {"type": "integer"}}}, [ANY], ['{"name":"x","more":"x"}']
    ),
    "a value": ({**NAMED, "const": {"name": "x", "more": 1}}, [ANY], [A]),
    "values that are listed": ({**NAMED, "enum": [{"name": "x"}, {"name": "x", "more": 1}]}, [A, ANY], [B]),
    "a value of a definition": (
        {"$ref": "#/$defs/N", "enum": [{"name": "x", "more": 1}], "$defs": {"N": NAMED}}, [ANY], [A]
    ),
    "no members named": ({"type": "object"}, ["{}", A, ANY], []),
    "more members than are named": ({**NAMED, "minProperties": 2}, [ANY], [A]),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer.from_str(byte_level_json()), config={"eos_token": "<|im_end|>"})


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, vocab_size=640, end_ids=tokenizer.eos_ids)


def takes(compiler: GrammarCompiler, tokenizer: Tokenizer, schema: dict[str, Any], text: str) -> bool:
    constraint = compiler.compile(Grammar(kind="json_schema", text=json.dumps(schema)))
    for token_id in tokenizer.encode(text):
        allowed = constraint.allowed()
        if allowed is None or not allowed[token_id]:
            return False
        constraint.accept(token_id)
    allowed = constraint.allowed()
    return constraint.is_finished or bool(allowed is not None and allowed[min(tokenizer.eos_ids)])


@pytest.mark.parametrize("what", CASES)
def test_an_object_has_the_members_that_its_schema_names_unless_it_says_more(
    what: str, compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    schema, taken, refused = CASES[what]
    assert [text for text in taken if not takes(compiler, tokenizer, schema, text)] == []
    assert [text for text in refused if takes(compiler, tokenizer, schema, text)] == []


@pytest.mark.parametrize("what", CASES)
def test_a_closed_schema_stays_as_it_is_and_the_given_one_is_not_changed(what: str) -> None:
    schema = CASES[what][0]
    before = json.dumps(schema)
    closed = close_objects(schema)
    assert json.dumps(schema) == before
    assert close_objects(closed) == closed


def test_the_names_of_a_long_part_are_written_only_so_often() -> None:
    long = {"properties": {f"member-{number}": True for number in range(1000)}}
    parts = {f"p{number}": {"allOf": [{"$ref": "#/$defs/long"}, NAMED]} for number in range(1000)}
    with pytest.raises(GrammarError, match="the names in the parts"):
        close_objects({"properties": parts, "$defs": {"long": long}})


def test_a_long_chain_of_parts_is_closed_without_recursion() -> None:
    definitions: dict[str, Any] = {
        f"d{number}": {"allOf": [{"$ref": f"#/$defs/d{number + 1}"}, {"properties": {f"m{number}": True}}]}
        for number in range(400)
    }
    definitions["d400"] = NAMED
    closed: Any = close_objects({"$ref": "#/$defs/d0", "$defs": definitions})
    assert len(closed["$defs"]["d0"]["properties"]) == 401


@pytest.mark.parametrize("library", LIBRARY_SCHEMAS)
def test_every_object_of_a_librarys_example_is_closed(library: str) -> None:
    waiting: list[Any] = [close_objects(LIBRARY_SCHEMAS[library][1])]
    num_objects = 0
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            if isinstance(part.get("properties"), dict):
                num_objects += 1
                assert part["additionalProperties"] is False
            waiting += part.values()
        elif isinstance(part, list):
            waiting += part
    assert num_objects > 0


@pytest.fixture(scope="module")
def demo() -> Iterator[Engine]:
    built = sorted(cache_directory().glob(f"demo-*-{PACK_VERSION}-q8"))
    if not built:
        pytest.skip("the demo model is not built here; `make demo` builds it")
    with Engine.open(built[-1], context=4096, media=False, grammars=True) as engine:
        yield engine


@pytest.mark.parametrize("library", few_of(LIBRARY_SCHEMAS, ("vllm", "instructor")))
def test_the_structured_output_example_of_a_library_ends_by_itself(demo: Engine, library: str) -> None:
    question, schema = LIBRARY_SCHEMAS[library]
    grammar = Grammar(kind="json_schema", text=json.dumps(schema))
    result = demo.generate(question, SamplingParams(max_tokens=1024, grammar=grammar))
    assert result.finish_reason == "stop", result.text
    assert set(schema["required"]) <= set(json.loads(result.text)) <= set(schema["properties"])
