"""Qwen3.5-MoE and Qwen3.6-MoE, text only: a Qwen3-Next whose delta nets have four projections each.

Every layer has routed experts, and routing weights always sum to one. Positions in the vision-language model have three
axes (m-rope); text has the same position on all axes, which is ordinary rotary embedding. The hub's bf16 files fuse
the experts of a layer; its FP8 files store them one by one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.gguf import GgufFile
from argosy.config import ModelConfig, RouterConfig
from argosy.model.families.attention.qwen_moe import make_layouts
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
from argosy.model.reading.rope_config import Axes

__all__ = [
    "GGUF_ARCHITECTURE",
    "LAYOUTS",
    "MODEL_TYPE",
    "TEXT_LAYOUTS",
    "open_gguf",
    "parse_config",
    "read_text",
]

MODEL_TYPE = "qwen3_5_moe_text"
GGUF_ARCHITECTURE = "qwen35moe"
AXES = Axes(is_mixed=True, sections=(11, 11, 10))

TEXT_LAYOUTS = make_layouts(
    {
        **DELTA_NAMES,
        "delta_qkv": "linear_attn.in_proj_qkv.weight",
        "delta_z": "linear_attn.in_proj_z.weight",
        "delta_b": "linear_attn.in_proj_b.weight",
        "delta_a": "linear_attn.in_proj_a.weight",
    },
    passed_over=rf"{MTP_TENSORS}|model\.visual\..*",
    mtp_prefix=MTP_PREFIX,
)
# A text model taken out of the vision-language model may keep its prefix.
LAYOUTS = (
    *TEXT_LAYOUTS,
    *(replace(layout, prefix="model.language_model.") for layout in TEXT_LAYOUTS),
)


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read a `config.json`; an absent key gets the default of `Qwen3_5MoeTextConfig` in transformers 5.24.

    Raises:
        UnsupportedModel: a key or value asks for something that is not supported.
        CheckpointError: a key is missing, malformed, or contradicts another.
    """
    reader = ConfigReader(raw, MODEL_TYPE)
    config = read_text(reader, MODEL_TYPE)
    reader.finish()
    return config


def read_text(reader: ConfigReader, family: str) -> ModelConfig:
    """Read the text model from a config, or from the text part of one."""
    common = read_common(
        reader,
        CommonDefaults(
            vocab_size=248_320,
            hidden_size=2048,
            num_heads=16,
            num_kv_heads=2,
            head_dim=256,
            rope_theta=10_000.0,
            partial_rotary_factor=PARTIAL_ROTARY_FACTOR,
            axes=AXES,
            norm_eps=1e-6,
            context_tokens=32_768,
            num_experts=256,
            experts_per_token=8,
        ),
    )
    num_layers = reader.integer("num_hidden_layers", default=40, most=MOST_LAYERS)
    # Keys in released files for switches that this model does not have, and for layers that are ignored.
    reader.neutral("attn_output_gate", True)
    reader.neutral("decoder_sparse_step", 1)
    reader.neutral("mamba_ssm_dtype", "float32")
    reader.neutral("mlp_only_layers", [], None)
    reader.neutral("norm_topk_prob", True)
    reader.passed("intermediate_size", "mtp_num_hidden_layers", "mtp_use_dedicated_embeddings")
    return ModelConfig(
        family=family,
        layers=read_layers(reader, (True,) * num_layers, common.attention, is_joined=False),
        router=RouterConfig(renormalize=True),
        **shared_arguments(reader),
        **common.model,
    )


def open_gguf(file: GgufFile) -> ModelFiles:
    """The model in a GGUF file of architecture `qwen35moe`.

    Raises:
        UnsupportedModel: a key, value or tensor type that is not supported.
        CheckpointError: a key or tensor is missing, malformed, or contradicts another.
    """
    return open_delta_gguf(file, GGUF_ARCHITECTURE, MODEL_TYPE, axes=AXES)
