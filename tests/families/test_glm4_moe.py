"""GLM-4.5 to 4.7: the meaning of the config, the defaults of absent keys, ignored tensors, and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from argosy.checkpoint.safetensors import open_tensors
from argosy.config import ModelConfig, RouterConfig
from argosy.errors import CheckpointError, UnsupportedModel
from argosy.model.families import FAMILIES, open_model
from argosy.model.reading.layout import read_layout
from tests.models.safetensors_file import read_checkpoint, write_checkpoint
from tests.models.tiny import RawConfig, glm4_moe, write_model

# The hub's config.json of GLM-4.6; Air differs in sizes and in the scale, and has no norms of q and k.
GLM_4_6: RawConfig = {
    "architectures": ["Glm4MoeForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": [151329, 151336, 151338],
    "first_k_dense_replace": 3,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "initializer_range": 0.02,
    "intermediate_size": 12288,
    "max_position_embeddings": 202752,
    "model_type": "glm4_moe",
    "moe_intermediate_size": 1536,
    "n_group": 1,
    "n_routed_experts": 160,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 96,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 92,
    "num_key_value_heads": 8,
    "num_nextn_predict_layers": 1,
    "pad_token_id": 151329,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "routed_scaling_factor": 2.5,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.54.0",
    "use_cache": True,
    "use_qk_norm": True,
    "vocab_size": 151552,
}


def parse(raw: RawConfig) -> ModelConfig:
    return FAMILIES["glm4_moe"].parse_config(raw)


def refusal(**changes: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        parse(glm4_moe(**changes))
    return str(caught.value)


def test_the_hub_s_config_is_read() -> None:
    config = parse(GLM_4_6)

    assert {layer.mixer for layer in config.layers} == {config.attention}
    assert [layer.is_moe for layer in config.layers] == [False] * 3 + [True] * 89
    assert config.router == RouterConfig(
        score="sigmoid", has_choice_bias=True, renormalize=True, renormalize_eps=1e-20, scale=2.5
    )
    assert (config.attention.head_dim, config.attention.rope.rotary_dim, config.attention.rope.theta) == (
        128,
        64,
        1e6,
    )
    assert not config.attention.rope.is_interleaved
    assert (config.attention.has_qkv_bias, config.attention.has_o_bias, config.attention.qk_norm) == (
        True,
        False,
        "head",
    )
    assert (config.dense_width, config.expert_width, config.shared_width) == (12_288, 1536, 1536)
    assert not config.shared_is_gated
    assert config.num_mtp_layers == 1
    assert config.eos_ids == (151_329, 151_336, 151_338)
    assert parse(GLM_4_6 | {"use_qk_norm": False}).attention.qk_norm == "none"
    assert parse(GLM_4_6 | {"n_shared_experts": 2}).shared_width == 3072


def test_an_absent_key_has_the_default_of_the_config_class() -> None:
    config = parse({"model_type": "glm4_moe", "head_dim": 44})

    assert (config.vocab_size, config.hidden_size, config.num_layers) == (151_552, 4096, 46)
    assert (config.attention.num_heads, config.attention.num_kv_heads, config.attention.head_dim) == (
        96,
        8,
        44,
    )
    assert (config.num_experts, config.experts_per_token, config.expert_width) == (128, 8, 1408)
    assert (config.dense_width, config.shared_width, config.moe_layers[0]) == (10_944, 1408, 1)
    assert (config.context_tokens, config.norm_eps) == (131_072, 1e-5)
    assert (config.attention.rope.theta, config.attention.rope.rotary_dim) == (1e4, 22)
    assert (config.attention.has_qkv_bias, config.attention.qk_norm, config.router.scale) == (
        False,
        "none",
        1.0,
    )
    with pytest.raises(CheckpointError, match=r"as 0\.5 of 42 dimensions, expected an even number"):
        parse({"model_type": "glm4_moe"})


def test_rotary_dimensions_are_read() -> None:
    assert parse(glm4_moe(partial_rotary_factor=0.34)).attention.rope.rotary_dim == 4
    assert parse(glm4_moe(partial_rotary_factor=1.0)).attention.rope.rotary_dim == 12
    inside = {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.7}
    raw = {
        key: value for key, value in glm4_moe().items() if key not in ("partial_rotary_factor", "rope_theta")
    }
    assert parse(raw | {"rope_parameters": inside}).attention.rope.rotary_dim == 8
    assert parse(raw).attention.rope.rotary_dim == 6
    assert "gives partial_rotary_factor as 0.5 and, in rope_parameters, as 0.7" in refusal(
        rope_theta=1e4, rope_parameters=inside
    )
    assert "gives partial_rotary_factor as 0.25 of 12 dimensions, expected an even number" in refusal(
        partial_rotary_factor=0.25
    )
    assert "gives partial_rotary_factor as 1.5 of 12 dimensions" in refusal(partial_rotary_factor=1.5)
    assert "partial_rotary_factor is 0, a whole number; expected a number above zero" in refusal(
        partial_rotary_factor=0
    )


def test_unsupported_features_are_refused_by_name() -> None:
    assert "asks for scoring_func 'softmax'; supported: sigmoid" in refusal(scoring_func="softmax")
    assert "leaves none of the 3 layers with routed experts" in refusal(first_k_dense_replace=3)
    assert "6 experts in 4 groups, 2 of them kept; expected groups of equal size" in refusal(
        n_group=4, topk_group=2
    )
    with pytest.raises(UnsupportedModel, match="sets mlp_only_layers"):
        parse(glm4_moe(mlp_only_layers=[1]))


def test_a_multi_token_prediction_layer_is_ignored(tmp_path: Path) -> None:
    write_model(tmp_path, glm4_moe(), seed=1)
    tensors = {name: ("BF16", tensor) for name, tensor in read_checkpoint(tmp_path).items()}
    for name in ("eh_proj.weight", "enorm.weight", "shared_head.norm.weight", "mlp.experts.0.up_proj.weight"):
        tensors[f"model.layers.3.{name}"] = ("BF16", np.ones((4, 4), np.float32))
    write_checkpoint(tmp_path, tensors)

    files = open_model(tmp_path)

    assert {name for name in files.dense if name.startswith("layers.3")} == set()
    without_mtp = parse(glm4_moe(num_nextn_predict_layers=0))
    with pytest.raises(CheckpointError, match=r"model\.layers\.3\.eh_proj\.weight \[4, 4\] and 3 more"):
        read_layout(tmp_path, without_mtp, FAMILIES["glm4_moe"].LAYOUTS, open_tensors(tmp_path))
