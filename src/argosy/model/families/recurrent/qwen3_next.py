"""Qwen3-Next (80B-A3B): three layers with a gated delta net for every one with gated attention, and a shared expert.

Projections of a delta net are stored key head by key head, [query, key, values, z] and [b, a] of each. They are read
unchanged, and the kernels find each head in its place.
"""

from __future__ import annotations

from collections.abc import Mapping

from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.gguf import GgufFile
from argosy.config import ModelConfig, RouterConfig
from argosy.model.families.attention.qwen_moe import make_layouts, read_moe_layers
from argosy.model.families.recurrent.qwen_delta import (
    DELTA_NAMES,
    MTP_PREFIX,
    MTP_TENSORS,
    PARTIAL_ROTARY_FACTOR,
    read_layers,
    shared_arguments,
)
from argosy.model.families.recurrent.qwen_delta_gguf import open_delta_gguf
from argosy.model.reading.common_config import CommonDefaults, read_common
from argosy.model.reading.config_reader import MOST_LAYERS, ConfigReader

__all__ = ["GGUF_ARCHITECTURE", "LAYOUTS", "MODEL_TYPE", "open_gguf", "parse_config"]

MODEL_TYPE = "qwen3_next"
GGUF_ARCHITECTURE = "qwen3next"

LAYOUTS = make_layouts(
    {
        **DELTA_NAMES,
        "delta_qkvz": "linear_attn.in_proj_qkvz.weight",
        "delta_ba": "linear_attn.in_proj_ba.weight",
    },
    passed_over=MTP_TENSORS,
    mtp_prefix=MTP_PREFIX,
)


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read a `config.json`; an absent key gets the default of `Qwen3NextConfig` in transformers 5.24.

    Raises:
        UnsupportedModel: a key or value asks for something that is not supported.
        CheckpointError: a key is missing, malformed, or contradicts another.
    """
    reader = ConfigReader(raw, MODEL_TYPE)
    common = read_common(
        reader,
        CommonDefaults(
            vocab_size=151_936,
            hidden_size=2048,
            num_heads=16,
            num_kv_heads=2,
            head_dim=256,
            rope_theta=10_000.0,
            partial_rotary_factor=PARTIAL_ROTARY_FACTOR,
            norm_eps=1e-6,
            context_tokens=32_768,
            num_experts=512,
            experts_per_token=10,
        ),
    )
    num_layers = reader.integer("num_hidden_layers", default=48, most=MOST_LAYERS)
    reader.neutral("use_sliding_window", False)
    config = ModelConfig(
        family=MODEL_TYPE,
        layers=read_layers(reader, read_moe_layers(reader, num_layers), common.attention, is_joined=True),
        router=RouterConfig(renormalize=reader.flag("norm_topk_prob", True)),
        dense_width=reader.integer("intermediate_size", default=5632),
        **shared_arguments(reader),
        **common.model,
    )
    reader.finish()
    return config


def open_gguf(file: GgufFile) -> ModelFiles:
    """The model in a GGUF file of architecture `qwen3next`.

    Raises:
        UnsupportedModel: a key, value or tensor type that is not supported.
        CheckpointError: a key or tensor is missing, malformed, or contradicts another.
    """
    return open_delta_gguf(file, GGUF_ARCHITECTURE, MODEL_TYPE)
