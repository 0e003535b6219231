"""Frames of videos are chosen, scaled and labelled as by transformers, as `make_video_references.py` kept it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from argosy.errors import BadMedia, CheckpointError, UnsupportedModel
from argosy.media.videos import VideoProcessor, read_video_processor
from tests.media.samples import pattern, summary
from tests.media.test_pictures import KIMI_OF_ITS_OWN_CODE, OMNI
from tests.media.video_samples import CASES, REFERENCES, VIDEO_SETTINGS, VIDEOS, Clip

# The same sums in another order; a frame that is off by one level differs by 0.004 or more.
LARGEST_DIFFERENCE = 1e-4
KEPT = np.load(REFERENCES)


def prepared(
    processor: VideoProcessor, clip: Clip
) -> tuple[NDArray[np.float32], list[tuple[int, int, int]], NDArray[np.int64]]:
    """Patches of all groups, the grid of each, and the indices of frames."""
    frames = clip.frames()
    indices = processor.sample(clip.num_frames, clip.rate)
    canvases = processor.resize((frames[at] for at in indices), len(indices))
    groups = [
        processor.patches(canvases[group.start : group.stop]) for group in processor.groups(len(indices))
    ]
    assert processor.num_tokens(len(indices), clip.height, clip.width) == sum(
        grid[1] * grid[2] // processor.merge_size**2 for _, grid in groups
    )
    return np.concatenate([patches for patches, _ in groups]), [grid for _, grid in groups], indices


@pytest.mark.parametrize(
    ("name", "case"),
    # A long video of large frames takes as long as all others; other processors have it too.
    [pytest.param(*each, marks=[pytest.mark.full] * (each == ("qwen3_omni", "long"))) for each in CASES],
)
def test_a_video_gives_the_patches_of_the_reference_processors(name: str, case: str) -> None:
    processor = read_video_processor(VIDEO_SETTINGS[name])
    patches, grids, indices = prepared(processor, VIDEOS[case])
    key = f"{name}/{case}"
    assert indices.tolist() == KEPT[f"{key}/indices"].tolist()
    expected = KEPT[f"{key}/grids"].tolist()
    if processor.are_joined:  # the reference has one grid for the whole video
        expected = [[1, *expected[0][1:]]] * expected[0][0]
    assert [list(grid) for grid in grids] == expected
    assert abs(summary(patches) - KEPT[f"{key}/values"]).max() < LARGEST_DIFFERENCE


@pytest.mark.parametrize("name", VIDEO_SETTINGS)
def test_one_frame_is_a_video(name: str) -> None:
    clip = Clip(1, 40, 60, 30.0)
    processor = read_video_processor(VIDEO_SETTINGS[name])
    patches, grids, indices = prepared(processor, clip)
    assert set(indices.tolist()) == {0}
    assert len(grids) == 1
    assert np.isfinite(patches).all()


TEXTS = {
    "qwen3_vl": [
        ("<0.5 seconds><|vision_start|>", "<|vision_end|>"),
        ("<2.0 seconds><|vision_start|>", "<|vision_end|>"),
    ],
    "qwen3_omni": [("", ""), ("", "")],
    "glm4v": [("<|begin_of_image|>", "<|end_of_image|>0"), ("<|begin_of_image|>", "<|end_of_image|>2")],
    "glm46v": [
        ("<|begin_of_image|>", "<|end_of_image|>0.0 seconds"),
        ("<|begin_of_image|>", "<|end_of_image|>2.0 seconds"),
    ],
    "gemma4": [("00:00 ", ""), (" 00:01 ", ""), (" 00:02 ", "")],
    "kimi_k25": [("00:00:00.000<|media_begin|>video<|media_content|>", "<|media_end|>")],
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
def test_texts_tell_the_time_of_each_group(name: str) -> None:
    processor = read_video_processor(VIDEO_SETTINGS[name])
    assert processor.texts([0.0, 1.0, 2.0]) == TEXTS[name]


def test_kimi_counts_hours() -> None:
    processor = read_video_processor(VIDEO_SETTINGS["kimi_k25"])
    (text,) = processor.texts([3723.0625])
    assert text.before.startswith("01:02:03.062<|media_begin|>")


@pytest.mark.parametrize("name", VIDEO_SETTINGS)
@settings(max_examples=150, deadline=None)
@given(
    num_frames=st.integers(1, 400),
    height=st.integers(1, 4000),
    width=st.integers(1, 4000),
    most_tokens=st.integers(16, 5000),
    most_group_tokens=st.integers(16, 500),
)
def test_no_video_takes_more_tokens_than_the_caps(
    name: str, num_frames: int, height: int, width: int, most_tokens: int, most_group_tokens: int
) -> None:
    capped = read_video_processor(
        VIDEO_SETTINGS[name], most_tokens=most_tokens, most_group_tokens=most_group_tokens
    )
    try:
        found = capped.num_tokens(num_frames, height, width)
    except BadMedia:
        # Each group takes a token at least, and a narrow one a token for each of its squares.
        narrow = max(height, width) > 10 * min(height, width)
        assert narrow or capped.num_groups(num_frames) * 4 > min(
            most_tokens, most_group_tokens * capped.num_groups(num_frames)
        )
        return
    assert 1 <= found <= most_tokens
    assert found <= most_group_tokens * capped.num_groups(num_frames)
    free = read_video_processor(VIDEO_SETTINGS[name])
    if free.num_tokens(num_frames, height, width) <= min(
        most_tokens, most_group_tokens * capped.num_groups(num_frames)
    ):
        assert capped.size(num_frames, height, width) == free.size(num_frames, height, width)


def test_frames_of_different_sizes_are_refused() -> None:
    processor = read_video_processor(VIDEO_SETTINGS["qwen3_vl"])
    with pytest.raises(BadMedia, match="must all have the same size"):
        processor.resize([pattern(40, 60), pattern(60, 40)], 2)


def test_omni_and_kimi_keep_the_settings_of_videos_with_those_of_pictures() -> None:
    omni = read_video_processor(OMNI, where="preprocessor_config.json")
    assert (omni.patch_size, omni.group_frames, omni.are_joined) == (16, 2, True)
    kimi = read_video_processor(KIMI_OF_ITS_OWN_CODE, where="preprocessor_config.json")
    assert (kimi.patch_size, kimi.group_frames, kimi.are_joined) == (14, 4, False)
    assert kimi.sample(100, 10.0).tolist() == list(range(0, 100, 5))


def test_a_file_of_all_processors_has_the_one_of_videos_inside() -> None:
    inside = read_video_processor(
        {"video_processor": VIDEO_SETTINGS["qwen3_vl"]}, where="processor_config.json"
    )
    alone = read_video_processor(VIDEO_SETTINGS["qwen3_vl"])
    assert (inside.fit, inside.patch_size, inside.label) == (alone.fit, alone.patch_size, alone.label)


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"video_processor_type": "LlavaVideoProcessor"}, UnsupportedModel, "asks for video_processor_type 'Llava"),
        ({"video_processor_type": None}, UnsupportedModel, "has no video_processor_type; supported: Qwen3VL"),
        ({"sharpen": 2}, UnsupportedModel, "sets 'sharpen' to 2, which is not known here"),
        ({"do_resize": False}, UnsupportedModel, "asks for do_resize false; supported: true"),
        ({"resample": 2}, UnsupportedModel, "asks for resample 2; supported: 3"),
        ({"patch_size": 0}, CheckpointError, "patch_size is 0; expected a whole number from 1 to 256"),
        ({"patch_size": True}, CheckpointError, "patch_size is true"),
        ({"fps": -1}, CheckpointError, "fps is -1; expected a number above zero"),
        ({"size": {"longest_edge": 9}}, CheckpointError, "shortest_edge is null"),
        ({"size": {"longest_edge": 9, "shortest_edge": 9, "width": 1}}, UnsupportedModel, "sets 'width' to 1"),
    ],
)  # fmt: skip
def test_settings_that_are_not_known_are_refused_by_name(
    change: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        read_video_processor({**VIDEO_SETTINGS["qwen3_vl"], **change})
