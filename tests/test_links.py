"""Links between pages lead somewhere: the file exists, and so does the heading that an anchor names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
DECISIONS = ROOT / "docs" / "decisions"
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "recipes/**/*.md", "examples/**/*.md", "deploy/**/*.md")
    for path in ROOT.glob(pattern)
)
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def text_of(page: Path) -> str:
    """The page without blocks of code, where nothing is a link or a heading."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    found: set[str] = set()
    for title in re.findall(r"^#+ (.+)$", text_of(page), re.MULTILINE):
        shown = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title)
        anchor = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        found.add(
            next(name for name in (anchor, *(f"{anchor}-{n}" for n in range(1, 99))) if name not in found)
        )
    return found


def broken(page: Path) -> Iterator[str]:
    for link in LINK.findall(text_of(page)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists():
            yield f"{page.relative_to(ROOT)} links to {link}, which does not exist"
        elif anchor and target.suffix == ".md" and anchor not in anchors(target):
            yield f"{page.relative_to(ROOT)} links to {link}, and no heading there has that anchor"


def test_links_lead_to_files_and_headings() -> None:
    assert [fault for page in PAGES for fault in broken(page)] == []


def test_the_index_lists_every_decision_by_its_title() -> None:
    titles = {path.name: path.read_text(encoding="utf-8").splitlines()[0] for path in DECISIONS.glob("0*.md")}
    index = re.findall(r"^(\d+)\. \[(.+)\]\((.+)\)$", (DECISIONS / "README.md").read_text(), re.MULTILINE)
    assert {name: f"# {number}. {title}" for number, title, name in index} == titles


def test_a_decision_has_at_most_150_words() -> None:
    lengths = {path.name: len(path.read_text(encoding="utf-8").split()) for path in DECISIONS.glob("0*.md")}
    assert {name: length for name, length in lengths.items() if length > 150} == {}
