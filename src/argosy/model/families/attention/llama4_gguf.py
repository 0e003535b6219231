"""Llama-4 in a GGUF file of architecture `llama4`; `llama4_text.py` says what the model computes.

llama.cpp has no keys for the size of chunks, for layers without rotary and for the factor of queries; the values here
are those in its code. It norms q and k unless there are 128 experts (Maverick). Where a file says that there is no
window, as its converter does for a dense model, it leaves out the rotary embedding of the last layer; such a file is
refused.
"""

from __future__ import annotations

from dataclasses import replace

from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.gguf import GgufFile
from argosy.config import AttentionConfig, LayerConfig, ModelConfig, QueryScale, RouterConfig
from argosy.model.reading.gguf_config import SIGMOID, GgufConfigReader, frequency_factors
from argosy.model.reading.gguf_layout import read_gguf_layout

GGUF_ARCHITECTURE = "llama4"

ROUTER = RouterConfig(score="sigmoid", renormalize=False, weighs_input=True)

_CHUNK, _INTERVAL, _SCALE = 8192, 4, QueryScale(beta=0.1, period=8192, offset=1)
_EXPERTS_WITHOUT_NORM = 128


def variant(
    base: AttentionConfig, *, rotates: bool, chunk: int, has_norm: bool, scale: QueryScale | None
) -> AttentionConfig:
    """Return the attention of a layer that rotates or not, and sees only its chunk unless that is 0."""
    seen = replace(base, sliding_window=chunk, is_chunked=chunk > 0)
    if not rotates:
        return replace(seen, rope=None, query_scale=scale)
    assert base.rope is not None
    rope = replace(base.rope, is_interleaved=True)
    return replace(seen, rope=rope, qk_norm="unweighted" if has_norm else "none", is_norm_last=has_norm)


def open_gguf(file: GgufFile) -> ModelFiles:
    """Open a GGUF file of architecture `llama4`.

    Raises:
        UnsupportedModel: a key, value or tensor type that is not supported.
        CheckpointError: a key or tensor is missing, malformed, or contradicts another.
    """
    reader = GgufConfigReader(file, GGUF_ARCHITECTURE)
    common, num_layers = reader.common(), reader.num_layers()
    if common.model["experts_per_token"] != 1:
        raise reader.unsupported("expert_used_count", common.model["experts_per_token"], "1")
    reader.neutral("attention.sliding_window", _CHUNK)
    reader.neutral("attention.sliding_window_pattern", _INTERVAL)
    reader.neutral("expert_gating_func", 0, SIGMOID)  # llama.cpp does not read it
    step = reader.integer("interleave_moe_layer_step", most=num_layers)
    width = reader.integer("expert_feed_forward_length")
    factors = frequency_factors(file, common.attention["head_dim"])
    rope = replace(common.attention.pop("rope"), frequency_factors=factors)
    base = AttentionConfig(**common.attention, rope=rope)
    has_norm = common.model["num_experts"] != _EXPERTS_WITHOUT_NORM
    full, chunked = (
        variant(base, rotates=chunk > 0, chunk=chunk, has_norm=has_norm, scale=_SCALE)
        for chunk in (0, _CHUNK)
    )
    config = ModelConfig(
        family="llama4_text",
        layers=tuple(
            LayerConfig(mixer=chunked if number % _INTERVAL else full, is_moe=number % step == 0)
            for number in range(1, num_layers + 1)
        ),
        expert_width=width,
        shared_width=width,
        dense_width=reader.integer("feed_forward_length"),
        router=ROUTER,
        **common.model,
    )
    reader.finish()
    return read_gguf_layout(file, config, is_paired=False, has_rope_freqs=True)
