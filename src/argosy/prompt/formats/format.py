"""What a format is: how one family of models writes thoughts and tool calls.

    Format  ->  parser          an answer's tokens to events
            ->  grammar         what a model may say that has to call a tool, or to answer in some form
            ->  lazy_grammar    what it may say from the mark of a call on, while what comes before is free
            ->  own_id          the id that its template wants of a call

Elsewhere: the formats are one file each; which of them a model speaks is `table.py`; parsing is `parser.py`.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from argosy.config import Trigger
from argosy.errors import UsageError
from argosy.prompt.formats.lark import Lark
from argosy.prompt.formats.parser import BlockParser, CutCall, FoundCall, Lexer, Mark, Parser, Reading
from argosy.prompt.json_text import read_object
from argosy.prompt.messages import Call
from argosy.prompt.tools import Tool

if TYPE_CHECKING:
    from argosy.config import Grammar
    from argosy.prompt.prompt import Prompt
    from argosy.prompt.tokenizer import Tokenizer

_SPACE = " \t\r\n"
_ESCAPED = re.compile(r"\\.", re.DOTALL)

Thoughts = Literal["open", "closed", "either"]
"""Whether the prompt has opened the model's thoughts, or closed them, or leaves it to the model."""


class Format(ABC):
    """A format, with the tokens that one model's tokenizer has for its marks.

    Attributes:
        name: in the table of formats.
        thinking: the marks around thoughts.
        lexer: tells its marks from text.
    """

    name: ClassVar[str]
    thinking: ClassVar[tuple[str, str]] = ("<think>", "</think>")

    def __init__(self, tokenizer: Tokenizer) -> None:
        # Thoughts that are neither a token nor in the template are something that a model may write about.
        unknown = {
            mark
            for mark in self.thinking
            if tokenizer.control_id(mark) is None and mark not in (tokenizer.chat_template or "")
        }
        self.lexer = Lexer([mark for mark in self.marks() if mark not in unknown], tokenizer)
        self._tokenizer = tokenizer

    @classmethod
    @abstractmethod
    def marks(cls) -> Sequence[str]:
        """All marks of the format."""

    @abstractmethod
    def parser(self, tools: Sequence[Tool] = (), prompt: Prompt | None = None) -> Parser:
        """Reads one answer.

        Args:
            tools: those the model was told of; a call of another one is text.
            prompt: what the model answers, to see whether it has opened the model's thoughts.
        """

    def grammar(
        self,
        tools: Sequence[Tool],
        parallel: bool = True,
        prompt: Prompt | None = None,
        *,
        form: Grammar | None = None,
    ) -> str:
        """Lark text, in llguidance's syntax, of the answers that call tools as they ask to be called, or have a form.

        Thoughts may come first, where the model has them. The grammar ends with the last call, or with the form: the
        end of the turn is whatever ends this model's answers.

        Args:
            tools: those that may be called.
            parallel: more than one call may be made.
            prompt: what the model answers, to see whether it has opened or closed the model's thoughts.
            form: of an answer that calls nothing; None: a tool has to be called.

        Raises:
            UsageError: there is no tool to call, and no form.
        """
        if not tools and form is None:
            raise UsageError("tool_choice asks for a call, and there are no tools")
        lark = Lark(self.lexer)
        answers = [self._calls(lark, tools, parallel)] if tools else []
        if form is not None:
            answers.append(self._text(lark, form))
        answer = answers[0] if len(answers) == 1 else f"({' | '.join(answers)})"
        is_exact = form is not None and form.kind in ("regex", "lark")
        return lark.text(f"{self._thoughts(lark, prompt, is_exact=is_exact)} {answer}".strip())

    def lazy_grammar(
        self, tools: Sequence[Tool], parallel: bool = True, prompt: Prompt | None = None
    ) -> tuple[str, Trigger]:
        """Lark text of the calls of an answer that may call tools, and where it begins to be followed: at their mark.

        What comes before is free, and so are thoughts, in which a mark is none. Behind the calls the answer ends. Where
        one of the tools is strict, the grammar says which schemas may be left out: those of the others.
        """
        lark = Lark(self.lexer, frees_tools=any(tool.is_strict for tool in tools))
        calls, words = self._lazy_calls(lark, tools, parallel)
        pauses, resumes = self._free_stretches()
        return lark.text(calls), Trigger(
            tuple(map(self._word, words)),
            is_part=True,
            pauses=tuple(map(self._word, pauses)),
            resumes=tuple(map(self._word, resumes)),
            is_paused=self._begins_free(prompt),
        )

    def _begins_free(self, prompt: Prompt | None) -> bool:
        """Whether the answer begins in a stretch without calls."""
        return self.thoughts_in(prompt) == "open"

    def _word(self, mark: str) -> str | int:
        """`mark` as a trigger takes it: its token where it has one."""
        return next((token_id for token_id, known in self.lexer.ids.items() if known == mark), mark)

    def _free_stretches(self) -> tuple[Sequence[str], Sequence[str]]:
        """The marks that begin stretches without calls, and those that end them: of thoughts, where there are such."""
        known = {*self.lexer.spelled, *self.lexer.ids.values()}
        opened, closed = self.thinking
        return ([opened], [closed]) if opened in known and closed in known else ([], [])

    @abstractmethod
    def _lazy_calls(self, lark: Lark, tools: Sequence[Tool], parallel: bool) -> tuple[str, Sequence[str]]:
        """As `_calls`, and the marks with which it can begin."""

    def _text(self, lark: Lark, form: Grammar) -> str:
        """The expression for an answer that calls nothing."""
        return lark.form(form)

    @abstractmethod
    def _calls(self, lark: Lark, tools: Sequence[Tool], parallel: bool) -> str:
        """The expression for calls of `tools`; rules that it needs go to `lark`."""

    def _thoughts(self, lark: Lark, prompt: Prompt | None, *, is_exact: bool) -> str:
        """The expression for what may come before the calls, or a form; before an exact one no white space."""
        state = self.thoughts_in(prompt)
        if state == "closed":
            return ""
        opened, closed = self.thinking
        thought = f"{lark.text_until(closed)} {lark.space()}"
        if state == "open":
            return thought
        # Left to the model: only where thoughts begin with a token of their own, so that it can be told at once.
        space = "" if is_exact else lark.space()
        return f"{space} ({lark.mark(opened)} {thought})?" if lark.has_token(opened) else ""

    def thoughts_in(self, prompt: Prompt | None) -> Thoughts:
        """What the end of `prompt` makes of the model's thoughts."""
        if prompt is None:
            return "either"
        if prompt.is_continued:  # what is continued is text
            return "closed"
        opened, closed = self.thinking
        if self._ends_with(prompt, opened):
            return "open"
        return "closed" if self._ends_with(prompt, closed) else "either"

    def _ends_with(self, prompt: Prompt, mark: str) -> bool:
        """Whether `mark` is the last of a prompt but for white space."""
        if mark in self.lexer.spelled:
            return prompt.text.rstrip(_SPACE).endswith(mark)
        for token_id in reversed((prompt.token_ids or ())[-8:]):
            if token_id in self.lexer.ids:
                return self.lexer.ids[token_id] == mark
            if self._tokenizer.decode([token_id], keep_special=True).strip(_SPACE):
                return False
        return False

    def own_id(self, call: Call, number: int) -> str:
        """The id that the model's template wants of `call`, which is the `number`th of its conversation."""
        return call.id


