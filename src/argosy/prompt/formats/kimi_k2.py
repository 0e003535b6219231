"""Kimi-K2: calls have their own ids, which its template expects back.

    <|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>{"city": "Oslo"}
    <|tool_call_end|><|tool_calls_section_end|>

The number counts the calls in the whole conversation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from argosy.prompt.formats.block_format import BlockFormat, halves, inside_of
from argosy.prompt.formats.format import beginning_of_call, call_of, ends_inside_string
from argosy.prompt.formats.lark import Lark
from argosy.prompt.formats.parser import CutCall, FoundCall, Reading
from argosy.prompt.messages import Call
from argosy.prompt.tools import Tool

BEGIN, END = "<|tool_call_begin|>", "<|tool_call_end|>"
ALL_BEGIN, ALL_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
ARGUMENTS = "<|tool_call_argument_begin|>"
_ID = re.compile(r"functions\.(.+):\d+")


class KimiK2(BlockFormat):
    name = "kimi_k2"
    tokens = (ALL_BEGIN, BEGIN)
    blocks = {BEGIN: END}  # noqa: RUF012 (a ClassVar, declared in the base)
    sections = (ALL_BEGIN, ALL_END)
    inside = (ARGUMENTS,)

    def read(self, block: Sequence[str], tools: Mapping[str, Tool]) -> Reading:
        parts = halves(inside_of(block, END), ARGUMENTS)
        if parts is None:
            return None
        own_id, arguments = parts[0].strip(), parts[1]
        named = _ID.fullmatch(own_id)
        if named is None:
            return None
        call = call_of(named[1], arguments.strip(), tools, own_id)
        if call is None:
            return "more" if ends_inside_string(arguments) else None
        return [call]

    def read_cut(self, block: Sequence[str], tools: Mapping[str, Tool]) -> Sequence[FoundCall | CutCall]:
        own_id, arguments = halves(inside_of(block, END), ARGUMENTS) or ("", "")
        named = _ID.fullmatch(own_id.strip())
        return () if named is None else beginning_of_call(named[1], arguments, tools, own_id.strip())

    def _calls(self, lark: Lark, tools: Sequence[Tool], parallel: bool) -> str:
        number = lark.rule("/[0-9]+/")
        bodies = " | ".join(
            lark.rule(f'"functions.{tool.name}:" {number} {lark.mark(ARGUMENTS)} {lark.arguments(tool)}')
            for tool in tools
        )
        call = lark.rule(f"{lark.mark(BEGIN)} ({bodies}) {lark.mark(END)}")
        return f"{lark.mark(ALL_BEGIN)} {call}{'+' if parallel else ''} {lark.mark(ALL_END)}"

    def own_id(self, call: Call, number: int) -> str:
        return call.id if _ID.fullmatch(call.id) else f"functions.{call.name}:{number}"


FORMATS = (KimiK2,)
