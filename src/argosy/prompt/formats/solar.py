"""Solar-Open: every part of an answer is a message with a mark for its kind.

    <|think|>thoughts<|end|><|begin|>assistant<|content|>text<|end|>
    <|think|>thoughts<|end|><|begin|>assistant<|tool_calls|><|tool_call:begin|>a1b2c3d4e5<|tool_call:name|>get_weather
    <|tool_call:args|>{"city": "Oslo"}<|tool_call:end|><|calls|>

The prompt ends with `<|begin|>assistant`. A call's id is ten small letters and digits.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from argosy.prompt.formats.block_format import BlockFormat, BlockParser, halves, inside_of
from argosy.prompt.formats.format import beginning_of_call, call_of, ends_inside_string
from argosy.prompt.formats.lark import Lark
from argosy.prompt.formats.parser import CutCall, FoundCall, Mark, Parser, Reading
from argosy.prompt.messages import Call
from argosy.prompt.tools import Tool

if TYPE_CHECKING:
    from argosy.config import Grammar
    from argosy.prompt.prompt import Prompt

MESSAGE, CONTENT, THINK, END = "<|begin|>", "<|content|>", "<|think|>", "<|end|>"
BEGIN, CALL_END = "<|tool_call:begin|>", "<|tool_call:end|>"
NAME, ARGUMENTS = "<|tool_call:name|>", "<|tool_call:args|>"
_ID = re.compile(r"[a-z0-9]{10}")


class Solar(BlockFormat):
    name = "solar"
    tokens = (BEGIN, ARGUMENTS)
    thinking = (THINK, END)
    blocks = {BEGIN: CALL_END}  # noqa: RUF012 (a ClassVar, declared in the base)
    sections = ("<|tool_calls|>", "<|calls|>")
    inside = (NAME, ARGUMENTS, MESSAGE)
    wrapping = ((CONTENT, END),)

    def parser(self, tools: Sequence[Tool] = (), prompt: Prompt | None = None) -> Parser:
        return _Parser(self, tools, is_reasoning=self.thoughts_in(prompt) == "open")

    def read(self, block: Sequence[str], tools: Mapping[str, Tool]) -> Reading:
        own_id, name, arguments = _parts(inside_of(block, CALL_END))
        call = call_of(name, arguments, tools, own_id)
        if call is None:
            return "more" if ends_inside_string(arguments) else None
        return [call]

    def read_cut(self, block: Sequence[str], tools: Mapping[str, Tool]) -> Sequence[FoundCall | CutCall]:
        own_id, name, arguments = _parts(inside_of(block, CALL_END))
        return beginning_of_call(name, arguments, tools, own_id)

    def _thoughts(self, lark: Lark, prompt: Prompt | None, *, is_exact: bool) -> str:
        thoughts = f'{lark.text_until(END)} {lark.mark(MESSAGE)} "assistant"'
        if self.thoughts_in(prompt) == "open":
            return thoughts
        return f"({lark.mark(THINK)} {thoughts})?"

    def _text(self, lark: Lark, form: Grammar) -> str:
        return f"{lark.mark(CONTENT)} {lark.form(form)}{self._unless_it_ends(lark, END)}"

    def _calls(self, lark: Lark, tools: Sequence[Tool], parallel: bool) -> str:
        own_id = lark.rule("/[a-z0-9]{10}/")
        bodies = " | ".join(
            lark.rule(f"{lark.literal(tool.name)} {lark.mark(ARGUMENTS)} {lark.arguments(tool)}")
            for tool in tools
        )
        call = lark.rule(f"{lark.mark(BEGIN)} {own_id} {lark.mark(NAME)} ({bodies}) {lark.mark(CALL_END)}")
        opened, closed = self.sections
        return f"{lark.mark(opened)} {call}{'+' if parallel else ''}{self._unless_it_ends(lark, closed)}"

    def _unless_it_ends(self, lark: Lark, mark: str) -> str:
        """The mark, unless it is the token that ends the answer."""
        return "" if self._tokenizer.control_id(mark) in self._tokenizer.eos_ids else f" {lark.mark(mark)}"

    def own_id(self, call: Call, number: int) -> str:
        return call.id if _ID.fullmatch(call.id) else hashlib.sha256(call.id.encode()).hexdigest()[:10]


class _Parser(BlockParser):
    """Omits the role with which a message begins."""

    _is_header = False

    def _take(self, lexeme: str) -> None:
        is_mark = isinstance(lexeme, Mark)
        if is_mark and lexeme == MESSAGE and self._block is None and not self._is_reasoning:
            self._is_header = True
            self._switch(is_reasoning=False)
        elif is_mark or not self._is_header:
            self._is_header = False
            super()._take(lexeme)


def _parts(block: Sequence[str]) -> tuple[str, str, str]:
    """The id, name and arguments of a call as far as they are there."""
    own_id, rest = halves(block, NAME) or ("", "")
    ends = [at for at, one in enumerate(block) if isinstance(one, Mark) and one == ARGUMENTS]
    if not ends:
        return own_id, "", ""
    name = rest[: len(rest) - len("".join(block[ends[0] :]))]
    return own_id.strip(), name.strip(), "".join(block[ends[0] + 1 :]).strip()


FORMATS = (Solar,)
