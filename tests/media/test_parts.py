from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from argosy.errors import BadMedia, PromptTooLong, UsageError
from argosy.media.parts import Audio, Image, MediaLimits, RequestMedia, Video
from tests.media.samples import pattern, png

LIMITS = MediaLimits()


def test_a_file_and_its_bytes_have_the_same_content(tmp_path: Path) -> None:
    content = png(pattern(9, 9))
    path = tmp_path / "a.png"
    path.write_bytes(content)
    assert (
        Image(path).read(LIMITS).digest
        == Image(str(path)).read(LIMITS).digest
        == Image(content).read(LIMITS).digest
    )
    assert Image(content).read(LIMITS).data == content
    assert len(Image(content).read(LIMITS).digest) == 32


def test_equal_arrays_have_equal_digests_and_others_do_not() -> None:
    pixels = pattern(8, 6)
    digests = [
        Image(pixels).read(LIMITS).digest,
        Image(pixels.reshape(6, 8, 3)).read(LIMITS).digest,
        Image(pixels.reshape(12, 12)).read(LIMITS).digest,
        Image(255 - pixels).read(LIMITS).digest,
        Video(pixels[None], rate=2).read(LIMITS).digest,
        Video(pixels[None], rate=3).read(LIMITS).digest,
        Audio(np.ones(9, np.float32), rate=16_000).read(LIMITS).digest,
        Audio(np.ones(9, np.float32), rate=8_000).read(LIMITS).digest,
    ]
    assert len(set(digests)) == len(digests)
    assert Image(np.asfortranarray(pixels)).read(LIMITS).digest == digests[0]


def test_content_does_not_change_with_the_callers_array() -> None:
    pixels = pattern(8, 6)
    content = Image(pixels).read(LIMITS)
    before = pixels.copy()
    pixels[:] = 0
    assert np.array_equal(content.data, before)
    assert isinstance(content.data, np.ndarray)
    assert not content.data.flags.writeable


def test_of_a_file_that_is_too_large_nothing_is_read(tmp_path: Path) -> None:
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # reading it would take all memory
    with pytest.raises(BadMedia, match="may have at most 33,554,432 bytes, found 1,099,511,627,776"):
        Image(path).read(LIMITS)
    with pytest.raises(BadMedia, match="may have at most 10 bytes, found 11"):
        Image(bytes(11)).read(MediaLimits(file_bytes=10))


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path, sentence in (
        (pipe, "is not a file"),
        (tmp_path, "is not a file|Is a directory"),
        (tmp_path / "nothing", "No such file"),
        ("a\0b", "the path is invalid"),
        ("/dev/zero", "is not a file"),
    ):
        with pytest.raises(UsageError, match=sentence):
            Image(path).read(LIMITS)


@pytest.mark.parametrize(
    "part",
    [
        Image(np.zeros((4, 4, 4), np.uint8)),
        Image(np.zeros((4, 4, 3), np.float32)),
        Image(np.zeros(4, np.uint8)),
        Image(np.zeros((0, 4, 3), np.uint8)),
        Image(np.zeros((1, 16_385), np.uint8)),
        Audio(np.zeros((4, 2), np.float32), rate=16_000),
        Audio(np.zeros(4, np.int16), rate=16_000),
        Audio(np.zeros(0, np.float32), rate=16_000),
        Audio(np.full(4, np.nan, np.float32), rate=16_000),
        Audio(np.zeros(4, np.float32), rate=999),
        Audio(np.zeros(601_000, np.float32), rate=1_000),
        Video(np.zeros((4, 4, 3), np.uint8), rate=1),
        Video(np.zeros((0, 4, 4, 3), np.uint8), rate=1),
        Video(np.zeros((2, 4, 4, 3), np.uint8), rate=1_001),
        Video(np.zeros((2, 4, 4, 3), np.uint8), rate=float("nan")),
        Video(np.zeros((7, 4, 4, 3), np.uint8), rate=0.01),
        Video(np.zeros((50_001, 1, 1, 3), np.uint8), rate=100),
        Video([], rate=1),
        Video(b""),
        Image(b""),
    ],
)
def test_an_array_of_the_wrong_type_shape_or_size_is_refused(part: Any) -> None:
    with pytest.raises(BadMedia) as refused:
        part.read(LIMITS)
    assert refused.value.facts["kind"] == part.kind
    assert refused.value.http_status == 400


@pytest.mark.parametrize(
    "part",
    [
        Audio(np.zeros(4, np.float32)),
        Audio(b"RIFF", rate=16_000),
        Video(np.zeros((1, 4, 4, 3), np.uint8)),
        Video([np.zeros((4, 4, 3), np.uint8)]),
        Video(b"mp4", rate=2),
    ],
)
def test_a_rate_belongs_to_an_array_and_to_nothing_else(part: Any) -> None:
    with pytest.raises(UsageError, match="rate"):
        part.read(LIMITS)


def test_the_frames_of_a_video_may_be_any_pictures(tmp_path: Path) -> None:
    one, two = pattern(8, 6), pattern(8, 6, seed=1)
    path = tmp_path / "two.png"
    path.write_bytes(png(two))
    content = Video([one, path], rate=2).read(LIMITS)
    assert isinstance(content.data, tuple)
    assert [frame.kind for frame in content.data] == ["picture", "picture"]
    others = [Video([one, path], rate=3), Video([path, one], rate=2), Video([one, png(two), one], rate=2)]
    assert content.digest == Video((one, png(two)), rate=2).read(LIMITS).digest
    assert content.digest not in [other.read(LIMITS).digest for other in others]
    with pytest.raises(BadMedia, match="may have at most 200 bytes together"):
        Video([one, two], rate=2).read(MediaLimits(video_bytes=200))
    with pytest.raises(UsageError, match="cannot read the picture /nowhere: No such file"):
        Video(["/nowhere"], rate=2).read(LIMITS)


def test_a_video_may_be_larger_than_a_picture() -> None:
    assert Video(bytes(100)).read(MediaLimits(file_bytes=10)).kind == "video"
    with pytest.raises(BadMedia, match="the file of a video may have at most 99 bytes, found 100"):
        Video(bytes(100)).read(MediaLimits(video_bytes=99))


def test_the_work_on_the_media_of_a_request_has_a_time_limit() -> None:
    request = RequestMedia(MediaLimits(work_s=0.01))
    with request.work():
        time.sleep(0.02)
    with pytest.raises(UsageError, match=r"of a request may take at most 0\.01 seconds"), request.work():
        pytest.fail("it began")


def test_the_media_of_a_request_share_the_tokens_of_its_prompt() -> None:
    request = RequestMedia(most_tokens=99)
    request.add_tokens(60)
    request.require_room(39)
    with pytest.raises(PromptTooLong, match="at least 100 tokens, and the context holds 100"):
        request.require_room(40)
    with pytest.raises(PromptTooLong):
        request.add_tokens(40)
    request.add_tokens(39)
