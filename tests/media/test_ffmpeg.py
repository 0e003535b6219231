"""Files of videos, decoded by the system's ffmpeg, which also makes them here."""

from __future__ import annotations

import os
import re
import select
import shutil
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from argosy.budget import allowances
from argosy.errors import BadMedia, UsageError
from argosy.media import ffmpeg
from argosy.media.decoder import FileDecoder
from argosy.media.ffmpeg import VideoFile, _Patience
from argosy.media.frames import open_frames
from argosy.media.parts import FFMPEG_BYTES, MediaLimits, RequestMedia, Video
from tests.media.samples import pattern, png

pytestmark = pytest.mark.skipif(
    shutil.which("ffmpeg") is None or shutil.which("ffprobe") is None,
    reason="needs the programs ffmpeg and ffprobe (`apt install ffmpeg`)",
)

LIMITS = MediaLimits()
# Lossless, so that frames come back as they went in.
EXACT = {
    "mp4": ("-c:v", "libx264rgb", "-qp", "0", "-f", "mp4"),
    "mov": ("-c:v", "libx264rgb", "-qp", "0", "-f", "mov"),
    "mkv": ("-c:v", "libx264rgb", "-qp", "0", "-f", "matroska"),
}
LOSSY = {
    "webm": ("-c:v", "libvpx", "-b:v", "4M", "-f", "webm"),
    "avi": ("-c:v", "mpeg4", "-q:v", "1", "-f", "avi"),
    "gif": ("-f", "gif"),
}


def frames(count: int, height: int = 48, width: int = 64) -> NDArray[np.uint8]:
    """Grey steps on which a bright square moves."""
    made = np.empty((count, height, width, 3), np.uint8)
    for number in range(count):
        made[number] = 10 + 3 * number % 200
        made[number, 8:24, number % 40 : number % 40 + 16] = 230
    return made


def encoded(
    tmp_path: Path, clip: NDArray[np.uint8], *options: str, rate: float = 10, before: tuple[str, ...] = ()
) -> bytes:
    """A file that ffmpeg makes of these frames."""
    path = tmp_path / "video"
    size = f"{clip.shape[2]}x{clip.shape[1]}"
    raw = (
        "-f",
        "rawvideo",
        "-pix_fmt",
        "rgb24",
        "-video_size",
        size,
        "-framerate",
        str(rate),
        "-i",
        "pipe:0",
    )
    subprocess.run(
        ["ffmpeg", "-v", "error", "-y", *before, *raw, *options, str(path)], input=clip.tobytes(), check=True
    )
    return path.read_bytes()


@pytest.mark.parametrize("name", EXACT)
def test_frames_of_a_lossless_file_are_those_that_were_written(tmp_path: Path, name: str) -> None:
    clip = frames(30)
    with VideoFile(encoded(tmp_path, clip, *EXACT[name]), LIMITS) as file:
        track = file.track()
        assert (track.num_frames, track.rate, track.has_sound) == (30, 10.0, False)
        found = list(file.frames([0, 7, 8, 29], track))
        np.testing.assert_array_equal(found, clip[[0, 7, 8, 29]])


@pytest.mark.parametrize("name", LOSSY)
def test_common_formats_are_read(tmp_path: Path, name: str) -> None:
    clip = frames(20)
    with VideoFile(encoded(tmp_path, clip, *LOSSY[name]), LIMITS) as file:
        track = file.track()
        assert (track.num_frames, round(track.rate, 1)) == (20, 10.0)
        found = np.stack(list(file.frames([0, 10, 19], track)))
        # GIF has few colours here.
        assert abs(found.astype(int) - clip[[0, 10, 19]]).mean() < 20
        assert abs(found.astype(int) - clip[[5, 15, 5]]).mean() > 20


def test_any_number_of_frames_may_be_chosen(tmp_path: Path) -> None:
    clip = frames(300, 16, 16)
    indices = [*range(0, 300, 2), 299]
    with VideoFile(encoded(tmp_path, clip, *EXACT["mp4"]), LIMITS) as file:
        found = list(file.frames(indices, file.track()))
    np.testing.assert_array_equal(found, clip[indices])


