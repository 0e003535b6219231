"""Gemma-4: thoughts on a channel, and calls whose strings are enclosed in two equal marks.

    <|channel>thought
    thoughts<channel|>the answer<|tool_call>call:get_weather{city:<|"|>Oslo<|"|>,days:2}<tool_call|>

Keys have no quotes, unless one could be read as something else, and a string has no escapes: it ends at the next mark.
Otherwise arguments are JSON.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from argosy.errors import GrammarError
from argosy.prompt.formats.block_format import BlockFormat, BlockParser, inside_of
from argosy.prompt.formats.format import beginning_of_call, call_of
from argosy.prompt.formats.lark import Lark
from argosy.prompt.formats.parser import CutCall, FoundCall, Mark, Parser, Reading
from argosy.prompt.json_text import write_json
from argosy.prompt.tools import Tool, types_of

if TYPE_CHECKING:
    from argosy.prompt.prompt import Prompt

CHANNEL, CHANNEL_END = "<|channel>", "<channel|>"
OPEN, CLOSE, QUOTE = "<|tool_call>", "<tool_call|>", '<|"|>'
_NAME = "thought\n"  # the channel's
_HEAD = re.compile(r"\s*call:\s*([^\s{]+)\s*(?=\{)")
_PIECE = re.compile(r"[{}\[\],]|[^{}\[\],]+")
_KEY = re.compile(r'[^{}\[\],:\s"]([^{}\[\],:"]*[^{}\[\],:\s"])?')  # what is read without quotes
_SCALARS = frozenset({"integer", "number", "boolean", "null"})
_ELSEWHERE = ("$ref", "anyOf", "oneOf", "allOf", "patternProperties", "if")


class Gemma4(BlockFormat):
    name = "gemma4"
    tokens = (CHANNEL, CHANNEL_END)
    thinking = (CHANNEL, CHANNEL_END)
    blocks = {OPEN: CLOSE}  # noqa: RUF012 (a ClassVar, declared in the base)
    inside = (QUOTE,)

    def parser(self, tools: Sequence[Tool] = (), prompt: Prompt | None = None) -> Parser:
        return _Parser(self, tools, is_reasoning=self.thoughts_in(prompt) == "open")

    def read(self, block: Sequence[str], tools: Mapping[str, Tool]) -> Reading:
        name, arguments, is_inside_string = _call_in(inside_of(block, CLOSE))
        if is_inside_string:
            return "more"
        call = call_of(name, arguments, tools) if arguments else None
        return None if call is None else [call]

    def read_cut(self, block: Sequence[str], tools: Mapping[str, Tool]) -> Sequence[FoundCall | CutCall]:
        name, arguments, _ = _call_in(inside_of(block, CLOSE))
        return beginning_of_call(name, arguments, tools)

    def _calls(self, lark: Lark, tools: Sequence[Tool], parallel: bool) -> str:
        bodies = " | ".join(
            lark.rule(f"{lark.literal(f'call:{tool.name}')} {_object(lark, tool.parameters, tool)}")
            for tool in tools
        )
        call = lark.rule(f"{lark.mark(OPEN)} ({bodies}) {lark.mark(CLOSE)}")
        return f"{call}+" if parallel else call


class _Parser(BlockParser):
    """Omits the channel's name, with which thoughts begin, and end marks without thoughts."""

    _begun = ""  # the thoughts so far, while they may be only the name
    _is_named = False

    def _switch(self, *, is_reasoning: bool) -> None:
        super()._switch(is_reasoning=is_reasoning)
        self._begun, self._is_named = "", False

    def _take(self, lexeme: str) -> None:
        is_end = isinstance(lexeme, Mark) and lexeme == CHANNEL_END
        if not is_end or self._is_reasoning or self._block is not None:
            super()._take(lexeme)

    def _take_in_thoughts(self, lexeme: str) -> None:
        if self._is_named:
            super()._take_in_thoughts(lexeme)
        elif not isinstance(lexeme, Mark):
            self._begun += lexeme
            if not _NAME.startswith(self._begun):
                self._say_begun()
        elif lexeme != CHANNEL or self._begun:
            self._say_begun()
            super()._take_in_thoughts(lexeme)

    def _say_begun(self) -> None:
        begun, self._begun, self._is_named = self._begun, "", True
        if begun != _NAME.strip():
            super()._take_in_thoughts(begun.removeprefix(_NAME))

    def _end(self) -> None:
        if self._begun:
            self._say_begun()
        super()._end()


