"""Output shared by several commands: ledgers, plans, progress, text from a model."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Self, TextIO

from argosy.config import format_bytes
from argosy.errors import UsageError

if TYPE_CHECKING:
    from argosy.engine.ledger import Ledger
    from argosy.engine.memory_plan import MemoryPlan
    from argosy.engine.sequence import TokenEvent
    from argosy.prompt.formats import Answer, Event, Parser

Progress = Callable[[str, float], None]

# Text from a model must not control the terminal.
_CONTROLS = {
    code: "\N{REPLACEMENT CHARACTER}"
    for code in (*range(0x20), *range(0x7F, 0xA0))
    if chr(code) not in "\n\t"
}

_DIM, _NOT_DIM = "\x1b[2m", "\x1b[22m"


def write_text(text: str, stream: TextIO | None = None) -> None:
    """Show a model's text as it is generated; on a terminal, control characters become U+FFFD."""
    stream = sys.stdout if stream is None else stream
    stream.write(text.translate(_CONTROLS) if stream.isatty() else text)
    stream.flush()


def write_file(path: Path, text: str) -> None:
    """Write a file that the command line names.

    Raises:
        UsageError: it cannot be written.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from error


class AnswerWriter:
    """Shows an answer while it is generated: the text on stdout, the model's thoughts on stderr.

    Push every token inside a `with` block; after the block, `answer` is the whole answer.
    """

    def __init__(self, parser: Parser | None, *, shows_text: bool = True, shows_thoughts: bool) -> None:
        """`parser` separates thoughts from text; None treats every token as text."""
        self._parser = parser
        self._shows_text = shows_text
        self._shows_thoughts = shows_thoughts
        self._is_dim = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
        self._is_thinking = False  # the last thing shown was a thought
        self._events: list[Event] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._parser is not None:
            self._take(self._parser.finish())
        self._end_thoughts()

    def push(self, token: TokenEvent) -> None:
        from argosy.prompt.formats import TextDelta

        if self._parser is not None:
            self._take(self._parser.push(token.token_id, token.text))
        elif token.text:
            self._take([TextDelta(token.text)])

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
                write_text(event.text)
            elif isinstance(event, ReasoningDelta) and self._shows_thoughts:
                self._begin_thoughts()
                write_text(event.text, sys.stderr)

    def _begin_thoughts(self) -> None:
        if not self._is_thinking:
            self._is_thinking = True
            sys.stderr.write(f"{_DIM if self._is_dim else ''}thinking: ")

    def _end_thoughts(self) -> None:
        if self._is_thinking:
            self._is_thinking = False
            sys.stderr.write(f"{_NOT_DIM if self._is_dim else ''}\n\n")
            sys.stderr.flush()


def short_number(value: float, digits: int = 2) -> str:
    """Format a number with `digits` significant digits, or with its whole integer part if that is longer."""
    if value >= 10**digits:
        return f"{value:.0f}"
    return f"{value:.{digits}g}"


def ledger_lines(
    ledger: Ledger, plan: MemoryPlan | None = None, finish_reason: str | None = None
) -> list[str]:
    """The use of memory and time as lines of text."""
    ended = f", {finish_reason}" if finish_reason else ""
    found = f" ({ledger.cached_tokens} from the prefix cache)" if ledger.cached_tokens else ""
    lines = [f"tokens   {ledger.prompt_tokens} prompt{found}, {ledger.new_tokens} new{ended}"]
    speed = [
        f"{rate:.1f} tok/s {what}"
        for what, rate in (("decode", ledger.decode_tok_per_s), ("prefill", ledger.prefill_tok_per_s))
        if rate is not None
    ]
    if ledger.time_to_first_token_s is not None:
        speed.append(f"first token after {ledger.time_to_first_token_s:.2f} s")
    if speed:
        lines.append("speed    " + ", ".join(speed))
    if ledger.hit_rate is not None:
        read = (
            f"{ledger.bytes_read / 1e9:.2f} GB"
            if ledger.bytes_read >= 1e9
            else f"{ledger.bytes_read / 1e6:.1f} MB"
        )
        lines.append(
            f"experts  hit rate {ledger.hit_rate:.2f} ({ledger.hits} of {ledger.lookups}), {read} read"
        )
    peak = f"memory   peak {'unknown' if ledger.peak_bytes is None else format_bytes(ledger.peak_bytes)}"
    lines.append(peak if plan is None else f"{peak}, planned {format_bytes(plan.total_bytes)}")
    if plan is not None:
        lines += plan_lines(plan)
    lines.append(f"time     {ledger.wall_s:.3f} s")
    lines += [
        f"  {part.replace('_', ' '):<20}{seconds:>10.3f} s"
        for part, seconds in ledger.parts.items()
        if seconds
    ]
    return lines


def plan_lines(plan: MemoryPlan) -> list[str]:
    return [
        f"  {label:<20}{format_bytes(count):>10}   {note}".rstrip() for label, count, note in plan.lines()
    ]


@contextmanager
def progress_bar() -> Iterator[Progress | None]:
    """A bar on stderr if it is a terminal, otherwise None."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading headers", total=1.0)
        yield lambda what, share: bar.update(task, description=what, completed=share)
