"""OLMoE: the meaning of the config, the defaults of absent keys, and refusals."""

from __future__ import annotations

import pytest

from argosy.config import LayerConfig, ModelConfig, RouterConfig
from argosy.errors import CheckpointError, UnsupportedModel
from argosy.model.families import FAMILIES
from tests.models.tiny import RawConfig, olmoe

# The hub's config.json of OLMoE-1B-7B-0924.
HUB: RawConfig = {
    "architectures": ["OlmoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "clip_qkv": None,
    "eos_token_id": 50279,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 1024,
    "max_position_embeddings": 4096,
    "model_type": "olmoe",
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 16,
    "num_key_value_heads": 16,
    "output_router_logits": False,
    "pad_token_id": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "router_aux_loss_coef": 0.01,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0",
    "use_cache": True,
    "vocab_size": 50304,
}


def parse(raw: RawConfig) -> ModelConfig:
    return FAMILIES["olmoe"].parse_config(raw)


def test_the_hub_s_config_is_read() -> None:
    config = parse(HUB)

    assert config.layers == (LayerConfig(mixer=config.attention, is_moe=True),) * 16
    assert config.router == RouterConfig(renormalize=False)
    assert (
        config.attention.qk_norm,
        config.attention.qkv_limit,
        config.attention.has_qkv_bias,
        config.attention.has_o_bias,
    ) == (
        "flat",
        0,
        False,
        False,
    )
    assert (config.expert_width, config.dense_width, config.shared_width) == (1024, 0, 0)
    assert (
        config.attention.num_heads,
        config.attention.num_kv_heads,
        config.attention.head_dim,
        config.attention.rope.rotary_dim,
    ) == (
        16,
        16,
        128,
        128,
    )


def test_flags_are_read() -> None:
    assert parse(olmoe(clip_qkv=8)).attention.qkv_limit == 8.0
    assert parse(olmoe(norm_topk_prob=True)).router.renormalize
    biased = parse(olmoe(attention_bias=True))
    assert (biased.attention.has_qkv_bias, biased.attention.has_o_bias) == (True, True)


def test_an_absent_key_has_the_default_of_the_config_class() -> None:
    config = parse({"model_type": "olmoe"})

    assert (config.vocab_size, config.hidden_size, config.num_layers, config.expert_width) == (
        50_304, 2048, 16, 2048,
    )  # fmt: skip
    assert (config.attention.num_heads, config.attention.num_kv_heads, config.eos_ids) == (16, 16, (50_279,))
    assert (config.num_experts, config.experts_per_token, config.router.renormalize) == (64, 8, False)
    assert (config.norm_eps, config.context_tokens, config.attention.rope.theta) == (1e-5, 4096, 1e4)
    assert parse({"model_type": "olmoe", "num_attention_heads": 8}).attention.num_kv_heads == 8


def test_unsupported_features_are_refused_by_name() -> None:
    with pytest.raises(CheckpointError, match=r"clip_qkv is 0, a whole number; expected a number above zero"):
        parse(olmoe(clip_qkv=0))
    with pytest.raises(UnsupportedModel, match=r"sets sliding_window to 8, but olmoe does not know this key"):
        parse(olmoe(sliding_window=8))
