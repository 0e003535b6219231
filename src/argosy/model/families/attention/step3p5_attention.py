"""The attention of Step-3.5's layers as `config.json` gives it: in lists with a value for each layer, or by kind.

Layers with a window have heads of their own (`attention_other_setting`). The makers give the base of the rotary
embedding and the part of the dimensions that rotate layer by layer, transformers 5.24 by kind. Only layers without a
window have scaled frequencies.
"""

from __future__ import annotations

from dataclasses import replace

from argosy.config import AttentionConfig
from argosy.errors import CheckpointError
from argosy.model.families.windows.windowed import FULL, SLIDING
from argosy.model.reading.config_reader import ConfigReader
from argosy.model.reading.rope_config import read_rope

_FAMILY = "step3p5"


def read_mixers(reader: ConfigReader, num_layers: int, num_mtp: int) -> list[AttentionConfig]:
    """Read the attention of each layer. Lists may have `num_mtp` more entries, for layers of multi-token prediction.

    Raises:
        UnsupportedModel: a key or value asks for something that is not supported.
        CheckpointError: a key is missing, malformed, or contradicts another.
    """
    head_dim = reader.integer("head_dim", default=128)
    heads = reader.integer("num_attention_heads", default=64)
    groups = reader.integer("num_key_value_heads", "num_attention_groups", default=8)
    kinds = reader.layer_types(num_layers, num_mtp_layers=num_mtp) or (FULL,) * num_layers
    other = ConfigReader(reader.mapping(key := "attention_other_setting") or {}, _FAMILY, within=key)
    for name, value in {"attention_type": SLIDING, "head_dim": head_dim, "true_head_dim": head_dim}.items():
        other.neutral(name, value)
    more = other.integer("num_attention_heads", default=heads)
    counts = {
        FULL: (heads, groups),
        SLIDING: (
            reader.integer("num_sliding_attention_heads", default=more),
            other.integer("num_attention_groups", default=groups),
        ),
    }
    other.finish()
    if wrong := next(((n, g) for n, g in counts.values() if n % g), None):
        raise CheckpointError(
            f"config.json: layers have {wrong[0]} heads, expected a multiple of {wrong[1]}", key=key
        )
    for layer, own in reader.numbered("per_layer_config", num_layers) or ():
        own.neutral("num_attention_heads", counts[kinds[layer]][0])
        own.finish()
    has_bias = reader.flag("attention_bias", False)
    shared = AttentionConfig(
        num_heads=heads, num_kv_heads=groups, head_dim=head_dim, rope=None, qk_norm="head", output_gate="heads",
        has_qkv_bias=has_bias, has_o_bias=has_bias, scale=reader.number("query_pre_attn_scalar", head_dim) ** -0.5,
    )  # fmt: skip
    windows = {FULL: 0, SLIDING: reader.integer("sliding_window", default=None) if SLIDING in kinds else 0}
    by_kind, scaling = reader.mapping("rope_parameters"), reader.mapping("rope_scaling") or {}
    bases = reader.numbers_of_layers("rope_theta", num_layers, num_mtp, 10_000.0)
    parts = reader.numbers_of_layers("partial_rotary_factors", num_layers, num_mtp, 1.0)
    context = reader.integer("max_position_embeddings", default=128_000)

    def read(kind: str, base: float, part: float) -> AttentionConfig:
        values: object = {
            "rope_theta": base,
            "partial_rotary_factor": part,
            **(scaling if kind == FULL else {}),
        }
        inner = ConfigReader({"rope_parameters": values if by_kind is None else by_kind.get(kind)}, _FAMILY)
        rope = read_rope(
            inner, head_dim=head_dim, context_tokens=context, default_theta=base, default_partial=1.0
        )
        num_heads, num_kv_heads = counts[kind]
        return replace(
            shared, num_heads=num_heads, num_kv_heads=num_kv_heads, rope=rope, sliding_window=windows[kind]
        )

    return [read(*each) for each in zip(kinds, bases, parts, strict=True)]
