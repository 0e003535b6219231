"""Formats of families that call tools in blocks between two marks, and their parser.

Elsewhere: `format.py` defines formats in general; each family's own file reads the inside of a block.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from argosy.prompt.formats.format import Format
from argosy.prompt.formats.lark import Lark
from argosy.prompt.formats.parser import SPACE, CutCall, FoundCall, Mark, Parser, Reading
from argosy.prompt.tools import Tool

if TYPE_CHECKING:
    from argosy.config import Grammar
    from argosy.prompt.prompt import Prompt

# closing marks inside one call: each one makes the call be parsed again, so they must be few
_MOST_UNREAD = 64


class BlockFormat(Format):
    """The format of a family that calls tools in blocks between two marks.

    Attributes:
        blocks: maps the mark that opens one or several calls to the mark that closes them, or None if the next mark
            does.
        sections: marks around all calls, if the format has them.
        inside: marks inside a block.
    """

    blocks: Mapping[str, str | None]
    sections: tuple[str, ...] = ()
    inside: tuple[str, ...] = ()

    def marks(self) -> Sequence[str]:
        closing = (mark for mark in self.blocks.values() if mark is not None)
        others = (*self.sections, *self.inside, *(mark for pair in self.wrapping for mark in pair))
        return tuple(dict.fromkeys(filter(None, (*self.thinking, *self.blocks, *closing, *others))))

    def parser(self, tools: Sequence[Tool] = (), prompt: Prompt | None = None) -> Parser:
        return BlockParser(self, tools, is_reasoning=self.thoughts_in(prompt) == "open")

    def _lazy_calls(self, lark: Lark, tools: Sequence[Tool], parallel: bool) -> tuple[str, Sequence[str]]:
        return self._calls(lark, tools, parallel), self.sections[:1] or tuple(self.blocks)

    def _text(self, lark: Lark, form: Grammar) -> str:
        text = super()._text(lark, form)
        for opened, closed in self.wrapping:
            if lark.has_token(opened):
                return f"({lark.mark(opened)})? {text} ({lark.mark(closed)})?"
        return text

    @abstractmethod
    def read(self, block: Sequence[str], tools: Mapping[str, Tool]) -> Reading:
        """Parse the calls of one block.

        Args:
            block: its lexemes, starting with the opening mark and ending with the closing one, unless the answer
                ended first or the format has none.
            tools: the tools that may be called, by name.
        """

    def read_cut(self, block: Sequence[str], tools: Mapping[str, Tool]) -> Sequence[FoundCall | CutCall]:
        """Parse a block that the token limit cut off; its last call may be incomplete."""
        return ()


class BlockParser(Parser):
    """Parses answers in a `BlockFormat`."""

    def __init__(self, form: BlockFormat, tools: Sequence[Tool], *, is_reasoning: bool) -> None:
        super().__init__(form.lexer, tools, is_reasoning=is_reasoning)
        self._form = form
        self._block: list[str] | None = None  # lexemes, starting with the opening mark
        self._num_unread = 0  # closing marks in it that were part of a value
        self._owed: list[str] = []  # marks of a section without a call so far
        self._maybe: list[str] | None = None  # everything from a call inside thoughts on
        self._is_settling = False
        self._wrapped_until: str | None = None  # the mark that closes the marks around the text

    def _take(self, lexeme: str) -> None:
        if self._block is not None:
            self._take_in_block(self._block, lexeme)
        elif self._is_reasoning and not self._is_settling:
            self._take_in_thoughts(lexeme)
        elif not isinstance(lexeme, Mark):
            if self._owed and not lexeme.strip(SPACE):
                self._owed.append(lexeme)
            else:
                self._pay()
                self._say(lexeme)
        elif lexeme == self._wrapped_until or (
            lexeme in dict(self._form.wrapping) and (self._drops_space or not self._has_said)
        ):
            self._wrapped_until = dict(self._form.wrapping).get(lexeme)
            self._switch(is_reasoning=False)
        elif lexeme == self._form.thinking[0] and not (self._has_said and lexeme in self._lexer.spelled):
            self._pay()
            self._switch(is_reasoning=True)
        elif self._tools and lexeme in self._form.blocks:
            self._block = [lexeme]
        elif self._tools and lexeme in self._form.sections:
            if self._owed or not self._is_behind_call:
                self._owed.append(lexeme)
        elif lexeme not in self._form.blocks.values() or not self._is_behind_call:
            self._pay()
            self._say(lexeme)

    def _take_in_thoughts(self, lexeme: str) -> None:
        """Hold back a call inside thoughts; it counts if they never close, because some models go straight from
        thoughts to a call.
        """
        if lexeme == self._form.thinking[1] and isinstance(lexeme, Mark):
            for held in self._maybe or ():
                self._say(held)
            self._maybe = None
            self._switch(is_reasoning=False)
        elif self._maybe is not None:
            self._maybe.append(lexeme)
        elif (
            self._tools and isinstance(lexeme, Mark) and lexeme in (*self._form.blocks, *self._form.sections)
        ):
            self._maybe = [lexeme]
        else:
            self._say(lexeme)

    def _take_in_block(self, block: list[str], lexeme: str) -> None:
        closing = self._form.blocks[block[0]]
        is_mark = isinstance(lexeme, Mark)
        if closing is None and is_mark and lexeme in self._form.blocks:
            self._close(block)
            self._block = [lexeme]
            return
        block.append(lexeme)
        if is_mark and lexeme == closing:
            self._close(block)

    def _close(self, block: list[str], *, is_end: bool = False) -> None:
        if is_end and self._is_cut:
            self._block, self._owed, self._held_space = None, [], []
            for call in self._form.read_cut(block, self._tools):
                self._call(call)
            return
        calls = self._form.read(block, self._tools)
        if calls == "more" and not is_end:
            self._num_unread += 1
            if self._num_unread < _MOST_UNREAD:
                return
        self._block, self._num_unread = None, 0
        if calls and calls != "more":
            self._owed = []
            for call in calls:
                self._call(call)
        else:
            self._pay()
            self._say("".join(block))

    @property
    def _is_behind_call(self) -> bool:
        return self._num_calls > 0 and self._drops_space

    def _pay(self) -> None:
        owed, self._owed = self._owed, []
        if owed:
            self._say("".join(owed))

    def _end(self) -> None:
        if self._maybe is not None:
            held, self._maybe, self._is_settling = self._maybe, None, True
            if self._is_cut:  # nothing shows that its thoughts had ended
                self._say("".join(held))
                held = []
            for lexeme in held:
                self._take(lexeme)
        if self._block is not None:
            self._close(self._block, is_end=True)
        if self._is_cut:
            self._owed = []
        self._pay()

    def _is_mark_of_call(self, start: str) -> bool:
        if self._block is not None:
            return True  # text held back can only be the start of its closing mark
        opening = (*self._form.blocks, *self._form.sections) if self._tools else ()
        return len(start) > 1 and any(mark.startswith(start) for mark in opening)


def inside_of(block: Sequence[str], closing: str) -> list[str]:
    """A block's lexemes without the surrounding marks."""
    is_closed = isinstance(block[-1], Mark) and block[-1] == closing
    return list(block[1:-1] if is_closed else block[1:])


def halves(lexemes: Sequence[str], mark: str) -> tuple[str, str] | None:
    """The text before the first mark and everything after it, if that mark is `mark`."""
    for at, lexeme in enumerate(lexemes):
        if isinstance(lexeme, Mark):
            return ("".join(lexemes[:at]), "".join(lexemes[at + 1 :])) if lexeme == mark else None
    return None
