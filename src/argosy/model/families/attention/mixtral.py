"""Mixtral (Jiang et al., arXiv:2401.04088): routed experts in every layer, routing weights that sum to one.

The hub's names are those of the first release (`block_sparse_moe`, w1 = gate, w3 = up, w2 = down); `transformers` 5
can also write its own (`mlp.experts.gate_up_proj`). A sliding window, if set, applies to every layer.

In GGUF it is the `llama` architecture with experts. GGUF stores rows of q and k in the order of a rotary kernel that
rotates adjacent pairs; they are put back into halves while they land.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.gguf import GgufFile
from argosy.config import AttentionConfig, LayerConfig, ModelConfig, RouterConfig
from argosy.model.reading.common_config import CommonDefaults, read_common
from argosy.model.reading.config_reader import MOST_LAYERS, ConfigReader
from argosy.model.reading.gguf_config import GgufConfigReader, frequency_factors
from argosy.model.reading.gguf_layout import read_gguf_layout
from argosy.model.reading.layout import ATTENTION_NAMES, Layout

MODEL_TYPE = "mixtral"
GGUF_ARCHITECTURE = "llama"
_DENSE_TYPE = "llama"  # the model type of the same without experts

LAYOUTS = (
    Layout(
        layer_names={**ATTENTION_NAMES, "router": "block_sparse_moe.gate.weight"},
        expert_names=(
            "block_sparse_moe.experts.{expert}.w1.weight",
            "block_sparse_moe.experts.{expert}.w3.weight",
            "block_sparse_moe.experts.{expert}.w2.weight",
        ),
    ),
    Layout(
        layer_names={**ATTENTION_NAMES, "router": "mlp.gate.weight"},
        fused_names=("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
    ),
)


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read a `config.json`; an absent key gets the default of `MixtralConfig` in transformers 5.24.

    Raises:
        UnsupportedModel: a key or value asks for something that is not supported.
        CheckpointError: a key is missing, malformed, or contradicts another.
    """
    reader = ConfigReader(raw, MODEL_TYPE)
    common = read_common(
        reader,
        CommonDefaults(
            vocab_size=32_000,
            hidden_size=4096,
            num_heads=32,
            num_kv_heads=8,
            rope_theta=1_000_000.0,
            norm_eps=1e-5,
            context_tokens=131_072,
            num_experts=8,
            experts_per_token=2,
            eos_id=2,
            bos_id=1,
        ),
    )
    num_layers = reader.integer("num_hidden_layers", default=32, most=MOST_LAYERS)
    window = reader.optional_integer("sliding_window") or 0
    reader.neutral("attention_bias", False)
    reader.neutral("use_sliding_window", window > 0)
    attention = AttentionConfig(**common.attention, sliding_window=window)
    config = ModelConfig(
        family=MODEL_TYPE,
        layers=(LayerConfig(mixer=attention, is_moe=True),) * num_layers,
        expert_width=reader.integer("intermediate_size", default=14_336),
        router=RouterConfig(renormalize=True),
        **common.model,
    )
    reader.finish()
    return config


def open_gguf(file: GgufFile) -> ModelFiles:
    """The model in a GGUF file of architecture `llama`: this family, or Llama and Mistral if there are no experts.

    Raises:
        UnsupportedModel: a key, value or tensor type that is not supported.
        CheckpointError: a key or tensor is missing, malformed, or contradicts another.
    """
    reader = GgufConfigReader(file, GGUF_ARCHITECTURE)
    has_experts = reader.integer("expert_count", 0, least=0) > 0
    common = reader.common(has_experts=has_experts)
    heads = common.attention
    rope = replace(heads.pop("rope"), frequency_factors=frequency_factors(file, heads["head_dim"]))
    window = reader.integer("attention.sliding_window", 0, least=0)
    attention = AttentionConfig(**heads, rope=rope, sliding_window=window)
    width = reader.integer("feed_forward_length")
    layers = (LayerConfig(mixer=attention, is_moe=has_experts),) * reader.num_layers()
    if has_experts:
        config = ModelConfig(
            family=MODEL_TYPE,
            layers=layers,
            expert_width=reader.integer("expert_feed_forward_length", width),
            router=RouterConfig(renormalize=reader.flag("expert_weights_norm", True)),
            **common.model,
        )
    else:
        config = ModelConfig(family=_DENSE_TYPE, layers=layers, dense_width=width, **common.model)
    reader.finish()
    return read_gguf_layout(file, config, is_paired=True, has_rope_freqs=True)
