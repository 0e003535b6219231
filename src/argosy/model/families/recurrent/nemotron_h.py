"""Nemotron-3 (Nano, Super) and Nemotron-H: a layer is a Mamba-2 mixer, attention without rotary embedding, experts, or
a dense network, alone behind one norm. Networks have no gate, only relu squared; Super's experts read and write latent
vectors. Models before Nemotron-3, such as Nano-9B-v2, have none. Layers for multi-token prediction are passed over.

A step of a mixer, dt, is not clamped, as in NVIDIA's kernels, vLLM and llama.cpp. transformers 5.24 raises it to
`time_step_min` in a prompt and not afterwards, so that its answers depend on how a text was cut into steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from argosy.config import AttentionConfig, MambaConfig, ModelConfig
from argosy.model.families.recurrent.mamba import MAMBA_NAMES, MOST_OF_ONE, NO_LIMIT, require_even_shares
from argosy.model.families.recurrent.nemotron_h_gguf import (
    GGUF_ARCHITECTURE,
    OTHER_ARCHITECTURES,
    RELU2,
    layers_of,
    open_gguf,
    read_pattern,
)
from argosy.model.reading.common_config import Common, CommonDefaults, read_common
from argosy.model.reading.config_reader import ConfigReader
from argosy.model.reading.experts_config import read_sigmoid_router
from argosy.model.reading.layout import Layout

__all__ = ["GGUF_ARCHITECTURE", "LAYOUTS", "MODEL_TYPE", "OTHER_ARCHITECTURES", "open_gguf", "parse_config"]

MODEL_TYPE = "nemotron_h"

_NAMES = {name: f"{name}_proj.weight" for name in ("q", "k", "v", "o", "up", "down")} | {
    "router": "gate.weight",
    "choice_bias": "gate.e_score_correction_bias",
    "shared_up": "shared_experts.up_proj.weight",
    "shared_down": "shared_experts.down_proj.weight",
    "latent_down": "fc1_latent_proj.weight",
    "latent_up": "fc2_latent_proj.weight",
}
_HUB = Layout(
    layer_names={
        **dict.fromkeys(("attn_norm", "mlp_norm"), "norm.weight"),
        **{canonical: f"mixer.{name}" for canonical, name in (_NAMES | MAMBA_NAMES).items()},
    },
    expert_names=("mixer.experts.{expert}.up_proj.weight", "mixer.experts.{expert}.down_proj.weight"),
    prefix="backbone.",
    embed_name="embeddings.weight",
    final_norm_name="norm_f.weight",
    passed_over=r"mtp\..+",
)
LAYOUTS = (_HUB, replace(_HUB, prefix="model."))
_DEFAULTS = CommonDefaults(
    vocab_size=131_072, hidden_size=4096, num_heads=32, num_kv_heads=8, head_dim=128, rope_theta=10_000.0,
    norm_eps=1e-5, context_tokens=4096, num_experts=8, experts_per_token=2, eos_id=2, bos_id=1,
    norm_eps_name="layer_norm_epsilon",
)  # fmt: skip
_OF_EXPERTS = (
    "moe_intermediate_size", "moe_latent_size", "moe_shared_expert_intermediate_size", "n_group", "n_routed_experts",
    "n_shared_experts", "norm_topk_prob", "num_experts_per_tok", "routed_scaling_factor", "topk_group",
)  # fmt: skip
_UNUSED = (  # of training, of transformers' kernels, and of layers for multi-token prediction
    "chunk_size", "expand", "mamba_ssm_cache_dtype", "moe_shared_expert_overlap", "mtp_hybrid_override_pattern",
    "mtp_layers_block_type", "num_logits_to_keep", "num_nextn_predict_layers", "rescale_prenorm_residual",
    "residual_in_fp32", "time_step_floor", "time_step_max", "time_step_min", "use_mamba_kernels",
)  # fmt: skip


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read a `config.json`; an absent key gets the default of `NemotronHConfig` in transformers 5.24.

    Raises:
        UnsupportedModel: a key or value asks for something that is not supported.
        CheckpointError: a key is missing, malformed, or contradicts another.
    """
    reader = ConfigReader(raw, MODEL_TYPE)
    pattern = read_pattern(reader)
    has_experts = "E" in pattern
    common = read_common(reader, _DEFAULTS if has_experts else replace(_DEFAULTS, num_experts=0))
    reader.neutral("num_hidden_layers", len(pattern))
    reader.neutral("norm_eps", common.model["norm_eps"])
    for name, only in {"mlp_hidden_act": "relu2", "mamba_hidden_act": "silu", "sliding_window": None}.items():
        reader.neutral(name, only)
    reader.neutral("time_step_limit", *NO_LIMIT)
    for name in ("attention_bias", "mamba_proj_bias"):
        reader.neutral(name, False)
    reader.passed(*_UNUSED)
    mamba = MambaConfig(
        num_heads=reader.integer("mamba_num_heads", default=128, most=MOST_OF_ONE),
        head_dim=reader.integer("mamba_head_dim", default=64, most=MOST_OF_ONE),
        state_dim=reader.integer("ssm_state_size", default=128, most=MOST_OF_ONE),
        num_groups=reader.integer("n_groups", default=8),
        conv_width=reader.integer("conv_kernel", default=4, most=64),
        has_conv_bias=reader.flag("use_conv_bias", True),
        has_bias=reader.flag("use_bias", False),
    )
    require_even_shares(mamba, mamba.channels, "config.json: mamba_num_heads and n_groups")
    config = ModelConfig(
        family=MODEL_TYPE,
        layers=layers_of(pattern, mamba, AttentionConfig(**common.attention | {"rope": None})),
        dense_width=reader.integer("intermediate_size", default=21_504),
        activation=RELU2,
        **common.model,
        **(_read_experts(reader, common) if has_experts else {}),
    )
    reader.passed(*_OF_EXPERTS)  # without experts, they say nothing
    reader.finish()
    return config


def _read_experts(reader: ConfigReader, common: Common) -> dict[str, Any]:
    reader.neutral("n_shared_experts", 1)  # the width below is that of all together
    read_router = read_sigmoid_router(1.0, 1, 1)
    return {
        "expert_width": reader.integer("moe_intermediate_size", default=7688),
        "shared_width": reader.integer("moe_shared_expert_intermediate_size", default=7688),
        "expert_latent": reader.optional_integer("moe_latent_size") or 0,
        "router": read_router(reader, common.model["num_experts"], common.model["experts_per_token"]),
    }
