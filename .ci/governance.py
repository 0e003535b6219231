"""Check that the documents of governance exist, name this version, and link to files that exist.

    python .ci/governance.py          prints what is wrong; exit code 1 if anything is

`make lint` runs it, so a new version cannot be built before somebody has looked at them (docs/release-checklist.md).
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
REVIEWED = ("SECURITY.md", "docs/threat-model.md", "docs/risks.md", "docs/release-checklist.md")
_LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
_REVIEWED = re.compile(r"^Reviewed for version (\S+)\.$", re.MULTILINE)


def faults(repository: Path) -> list[str]:
    """What is wrong with the documents, a sentence each."""
    version = tomllib.loads((repository / "pyproject.toml").read_text())["project"]["version"]
    found = []
    for name in REVIEWED:
        path = repository / name
        if not path.is_file():
            found.append(f"{name} is missing")
            continue
        text = path.read_text(encoding="utf-8")
        reviewed = _REVIEWED.findall(text)
        if reviewed != [version]:
            told = f"names version {', '.join(reviewed)}" if reviewed else "names no version"
            found.append(f"{name} {told}; read it again, and write: Reviewed for version {version}.")
        links = _LINK.findall(text)
        missing = [target for target in links if not (path.parent / target).exists()]
        found += [f"{name} links to {target}, which does not exist" for target in missing]
    if version not in (repository / "src" / "argosy" / "__init__.py").read_text():
        found.append(f"src/argosy/__init__.py does not have version {version}")
    found += _risks_without_owner(repository / "docs" / "risks.md")
    if f"## {version}" not in (repository / "CHANGELOG.md").read_text(encoding="utf-8"):
        found.append(f"CHANGELOG.md has no section for version {version}")
    return found


def _risks_without_owner(path: Path) -> list[str]:
    if not path.is_file():
        return []
    rows = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    return [
        f"docs/risks.md: a risk has no owner: {row[:60]}" for row in rows if not row.split("|")[-2].strip()
    ]


if __name__ == "__main__":
    wrong = faults(REPOSITORY)
    print(*wrong, sep="\n", end="\n" if wrong else "")
    sys.exit(bool(wrong))
