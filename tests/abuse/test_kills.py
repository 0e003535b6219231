"""A writer that is killed anywhere loses nothing that was complete, and the next command works.

The tests try a few points of each writer; set KILL_POINTS=200 for those marked `full`, or run `kills.py` itself, for
more. So do those in which somebody has planted links to files and directories of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = Path(__file__).with_name("kills.py")
POINTS = ["2", pytest.param(os.environ.get("KILL_POINTS", "8"), marks=pytest.mark.full)]
LINK_POINTS = ["1", pytest.param(os.environ.get("KILL_POINTS", "4"), marks=pytest.mark.full)]

# A writer that writes in place, so a kill in the middle leaves a file half old.
IN_PLACE = """
import os, sys
sys.path.insert(0, sys.argv[1])
import kills

class InPlace(kills.Writer):
    name = "in place"

    def work(self, tell):
        for number in range(1, 9):
            descriptor = os.open(self.directory / "file", os.O_WRONLY | os.O_CREAT)
            os.write(descriptor, bytes([number]) * 1000)
            os.close(descriptor)
            tell(number)

    def check(self, told):
        path = self.directory / "file"
        kills.require(not told or len(set(path.read_bytes())) == 1, "half of it is old")
        return "whole"

kills.WRITERS["in place"] = InPlace
print(len(kills.run("in place", 16, 0)["failures"]))
"""


@pytest.mark.parametrize("points", POINTS)
@pytest.mark.parametrize(
    "writer", ["pack", "keys", "counts", "kv_dir", "demo", "pull", "rm", "audit", "state"]
)
def test_a_writer_that_is_killed_anywhere_loses_nothing_that_was_complete(writer: str, points: str) -> None:
    command = [sys.executable, str(KILLS), "--points", points, writer]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{writer} " in done.stdout


@pytest.mark.parametrize("points", LINK_POINTS)
@pytest.mark.parametrize("writer", ["pack", "kv_dir", "demo", "pull", "rm", "audit", "state"])
def test_a_link_at_any_name_that_a_writer_uses_has_nothing_changed_outside(writer: str, points: str) -> None:
    command = [sys.executable, str(KILLS), "--links", "--points", points, writer]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=3600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{writer} " in done.stdout


FOLLOWS = """
import sys
sys.path.insert(0, sys.argv[1])
import kills

class Follows(kills.Writer):
    name = "follows"

    def work(self, tell):
        (self.directory / "state").write_bytes(b"new")
        tell(1)

    def check(self, told):
        return "whole"

kills.WRITERS["follows"] = Follows
print(len(kills.run("follows", 8, 0, with_links=True)["failures"]))
"""


def test_a_writer_that_follows_a_link_is_detected() -> None:
    command = [sys.executable, "-c", FOLLOWS, str(KILLS.parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert int(done.stdout) > 0


def test_a_writer_that_leaves_a_half_written_file_is_detected() -> None:
    command = [sys.executable, "-c", IN_PLACE, str(KILLS.parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert int(done.stdout) > 0
