"""Turns the tokens of an answer into events as they come.

    token id and text  ->  lexemes: text, marks  ->  states: thinking, answering, inside a call  ->  events

A *mark* is a marker of the model's format. If the tokenizer has a token for it, only that token is the mark, and the
same characters in ordinary tokens are text. Otherwise the mark is found in the text, wherever token boundaries fall,
and only text that could become a mark is held back. A call is reported when it is complete (decision 14). Text that
only looked like a call stays text: nothing is lost, and nothing raises. A call that the token limit cut off is reported
as far as it goes, once its name is known, and gets no end event (decision 24).

Elsewhere: `format.py` defines formats; each format's own file reads the inside of a call.
"""

from __future__ import annotations

import re
import secrets
import string
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from argosy.prompt.formats.events import (
    Event,
    ReasoningDelta,
    TextDelta,
    ToolCallArguments,
    ToolCallBegin,
    ToolCallEnd,
)
from argosy.prompt.json_text import write_json
from argosy.prompt.stop import longest_start
from argosy.prompt.tools import Tool

if TYPE_CHECKING:
    from argosy.prompt.formats.format import BlockFormat
    from argosy.prompt.tokenizer import Tokenizer

_BASE62 = string.digits + string.ascii_letters
_SPACE = " \t\r\n"
_MOST_UNREAD = 64  # closing marks inside one call: each one has the call read again, so they have to be few


