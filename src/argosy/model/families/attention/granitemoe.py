"""Granite-3 MoE: four factors, of embeddings, attention scores, residuals and logits; routing weights are the softmax
of the chosen logits.

`granitemoeshared` adds a shared expert, whose gate and up are one tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.gguf import GgufFile
from argosy.config import AttentionConfig, LayerConfig, ModelConfig, RouterConfig
from argosy.model.families.attention import granite
from argosy.model.reading.common_config import read_common
from argosy.model.reading.config_reader import MOST_LAYERS, ConfigReader
from argosy.model.reading.gguf_config import GgufConfigReader
from argosy.model.reading.gguf_layout import read_gguf_layout
from argosy.model.reading.layout import ATTENTION_NAMES, Layout

MODEL_TYPE = "granitemoe"
GGUF_ARCHITECTURE = "granitemoe"

# Without routed experts, the shared expert is the only network.
_LAYER_NAMES = {
    **ATTENTION_NAMES,
    **dict.fromkeys(("shared_gate", "shared_up", "gate", "up"), "shared_mlp.input_linear.weight"),
    **dict.fromkeys(("shared_down", "down"), "shared_mlp.output_linear.weight"),
}
# transformers 5 renames the router and the experts.
LAYOUTS = tuple(
    Layout(
        layer_names=_LAYER_NAMES | {"router": f"block_sparse_moe.{router}"},
        joined=("shared_gate", "shared_up", "gate", "up"),
        fused_names=(f"block_sparse_moe.{gate_up}", f"block_sparse_moe.{down}"),
    )
    for router, gate_up, down in (
        ("router.layer.weight", "input_linear.weight", "output_linear.weight"),
        ("router.weight", "experts.gate_up_proj", "experts.down_proj"),
    )
)
_DEFAULTS = replace(granite.DEFAULTS, num_experts=8, experts_per_token=2)


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read a `config.json`; an absent key gets the default of `GraniteMoeConfig` in transformers 5.24.

    Raises:
        UnsupportedModel: a key or value asks for something that is not supported.
        CheckpointError: a key is missing, malformed, or contradicts another.
    """
    return read_granite(ConfigReader(raw, MODEL_TYPE), MODEL_TYPE)


def read_granite(reader: ConfigReader, family: str, shared: int | None = None) -> ModelConfig:
    """Read the config of this family, or of one with a shared expert; `shared` is the default of its width. Such a
    model may have no routed experts.
    """
    has_experts = shared is None or reader.integer("num_local_experts", default=8, least=0) > 0
    common = read_common(reader, _DEFAULTS if has_experts else granite.DEFAULTS)
    attention = AttentionConfig(**common.attention, **granite.attention_of(reader))
    num_layers = reader.integer("num_hidden_layers", default=32, most=MOST_LAYERS)
    width = 0
    if shared is not None:
        width = reader.integer("shared_intermediate_size", default=shared, least=int(not has_experts))
    networks: dict[str, Any] = {"dense_width": width}
    if has_experts:
        expert_width = reader.integer("intermediate_size", default=11_008)
        networks = {
            "expert_width": expert_width,
            "shared_width": width,
            "router": RouterConfig(renormalize=True),
        }
    reader.passed("intermediate_size", "num_experts_per_tok")  # without experts, they say nothing
    config = ModelConfig(
        family=family,
        layers=(LayerConfig(mixer=attention, is_moe=has_experts),) * num_layers,
        **networks,
        **granite.factors_of(reader),
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
        **granite.gguf_factors_of(reader),
        **common.model,
    )
