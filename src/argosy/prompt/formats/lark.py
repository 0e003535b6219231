"""Builds grammars in llguidance's dialect of Lark from parts.

Marks that are tokens are written as `<[id]>`, others as text. A rule is written only once, even if requested again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence

from argosy.config import LENIENT_SCHEMA, MAX_GRAMMAR_CHARACTERS, Grammar
from argosy.errors import GrammarError
from argosy.prompt.formats.parser import Lexer
from argosy.prompt.json_text import write_json
from argosy.prompt.tools import Tool, types_of

_ANYTHING = r"/(.|\n)*/"
_MEANS_MORE = re.compile(r"[\\.+*?()|\[\]{}^$/]")  # escape no others: `\<` is the start of a word

_ANNOTATIONS = (
    "title",
    "description",
    "examples",
    "default",
    "$comment",
    "deprecated",
    "readOnly",
    "writeOnly",
    LENIENT_SCHEMA,  # callers may not set these
)
_NAMED_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_VALUES = ("enum", "const", "required")


class Lark:
    """A grammar under construction; `text` returns it.

    Args:
        drops_schemas: schemas of non-strict tools may be dropped if they cannot be enforced.
        frees_tools: the grammar marks them, because other schemas have to be enforced.
    """

    def __init__(self, lexer: Lexer, *, drops_schemas: bool = False, frees_tools: bool = False) -> None:
        self._drops_schemas, self._frees_tools = drops_schemas, frees_tools
        self._ids = {str(mark): token_id for token_id, mark in lexer.ids.items()}
        self._pieces = lexer.pieces
        self._rules: dict[str, str] = {}  # body to name, with its options
        self._num_characters = 0  # in all schemas

    def text(self, start: str) -> str:
        return "\n".join([f"start: {start}", *(f"{name}: {body}" for body, name in self._rules.items()), ""])

    def rule(self, body: str, options: str = "") -> str:
        """Return the name of the rule with this body. Equal bodies share a name, so their options must be equal too."""
        if body not in self._rules:
            self._rules[body] = f"r{len(self._rules)}{options}"
        return self._rules[body].removesuffix(options)

    def named(self, name: str, body: str) -> str:
        """Return `name`, for a rule that refers to itself or to rules that follow."""
        self._rules[body] = name
        return name

    def has_token(self, mark: str) -> bool:
        return mark in self._ids

    def mark(self, mark: str) -> str:
        return f"<[{self._ids[mark]}]>" if mark in self._ids else self.literal(mark)

    def literal(self, text: str) -> str:
        for token_id, piece in self._pieces.items():
            if piece in text:
                before, _, behind = text.partition(piece)
                parts = [self.literal(part) if part else "" for part in (before, behind)]
                return f" <[{token_id}]> ".join(parts).strip()
        return json.dumps(text, ensure_ascii=False)

    def space(self) -> str:
        """Optional white space; bounded, because a model with nothing to say writes it endlessly."""
        return self.rule(r"/[ \t\r\n]{1,8}/") + "?"

    def text_until(self, mark: str, before: str = "") -> str:
        """Any text up to and including the first `mark`; `before` stands directly before the mark."""
        if mark in self._ids and not before:
            return f"{self.rule(_ANYTHING)} {self.mark(mark)}"
        for token_id, piece in self._pieces.items():
            if piece in mark:
                first, _, rest = mark.partition(piece)
                text = self.rule(rf"/(.|\n)*{_in_regex(before + first)}/")
                return f"{text} <[{token_id}]> {self.literal(rest)}"
        return self.rule(rf"/(.|\n)*{_in_regex(before + mark)}/", "[lazy]")

    def json(self, schema: object, tool: Tool | None = None) -> str:
        """JSON that follows `schema`, which describes one or all arguments of `tool`.

        Raises:
            GrammarError: the grammar has no room for it after earlier schemas, and it may not be dropped.
        """
        is_droppable = self._drops_schemas and tool is not None and not tool.is_strict
        plain = self._without_room(schema, is_droppable=is_droppable) or without_annotations(schema)
        if self._frees_tools and is_droppable and isinstance(plain, dict):
            plain = {**plain, LENIENT_SCHEMA: True}
        written = write_json(plain)
        self._num_characters += len(written)
        return self.rule(f"%json {written}")

    def _without_room(self, schema: object, *, is_droppable: bool) -> object:
        """The replacement for a schema once the grammar has reached its limit; None until then.

        Parameters may share definitions, which are written out for each, so the whole could be many times as long
        as the tools.
        """
        if self._num_characters <= MAX_GRAMMAR_CHARACTERS:
            return None
        if not is_droppable:
            raise GrammarError(
                f"the schemas have more than {MAX_GRAMMAR_CHARACTERS} characters in the grammar"
            )
        is_object = isinstance(schema, Mapping) and schema.get("type") == "object"
        return {"type": "object"} if is_object else True

    def form(self, form: Grammar) -> str:
        """The form of an answer as a rule; a caller's own rules are kept apart from the others."""
        if form.kind == "lark":
            return self.rule(f"%lark {{\n{form.text}\n}}")
        if form.kind == "regex":
            return self.rule(expression(form.text))
        return self.json({"type": "object"} if form.kind == "json_object" else json.loads(form.text))

    def arguments(self, tool: Tool) -> str:
        """The JSON object of a call's arguments."""
        return self.json(tool.parameters, tool)

    def bare_values(self, tool: Tool, form: ValueForm) -> str:
        """The arguments of a call, each in its own tags, in the order of the tool's parameters."""
        parts, required = [], frozenset(tool.required)
        for name, schema in tool.properties.items():
            types = types_of(schema, tool.parameters)
            part = f"{form.before(self, name)} {self.bare_value(schema, tool, form, types)}"
            parts.append(part if name in required else f"({part})?")
        return " ".join(parts)

    def bare_value(self, schema: object, tool: Tool, form: ValueForm, types: Collection[str]) -> str:
        """A value of one of the `types`, up to the end of its tags; a string has no quotes."""
        choices = schema.get("enum") if isinstance(schema, Mapping) else None
        if isinstance(choices, list) and choices and all(isinstance(choice, str) for choice in choices):
            value = f"({' | '.join(map(self.literal, choices))})"
            return f"{value} {form.after(self)}"
        if not types or "string" in types:
            return form.text_and_after(self)
        whole = {key: tool.parameters[key] for key in ("$defs", "definitions") if key in tool.parameters}
        assert isinstance(schema, Mapping)  # it has types
        return f"{self.json({**whole, **schema}, tool)} {form.after(self)}"


