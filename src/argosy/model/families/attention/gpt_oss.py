"""gpt-oss (arXiv:2508.10925): attention with sinks, every second layer in a window, and a bias on every product.

Experts clamp the input of their activation, and router and experts also have biases. Layers alternate between a
sliding window and full attention, the window first, unless `layer_types` says otherwise. The hub stores experts in
MXFP4: blocks and scales stacked over the experts of a layer, with alternating rows of gate and up. The unquantised
version stores experts transposed, [experts, hidden, 2 * width] with alternating columns, so rows are not contiguous:
`argosy pack` reads it, and the pack runs.

The rotary embedding is yarn without whole-number bounds (`truncate` is false). GGUF metadata have no key for that; as
a property of the weights, it also applies to GGUF files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.gguf import GgufFile
from argosy.config import ActivationConfig, AttentionConfig, LayerConfig, ModelConfig, RouterConfig
from argosy.errors import CheckpointError
from argosy.model.reading.common_config import CommonDefaults, read_common
from argosy.model.reading.config_reader import MOST_LAYERS, ConfigReader
from argosy.model.reading.gguf_config import GgufConfigReader
from argosy.model.reading.gguf_layout import read_gguf_layout
from argosy.model.reading.layout import ATTENTION_NAMES, Layout

MODEL_TYPE = "gpt_oss"
GGUF_ARCHITECTURE = "gpt-oss"

_LAYER_NAMES = {
    **ATTENTION_NAMES,
    "sinks": "self_attn.sinks",
    "router": "mlp.router.weight",
    "router_bias": "mlp.router.bias",
    "expert_gate_bias": "mlp.experts.gate_up_proj_bias",
    "expert_up_bias": "mlp.experts.gate_up_proj_bias",
    "expert_down_bias": "mlp.experts.down_proj_bias",
}
_BY_TURNS = ("expert_gate_bias", "expert_up_bias")

LAYOUTS = (
    Layout(
        layer_names=_LAYER_NAMES,
        by_turns=_BY_TURNS,
        mxfp4_names=(
            "mlp.experts.gate_up_proj_blocks",
            "mlp.experts.gate_up_proj_scales",
            "mlp.experts.down_proj_blocks",
            "mlp.experts.down_proj_scales",
        ),
    ),
    Layout(
        layer_names=_LAYER_NAMES,
        by_turns=_BY_TURNS,
        transposed_names=("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
        has_turns=True,
    ),
)

# The default of rope_parameters, and the activation of every released model.
_DEFAULT_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
_LIMIT, _ALPHA = 7.0, 1.702


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read a `config.json`; an absent key gets the default of `GptOssConfig` in transformers 5.24.

    Raises:
        UnsupportedModel: a key or value asks for something that is not supported.
        CheckpointError: a key is missing, malformed, or contradicts another.
    """
    if not raw.get("rope_scaling") and not raw.get("rope_parameters"):
        raw = {**raw, "rope_scaling": _DEFAULT_ROPE}
    reader = ConfigReader(raw, MODEL_TYPE)
    common = read_common(
        reader,
        CommonDefaults(
            vocab_size=201_088,
            hidden_size=2880,
            num_heads=64,
            num_kv_heads=8,
            head_dim=64,
            rope_theta=150_000.0,
            norm_eps=1e-5,
            context_tokens=131_072,
            num_experts=128,
            experts_per_token=4,
        ),
    )
    num_layers = reader.integer("num_hidden_layers", default=36, most=MOST_LAYERS)
    windows = _read_windows(reader, num_layers)
    has_bias = reader.flag("attention_bias", True)
    # The exporter of the released files repeats the number under this key.
    reader.neutral("initial_context_length", common.attention["rope"].original_context, None)
    attention = AttentionConfig(
        **common.attention, has_qkv_bias=has_bias, has_o_bias=has_bias, has_sinks=True
    )
    config = ModelConfig(
        family=MODEL_TYPE,
        layers=_layers(attention, windows),
        expert_width=reader.integer("intermediate_size", default=2880),
        router=RouterConfig(has_bias=True, renormalize=True),
        activation=ActivationConfig(
            kind="clamped",
            limit=reader.number("swiglu_limit", _LIMIT),
            alpha=reader.number("swiglu_alpha", _ALPHA),
        ),
        has_expert_bias=True,
        **common.model,
    )
    reader.finish()
    return config


def open_gguf(file: GgufFile) -> ModelFiles:
    """The model in a GGUF file of architecture `gpt-oss`, in which even layers have the window.

    Raises:
        UnsupportedModel: a key, value or tensor type that is not supported.
        CheckpointError: a key or tensor is missing, malformed, or contradicts another.
    """
    reader = GgufConfigReader(file, GGUF_ARCHITECTURE)
    common = reader.common()
    rope = common.attention.pop("rope")
    window = reader.integer("attention.sliding_window")
    width = reader.integer("feed_forward_length", 0, least=0)
    attention = AttentionConfig(
        **common.attention,
        rope=replace(rope, truncate=False) if rope.kind == "yarn" else rope,
        has_qkv_bias=True,
        has_o_bias=True,
        has_sinks=True,
    )
    windows = (window if layer % 2 == 0 else 0 for layer in range(reader.num_layers()))
    config = ModelConfig(
        family=MODEL_TYPE,
        layers=_layers(attention, windows),
        expert_width=reader.integer("expert_feed_forward_length", width),
        router=RouterConfig(has_bias=True, renormalize=True),
        activation=ActivationConfig(kind="clamped", limit=_LIMIT, alpha=_ALPHA),
        has_expert_bias=True,
        **common.model,
    )
    reader.finish()
    return read_gguf_layout(
        file, config, is_paired=False, has_rope_freqs=False, names={"mlp_norm": "post_attention_norm.weight"}
    )


def _layers(attention: AttentionConfig, windows: Iterable[int]) -> tuple[LayerConfig, ...]:
    return tuple(LayerConfig(mixer=replace(attention, sliding_window=one), is_moe=True) for one in windows)


def _read_windows(reader: ConfigReader, num_layers: int) -> tuple[int, ...]:
    """The sliding window of each layer, 0 for full attention."""
    window = reader.optional_integer("sliding_window", default=128)
    kinds = reader.layer_types(num_layers)
    is_sliding = [
        layer % 2 == 0 if kinds is None else kinds[layer] == "sliding_attention"
        for layer in range(num_layers)
    ]
    if window is None and any(is_sliding):
        raise CheckpointError(
            f"config.json asks for sliding attention in layer {is_sliding.index(True)}, but sliding_window is null",
            key="sliding_window",
        )
    return tuple(window if window is not None and sliding else 0 for sliding in is_sliding)
