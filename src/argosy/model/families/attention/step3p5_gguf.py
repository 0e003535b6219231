"""Step-3.5 and 3.7 in a GGUF file of architecture `step35`; `step3p5.py` says what the model computes.

Arrays give heads, windows and limits of each layer, layers for multi-token prediction included. As in llama.cpp, layers
without a window rotate half of the dimensions, and only theirs are divided by the factors in `rope_freqs.weight`.
"""

from __future__ import annotations

from dataclasses import replace

from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.gguf import GgufFile
from argosy.config import AttentionConfig, LayerConfig, ModelConfig
from argosy.errors import CheckpointError
from argosy.model.reading.experts_config import read_grouped_router, with_limits
from argosy.model.reading.gguf_config import SIGMOID, GgufConfigReader, frequency_factors
from argosy.model.reading.gguf_layout import dense_name, read_gguf_layout

GGUF_ARCHITECTURE = "step35"


def open_gguf(file: GgufFile) -> ModelFiles:
    """Open a GGUF file of architecture `step35`.

    Raises:
        UnsupportedModel: a key, value or tensor type that is not supported.
        CheckpointError: a key or tensor is missing, malformed, or contradicts another.
    """
    reader = GgufConfigReader(file, GGUF_ARCHITECTURE)
    sizes, num_layers = reader.sizes(), reader.num_layers()
    mixers = _read_mixers(reader, sizes["hidden_size"], sizes["context_tokens"], num_layers)
    is_moe = [dense_name(f"layers.{layer}.router") in file.tensors for layer in range(num_layers)]
    has_bias = any(dense_name(f"layers.{layer}.choice_bias") in file.tensors for layer in range(num_layers))
    reader.neutral("expert_gating_func", 0, SIGMOID)
    reader.integer("leading_dense_block_count", 0, least=0)  # tensors show it
    config = ModelConfig(
        family="step3p5",
        layers=tuple(LayerConfig(mixer=one, is_moe=moe) for one, moe in zip(mixers, is_moe, strict=True)),
        expert_width=reader.integer("expert_feed_forward_length"),
        router=read_grouped_router(reader, is_sigmoid=True, has_choice_bias=has_bias),
        dense_width=reader.integer("feed_forward_length"),
        shared_width=reader.integer("expert_shared_feed_forward_length"),
        draft_form=None,
        num_mtp_layers=reader.num_mtp_layers(),
        **sizes,
    )
    config = with_limits(config, reader.limits("swiglu_clamp_exp"), reader.limits("swiglu_clamp_shexp"))
    reader.finish()
    return read_gguf_layout(file, config, is_paired=False, has_rope_freqs=True)


def _read_mixers(
    reader: GgufConfigReader, hidden_size: int, context_tokens: int, num_layers: int
) -> list[AttentionConfig]:
    file, num_all = reader.file, num_layers + reader.num_mtp_layers()
    heads = reader.integers("attention.head_count", num_all)
    kv_heads = reader.integers("attention.head_count_kv", num_all)
    windows = reader.flags(key := "attention.sliding_window_pattern", num_all)
    if windows is None:
        raise CheckpointError(
            f"{file.path.name}: {reader.key(key)} is missing, expected one flag for each layer",
            path=file.path,
            key=reader.key(key),
        )
    for count, groups in zip(heads, kv_heads, strict=True):
        if count % groups:
            raise CheckpointError(
                f"{file.path.name}: attention.head_count is {count} in a layer, expected a multiple of its "
                f"attention.head_count_kv, which is {groups}",
                path=file.path,
                key=reader.key("attention.head_count"),
            )
    head_dim = reader.integer("attention.key_length", hidden_size // heads[0])
    reader.neutral("attention.value_length", head_dim)
    if reader.integer("rope.dimension_count", head_dim) != head_dim or head_dim % 4:
        raise reader.unsupported(
            "rope.dimension_count", reader.integer("rope.dimension_count"), "whole heads, a multiple of 4"
        )
    rope = reader.rope(head_dim, context_tokens)
    full = AttentionConfig(
        num_heads=heads[0],
        num_kv_heads=kv_heads[0],
        head_dim=head_dim,
        rope=replace(
            rope,
            rotary_dim=head_dim // 2,
            frequency_factors=frequency_factors(file, head_dim)[: head_dim // 4],
        ),
        has_qkv_bias=dense_name("layers.0.q_bias") in file.tensors,
        has_o_bias=dense_name("layers.0.o_bias") in file.tensors,
        qk_norm="head",
        output_gate="heads",
    )
    sliding = replace(
        full,
        rope=replace(rope, theta=reader.number("rope.freq_base_swa", rope.theta)),
        sliding_window=reader.integer("attention.sliding_window"),
    )
    return [
        replace(sliding if has_window else full, num_heads=count, num_kv_heads=groups)
        for count, groups, has_window in zip(heads, kv_heads, windows, strict=True)
    ][:num_layers]
