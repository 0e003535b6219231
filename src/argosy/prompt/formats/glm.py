"""GLM-4.5 to 4.7: a name, then a pair of tags for each key and value.

    <tool_call>get_weather
    <arg_key>city</arg_key>
    <arg_value>Oslo</arg_value>
    </tool_call>

4.7 omits the line breaks; both spellings are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from argosy.prompt.formats.block_format import BlockFormat, inside_of
from argosy.prompt.formats.lark import Lark, ValueForm
from argosy.prompt.formats.parser import CutCall, FoundCall, Mark, Reading
from argosy.prompt.json_text import write_json
from argosy.prompt.tools import Tool, value_of

OPEN, CLOSE = "<tool_call>", "</tool_call>"
KEY, KEY_END = "<arg_key>", "</arg_key>"
VALUE, VALUE_END = "<arg_value>", "</arg_value>"


class Glm(BlockFormat):
    name = "glm"
    words = (KEY,)
    blocks = {OPEN: CLOSE}  # noqa: RUF012 (a ClassVar, declared in the base)
    inside = (KEY, KEY_END, VALUE, VALUE_END)
    line = "\n"

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
        form = ValueForm([KEY, "{}", KEY_END, *filter(None, [self.line]), VALUE], VALUE_END, rest=self.line)
        bodies = " | ".join(
            lark.rule(f"{lark.literal(tool.name)} {line} {lark.bare_values(tool, form)}") for tool in tools
        )
        call = lark.rule(f"{lark.mark(OPEN)} ({bodies}) {lark.mark(CLOSE)}")
        return f"{call} ({line} {call})*" if parallel else call


class Glm47(Glm):
    name = "glm47"
    words = (f"{KEY_END}{VALUE}",)
    line = ""


def _up_to(lexemes: Iterator[str], mark: str) -> tuple[str, str | None]:
    """The text up to `mark`, and the mark if it is there."""
    text: list[str] = []
    for lexeme in lexemes:
        if isinstance(lexeme, Mark) and lexeme == mark:
            return "".join(text), lexeme
        text.append(lexeme)
    return "".join(text), None


FORMATS = (Glm47, Glm)
