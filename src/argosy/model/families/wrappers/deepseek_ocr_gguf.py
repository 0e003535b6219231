"""The `deepseek2-ocr` architecture of GGUF: the text part of DeepSeek-OCR and DeepSeek-OCR-2."""

from __future__ import annotations

from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.gguf import GgufFile
from argosy.config import AttentionConfig, LayerConfig, ModelConfig, RopeConfig
from argosy.model.reading.experts_config import read_dense_layers, read_grouped_router, require_groups
from argosy.model.reading.gguf_config import SOFTMAX, GgufConfigReader
from argosy.model.reading.gguf_layout import read_gguf_layout

GGUF_ARCHITECTURE = "deepseek2-ocr"
HUB_TYPE = "deepseek_vl_v2"


def open_gguf(file: GgufFile) -> ModelFiles:
    """Open a GGUF file. Whole heads rotate, though the converter writes that no dimensions do.

    Raises:
        UnsupportedModel: a key, value or tensor type that is not supported.
        CheckpointError: a key or tensor is missing, malformed, or contradicts another.
    """
    reader = GgufConfigReader(file, GGUF_ARCHITECTURE)
    common = reader.common(has_rope=False)
    head_dim = common.attention["head_dim"]
    reader.neutral("rope.dimension_count", 0, head_dim)
    reader.neutral("attention.sliding_window", 0)  # Unlimited-OCR's, which llama.cpp ignores
    reader.neutral("expert_gating_func", SOFTMAX)
    rope = RopeConfig(
        theta=reader.number("rope.freq_base", 10_000.0),
        rotary_dim=head_dim,
        original_context=common.model["context_tokens"],
    )
    attention = AttentionConfig(**common.attention | {"rope": rope})
    num_layers = reader.num_layers()
    num_dense = read_dense_layers(reader, num_layers)
    router = read_grouped_router(reader, is_sigmoid=False, has_choice_bias=False)
    expert_width = reader.integer("expert_feed_forward_length")
    config = ModelConfig(
        family=HUB_TYPE,
        layers=tuple(LayerConfig(mixer=attention, is_moe=layer >= num_dense) for layer in range(num_layers)),
        expert_width=expert_width,
        router=require_groups(router, common.model["num_experts"], common.model["experts_per_token"]),
        dense_width=reader.integer("feed_forward_length", 1 if num_dense == 0 else None),
        shared_width=reader.integer("expert_shared_count", 0, least=0) * expert_width,
        num_mtp_layers=reader.num_mtp_layers(),
        **common.model,
    )
    reader.finish()
    return read_gguf_layout(file, config, is_paired=False, has_rope_freqs=False)
