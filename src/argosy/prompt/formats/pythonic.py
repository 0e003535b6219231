"""LFM2 and Llama-4: calls written as a list of calls in Python.

    <|tool_call_start|>[get_weather(city="Oslo", days=2), clock()]<|tool_call_end|>            LFM2
    <|python_start|>[get_weather(city="Oslo", days=2)]<|python_end|>                            Llama-4

Arguments have names, in quotes if Python could not write them (`"filter[id]"=2`). `true`, `false` and `null` are read
like True, False and None. Llama-4 also writes calls without the marks, and its own template, like Llama-3's, asks for
JSON:

    <|python_start|><|python_end|>{"name": "get_weather", "parameters": {"city": "Oslo"}}{"name": "clock", ...}

There the text before calls is between these marks; models often leave them out. An answer that begins with a bracket is
held back until it ends, if there are tools to call.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from argosy.prompt.formats.block_format import BlockFormat, BlockParser, inside_of
from argosy.prompt.formats.format import beginning_of_call, call_of
from argosy.prompt.formats.json_list import read_beginning_of_list, read_list
from argosy.prompt.formats.lark import Lark
from argosy.prompt.formats.parser import CutCall, FoundCall, Mark, Parser, Reading
from argosy.prompt.json_text import write_json
from argosy.prompt.tools import Tool

if TYPE_CHECKING:
    from argosy.prompt.prompt import Prompt

# A string without its end takes the rest of the text.
_PIECE = re.compile(r"""\s+|[][(){},:=]|'(?:[^'\\]|\\.)*'?|"(?:[^"\\]|\\.)*"?|[^][(){},:=\s'"]+""", re.DOTALL)
_NAME = re.compile(r"""[^][(){},:=\s'"]+""")
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|x([0-9a-fA-F]{2})|(.))", re.DOTALL)
_ESCAPED = {
    "n": "\n",
    "t": "\t",
    "r": "\r",
    "b": "\b",
    "f": "\f",
    "\n": "",
    **{mark: mark for mark in "'\"\\/"},
}
_BARE = ""  # the mark of a call without marks
_TEXT = re.compile(
    r"<\|python_start\|>(.*?)<\|python_end\|>", re.DOTALL
)  # before calls, in Llama-4's template
_JSON = '{"name": "'
_WORDS = {"True": "true", "False": "false", "None": "null"}


class Pythonic(BlockFormat):
    def read(self, block: Sequence[str], tools: Mapping[str, Tool]) -> Reading:
        calls, is_complete, is_inside_string = _calls_in(self._inside(block))
        if is_inside_string:
            return "more"
        found = [call_of(name, arguments, tools) for name, arguments in calls]
        return [call for call in found if call] if is_complete and found and all(found) else None

    def read_cut(self, block: Sequence[str], tools: Mapping[str, Tool]) -> Sequence[FoundCall | CutCall]:
        calls, _, _ = _calls_in(self._inside(block))
        return [call for name, arguments in calls for call in beginning_of_call(name, arguments, tools)]

    def _inside(self, block: Sequence[str]) -> str:
        return "".join(inside_of(block, self.blocks[block[0]] or ""))

    def _calls(self, lark: Lark, tools: Sequence[Tool], parallel: bool) -> str:
        call = lark.rule(
            " | ".join(
                lark.rule(f'{lark.literal(f"{tool.name}(")} {_arguments(lark, tool)} ")"') for tool in tools
            )
        )
        calls = f'{call} (", " {call})*' if parallel else call
        opened, closed = next(iter(self.blocks.items()))
        return f'{lark.mark(opened)} "[" {calls} "]" {lark.mark(closed or "")}'


class Lfm2(Pythonic):
    name = "lfm2"
    tokens = ("<|tool_call_start|>", "<|tool_call_end|>")
    blocks = {"<|tool_call_start|>": "<|tool_call_end|>"}  # noqa: RUF012 (a ClassVar, declared in the base)


class Llama4(Pythonic):
    name = "llama4"
    tokens: ClassVar[tuple[str, ...]] = ("<|python_start|>", "<|python_end|>")
    blocks = {"<|python_start|>": "<|python_end|>", _BARE: None}  # noqa: RUF012

    def _inside(self, block: Sequence[str]) -> str:
        inside = super()._inside(block)
        text = None if block[0] else _TEXT.match(inside)
        return inside if text is None else inside[text.end() :]

    def parser(self, tools: Sequence[Tool] = (), prompt: Prompt | None = None) -> Parser:
        return _BareParser(self, tools, is_reasoning=self.thoughts_in(prompt) == "open")

    def read(self, block: Sequence[str], tools: Mapping[str, Tool]) -> Reading:
        return read_list(self._inside(block), tools) or super().read(block, tools)

    def read_cut(self, block: Sequence[str], tools: Mapping[str, Tool]) -> Sequence[FoundCall | CutCall]:
        return read_beginning_of_list(self._inside(block), tools) or super().read_cut(block, tools)

    def _lazy_calls(self, lark: Lark, tools: Sequence[Tool], parallel: bool) -> tuple[str, Sequence[str]]:
        return self._calls(lark, tools, parallel), tuple(filter(None, self.blocks))


