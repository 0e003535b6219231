"""Pictures and sounds, from files to patches and features, equal transformers within 1e-3, over every value.

Each picture goes to the reference as Pillow decodes it, each sound as libsndfile decodes and soxr resamples it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from argosy.media.decoder import FileDecoder
from argosy.media.parts import Audio, Image, MediaLimits
from argosy.media.pictures import read_picture_processor
from argosy.media.sounds import read_sound_processor
from tests.media.make_references import (
    picture_processor,
    reference_features,
    reference_patches,
    reference_samples,
)
from tests.media.samples import PICTURE_SETTINGS, PICTURES, RATE, SOUND_SETTINGS, SOUNDS, pattern, png
from tests.media.test_references import LARGEST_DIFFERENCE_OF_MP3

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.usefixtures("one_quiet_thread")]

LARGEST_DIFFERENCE = 1e-3

# Recordings are not part of the repository: a directory of files in formats that are decoded.
SPEECH = sorted(Path(os.environ["ARGOSY_SPEECH"]).iterdir()) if "ARGOSY_SPEECH" in os.environ else []


@pytest.fixture(scope="module")
def decoder() -> Iterator[FileDecoder]:
    made = FileDecoder()
    yield made
    made.close()


@pytest.fixture(scope="module", params=PICTURE_SETTINGS)
def family(request: pytest.FixtureRequest) -> tuple[str, Any]:
    return request.param, picture_processor(request.param)


@pytest.mark.parametrize("case", PICTURES)
def test_patches_equal_those_of_the_reference_processor(
    decoder: FileDecoder, family: tuple[str, Any], case: str
) -> None:
    name, processor = family
    file = PICTURES[case]()
    expected, expected_grid = reference_patches(processor, file)
    pixels = decoder.picture(Image(file).read(MediaLimits()))
    patches, grid = read_picture_processor(PICTURE_SETTINGS[name]).prepare(pixels)
    assert grid == expected_grid
    assert abs(patches - expected).max() < LARGEST_DIFFERENCE


@pytest.mark.parametrize(
    "size", [(13, 1500), (33, 700), (55, 57), (199, 1), (1, 199), (1000, 1001), (2345, 1111)]
)
def test_sizes_equal_those_of_the_reference_processor(
    decoder: FileDecoder, family: tuple[str, Any], size: tuple[int, int]
) -> None:
    name, processor = family
    file = png(pattern(*size))
    expected, expected_grid = reference_patches(processor, file)
    patches, grid = read_picture_processor(PICTURE_SETTINGS[name]).prepare(
        decoder.picture(Image(file).read(MediaLimits()))
    )
    assert grid == expected_grid
    assert abs(patches - expected).max() < LARGEST_DIFFERENCE


def check_sound(decoder: FileDecoder, name: str, file: bytes, largest: float) -> None:
    expected_samples = reference_samples(file)
    samples = decoder.sound(Audio(file).read(MediaLimits()), RATE)
    assert samples.shape == expected_samples.shape
    expected = reference_features(name, expected_samples)
    features = read_sound_processor(
        SOUND_SETTINGS[name], padding="chunk" if name == "whisper" else "none"
    ).prepare(samples)
    assert features.shape == expected.shape
    assert abs(features - expected).max() < largest


@pytest.mark.parametrize("name", SOUND_SETTINGS)
@pytest.mark.parametrize("case", SOUNDS)
def test_features_equal_those_of_the_reference_processor(decoder: FileDecoder, name: str, case: str) -> None:
    # In near silence, the rounding of MP3 shows more than anywhere else.
    check_sound(
        decoder, name, SOUNDS[case](), 10 * LARGEST_DIFFERENCE_OF_MP3 if case == "mp3" else LARGEST_DIFFERENCE
    )


@pytest.mark.parametrize("name", SOUND_SETTINGS)
@pytest.mark.parametrize("path", SPEECH, ids=lambda path: path.name)
def test_features_of_speech_equal_those_of_the_reference_processor(
    decoder: FileDecoder, name: str, path: Path
) -> None:
    check_sound(decoder, name, path.read_bytes(), LARGEST_DIFFERENCE)


def test_samples_of_every_file_equal_those_of_the_reference_loader(decoder: FileDecoder) -> None:
    for case, make in SOUNDS.items():
        file = make()
        samples = decoder.sound(Audio(file).read(MediaLimits()), RATE)
        assert np.abs(samples - reference_samples(file)).max() < 1e-4, case
