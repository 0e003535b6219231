"""One decoded view of everything in a request that the model can read, and of the tool calls in an answer.

    messages, tools, texts, variables, grammar  ─ Shown.visited ─>  the same, each text of it as a Visitor returns it
    the arguments of a call: JSON, or the beginning of it  ─ call_visited ─>  its strings and names, without escapes

Word lists, the search for personal data and asked checks all see this view. It contains every string that a client
or a model chooses: texts, names, ids, the keys and values of schemas and arguments. It omits only the words that a
specification fixes: roles, types, and the keywords of JSON Schema.

Elsewhere: `screen.py` applies a policy to the view; each dialect builds its messages from its own fields.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from argosy.config import Grammar
from argosy.errors import UsageError
from argosy.strict_json import JsonError, parse_json

_TYPES = frozenset({"string", "number", "integer", "boolean", "object", "array", "null"})
_KEYWORDS = frozenset({
    "$anchor", "$comment", "$defs", "$dynamicAnchor", "$dynamicRef", "$id", "$ref", "$schema", "$vocabulary",
    "additionalItems", "additionalProperties", "allOf", "anyOf", "const", "contains", "contentEncoding",
    "contentMediaType", "contentSchema", "default", "definitions", "dependencies", "dependentRequired",
    "dependentSchemas", "deprecated", "description", "else", "enum", "examples", "exclusiveMaximum",
    "exclusiveMinimum", "format", "if", "items", "maxContains", "maxItems", "maxLength", "maxProperties", "maximum",
    "minContains", "minItems", "minLength", "minProperties", "minimum", "multipleOf", "name", "not", "nullable",
    "oneOf", "parameters", "pattern", "patternProperties", "prefixItems", "properties", "propertyNames", "readOnly",
    "required", "strict", "then", "title", "type", "unevaluatedItems", "unevaluatedProperties", "uniqueItems",
    "writeOnly",
})  # fmt: skip
_AS_IT_IS = ("role", "parsed")  # roles are fixed; `parsed` is a copy that never enters a prompt
# A string in JSON or in a grammar, perhaps cut off.
_STRING = re.compile(r'"([^"\\]*(?:\\.[^"\\]*)*)(?:"|\\?\Z)', re.DOTALL)
_CUT_ESCAPE = re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?\Z")
# In a grammar: a character by number, a character class, or a plain character.
_ESCAPE = re.compile(
    r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|[xuU]\{([0-9a-fA-F]{1,6})\}|([a-zA-Z])|(.))",
    re.DOTALL,
)


class Visitor(Protocol):
    """Takes each text of a view and returns its replacement."""

    def text(self, text: str) -> str: ...

    def lines(self, lines: list[str]) -> list[str]:
        """Adjacent texts, such as the parts of a message."""
        ...


class Collector:
    """Collects the texts of a view, joining adjacent ones."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def text(self, text: str) -> str:
        self.texts.append(text)
        return text

    def lines(self, lines: list[str]) -> list[str]:
        self.texts.append("\n".join(lines))
        return lines


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """Everything that a client hands to the model, or to the grammar of its answer.

    texts: texts outside messages: to continue, to fill in, to embed, to rank.
    variables: the chat template's.
    """

    messages: Sequence[Mapping[str, Any]] = ()
    tools: Sequence[Mapping[str, Any]] = ()
    texts: Sequence[str] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)
    grammar: Grammar | None = None

    def visited(self, visitor: Visitor) -> Shown:
        """A copy in which the visitor has replaced each text.

        Raises:
            UsageError: the visitor changed a grammar, a regular expression or a tool's name, which must not change.
        """
        # Tools first: they come first in a prompt, and their placeholders must not change with the next turn.
        tools = [_tool(tool, visitor) for tool in self.tools]
        return Shown(
            messages=[_message(message, visitor) for message in self.messages],
            tools=tools,
            texts=[visitor.text(text) for text in self.texts],
            variables={
                name: visitor.text(value) if isinstance(value, str) else value
                for name, value in self.variables.items()
            },
            grammar=None if self.grammar is None else _grammar(self.grammar, visitor),
        )

    def all_texts(self) -> list[str]:
        """All texts, in the order of the prompt."""
        collector = Collector()
        self.visited(collector)
        return collector.texts


def call_visited(arguments: str, visitor: Visitor) -> str:
    """The arguments of a call, with strings, names and numbers replaced by the visitor.

    Text that is not valid JSON, because a limit cut it off or a name occurs twice, is visited string by string and
    then as a whole.
    """
    try:
        given = parse_json(arguments)
    except JsonError:
        return visitor.text(_STRING.sub(lambda string: _string(string, visitor), arguments))
    made = _value(given, visitor)
    return arguments if made == given else json.dumps(made, ensure_ascii=False)