class Mark(str):
    """A marker of a format, as it is spelled, kept distinct from the same characters as text."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class FoundCall:
    """A call as a format read it."""

    name: str
    arguments: Mapping[str, object]
    own_id: str | None = None


@dataclass(frozen=True, slots=True)
class CutCall:
    """A call that the token limit cut off; `arguments` is the start of the JSON text of its arguments."""

    name: str
    arguments: str
    own_id: str | None = None


Reading = list[FoundCall] | Literal["more"] | None
"""Calls; or "more" if the closing mark is part of a value, so the call goes on; or None if this is not a call."""


class Lexer:
    """Separates marks from text.

    Attributes:
        ids: token ids that are marks.
        spelled: marks without a token.
    """

    def __init__(self, marks: Sequence[str], tokenizer: Tokenizer) -> None:
        self.ids: dict[int, Mark] = {}
        spelled = []
        for mark in marks:
            token_id = tokenizer.control_id(mark)
            if token_id is None:
                spelled.append(mark)
            else:
                self.ids[token_id] = Mark(mark)
        self.spelled = tuple(spelled)
        self._pattern = re.compile("|".join(map(re.escape, spelled))) if spelled else None

    def split(self, text: str, *, is_end: bool = False) -> tuple[list[str], str]:
        """Lexemes of `text`, and an ending that may start a mark; at the end of an answer that ending is empty."""
        if self._pattern is None:
            return [text] if text else [], ""
        lexemes: list[str] = []
        at = 0
        for found in self._pattern.finditer(text):
            lexemes += [text[at : found.start()], Mark(found[0])]
            at = found.end()
        rest = text[at:]
        num_held = 0 if is_end else longest_start(rest, self.spelled)
        lexemes.append(rest[: len(rest) - num_held])
        return [lexeme for lexeme in lexemes if lexeme], rest[len(rest) - num_held :]


class Parser(ABC):
    """Parses one answer of a model. `push` each of its tokens, then `finish`."""

    def __init__(self, lexer: Lexer, tools: Sequence[Tool], *, is_reasoning: bool) -> None:
        """`is_reasoning`: the prompt itself opened the model's thoughts."""
        self._lexer = lexer
        self._tools = {tool.name: tool for tool in tools}
        self._is_reasoning = is_reasoning
        self._pending = ""  # text that may be the start of a mark
        self._events: list[Event] = []
        self._held_space = ""  # trailing white space so far: dropped if structure follows
        self._drops_space = is_reasoning  # just after structure
        self._num_calls = 0
        self._has_said = False  # any text or thoughts so far
        self._is_cut = False

    @property
    def is_reasoning(self) -> bool:
        """Whether the model is inside its thoughts."""
        return self._is_reasoning

    def push(self, token_id: int | None, text: str) -> list[Event]:
        """Take one token.

        Args:
            token_id: the token; None for text without one, such as the text that a `StreamDecoder` finishes with.
            text: the token's text from a `StreamDecoder`; it may be empty for a mark.

        Returns:
            Events that are now certain: often one, sometimes none or more.
        """
        mark = None if token_id is None else self._lexer.ids.get(token_id)
        if mark is None:
            lexemes, self._pending = self._lexer.split(self._pending + text)
        else:
            lexemes, _ = self._lexer.split(self._pending + text.removesuffix(mark), is_end=True)
            lexemes.append(mark)
            self._pending = ""
        for lexeme in lexemes:
            self._take(lexeme)
        return self._out()

    def finish(self, *, is_cut: bool = False) -> list[Event]:
        """Returns the remaining events once no more tokens come; `is_cut`: the token limit ended the answer."""
        self._is_cut = is_cut
        if is_cut and self._is_mark_of_call(self._pending):
            self._pending = ""
        lexemes, self._pending = self._lexer.split(self._pending, is_end=True)
        for lexeme in lexemes:
            self._take(lexeme)
        self._end()
        self._give_space()
        return self._out()

    @abstractmethod
    def _take(self, lexeme: str) -> None:
        """Take text or a `Mark`."""

    @abstractmethod
    def _end(self) -> None:
        """Settle anything still open."""

    def _is_mark_of_call(self, start: str) -> bool:
        """Whether `start` begins a mark that belongs to a call."""
        return False

    def _out(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _say(self, text: str) -> None:
        """Add text to the answer or the thoughts, without white space next to structure."""
        if self._drops_space:
            text = text.lstrip(_SPACE)
        if not text:
            return
        self._drops_space = False
        text = self._held_space + text
        said = text.rstrip(_SPACE)
        self._held_space = text[len(said) :]
        if said:
            self._has_said = True
            self._emit(said)

    def _give_space(self) -> None:
        """Emit white space that was held back, if no structure follows."""
        held, self._held_space = self._held_space, ""
        if held:
            self._emit(held)

    def _emit(self, text: str) -> None:
        self._events.append(ReasoningDelta(text) if self._is_reasoning else TextDelta(text))

    def _switch(self, *, is_reasoning: bool) -> None:
        """Record that structure was here."""
        self._is_reasoning = is_reasoning
        self._held_space = ""
        self._drops_space = True

    def _call(self, call: FoundCall | CutCall) -> None:
        index = self._num_calls
        self._num_calls += 1
        self._events.append(ToolCallBegin(index, new_call_id(), call.name, call.own_id))
        if isinstance(call, FoundCall):
            self._events += [ToolCallArguments(index, write_json(call.arguments)), ToolCallEnd(index)]
        elif call.arguments:
            self._events.append(ToolCallArguments(index, call.arguments))
        self._switch(is_reasoning=False)


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

    def _take(self, lexeme: str) -> None:
        if self._block is not None:
            self._take_in_block(self._block, lexeme)
        elif self._is_reasoning and not self._is_settling:
            self._take_in_thoughts(lexeme)
        elif not isinstance(lexeme, Mark):
            if self._owed and not lexeme.strip(_SPACE):
                self._owed.append(lexeme)
            else:
                self._pay()
                self._say(lexeme)
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
        """Hold back a call inside thoughts; it counts if they never close: some models go from thoughts to a call."""
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
            self._block, self._owed, self._held_space = None, [], ""
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
            return True  # the text held back can only be the start of its closing mark
        opening = (*self._form.blocks, *self._form.sections) if self._tools else ()
        return len(start) > 1 and any(mark.startswith(start) for mark in opening)


def new_call_id() -> str:
    """An id that cannot be guessed: a client that names it has seen the call."""
    return "call_" + "".join(secrets.choice(_BASE62) for _ in range(24))
