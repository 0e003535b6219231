"""A writer that is killed anywhere loses nothing that was complete, and the next command works.

The tests try a few points of each writer; set KILL_POINTS=200 for those marked `full`, or run `kills.py` itself, for
more. So do those in which somebody has planted links to files and directories of their own.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

from tests.abuse import kills
from tests.helpers.forks import call_in_fork

POINTS = ["2", pytest.param(os.environ.get("KILL_POINTS", "8"), marks=pytest.mark.full)]
LINK_POINTS = ["1", pytest.param(os.environ.get("KILL_POINTS", "4"), marks=pytest.mark.full)]


@pytest.mark.parametrize("points", POINTS)
@pytest.mark.parametrize(
    "writer", ["pack", "keys", "counts", "kv_dir", "demo", "pull", "rm", "audit", "state"]
)
def test_a_writer_that_is_killed_anywhere_loses_nothing_that_was_complete(writer: str, points: str) -> None:
    code, said = call_in_fork(kills.main, ["--points", points, writer])
    assert code == 0, said
    assert f"{writer} " in said


@pytest.mark.parametrize("points", LINK_POINTS)
@pytest.mark.parametrize("writer", ["pack", "kv_dir", "demo", "pull", "rm", "audit", "state"])
def test_a_link_at_any_name_that_a_writer_uses_has_nothing_changed_outside(writer: str, points: str) -> None:
    code, said = call_in_fork(kills.main, ["--links", "--points", points, writer])
    assert code == 0, said
    assert f"{writer} " in said


class InPlace(kills.Writer):
    """A writer that writes in place, so a kill in the middle leaves a file half old."""

    name = "in place"

    def work(self, tell: kills.Tell) -> None:
        for number in range(1, 9):
            descriptor = os.open(self.directory / "file", os.O_WRONLY | os.O_CREAT)
            os.write(descriptor, bytes([number]) * 1000)
            os.close(descriptor)
            tell(number)

    def check(self, told: list[Any]) -> str:
        path = self.directory / "file"
        kills.require(not told or len(set(path.read_bytes())) == 1, "half of it is old")
        return "whole"


class Follows(kills.Writer):
    name = "follows"

    def work(self, tell: kills.Tell) -> None:
        for number in range(4):  # whichever write is the last, others have followed the link
            (self.directory / "state").write_bytes(b"new")
            tell(number)

    def check(self, told: list[Any]) -> str:
        return "whole"


def num_failures(writer: type[kills.Writer], num_points: int, *, with_links: bool = False) -> int:
    kills.WRITERS[writer.name] = writer
    return len(kills.run(writer.name, num_points, 0, with_links=with_links)["failures"])


def test_a_writer_that_follows_a_link_is_detected() -> None:
    assert call_in_fork(num_failures, Follows, 8, with_links=True)[0] > 0


def test_a_writer_that_leaves_a_half_written_file_is_detected() -> None:
    assert call_in_fork(num_failures, InPlace, 16)[0] > 0
