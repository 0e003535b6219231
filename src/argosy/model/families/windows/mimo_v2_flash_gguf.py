"""MiMo-V2-Flash in a GGUF file of architecture `mimo2`; `mimo_v2_flash.py` says what the model computes.

Arrays give the KV heads and the kind of each layer, layers for multi-token prediction included, and tensors show which
layers have experts and sinks. llama.cpp lets a position in a window see `attention.sliding_window` positions with its
own; here it sees one more, as in the model's other files, so that its answers do not depend on the file.
"""

from __future__ import annotations

from dataclasses import replace

from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.gguf import GgufFile
from argosy.config import AttentionConfig, LayerConfig, ModelConfig
from argosy.errors import CheckpointError
from argosy.model.reading.experts_config import RENORMALIZE_EPS, read_grouped_router, require_groups
from argosy.model.reading.gguf_config import SIGMOID, GgufConfigReader
from argosy.model.reading.gguf_layout import dense_name, read_gguf_layout

GGUF_ARCHITECTURE = "mimo2"


def open_gguf(file: GgufFile) -> ModelFiles:
    """Open a GGUF file of architecture `mimo2`.

    Raises:
        UnsupportedModel: a key, value or tensor type that is not supported.
        CheckpointError: a key or tensor is missing, malformed, or contradicts another.
    """
    reader = GgufConfigReader(file, GGUF_ARCHITECTURE)
    sizes, num_layers = reader.sizes(), reader.num_layers()
    attentions = _read_attentions(reader, sizes["hidden_size"], sizes["context_tokens"], num_layers)

    def has(layer: int, name: str) -> bool:
        return dense_name(f"layers.{layer}.{name}") in file.tensors

    is_moe = [has(layer, "router") for layer in range(num_layers)]
    reader.neutral("expert_gating_func", 0, SIGMOID)
    reader.neutral("expert_weights_norm", True)  # llama.cpp always does
    router = read_grouped_router(
        reader, is_sigmoid=True, has_choice_bias=any(has(layer, "choice_bias") for layer in range(num_layers))
    )
    router = replace(router, renormalize=True, renormalize_eps=RENORMALIZE_EPS)
    config = ModelConfig(
        family="mimo_v2_flash",
        layers=tuple(
            LayerConfig(mixer=replace(attention, has_sinks=has(layer, "sinks")), is_moe=is_moe[layer])
            for layer, attention in enumerate(attentions)
        ),
        expert_width=reader.integer("expert_feed_forward_length"),
        router=require_groups(router, sizes["num_experts"], sizes["experts_per_token"]),
        dense_width=reader.integer("feed_forward_length"),
        num_mtp_layers=reader.num_mtp_layers(),
        **sizes,
    )
    reader.finish()
    return read_gguf_layout(file, config, is_paired=False, has_rope_freqs=False)


def _read_attentions(
    reader: GgufConfigReader, hidden_size: int, context_tokens: int, num_layers: int
) -> list[AttentionConfig]:
    num_heads, num_all = reader.integer("attention.head_count"), num_layers + reader.num_mtp_layers()
    kv_heads = reader.integers("attention.head_count_kv", num_all, default=num_heads)
    for count in kv_heads:
        if num_heads % count:
            raise CheckpointError(
                f"{reader.file.path.name}: attention.head_count is {num_heads}, expected a multiple of "
                f"attention.head_count_kv, which is {count} in a layer",
                path=reader.file.path,
                key=reader.key("attention.head_count_kv"),
            )
    head_dim = reader.integer("attention.key_length", hidden_size // num_heads)
    rope = reader.rope(reader.integer("rope.dimension_count", head_dim, most=head_dim), context_tokens)
    full = AttentionConfig(
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=head_dim,
        rope=rope,
        value_dim=reader.integer("attention.value_length", head_dim),
        value_scale=reader.number("attention.value_scale", 1.0),
    )
    sliding = replace(
        full,
        rope=replace(rope, theta=reader.number("rope.freq_base_swa", rope.theta)),
        sliding_window=reader.integer("attention.sliding_window") + 1,
    )
    key = "attention.sliding_window_pattern"
    is_sliding = reader.flags(key, num_all)
    if is_sliding is None:
        raise CheckpointError(
            f"{reader.file.path.name}: {reader.key(key)} is missing, expected one flag for each layer",
            path=reader.file.path,
            key=reader.key(key),
        )
    return [
        replace(sliding if slides else full, num_kv_heads=count)
        for slides, count in zip(is_sliding[:num_layers], kv_heads, strict=False)
    ]
