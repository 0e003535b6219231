"""DeepSeek-OCR in DeepSeek's own form: its files have no settings of a processor, and the tokenizer its placeholder."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from argosy import _native
from argosy.engine.media.prompt_media import PromptMedia
from argosy.errors import UnsupportedModel
from argosy.media.parts import Image, RequestMedia
from argosy.media.pictures import read_picture_processor
from argosy.model.encoders.table import ENCODERS
from argosy.model.reading.config_reader import ConfigReader
from argosy.prompt.media_span import MediaSpan
from argosy.prompt.prompt import Prompt
from tests.engine.test_seeing import GREEDY, opened
from tests.media.samples import pattern
from tests.model.encoders.open_tower import dense_weights, finish
from tests.models.safetensors_file import read_checkpoint, write_safetensors
from tests.models.tiny import write_model
from tests.models.tiny_encoders import random_tensors
from tests.models.tiny_ocr import deepseek_vl_v2

HUB = ENCODERS["deepseek_vl_v2"][0]


def write_hub_model(directory: Path, **vision: Any) -> Any:
    """A tiny DeepSeek-OCR with its placeholder, 50; returns the tower's config and tensors."""
    raw = deepseek_vl_v2(max_position_embeddings=2048)
    raw["vision_config"]["width"] = {
        "clip-l-14-224": {"heads": 2, "image_size": 224, "layers": 1, "patch_size": 14, "width": 16},
        "sam_vit_b": {
            "downsample_channels": [6, 16], "global_attn_indexes": [1], "heads": 1, "layers": 2, "width": 8,
        },
    }  # fmt: skip
    raw["projector_config"]["input_dim"] = 32
    own = {key: value for key, value in raw["vision_config"].items() if key != "model_type"}
    config = HUB.read(ConfigReader(own, "it"), ConfigReader(raw, "it"), SimpleNamespace(hidden_size=24))  # type: ignore[arg-type]
    raw["vision_config"] |= vision
    write_model(directory, raw, seed=3)
    values = random_tensors(HUB.tensors(config), "model.", 3)
    text = {name: value for name, value in read_checkpoint(directory).items() if name not in values}
    unused = {"model.vision_model.embeddings.patch_embedding.weight": np.zeros((16, 3, 14, 14), np.float32)}
    every = {name: ("BF16", value) for name, value in (text | values | unused).items()}
    write_safetensors(directory / "model.safetensors", every)
    added = {"added_tokens_decoder": {"50": {"content": "<image>"}}}
    (directory / "tokenizer_config.json").write_text(json.dumps(added))
    return config, values


def test_a_model_in_deepseeks_own_form_sees(tmp_path: Path) -> None:
    config, values = write_hub_model(tmp_path)
    pixels = pattern(700, 400)
    with opened(tmp_path, image_tokens=700) as engine:
        assert isinstance(engine.media, PromptMedia)
        content = engine.media.read(Image(pixels))
        assert engine.media.placeholder(content) == 50
        (span,) = engine.media.segments(content, "", RequestMedia())
        assert isinstance(span, MediaSpan)
        assert (
            span.num_positions == 16 * 17 + 1 + 2 * 10 * 11
        )  # the whole, and two tiles, one below the other
        found = finish(span.make_rows()).embeddings
        assert len(engine.generate(Prompt.of([3, 5], span, [6]), GREEDY).token_ids) == 8
    assert HUB.settings is not None
    patches, grid = read_picture_processor(HUB.settings(config)).prepare(pixels)
    tower: Any = HUB.open(config, dense_weights(HUB.tensors(config), "model.", values), _native.Runtime(1))
    expected = finish(tower.encode(patches, grid)).embeddings
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-2 * abs(expected).max())


def test_another_tower_is_refused_and_text_runs(tmp_path: Path) -> None:
    write_hub_model(tmp_path, image_size=768)
    with opened(tmp_path) as engine:
        assert engine.media.kinds == ()
        assert isinstance(engine.media, PromptMedia)
        with pytest.raises(UnsupportedModel, match="asks for image_size 768"):
            engine.media.read(Image(pattern(8, 8)))
        assert len(engine.generate([3, 5], GREEDY).token_ids) == 8
