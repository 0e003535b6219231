"""The reliability figures of the README hold in a small form, and a violation is detected."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from tests.abuse import figures

# Sizes in `make test`, and in `make test-full`; 0: not there. R12 and R17 need minutes. R21 measures seconds of CPU;
# `test_grammar_bounds.py` has its grammars. R10 is that of `test_disconnects.py`, and the addresses of R19, which waits
# until a new network is quiet, are in `test_media_hosts.py`.
SMALL = {
    "R2": (40, 60), "R4": (12, 24), "R5": (2, 2), "R10": (0, 10), "R11": (5, 20), "R13": (1, 1), "R14": (1, 1),
    "R19": (0, 6), "R22": (60, 60), "R23": (20, 30), "R24": (10, 40),
}  # fmt: skip


@pytest.mark.parametrize(
    ("number", "size"),
    [
        *((number, least) for number, (least, _) in SMALL.items() if least),
        *(
            pytest.param(number, size, marks=pytest.mark.full)
            for number, (least, size) in SMALL.items()
            if size > least
        ),
    ],
)
def test_a_figure_holds_in_its_small_form(number: str, size: int) -> None:
    try:
        finding, line = figures.measure(number, size)
    except PermissionError as error:
        pytest.skip(str(error))
    assert not finding.violations, finding.violations
    assert finding.size >= size
    assert finding.late or f" holds at {finding.size:,} of " in line  # a small form claims only its own size


def test_undetected_damage_is_a_violation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate an engine that checks no checksum: the damaged pack gives the same tokens as before."""
    real = figures.run_once
    whole: list[figures.Run] = []

    def careless(directory: Path, prompt: list[int]) -> figures.Run:
        if not whole:
            whole.append(real(directory, prompt))
        return whole[0]

    monkeypatch.setattr(figures, "run_once", careless)
    finding, line = figures.measure("R4", 12)
    assert len(finding.violations) > 6
    assert "open: " in line
