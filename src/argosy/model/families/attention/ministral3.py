"""Ministral-3 (3B, 8B, 14B): Mistral's layers, with yarn and queries that grow with the position.

A query, after its rotary embedding, is multiplied by 1 + beta ln(1 + floor(position / original context)); without
`llama_4_scaling_beta` it is not. Mistral-Small-3 in Mistral's own files is one without yarn. There, and only there,
pairs of rotary dimensions are adjacent: `reading/mistral_params.py` says so with `rope_interleave`.

GGUF files of the architecture `mistral3` may also hold a Mistral-Small-3, which has neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.gguf import GgufFile
from argosy.config import AttentionConfig, ModelConfig, QueryScale
from argosy.model.families.attention import dense
from argosy.model.families.attention.dense import make_layers, read_dense_model
from argosy.model.families.attention.mistral import read_windows
from argosy.model.families.latent.mistral4 import OWN_LAYOUT
from argosy.model.reading.common_config import CommonDefaults
from argosy.model.reading.config_reader import ConfigReader
from argosy.model.reading.gguf_config import GgufConfigReader
from argosy.model.reading.gguf_layout import read_gguf_layout

MODEL_TYPE = "ministral3"
GGUF_ARCHITECTURE = "mistral3"

LAYOUTS = (*dense.LAYOUTS, OWN_LAYOUT)

_DEFAULTS = CommonDefaults(
    vocab_size=131_072, hidden_size=4096, num_heads=32, num_kv_heads=8, head_dim=128, rope_theta=1_000_000.0,
    norm_eps=1e-5, context_tokens=262_144, eos_id=2, bos_id=1,
)  # fmt: skip
_BETA = "llama_4_scaling_beta"
_ROPE: Mapping[str, object] = {
    "rope_type": "yarn", "rope_theta": 1_000_000.0, "factor": 16.0, "original_max_position_embeddings": 16_384,
    "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
}  # fmt: skip


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read a `config.json`, or a translated `params.json`; an absent key gets the default of `Ministral3Config` in
    transformers 5.24.

    Raises:
        UnsupportedModel: a key or value asks for something that is not supported.
        CheckpointError: a key is missing, malformed, or contradicts another.
    """
    reader = ConfigReader(raw, MODEL_TYPE)
    config = read_text(reader, MODEL_TYPE)
    reader.passed("vision_config", "image_token_id")
    reader.finish()
    return config


def read_text(reader: ConfigReader, family: str) -> ModelConfig:
    """The text model that a config describes; the caller calls `finish()`."""
    reader.lift("rope_parameters", _BETA, "max_position_embeddings", default=_ROPE)
    reader.neutral("attention_bias", False)
    config = read_dense_model(
        reader,
        family,
        _DEFAULTS,
        num_layers=34,
        dense_width=14_336,
        read_windows=partial(read_windows, default=None),
    )
    reader.neutral("rope_parameters.max_position_embeddings", config.context_tokens)
    rope = config.attention.rope
    assert rope is not None
    rope = replace(rope, is_interleaved=reader.flag("rope_interleave", False))
    beta = reader.optional_number(f"rope_parameters.{_BETA}")
    scale = None if beta is None else QueryScale(beta=beta, period=rope.original_context)
    return config.with_mixers(AttentionConfig, rope=rope, query_scale=scale)


def open_gguf(file: GgufFile) -> ModelFiles:
    """The model in a GGUF file of architecture `mistral3`.

    Raises:
        UnsupportedModel: a key, value or tensor type that is not supported.
        CheckpointError: a key or tensor is missing, malformed, or contradicts another.
    """
    reader = GgufConfigReader(file, GGUF_ARCHITECTURE)
    common = reader.common(has_experts=False)
    rope = common.attention.pop("rope")
    if rope.kind == "yarn" and reader.is_set("rope.scaling.yarn_log_multiplier"):
        rope = replace(rope, mscale=1.0, mscale_all_dim=reader.number("rope.scaling.yarn_log_multiplier"))
    scale = None
    if reader.is_set("attention.temperature_scale"):
        scale = QueryScale(beta=reader.number("attention.temperature_scale"), period=rope.original_context)
    windows = [reader.integer("attention.sliding_window", 0, least=0)] * reader.num_layers()
    config = ModelConfig(
        family=MODEL_TYPE,
        layers=make_layers(windows, **common.attention, rope=rope, query_scale=scale),
        dense_width=reader.integer("feed_forward_length"),
        **common.model,
    )
    reader.finish()
    return read_gguf_layout(file, config, is_paired=True, has_rope_freqs=False)
