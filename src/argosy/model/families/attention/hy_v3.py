"""Hy3 (295B-A21B, Tencent): a norm of each head of q and k, and the router of DeepSeek-V3 without groups.

The first layer is dense. Layers for multi-token prediction follow the model's own layers in the files. Keys that set
the precision of sums change nothing here, where sums are float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.gguf import GgufFile
from argosy.config import ModelConfig, RouterConfig
from argosy.model.families.attention.sigmoid_moe import open_sigmoid_gguf, read_sigmoid_model
from argosy.model.families.latent import deepseek
from argosy.model.reading.common_config import MoeDefaults
from argosy.model.reading.config_reader import ConfigReader
from argosy.model.reading.experts_config import RENORMALIZE_EPS, layers_by_type

MODEL_TYPE = "hy_v3"
GGUF_ARCHITECTURE = "hy_v3"

_SEPARATE, _FUSED = deepseek.LAYOUTS
LAYOUTS = (
    replace(
        _SEPARATE,
        layer_names={
            **_SEPARATE.layer_names,
            "router": "mlp.router.gate.weight",
            "choice_bias": "mlp.expert_bias",
            **{f"shared_{name}": f"mlp.shared_mlp.{name}_proj.weight" for name in ("gate", "up", "down")},
        },
    ),
    replace(_FUSED, layer_names={**_FUSED.layer_names, "choice_bias": "mlp.e_score_correction_bias"}),
)

_DEFAULTS = MoeDefaults(
    vocab_size=120_832,
    hidden_size=4096,
    num_layers=80,
    num_heads=64,
    num_kv_heads=8,
    head_dim=128,
    rope_theta=11_158_840.0,
    norm_eps=1e-5,
    context_tokens=131_072,
    dense_width=13_312,
    expert_width=1536,
    num_experts=192,
    experts_per_token=8,
    num_shared_experts=1,
)


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read a `config.json`; an absent key gets the default of `HYV3Config` in transformers 5.24.

    Raises:
        UnsupportedModel: a key or value asks for something that is not supported.
        CheckpointError: a key is missing, malformed, or contradicts another.
    """
    reader = ConfigReader(raw, MODEL_TYPE)
    has_bias = reader.flag("attention_bias", False)
    for key in ("qk_norm", "route_norm", "moe_router_enable_expert_bias", "moe_router_use_sigmoid"):
        reader.neutral(key, True)
    reader.passed("enable_moe_fp32_combine", "enable_attention_fp32_softmax", "enable_lm_head_fp32")
    config = read_sigmoid_model(
        reader,
        MODEL_TYPE,
        _DEFAULTS,
        read_router=_read_router,
        read_moe_layers=layers_by_type(1),
        has_qkv_bias=has_bias,
        has_o_bias=has_bias,
        qk_norm="head",
    )
    reader.neutral("expert_hidden_dim", config.expert_width)  # its other name
    reader.finish()
    return config


def open_gguf(file: GgufFile) -> ModelFiles:
    """Open a GGUF file of architecture `hy_v3`. Raises what `open_sigmoid_gguf` raises."""
    return open_sigmoid_gguf(file, GGUF_ARCHITECTURE, MODEL_TYPE, names={"choice_bias": "exp_probs_b"})


def _read_router(reader: ConfigReader, num_experts: int, experts_per_token: int) -> RouterConfig:
    return RouterConfig(
        score="sigmoid",
        has_choice_bias=True,
        renormalize_eps=RENORMALIZE_EPS,
        scale=reader.number("router_scaling_factor", 2.826),
    )