def _string(string: re.Match[str], visitor: Visitor) -> str:
    inside = string[1]
    try:
        text = json.loads(f'"{_CUT_ESCAPE.sub("", inside)}"', strict=False)
    except ValueError:
        return string[0]  # the visit of the whole covers it
    made = visitor.text(text)
    return string[0] if made == text else f'"{in_json_text(made)}{string[0][len(inside) + 1 :]}'


def in_json_text(value: str) -> str:
    """Escape `value` for use inside a JSON string."""
    return json.dumps(value, ensure_ascii=False)[1:-1]


def _value(value: Any, visitor: Visitor, known: frozenset[str] = frozenset()) -> Any:
    """Visit a JSON value, except the names in `known`."""
    match value:
        case str():
            return visitor.text(value)
        case bool() | None:
            return value
        case int() | float():
            text = repr(value)
            return value if (made := visitor.text(text)) == text else made
        case list() if value and all(isinstance(one, str) for one in value):
            return visitor.lines(value)
        case list():
            return [_value(one, visitor, known) for one in value]
        case dict():
            return {
                name if name in known else visitor.text(name): one
                if known and name == "type" and _is_type(one)
                else _patterns(one, visitor)
                if known and name in ("pattern", "patternProperties")
                else _value(one, visitor, known)
                for name, one in value.items()
            }
    return value


def _patterns(value: Any, visitor: Visitor) -> Any:
    """Visit a schema's regular expression, or an object whose names are regular expressions."""
    if isinstance(value, dict):
        return {_patterns(name, visitor): _value(one, visitor, _KEYWORDS) for name, one in value.items()}
    return _escaped(value, visitor) if isinstance(value, str) else _value(value, visitor, _KEYWORDS)


def _is_type(value: object) -> bool:
    names = value if isinstance(value, list) else [value]
    return all(isinstance(name, str) and name in _TYPES for name in names)


def _tool(tool: Mapping[str, Any], visitor: Visitor) -> Mapping[str, Any]:
    function = tool["function"]
    name = function.get("name")
    if isinstance(name, str) and visitor.text(name) != name:
        raise UsageError(
            "the policy of this server replaces values in a request, and the name of a tool has one",
            param="tools",
            hint="give the tool another name",
        )
    rest = {key: value for key, value in function.items() if key != "name"}
    return {**tool, "function": {**function, **_value(rest, visitor, _KEYWORDS)}}


def _message(message: Mapping[str, Any], visitor: Visitor) -> Mapping[str, Any]:
    """Visit the texts of a message; pictures and sounds stay."""
    made = dict(message)
    for name, value in message.items():
        if name in _AS_IT_IS:
            continue
        if isinstance(value, str):
            made[name] = visitor.text(value)
        elif name == "content" and isinstance(value, list):
            made[name] = _parts(value, visitor)
        elif name == "tool_calls" and isinstance(value, list):
            made[name] = [_call(call, visitor) for call in value]
    return made


def _parts(parts: Sequence[Any], visitor: Visitor) -> list[Any]:
    at = [
        place for place, part in enumerate(parts)
        if isinstance(part, Mapping) and isinstance(part.get("text"), str)
    ]  # fmt: skip
    made = list(parts)
    for place, text in zip(
        at, visitor.lines([parts[place]["text"] for place in at]) if at else (), strict=True
    ):
        made[place] = {**parts[place], "text": text}
    return made


def _call(call: Any, visitor: Visitor) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        return call
    made = {**call, "function": dict(function)}
    if isinstance(call.get("id"), str):
        made["id"] = visitor.text(call["id"])
    if isinstance(function.get("name"), str):
        made["function"]["name"] = visitor.text(function["name"])
    arguments = function.get("arguments")
    made["function"]["arguments"] = (
        call_visited(arguments, visitor) if isinstance(arguments, str) else _value(arguments, visitor)
    )
    return made


def _grammar(grammar: Grammar, visitor: Visitor) -> Grammar:
    if grammar.kind == "json_object":
        return grammar
    if grammar.kind == "json_schema":
        given = json.loads(grammar.text)
        made = _value(given, visitor, _KEYWORDS)
        return grammar if made == given else replace(grammar, text=json.dumps(made))
    _escaped(grammar.text, visitor)
    return grammar


def _escaped(given: str, visitor: Visitor) -> str:
    """Visit a regular expression or grammar with its escapes undone; it must not change."""
    text = _ESCAPE.sub(_unescaped, given)
    if visitor.text(text) != text:
        raise UsageError(
            "the policy of this server replaces values in a request, and a grammar or a regular expression has one",
            hint="leave it out of the grammar, the regular expression or the choices",
        )
    return given


def _unescaped(escape: re.Match[str]) -> str:
    *numbers, letter, other = escape.groups()
    number = next((int(number, 16) for number in numbers if number is not None), None)
    if number is not None:
        return chr(number) if number <= 0x10FFFF else ""
    return other if letter is None else " "