def test_a_turned_video_is_upright(tmp_path: Path) -> None:
    clip = frames(4)
    plain = tmp_path / "plain.mp4"
    plain.write_bytes(encoded(tmp_path, clip, *EXACT["mp4"]))
    turned = tmp_path / "turned.mp4"
    subprocess.run(
        ["ffmpeg", "-v", "error", "-y", "-display_rotation", "90", "-i", plain, "-c", "copy", turned],
        check=True,
    )
    with VideoFile(turned.read_bytes(), LIMITS) as file:
        (found,) = file.frames([2], file.track())
    np.testing.assert_array_equal(found, np.rot90(clip[2]))


def test_the_sound_track_comes_at_the_rate_that_is_asked_for(tmp_path: Path) -> None:
    tone = ("-f", "lavfi", "-i", "sine=frequency=440:sample_rate=44100:duration=2")
    data = encoded(tmp_path, frames(20), "-c:v", "libx264", "-c:a", "pcm_s16le", "-f", "mov", before=tone)
    with VideoFile(data, LIMITS) as file:
        assert file.track().has_sound
        samples = file.sound(16_000)
    assert abs(samples.size - 32_000) < 200
    spectrum = np.abs(np.fft.rfft(samples[:16_000]))
    assert spectrum.argmax() == 440