class Llama3(Llama4):
    name = "llama3"
    tokens = ()
    words = ('"parameters": dictionary of argument name',)
    blocks = {"<|python_start|>": "<|python_end|>", "<|python_tag|>": None, _BARE: None}  # noqa: RUF012

    def _calls(self, lark: Lark, tools: Sequence[Tool], parallel: bool) -> str:
        """One call, because its template refuses more than one."""
        return " | ".join(
            lark.rule(
                f'{lark.literal(f"""{_JSON}{tool.name}", "parameters": """)} {lark.arguments(tool)} "}}"'
            )
            for tool in tools
        )

    def _lazy_calls(self, lark: Lark, tools: Sequence[Tool], parallel: bool) -> tuple[str, Sequence[str]]:
        return self._calls(lark, tools, parallel), (_JSON,)


class _BareParser(BlockParser):
    """Takes an answer that begins with a bracket for a call without marks."""

    _behind_text = 0  # lexemes of a block until text with marks around it, and space, have ended

    def _take(self, lexeme: str) -> None:
        is_first = (
            self._block is None and not self._has_said and not self._num_calls and not self._is_reasoning
        )
        if is_first and self._tools and not isinstance(lexeme, Mark) and lexeme.lstrip()[:1] in ("[", "{"):
            self._block = [_BARE]
        super()._take(lexeme)

    def _take_in_block(self, block: list[str], lexeme: str) -> None:
        closes = isinstance(lexeme, Mark) and lexeme == self._form.blocks[block[0]]
        if closes and not (self._has_said or self._num_calls):
            if self._form.read([*block, lexeme], self._tools) is None:
                # Perhaps it is text with marks around it, and calls follow.
                block[:] = [_BARE, *block, lexeme]
                self._behind_text = len(block)
                return
        elif not block[0] and len(block) == self._behind_text:
            if not lexeme.strip():
                self._behind_text += 1
            elif isinstance(lexeme, Mark) or lexeme.lstrip()[0] not in "[{":
                self._block = None
                self._say("".join(block))
                self._take(lexeme)
                return
        super()._take_in_block(block, lexeme)

    def _close(self, block: list[str], *, is_end: bool = False) -> None:
        text = None if block[0] else _TEXT.match("".join(block))
        read = self._form.read_cut if is_end and self._is_cut else self._form.read
        if text is not None and text[1].strip() and read(block, self._tools):
            self._say(text[1])
        super()._close(block, is_end=is_end)


def _arguments(lark: Lark, tool: Tool) -> str:
    """The named arguments of a call in the order of its parameters; each value is JSON, which Python reads alike."""
    first, later = "", ""  # what may follow at the beginning, and after an argument
    whole = {key: tool.parameters[key] for key in ("$defs", "definitions") if key in tool.parameters}
    for name, schema in reversed([*tool.properties.items()]):
        value = lark.json({**whole, **schema} if isinstance(schema, Mapping) else schema, tool)
        is_plain = _NAME.fullmatch(name) and name not in _WORDS
        one = lark.rule(f"{lark.literal(f'{name if is_plain else write_json(name)}=')} {value}")
        if name in tool.required:
            first, later = f"{one} {later}", f'", " {one} {later}'
        else:
            first = f"({one} {later} | {first})" if first else f"({one} {later})?"
            later = f'(", " {one})? {later}'
        first, later = (lark.rule(text) if len(text) > 40 else text for text in (first, later))
    return first


def _calls_in(text: str) -> tuple[list[tuple[str, str]], bool, bool]:
    """The names of the calls and the JSON text of their arguments, whether the text is complete, and whether it ends
    inside a string.
    """
    calls: list[tuple[str, str]] = []
    made: list[str] = []  # the arguments of the call being read
    opened: list[str] = []  # brackets inside the call
    num_lists = 0  # brackets around the calls
    name, at = "", 0
    is_inside_string = False
    while (found := _PIECE.match(text, at)) is not None:
        piece, at = found[0], found.end()
        if piece.isspace():
            continue
        if not opened:
            if piece == "(" and name:
                opened.append(piece)
                made = ["{"]
            elif piece in ("[", "]"):
                num_lists += 1 if piece == "[" else -1
            elif piece != ",":
                name = piece
        elif piece == ")" and len(opened) == 1:
            opened.pop()
            calls.append((name, "".join(made) + "}"))
            name, made = "", []
        elif piece == "=" and len(opened) == 1:
            made[-1:] = [made[-1] if made[-1][:1] == '"' else write_json(made[-1]), ": "]
        elif piece in ("[", "{"):
            opened.append(piece)
            made.append(piece)
        elif piece in ("]", "}"):
            if len(opened) > 1:
                opened.pop()
            made.append(piece)
        elif piece[0] in "'\"":
            written, is_inside_string = _string(piece)
            made.append(written)
        else:
            made.append({",": ", ", ":": ": "}.get(piece) or _WORDS.get(piece, piece))
    if made:
        calls.append((name, "".join(made)))
    return calls, not num_lists and not made and not name and at == len(text), is_inside_string


def _string(piece: str) -> tuple[str, bool]:
    """The JSON text of a Python string, and whether its end is missing; if so, without the closing quote."""
    is_cut = len(piece) < 2 or not _ESCAPE.sub("", piece[1:]).endswith(piece[0])
    value = _ESCAPE.sub(_meaning, piece[1:] if is_cut else piece[1:-1])
    written = write_json(value.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
    return (written[:-1] if is_cut else written), is_cut


def _meaning(escape: re.Match[str]) -> str:
    if digits := escape[1] or escape[2]:
        return chr(int(digits, 16))
    return _ESCAPED.get(escape[3], escape[0])


FORMATS = (Lfm2, Llama3, Llama4)
