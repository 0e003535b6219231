from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from argosy.errors import BadMedia, CheckpointError, UnsupportedModel, UsageError
from argosy.media.pictures import read_picture_processor
from tests.media.samples import PICTURE_SETTINGS, pattern

KIMI_VL = {
    "auto_map": {"AutoImageProcessor": "image_processing_kimi_vl.KimiVLImageProcessor"},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "in_token_limit": 4096,
    "num_pooled_tokens": 1024,
    "pad_input": True,
    "patch_size": 14,
}
KIMI_OF_ITS_OWN_CODE: dict[str, Any] = {
    "auto_map": {"AutoImageProcessor": "kimi_k25_vision_processing.KimiK25VisionProcessor"},
    "media_proc_cfg": {
        "in_patch_limit": 4096,
        "patch_size": 14,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "merge_kernel_size": 2,
        "fixed_output_tokens": None,
        "patch_limit_on_one_side": 512,
        "in_patch_limit_each_frame": 4096,
        "in_patch_limit_video": None,
        "sample_fps": 2.0,
        "max_num_frames_each_video": None,
        "temporal_merge_kernel_size": 4,
        "timestamp_mode": "hh:mm:ss.fff",
    },
}
# Qwen3-Omni keeps the settings of pictures and sounds in one object.
OMNI: dict[str, Any] = {
    **PICTURE_SETTINGS["qwen3_vl"],
    "feature_extractor_type": "WhisperFeatureExtractor",
    "chunk_length": 300,
    "dither": 0.0,
    "feature_size": 128,
    "hop_length": 160,
    "n_fft": 400,
    "n_samples": 4800000,
    "nb_max_frames": 30000,
    "padding_side": "right",
    "padding_value": 0.0,
    "return_attention_mask": True,
    "sampling_rate": 16000,
}
sides = st.integers(1, 16_384)


@pytest.mark.parametrize("name", PICTURE_SETTINGS)
@settings(max_examples=200, deadline=None)
@given(height=sides, width=sides, most_tokens=st.integers(70, 20_000))
def test_no_picture_takes_more_tokens_than_the_cap(
    name: str, height: int, width: int, most_tokens: int
) -> None:
    capped = read_picture_processor(PICTURE_SETTINGS[name], most_tokens=most_tokens)
    try:
        assert 1 <= capped.num_tokens(height, width) <= most_tokens
    except BadMedia:
        assert max(height, width) > 12 * min(height, width)


def test_a_cap_lowers_the_number_of_tiles() -> None:
    def tiles(height: int, width: int, most_tokens: int | None = None) -> int:
        processor = read_picture_processor(PICTURE_SETTINGS["internvl"], most_tokens=most_tokens)
        return processor.num_tokens(height, width) // 16

    assert [tiles(300, 400, 16 * count) for count in (1, 2, 3, 6, 13, 20)] == [1, 1, 1, 5, 13, 13]
    sizes = (1, 1), (5000, 1), (1, 5000), (113, 113), (200, 200)
    assert [tiles(*size) for size in sizes] == [1, 13, 13, 1, 5]


@pytest.mark.parametrize(
    "name", [name for name in PICTURE_SETTINGS if name not in ("internvl", "deepseek_ocr2")]
)
def test_a_cap_that_a_picture_does_not_reach_changes_nothing(name: str) -> None:
    plain = read_picture_processor(PICTURE_SETTINGS[name])
    capped = read_picture_processor(PICTURE_SETTINGS[name], most_tokens=600)
    for height, width in ((1, 1), (30, 500), (400, 600)):
        assert capped.grid(height, width) == plain.grid(height, width)
    assert {"gemma4": 250, "minimax_m3": 500}.get(name, 540) < capped.num_tokens(4000, 3000) <= 600


def test_kimis_own_settings_say_the_same_as_those_of_transformers() -> None:
    pixels = pattern(500, 1100)
    one, grid = read_picture_processor(KIMI_OF_ITS_OWN_CODE).prepare(pixels)
    other, same_grid = read_picture_processor(PICTURE_SETTINGS["kimi_k25"]).prepare(pixels)
    assert grid == same_grid
    assert np.array_equal(one, other)


