"""Run the `argosy` command in another process, with its output and its exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.helpers.forks import ForkedArgosy

COMMAND = Path(sys.executable).with_name("argosy")


def run_argosy(
    *arguments: str | Path, stdin: str = "", timeout_s: float = 60
) -> subprocess.CompletedProcess[str]:
    """Run `argosy` with these arguments; a nonzero exit code raises nothing."""
    process = ForkedArgosy[str](
        arguments,
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
