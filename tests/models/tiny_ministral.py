"""Tiny configs of Mistral's newer models without experts: Ministral-3, and Mistral-Small-3 in its wrapper."""

from __future__ import annotations

from typing import Any

from tests.models.rows import Row
from tests.models.tiny_dense import RawConfig, dense_shapes, mistral
from tests.models.tiny_latent import mistral3, yarn_of_all_dimensions

_OUTSIDE = ("architectures", "torch_dtype", "transformers_version")


def ministral3(**changes: Any) -> RawConfig:
    """A config.json with the keys of Ministral-3's text part. Queries grow four times within a prompt."""
    common = {key: value for key, value in mistral().items() if key not in ("rope_theta", "torch_dtype")}
    return {
        **common,
        "architectures": ["Ministral3ForCausalLM"],
        "dtype": "bfloat16",
        "model_type": "ministral3",
        "rope_parameters": yarn_of_all_dimensions(16.0, 8)
        | {
            "llama_4_scaling_beta": 0.3,
            "max_position_embeddings": 128,
            "rope_theta": 1_000_000.0,
            "rope_type": "yarn",
        },
        "transformers_version": "5.0.0",
    } | changes


def mistral_small_3(**changes: Any) -> RawConfig:
    """A config.json with the keys of Mistral-Small-3.1's; `changes` apply to the text model."""
    text = {key: value for key, value in mistral(head_dim=6).items() if key not in _OUTSIDE}
    return mistral3() | {"text_config": text | changes}


def wrapped_ministral3(**changes: Any) -> RawConfig:
    """A config.json with the keys of Ministral-3's; `changes` apply to the text model."""
    text = {key: value for key, value in ministral3().items() if key not in _OUTSIDE}
    return mistral3() | {"text_config": text | changes}


ROWS = {
    "ministral3": Row(
        shapes=dense_shapes,
        gguf="mistral3",
        chats=("mistral_args",),
        without_record="the released config is mistral3's",
        without_mlx="names and values are those of the hub, so MLX's checkpoints need no change",
    ),
}
