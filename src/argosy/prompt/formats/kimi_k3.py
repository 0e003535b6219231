"""Kimi-K3: sections between tags, whose brackets are control tokens and whose names are text.

    <|open|>think<|sep|>thoughts<|close|>think<|sep|><|open|>response<|sep|>text<|close|>response<|sep|>
    <|open|>tools<|sep|><|open|>call tool="get_weather" index="1"<|sep|>
    <|open|>argument key="city" type="string"<|sep|>Oslo<|close|>argument<|sep|>
    <|close|>call<|sep|><|close|>tools<|sep|><|close|>message<|sep|><|end_of_msg|>

without line breaks. The prompt opens the thoughts, or without thoughts the response.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from argosy.prompt.formats.block_format import BlockFormat, BlockParser
from argosy.prompt.formats.functions import Tags, read_cut_functions, read_functions
from argosy.prompt.formats.lark import Lark, ValueForm
from argosy.prompt.formats.parser import CutCall, FoundCall, Mark, Parser, Reading
from argosy.prompt.tools import Tool, types_of

if TYPE_CHECKING:
    from argosy.prompt.formats.format import Thoughts
    from argosy.prompt.prompt import Prompt

OPEN, CLOSE, SEP = "<|open|>", "<|close|>", "<|sep|>"
CALL, CALL_END = f'{OPEN}call tool="', f"{CLOSE}call{SEP}"
ARGUMENT_END = f"{CLOSE}argument{SEP}"
RESPONSE, RESPONSE_END = f"{OPEN}response{SEP}", f"{CLOSE}response{SEP}"
MESSAGE_END = f"{CLOSE}message{SEP}"
_TAGS = Tags(
    function=re.compile(rf'{re.escape(CALL)}([^"\n]+)"[^<]{{0,64}}{re.escape(SEP)}'),
    function_end=CALL_END,
    parameter=re.compile(
        rf'{re.escape(OPEN)}argument key="([^"\n]{{1,256}})"(?: type="[a-z]{{1,16}}")?{re.escape(SEP)}'
    ),
    parameter_end=ARGUMENT_END,
    line_around_values=False,
)


class KimiK3(BlockFormat):
    name = "kimi_k3"
    tokens = (OPEN, CLOSE, SEP, "<|end_of_msg|>")
    pieces = (OPEN, CLOSE, SEP)
    thinking = (f"{OPEN}think{SEP}", f"{CLOSE}think{SEP}")
    spells_thoughts = True
    wrapping = ((RESPONSE, RESPONSE_END),)
    blocks = {CALL: CALL_END}  # noqa: RUF012 (a ClassVar, declared in the base)
    sections = (f"{OPEN}tools{SEP}", f"{CLOSE}tools{SEP}")
    inside = (MESSAGE_END,)

    def parser(self, tools: Sequence[Tool] = (), prompt: Prompt | None = None) -> Parser:
        is_wrapped = prompt is not None and self._ends_with(prompt, RESPONSE)
        return _Parser(self, tools, is_reasoning=self.thoughts_in(prompt) == "open", is_wrapped=is_wrapped)

    def thoughts_in(self, prompt: Prompt | None) -> Thoughts:
        if prompt is not None and self._ends_with(prompt, RESPONSE):
            return "closed"
        return super().thoughts_in(prompt)

    def read(self, block: Sequence[str], tools: Mapping[str, Tool]) -> Reading:
        return read_functions("".join(block), _TAGS, tools)

    def read_cut(self, block: Sequence[str], tools: Mapping[str, Tool]) -> Sequence[FoundCall | CutCall]:
        return read_cut_functions("".join(block), _TAGS, tools)

    def _calls(self, lark: Lark, tools: Sequence[Tool], parallel: bool) -> str:
        number = lark.rule("/[0-9]{1,4}/")
        bodies = " | ".join(
            lark.rule(
                f"{lark.literal(f'{CALL}{tool.name}')} {lark.literal(chr(34) + ' index=' + chr(34))} {number} "
                f"{lark.literal(chr(34) + SEP)} {self._arguments(lark, tool)} {lark.literal(CALL_END)}"
            )
            for tool in tools
        )
        opened, closed = self.sections
        return f"{lark.mark(opened)} ({bodies}){'+' if parallel else ''} {lark.mark(closed)}"

    @staticmethod
    def _arguments(lark: Lark, tool: Tool) -> str:
        """The arguments in the order of the tool's parameters; a string is bare text, all else is JSON."""
        parts = []
        whole = {key: tool.parameters[key] for key in ("$defs", "definitions") if key in tool.parameters}
        for name, schema in tool.properties.items():
            forms = []
            for kind in sorted(types_of(schema, tool.parameters) or {"string"}):
                written = "number" if kind == "integer" else kind
                form = ValueForm([f'{OPEN}argument key="{{}}" type="{written}"{SEP}'], ARGUMENT_END)
                if kind == "string":
                    value = lark.bare_value(schema, tool, form, types={"string"})
                else:
                    given = dict(schema) if isinstance(schema, Mapping) else {}
                    value = f"{lark.json({**whole, **given, 'type': kind}, tool)} {form.after(lark)}"
                forms.append(f"{form.before(lark, name)} {value}")
            part = f"({' | '.join(dict.fromkeys(forms))})"
            parts.append(part if name in tool.required else f"{part}?")
        return " ".join(parts)


class _Parser(BlockParser):
    """Omits the end of the message, and knows a response that the prompt opened."""

    def __init__(self, form: KimiK3, tools: Sequence[Tool], *, is_reasoning: bool, is_wrapped: bool) -> None:
        super().__init__(form, tools, is_reasoning=is_reasoning)
        self._wrapped_until = RESPONSE_END if is_wrapped else None

    def _take(self, lexeme: str) -> None:
        if self._block is None and isinstance(lexeme, Mark) and lexeme == MESSAGE_END:
            return
        super()._take(lexeme)


FORMATS = (KimiK3,)
