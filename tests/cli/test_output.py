"""Lines and tables of commands, on terminals of any width and elsewhere."""

from __future__ import annotations

import pytest

from argosy.cli import output
from argosy.cli.output import print_facts, table_lines

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
