"""Qwen3-VL-MoE (30B-A3B, 235B-A22B): the text part, a Qwen3-MoE under `model.language_model.`.

`config.json` is a wrapper with the text model in `text_config`; its own keys describe images and video. The vision
tower (`model.visual.*`) is in `model/encoders/qwen_vision.py`. Routing weights always sum to one. The hub stores the
experts of a layer transposed, [experts, hidden, 2 * width] with gate before up: `argosy pack` reads them, and the pack
runs. transformers writes the same tensors with contiguous rows; their shape tells the two apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.gguf import GgufFile
from argosy.config import ModelConfig
from argosy.model.families.attention.qwen3_moe import open_qwen3_gguf, read_text
from argosy.model.families.attention.qwen_moe import make_layouts
from argosy.model.reading.common_config import parse_wrapper
from argosy.model.reading.config_reader import ConfigReader
from argosy.model.reading.gguf_config import GgufConfigReader
from argosy.model.reading.rope_config import Axes

MODEL_TYPE = "qwen3_vl_moe"
GGUF_ARCHITECTURE = "qwen3vlmoe"
AXES = Axes(is_mixed=True, sections=(24, 20, 20))

_SEPARATE, _FUSED = (
    replace(layout, prefix="model.language_model.")
    for layout in make_layouts(passed_over=r"model\.visual\..*")
)
LAYOUTS = (_SEPARATE, replace(_FUSED, fused_names=None, transposed_names=_FUSED.fused_names), _FUSED)


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read the text part of a `config.json`, as `Qwen3VLMoeTextConfig` in transformers 5.24 does.

    Raises:
        The same errors as `parse_wrapper`.
    """
    return parse_wrapper(raw, MODEL_TYPE, ("qwen3_vl_moe_text",), _read_text)


def _read_text(text: ConfigReader) -> ModelConfig:
    text.neutral("norm_topk_prob", True)
    return read_text(
        text,
        MODEL_TYPE,
        num_layers=24,
        renormalize=True,
        expert_width=1408,
        dense_width=5632,
        vocab_size=151_936,
        hidden_size=2048,
        num_heads=16,
        num_kv_heads=16,
        rope_theta=500_000.0,
        axes=AXES,
        norm_eps=1e-6,
        context_tokens=128_000,
        num_experts=60,
        experts_per_token=4,
    )


def open_gguf(file: GgufFile) -> ModelFiles:
    """The text part in a GGUF file of architecture `qwen3vlmoe`, which includes the thinker of Qwen3-Omni.

    Raises:
        UnsupportedModel: a key, value or tensor type that is not supported.
        CheckpointError: a key or tensor is missing, malformed, or contradicts another.
    """
    reader = GgufConfigReader(file, GGUF_ARCHITECTURE)
    reader.integer("n_deepstack_layers", 0, least=0)  # for the vision tower, which is in a separate file
    reader.neutral("expert_weights_norm", True)
    reader.neutral("expert_shared_feed_forward_length", 0)
    return open_qwen3_gguf(reader, MODEL_TYPE, axes=AXES)
