"""Requests of all kinds are cancelled at any time; `make test-sanitize` runs many more with a build that reports data
races."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_mixed_requests_that_are_cancelled_at_any_time_leave_nothing_behind() -> None:
    command = [sys.executable, "-m", "tests.engine.mixed_requests", "--requests", "60"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert "nothing is left behind" in done.stdout
