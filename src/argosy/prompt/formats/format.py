"""Defines a format: how one family of models writes thoughts and tool calls.

    Format  ->  parser          turns an answer's tokens into events
            ->  grammar         for an answer that must call a tool or have a given form
            ->  lazy_grammar    constrains an answer from a call's mark on; the text before is unconstrained
            ->  own_id          the id that the model's template expects for a call

Elsewhere: `block_format.py` is the common base of most formats; each format has its own file; `table.py` finds a
model's format; `parser.py` parses.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from argosy.config import Trigger
from argosy.prompt.formats.lark import Lark
from argosy.prompt.formats.parser import SPACE, CutCall, FoundCall, Lexer, Parser
from argosy.prompt.json_text import read_object
from argosy.prompt.messages import Call
from argosy.prompt.tools import Tool, require_tools

if TYPE_CHECKING:
    from argosy.config import Grammar, TriggerWord
    from argosy.prompt.prompt import Prompt
    from argosy.prompt.tokenizer import Tokenizer

_ESCAPED = re.compile(r"\\.", re.DOTALL)

Thoughts = Literal["open", "closed", "either"]
"""Whether the prompt opened the model's thoughts, closed them, or leaves them to the model."""


class Format(ABC):
    """A format, with one tokenizer's tokens for its marks.

    Attributes:
        name: its name in the table of formats.
        thinking: the marks around thoughts.
        spells_thoughts: these marks count even if they are neither tokens nor in the chat template.
        tokens, words: the evidence that a model writes this format: control tokens of its vocabulary, and what its chat
            template says.
        pieces: control tokens that are parts of spelled marks.
        wrapping: pairs of marks around the text of an answer, which are not part of it.
        lexer: separates marks from text.
    """

    name: ClassVar[str]
    thinking: tuple[str, str] = ("<think>", "</think>")
    spells_thoughts: ClassVar[bool] = False
    tokens: ClassVar[tuple[str, ...]] = ()
    words: ClassVar[tuple[str, ...]] = ()
    pieces: ClassVar[tuple[str, ...]] = ()
    wrapping: ClassVar[tuple[tuple[str, str], ...]] = ()

    @classmethod
    def fits(cls, tokenizer: Tokenizer, template: str) -> bool:
        """Whether a model with this tokenizer and chat template shows all the evidence of this format."""
        has_tokens = all(tokenizer.control_id(token) is not None for token in cls.tokens)
        return has_tokens and all(word in template for word in cls.words)

    def __init__(self, tokenizer: Tokenizer) -> None:
        # Marks around thoughts or text that are neither a token nor in the template are text that a model may write.
        thinking = () if self.spells_thoughts else self.thinking
        unknown = {
            mark
            for mark in (*thinking, *(mark for pair in self.wrapping for mark in pair))
            if tokenizer.control_id(mark) is None
            and mark not in (tokenizer.chat_template or "")
            and not mark.startswith(self.pieces)
        }
        self.lexer = Lexer([mark for mark in self.marks() if mark not in unknown], tokenizer, self.pieces)
        self._tokenizer = tokenizer

    @abstractmethod
    def marks(self) -> Sequence[str]:
        """All marks of the format."""

    @abstractmethod
    def parser(self, tools: Sequence[Tool] = (), prompt: Prompt | None = None) -> Parser:
        """Return a parser for one answer.

        Args:
            tools: the tools that the model was given; a call of any other is text.
            prompt: the prompt being answered; it shows whether the model's thoughts are already open.
        """

    def grammar(
        self,
        tools: Sequence[Tool],
        parallel: bool = True,
        prompt: Prompt | None = None,
        *,
        form: Grammar | None = None,
    ) -> str:
        """The grammar, in llguidance's Lark, for answers that call tools in this format or have a given form.

        Thoughts may come first, if the model has them. The grammar ends with the last call or with the form; the turn
        then ends with the model's end token.

        Args:
            tools: the tools that may be called.
            parallel: more than one call may be made.
            prompt: the prompt being answered; it shows whether it opened or closed the model's thoughts.
            form: the grammar for an answer without calls; None: a tool must be called.

        Raises:
            UsageError: there is no tool to call, and no form.
        """
        if form is None:
            require_tools(tools)
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
        """The grammar for calls in an answer that may call tools, and its trigger, which is a call's mark.

        The text before a call is unconstrained, as are thoughts, in which marks do not count. After the calls the
        answer ends. If a tool is strict, the grammar marks the schemas of the others as droppable.
        """
        lark = Lark(self.lexer, drops_schemas=True, frees_tools=any(tool.is_strict for tool in tools))
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
        """Whether the answer begins in a stretch where calls do not count."""
        return self.thoughts_in(prompt) == "open"

    def _word(self, mark: str) -> TriggerWord:
        """`mark` as a trigger word, in which its tokens stand by their ids."""
        ids = {known: token_id for token_id, known in (self.lexer.pieces | self.lexer.ids).items()}
        pieces = "|".join(map(re.escape, self.lexer.pieces.values()))
        parts = filter(None, re.split(f"({pieces})", mark)) if pieces else [mark]
        word = tuple(ids.get(part, part) for part in parts)
        return word if len(word) > 1 else word[0]

    def _free_stretches(self) -> tuple[Sequence[str], Sequence[str]]:
        """The marks that begin and end stretches where calls do not count: those of thoughts, if the model has any."""
        known = {*self.lexer.spelled, *self.lexer.ids.values()}
        opened, closed = self.thinking
        return ([opened], [closed]) if opened in known and closed in known else ([], [])

    @abstractmethod
    def _lazy_calls(self, lark: Lark, tools: Sequence[Tool], parallel: bool) -> tuple[str, Sequence[str]]:
        """Like `_calls`, plus the marks with which calls can begin."""

    def _text(self, lark: Lark, form: Grammar) -> str:
        """The expression for an answer without calls."""
        return lark.form(form)

    @abstractmethod
    def _calls(self, lark: Lark, tools: Sequence[Tool], parallel: bool) -> str:
        """The expression for calls of `tools`; it adds the rules that it needs to `lark`."""

    def _thoughts(self, lark: Lark, prompt: Prompt | None, *, is_exact: bool) -> str:
        """The expression for thoughts before the calls or a form; it allows no white space before an exact form."""
        state = self.thoughts_in(prompt)
        if state == "closed":
            return ""
        opened, closed = self.thinking
        thought = f"{lark.text_until(closed)} {lark.space()}"
        if state == "open":
            return thought
        # If thinking is left to the model, thoughts are allowed only if their mark is a token, so that they are
        # recognized at once.
        space = "" if is_exact else lark.space()
        return f"{space} ({lark.mark(opened)} {thought})?" if lark.has_token(opened) else ""

    def thoughts_in(self, prompt: Prompt | None) -> Thoughts:
        """Whether the end of `prompt` leaves the model's thoughts open, closed, or undecided."""
        if prompt is None:
            return "either"
        if prompt.is_continued:  # the answer continues text
            return "closed"
        opened, closed = self.thinking
        if self._ends_with(prompt, opened):
            return "open"
        return "closed" if self._ends_with(prompt, closed) else "either"

    def _ends_with(self, prompt: Prompt, mark: str) -> bool:
        """Whether `mark` ends a prompt, apart from white space."""
        if mark in self.lexer.spelled:
            return prompt.text.rstrip(SPACE).endswith(mark)
        for token_id in reversed((prompt.token_ids or ())[-8:]):
            if token_id in self.lexer.ids:
                return self.lexer.ids[token_id] == mark
            if self._tokenizer.decode([token_id], keep_special=True).strip(SPACE):
                return False
        return False

    def own_id(self, call: Call, number: int) -> str:
        """The id that the model's template expects for `call`, the `number`th call of its conversation."""
        return call.id


def call_of(
    name: object, arguments: object, tools: Mapping[str, Tool], own_id: str | None = None
) -> FoundCall | None:
    """The call, if it names one of `tools` and its arguments are an object, the JSON text of one, or absent."""
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
    """The call that starts like this, if it names one of `tools`; it is complete if its arguments are."""
    if name not in tools:
        return ()
    whole = call_of(name, arguments, tools, own_id) if arguments.strip() else None
    return (whole or CutCall(name, arguments.strip(), own_id),)


def ends_inside_string(text: str) -> bool:
    """Whether `text`, the start of some JSON, ends inside a string."""
    return _ESCAPED.sub("", text).count('"') % 2 == 1
