"""A process that a test starts as a fork begins as one with an interpreter of its own would."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.helpers.forks import call_at_once, call_in_fork


def leave(name: str) -> None:
    """Write the environment that this process has to a file in its directory."""
    Path(name).write_text(os.environ["OF_THIS_TEST"])


def test_a_fork_has_the_environment_and_the_directory_of_its_test_whichever_test_came_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in ("first", "second"):
        directory = tmp_path / number
        directory.mkdir()
        monkeypatch.chdir(directory)
        monkeypatch.setenv("OF_THIS_TEST", number)
        assert call_in_fork(os.getenv, "OF_THIS_TEST")[0] == number
        assert call_in_fork(os.getcwd)[0] == str(directory)
        assert call_at_once(leave, [("a",), ("b",)]) == [0, 0]
        assert [path.read_text() for path in sorted(directory.iterdir())] == [number, number]
