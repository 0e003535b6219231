"""Gemma 3 (arXiv:2503.19786) without its vision tower: five layers with a sliding window, then one that sees all.

The two kinds of layers have different rotary embeddings. Each block is normed before and after; norms are stored minus
one, and whole in GGUF files. Scores are scaled by `query_pre_attn_scalar`. A model whose tokens see each
other both ways (EmbeddingGemma) is refused.
"""

from __future__ import annotations

from collections.abc import Mapping

from argosy.config import ModelConfig
from argosy.model.families.attention.dense import LAYER_NAMES
from argosy.model.families.attention.gemma3_gguf import EVERY, GGUF_ARCHITECTURE, make_config, open_gguf
from argosy.model.families.windows.windowed import FULL, SLIDING, kinds_by_turns
from argosy.model.reading.config_reader import MOST_LAYERS, ConfigReader
from argosy.model.reading.layout import Layout
from argosy.model.reading.rope_config import read_ropes_of_layers

__all__ = ["GGUF_ARCHITECTURE", "LAYOUTS", "MODEL_TYPE", "open_gguf", "parse_config", "read_text"]

MODEL_TYPE = "gemma3_text"

LAYOUTS = (
    Layout(
        layer_names={
            **LAYER_NAMES,
            "attn_post_norm": "post_attention_layernorm.weight",
            "mlp_norm": "pre_feedforward_layernorm.weight",
            "mlp_post_norm": "post_feedforward_layernorm.weight",
        }
    ),
)


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read a `config.json`; an absent key gets the default of `Gemma3TextConfig` in transformers 5.24.

    Raises:
        UnsupportedModel: a key or value asks for something that is not supported.
        CheckpointError: a key is missing, malformed, or contradicts another.
    """
    reader = ConfigReader(raw, MODEL_TYPE)
    config = read_text(reader)
    reader.finish()
    return config


def read_text(reader: ConfigReader) -> ModelConfig:
    """Read the text model, alone or inside a wrapper; the caller calls `finish()`."""
    shape = reader.attention_shape(hidden_size=2304, num_heads=8, num_kv_heads=4, head_dim=256)
    reader.one_of("hidden_activation", "gelu_pytorch_tanh", ("gelu_pytorch_tanh",))
    reader.neutral("attn_logit_softcapping", None)
    reader.neutral("use_bidirectional_attention", False, None)
    reader.passed("cache_implementation")
    num_layers = reader.integer("num_hidden_layers", default=26, most=MOST_LAYERS)
    every = reader.integer("sliding_window_pattern", default=EVERY)
    kinds = reader.layer_types(num_layers, (SLIDING, FULL)) or kinds_by_turns(num_layers, every)
    has_bias = reader.flag("attention_bias", False)
    # Only files of transformers 5 have rope_parameters, with a value for each kind.
    older: dict[str, dict[str, object]] = {
        SLIDING: {"rope_theta": reader.number("rope_local_base_freq", 1e4)},
        FULL: {"rope_theta": reader.number("rope_theta", 1e6)} | (reader.mapping("rope_scaling") or {}),
    }
    return make_config(
        kinds,
        read_ropes_of_layers(reader, dict.fromkeys(kinds, shape.head_dim), older),
        shape._asdict() | {"has_qkv_bias": has_bias, "has_o_bias": has_bias},
        window=reader.integer("sliding_window", default=4096),
        scale=reader.number("query_pre_attn_scalar", 256) ** -0.5,
        vocab_size=reader.integer("vocab_size", default=262_208),
        dense_width=reader.integer("intermediate_size", default=9216),
        norm_eps=reader.number("rms_norm_eps", 1e-6),
        norm_offset=1.0,
        context_tokens=reader.integer("max_position_embeddings", default=131_072),
        logit_cap=reader.optional_number("final_logit_softcapping") or 0.0,
        is_embedding_tied=reader.flag("tie_word_embeddings", True),
        eos_ids=reader.token_ids("eos_token_id", 1),
        bos_id=next(iter(reader.token_ids("bos_token_id", 2)), None),
    )
