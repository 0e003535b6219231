"""The towers of DeepSeek-OCR: released sizes, and what is refused."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from argosy.errors import CheckpointError, UnsupportedModel, UsageError
from argosy.media.pictures import read_picture_processor
from argosy.model.encoders.deep_encoder import num_positions
from argosy.model.encoders.deep_encoder_config import DeepEncoderConfig
from argosy.model.encoders.table import ENCODERS
from argosy.model.reading.config_reader import ConfigReader
from tests.families.published_ocr import DEEPSEEK_OCR, DEEPSEEK_OCR_2

HUB, HF = (ENCODERS[family][0] for family in ("deepseek_vl_v2", "deepseek_ocr2"))
MODEL: Any = SimpleNamespace(hidden_size=1280)
SAM = {"hidden_size": 24, "num_attention_heads": 3, "downsample_channels": [8, 16], "num_hidden_layers": 2}
QWEN = {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}


def read_hub(raw: dict[str, Any], **changes: Any) -> DeepEncoderConfig:
    vision = {key: value for key, value in raw["vision_config"].items() if key != "model_type"} | changes
    found: DeepEncoderConfig = HUB.read(ConfigReader(vision, "it"), ConfigReader(raw, "it"), MODEL)
    return found


def read(sam: dict[str, Any], second: dict[str, Any]) -> DeepEncoderConfig:
    raw = {"sam_config": SAM | sam, "encoder_config": QWEN | second}
    found: DeepEncoderConfig = HF.read(ConfigReader(raw, "it"), ConfigReader({}, "it"), MODEL)
    return found


@pytest.mark.parametrize(
    ("raw", "billions"), [(DEEPSEEK_OCR, 0.4005), (DEEPSEEK_OCR_2, 0.4547)], ids=["1", "2"]
)
def test_the_towers_of_released_models_have_their_sizes(raw: dict[str, Any], billions: float) -> None:
    """The first: 3.336 G parameters less 2.935 of the text, and CLIP's own product with patches, which is unused."""
    config = read_hub(raw)
    count = sum(math.prod(tensor.shape) for tensor in HUB.tensors(config).values())
    assert count == pytest.approx(billions * 1e9, rel=1e-3)


def test_pictures_of_released_models_have_their_tokens() -> None:
    """273 and 257 for the whole, and for each tile 100, with a newline for a line of 10, or 144."""
    for raw, whole, of_tiles in ((DEEPSEEK_OCR, 273, 20 * 31), (DEEPSEEK_OCR_2, 257, 6 * 144)):
        config = read_hub(raw)
        assert HUB.settings is not None
        processor = read_picture_processor(HUB.settings(config))
        assert processor.num_tokens(500, 640) == whole
        assert processor.num_tokens(1400, 2100) == whole + of_tiles
        for size in ((500, 640), (1400, 2100), (9000, 10)):
            assert num_positions(config, processor.grid(*size)) == processor.num_tokens(*size)
        assert read_picture_processor(HUB.settings(config), most_tokens=whole).num_tokens(2100, 1400) == whole
        with pytest.raises(UsageError, match=f"must be at least {whole} for this model"):
            read_picture_processor(HUB.settings(config), most_tokens=whole - 1)


@pytest.mark.parametrize(
    ("sam", "second", "message"),
    [
        ({"use_rel_pos": False}, {}, "use_rel_pos"),
        ({"use_abs_pos": False}, {}, "use_abs_pos"),
        ({"hidden_act": "relu"}, {}, "hidden_act"),
        ({"num_channels": 1}, {}, "num_channels"),
        ({"downsample_channels": [8, 8, 16]}, {}, "downsample_channels"),
        ({"new_key": 1}, {}, "new_key"),
        ({}, {"use_sliding_window": True}, "use_sliding_window"),
        ({}, {"layer_types": ["sliding_attention"] * 2}, "layer_types"),
        ({}, {"hidden_act": "gelu"}, "hidden_act"),
        ({}, {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters"),
        ({}, {"new_key": 1}, "new_key"),
    ],
)
def test_other_mathematics_are_refused(sam: dict[str, Any], second: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        read(sam, second)


@pytest.mark.parametrize(
    ("sam", "second", "message"),
    [
        ({"num_attention_heads": 5}, {}, "SAM has 5 heads, expected a divisor of 24"),
        ({}, {"hidden_size": 20, "num_attention_heads": 5}, "SAM makes rows of 16 values"),
        ({}, {"num_key_value_heads": 3}, "multiple of its 3 heads of keys"),
        ({"image_size": 8}, {}, "image_size is below patch_size"),
        ({"window_size": 0}, {}, "window_size"),
    ],
)
def test_sizes_that_contradict_each_other_are_refused(
    sam: dict[str, Any], second: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(sam, second)


def test_other_towers_in_the_hubs_form_are_refused() -> None:
    for changes in ({"width": {"siglip": {}}}, {"image_size": 768}, {"new_key": 1}):
        with pytest.raises(UnsupportedModel):
            read_hub(DEEPSEEK_OCR, **changes)
    for key, value in (("projector_type", "mlp_gelu"), ("n_embed", 1024), ("input_dim", 1024)):
        raw = DEEPSEEK_OCR | {"projector_config": DEEPSEEK_OCR["projector_config"] | {key: value}}
        with pytest.raises(UnsupportedModel, match=key):
            read_hub(raw)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("size", {"height": 2048, "width": 2048}),
        ("size", {"height": 512, "width": 512}),
        ("size", {"height": 1000, "width": 1000}),
        ("tile_size", 650),
        ("crop_to_patches", False),
        ("background_color", [0, 0, 0]),
        ("resample", 2),
    ],
)
def test_settings_of_another_processor_are_refused(key: str, value: object) -> None:
    assert HUB.settings is not None
    with pytest.raises(UnsupportedModel):
        read_picture_processor({**HUB.settings(read_hub(DEEPSEEK_OCR_2)), key: value})
