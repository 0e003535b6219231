"""The check of the documents of governance finds what is missing or stale."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def governance() -> ModuleType:
    spec = importlib.util.spec_from_file_location("governance", REPOSITORY / ".ci" / "governance.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def copy(governance: ModuleType, tmp_path: Path) -> Path:
    for name in (*governance.REVIEWED, "pyproject.toml", "CHANGELOG.md", "src/argosy/__init__.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, tmp_path / name)
    for name in ("docs/internals", "docs/guides"):
        shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=shutil.ignore_patterns("pictures"))
    shutil.copytree(REPOSITORY / "docs/decisions", tmp_path / "docs/decisions")
    assert governance.faults(tmp_path) == []
    return tmp_path


def edit(name: str, old: str, new: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        text = (root / name).read_text()
        assert old in text
        (root / name).write_text(text.replace(old, new))

    return change


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (edit("pyproject.toml", 'version = "0.1.0"', 'version = "0.1.1"'), "SECURITY.md names version 0.1.0"),
        (edit("SECURITY.md", "Reviewed for version 0.1.0.\n", ""), "SECURITY.md names no version"),
        (lambda root: (root / "docs/threat-model.md").unlink(), "docs/threat-model.md is missing"),
        (edit("docs/risks.md", "| security maintainer |", "| |"), "a risk has no owner"),
        (edit("SECURITY.md", "docs/risks.md", "docs/danger.md"), "links to docs/danger.md"),
        (edit("CHANGELOG.md", "## 0.1.0", "## 0.0.9"), "CHANGELOG.md has no section"),
    ],
)
def test_a_stale_or_missing_document_is_found(
    governance: ModuleType, copy: Path, change: Callable[[Path], None], fault: str
) -> None:
    change(copy)
    assert any(fault in found for found in governance.faults(copy))
