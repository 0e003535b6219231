"""Mixtures of types that llama.cpp's quantiser chooses, against llama.cpp's predictions from the same file.

llama.cpp comes as `test_peer.py` says. Quantising takes minutes in all: the search for codes below two bits is slow.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from argosy import Engine
from tests.models.gguf_models import one_type, write_gguf_model
from tests.models.numpy_model import NumpyModel
from tests.models.quantised import MIXTURES, PEER, SEED, Recipe, config_of, peer_logits, quantise
from tests.models.references import mean_divergence
from tests.models.tiny import prompt_ids

pytestmark = pytest.mark.skipif(not PEER.exists(), reason=f"no llama-cpp-python: {PEER} does not exist")

# The mean KL in nats that Argosy's 8-bit activations may cost, beyond what llama.cpp's own cost.
LARGEST_DIVERGENCE = 0.002

CASES = {
    **{f"qwen3_moe-{mixture}": Recipe(config_of("qwen3_moe"), mixture) for mixture in MIXTURES},
    **{
        f"{family}-{mixture}": Recipe(config_of(family), mixture)
        for family in ("glm4_moe", "gpt_oss", "deepseek_v3")
        for mixture in ("IQ1_M", "IQ2_XXS", "IQ3_M")
    },
    # Rows that are no multiple of 256 get other types: IQ4_NL, Q4_0, Q8_0.
    **{
        f"width-{width}-{mixture}": Recipe(config_of("qwen3_moe", width), mixture)
        for width, mixture in ((640, "IQ1_S"), (1408, "IQ2_M"), (2880, "Q2_K"), (640, "TQ2_0"))
    },
    # llama.cpp has no mixture of NVFP4: publishers convert to it. The quantiser takes it tensor by tensor.
    **{
        f"NVFP4-{width}": Recipe(config_of("qwen3_moe", width), "Q8_0", {"exps": "NVFP4", "attn": "NVFP4"})
        for width in (256, 640)
    },
    "hidden-640-IQ2_XS": Recipe(config_of("glm4_moe", 1408, hidden_size=640), "IQ2_XS"),
}


@pytest.mark.parametrize("name", CASES)
def test_predictions_are_llama_cpp_s_beyond_its_rounding(name: str, tmp_path: Path) -> None:
    recipe, path = CASES[name], tmp_path / "model.gguf"
    exact_path = quantise(recipe, path)
    prompt = prompt_ids(recipe.config, SEED)
    logits, exact = peer_logits(path, prompt), peer_logits(exact_path, prompt)
    with Engine.open(path, memory="2GiB", threads=1) as engine:
        found = engine.logits(prompt)

    assert mean_divergence(exact, found) <= LARGEST_DIVERGENCE
    assert mean_divergence(logits, found) <= LARGEST_DIVERGENCE + mean_divergence(logits, exact)


def test_nvfp4_with_a_factor_for_each_matrix_predicts_what_llama_cpp_predicts(tmp_path: Path) -> None:
    config, path = config_of("qwen3_moe"), tmp_path / "model.gguf"
    # llama.cpp reads no factor of the embedding.
    directory = write_gguf_model(
        path,
        config,
        lambda name: "Q8_0" if "token_embd" in name else one_type("NVFP4")(name),
        seed=SEED,
        has_factors=True,
    )
    prompt = prompt_ids(config, SEED)
    logits, exact = peer_logits(path, prompt), NumpyModel(directory).logits(prompt)
    with Engine.open(path, memory="2GiB", threads=1) as engine:
        found = engine.logits(prompt)

    assert mean_divergence(exact, found) <= LARGEST_DIVERGENCE
    assert mean_divergence(logits, found) <= LARGEST_DIVERGENCE + mean_divergence(logits, exact)
    assert mean_divergence(logits, exact) <= LARGEST_DIVERGENCE
