"""MiniMax-M2: q and k normed over all heads at once, partial rotary embedding, and a router with sigmoid scores.

Experts are chosen by score plus a learnt bias and weighted by the score alone; the weights of a token sum to one. The
hub gives the rotary part of a head as `rotary_dim`, transformers as `partial_rotary_factor`. Modules for multi-token
prediction (`model.mtp.`) are known and ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.gguf import GgufFile
from argosy.config import AttentionConfig, LayerConfig, ModelConfig, RopeConfig, RouterConfig
from argosy.errors import CheckpointError
from argosy.model.reading.common_config import CommonDefaults, read_common
from argosy.model.reading.config_reader import MOST_LAYERS, ConfigReader
from argosy.model.reading.gguf_config import SIGMOID, GgufConfigReader
from argosy.model.reading.gguf_layout import read_gguf_layout
from argosy.model.reading.layout import ATTENTION_NAMES, Layout

MODEL_TYPE = "minimax_m2"
GGUF_ARCHITECTURE = "minimax-m2"

LAYOUTS = (
    Layout(
        layer_names={
            **ATTENTION_NAMES,
            "router": "block_sparse_moe.gate.weight",
            "choice_bias": "block_sparse_moe.e_score_correction_bias",
        },
        expert_names=(
            "block_sparse_moe.experts.{expert}.w1.weight",
            "block_sparse_moe.experts.{expert}.w3.weight",
            "block_sparse_moe.experts.{expert}.w2.weight",
        ),
        passed_over=r"model\.mtp\..*",
    ),
    Layout(
        layer_names={
            **ATTENTION_NAMES,
            "router": "mlp.gate.weight",
            "choice_bias": "mlp.e_score_correction_bias",
        },
        fused_names=("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
    ),
)

_ROUTER = RouterConfig(score="sigmoid", has_choice_bias=True, renormalize=True)


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read a `config.json`; an absent key gets the default of `MiniMaxM2Config` in transformers 5.24.

    Raises:
        UnsupportedModel: a key or value asks for something that is not supported.
        CheckpointError: a key is missing, malformed, or contradicts another.
    """
    reader = ConfigReader(raw, MODEL_TYPE)
    common = read_common(
        reader,
        CommonDefaults(
            vocab_size=200_064,
            hidden_size=3072,
            num_heads=48,
            num_kv_heads=8,
            head_dim=128,
            rope_theta=5_000_000.0,
            norm_eps=1e-6,
            context_tokens=196_608,
            num_experts=256,
            experts_per_token=8,
            eos_id=200_020,
            bos_id=200_034,
            partial_rotary_factor=1.0,
        ),
    )
    attention = AttentionConfig(**common.attention, qk_norm="flat")
    attention = replace(attention, rope=read_rotary_dim(reader, attention))
    num_layers = reader.integer("num_hidden_layers", default=62, most=MOST_LAYERS)
    _read_other_generations(reader)
    config = ModelConfig(
        family=MODEL_TYPE,
        layers=(LayerConfig(mixer=attention, is_moe=True),) * num_layers,
        expert_width=reader.integer("intermediate_size", default=1536),
        router=_ROUTER,
        **common.model,
    )
    reader.finish()
    return config


def open_gguf(file: GgufFile) -> ModelFiles:
    """The model in a GGUF file of architecture `minimax-m2`.

    Raises:
        UnsupportedModel: a key, value or tensor type that is not supported.
        CheckpointError: a key or tensor is missing, malformed, or contradicts another.
    """
    reader = GgufConfigReader(file, GGUF_ARCHITECTURE)
    common = reader.common(has_partial_rope=True)
    reader.neutral("expert_gating_func", 0, SIGMOID)
    reader.neutral("expert_weights_norm", True)
    width = reader.integer("feed_forward_length")
    attention = AttentionConfig(**common.attention, qk_norm="flat")
    config = ModelConfig(
        family=MODEL_TYPE,
        layers=(LayerConfig(mixer=attention, is_moe=True),) * reader.num_layers(),
        expert_width=reader.integer("expert_feed_forward_length", width),
        router=_ROUTER,
        **common.model,
    )
    reader.finish()
    return read_gguf_layout(file, config, is_paired=False, has_rope_freqs=False)


def read_rotary_dim(reader: ConfigReader, attention: AttentionConfig) -> RopeConfig:
    """The rotary embedding with `rotary_dim` dimensions, if the file gives it."""
    rotary_dim, head_dim = reader.optional_integer("rotary_dim"), attention.head_dim
    rope = attention.rope
    assert rope is not None
    if rotary_dim is None:
        return rope
    if rotary_dim > head_dim or rotary_dim % 2:
        raise CheckpointError(
            f"config.json: rotary_dim is {rotary_dim}, expected an even number of at most {head_dim}, the "
            "dimensions of a head",
            key="rotary_dim",
        )
    if rope.rotary_dim not in (rotary_dim, head_dim):
        raise CheckpointError(
            f"config.json gives rotary_dim as {rotary_dim}, but partial_rotary_factor means {rope.rotary_dim}",
            key="rotary_dim",
        )
    return replace(rope, rotary_dim=rotary_dim)


def _read_other_generations(reader: ConfigReader) -> None:
    """Accept keys of MiniMax's earlier and later models, which released files contain; none changes anything here."""
    if set(reader.integers("attn_type_list", least=0, most=1)) - {1}:
        raise reader.unsupported("attn_type_list", "1, softmax attention, in every layer")
    reader.one_of("scoring_func", "sigmoid", ("sigmoid",))
    reader.neutral("use_qk_norm", True)
    reader.neutral("qk_norm_type", "per_layer")
    reader.neutral("use_routing_bias", True)
    reader.neutral("sliding_window", None)
    reader.neutral("shared_intermediate_size", 0)
    reader.neutral("shared_moe_mode", "sigmoid")
    for key in ("full_attention", "linear_attention", "mlp"):
        reader.neutral(f"layernorm_{key}_beta", 1.0)
    # For layers without experts, and there are none.
    reader.optional_integer("mlp_intermediate_size", least=0)
    reader.flag("use_mtp", False)
    reader.optional_integer("num_mtp_modules", least=0)
    reader.optional_integer("mtp_transformer_layers", least=0)
