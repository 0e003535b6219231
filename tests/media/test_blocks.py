"""Sizes and pixels of DeepSeek-V4-Vision's pictures, against plain code after the makers' image_processor.py."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from argosy.errors import UnsupportedModel, UsageError
from argosy.media.blocks import num_block_tokens
from argosy.media.patches import PictureProcessor
from argosy.media.pictures import read_picture_processor

SETTINGS = {
    "image_processor_type": "DeepseekV4ImageProcessor", "max_ratio": 8, "max_tokens": 384, "merge_size": 3,
    "min_pixels": 147_456, "patch_size": 14,
}  # fmt: skip
RNG = np.random.default_rng(3)
SIZES = [
    (1, 1), (1, 10_000), (10_000, 1), (384, 384), (383, 384), (100, 800), (100, 801), (801, 100), (5, 39), (6000, 4000),
    (42, 14), (3, 4000), (420, 37),
    *((int(height), int(width)) for height, width in np.exp(RNG.uniform(0, 8.5, (900, 2)))),
]  # fmt: skip


def processor(**changes: Any) -> PictureProcessor:
    return read_picture_processor(SETTINGS | changes, most_tokens=changes.pop("cap", None))


def tokens(height: int, width: int) -> int:
    rows, columns = math.ceil(height // 14 / 3), math.ceil(width // 14 / 3)
    count = rows * (columns + 1) + 2
    count += columns + 1 if rows % 2 else 0
    return count + (rows + 1) // 2 * (columns + 1) % 2 * 2


def fitted(height: int, width: int, most: int) -> tuple[int, int]:
    """The size of a picture that is too large, as `solve_resize_ratio`."""
    ratio = height / width
    columns = math.sqrt((most - 2) / ratio + 0.25) - 0.5
    rows = columns * ratio
    if columns < 1:
        count = (most - 2) // 2
        return (count - count % 2) * 42, 42
    if rows < 2:
        return 84, ((most - 2) // 2 - 1) * 42
    whole_columns, whole_rows = math.floor(columns), math.floor(rows)
    whole_rows -= whole_rows % 2
    scale = min(whole_columns * 14 * 3 / width, whole_rows * 14 * 3 / height)
    return math.floor(height * scale / 14) * 14, math.floor(width * scale / 14) * 14


def expected(picture: Image.Image) -> np.ndarray:
    """As `load_image`, up to the scaling of colours."""
    width, height = picture.size
    width = min(width, height * 8)
    if 0 < width * height < 147_456:
        ratio = (147_456 / (width * height)) ** 0.5
        width, height = int(width * ratio), int(height * ratio)
    best = math.ceil(height / 14) * 14, math.ceil(width / 14) * 14
    budget = 381
    while tokens(*best) > 381:
        best = fitted(height, width, budget)
        budget -= 1
    if picture.width >= 8 * picture.height:
        return np.asarray(picture.resize((best[1], best[0])))
    return np.asarray(ImageOps.pad(picture, (best[1], best[0]), color=(127, 127, 127)))


def test_pixels_are_those_of_the_makers() -> None:
    ours = processor()
    for height, width in SIZES:
        corner = RNG.integers(0, 256, (min(height, 3), min(width, 3), 3), np.uint8)
        pixels = np.asarray(Image.fromarray(corner).resize((width, height)))
        canvas = ours.resize(pixels)
        np.testing.assert_array_equal(canvas, expected(Image.fromarray(pixels)), str((height, width)))
        assert ours.num_tokens(height, width) == tokens(*canvas.shape[:2]) <= 381
        assert math.prod(ours.grid(height, width)) <= math.prod(ours.largest_grid())
    values, _ = ours.patches(canvas)
    top_left = canvas[:14, :14].transpose(2, 0, 1).astype(np.float32) / np.float32(255)
    np.testing.assert_allclose(values[0].reshape(3, 14, 14), (top_left - 0.5) / 0.5, atol=1e-6)


@pytest.mark.parametrize("cap", [16, 17, 64, 5000])
def test_no_picture_takes_more_than_the_cap(cap: int) -> None:
    ours = read_picture_processor(SETTINGS, most_tokens=cap)
    for height, width in [*SIZES, (1, 16_000), (16_000, 1)]:
        assert 6 <= ours.num_tokens(height, width) <= min(cap, 384) - 3


def test_other_settings_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="sets 'max_n_token'"):
        processor(max_n_token=3)
    with pytest.raises(UsageError, match="at least 16"):
        read_picture_processor(SETTINGS, most_tokens=15)


def test_a_block_has_pairs_of_rows() -> None:
    # Start, 2 x 2 squares with marks, end; the same with a row of fillers, and 2 more because 3 is odd.
    assert num_block_tokens(2, 2) == 2 + 6 + 2
    assert num_block_tokens(1, 1) == 2 + 4
    assert num_block_tokens(3, 3) == 2 + 16
