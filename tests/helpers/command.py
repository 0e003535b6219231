"""Run the `argosy` command in another process, with its output and its exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.helpers.forks import ForkedArgosy

COMMAND = Path(sys.executable).with_name("argosy")


def start_of(*, is_fork: bool) -> tuple[type[subprocess.Popen[str]], list[str]]:
    """Return a `Popen` of `argosy`, and the words before its arguments."""
    return (ForkedArgosy, []) if is_fork else (subprocess.Popen, [sys.executable, "-m", "argosy"])


def run_argosy(
    *arguments: str | Path, stdin: str = "", timeout_s: float = 60, is_fork: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run `argosy` with these arguments; a nonzero exit code raises nothing.

    Args:
        is_fork: it starts sooner, but has imported most modules; each command starts by itself in some test.
    """
    start, command = start_of(is_fork=is_fork)
    process = start(
        [*command, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"NO_COLOR": "1", "COLUMNS": "200"},
    )
    with process:
        try:
            stdout, stderr = process.communicate(stdin, timeout_s)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)
