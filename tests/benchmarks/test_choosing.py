"""The tables of the guide to machines are those that `argosy plan` would print now."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest

import choosing
from choosing import MACHINES, MODELS, PAGE, updated


@pytest.fixture(autouse=True, scope="module")
def _each_table_is_made_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choosing, "table_of", functools.cache(choosing.table_of))
        yield


@pytest.mark.full
def test_the_guide_has_the_tables_of_today() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page.count("| `box:") == len(MODELS) * len(MACHINES)
    assert updated(page) == page, "`python benchmarks/choosing.py --write` writes them anew"


def test_a_changed_table_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "MODELS", MODELS[:1])
    text, end, _ = PAGE.read_text(encoding="utf-8").partition("<!-- end -->")
    page = text + end
    assert "| resident |" in page
    assert updated(page.replace("| resident |", "| no |", 1)) == page
