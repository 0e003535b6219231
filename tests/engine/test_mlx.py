"""Checkpoints that mlx-lm wrote answer as MLX does, in place, at every budget and packed.

Unquantised weights and mxfp8 take float32 activations, so logits match up to the rounding of sums. In other modes
activations are rounded, and every expert is chosen.
"""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from argosy import Engine, SamplingParams
from argosy.checkpoint.manifest import verify_pack
from argosy.checkpoint.pack import pack
from argosy.config import Format
from argosy.model.families import open_model
from tests.engine.test_gguf import LARGEST_DIVERGENCE, mean_divergence
from tests.models.mlx_models import PLAIN, QUANTISED, MlxModel
from tests.models.references import LARGEST_DIFFERENCE, difference
from tests.models.safetensors_file import Array

EXACT = ("mixtral_mxfp8", *(model.name for model in PLAIN))


def is_like_mlx(model: MlxModel, logits: Array) -> bool:
    expected = model.reference.logits
    if model.name in EXACT:
        return difference(logits, expected) <= LARGEST_DIFFERENCE
    return mean_divergence(expected, logits) <= LARGEST_DIVERGENCE


needs_kernels = pytest.mark.skipif(
    "affine4_64_bf16" not in get_args(Format), reason="no kernel reads affine yet"
)


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(one, id=one.name, marks=() if one.name in EXACT else needs_kernels)
        for one in PLAIN + QUANTISED
    ],
)
def test_answers_are_those_of_mlx_in_place_and_packed(model: MlxModel, tmp_path: Path) -> None:
    reference = model.reference
    pack(open_model(reference.directory), tmp_path / "packed", format="source")
    verify_pack(tmp_path / "packed")
    greedy = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    answers = []
    for directory, expert_slots, chunk_tokens in (
        (reference.directory, None, 256),
        (reference.directory, 3, 5),
        (tmp_path / "packed", 3, 1),
    ):
        with Engine.open(
            directory,
            memory="4GiB",
            kv_dtype="f32",
            threads=2,
            expert_slots=expert_slots,
            chunk_tokens=chunk_tokens,
        ) as engine:
            logits = engine.logits(reference.input_ids)
            answers.append((logits.tobytes(), engine.generate(reference.input_ids, greedy).token_ids))
        assert is_like_mlx(model, logits)
    assert answers == [answers[0]] * len(answers)
