"""The lid on size: no folder, file, function or parameter list above the limits of `.ci/map.py`."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
MAP: dict[str, Any] = runpy.run_path(str(ROOT / ".ci" / "map.py"))

# A folder of things of one kind may hold many, each in a file.
MANY_OF_A_KIND = {"cli/commands", "model/families", "model/families/attention", "serve/dialects"}


def test_nothing_in_the_sources_is_above_the_limits() -> None:
    found = MAP["too_large"](ROOT / "src" / "argosy")
    assert {
        limit: [one for one in places if one[0] not in MANY_OF_A_KIND] for limit, places in found.items()
    } == {limit: [] for limit in found}, "cut it where its jobs meet, or find the module that should carry it"


@pytest.mark.full  # it takes apart 97,000 lines
def test_the_core_stays_within_its_bound() -> None:
    assert 30_000 < MAP["lines_of_core"](ROOT / "src" / "argosy") <= MAP["MOST_LINES_OF_CORE"]


def test_each_limit_finds_what_is_above_it(tmp_path: Path) -> None:
    parameters = ", ".join(f"a{at}" for at in range(MAP["MOST_PARAMETERS"] + 1))
    body = "    pass\n" * MAP["MOST_LINES_OF_FUNCTION"]
    (tmp_path / "big.py").write_text(f"def few({parameters}):\n{body}" + "\n" * MAP["MOST_LINES_OF_FILE"])
    for at in range(MAP["MOST_FILES_OF_FOLDER"]):
        (tmp_path / f"f{at}.py").touch()
    found = MAP["too_large"](tmp_path)
    assert {limit: [where for where, _ in places] for limit, places in found.items()} == {
        "files in a folder": ["."],
        "lines of a file": ["big.py"],
        "lines of a function": ["big.py:few"],
        "parameters": ["big.py:few"],
    }
