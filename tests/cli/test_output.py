"""Lines and tables of commands, on terminals of any width and elsewhere.

What takes long shows how far it is: a bar on a terminal, a line a minute elsewhere, nothing once it is over.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from argosy.cli.shared import output
from argosy.cli.shared.answer_writer import AnswerWriter
from argosy.cli.shared.output import (
    Shown,
    Wait,
    print_facts,
    progress_bar,
    prompt_shown,
    table_lines,
)
from argosy.engine.progress import RequestProgress
from argosy.engine.sequence import TokenEvent
from tests.cli.terminal import on_terminal

Captured = pytest.CaptureFixture[str]
HEADER = ("NAME", "SIZE", "FITS")
ROWS = [("Qwen/Qwen3-30B-A3B", "16.4 GB", "yes, it streams"), ("b", "9 kB", "no")]


@pytest.mark.parametrize(
    ("width", "lines"),
    [
        (None, ["speed     15 to 38 tok/s, likely 24, for one answer"]),
        (50, ["speed     15 to 38 tok/s, likely 24, for one", "          answer"]),
        (25, ["speed     15 to 38 tok/s,", "          likely 24, for", "          one answer"]),
    ],
)
def test_a_line_goes_on_below_its_value(
    width: int | None, lines: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(output, "terminal_width", lambda: width)
    print_facts(["speed     15 to 38 tok/s, likely 24, for one answer"])
    assert capsys.readouterr().out.splitlines() == lines


def test_columns_are_aligned_where_a_table_has_room() -> None:
    assert table_lines(HEADER, ROWS, right={1}) == [
        "NAME                   SIZE  FITS",
        "Qwen/Qwen3-30B-A3B  16.4 GB  yes, it streams",
        "b                      9 kB  no",
    ]


def test_the_last_column_wraps_first_and_then_each_cell_follows_its_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(output, "terminal_width", lambda: 42)
    assert table_lines(HEADER, ROWS) == [
        "NAME                SIZE     FITS",
        "Qwen/Qwen3-30B-A3B  16.4 GB  yes, it",
        "                             streams",
        "b                   9 kB     no",
    ]
    monkeypatch.setattr(output, "terminal_width", lambda: 30)
    assert table_lines(HEADER, ROWS) == [
        "NAME Qwen/Qwen3-30B-A3B",
        "  SIZE 16.4 GB",
        "  FITS yes, it streams",
        "NAME b",
        "  SIZE 9 kB  FITS no",
    ]


PATIENCE_S = 20.0
READING = RequestProgress(
    name="", prompt_tokens=22851, prompt_done=9216, answer_tokens=0, tok_per_s=61.0, seconds=150.0, seconds_left=223.0
)  # fmt: skip


def test_the_time_to_go_follows_from_the_share_of_the_part_that_runs() -> None:
    now = [100.0]
    steps = output._Steps(lambda: now[0])
    assert steps.read() == ("reading headers", 0.0, None)
    now[0] += 20
    steps.tell("reading weights", 0.4)
    assert steps.read() == ("reading weights", 0.4, pytest.approx(30))
    assert steps.read().left == "about 30 s left"
    assert steps.read()._replace(share=0.996).left == ""  # 100 % is shown
    steps.tell("packing layer 1", 0.0)  # another part begins
    assert steps.read().seconds_left is None
    now[0] += 60
    steps.tell("packing layer 2", 0.5)
    assert steps.read().seconds_left == pytest.approx(60)


def test_without_a_terminal_there_is_a_line_now_and_then_and_none_at_first(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    with progress_bar() as tell:
        tell("reading weights", 0.5)
    assert capsys.readouterr().err == ""
    was_read, num_read = threading.Event(), 0

    def read() -> Shown | None:
        nonlocal num_read
        num_read += 1
        if num_read == 3:
            was_read.set()
        return None if num_read == 1 else Shown("reading weights", 0.4, 130.0)

    monkeypatch.setattr(output, "LINE_S", 0.001)
    with Wait(read):
        assert was_read.wait(PATIENCE_S)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == num_read - 1
    assert set(lines) == {"reading weights (40 %), about 2 min left"}


def test_the_progress_of_a_prompt_ends_with_its_first_token(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "LINE_S", 0.001)
    was_read, reads = threading.Event(), [0]

    def progress() -> RequestProgress:
        reads[0] += 1
        if reads[0] == 2:
            was_read.set()
        return READING

    engine: Any = SimpleNamespace(watch=SimpleNamespace(progress=progress))
    with AnswerWriter(None, shows_thoughts=False, progress=prompt_shown(engine)) as writer:
        assert was_read.wait(PATIENCE_S)
        writer.push(TokenEvent(1, "Paris", None, None, None))
        num_reads = reads[0]
        said = capsys.readouterr()
        assert said.out == "Paris"
        assert said.err == "prompt 9,216 of 22,851 tokens (40 %), about 4 min left\n" * num_reads
    assert reads[0] == num_reads


def test_an_answer_that_is_not_shown_tells_how_far_it_is(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "LINE_S", 0.001)
    was_read, has_tokens = threading.Event(), threading.Event()

    def counted(writer: AnswerWriter) -> Shown | None:
        shown = read(writer)
        if has_tokens.is_set():
            was_read.set()
        return shown

    read = AnswerWriter._read_progress
    monkeypatch.setattr(AnswerWriter, "_read_progress", counted)
    writer = AnswerWriter(shows_text=False, shows_thoughts=False, progress=lambda: None, most_tokens=8)
    with writer:
        for text in ("Paris", " is"):
            writer.push(TokenEvent(1, text, None, None, None))
        has_tokens.set()
        assert was_read.wait(PATIENCE_S)
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines()[-1] == "answer 2 of at most 8 tokens (25 %)"
    assert writer.answer.text == "Paris is"


def test_an_interrupt_is_answered_at_once_below_what_was_shown(capsys: Captured) -> None:
    with AnswerWriter(shows_thoughts=False) as writer:
        writer.push(TokenEvent(1, "Par", None, None, None))
        writer.say_stopping()
    assert capsys.readouterr().err == "\nstopping after this step …\n"
    with AnswerWriter(shows_thoughts=False) as writer:
        writer.say_stopping()
    assert capsys.readouterr().err == "stopping after this step …\n"


def test_a_wait_without_a_known_end_is_told_without_a_share(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "LINE_S", 0.001)
    was_read = threading.Event()

    def read() -> Shown:
        was_read.set()
        return Shown("waits for its turn", None)

    with Wait(read):
        assert was_read.wait(PATIENCE_S)
    assert set(capsys.readouterr().err.splitlines()) == {"waits for its turn"}


KEYS = """
import sys
from argosy.cli.shared.output import progress_bar
with progress_bar() as tell:
    tell("reading weights", 0.4)
    first = sys.stdin.readline()
print("got", repr(first), flush=True)
print("got", repr(sys.stdin.readline()), flush=True)
"""


def test_keys_that_are_typed_beside_a_bar_are_not_shown_and_not_lost(tmp_path: Path) -> None:
    (tmp_path / "keys.py").write_text(KEYS)
    with on_terminal([sys.executable, str(tmp_path / "keys.py")]) as terminal:
        terminal.until(b"reading weights")
        terminal.send(b"early\n")
        assert b"early" not in terminal.until(b"got 'early\\n'")
        terminal.send(b"later\n")
        assert b"later\r\n" in terminal.until(b"got 'later\\n'")


def test_a_command_whose_input_is_no_terminal_has_no_keys_to_hide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "input").touch()
    with open(tmp_path / "input") as file:
        for stdin in (None, file):
            monkeypatch.setattr(sys, "stdin", stdin)
            with output.quiet_keys():
                pass
