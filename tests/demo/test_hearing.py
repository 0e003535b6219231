"""The demo model's ear, from a made-up Whisper and a made-up projector."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from argosy.checkpoint.safetensors import open_tensors
from argosy.checkpoint.safetensors_write import write_safetensors
from argosy.demo.hearing import Hearing
from argosy.model.encoders import whisper_audio
from argosy.model.reading.config_reader import ConfigReader
from tests.demo.base_files import write_base
from tests.models.safetensors_file import read_checkpoint
from tests.models.tiny_whisper import Tiny, weights, write_ctranslate2

HIDDEN_SIZE = 20
TINY = Tiny(seed=4, is_multilingual=False, dtype="F16", encoder_width=48)


@pytest.fixture
def hearing(tmp_path: Path) -> Hearing:
    write_ctranslate2(tmp_path / "whisper", TINY)
    rng = np.random.default_rng(1)
    parts = {"up": (HIDDEN_SIZE, 48), "down": (HIDDEN_SIZE, HIDDEN_SIZE)}
    made = {name: rng.standard_normal(shape).astype(np.float16) for name, shape in parts.items()}
    trained: Any = SimpleNamespace(hidden_size=HIDDEN_SIZE, projector=made.__getitem__, made=made)
    return Hearing(tmp_path / "whisper", trained)


def test_the_tower_has_the_encoder_of_whisper_and_the_projector(hearing: Hearing, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    config = hearing.config(base)
    write_safetensors(base / "model.safetensors", hearing.tensors())
    tensors = read_checkpoint(base)
    own = {name: value for name, value in config["audio_config"].items() if name != "model_type"}
    read = whisper_audio.read_config(ConfigReader(own, "qwen2_moe"), hidden_size=HIDDEN_SIZE)
    assert {name: ref.shape for name, ref in open_tensors(base).items()} == {
        tensor.name: tensor.shape for tensor in whisper_audio.tensors(read).values()
    }
    whisper = weights(TINY)
    for name, value in tensors.items():
        if name.startswith("audio_tower."):
            theirs = whisper[f"model.encoder.{name.removeprefix('audio_tower.')}"]
            assert np.array_equal(value, theirs.astype(np.float16)[: len(value)]), name
    assert np.array_equal(
        tensors["multi_modal_projector.linear_2.weight"], hearing._trained.projector("down")
    )
    assert config["audio_token_id"] == 16
