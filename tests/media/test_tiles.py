"""Tiles of pictures equal those of Llama-4's processor in transformers, as `make_references.py tiles` kept them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from argosy.errors import ArgosyError, UsageError
from argosy.media.pictures import read_picture_processor
from argosy.media.tiles import TileProcessor
from tests.media.samples import TILED_SIZES, TILES, pattern, summary

# preprocessor_config.json of Llama-4-Scout-17B-16E-Instruct
SETTINGS: dict[str, Any] = {
    "crop_size": None,
    "data_format": "channels_first",
    "default_to_square": True,
    "device": None,
    "do_center_crop": None,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "Llama4ImageProcessorFast",
    "image_std": [0.5, 0.5, 0.5],
    "input_data_format": None,
    "max_patches": 16,
    "processor_class": "Llama4Processor",
    "resample": 2,
    "rescale_factor": 0.00392156862745098,
    "resize_to_max_canvas": False,
    "return_tensors": None,
    "size": {"height": 336, "width": 336},
}
KEPT = np.load(TILES)


def processor_of(most_tokens: int | None = None, **changes: Any) -> TileProcessor:
    found = read_picture_processor(SETTINGS | changes, most_tokens=most_tokens)
    assert isinstance(found, TileProcessor)
    return found


@pytest.mark.parametrize("size", TILED_SIZES, ids="{0[0]}x{0[1]}".format)
def test_a_picture_gives_the_tiles_of_the_reference_processor(size: tuple[int, int]) -> None:
    processor = processor_of()
    rows, columns, num_patches, *values = KEPT["{}x{}".format(*size)]
    patches, grid = processor.prepare(pattern(*size))
    has_whole = rows * columns > 1
    assert grid == processor.grid(*size) == (1, 24 * (rows + has_whole), 24 * columns)
    assert len(patches) == num_patches
    np.testing.assert_array_equal(summary(patches), values)
    tokens = 144 + 3 + has_whole * rows * columns * 145
    assert processor.num_tokens(*size) == tokens


def test_the_arrangement_and_the_size_within_are_those_of_the_reference() -> None:
    fit = processor_of().fit
    for height, width, rows, columns, scaled_height, scaled_width in KEPT["chosen"].tolist():
        assert fit.tiles(height, width) == (rows, columns), (height, width)
        assert fit.scaled(height, width) == (scaled_height, scaled_width), (height, width)


def test_the_largest_canvas_enlarges_a_picture_to_fill_it() -> None:
    fit = processor_of(resize_to_max_canvas=True).fit
    assert fit.tiles(100, 100) == (4, 4)
    assert fit.scaled(100, 100) == (4 * 336, 4 * 336)


def test_a_cap_on_tokens_allows_fewer_tiles() -> None:
    processor = processor_of(most_tokens=4 * 145 + 144 + 3)
    assert processor.fit.most_tiles == 4
    assert processor.num_tokens(2000, 2000) == 4 * 145 + 144 + 3
    assert processor.largest_grid() == (1, 2 * 24, 4 * 24)
    one = processor_of(most_tokens=147)
    assert one.grid(2000, 10) == one.largest_grid() == (1, 24, 24)
    with pytest.raises(UsageError, match="at least 147 for this model, found 146"):
        processor_of(most_tokens=146)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resample": 3}, "resample 3; supported: 2"),
        ({"do_normalize": False}, "do_normalize false"),
        ({"do_resize": False}, "do_resize false"),
        ({"size": {"height": 336, "width": 448}}, "width 448"),
        ({"size": {"height": 350, "width": 350}}, "350 pixels on a side; supported: a multiple of 28"),
        ({"max_patches": 0}, "max_patches is 0"),
        ({"tile_overlap": 2}, "tile_overlap"),
    ],
)
def test_another_setting_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgosyError, match=message):
        processor_of(**changes)
