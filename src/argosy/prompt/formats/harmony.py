"""gpt-oss: messages on channels, some of them to a tool.

    <|channel|>analysis<|message|>thoughts<|end|>
    <|start|>assistant<|channel|>commentary to=functions.clock <|constrain|>json<|message|>{"city": "Oslo"}<|call|>
    <|start|>assistant<|channel|>final<|message|>the answer<|return|>

The prompt ends with `<|start|>assistant`, so an answer begins inside a header. The recipient may be in either half of
the header.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from argosy.prompt.formats.events import ReasoningDelta, TextDelta
from argosy.prompt.formats.format import Format, beginning_of_call, call_of
from argosy.prompt.formats.lark import Lark
from argosy.prompt.formats.parser import Lexer, Mark, Parser
from argosy.prompt.tools import Tool

if TYPE_CHECKING:
    from argosy.config import Grammar
    from argosy.prompt.prompt import Prompt

START, CHANNEL, CONSTRAIN, MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
END, CALL, RETURN = "<|end|>", "<|call|>", "<|return|>"
_RECIPIENT = re.compile(r"(?:^|\s)to=(\S+)")
_ROLE = "assistant"
_TO = " to=functions."


class Harmony(Format):
    name = "harmony"
    tokens = (START, CHANNEL, MESSAGE)

    def marks(self) -> Sequence[str]:
        return (START, CHANNEL, CONSTRAIN, MESSAGE, END, CALL, RETURN)

    def parser(self, tools: Sequence[Tool] = (), prompt: Prompt | None = None) -> Parser:
        return HarmonyParser(self.lexer, tools, is_inside=_is_inside(prompt))

    def _thoughts(self, lark: Lark, prompt: Prompt | None, *, is_exact: bool) -> str:
        head = f'{lark.mark(CHANNEL)} "analysis" {lark.mark(MESSAGE)}'
        return f'({head} {lark.text_until(END)} {lark.mark(START)} "{_ROLE}")?'

    def _calls(self, lark: Lark, tools: Sequence[Tool], parallel: bool) -> str:
        """One call, even where several are allowed: the turn ends with it."""
        bodies = " | ".join(
            lark.rule(
                f'"commentary to=functions.{tool.name} " {lark.mark(CONSTRAIN)} "json" {lark.mark(MESSAGE)} '
                f"{lark.arguments(tool)}"
            )
            for tool in tools
        )
        return f"{lark.mark(CHANNEL)} ({bodies})"

    def _lazy_calls(self, lark: Lark, tools: Sequence[Tool], parallel: bool) -> tuple[str, Sequence[str]]:
        """Constrain the answer from the recipient on, in either half of the header."""
        channel = f'({lark.mark(CHANNEL)} ("commentary" | "analysis"))?'
        kind = f'(" "? {lark.mark(CONSTRAIN)} "json" | " json")?'
        tail = lark.rule(f"{channel} {kind} {lark.mark(MESSAGE)}")
        bodies = " | ".join(
            lark.rule(f"{lark.literal(tool.name)} {tail} {lark.arguments(tool)}") for tool in tools
        )
        return f"{lark.literal(_TO)} ({bodies})", [_TO]

    def _begins_free(self, prompt: Prompt | None) -> bool:
        return _is_inside(prompt)

    def _free_stretches(self) -> tuple[Sequence[str], Sequence[str]]:
        """The body of a message."""
        return [MESSAGE], [START, CHANNEL]

    def _text(self, lark: Lark, form: Grammar) -> str:
        return f'{lark.mark(CHANNEL)} "final" {lark.mark(MESSAGE)} {lark.form(form)}'


def _is_inside(prompt: Prompt | None) -> bool:
    """Whether the answer begins inside a message and continues it."""
    return prompt is not None and prompt.is_continued


class HarmonyParser(Parser):
    """Parses answers made of messages: a header up to `<|message|>`, then a body up to an end mark."""

    def __init__(self, lexer: Lexer, tools: Sequence[Tool], *, is_inside: bool = False) -> None:
        super().__init__(lexer, tools, is_reasoning=False)
        self._header: list[str] | None = None if is_inside else []  # None: outside a header
        self._call_for: str | None = None  # the tool that the current message is for
        self._call_header: list[str] = []  # header of that message
        self._call_body: list[str] = []
        # Kinds of messages with content so far: True for thoughts, False for text.
        self._said: set[bool] = {False} if is_inside else set()
        self._is_new = False  # the current message has no content yet

    def _take(self, lexeme: str) -> None:
        if not isinstance(lexeme, Mark):
            self._take_text(lexeme)
        elif lexeme == START or (lexeme == CHANNEL and self._header is None and self._call_for is None):
            self._close()
            self._header = [] if lexeme == START else [lexeme]
        elif lexeme in (END, CALL, RETURN):
            self._close(lexeme)
        elif self._header is not None and lexeme == MESSAGE:
            self._open(self._header)
        else:
            self._take_text(lexeme)

    def _take_text(self, lexeme: str) -> None:
        if self._header is not None:
            self._header.append(lexeme)
        elif self._call_for is not None:
            self._call_body.append(lexeme)
        else:
            self._say(lexeme)

    def _open(self, header: list[str]) -> None:
        at = next((at for at, part in enumerate(header) if isinstance(part, Mark) and part == CHANNEL), None)
        channel = [] if at is None else "".join(header[at + 1 :]).split()
        recipient = _RECIPIENT.search("".join(" " if isinstance(part, Mark) else part for part in header))
        name = None if recipient is None else recipient[1].removeprefix("functions.")
        self._header = None
        if name in self._tools:
            self._call_for, self._call_header, self._call_body = name, header, []
            return
        self._begin(is_reasoning=recipient is None and channel[:1] == ["analysis"])
        if recipient is not None:  # a message to an unknown recipient
            self._say("".join([*header, MESSAGE]))

    def _begin(self, *, is_reasoning: bool) -> None:
        """Begin a message in which every character counts, including white space at its ends."""
        self._switch(is_reasoning=is_reasoning)
        self._drops_space = False
        self._is_new = True

    def _close(self, end: str = "") -> None:
        """End a message, or a header without a message."""
        if self._is_cut and (self._header is not None or self._call_for is not None):
            for call in beginning_of_call(self._call_for or "", "".join(self._call_body), self._tools):
                self._call(call)
        elif self._header is not None:
            broken = "".join(self._header)
            if broken.strip() not in ("", _ROLE):
                self._say(broken)
        elif self._call_for is not None:
            found = call_of(self._call_for, "".join(self._call_body).strip(), self._tools)
            if found is None:
                self._begin(is_reasoning=False)
                self._say("".join([*self._call_header, MESSAGE, *self._call_body, end]))
            else:
                self._call(found)
        self._call_for = None
        self._give_space()
        self._header = None

    def _emit(self, text: str) -> None:
        """Join messages of one kind as paragraphs of one text."""
        if self._is_new and self._is_reasoning in self._said:
            text = f"\n\n{text}"
        self._is_new = False
        self._said.add(self._is_reasoning)
        self._events.append(ReasoningDelta(text) if self._is_reasoning else TextDelta(text))

    def _end(self) -> None:
        self._close()


FORMATS = (Harmony,)
