"""Ling and Ring 2.x (mini, flash, 1T) and Sarvam-30B: GLM-4.5's mathematics, under other names of keys and tensors.

Heads of q and k are normed, a part of each rotates, and routers have DeepSeek-V3's groups. One matrix holds q, k and v.
The makers' code always divides weights by their sum, so `norm_topk_prob` false is refused. Ling 1.x has the same model
type, another router and another order of rotary pairs, and is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.gguf import GgufFile
from argosy.config import ModelConfig
from argosy.model.families.attention.sigmoid_moe import open_sigmoid_gguf, read_sigmoid_model
from argosy.model.families.latent import deepseek
from argosy.model.reading.common_config import MoeDefaults
from argosy.model.reading.config_reader import ConfigReader
from argosy.model.reading.experts_config import ReadRouter, layers_behind_the_dense, read_sigmoid_router

MODEL_TYPE = "bailing_moe"
OTHER_TYPES = ("bailing_moe_v2", "sarvam_moe")
GGUF_ARCHITECTURE = "bailingmoe2"

LAYOUTS = tuple(
    replace(
        layout,
        layer_names={
            **layout.layer_names,
            "choice_bias": "mlp.gate.expert_bias",
            "q_norm": "attention.query_layernorm.weight",
            "k_norm": "attention.key_layernorm.weight",
            "o": "attention.dense.weight",
            **dict.fromkeys(("q", "k", "v"), "attention.query_key_value.weight"),
            **dict.fromkeys(("q_bias", "k_bias", "v_bias"), "attention.query_key_value.bias"),
        },
        joined=("q", "k", "v", "q_bias", "k_bias", "v_bias"),
        embed_name="word_embeddings.weight",
    )
    for layout in deepseek.LAYOUTS
)

# Of `BailingMoeV2Config`, in the released files of Ling-mini-2.0.
DEFAULTS = MoeDefaults(
    vocab_size=157_184, hidden_size=2048, num_layers=20, num_heads=16, num_kv_heads=4, head_dim=128,
    rope_theta=600_000.0, partial_rotary_factor=1.0, norm_eps=1e-6, context_tokens=32_768, dense_width=5120,
    expert_width=512, num_experts=256, experts_per_token=8, num_shared_experts=1, eos_id=156_892,
)  # fmt: skip
# Of `SarvamMoEConfig` in transformers 5.24.
_SARVAM = replace(
    DEFAULTS, vocab_size=262_144, hidden_size=4096, num_layers=19, num_heads=64, head_dim=64, rope_theta=8_000_000.0,
    context_tokens=131_072, dense_width=8192, expert_width=1024, num_experts=128, experts_per_token=6, eos_id=1,
)  # fmt: skip


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read a `config.json`.

    Raises:
        UnsupportedModel: a key or value asks for something that is not supported.
        CheckpointError: a key is missing, malformed, or contradicts another.
    """
    reader = ConfigReader(raw, MODEL_TYPE)
    if raw.get("model_type") == MODEL_TYPE and raw.get("architectures") != ["BailingMoeV2ForCausalLM"]:
        raise reader.unsupported("architectures", "['BailingMoeV2ForCausalLM'], of Ling 2.x")
    is_sarvam = raw.get("model_type") == "sarvam_moe"
    config = read_ling(
        reader,
        MODEL_TYPE,
        _SARVAM if is_sarvam else DEFAULTS,
        read_sigmoid_router(2.5, 1, 1) if is_sarvam else read_sigmoid_router(1.0, 8, 4),
    )
    reader.finish()
    return config


def read_ling(
    reader: ConfigReader, family: str, defaults: MoeDefaults, read_router: ReadRouter
) -> ModelConfig:
    """Read the keys of Ling 2.x; the caller calls `finish()`."""
    for key, value in (
        ("score_function", "sigmoid"), ("moe_router_enable_expert_bias", True), ("use_rmsnorm", True),
        ("norm_topk_prob", True),
        ("use_bias", False), ("norm_head", False), ("norm_softmax", False), ("use_sliding_window", False),
        ("using_split_qkv_in_self_attention", False),
    ):  # fmt: skip
        reader.neutral(key, value)
    reader.passed(
        "max_window_layers", "embedding_dropout", "output_dropout", "mtp_loss_scaling_factor", "router_dtype"
    )
    config = read_sigmoid_model(
        reader,
        family,
        defaults,
        read_router=read_router,
        read_moe_layers=layers_behind_the_dense(1),
        has_qkv_bias=reader.flag("use_qkv_bias", False),
        qk_norm="head" if reader.flag("use_qk_norm", True) else "none",
    )
    rope = config.attention.rope
    assert rope is not None
    reader.neutral("rotary_dim", rope.rotary_dim)
    reader.neutral("moe_shared_expert_intermediate_size", config.shared_width)
    return config


def open_gguf(file: GgufFile) -> ModelFiles:
    """Open a GGUF file of architecture `bailingmoe2`. Raises what `open_sigmoid_gguf` raises."""
    return open_sigmoid_gguf(file, GGUF_ARCHITECTURE, MODEL_TYPE)
