"""Turns the tokens of an answer into events as they arrive.

    token id and text  ->  lexemes: text, marks  ->  states: thinking, answering, inside a call  ->  events

A *mark* is a marker of the model's format. If the tokenizer has a token for it, only that token is the mark, and the
same characters in ordinary tokens are text. Otherwise the mark is found in the text, wherever token boundaries fall,
and only text that could become a mark is held back. A call is reported when it is complete (decision 20). Text that
only looked like a call stays text: nothing is lost, and nothing raises. A call that the token limit cuts off is
reported as far as it goes, once its name is known, and gets no end event (decision 20).

Elsewhere: `format.py` defines formats; `block_format.py` parses blocks; each format's own file reads the inside of a
call.
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
    from argosy.prompt.tokenizer import Tokenizer

_BASE62 = string.digits + string.ascii_letters
SPACE = " \t\r\n"


class Mark(str):
    """A format's marker, kept distinct from the same characters as text."""

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
        pieces: the text of control tokens that are parts of spelled marks, even if they are hidden in text. Only these
            tokens are such parts, not the same characters as text.
        signs: what stands for these tokens in text until marks are found: surrogates, which no decoded text holds.
    """

    def __init__(self, marks: Sequence[str], tokenizer: Tokenizer, pieces: Sequence[str] = ()) -> None:
        self.ids: dict[int, Mark] = {}
        found = {tokenizer.control_id(piece): piece for piece in pieces}
        self.pieces = {token_id: piece for token_id, piece in found.items() if token_id is not None}
        spelled = []
        for mark in marks:
            token_id = tokenizer.control_id(mark)
            if token_id is None:
                spelled.append(mark)
            else:
                self.ids[token_id] = Mark(mark)
        self.spelled = tuple(spelled)
        self.signs = {token_id: chr(0xDC00 + at) for at, token_id in enumerate(self.pieces)}
        self._shown = {ord(sign): self.pieces[token_id] for token_id, sign in self.signs.items()}
        self._written: dict[str, Mark] = {}
        for mark in spelled:
            written = mark
            for code, piece in self._shown.items():
                written = written.replace(piece, chr(code))
            self._written[written] = Mark(mark)
        self._pattern = re.compile("|".join(map(re.escape, self._written))) if spelled else None

    def split(self, text: str, *, is_end: bool = False) -> tuple[list[str], str]:
        """Lexemes of `text` with signs, and an ending that may start a mark; at the end of an answer that ending is
        empty.
        """
        if self._pattern is None:
            return [self.shown(text)] if text else [], ""
        lexemes: list[str] = []
        at = 0
        for found in self._pattern.finditer(text):
            lexemes += [self.shown(text[at : found.start()]), self._written[found[0]]]
            at = found.end()
        rest = text[at:]
        num_held = 0 if is_end else longest_start(rest, tuple(self._written))
        lexemes.append(self.shown(rest[: len(rest) - num_held]))
        return [lexeme for lexeme in lexemes if lexeme], rest[len(rest) - num_held :]

    def shown(self, text: str) -> str:
        """Return `text` with the text of pieces instead of their signs."""
        return text.translate(self._shown) if self._shown else text


class Parser(ABC):
    """Parses one answer of a model. `push` each of its tokens, then `finish`."""

    def __init__(self, lexer: Lexer, tools: Sequence[Tool], *, is_reasoning: bool) -> None:
        """`is_reasoning`: the prompt itself opened the model's thoughts."""
        self._lexer = lexer
        self._tools = {tool.name: tool for tool in tools}
        self._is_reasoning = is_reasoning
        self._pending = ""  # text that may be the start of a mark
        self._events: list[Event] = []
        self._held_space: list[str] = []  # trailing white space so far: dropped if structure follows
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
            Events that are now certain: usually one, sometimes none or more.
        """
        mark = None if token_id is None else self._lexer.ids.get(token_id)
        if token_id is not None and token_id in self._lexer.signs:
            text = text.removesuffix(self._lexer.pieces[token_id]) + self._lexer.signs[token_id]
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
        """Return the remaining events once no more tokens come; `is_cut`: the token limit ended the answer."""
        self._is_cut = is_cut
        if is_cut and self._is_mark_of_call(self._lexer.shown(self._pending)):
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
            text = text.lstrip(SPACE)
        if not text:
            return
        self._drops_space = False
        said = text.rstrip(SPACE)
        if said:
            self._has_said = True
            held, self._held_space = self._held_space, []
            self._emit("".join([*held, said]))
        if len(said) < len(text):
            self._held_space.append(text[len(said) :])

    def _give_space(self) -> None:
        """Emit held-back white space, because no structure follows."""
        held, self._held_space = self._held_space, []
        if held:
            self._emit("".join(held))

    def _emit(self, text: str) -> None:
        self._events.append(ReasoningDelta(text) if self._is_reasoning else TextDelta(text))

    def _switch(self, *, is_reasoning: bool) -> None:
        """Record that structure was here."""
        self._is_reasoning = is_reasoning
        self._held_space = []
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


def new_call_id() -> str:
    """An id that cannot be guessed: a client that names it has seen the call."""
    return "call_" + "".join(secrets.choice(_BASE62) for _ in range(24))
