"""Output shared by several commands: ledgers, plans, progress, a model's text."""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self, TextIO

from argosy.config import counted, format_bytes
from argosy.errors import UsageError

if TYPE_CHECKING:
    from argosy.budget.memory_plan import MemoryPlan
    from argosy.engine.engine import Engine
    from argosy.engine.ledger import Ledger
    from argosy.forecast.forecast import Forecast

Progress = Callable[[str, float], None]

LINE_S = 60.0  # how often a wait is reported without a terminal
_PATIENCE_S = 0.3  # a terminal shows no progress for anything shorter
_REDRAW_S = 0.25
_CLEAR_S = 5.0  # time limit for clearing a bar
_LEAST_SHARE = 0.01  # progress needed before the remaining time is estimated

FITS = {  # verdict of a forecast -> text
    "no": "no",
    "thrashes": "barely: one token's experts do not stay for the next, so nearly every one is read again",
    "streams": "yes, it streams",
    "resident": "yes, with every expert in memory",
}
_FITS_WITHOUT_EXPERTS = "yes, with all weights in memory, because it has no experts that could stream"

# A model's text must not control the terminal or reorder the characters of a line.
_CONTROLS = {
    code: "\N{REPLACEMENT CHARACTER}"
    for code in (*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A))
    if chr(code) not in "\n\t"
}

_GAP = re.compile(r"(?<=\S) {2,}+")  # between a label and its value, or between two values
_LAST_COLUMN = 12  # narrowest last column of a table in which words are still readable

DIM, NOT_DIM = "\x1b[2m", "\x1b[22m"
_CODE, _NOT_CODE = "\x1b[36m", "\x1b[39m"


def fits_text(forecast: Forecast) -> str:
    """Return the verdict of a forecast in words."""
    has_experts = forecast.work.num_moe_layers > 0 or forecast.verdict == "no"
    return FITS[forecast.verdict] if has_experts else _FITS_WITHOUT_EXPERTS


def write_text(text: str, stream: TextIO | None = None, *, code: FencedCode | None = None) -> None:
    """Show a model's text as it is generated; on a terminal, control characters become U+FFFD.

    Args:
        code: marks the code in the text.
    """
    stream = sys.stdout if stream is None else stream
    shown = text.translate(_CONTROLS) if stream.isatty() else text
    stream.write(shown if code is None else code.push(shown))
    stream.flush()


class FencedCode:
    """Marks code between Markdown fences in a text that arrives in pieces: fences are dim, code is coloured.

    The beginning of a line is held until it is clear whether it is a fence.
    """

    # A fence is bounded, because the beginning of a line is scanned again with each token.
    _FENCE = re.compile(r" {0,3}(`{3,40}+|~{3,40}+)([^`\n]{0,40})\n?")
    _MAY_BE_FENCE = re.compile(r" {0,3}(?:`{0,2}|~{0,2}|(?:`{3,40}+|~{3,40}+)[^`\n]{0,40})")

    def __init__(self) -> None:
        self._held = ""  # the beginning of a line
        self._is_inside_line = False
        self._mark = ""  # the fence that opened the code; empty if none

    def push(self, text: str) -> str:
        """Take more text; return what can be shown."""
        shown: list[str] = []
        for part in re.findall(r"[^\n]+\n?|\n", text):
            if self._is_inside_line:
                shown.append(part)
            else:
                self._held += part
                if not part.endswith("\n") and self._MAY_BE_FENCE.fullmatch(self._held):
                    continue
                shown.append(self._line(self._held))
                self._held = ""
            self._is_inside_line = not part.endswith("\n")
        return "".join(shown)

    def finish(self) -> str:
        """Return what is left to show, ending the colour if the text ended inside code."""
        held, self._held = self._line(self._held), ""
        colour = _NOT_CODE if self._mark else ""
        self._mark = ""
        return held + colour

    def _line(self, line: str) -> str:
        found = self._FENCE.fullmatch(line)
        if found is None:
            return line
        mark, rest = found.groups()
        if not self._mark:
            self._mark = mark
            return f"{DIM}{line}{NOT_DIM}{_CODE}"
        if mark.startswith(self._mark) and not rest.strip():
            self._mark = ""
            return f"{_NOT_CODE}{DIM}{line}{NOT_DIM}"
        return line


def write_file(path: Path, text: str) -> None:
    """Write a file named on the command line.

    Raises:
        UsageError: it cannot be written.
    """
    try:
        # Opening a named pipe that nothing reads must not block.
        with open(
            path,
            "w",
            encoding="utf-8",
            opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK, 0o666),
        ) as file:
            os.set_blocking(file.fileno(), True)
            file.write(text)
    except OSError as error:
        reason = "nothing reads this pipe" if error.errno == errno.ENXIO else error.strerror
        raise UsageError(f"{path} cannot be written: {reason}") from error


def write_dim(text: str) -> None:
    """Show a line on stderr, dimmed if that is a terminal with colours."""
    marks = (DIM, NOT_DIM) if has_colour(sys.stderr) else ("", "")
    sys.stderr.write(marks[0])
    write_text(text, sys.stderr)
    sys.stderr.write(f"{marks[1]}\n")
    sys.stderr.flush()


