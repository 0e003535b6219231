"""A file of ours that prose names in backticks exists: docs, docstrings and comments follow when a file moves."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "argosy"
NAMED = re.compile(r"`((?:\w+/)*\w+\.py)`")
# Files of other projects.
ELSEWHERE = {
    "conversion/base.py",
    "conversion_mapping.py",
    "convert_hf_to_gguf.py",
    "bailing_moe_mtp.py",
    "deepseek_mtp.py",
    "modeling_deepseek_v2.py",
    "modeling_rope_utils.py",
    "qwen3_next_mtp.py",
    "tokenization_hy.py",
    "tokenization_kimi.py",
    "utils/match.py",
}


def named(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (place, name) of each file that a text names."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        for name in NAMED.findall(line):
            yield f"{path.relative_to(ROOT)}:{number}", name


def places(name: str, of: Path) -> Iterator[Path]:
    """Yield where a module may mean `name`: beside it, or in its room, in the package or in the repository."""
    room = SOURCE / of.relative_to(SOURCE).parts[0]
    yield from (folder / name for folder in (of.parent, room, SOURCE, ROOT))


def test_modules_name_files_where_they_are() -> None:
    wrong = [
        f"{place} names {name}"
        for path in sorted(SOURCE.rglob("*.py"))
        for place, name in named(path)
        if name not in ELSEWHERE and not any(one.is_file() for one in places(name, path))
    ]
    assert wrong == []


def test_docs_name_files_that_exist() -> None:
    folders = ("src", "tests", "benchmarks", "examples", "recipes", "packages", ".ci")
    files = {path.relative_to(ROOT).parts for folder in folders for path in (ROOT / folder).rglob("*.py")}
    ends = {"/".join(parts[start:]) for parts in files for start in range(len(parts))}
    wrong = [
        f"{place} names {name}"
        for path in sorted((*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"))
        for place, name in named(path)
        if name not in ELSEWHERE | ends
    ]
    assert wrong == []
