"""A file that llama.cpp quantised predicts what llama.cpp predicts from it, at every budget, in place and packed."""

from __future__ import annotations

from pathlib import Path

import pytest

from argosy import Engine, _native
from argosy.checkpoint.pack import pack
from argosy.model.families import open_model
from tests.engine.test_gguf import require_equal_answers
from tests.models.quantised import RECIPES, Quantised, types_of
from tests.models.references import mean_divergence

# The mean KL in nats that 8-bit activations may cost. llama.cpp's own cost 0.0004 here.
LARGEST_DIVERGENCE = 0.002

SETS = _native.instruction_sets()


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("instruction_set", SETS)
def test_predictions_are_llama_cpp_s_beyond_its_rounding(name: str, instruction_set: str) -> None:
    model = Quantised(name)
    prompt, logits, exact = model.read()
    with Engine.open(model.path, memory="2GiB", threads=1, instruction_set=instruction_set) as engine:
        found = engine.logits(prompt)

    assert mean_divergence(exact, found) <= LARGEST_DIVERGENCE
    assert mean_divergence(logits, found) <= LARGEST_DIVERGENCE + mean_divergence(logits, exact)


@pytest.mark.parametrize("name", RECIPES)
def test_greedy_answers_are_equal_at_every_budget_in_place_and_packed(name: str, tmp_path: Path) -> None:
    model = Quantised(name)
    prompt, _, _ = model.read()
    pack(open_model(model.path), tmp_path / "packed", format="source")
    files = open_model(model.path)
    assert open_model(tmp_path / "packed").expert_format == files.expert_format
    for turn, instruction_set in enumerate(SETS):
        require_equal_answers(
            [model.path, tmp_path / "packed"], turn, prompt[:19], instruction_set, most_slots=3
        )


def test_the_committed_files_hold_every_type_that_publishers_mix() -> None:
    assert types_of(Quantised("ud").path) == {
        *("F32", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
        *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0"),
    }
    assert types_of(Quantised("few_bits").path) == {
        *("F32", "Q1_0", "Q2_0", "TQ1_0", "TQ2_0", "NVFP4", "MXFP4", "Q4_1")
    }