class BlockFormat(Format):
    """How a family writes that calls tools in blocks, from one mark to another.

    Attributes:
        blocks: the mark that opens a call, or several, to the one that closes it; None: whatever comes next does.
        sections: marks around all calls, where there are such.
        inside: marks inside a block.
    """

    blocks: ClassVar[Mapping[str, str | None]]
    sections: ClassVar[tuple[str, ...]] = ()
    inside: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def marks(cls) -> Sequence[str]:
        closing = (mark for mark in cls.blocks.values() if mark is not None)
        return tuple(dict.fromkeys((*cls.thinking, *cls.blocks, *closing, *cls.sections, *cls.inside)))

    def parser(self, tools: Sequence[Tool] = (), prompt: Prompt | None = None) -> Parser:
        return BlockParser(self, tools, is_reasoning=self.thoughts_in(prompt) == "open")

    def _lazy_calls(self, lark: Lark, tools: Sequence[Tool], parallel: bool) -> tuple[str, Sequence[str]]:
        return self._calls(lark, tools, parallel), self.sections[:1] or tuple(self.blocks)

    @abstractmethod
    def read(self, block: Sequence[str], tools: Mapping[str, Tool]) -> Reading:
        """The calls of one block.

        Args:
            block: its lexemes, the mark that opens it first. The mark that closes it is last, unless the answer ended
                before, or there is none.
            tools: those that may be called, by name.
        """

    def read_cut(self, block: Sequence[str], tools: Mapping[str, Tool]) -> Sequence[FoundCall | CutCall]:
        """The calls of a block that the token limit cut; of the last one perhaps no more than its beginning."""
        return ()


def inside_of(block: Sequence[str], closing: str) -> list[str]:
    """A block's lexemes without the marks around it."""
    is_closed = isinstance(block[-1], Mark) and block[-1] == closing
    return list(block[1:-1] if is_closed else block[1:])


def halves(lexemes: Sequence[str], mark: str) -> tuple[str, str] | None:
    """Text before the first mark and all that is behind it, if it is `mark`."""
    for at, lexeme in enumerate(lexemes):
        if isinstance(lexeme, Mark):
            return ("".join(lexemes[:at]), "".join(lexemes[at + 1 :])) if lexeme == mark else None
    return None


def call_of(
    name: object, arguments: object, tools: Mapping[str, Tool], own_id: str | None = None
) -> FoundCall | None:
    """The call, if it is one of `tools` and its arguments are an object, or the JSON text of one, or left out."""
    if not isinstance(name, str) or name not in tools:
        return None
    if arguments is None or arguments == "":
        arguments = {}
    elif isinstance(arguments, str):
        arguments = read_object(arguments)
    return FoundCall(name, arguments, own_id) if isinstance(arguments, dict) else None


def beginning_of_call(
    name: str, arguments: str, tools: Mapping[str, Tool], own_id: str | None = None
) -> Sequence[FoundCall | CutCall]:
    """The call of which this is the beginning, if it is one of `tools`; whole if its arguments are."""
    if name not in tools:
        return ()
    whole = call_of(name, arguments, tools, own_id) if arguments.strip() else None
    return (whole or CutCall(name, arguments.strip(), own_id),)


def ends_inside_string(text: str) -> bool:
    """Whether JSON that goes like `text` is inside a string where it ends."""
    return _ESCAPED.sub("", text).count('"') % 2 == 1
