"""A changed file of quantised weights is refused, or runs with exactly the weights that it holds."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from tests.abuse import mutated_files
from tests.abuse.mutated_files import GgufSource, run_all
from tests.models.quantised import Quantised


@pytest.mark.parametrize(("count", "seed"), [(40, 1), pytest.param(2000, 2, marks=pytest.mark.full)])
def test_changed_files_are_refused_or_exact(count: int, seed: int) -> None:
    outcomes = run_all(count, seed)
    assert outcomes.total() == count
    assert {outcome for _, _, outcome in outcomes} == {"refused", "runs"}


def test_other_weights_than_the_file_holds_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = GgufSource(Quantised("ud").path)
    content = source.mutate("blocks", random.Random(3))
    assert content != source.content
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    source.require_exact(path, content)
    from argosy.checkpoint import landing

    read_values = landing.read_values
    monkeypatch.setattr(landing, "read_values", lambda ref: np.nextafter(read_values(ref), np.float32(9)))
    with pytest.raises(AssertionError):
        source.require_exact(path, content)


def test_every_kind_of_mutation_changes_a_file() -> None:
    source = GgufSource(Quantised("ud").path)
    for kind in mutated_files.MUTATIONS[GgufSource]:
        changed = [source.mutate(kind, random.Random(seed)) for seed in range(20)]
        assert sum(content != source.content for content in changed) > 10