def has_colour(stream: TextIO) -> bool:
    return stream.isatty() and not os.environ.get("NO_COLOR")


def terminal_width() -> int | None:
    """The width of stdout's terminal, or None if it is not a terminal: then lines keep their length."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def print_facts(lines: Iterable[str]) -> None:
    """Print lines of labels and values. On a terminal they wrap between words and continue below the value."""
    width = terminal_width()
    for line in lines:
        if width is None or len(line) <= width:
            print(line)
            continue
        indent = len(line) - len(line.lstrip())
        columns = [gap.end() for gap in _GAP.finditer(line) if gap.end() <= 3 * width // 5]
        print(*_parts(line, width, max(columns, default=min(indent, width // 2))), sep="\n")


def table_lines(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Collection[int] = ()
) -> list[str]:
    """Align cells in columns; on a narrow terminal, put each cell after its column's name instead.

    Args:
        right: right-aligned columns.
    """
    sizes = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    width = terminal_width()
    start = sum(sizes[:-1]) + 2 * (len(sizes) - 1)  # start of the last column, whose cells may wrap
    if width is None or start + min(sizes[-1], _LAST_COLUMN) <= width:
        lines = [
            "  ".join(
                cell.rjust(size) if at in right else cell.ljust(size)
                for at, (cell, size) in enumerate(zip(cells, sizes, strict=True))
            ).rstrip()
            for cells in (header, *rows)
        ]
        return lines if width is None else [part for line in lines for part in _parts(line, width, start)]
    lines = []
    for first, *others in rows:
        facts = [f"{name} {cell}" for name, cell in zip(header[1:], others, strict=True) if cell]
        # A no-break space keeps a name and its value together.
        kept = [fact.replace(" ", "\N{NO-BREAK SPACE}") if len(fact) + 2 <= width else fact for fact in facts]
        lines.append(f"{header[0]} {first.strip()}")
        lines += [
            part.replace("\N{NO-BREAK SPACE}", " ") for part in _parts("  " + "  ".join(kept), width, 2)
        ]
    return lines


def _parts(line: str, width: int, hanging: int) -> list[str]:
    """Wrap a line to `width` columns between words; all lines but the first begin at `hanging`."""
    return textwrap.wrap(
        line, width, subsequent_indent=" " * hanging, break_long_words=False, break_on_hyphens=False
    )


def parameter_count(number: int) -> str:
    """A number of parameters as people write it: `30.5 B`."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def time_span(seconds: float) -> str:
    """A duration in its largest whole unit, such as `3 hours`; below a minute, `42 s`."""
    for unit, size in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if (count := int(seconds) // size) >= 1:
            return counted(count, unit)
    return f"{max(0, int(seconds))} s"


def short_number(value: float, digits: int = 2) -> str:
    """Format a number with `digits` significant digits, or its integer part if that is longer."""
    if value >= 10**digits:
        return f"{value:.0f}"
    return f"{value:.{digits}g}"


def ledger_lines(
    ledger: Ledger,
    plan: MemoryPlan | None = None,
    finish_reason: str | None = None,
    *,
    co2_grams_per_kwh: float | None = None,
) -> list[str]:
    """Lines about the use of memory, time and energy.

    Args:
        co2_grams_per_kwh: emissions of the electricity used; None: unknown, and not shown.
    """
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
    if ledger.proposed_tokens:
        drafts = f"{ledger.confirmed_tokens} of {ledger.proposed_tokens} proposed tokens confirmed"
        if ledger.won_s is not None:
            drafts += f", {abs(ledger.won_s):.2f} s {'saved' if ledger.won_s >= 0 else 'lost'} (estimate)"
        lines.append("drafts   " + drafts)
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
    lines += _energy_lines(ledger, co2_grams_per_kwh)
    lines.append(f"time     {ledger.wall_s:.3f} s")
    lines += [
        f"  {part.replace('_', ' '):<20}{seconds:>10.3f} s"
        for part, seconds in ledger.parts.items()
        if seconds
    ]
    return lines


def _energy_lines(ledger: Ledger, co2_grams_per_kwh: float | None) -> list[str]:
    """The energy, where it is measured: the measurement, the estimate for the drive, then the sum."""
    total, drive, per_token = ledger.total_energy_j, ledger.drive_energy_j, ledger.j_per_token
    if total is None or drive is None or ledger.energy_j is None:
        return []
    line = f"energy   {short_number(ledger.energy_j, 3)} J measured"
    if drive[1]:
        line += f", drive about {short_number(drive[0])} to {short_number(drive[1])} J"
    if per_token is not None:
        line += f", {_range(per_token)} J for each token"
    if co2_grams_per_kwh is not None:
        from argosy.engine.energy import co2_grams

        line += f", {_range(co2_grams(total, co2_grams_per_kwh))} g CO2"
    return [line]


def _range(numbers: tuple[float, float]) -> str:
    low, high = (short_number(number) for number in numbers)
    return low if low == high else f"{low} to {high}"


def plan_lines(plan: MemoryPlan) -> list[str]:
    return [
        f"  {label:<20}{format_bytes(count):>10}   {note}".rstrip() for label, count, note in plan.lines()
    ]


class Shown(NamedTuple):
    """Progress to show for something slow: a text, the fraction done, and an estimate of the time left.

    share: None if unknown.
    """

    text: str
    share: float | None
    seconds_left: float | None = None

    @property
    def left(self) -> str:
        from argosy.engine.progress import rough_time

        if self.seconds_left is None or (self.share or 0.0) >= 0.995:  # this is shown as 100 %
            return ""
        return f"about {rough_time(self.seconds_left)} left"


def prompt_shown(engine: Engine) -> Callable[[], Shown | None]:
    """The current progress of an engine's only prompt."""

    def read() -> Shown | None:
        from argosy.engine.progress import prompt_count

        if (known := engine.watch.progress()) is None:
            return None
        share = known.prompt_done / max(1, known.prompt_tokens)
        return Shown(prompt_count(known.prompt_done, known.prompt_tokens), share, known.seconds_left)

    return read


class Wait:
    """Shows the progress of something slow on stderr, until `end`.

    On a terminal it is a bar, and typed keys are not echoed; elsewhere a line a minute.

    Args:
        read: called in a separate thread; returns None if there is nothing to show yet.
        patience_s: how long to wait before showing the bar.
    """

    def __init__(self, read: Callable[[], Shown | None], *, patience_s: float = _PATIENCE_S) -> None:
        self._read, self._patience_s = read, patience_s
        self.is_drawn = False  # a bar is on the terminal, which other lines would break
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="argosy-wait", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Clear the bar. Ending twice is harmless."""
        self._over.set()
        self._thread.join(_CLEAR_S)

    def _run(self) -> None:
        with suppress(OSError, ValueError):  # stderr may be closed
            if not sys.stderr.isatty():
                self._write_lines()
            elif not self._over.wait(self._patience_s):
                with quiet_keys():
                    self._draw()

    def _write_lines(self) -> None:
        while not self._over.wait(LINE_S):
            if (shown := self._read()) is not None:
                share = "" if shown.share is None else f" ({100 * shown.share:.0f} %)"
                left = f", {shown.left}" if shown.left else ""
                # A single write, because other threads also write lines.
                sys.stderr.write(f"{shown.text}{share}{left}\n")
                sys.stderr.flush()

    def _draw(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar

        text, left = (
            TextColumn(field, markup=False) for field in ("{task.description}", "{task.fields[left]}")
        )
        columns = (text, BarColumn(), TextColumn("{task.fields[share]}"), left)
        with Bar(*columns, console=Console(stderr=True), transient=True, auto_refresh=False) as bar:
            task = bar.add_task("", total=1.0, share="", left="", visible=False)
            while True:
                if (shown := self._read()) is not None:
                    share = "" if shown.share is None else f"{100 * shown.share:>3.0f} %"
                    bar.update(
                        task, description=shown.text, completed=shown.share or 0.0, share=share, left=shown.left,
                        visible=True,
                    )  # fmt: skip
                    bar.refresh()
                    self.is_drawn = True
                if self._over.wait(_REDRAW_S):
                    return


class _Steps:
    """A command's reported progress, and its estimated time left."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._told = "reading headers", 0.0
        self._began = clock(), 0.0  # when this part began, and the fraction done then

    def tell(self, what: str, share: float) -> None:
        if share < self._told[1]:  # a new part has begun
            self._began = self._clock(), share
        self._told = what, share

    def read(self) -> Shown:
        (what, share), (began, before) = self._told, self._began
        seconds, done = self._clock() - began, share - before
        is_known = done >= _LEAST_SHARE and seconds >= 1.0
        return Shown(what, share, seconds * (1.0 - share) / done if is_known else None)


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """Show a command's progress on stderr: a bar on a terminal, elsewhere a line a minute."""
    steps = _Steps()
    with Wait(steps.read):
        yield steps.tell


@contextmanager
def quiet_keys() -> Iterator[None]:
    """Keep the terminal from echoing typed keys; the next reader of the terminal gets them."""
    import termios

    def set_echo(echo: int) -> int:
        """Set the terminal's echo; return the old setting."""
        mode = termios.tcgetattr(terminal)
        before = mode[3] & termios.ECHO
        if before != echo and not _is_in_background(terminal):
            mode[3] = mode[3] & ~termios.ECHO | echo
            termios.tcsetattr(terminal, termios.TCSANOW, mode)
        return int(before)

    before = None
    with suppress(AttributeError, OSError, ValueError, termios.error):  # stdin is not a terminal
        terminal = sys.stdin.fileno()
        before = set_echo(0)
    try:
        yield
    finally:
        if before is not None:
            with suppress(OSError, termios.error):
                set_echo(before)


def _is_in_background(terminal: int) -> bool:
    """Whether the system would suspend this process if it changed the terminal."""
    try:
        return os.tcgetpgrp(terminal) != os.getpgrp()
    except OSError:  # not the controlling terminal
        return False
