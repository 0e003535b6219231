"""Granite-3 MoE: four factors, of embeddings, attention scores, residuals and logits; routing weights are the softmax
of the chosen logits.

`granitemoeshared` adds a shared expert, whose gate and up are one tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.gguf import GgufFile
from argosy.config import AttentionConfig, LayerConfig, ModelConfig, RouterConfig
from argosy.model.reading.common_config import CommonDefaults, read_common
from argosy.model.reading.config_reader import MOST_LAYERS, ConfigReader
from argosy.model.reading.gguf_config import GgufConfigReader
from argosy.model.reading.gguf_layout import read_gguf_layout
from argosy.model.reading.layout import ATTENTION_NAMES, Layout

MODEL_TYPE = "granitemoe"
GGUF_ARCHITECTURE = "granitemoe"

_LAYER_NAMES = {
    **ATTENTION_NAMES,
    "shared_gate": "shared_mlp.input_linear.weight",
    "shared_up": "shared_mlp.input_linear.weight",
    "shared_down": "shared_mlp.output_linear.weight",
}
# transformers 5 renames the router and the experts.
LAYOUTS = tuple(
    Layout(
        layer_names=_LAYER_NAMES | {"router": f"block_sparse_moe.{router}"},
        joined=("shared_gate", "shared_up"),
        fused_names=(f"block_sparse_moe.{gate_up}", f"block_sparse_moe.{down}"),
    )
    for router, gate_up, down in (
        ("router.layer.weight", "input_linear.weight", "output_linear.weight"),
        ("router.weight", "experts.gate_up_proj", "experts.down_proj"),
    )
)
_DEFAULTS = CommonDefaults(
    vocab_size=32_000, hidden_size=4096, num_heads=32, num_kv_heads=None, rope_theta=10_000.0, norm_eps=1e-6,
    context_tokens=2048, num_experts=8, experts_per_token=2, bos_id=1, eos_id=2,
)  # fmt: skip


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read a `config.json`; an absent key gets the default of `GraniteMoeConfig` in transformers 5.24.

    Raises:
        UnsupportedModel: a key or value asks for something that is not supported.
        CheckpointError: a key is missing, malformed, or contradicts another.
    """
    return read_granite(ConfigReader(raw, MODEL_TYPE), MODEL_TYPE)


def read_granite(reader: ConfigReader, family: str, shared: int | None = None) -> ModelConfig:
    """Read the config of this family, or of one with a shared expert; `shared` is the default of its width."""
    common = read_common(reader, _DEFAULTS)
    has_bias = reader.flag("attention_bias", False)
    attention = AttentionConfig(
        **common.attention,
        scale=reader.number("attention_multiplier", 1.0),
        has_qkv_bias=has_bias,
        has_o_bias=has_bias,
    )
    num_layers = reader.integer("num_hidden_layers", default=32, most=MOST_LAYERS)
    config = ModelConfig(
        family=family,
        layers=(LayerConfig(mixer=attention, is_moe=True),) * num_layers,
        expert_width=reader.integer("intermediate_size", default=11_008),
        shared_width=0
        if shared is None
        else reader.integer("shared_intermediate_size", default=shared, least=0),
        router=RouterConfig(renormalize=True),
        embedding_scale=reader.number("embedding_multiplier", 1.0),
        residual_scale=reader.number("residual_multiplier", 1.0),
        logit_scale=1 / reader.number("logits_scaling", 1.0),
        **common.model,
    )
    reader.finish()
    return config


def open_gguf(file: GgufFile) -> ModelFiles:
    """The model in a GGUF file of architecture `granitemoe`, with or without a shared expert.

    Raises:
        UnsupportedModel: a key, value or tensor type that is not supported.
        CheckpointError: a key or tensor is missing, malformed, or contradicts another.
    """
    reader = GgufConfigReader(file, GGUF_ARCHITECTURE)
    config = read_granite_gguf(reader, MODEL_TYPE)
    reader.finish()
    return read_gguf_layout(file, config, is_paired=True, has_rope_freqs=False)


def read_granite_gguf(reader: GgufConfigReader, family: str, **changes: Any) -> ModelConfig:
    """Read the metadata that Granite's architectures share; `changes` are arguments of `GgufConfigReader.common`."""
    common = reader.common(**changes)
    attention = AttentionConfig(**common.attention, scale=reader.number("attention.scale", 0.0))
    return ModelConfig(
        family=family,
        layers=(LayerConfig(mixer=attention, is_moe=True),) * reader.num_layers(),
        expert_width=reader.integer("feed_forward_length"),
        shared_width=reader.integer("expert_shared_feed_forward_length", 0, least=0),
        router=RouterConfig(renormalize=True),
        # 0 stands for no factor.
        embedding_scale=reader.number("embedding_scale", 0.0) or 1.0,
        residual_scale=reader.number("residual_scale", 0.0) or 1.0,
        logit_scale=1 / reader.number("logit_scale"),
        **common.model,
    )
