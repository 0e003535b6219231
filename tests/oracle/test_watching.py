"""Whole tiny models with other values than the committed ones answer prompts with videos as transformers does."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import pytest

from argosy import _native
from tests.engine.test_seeing import require_answer
from tests.engine.test_watching import CASES, opened, prompt_of, with_tracks
from tests.models.make_seeing import load
from tests.models.make_watching import find_answer
from tests.models.seeing import CONFIGS, write

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.usefixtures("one_quiet_thread")]

SEED = 77


@pytest.mark.parametrize(("family", "name"), CASES)
def test_answers_equal_those_of_transformers(
    family: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, family, CONFIGS[family], SEED)
    model = load(tmp_path, family)
    media, found = find_answer(model, tmp_path, family, count(SEED), is_heard=name == "heard")
    reference = {**media, **found}
    with_tracks(reference, monkeypatch)
    exact = min(2, len(_native.instruction_sets())) - 1
    with opened(tmp_path, instruction_set=_native.instruction_sets()[exact]) as engine:
        prompt = prompt_of(engine, reference)
        assert list(prompt.token_ids or ()) == reference["input_ids"].tolist()
        require_answer(engine, prompt, reference["logits"], reference["greedy"])
