"""Shows an answer in the terminal while it is generated."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Self

from argosy.cli.shared.output import DIM, NOT_DIM, FencedCode, Shown, Wait, has_colour, write_text

if TYPE_CHECKING:
    from argosy.engine.sequence import TokenEvent
    from argosy.prompt.formats import Answer, Event, Parser

_PROMPT_PATIENCE_S = 1.0  # a prompt that is done within this shows no progress on a terminal
_STOPPING = "stopping after this step …"


class AnswerWriter:
    """Shows an answer while it is generated: the text on stdout, the model's thoughts on stderr.

    Push every token inside a `with` block; after the block, `answer` is the whole answer.
    """

    def __init__(
        self,
        parser: Parser | None = None,
        *,
        shows_text: bool = True,
        shows_thoughts: bool,
        progress: Callable[[], Shown | None] | None = None,
        most_tokens: int | None = None,
    ) -> None:
        """Make a writer.

        Args:
            parser: separates thoughts from text; None treats every token as text.
            progress: the prompt's (`prompt_shown`), shown until the first token comes; None: not shown.
            most_tokens: the limit of an answer whose progress is shown instead of its text.
        """
        self._parser = parser
        self._most_tokens = most_tokens
        self._num_tokens = 0
        self._is_stopping = False
        self._is_inside_line = False
        self._shows_text = shows_text
        self._shows_thoughts = shows_thoughts
        self._is_dim = has_colour(sys.stderr)
        self._code = FencedCode() if has_colour(sys.stdout) else None
        self._is_thinking = False  # the last thing shown was a thought
        self._events: list[Event] = []
        self._progress = progress
        self._wait: Wait | None = None  # for the first token

    def __enter__(self) -> Self:
        if self._progress is not None:
            self._wait = Wait(self._read_progress, patience_s=_PROMPT_PATIENCE_S).__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._end_wait()
        if kind is None and self._parser is not None:
            self._take(self._parser.finish())
        self._end_thoughts()
        if self._code is not None:
            sys.stdout.write(self._code.finish())
            sys.stdout.flush()

    def begin(
        self,
        parser: Parser | None,
        progress: Callable[[], Shown | None],
        *,
        said: Sequence[Event] = (),
    ) -> None:
        """Set what depends on the model, before the `with` block; `said` is the beginning of the answer."""
        self._parser, self._progress = parser, progress
        self.replay(said)

    def replay(self, events: Sequence[Event]) -> None:
        """Take parts of an answer that were already shown, without showing them."""
        from argosy.prompt.formats import TextDelta

        self._events += events
        if self._code is not None:
            for event in events:
                self._code.push(event.text if isinstance(event, TextDelta) else "")

    def say_stopping(self) -> None:
        """Say that the answer ends after this step, which may take minutes. A signal handler may call this."""
        self._is_stopping = True
        if self._wait is not None and self._wait.is_drawn:
            return  # the bar says it
        lead = "\n" if self._is_inside_line else ""
        with suppress(RuntimeError):  # the signal came during another write
            sys.stderr.write(f"{lead}{_STOPPING}\n")
            sys.stderr.flush()
        self._is_inside_line = False

    def _read_progress(self) -> Shown | None:
        assert self._progress is not None
        if self._num_tokens and self._most_tokens:
            share = min(1.0, self._num_tokens / self._most_tokens)
            text = f"answer {self._num_tokens:,} of at most {self._most_tokens:,} tokens"
            return Shown(_STOPPING if self._is_stopping else text, share)
        shown = self._progress()
        return Shown(_STOPPING, shown.share) if shown is not None and self._is_stopping else shown

    def _end_wait(self) -> None:
        if self._wait is not None:
            self._wait.end()
            self._wait = None

    def push(self, token: TokenEvent) -> None:
        from argosy.prompt.formats import TextDelta

        self.note_token()
        if self._parser is not None:
            self._take(self._parser.push(token.token_id, token.text))
        elif token.text:
            self._take([TextDelta(token.text)])

    def show(self, event: Event) -> None:
        """Show a part of an answer that another program parsed."""
        self._take([event])

    def note_token(self) -> None:
        """Note that a token has come, so the prompt is done."""
        self._num_tokens += 1
        if self._most_tokens is None:
            self._end_wait()

    @property
    def answer(self) -> Answer:
        from argosy.prompt.formats import collect

        return collect(self._events)

    def _take(self, events: list[Event]) -> None:
        from argosy.prompt.formats import ReasoningDelta, TextDelta

        self._events += events
        for event in events:
            if isinstance(event, TextDelta) and self._shows_text:
                self._end_thoughts()
                write_text(event.text, code=self._code)
                self._is_inside_line = not event.text.endswith("\n")
            elif isinstance(event, ReasoningDelta) and self._shows_thoughts:
                self._begin_thoughts()
                write_text(event.text, sys.stderr)
                self._is_inside_line = not event.text.endswith("\n")

    def _begin_thoughts(self) -> None:
        if not self._is_thinking:
            self._is_thinking = True
            sys.stderr.write(f"{DIM if self._is_dim else ''}thinking: ")

    def _end_thoughts(self) -> None:
        if self._is_thinking:
            self._is_thinking = False
            sys.stderr.write(f"{NOT_DIM if self._is_dim else ''}\n\n")
            sys.stderr.flush()
