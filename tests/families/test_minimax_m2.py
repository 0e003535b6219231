"""MiniMax-M2: the meaning of the config, the defaults of absent keys, ignored tensors, and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from argosy.config import LayerConfig, ModelConfig, RouterConfig
from argosy.errors import CheckpointError
from argosy.model.families import FAMILIES, open_model
from tests.models.safetensors_file import read_checkpoint, write_checkpoint
from tests.models.tiny import RawConfig, minimax_m2, write_model

# The hub's config.json of MiniMax-M2.
HUB: RawConfig = {
    "architectures": ["MiniMaxM2ForCausalLM"],
    "attention_dropout": 0.0,
    "attn_type_list": [1] * 62,
    "auto_map": {"AutoConfig": "configuration_minimax_m2.MiniMaxM2Config"},
    "bos_token_id": None,
    "eos_token_id": None,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "initializer_range": 0.02,
    "intermediate_size": 1536,
    "layernorm_full_attention_beta": 1.0,
    "layernorm_linear_attention_beta": 1.0,
    "layernorm_mlp_beta": 1.0,
    "max_position_embeddings": 196608,
    "mlp_intermediate_size": 8192,
    "model_type": "minimax_m2",
    "mtp_transformer_layers": 1,
    "num_attention_heads": 48,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 62,
    "num_key_value_heads": 8,
    "num_local_experts": 256,
    "num_mtp_modules": 3,
    "output_router_logits": False,
    "qk_norm_type": "per_layer",
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "float8_e4m3fn",
        "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_theta": 5000000,
    "rotary_dim": 64,
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
    "scoring_func": "sigmoid",
    "shared_intermediate_size": 0,
    "shared_moe_mode": "sigmoid",
    "sliding_window": None,
    "tie_word_embeddings": False,
    "transformers_version": "4.46.1",
    "use_cache": True,
    "use_mtp": True,
    "use_qk_norm": True,
    "use_routing_bias": True,
    "vocab_size": 200064,
}


def parse(raw: RawConfig) -> ModelConfig:
    return FAMILIES["minimax_m2"].parse_config(raw)


def refusal(**changes: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        parse(minimax_m2(**changes))
    return str(caught.value)


def test_the_hub_s_config_is_read() -> None:
    config = parse(HUB)

    assert config.layers == (LayerConfig(mixer=config.attention, is_moe=True),) * 62
    assert config.router == RouterConfig(score="sigmoid", has_choice_bias=True, renormalize=True)
    assert (config.attention.qk_norm, config.attention.has_qkv_bias, config.attention.has_o_bias) == (
        "flat",
        False,
        False,
    )
    assert (config.attention.head_dim, config.attention.rope.rotary_dim, config.attention.rope.theta) == (
        128,
        64,
        5e6,
    )
    assert not config.attention.rope.is_interleaved
    assert (config.num_experts, config.experts_per_token, config.expert_width) == (256, 8, 1536)
    assert (config.shared_width, config.num_mtp_layers, config.eos_ids) == (0, 0, ())


def test_an_absent_key_has_the_default_of_the_config_class() -> None:
    config = parse({"model_type": "minimax_m2"})

    assert (config.vocab_size, config.hidden_size, config.num_layers) == (200_064, 3072, 62)
    assert (
        config.attention.num_heads,
        config.attention.num_kv_heads,
        config.attention.head_dim,
        config.expert_width,
    ) == (48, 8, 128, 1536)
    assert (config.attention.rope.theta, config.attention.rope.rotary_dim, config.norm_eps) == (
        5e6,
        128,
        1e-6,
    )
    assert (config.eos_ids, config.bos_id, config.context_tokens) == ((200_020,), 200_034, 196_608)


def test_rotary_dimensions_have_two_spellings() -> None:
    assert parse(minimax_m2(rotary_dim=4)).attention.rope.rotary_dim == 4
    plain = {key: value for key, value in minimax_m2().items() if key != "rotary_dim"}
    assert parse(plain).attention.rope.rotary_dim == 12
    assert parse(plain | {"partial_rotary_factor": 0.5}).attention.rope.rotary_dim == 6
    inside = {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5}
    assert parse(plain | {"rope_parameters": inside}).attention.rope.rotary_dim == 6
    assert "rotary_dim is 14, expected an even number of at most 12, the dimensions of a head" in refusal(
        rotary_dim=14
    )
    assert "rotary_dim is 5, expected an even number" in refusal(rotary_dim=5)
    assert "gives rotary_dim as 6, but partial_rotary_factor means 4" in refusal(partial_rotary_factor=0.34)
    assert parse(minimax_m2(partial_rotary_factor=0.5)).attention.rope.rotary_dim == 6


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"attn_type_list": [1, 0, 1]},
            "asks for attn_type_list [1, 0, 1]; supported: 1, softmax attention, in",
        ),
        ({"scoring_func": "softmax"}, "asks for scoring_func 'softmax'; supported: sigmoid"),
        ({"use_routing_bias": False}, "asks for use_routing_bias false; supported: true"),
        ({"use_qk_norm": False}, "asks for use_qk_norm false; supported: true"),
        ({"qk_norm_type": "per_head"}, "asks for qk_norm_type 'per_head'; supported: 'per_layer'"),
        ({"shared_intermediate_size": 64}, "asks for shared_intermediate_size 64; supported: 0"),
        ({"layernorm_mlp_beta": 3.5}, "asks for layernorm_mlp_beta 3.5; supported: 1.0"),
        ({"sliding_window": 8}, "asks for sliding_window 8; supported: null"),
    ],
)
def test_unsupported_features_are_refused_by_name(changes: dict[str, Any], sentence: str) -> None:
    assert sentence in refusal(**changes)


def test_multi_token_prediction_modules_are_ignored(tmp_path: Path) -> None:
    write_model(tmp_path, minimax_m2(), seed=1)
    tensors = {name: ("BF16", tensor) for name, tensor in read_checkpoint(tmp_path).items()}
    tensors["model.mtp.0.enorm.weight"] = ("BF16", np.ones(4, np.float32))
    write_checkpoint(tmp_path, tensors)

    assert not any("mtp" in name for name in open_model(tmp_path).dense)
    tensors["model.other.0.enorm.weight"] = tensors.pop("model.mtp.0.enorm.weight")
    write_checkpoint(tmp_path, tensors)
    with pytest.raises(CheckpointError, match=r"model\.other\.0\.enorm\.weight \[4\]"):
        open_model(tmp_path)
