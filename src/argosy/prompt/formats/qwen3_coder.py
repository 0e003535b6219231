"""Qwen3-Coder and Qwen3.5: a function, with a tag for each parameter.

    <tool_call>
    <function=get_weather>
    <parameter=city>
    Oslo
    </parameter>
    </function>
    </tool_call>

Models sometimes omit `<tool_call>`, so `<function=` opens a block as well.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from argosy.prompt.formats.block_format import BlockFormat, inside_of
from argosy.prompt.formats.functions import Tags, read_cut_functions, read_functions
from argosy.prompt.formats.lark import Lark, ValueForm
from argosy.prompt.formats.parser import CutCall, FoundCall, Reading
from argosy.prompt.tools import Tool

OPEN, CLOSE = "<tool_call>", "</tool_call>"
FUNCTION, END = "<function=", "</function>"
_TAGS = Tags(
    function=re.compile(r"<function=([^>\s]+)>"),
    function_end=END,
    parameter=re.compile(r"<parameter=([^>\n]+)>"),
    parameter_end="</parameter>",
    line_around_values=True,
)
_VALUE = ValueForm(["<parameter={}>"], "</parameter>", space="\n", rest="\n")


class Qwen3Coder(BlockFormat):
    name = "qwen3_coder"
    words = (FUNCTION,)
    blocks = {OPEN: CLOSE, FUNCTION: END}  # noqa: RUF012 (a ClassVar, declared in the base)

    def read(self, block: Sequence[str], tools: Mapping[str, Tool]) -> Reading:
        return read_functions(_inside(block), _TAGS, tools)

    def read_cut(self, block: Sequence[str], tools: Mapping[str, Tool]) -> Sequence[FoundCall | CutCall]:
        return read_cut_functions(_inside(block), _TAGS, tools)

    def _lazy_calls(self, lark: Lark, tools: Sequence[Tool], parallel: bool) -> tuple[str, Sequence[str]]:
        bare = f"({self._bodies(lark, tools)})"
        bare = f'{bare} ("\\n" {bare})*' if parallel else bare
        return f"{self._calls(lark, tools, parallel)} | {bare}", (OPEN, FUNCTION)

    def _bodies(self, lark: Lark, tools: Sequence[Tool]) -> str:
        return " | ".join(
            lark.rule(
                f'{lark.literal(f"<function={tool.name}>")} "\\n" {lark.bare_values(tool, _VALUE)} "{END}"'
            )
            for tool in tools
        )

    def _calls(self, lark: Lark, tools: Sequence[Tool], parallel: bool) -> str:
        bodies = self._bodies(lark, tools)
        call = lark.rule(f'{lark.mark(OPEN)} "\\n" ({bodies}) "\\n" {lark.mark(CLOSE)}')
        return f'{call} ("\\n" {call})*' if parallel else call


def _inside(block: Sequence[str]) -> str:
    return "".join(block if block[0] == FUNCTION else inside_of(block, CLOSE))


FORMATS = (Qwen3Coder,)
