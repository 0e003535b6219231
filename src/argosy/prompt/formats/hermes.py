"""Hermes, Qwen2.5 and Qwen3: a JSON object with name and arguments.

<tool_call>
{"name": "get_weather", "arguments": {"city": "Oslo"}}
</tool_call>

ERNIE-4.5's thinking models put marks around their text. Youtu and K-EXAONE break no lines within a call.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from argosy.prompt.formats.block_format import BlockFormat, inside_of
from argosy.prompt.formats.format import call_of, ends_inside_string
from argosy.prompt.formats.json_list import beginning_of_named_object
from argosy.prompt.formats.lark import Lark
from argosy.prompt.formats.parser import CutCall, FoundCall, Reading
from argosy.prompt.json_text import read_object
from argosy.prompt.tools import Tool

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_ON_ONE_LINE = re.compile(rf'{OPEN}{{\\?"name')  # in a template


class Hermes(BlockFormat):
    name = "hermes"
    words = (OPEN,)
    wrapping = (("<response>", "</response>"),)
    blocks = {OPEN: CLOSE}  # noqa: RUF012 (a ClassVar, declared in the base)

    def read(self, block: Sequence[str], tools: Mapping[str, Tool]) -> Reading:
        text = "".join(inside_of(block, CLOSE))
        said = read_object(text)
        if said is None:
            return "more" if ends_inside_string(text) else None
        call = call_of(said.get("name"), said.get("arguments", said.get("parameters")), tools)
        return None if call is None else [call]

    def read_cut(self, block: Sequence[str], tools: Mapping[str, Tool]) -> Sequence[FoundCall | CutCall]:
        calls = self.read(block, tools)
        if isinstance(calls, list):
            return calls
        return beginning_of_named_object("".join(inside_of(block, CLOSE)), tools)

    def _calls(self, lark: Lark, tools: Sequence[Tool], parallel: bool) -> str:
        bodies = " | ".join(lark.rule(named_object(lark, tool)) for tool in tools)
        is_one_line = _ON_ONE_LINE.search(self._tokenizer.chat_template or "") is not None
        line, between = ("", '"\\n"?') if is_one_line else ('"\\n"', '"\\n"')
        call = lark.rule(f"{lark.mark(OPEN)} {line} ({bodies}) {line} {lark.mark(CLOSE)}")
        return f"{call} ({between} {call})*" if parallel else call


def named_object(lark: Lark, tool: Tool) -> str:
    """{"name": ..., "arguments": {...}}, with the spacing that models were trained on."""
    head = lark.literal(f'{{"name": "{tool.name}", "arguments": ')
    return f'{head} {lark.arguments(tool)} "}}"'


FORMATS = (Hermes,)