def _call_in(lexemes: Sequence[str]) -> tuple[str, str, bool]:
    """The name of a call, the JSON text of its arguments so far, and whether they end inside a string."""
    parts: list[list[str]] = [[]]  # alternately outside and inside strings
    for lexeme in lexemes:
        if isinstance(lexeme, Mark) and lexeme == QUOTE:
            parts.append([])
        else:
            parts[-1].append(lexeme)
    texts = ["".join(part) for part in parts]
    head = _HEAD.match(texts[0])
    if head is None:
        return "", "", False
    texts[0] = texts[0][head.end() :]
    made: list[str] = []
    opened: list[str] = []  # brackets
    is_key = False
    for number, text in enumerate(texts):
        if number % 2:
            made.append(write_json(text))
            continue
        for piece in _PIECE.findall(text):
            if piece in ("{", "["):
                opened.append(piece)
            elif piece in ("}", "]"):
                del opened[-1:]
            elif piece != ",":
                key, colon, rest = piece.partition(":") if is_key else ("", "", piece)
                if is_key and not colon:  # a quoted key follows, or the rest of the key is missing
                    continue
                made += [write_json(key.strip())] if key.strip() else []
                rest = "null" if rest.strip() == "None" else rest.strip()  # as the template writes it
                made.append(f": {rest}" if is_key else rest)
                is_key = False
                continue
            is_key = piece == "{" or (piece == "," and opened[-1:] == ["{"])
            made.append(", " if piece == "," else piece)
    is_inside_string = len(texts) % 2 == 0
    if is_inside_string:
        made[-1] = made[-1][:-1]
    return head[1], "".join(made), is_inside_string


def _object(lark: Lark, schema: Mapping[str, object], tool: Tool) -> str:
    """An object: the declared properties in alphabetical order, as the template writes them, or any object."""
    properties, more = schema.get("properties"), schema.get("additionalProperties", False)
    is_elsewhere = any(key in schema for key in _ELSEWHERE)
    if is_elsewhere or more is not False or not isinstance(properties, Mapping):
        if is_elsewhere or properties or isinstance(more, Mapping):
            _require_lenient(tool)
        _any(lark, tool)
        return '"{" members? "}"'
    listed = schema.get("required")
    required = set(map(str, listed)) if isinstance(listed, list) else set()
    first, later = "", ""  # what may follow at the beginning, and after a member
    for name in sorted(properties, reverse=True):
        quote = "" if _KEY.fullmatch(name) else lark.mark(QUOTE)
        key = (
            f"{quote} {lark.literal(name)} {quote} {lark.literal(':')}" if quote else lark.literal(f"{name}:")
        )
        member = lark.rule(f"{key} {_value(lark, properties[name], tool)}")
        if name in required:
            first, later = f"{member} {later}", f'"," {member} {later}'
        else:
            first = f"({member} {later} | {first})" if first else f"({member} {later})?"
            later = f'("," {member})? {later}'
        first, later = (lark.rule(text) if len(text) > 40 else text for text in (first, later))
    return f'"{{" {first} "}}"'


def _value(lark: Lark, schema: object, tool: Tool) -> str:
    if not isinstance(schema, Mapping):
        if schema is False:
            _require_lenient(tool)
        return _any(lark, tool)
    choices = schema.get("enum")
    if isinstance(choices, list) and choices and all(isinstance(choice, str) for choice in choices):
        quote = lark.mark(QUOTE)
        return f"{quote} ({' | '.join(map(lark.literal, choices))}) {quote}"
    types = types_of(schema, tool.parameters)
    is_elsewhere = any(key in schema for key in _ELSEWHERE)
    if not types or (types - _SCALARS - {"string"} and is_elsewhere):
        if is_elsewhere:
            _require_lenient(tool)
        return _any(lark, tool)
    forms = [_string(lark)] if "string" in types else []
    if "object" in types:
        forms.append(_object(lark, schema, tool))
    if "array" in types:
        item = _value(lark, schema.get("items"), tool)
        forms.append(f'"[" ({item} ("," {item})*)? "]"')
    if types <= _SCALARS:
        whole = {key: tool.parameters[key] for key in ("$defs", "definitions") if key in tool.parameters}
        forms.append(lark.json({**whole, **schema}, tool))
    elif types & _SCALARS:
        forms.append(lark.json({"type": sorted(types & _SCALARS)}, tool))
    return lark.rule(" | ".join(forms))


def _require_lenient(tool: Tool) -> None:
    """Refuse to let a strict tool's value be anything.

    Raises:
        GrammarError: the tool is strict.
    """
    if tool.is_strict:
        raise GrammarError(
            f"the parameters of the strict tool '{tool.name}' have a schema that cannot be enforced for this model",
            hint="give every parameter a type, with properties for an object and items for an array",
        )


def _any(lark: Lark, tool: Tool) -> str:
    """Any value."""
    scalars = lark.json({"type": sorted(_SCALARS)}, tool)
    lark.named("member", r'/[^:{}\[\],\s"][^:{}\[\],"]*/ ":" any')
    lark.named("members", 'member ("," member)*')
    return lark.named("any", f'{_string(lark)} | {scalars} | "[" (any ("," any)*)? "]" | "{{" members? "}}"')


def _string(lark: Lark) -> str:
    return lark.rule(f"{lark.mark(QUOTE)} {lark.text_until(QUOTE)}")


FORMATS = (Gemma4,)
