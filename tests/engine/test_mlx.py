"""Checkpoints that mlx-lm wrote answer as MLX does, in place and packed."""

from __future__ import annotations

from pathlib import Path

import pytest

from argosy import Engine, SamplingParams
from argosy.checkpoint.manifest import verify_pack
from argosy.checkpoint.pack import pack
from argosy.model.families import open_model
from tests.models.mlx_models import PLAIN, MlxModel
from tests.models.references import LARGEST_DIFFERENCE, difference


@pytest.mark.parametrize("model", PLAIN, ids=lambda model: model.name)
def test_logits_of_unquantised_checkpoints_are_those_of_mlx(model: MlxModel, tmp_path: Path) -> None:
    reference = model.reference
    pack(open_model(reference.directory), tmp_path / "packed", format="source")
    verify_pack(tmp_path / "packed")
    greedy = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    answers = []
    for directory, expert_slots in (
        (reference.directory, None),
        (reference.directory, 3),
        (tmp_path / "packed", 3),
    ):
        with Engine.open(
            directory, memory="4GiB", kv_dtype="f32", threads=2, expert_slots=expert_slots
        ) as engine:
            logits = engine.logits(reference.input_ids)
            answers.append((logits.tobytes(), engine.generate(reference.input_ids, greedy).token_ids))
        assert difference(logits, reference.logits) <= LARGEST_DIFFERENCE
    assert answers == [answers[0]] * len(answers)
