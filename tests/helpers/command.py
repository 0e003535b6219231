"""Run the `argosy` command as a user does: in another process, with its output and its exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

COMMAND = Path(sys.executable).with_name("argosy")


def run_argosy(
    *arguments: str | Path, stdin: str = "", timeout_s: float = 60
) -> subprocess.CompletedProcess[str]:
    """Run `argosy` with these arguments; a nonzero exit code raises nothing."""
    return subprocess.run(
        [COMMAND, *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        env=os.environ | {"NO_COLOR": "1", "COLUMNS": "200"},
    )
