"""Frozen workers and a cut link cost an answer a pause, whatever their number."""

from __future__ import annotations

from pathlib import Path

from cluster_freeze import KINDS, trial


def test_the_text_is_the_same_however_many_workers_freeze_or_a_link_is_cut(tmp_path: Path) -> None:
    found = trial(tmp_path, 1, num_tokens=20)
    assert {kind: [is_same for _, _, is_same in rounds] for kind, rounds in found.items()} == {
        kind: [True] for kind in KINDS
    }
