"""What the guides show of outputs."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

GUIDES = Path(__file__).parents[2] / "docs" / "guides"


def shown_after(guide: str, command: str) -> list[str]:
    """The lines that a guide shows after a command."""
    page = (GUIDES / guide).read_text("utf-8")
    for block in re.findall(r"^```console\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE):
        if f"$ {command}\n" in block:
            lines = block.partition(f"$ {command}\n")[2].splitlines()
            return [*itertools.takewhile(lambda line: not line.startswith("$ "), lines)]
    raise AssertionError(f"{guide} does not show `{command}`")
