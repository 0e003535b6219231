"""Frames of videos, chosen and prepared, equal transformers within 1e-3, over every value; and so do whole models."""

from __future__ import annotations

import json
from typing import Any

import pytest

from argosy.media.videos import read_video_processor
from tests.media.make_video_references import reference_video, video_processor
from tests.media.test_videos import prepared
from tests.media.video_samples import CASES, VIDEO_SETTINGS, VIDEOS, Clip

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.usefixtures("one_quiet_thread")]

LARGEST_DIFFERENCE = 1e-3


@pytest.fixture(scope="module", params=VIDEO_SETTINGS)
def family(request: pytest.FixtureRequest) -> tuple[str, Any]:
    return request.param, video_processor(request.param)


def test_the_settings_that_a_reference_processor_writes_are_read(family: tuple[str, Any]) -> None:
    name, processor = family
    found, expected = (
        read_video_processor(json.loads(processor.to_json_string())),
        read_video_processor(VIDEO_SETTINGS[name]),
    )
    assert (found.fit, found.patch_size, found.group_frames) == (
        expected.fit,
        expected.patch_size,
        expected.group_frames,
    )
    assert abs(found.levels - expected.levels).max() == 0


def check(name: str, processor: Any, clip: Clip) -> None:
    expected, grids, expected_indices = reference_video(processor, clip)
    patches, found, indices = prepared(read_video_processor(VIDEO_SETTINGS[name]), clip)
    assert indices.tolist() == expected_indices.tolist()
    assert sum(grid[0] for grid in found) == sum(int(grid[0]) for grid in grids)
    assert {grid[1:] for grid in found} == {tuple(grid[1:].tolist()) for grid in grids}
    assert abs(patches - expected).max() < LARGEST_DIFFERENCE


@pytest.mark.parametrize("case", VIDEOS)
def test_patches_equal_those_of_the_reference_processor(family: tuple[str, Any], case: str) -> None:
    name, processor = family
    if (name, case) in CASES:
        check(name, processor, VIDEOS[case])


@pytest.mark.parametrize(
    "clip",
    [Clip(14, 240, 426, 5.0), Clip(4, 1080, 608, 3.0), Clip(50, 31, 33, 15.0), Clip(700, 30, 30, 2.0)],
    ids=str,
)
def test_sizes_and_lengths_equal_those_of_the_reference_processor(
    family: tuple[str, Any], clip: Clip
) -> None:
    check(*family, clip)
