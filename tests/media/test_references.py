"""Files decoded and prepared here equal what transformers makes of them, as `make_references.py` kept it."""

from __future__ import annotations

import numpy as np
import pytest

from argosy.media.decoder import FileDecoder
from argosy.media.parts import Audio, Image, MediaLimits
from argosy.media.pictures import read_picture_processor
from argosy.media.sounds import read_sound_processor
from tests.media.samples import (
    PICTURE_SETTINGS,
    PICTURES,
    RATE,
    REFERENCES,
    SOUND_SETTINGS,
    SOUNDS,
    heard,
    summary,
)

# The same sums in float64 or float32; a picture that is off by one level differs by 0.004 or more.
LARGEST_DIFFERENCE = 1e-4
# Two decoders of MP3 round differently, by about 1e-5; in a band that is nearly silent this is more than in others.
LARGEST_DIFFERENCE_OF_MP3 = 1e-2

_KEPT = np.load(REFERENCES)
KEPT = dict(
    zip(_KEPT["names"].tolist(), zip(_KEPT["shapes"].tolist(), _KEPT["values"], strict=True), strict=True)
)


@pytest.mark.parametrize(
    "case", [pytest.param(each, marks=[pytest.mark.full] * (each == "png_4000x3000")) for each in PICTURES]
)
def test_a_picture_gives_the_patches_of_the_reference_processors(decoder: FileDecoder, case: str) -> None:
    content = Image(PICTURES[case]()).read(MediaLimits())
    told: list[tuple[int, int]] = []
    pixels = decoder.picture(content, lambda *size: told.append(size))
    ((height, width),) = told
    assert pixels.shape == (height, width, 3)
    for name, settings in PICTURE_SETTINGS.items():
        processor = read_picture_processor(settings)
        patches, grid = processor.prepare(pixels)
        shape, values = KEPT[f"{name}/{case}"]
        assert list(grid) == shape
        assert grid == processor.grid(height, width)
        rows, columns = (side / processor.merge_size for side in grid[1:])
        with_whole = len(patches) / processor.merge_size**2 + 1
        num_tokens = with_whole if name == "deepseek_ocr2" else rows * (columns + (name == "pixtral"))
        assert processor.num_tokens(height, width) == num_tokens
        assert abs(summary(patches) - values).max() < LARGEST_DIFFERENCE, name


@pytest.mark.parametrize("case", SOUNDS)
def test_a_sound_gives_the_features_of_the_reference_processor(decoder: FileDecoder, case: str) -> None:
    samples = decoder.sound(Audio(SOUNDS[case]()).read(MediaLimits()), RATE)
    for name, settings in SOUND_SETTINGS.items():
        processor = read_sound_processor(settings, padding="chunk" if name == "whisper" else "none")
        features = processor.prepare(samples)
        shape, values = KEPT[f"{name}/{case}"]
        assert [*features.shape, samples.size] == shape
        assert features.shape[1] == processor.num_frames(samples.size)
        largest = LARGEST_DIFFERENCE_OF_MP3 if case == "mp3" else LARGEST_DIFFERENCE
        assert abs(summary(heard(features, samples)) - values).max() < largest, name