def test_the_length_is_counted_and_not_believed(tmp_path: Path) -> None:
    """A cut file has the frames that are there."""
    data = encoded(tmp_path, frames(60), *EXACT["mkv"])
    with VideoFile(data[: len(data) // 2], LIMITS) as file:
        track = file.track()
        assert 5 < track.num_frames < 60
        assert len(list(file.frames([0, track.num_frames // 2], track))) == 2


@pytest.mark.parametrize(
    ("limits", "sentence"),
    [
        (MediaLimits(pixels=1000), "a frame may have at most 0.001 megapixels, found 64 x 48"),
        (MediaLimits(video_frames=10), "a video may have at most 10 frames, found 20"),
        (MediaLimits(video_s=1.5), "a video may have at most 1.5 seconds, found 2"),
        (MediaLimits(video_wall_s=0.0), "decoding the video takes more than 0 seconds"),
    ],
)
def test_a_video_beyond_a_limit_is_refused(tmp_path: Path, limits: MediaLimits, sentence: str) -> None:
    data = encoded(tmp_path, frames(20), *EXACT["mp4"])
    with VideoFile(data, limits) as file, pytest.raises(BadMedia, match=sentence) as refused:
        file.track()
    assert refused.value.facts["kind"] == "video"


def test_a_decoder_that_takes_too_long_is_killed(tmp_path: Path) -> None:
    fast = ("-c:v", "libx264", "-preset", "ultrafast", "-f", "mp4")
    data = encoded(tmp_path, np.tile(frames(1, 1080, 1920), (120, 1, 1, 1)), *fast)
    begin = time.monotonic()
    with VideoFile(data, MediaLimits(video_wall_s=0.5)) as file:
        track = ffmpeg.Track(120, 10.0, has_sound=False)
        with pytest.raises(BadMedia, match=r"takes more (than 0\.5 seconds|processor time)"):
            list(file.frames(range(120), track))
    assert time.monotonic() - begin < 10


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Twenty frames of 3840 x 2160, as a telephone films them."""
    path = tmp_path_factory.mktemp("large") / "large.mp4"
    source = ("-f", "lavfi", "-i", "testsrc=size=3840x2160:rate=30")
    made = ("-frames:v", "20", "-pix_fmt", "yuv420p", "-c:v", "libx264", "-preset", "ultrafast")
    subprocess.run(
        ["ffmpeg", "-v", "error", *source, *made, "-x264-params", "ref=5:bframes=3", path], check=True
    )
    return path.read_bytes()


def peak_memory(data: bytes, limits: MediaLimits) -> int:
    """Decode all frames of a file; returns the most memory, in bytes, that ffmpeg had when a frame came."""
    peak = num_frames = 0
    with VideoFile(data, limits) as file:
        track = file.track()
        for _ in file.frames(range(track.num_frames), track):
            num_frames += 1
            for pid in Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split():
                status = Path(f"/proc/{pid}/status").read_text()
                # Pages of program files, which the kernel can drop, are not part of it.
                if found := re.search(r"RssAnon:\s+(\d+) kB", status):
                    peak = max(peak, int(found[1]) << 10)
    assert num_frames == track.num_frames
    return peak


def test_frames_of_a_telephone_fit_the_memory_that_the_plan_counts(large: bytes) -> None:
    """The limit of 512 MiB holds in the kernel; this is whether it is enough."""
    assert LIMITS.decode_bytes + FFMPEG_BYTES == 512 << 20
    assert 150 << 20 < peak_memory(large, LIMITS) < 450 << 20


def test_a_video_that_needs_more_memory_than_the_limit_is_refused_by_name(
    large: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    sentence = "decoding the video takes more than 256 MiB"
    with pytest.raises(BadMedia, match=sentence) as refused:
        peak_memory(large, MediaLimits(decode_bytes=0))
    assert refused.value.hint == "make its frames smaller"
    # The same number goes to the kernel and into the plan.
    planned = [allowances.media_bytes(takes_pictures=True, takes_video=True)]
    monkeypatch.setattr(allowances, "FFMPEG_BYTES", 0)
    planned.append(allowances.media_bytes(takes_pictures=True, takes_video=True))
    assert planned[0] - planned[1] == FFMPEG_BYTES


def test_errors_beyond_what_the_pipe_holds_stop_nothing(tmp_path: Path) -> None:
    """A damaged file makes ffmpeg write megabytes of errors, which nobody reads."""
    data = bytearray(encoded(tmp_path, np.tile(frames(1), (3000, 1, 1, 1)), "-c:v", "mjpeg", "-f", "avi"))
    for at in range(20_000, len(data), 97):
        data[at] ^= 0x55
    with VideoFile(bytes(data), LIMITS) as file:
        track = file.track()
        for _ in file.frames(range(track.num_frames), track):
            pass


def test_without_ffmpeg_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoder: FileDecoder
) -> None:
    data = encoded(tmp_path, frames(4), *EXACT["mp4"])
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match=r"needs the program ffmpeg, version 6\.0 or later") as refused:
        VideoFile(data, LIMITS)
    assert "pass frames: Video" in (refused.value.hint or "")
    content = Video([pattern(8, 9), png(pattern(8, 9, seed=1))], rate=2).read(LIMITS)
    with open_frames(content, decoder, LIMITS) as found:
        assert [frame.shape for frame in found.at(np.array([0, 1, 1]))] == [(8, 9, 3)] * 3


def test_an_older_ffmpeg_is_refused_with_the_version_that_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encoded(tmp_path, frames(4), *EXACT["mp4"])
    for name in ("ffmpeg", "ffprobe"):
        program = tmp_path / name
        program.write_text("#!/bin/sh\necho file pipe http\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match=r"version 6\.0 or later, and an older one is installed"):
        VideoFile(data, LIMITS)


def test_a_stopped_reader_leaves_no_process(tmp_path: Path) -> None:
    data = encoded(tmp_path, frames(30), *EXACT["mp4"])
    with VideoFile(data, LIMITS) as file:
        reader = file.frames(range(30), file.track())
        next(reader)
        reader.close()  # type: ignore[attr-defined]
    children = Path("/proc/self/task").glob("*/children")
    running = {pid for one in children for pid in one.read_text().split()}
    assert not any("ffmpeg" in Path(f"/proc/{pid}/comm").read_text() for pid in running)


def test_a_wait_for_ffmpeg_ends_when_nobody_wants_the_video_any_more() -> None:
    checks: list[None] = []

    def check() -> None:
        checks.append(None)
        if len(checks) == 2:
            raise InterruptedError

    source, sink = os.pipe()
    ready = select.poll()
    ready.register(source, select.POLLIN)
    with pytest.raises(InterruptedError):
        _Patience(60.0, RequestMedia(check=check)).wait(ready)
    os.close(source)
    os.close(sink)
