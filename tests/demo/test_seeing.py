"""The demo model's eye, from a made-up tower."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from argosy.checkpoint.safetensors import open_tensors
from argosy.checkpoint.safetensors_write import write_safetensors
from argosy.demo.seeing import PATCH_SIZE, SIDE, Seeing
from argosy.media.pictures import read_picture_processor
from argosy.model.encoders import qwen_vision
from argosy.model.encoders.qwen_vision import QwenVisionConfig
from argosy.model.reading.config_reader import ConfigReader
from tests.demo.base_files import write_base
from tests.models.safetensors_file import read_checkpoint

PREFIX, PATCHES = "visual.", "patch_embed.proj.weight"
TINY = QwenVisionConfig(
    num_layers=2,
    hidden_size=16,
    mlp_width=24,
    num_heads=2,
    channels=3,
    patch_size=PATCH_SIZE,
    patch_frames=2,
    merge=2,
    out_size=20,
    position_side=4,
    theta=10000.0,
    deepstack_layers=(),
)


@pytest.fixture
def tower() -> dict[str, np.ndarray]:
    """As `experts.gguf` has it: the matrix of patches is that of one frame."""
    rng = np.random.default_rng(1)
    shapes = {tensor.name: tensor.shape for tensor in qwen_vision.tensors(TINY).values()}
    shapes[PATCHES] = (TINY.hidden_size, 3 * PATCH_SIZE**2)
    return {name: rng.standard_normal(shape).astype(np.float16) for name, shape in shapes.items()}


@pytest.fixture
def seeing(tower: dict[str, np.ndarray]) -> Seeing:
    trained: Any = SimpleNamespace(
        tower_shapes={name: value.shape for name, value in tower.items()},
        tower=lambda name: tower[name].astype(np.float32),
        tower_heads=TINY.num_heads,
    )
    return Seeing(trained)


def test_the_checkpoint_has_the_tower_that_its_config_describes(
    seeing: Seeing, tower: dict[str, np.ndarray], tmp_path: Path
) -> None:
    base = write_base(tmp_path / "base")
    config = seeing.config(base)
    write_safetensors(base / "model.safetensors", seeing.tensors())
    assert qwen_vision.read_config(ConfigReader(config["vision_config"], "qwen2_moe")) == TINY
    assert {name: ref.shape for name, ref in open_tensors(base).items()} == {
        PREFIX + tensor.name: tensor.shape for tensor in qwen_vision.tensors(TINY).values()
    }
    written = read_checkpoint(base)
    for name, value in tower.items():
        found = written[PREFIX + name]
        if name == PATCHES:
            found = found.astype(np.float32).sum(axis=2).reshape(value.shape)
        assert np.allclose(found, value, rtol=0, atol=6e-8), name  # half of a subnormal may be rounded
    assert config["image_token_id"] == 15


@pytest.mark.parametrize("side", [24, 100, 191, 192, 193, 256, 300, 512, 999])
def test_every_square_picture_becomes_the_size_that_the_tower_was_trained_on(
    seeing: Seeing, side: int
) -> None:
    processor = read_picture_processor(seeing.processor())
    assert processor.grid(side, side) == (1, SIDE // PATCH_SIZE, SIDE // PATCH_SIZE)
