"""The eye of the demo model: a vision tower like Qwen3-VL's, trained from scratch for the demo.

    experts.gguf -> tower -> visual.*

`experts.gguf` also holds the two eye experts of each layer, along with the other experts.

Elsewhere: `model/encoders/qwen_vision.py` runs the tower; `recipes/demo_model/` trained it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from argosy.checkpoint.safetensors_write import TensorToWrite, encode
from argosy.demo.experts import TrainedExperts
from argosy.demo.parts import token_id

PATCH_SIZE, MERGE_SIZE, SIDE = 12, 2, 192
_PREFIX, _PATCHES, _FRAMES = "visual.", "patch_embed.proj.weight", 2
_DTYPE = "F16"


class Seeing:
    """The demo model's parts for pictures; the counterpart of `Hearing`.

    Args:
        trained: holds the tower.
    """

    content_type, placeholder = "image", "<jupyter_output>"  # a special token that the base never uses

    def __init__(self, trained: TrainedExperts) -> None:
        self._trained = trained

    def config(self, directory: Path) -> dict[str, Any]:
        """Return keys for `config.json`; the tokenizer is already in `directory`."""
        shapes = self._trained.tower_shapes
        return {
            "image_token_id": token_id(directory, self.placeholder),
            "vision_config": {
                "deepstack_visual_indexes": [],
                "depth": sum(name.endswith(".attn.qkv.weight") for name in shapes),
                "hidden_size": shapes["pos_embed.weight"][1],
                "intermediate_size": shapes["blocks.0.mlp.linear_fc1.weight"][0],
                "num_heads": self._trained.tower_heads,
                "num_position_embeddings": shapes["pos_embed.weight"][0],
                "out_hidden_size": shapes["merger.linear_fc2.weight"][0],
                "patch_size": PATCH_SIZE,
                "spatial_merge_size": MERGE_SIZE,
                "temporal_patch_size": _FRAMES,
            },
        }

    def processor(self) -> Mapping[str, Any]:
        """Return settings that scale every picture to about 192 x 192 pixels; the limits leave room for rounding."""
        return {
            "image_mean": [0.5, 0.5, 0.5],
            "image_processor_type": "Qwen2VLImageProcessor",
            "image_std": [0.5, 0.5, 0.5],
            "max_pixels": SIDE**2 + 2 * SIDE,
            "merge_size": MERGE_SIZE,
            "min_pixels": SIDE**2 - 2 * SIDE,
            "patch_size": PATCH_SIZE,
            "temporal_patch_size": _FRAMES,
        }

    def tensors(self) -> Iterator[TensorToWrite]:
        for name, stored in self._trained.tower_shapes.items():
            shape = (stored[0], 3, _FRAMES, PATCH_SIZE, PATCH_SIZE) if name == _PATCHES else stored
            yield f"{_PREFIX}{name}", _DTYPE, shape, partial(self._values, name)

    def _values(self, name: str) -> bytes:
        values = self._trained.tower(name)
        if name == _PATCHES:
            # The tower has a matrix for each of two frames; a picture counts as two equal frames.
            values = np.stack([values.reshape(len(values), 3, -1) / _FRAMES] * _FRAMES, axis=2)
        return encode(values, _DTYPE)
