"""DeepSeek: R1 and V3 write a fenced block, V3.1 writes the name and its arguments.

    <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather
    ```json
    {"city": "Oslo"}
    ```<｜tool▁call▁end｜><｜tool▁calls▁end｜>

    <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Oslo"}
    <｜tool▁call▁end｜><｜tool▁calls▁end｜>

Both are read; the chat template decides which one a grammar requires. V3.2 and V4 write tags, whose names begin with a
space in V4.1:

    <｜DSML｜function_calls>
    <｜DSML｜invoke name="get_weather">
    <｜DSML｜parameter name="city" string="true">Oslo</｜DSML｜parameter>
    </｜DSML｜invoke>
    </｜DSML｜function_calls>
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

from argosy.prompt.formats.block_format import BlockFormat, halves, inside_of
from argosy.prompt.formats.format import beginning_of_call, call_of, ends_inside_string
from argosy.prompt.formats.functions import Tags, read_cut_functions, read_functions
from argosy.prompt.formats.lark import Lark, ValueForm
from argosy.prompt.formats.parser import CutCall, FoundCall, Reading
from argosy.prompt.tools import Tool, types_of

BEGIN, END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
ALL_BEGIN, ALL_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
SEPARATOR = "<｜tool▁sep｜>"
DSML = "｜DSML｜"
_TAGS = Tags(
    function=re.compile(rf'<{DSML} ?invoke name="([^"\n]+)">'),
    function_end=f"</{DSML}invoke>",
    parameter=re.compile(rf'<{DSML} ?parameter name="(.{{1,256}}?)" string="(true|false)">'),
    parameter_end=f"</{DSML}parameter>",
    line_around_values=False,
)
_FENCED = re.compile(r"\s*([^\s`]+)\s*```(?:json)?\n(.*?)\n?```\s*", re.DOTALL)
_FENCE_OPENED = re.compile(r"\s*([^\s`]+)\s*```(?:json)?\n([^`]*)`{0,3}\s*", re.DOTALL)


class DeepSeekV31(BlockFormat):
    name = "deepseek_v31"
    tokens = (ALL_BEGIN,)
    blocks = {BEGIN: END}  # noqa: RUF012 (a ClassVar, declared in the base)
    sections = (ALL_BEGIN, ALL_END)
    inside = (SEPARATOR,)

    def read(self, block: Sequence[str], tools: Mapping[str, Tool]) -> Reading:
        parts = halves(inside_of(block, END), SEPARATOR)
        if parts is None:
            return None
        head, tail = parts[0].strip(), parts[1]
        fenced = _FENCED.fullmatch(tail)
        call = call_of(fenced[1], fenced[2], tools) if fenced else call_of(head, tail.strip(), tools)
        if call is None:
            return "more" if ends_inside_string(tail) else None
        return [call]

    def read_cut(self, block: Sequence[str], tools: Mapping[str, Tool]) -> Sequence[FoundCall | CutCall]:
        head, tail = halves(inside_of(block, END), SEPARATOR) or ("", "")
        fenced = _FENCE_OPENED.match(tail)
        return beginning_of_call(*((fenced[1], fenced[2]) if fenced else (head.strip(), tail)), tools)

    def _calls(self, lark: Lark, tools: Sequence[Tool], parallel: bool) -> str:
        bodies = " | ".join(lark.rule(self._body(lark, tool)) for tool in tools)
        call = lark.rule(f"{lark.mark(BEGIN)} ({bodies}) {lark.mark(END)}")
        calls = f"{call} ({self._between} {call})*" if parallel else call
        return f"{lark.mark(ALL_BEGIN)} {calls} {lark.mark(ALL_END)}"

    _between = ""

    def _body(self, lark: Lark, tool: Tool) -> str:
        return f"{lark.literal(tool.name)} {lark.mark(SEPARATOR)} {lark.arguments(tool)}"


class DeepSeekV3(DeepSeekV31):
    name = "deepseek_v3"
    words = ("```",)
    _between = '"\\n"'

    def _body(self, lark: Lark, tool: Tool) -> str:
        head = lark.literal(f"{tool.name}\n```json\n")
        return f'"function" {lark.mark(SEPARATOR)} {head} {lark.arguments(tool)} "\\n```"'


class DeepSeekV32(BlockFormat):
    name = "deepseek_v32"
    words = (DSML, "function_calls>")
    pieces = (DSML,)
    blocks = {f"<{DSML}function_calls>": f"</{DSML}function_calls>"}  # noqa: RUF012
    mark: ClassVar[str] = DSML
    tags: ClassVar[Tags] = _TAGS

    def read(self, block: Sequence[str], tools: Mapping[str, Tool]) -> Reading:
        return read_functions("".join(inside_of(block, self.blocks[block[0]] or "")), self.tags, tools)

    def read_cut(self, block: Sequence[str], tools: Mapping[str, Tool]) -> Sequence[FoundCall | CutCall]:
        return read_cut_functions("".join(inside_of(block, self.blocks[block[0]] or "")), self.tags, tools)

    def _calls(self, lark: Lark, tools: Sequence[Tool], parallel: bool) -> str:
        bodies = " | ".join(
            lark.rule(
                f'{lark.literal(f"""<{self.mark}invoke name="{tool.name}">""")} "\\n" '
                f'{self._parameters(lark, tool)} {lark.literal(self.tags.function_end)} "\\n"'
            )
            for tool in tools
        )
        opened, closed = next(iter(self.blocks.items()))
        return f'{lark.mark(opened)} "\\n" ({bodies}){"+" if parallel else ""} {lark.mark(closed or "")}'

    def _parameters(self, lark: Lark, tool: Tool) -> str:
        """The arguments in the order of the tool's parameters; a string is bare text, all else is JSON."""
        parts, end = [], self.tags.parameter_end
        whole = {key: tool.parameters[key] for key in ("$defs", "definitions") if key in tool.parameters}
        for name, schema in tool.properties.items():
            types = types_of(schema, tool.parameters)
            forms = []
            if not types or "string" in types:
                form = ValueForm([f'<{self.mark}parameter name="{{}}" string="true">'], end, rest="\n")
                forms.append(
                    f"{form.before(lark, name)} {lark.bare_value(schema, tool, form, types={'string'})}"
                )
            if types - {"string"}:
                form = ValueForm([f'<{self.mark}parameter name="{{}}" string="false">'], end, rest="\n")
                value = lark.json({**whole, **schema} if isinstance(schema, Mapping) else schema, tool)
                forms.append(f"{form.before(lark, name)} {value} {form.after(lark)}")
            part = f"({' | '.join(forms)})"
            parts.append(part if name in tool.required else f"{part}?")
        return " ".join(parts)


class DeepSeekV4(DeepSeekV32):
    name = "deepseek_v4"
    words = (DSML, "tool_calls>")
    blocks = {f"<{DSML}tool_calls>": f"</{DSML}tool_calls>"}  # noqa: RUF012


class DeepSeekV41(DeepSeekV32):
    name = "deepseek_v41"
    words = (DSML, " calls>")
    blocks = {f"<{DSML} calls>": f"</{DSML} calls>"}  # noqa: RUF012
    mark = f"{DSML} "
    tags = replace(_TAGS, function_end=f"</{mark}invoke>", parameter_end=f"</{mark}parameter>")


FORMATS = (DeepSeekV3, DeepSeekV31, DeepSeekV32, DeepSeekV4, DeepSeekV41)
