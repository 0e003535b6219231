"""GLM-4.5 to 4.7: a name, then a pair of tags for each key and value.

    <tool_call>get_weather
    <arg_key>city</arg_key>
    <arg_value>Oslo</arg_value>
    </tool_call>

4.7 and Laguna-S omit the line breaks, Ling-3 those behind values but the last; every spelling is read. A grammar
follows the model's own, which its template shows. Laguna-XS writes as 4.5.

Hy3 has marks around all calls and behind the name, and breaks lines; Hy4 has only the former (vLLM's parser for it).
Every mark ends alike, as the checkpoint's vocabulary says:

    <tool_calls:opensource>
    <tool_call:opensource>get_weather<tool_sep:opensource>
    <arg_key:opensource>city</arg_key:opensource>
    <arg_value:opensource>Oslo</arg_value:opensource>
    </tool_call:opensource>
    </tool_calls:opensource>
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from argosy.prompt.formats.block_format import BlockFormat, inside_of
from argosy.prompt.formats.lark import Lark, ValueForm
from argosy.prompt.formats.parser import CutCall, FoundCall, Mark, Reading
from argosy.prompt.json_text import write_json
from argosy.prompt.tools import Tool, value_of

if TYPE_CHECKING:
    from argosy.prompt.tokenizer import Tokenizer

OPEN, CLOSE = "<tool_call>", "</tool_call>"
KEY, KEY_END = "<arg_key>", "</arg_key>"
VALUE, VALUE_END = "<arg_value>", "</arg_value>"
SEPARATOR = "<tool_sep>"
# A line break before a value, in a template's own text or in its strings.
_BREAK = re.compile(rf"(?:\\n|\n)[ \t]*{VALUE}")
_CALLS = re.compile(r"<tool_calls((?::[^\s>]*)?)>")
_RELEASED = ":opensource"


class Glm(BlockFormat):
    name = "glm"
    words: ClassVar[tuple[str, ...]] = (KEY,)
    blocks = {OPEN: CLOSE}  # noqa: RUF012 (a ClassVar, declared in the base)
    inside: tuple[str, ...] = (KEY, KEY_END, VALUE, VALUE_END)
    line: ClassVar[str] = "\n"
    behind_value: ClassVar[str] = "\n"
    behind_values: ClassVar[str] = ""
    separator: str = ""  # behind the name

    def read(self, block: Sequence[str], tools: Mapping[str, Tool]) -> Reading:
        rest = iter(inside_of(block, CLOSE))
        name, mark = _up_to(rest, KEY)
        tool = tools.get(name.strip())
        if tool is None:
            return None
        arguments: dict[str, object] = {}
        while mark is not None:
            key, mark = _up_to(rest, KEY_END)
            between, value_mark = _up_to(rest, VALUE)
            if mark is None or value_mark is None or between.strip() or key in arguments:
                return None
            bare, mark = _up_to(rest, VALUE_END)
            if mark is None:
                return "more"
            arguments[key] = value_of(bare, tool.properties.get(key), tool.parameters)
            between, mark = _up_to(rest, KEY)
            if between.strip():
                return None
        return [FoundCall(tool.name, arguments)]

    def read_cut(self, block: Sequence[str], tools: Mapping[str, Tool]) -> Sequence[FoundCall | CutCall]:
        """Parse a cut block. Without its closing mark nothing shows that the call is complete, so it counts as cut."""
        rest = iter(inside_of(block, CLOSE))
        head, mark = _up_to(rest, KEY)
        tool = tools.get(head.strip())
        if tool is None or (mark is None and not head.endswith("\n")):  # the name may be incomplete
            return ()
        arguments: dict[str, object] = {}
        while mark is not None:
            key, _ = _up_to(rest, KEY_END)
            _up_to(rest, VALUE)
            bare, mark = _up_to(rest, VALUE_END)
            if mark is not None:
                arguments[key] = value_of(bare, tool.properties.get(key), tool.parameters)
                _, mark = _up_to(rest, KEY)
        return [CutCall(tool.name, write_json(arguments)[:-1])]

    def _calls(self, lark: Lark, tools: Sequence[Tool], parallel: bool) -> str:
        line = lark.literal(self.line) if self.line else ""
        separator = lark.mark(self.separator) if self.separator else ""
        key, key_end, value, value_end = self.inside[:4]
        form = ValueForm(
            [key, "{}", key_end, *filter(None, [self.line]), value], value_end, rest=self.behind_value
        )
        end = lark.literal(self.behind_values) if self.behind_values else ""
        bodies = " | ".join(
            lark.rule(f"{lark.literal(tool.name)} {separator} {line} {lark.bare_values(tool, form)} {end}")
            for tool in tools
        )
        opened, closed = next(iter(self.blocks.items()))
        call = lark.rule(f"{lark.mark(opened)} ({bodies}) {lark.mark(closed or '')}")
        return f"{call} ({line} {call})*" if parallel else call


class Glm47(Glm):
    name = "glm47"
    line = behind_value = ""

    @classmethod
    def fits(cls, tokenizer: Tokenizer, template: str) -> bool:
        return super().fits(tokenizer, template) and _BREAK.search(template) is None


class Ling3(Glm):
    name = "ling3"
    words = (KEY, "<role>ASSISTANT</role>")
    behind_value = ""
    behind_values = "\n"


class Hy4(Glm):
    name = "hy4"
    line = behind_value = ""

    @classmethod
    def fits(cls, tokenizer: Tokenizer, template: str) -> bool:
        # A vocabulary may contain the separator although no call uses it; the template shows whether one does.
        return _ending_of(tokenizer) is not None and (SEPARATOR[1:-1] in template) == bool(cls.separator)

    def __init__(self, tokenizer: Tokenizer) -> None:
        ending = _ending_of(tokenizer)
        self._ending = _RELEASED if ending is None else ending
        self.thinking = (self._own("<think>"), self._own("</think>"))
        self.blocks = {self._own(OPEN): self._own(CLOSE)}
        self.sections = (self._own("<tool_calls>"), self._own("</tool_calls>"))
        self.separator = self._own(self.separator) if self.separator else ""
        self.inside = tuple(filter(None, (*map(self._own, Glm.inside), self.separator)))
        super().__init__(tokenizer)

    def _own(self, mark: str) -> str:
        return _with(mark, self._ending)

    def read(self, block: Sequence[str], tools: Mapping[str, Tool]) -> Reading:
        return super().read(self._as_glm(block), tools)

    def read_cut(self, block: Sequence[str], tools: Mapping[str, Tool]) -> Sequence[FoundCall | CutCall]:
        return super().read_cut(self._as_glm(block), tools)

    def _as_glm(self, block: Sequence[str]) -> list[str]:
        """Return the lexemes with GLM's marks; a line break replaces the separator behind the name."""
        return [
            ("\n" if one == self.separator else Mark(one.replace(f"{self._ending}>", ">")))
            if isinstance(one, Mark)
            else one
            for one in block
        ]

    def _calls(self, lark: Lark, tools: Sequence[Tool], parallel: bool) -> str:
        line = lark.literal(self.line) if self.line else ""
        first, last = map(lark.mark, self.sections)
        return f"{first} {line} {super()._calls(lark, tools, parallel)} {line} {last}"


class Hy3(Hy4):
    name = "hy3"
    line = behind_value = "\n"
    separator = SEPARATOR


def _ending_of(tokenizer: Tokenizer) -> str | None:
    """Return the ending of Hunyuan's marks, such as `:opensource` or ""; None: the vocabulary does not have them."""
    for text in tokenizer.control_texts:
        found = _CALLS.fullmatch(text)
        if found and tokenizer.control_id(_with(KEY, found[1])) is not None:
            return found[1]
    return None


def _with(mark: str, ending: str) -> str:
    return f"{mark[:-1]}{ending}>"


def _up_to(lexemes: Iterator[str], mark: str) -> tuple[str, str | None]:
    """The text up to `mark`, and the mark if it is there."""
    text: list[str] = []
    for lexeme in lexemes:
        if isinstance(lexeme, Mark) and lexeme == mark:
            return "".join(text), lexeme
        text.append(lexeme)
    return "".join(text), None


FORMATS = (Hy3, Hy4, Ling3, Glm47, Glm)
