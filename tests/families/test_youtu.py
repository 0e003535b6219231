"""Youtu-LLM: latent attention without experts, from safetensors and GGUF, and refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from argosy import Engine
from argosy.checkpoint.geometry import count_parameters
from argosy.checkpoint.gguf import read_gguf
from argosy.config import ModelConfig
from argosy.errors import ArgosyError, UnsupportedModel
from argosy.model.families import FAMILIES, open_model
from tests.engine.test_gguf import LARGEST_DIVERGENCE, mean_divergence
from tests.models.gguf_models import one_type, write_gguf_model
from tests.models.references import LARGEST_DIFFERENCE, difference
from tests.models.tiny import RawConfig, prompt_ids
from tests.models.tiny_latent import youtu


def parse(raw: RawConfig) -> ModelConfig:
    return FAMILIES[raw["model_type"]].parse_config(raw)


def test_no_layer_has_experts_and_absent_keys_are_those_of_the_released_model() -> None:
    config = parse({"model_type": "youtu"})
    assert (config.moe_layers, config.num_experts, config.num_layers) == ((), 0, 32)
    assert config.latent is not None
    assert (config.latent.query_rank, config.latent.kv_rank, config.latent.head_dim) == (1536, 512, 192)
    assert (config.is_embedding_tied, config.eos_ids) == (True, (128_001,))
    assert count_parameters(config)[0] == pytest.approx(1.96e9, rel=0.005)
    assert parse(youtu(model_type="youtu_llm")) == parse(youtu())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"n_routed_experts": 8}, "sets n_routed_experts to 8, but youtu does not know this key"),
        ({"moe_intermediate_size": 8}, "sets moe_intermediate_size to 8"),
        ({"first_k_dense_replace": 1}, "sets first_k_dense_replace to 1"),
        ({"attention_bias": True}, "attention_bias true; supported: false"),
        ({"mlp_bias": True}, "mlp_bias true; supported: false"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'; supported: silu"),
    ],
)
def test_what_a_config_may_not_ask_for(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ArgosyError) as refused:
        parse(youtu(**changes))
    assert sentence in str(refused.value)


@pytest.mark.parametrize("split_kv", [True, False])
def test_a_gguf_answers_as_its_dequantised_weights(split_kv: bool, tmp_path: Path) -> None:
    path, config = tmp_path / "model.gguf", youtu(hidden_size=64, intermediate_size=64)
    directory = write_gguf_model(path, config, one_type("F32"), seed=3, split_kv=split_kv)
    prompt, logits = prompt_ids(config, 5), []
    for place in (directory, path):
        with Engine.open(place, memory="4GiB", threads=1) as engine:
            logits.append(engine.logits(prompt))
    assert difference(logits[1], logits[0]) <= LARGEST_DIFFERENCE
    assert mean_divergence(logits[0], logits[1]) <= LARGEST_DIVERGENCE


def test_a_gguf_says_that_all_layers_are_dense(tmp_path: Path) -> None:
    write_gguf_model(path := tmp_path / "model.gguf", youtu(), one_type("F32"), seed=3)
    found = open_model(path).config
    assert (found.family, found.moe_layers, found.num_experts) == ("youtu", (), 0)
    metadata = dict(read_gguf(path).metadata) | {"deepseek2.leading_dense_block_count": 1}
    with pytest.raises(UnsupportedModel, match="leading_dense_block_count"):
        FAMILIES["youtu"].open_gguf(replace(read_gguf(path), metadata=metadata))