def expression(regex: str) -> str:
    """A regular expression in Lark syntax."""
    from llguidance import regex_to_lark

    return f"/{regex_to_lark(regex)}/"


def without_annotations(schema: object) -> object:
    """`schema` without its descriptions, which for a hundred tools would exceed the grammar's limit."""
    if isinstance(schema, list):
        return [without_annotations(part) for part in schema]
    if not isinstance(schema, Mapping):
        return schema
    kept: dict[str, object] = {}
    for key, part in schema.items():
        if key in _NAMED_SCHEMAS and isinstance(part, Mapping):
            kept[key] = {name: without_annotations(named) for name, named in part.items()}
        elif key in _VALUES:
            kept[key] = part
        elif key not in _ANNOTATIONS:
            kept[key] = without_annotations(part)
    return kept


class ValueForm:
    """How a format writes an argument: `before` with its name, the value, `after`.

    Args:
        name: the pieces around the parameter's name, marks and text; `{}` stands for the name.
        closing: the mark that ends the value.
        space: white space on both sides of the value.
        rest: text after the closing mark.
    """

    def __init__(self, name: Sequence[str], closing: str, *, space: str = "", rest: str = "") -> None:
        self._name = name
        self._closing = closing
        self._space = space
        self._rest = rest

    def before(self, lark: Lark, name: str) -> str:
        pieces = [
            lark.literal(piece.replace("{}", name)) if "{}" in piece else lark.mark(piece)
            for piece in self._name
        ]
        return " ".join([*pieces, *self._literal(lark, self._space)])

    def after(self, lark: Lark) -> str:
        pieces = [
            *self._literal(lark, self._space),
            lark.mark(self._closing),
            *self._literal(lark, self._rest),
        ]
        return " ".join(pieces)

    def text_and_after(self, lark: Lark) -> str:
        return " ".join([lark.text_until(self._closing, self._space), *self._literal(lark, self._rest)])

    @staticmethod
    def _literal(lark: Lark, text: str) -> list[str]:
        return [lark.literal(text)] if text else []


def _in_regex(text: str) -> str:
    return _MEANS_MORE.sub(r"\\\g<0>", text).replace("\n", r"\n")
