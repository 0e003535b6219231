"""MiMo-V2-Flash: values narrower than keys and scaled, and layers with a window that have sinks and other KV heads.

Experts are chosen and weighted as in DeepSeek-V3, and there is no shared expert. The hub gives the kinds of layers as
numbers (`hybrid_layer_pattern`, `moe_layer_freq`), and what differs in layers with a window under `swa_*`; transformers
5.24 writes `layer_types`, `mlp_layer_types` and a rotary embedding for each kind. A position in a window sees the
`sliding_window_size` positions before itself, as in SGLang, with which the makers serve, and in transformers, which
writes one more as `sliding_window`. Layers for multi-token prediction (`model.mtp.`) are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from argosy.config import AttentionConfig, LayerConfig, ModelConfig
from argosy.errors import CheckpointError
from argosy.model.families.windows.mimo_v2_flash_gguf import GGUF_ARCHITECTURE, open_gguf
from argosy.model.reading.config_reader import MOST_EXPERTS, MOST_LAYERS, AttentionShape, ConfigReader
from argosy.model.reading.experts_config import read_kinds, read_sigmoid_router
from argosy.model.reading.layout import ATTENTION_NAMES, separate_and_fused
from argosy.model.reading.rope_config import read_ropes_of_layers

__all__ = ["GGUF_ARCHITECTURE", "LAYOUTS", "MODEL_TYPE", "open_gguf", "parse_config"]

MODEL_TYPE = "mimo_v2_flash"

LAYOUTS = separate_and_fused(
    {
        **ATTENTION_NAMES,
        "sinks": "self_attn.attention_sink_bias",
        "router": "mlp.gate.weight",
        "choice_bias": "mlp.gate.e_score_correction_bias",
        **{part: f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")},
    },
    passed_over=r"model\.mtp\..*",
)

_FULL, _SLIDING = "full_attention", "sliding_attention"


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read a `config.json`, as `MiMoV2FlashConfig` in transformers 5.24 does; raises as `parse_wrapper`."""
    if raw.get("routed_scaling_factor", 1.0) is None:  # as on the hub
        raw = {**raw, "routed_scaling_factor": 1.0}
    reader = ConfigReader(raw, MODEL_TYPE)
    num_layers = reader.integer("num_hidden_layers", default=48, most=MOST_LAYERS)
    num_experts = reader.integer("n_routed_experts", "num_local_experts", default=256, most=MOST_EXPERTS)
    experts_per_token = reader.integer("num_experts_per_tok", default=8, most=num_experts)
    reader.one_of("hidden_act", "silu", ("silu",))
    reader.neutral("n_shared_experts", None, 0)
    reader.passed("hybrid_block_size", "attention_chunk_size")  # the makers' code ignores them
    shape = reader.attention_shape(hidden_size=4096, num_heads=64, num_kv_heads=4, head_dim=192)
    attentions = _read_attentions(reader, shape)
    kinds = read_kinds(
        reader, "layer_types", "hybrid_layer_pattern", (_FULL, _SLIDING),
        [int(layer > 0 and (layer + 1) % 6 > 0) for layer in range(num_layers)],
    )  # fmt: skip
    networks = read_kinds(
        reader, "mlp_layer_types", "moe_layer_freq", ("dense", "sparse"), [0, *[1] * (num_layers - 1)]
    )
    config = ModelConfig(
        family=MODEL_TYPE,
        vocab_size=reader.integer("vocab_size", default=152_576),
        hidden_size=shape.hidden_size,
        layers=tuple(
            LayerConfig(mixer=attentions[kind], is_moe=network == "sparse")
            for kind, network in zip(kinds, networks, strict=True)
        ),
        norm_eps=reader.number("layernorm_epsilon", reader.number("rms_norm_eps", 1e-5)),
        context_tokens=reader.integer("max_position_embeddings", default=131_072),
        num_experts=num_experts,
        experts_per_token=experts_per_token,
        expert_width=reader.integer("moe_intermediate_size", default=2048),
        router=read_sigmoid_router(1.0, 1, 1)(reader, num_experts, experts_per_token),
        dense_width=reader.integer("intermediate_size", default=16_384),
        is_embedding_tied=reader.flag("tie_word_embeddings", False),
        eos_ids=reader.token_ids("eos_token_id"),
        bos_id=next(iter(reader.token_ids("bos_token_id", 1)), None),
    )
    reader.finish()
    return config


def _read_attentions(reader: ConfigReader, shape: AttentionShape) -> dict[str, AttentionConfig]:
    """Read the attention of layers that see everything, and of layers with a window."""
    value_dim = reader.integer("v_head_dim", default=128)
    share = reader.number("partial_rotary_factor", 0.334)
    thetas = {_FULL: reader.number("rope_theta", 5e6), _SLIDING: reader.number("swa_rope_theta", 1e4)}
    reader.neutral("rope_scaling", None, {}, {"type": "default"}, {"rope_type": "default"})
    ropes = read_ropes_of_layers(
        reader,
        dict.fromkeys(thetas, shape.head_dim),
        {kind: {"rope_theta": theta, "partial_rotary_factor": share} for kind, theta in thetas.items()},
        default_partial=share,
    )
    window = reader.integer("sliding_window", default=129)
    if (before := reader.optional_integer("sliding_window_size")) is not None:
        window = before + 1
    same = {"num_attention_heads": shape.num_heads, "head_dim": shape.head_dim, "v_head_dim": value_dim}
    for key, value in same.items():
        reader.neutral(f"swa_{key}", value)
    reader.neutral("add_full_attention_sink_bias", False)
    reader.neutral("add_swa_attention_sink_bias", True)
    scale = reader.optional_number("attention_value_scale")
    full = AttentionConfig(
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        rope=ropes[_FULL],
        value_dim=value_dim,
        value_scale=scale or (1.0 if reader.has("attention_value_scale") else 0.707),
        has_qkv_bias=reader.flag("attention_bias", False),
    )
    count = reader.integer(key := "swa_num_key_value_heads", default=2 * shape.num_kv_heads)
    if shape.num_heads % count:
        raise CheckpointError(
            f"config.json: {key} is {count}, expected a divisor of {shape.num_heads} heads", key=key
        )
    sliding = replace(full, num_kv_heads=count, rope=ropes[_SLIDING], sliding_window=window, has_sinks=True)
    return {_FULL: full, _SLIDING: sliding}
