"""MiniMax-M2: invocations, with a tag for each parameter.

<minimax:tool_call>
<invoke name="get_weather">
<parameter name="city">Oslo</parameter>
</invoke>
</minimax:tool_call>
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from argosy.prompt.formats.block_format import BlockFormat, inside_of
from argosy.prompt.formats.functions import Tags, read_cut_functions, read_functions
from argosy.prompt.formats.lark import Lark, ValueForm
from argosy.prompt.formats.parser import CutCall, FoundCall, Reading
from argosy.prompt.tools import Tool

OPEN, CLOSE = "<minimax:tool_call>", "</minimax:tool_call>"
_TAGS = Tags(
    function=re.compile(r'<invoke name="([^"\n]+)">'),
    function_end="</invoke>",
    parameter=re.compile(r'<parameter name="(.{1,256}?)">'),
    parameter_end="</parameter>",
    line_around_values=False,
)
_VALUE = ValueForm(['<parameter name="{}">'], "</parameter>", rest="\n")


class MiniMaxM2(BlockFormat):
    name = "minimax_m2"
    words = (OPEN,)
    blocks = {OPEN: CLOSE}  # noqa: RUF012 (a ClassVar, declared in the base)

    def read(self, block: Sequence[str], tools: Mapping[str, Tool]) -> Reading:
        return read_functions("".join(inside_of(block, CLOSE)), _TAGS, tools)

    def read_cut(self, block: Sequence[str], tools: Mapping[str, Tool]) -> Sequence[FoundCall | CutCall]:
        return read_cut_functions("".join(inside_of(block, CLOSE)), _TAGS, tools)

    def _calls(self, lark: Lark, tools: Sequence[Tool], parallel: bool) -> str:
        bodies = " | ".join(
            lark.rule(
                f'{lark.literal(f"""<invoke name="{tool.name}">""")} "\\n" '
                f'{lark.bare_values(tool, _VALUE)} "</invoke>\\n"'
            )
            for tool in tools
        )
        return f'{lark.mark(OPEN)} "\\n" ({bodies}){"+" if parallel else ""} {lark.mark(CLOSE)}'


FORMATS = (MiniMaxM2,)