@pytest.mark.parametrize("most_patches", [4096, 60])
def test_kimi_vl_sees_pictures_as_its_own_code_does(most_patches: int) -> None:
    processor = read_picture_processor({**KIMI_VL, "in_token_limit": most_patches})
    for height, width in ((1, 1), (27, 29), (56, 56), (300, 1100), (1999, 40), (3000, 4000)):
        resized = [height, width]  # `rescale` of image_processing_kimi_vl.py
        if (num_patches := (width // 14) * (height // 14)) > most_patches:
            resized = [int(side * (most_patches / num_patches) ** 0.5) for side in resized]
        padded = [side + (28 - side % 28) % 28 for side in resized]
        assert processor.fit.size(height, width) == (*resized, *padded)
    patches, grid = processor.prepare(pattern(100, 60))
    same, _ = read_picture_processor(PICTURE_SETTINGS["kimi_k25"]).prepare(pattern(100, 60))
    assert grid == (1, 8, 6)
    if most_patches == 4096:
        assert np.array_equal(patches, same)


@pytest.mark.parametrize(
    "raw", [OMNI, {"image_processor": PICTURE_SETTINGS["qwen3_vl"], "feature_extractor": {}}]
)
def test_settings_of_sounds_beside_those_of_pictures_are_passed(raw: dict[str, Any]) -> None:
    processor = read_picture_processor(raw, where="processor_config.json")
    assert processor.grid(480, 640) == read_picture_processor(PICTURE_SETTINGS["qwen3_vl"]).grid(480, 640)


def test_min_and_max_pixels_come_before_size() -> None:
    raw = {**PICTURE_SETTINGS["qwen3_vl"], "max_pixels": 100 * 32 * 32}
    assert 90 <= read_picture_processor(raw).num_tokens(2000, 2000) <= 100
    older = {**raw, "min_pixels": 3136, "size": {"max_pixels": 1, "min_pixels": 1}}
    assert read_picture_processor(older).num_tokens(2000, 2000) == read_picture_processor(raw).num_tokens(
        2000, 2000
    )


def test_a_null_setting_is_an_absent_one() -> None:
    raw = {**PICTURE_SETTINGS["qwen2_vl"], "do_center_crop": None, "crop_size": None, "patch_size": None}
    assert read_picture_processor(raw).patch_size == 14


def test_the_frames_of_a_patch_are_equal() -> None:
    patches, grid = read_picture_processor(PICTURE_SETTINGS["qwen3_vl"]).prepare(pattern(256, 256))
    frames = patches.reshape(grid[1] * grid[2], 3, 2, 256)
    assert np.array_equal(frames[:, :, 0], frames[:, :, 1])


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("qwen3_vl", {"resample": 2}),
        ("qwen3_vl", {"do_rescale": False}),
        ("qwen3_vl", {"do_resize": False}),
        ("qwen3_vl", {"do_convert_rgb": False}),
        ("qwen3_vl", {"do_center_crop": True}),
        ("qwen3_vl", {"do_sharpen": True}),
        ("qwen3_vl", {"size": {"shortest_edge": 1, "longest_edge": 9, "height": 3}}),
        ("glm4v", {"max_pixels": 100_000}),
        ("gemma4", {"max_soft_tokens": 300}),
        ("kimi_k25", {"size": {"max_height": 512, "max_width": 256}}),
        ("kimi_k25", {"image_processor_type": "CLIPImageProcessor"}),
        ("kimi_k25", {"image_processor_type": 5}),
        ("internvl", {"size": {"height": 224, "width": 224}}),
        ("internvl", {"do_center_crop": True}),
        ("pixtral", {"do_resize": False}),
        ("kimi_vl", {"pad_input": False}),
        ("kimi_vl", {"merge_kernel_size": [1, 1]}),
    ],
)
def test_a_setting_that_would_change_the_pixels_is_refused(name: str, changed: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModel) as refused:
        read_picture_processor({**(PICTURE_SETTINGS | {"kimi_vl": KIMI_VL})[name], **changed})
    key = next(iter(changed))
    assert refused.value.facts["key"] in (key, "height", "max_width")


@pytest.mark.parametrize(
    "changed",
    [
        {"patch_size": 0},
        {"patch_size": 14.0},
        {"merge_size": True},
        {"image_mean": [0.5, 0.5]},
        {"image_std": [0.5, 0.5, 0]},
        {"image_std": [0.5, 0.5, 1e-40]},
        {"image_std": [0.5, 0.5, float("nan")]},
        {"rescale_factor": "1/255"},
        {"do_normalize": 1},
        {"size": {"shortest_edge": 56}},
        {"size": [1, 2]},
    ],
)
def test_a_malformed_setting_is_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError) as refused:
        read_picture_processor({**PICTURE_SETTINGS["qwen3_vl"], **changed})
    assert not isinstance(refused.value, UnsupportedModel)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl", "glm4v"])
def test_a_picture_that_is_too_narrow_is_refused(name: str) -> None:
    processor = read_picture_processor(PICTURE_SETTINGS[name])
    processor.grid(40, 8000)
    with pytest.raises(BadMedia, match="at most 200 times as long"):
        processor.grid(40, 8040)


def test_a_cap_that_no_picture_can_keep_is_refused() -> None:
    for name, most_tokens in (("qwen3_vl", 15), ("gemma4", 69), ("internvl", 15)):
        with pytest.raises(UsageError, match="at least"):
            read_picture_processor(PICTURE_SETTINGS[name], most_tokens=most_tokens)
    with pytest.raises(BadMedia, match="so narrow that it needs"):
        read_picture_processor(PICTURE_SETTINGS["qwen3_vl"], most_tokens=16).grid(80, 8000)
