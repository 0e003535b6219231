"""Code shared by Qwen3-Next and Qwen3.5-MoE: three gated delta nets, then one layer of attention with an output gate.

Norms are zero-centred, except the norm inside a delta net. A quarter of each head rotates. `layer_types` lists the
layers with attention, or `full_attention_interval` gives their spacing. The layer for multi-token prediction (`mtp.*`),
which only drafts, has attention and experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from argosy.config import AttentionConfig, DeltaConfig, LayerConfig
from argosy.errors import CheckpointError
from argosy.model.reading.config_reader import ConfigReader

MTP_PREFIX = "mtp."
MTP_TENSORS = r"mtp\..*"

DELTA_NAMES = {
    "delta_conv": "linear_attn.conv1d.weight",
    "delta_rate": "linear_attn.A_log",
    "delta_dt_bias": "linear_attn.dt_bias",
    "delta_norm": "linear_attn.norm.weight",
    "delta_out": "linear_attn.out_proj.weight",
}

_DELTA, _ATTENTION = "linear_attention", "full_attention"

PARTIAL_ROTARY_FACTOR = 0.25  # default if a file gives none


def read_layers(
    reader: ConfigReader, is_moe: tuple[bool, ...], heads: Mapping[str, Any], *, is_joined: bool
) -> tuple[LayerConfig, ...]:
    """The mixer of each layer, combined with whether it has routed experts.

    Args:
        heads: the arguments of `AttentionConfig` that all families read.
        is_joined: projections of a delta net are stored key head by key head in two matrices.
    """
    num_layers = len(is_moe)
    has_bias = reader.flag("attention_bias", False)
    attention = AttentionConfig(
        **heads, has_qkv_bias=has_bias, has_o_bias=has_bias, qk_norm="head", output_gate="query"
    )
    delta = read_delta(reader, is_joined=is_joined)
    kinds = reader.layer_types(num_layers, (_DELTA, _ATTENTION))
    interval = reader.integer("full_attention_interval", default=4)
    if kinds is None:
        kinds = tuple(_DELTA if (layer + 1) % interval else _ATTENTION for layer in range(num_layers))
    return tuple(
        LayerConfig(mixer=delta if kind == _DELTA else attention, is_moe=moe)
        for moe, kind in zip(is_moe, kinds, strict=True)
    )


def read_delta(
    reader: ConfigReader, *, is_joined: bool = False, num_key_heads: int = 16, num_value_heads: int = 32
) -> DeltaConfig:
    """Sizes of the delta nets; the numbers of heads are defaults.

    Raises:
        CheckpointError: a size is malformed, or value heads are not a multiple of key heads.
    """
    delta = DeltaConfig(
        num_key_heads=reader.integer("linear_num_key_heads", default=num_key_heads),
        num_value_heads=reader.integer("linear_num_value_heads", default=num_value_heads),
        key_dim=reader.integer("linear_key_head_dim", default=128),
        value_dim=reader.integer("linear_value_head_dim", default=128),
        conv_width=reader.integer("linear_conv_kernel_dim", default=4, most=64),
        has_joined_qkvz=is_joined,
        has_joined_ba=is_joined,
    )
    if delta.num_value_heads % delta.num_key_heads:
        raise CheckpointError(
            f"config.json: linear_num_value_heads is {delta.num_value_heads}, expected a multiple of "
            f"linear_num_key_heads, which is {delta.num_key_heads}",
            key="linear_num_value_heads",
        )
    return delta


def shared_arguments(reader: ConfigReader) -> dict[str, Any]:
    """Arguments of `ModelConfig` that these models have in common."""
    return {
        "draft_form": "qwen",
        "norm_offset": 1.0,
        "expert_width": reader.integer("moe_intermediate_size", default=512),
        "shared_width": reader.integer("shared_expert_intermediate_size", default=512),
        "shared_is_gated": True,
    }
