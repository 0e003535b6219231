"""ERNIE-4.5 MoE: softmax scores with a bias for the choice, and weights divided by their sum, but not by less than
`moe_norm_min`.

Every `moe_layer_interval`-th layer from `moe_layer_start_index` to `moe_layer_end_index` has experts; the others have
dense networks. Adjacent dimensions rotate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.gguf import GgufFile
from argosy.config import AttentionConfig, LayerConfig, ModelConfig, RouterConfig
from argosy.errors import CheckpointError
from argosy.model.families.attention.qwen_moe import make_layouts
from argosy.model.reading.common_config import CommonDefaults, read_common
from argosy.model.reading.config_reader import MOST_LAYERS, ConfigReader
from argosy.model.reading.gguf_config import SOFTMAX, GgufConfigReader
from argosy.model.reading.gguf_layout import read_gguf_layout

MODEL_TYPE = "ernie4_5_moe"
GGUF_ARCHITECTURE = "ernie4_5-moe"
LAYOUTS = make_layouts(
    {
        "choice_bias": "mlp.moe_statics.e_score_correction_bias",
        "shared_gate": "mlp.shared_experts.gate_proj.weight",
        "shared_up": "mlp.shared_experts.up_proj.weight",
        "shared_down": "mlp.shared_experts.down_proj.weight",
    },
    passed_over=r"model\.mtp_.*",
)
_LEAST = 1e-12  # the default of moe_norm_min; GGUF has no key for it


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read a `config.json`; an absent key gets the default of `Ernie4_5_MoeConfig` in transformers 5.24.

    Raises:
        UnsupportedModel: a key or value asks for something that is not supported.
        CheckpointError: a key is missing, malformed, or contradicts another.
    """
    reader = ConfigReader(raw, MODEL_TYPE)
    common = read_common(
        reader,
        CommonDefaults(
            vocab_size=103_424, hidden_size=2560, num_heads=20, num_kv_heads=4, rope_theta=500_000.0, norm_eps=1e-5,
            context_tokens=131_072, num_experts=64, experts_per_token=6, bos_id=1, eos_id=2, is_embedding_tied=True,
        ),
    )  # fmt: skip
    num_layers = reader.integer("num_hidden_layers", default=28, most=MOST_LAYERS)
    first = reader.integer("moe_layer_start_index", default=1, least=0, most=MOST_LAYERS)
    last = reader.integer("moe_layer_end_index", default=-1, least=-1, most=MOST_LAYERS)
    interval = reader.integer("moe_layer_interval", default=1)
    last = num_layers - 1 if last == -1 else last
    is_moe = [(i + 1) % interval == 0 and first <= i <= last for i in range(num_layers)]
    if not any(is_moe):
        raise CheckpointError(
            f"config.json leaves no layer with routed experts: moe_layer_start_index is {first}, moe_layer_end_index "
            f"{last}, moe_layer_interval {interval}, num_hidden_layers {num_layers}",
            key="moe_layer_interval",
        )
    reader.neutral("use_bias", False)
    reader.neutral("moe_gate", "topk")
    reader.neutral("moe_use_aux_free", True)
    reader.passed("moe_capacity", "num_nextn_predict_layers")
    expert_width = reader.integer("moe_intermediate_size", default=1536)
    config = ModelConfig(
        family=MODEL_TYPE,
        layers=_layers(common.attention, is_moe),
        expert_width=expert_width,
        dense_width=reader.integer("intermediate_size", default=12_288),
        shared_width=expert_width * reader.integer("moe_num_shared_experts", default=2, least=0),
        router=_router(reader.number("moe_norm_min", _LEAST)),
        **common.model,
    )
    reader.finish()
    return config


def open_gguf(file: GgufFile) -> ModelFiles:
    """The model in a GGUF file of architecture `ernie4_5-moe`.

    Raises:
        UnsupportedModel: a key, value or tensor type that is not supported.
        CheckpointError: a key or tensor is missing, malformed, or contradicts another.
    """
    reader = GgufConfigReader(file, GGUF_ARCHITECTURE)
    common = reader.common()
    num_layers = reader.num_layers()
    first = reader.integer("leading_dense_block_count", 0, least=0, most=num_layers - 1)
    interval = reader.integer("interleave_moe_layer_step", 1, most=num_layers - first)
    reader.neutral("expert_gating_func", 0, SOFTMAX)
    has_shared = reader.integer("expert_shared_count", 0, least=0) > 0
    shared_width = reader.integer("expert_shared_feed_forward_length", 0, least=0)
    config = ModelConfig(
        family=MODEL_TYPE,
        layers=_layers(common.attention, [(i + 1) % interval == 0 and i >= first for i in range(num_layers)]),
        expert_width=reader.integer("expert_feed_forward_length"),
        dense_width=reader.integer("feed_forward_length"),
        shared_width=shared_width if has_shared else 0,
        router=_router(_LEAST),
        **common.model,
    )
    reader.finish()
    return read_gguf_layout(file, config, is_paired=False, has_rope_freqs=False)


def _layers(heads: Mapping[str, Any], is_moe: list[bool]) -> tuple[LayerConfig, ...]:
    attention = AttentionConfig(**{**heads, "rope": replace(heads["rope"], is_interleaved=True)})
    return tuple(LayerConfig(mixer=attention, is_moe=moe) for moe in is_moe)


def _router(least: float) -> RouterConfig:
    return RouterConfig(has_choice_bias=True, renormalize=True, renormalize_least=least)
