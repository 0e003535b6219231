"""Sizes and pixels of DeepSeek-V4-Vision's and V4.1's pictures, against plain code after their image_processor.py."""

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

V4 = {
    "image_processor_type": "DeepseekV4ImageProcessor", "max_ratio": 8, "max_tokens": 384, "merge_size": 3,
    "min_pixels": 147_456, "patch_size": 14, "rows_together": 2,
}  # fmt: skip
V41 = V4 | {"max_ratio": 0, "max_tokens": 1024, "min_pixels": 295_936, "rows_together": 1}
RNG = np.random.default_rng(3)
SIZES = [
    (1, 1), (1, 10_000), (10_000, 1), (384, 384), (383, 384), (100, 800), (100, 801), (801, 100), (5, 39), (6000, 4000),
    (42, 14), (3, 4000), (420, 37),
    *((int(height), int(width)) for height, width in np.exp(RNG.uniform(0, 8.5, (900, 2)))),
]  # fmt: skip


def processor(settings: dict[str, Any], most_tokens: int | None = None) -> PictureProcessor:
    return read_picture_processor(settings, most_tokens=most_tokens)


def tokens(height: int, width: int, *, in_pairs: bool) -> int:
    rows, columns = math.ceil(height // 14 / 3), math.ceil(width // 14 / 3)
    count = rows * (columns + 1) + 2
    if in_pairs:
        count += columns + 1 if rows % 2 else 0
        count += (rows + 1) // 2 * (columns + 1) % 2 * 2
    return count


def fitted41(height: int, width: int, most: int) -> tuple[int, int]:
    """The size of a picture that is too large, as V4.1's `solve_resize_ratio`."""
    ratio = height / width
    columns = math.sqrt((most - 2) / ratio + 0.25) - 0.5
    rows = columns * ratio
    if columns < 1:
        return (most - 2) // 2 * 42, 42
    if rows < 1:
        return 42, (most - 3) * 42
    scale = min(math.floor(columns) * 42 / width, math.floor(rows) * 42 / height)
    return math.floor(height * scale / 14) * 14, math.floor(width * scale / 14) * 14


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


def expected(picture: Image.Image, *, is_v41: bool) -> np.ndarray:
    """As `load_image`, up to the scaling of colours."""
    width, height = picture.size
    if not is_v41:
        width = min(width, height * 8)
    if 0 < width * height < (least := 295_936 if is_v41 else 147_456):
        ratio = (least / (width * height)) ** 0.5
        width, height = int(width * ratio), int(height * ratio)
    best = math.ceil(height / 14) * 14, math.ceil(width / 14) * 14
    if is_v41:
        if tokens(*best, in_pairs=False) > 1024:
            best = fitted41(height, width, 1024)
    else:
        budget = 381
        while tokens(*best, in_pairs=True) > 381:
            best = fitted(height, width, budget)
            budget -= 1
    if not is_v41 and picture.width >= 8 * picture.height:
        return np.asarray(picture.resize((best[1], best[0])))
    return np.asarray(ImageOps.pad(picture, (best[1], best[0]), color=(127, 127, 127)))


@pytest.mark.parametrize("is_v41", [False, True], ids=["V4", "V4.1"])
def test_pixels_are_those_of_the_makers(is_v41: bool) -> None:
    ours, most = processor(V41 if is_v41 else V4), 1024 if is_v41 else 381
    for height, width in SIZES[: 300 if is_v41 else None]:
        corner = RNG.integers(0, 256, (min(height, 3), min(width, 3), 3), np.uint8)
        pixels = np.asarray(Image.fromarray(corner).resize((width, height)))
        canvas = ours.resize(pixels)
        made = expected(Image.fromarray(pixels), is_v41=is_v41)
        np.testing.assert_array_equal(canvas, made, str((height, width)))
        assert ours.num_tokens(height, width) == tokens(*canvas.shape[:2], in_pairs=not is_v41) <= most
        assert math.prod(ours.grid(height, width)) <= math.prod(ours.largest_grid())
    values, _ = ours.patches(canvas)
    top_left = canvas[:14, :14].transpose(2, 0, 1).astype(np.float32) / np.float32(255)
    np.testing.assert_allclose(values[0].reshape(3, 14, 14), (top_left - 0.5) / 0.5, atol=1e-6)


@pytest.mark.parametrize(
    ("width", "height", "count"),
    [
        (14, 14, 184), (28, 14, 202), (800, 600, 317), (1024, 768, 496), (1024, 1024, 652), (2000, 2000, 994),
        (4000, 3000, 1001), (4096, 4096, 994), (4, 400, 392), (400, 4, 264), (4200, 100, 305), (100, 4200, 402),
    ],
)  # fmt: skip
def test_v41_s_pictures_have_as_many_tokens_as_its_own_code_gives_them(
    width: int, height: int, count: int
) -> None:
    assert processor(V41).num_tokens(height, width) == count


@pytest.mark.parametrize("cap", [16, 17, 64, 5000])
@pytest.mark.parametrize("merge_size", [3, 1])
@pytest.mark.parametrize("settings", [V4, V41], ids=["V4", "V4.1"])
def test_no_picture_takes_more_than_the_cap(settings: dict[str, Any], merge_size: int, cap: int) -> None:
    ours = processor(settings | {"merge_size": merge_size}, cap)
    least, fillers = (6, 3) if settings is V4 else (4, 0)
    for height, width in [*SIZES[::3], (1, 16_000), (16_000, 1)]:
        assert least <= ours.num_tokens(height, width) <= min(cap, settings["max_tokens"]) - fillers


def test_other_settings_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="sets 'max_n_token'"):
        processor(V4 | {"max_n_token": 3})
    with pytest.raises(UsageError, match="at least 16"):
        processor(V4, 15)


def test_a_block_has_pairs_of_rows() -> None:
    # Start, 2 x 2 squares with marks, end; the same with a row of fillers, and 2 more because 3 is odd.
    assert num_block_tokens(2, 2, 2) == 2 + 6 + 2
    assert num_block_tokens(1, 1, 2) == 2 + 4
    assert num_block_tokens(3, 3, 2) == 2 + 16
    assert num_block_tokens(3, 3, 1) == 2 + 12
