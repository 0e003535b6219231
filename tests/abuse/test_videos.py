"""Hostile videos are refused in a sentence of ours, or give frames; never another file, address or library's words."""

from __future__ import annotations

import http.server
import random
import re
import resource
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from argosy.errors import BadMedia
from argosy.media.decoder import FileDecoder
from argosy.media.frames import open_frames
from argosy.media.parts import FFMPEG_BYTES, MediaLimits, Video
from argosy.media.videos import read_video_processor
from tests.abuse import hostile_videos
from tests.abuse.hostile_videos import full, made, mp4
from tests.media.video_samples import VIDEO_SETTINGS

pytestmark = [
    pytest.mark.usefixtures("as_users_have_them"),
    pytest.mark.skipif(
        shutil.which("ffmpeg") is None or shutil.which("ffprobe") is None,
        reason="needs the programs ffmpeg and ffprobe (`apt install ffmpeg`)",
    ),
]

LIMITS = MediaLimits()
CPU_SECONDS = 5.0  # of all processes for one file, on a busy machine

# Every sentence that a file can cause; text of ffmpeg would match none.
SENTENCES = [
    r"the video is empty: it has 0 bytes",
    r"unsupported video format; use MP4, MOV, WEBM, MKV, AVI or GIF",
    r"the file has no video that can be read",
    r"the video is damaged or incomplete",
    r"the video is damaged: its decoder failed",
    r"the video has no frames",
    r"the rate of a video must be above 0 and at most 1000 frames per second, found [\d,.e+]+",
    r"a video may have at most [\d,.]+ (frames|seconds), found [\d,.e+]+",
    r"a frame may have at most 50 megapixels, found [\d,]+ x [\d,]+ = [\d.]+",
    r"a side of a frame may have at most 16,384 pixels, found [\d,]+ x [\d,]+",
    r"the frame has no pixels: its size is \d+ x \d+",
    r"a side of a video may be at most 200 times as long as the other for this model, found .* pixels",
    r"the frames of a video must all have the same size",
    r"decoding the video takes more than [\d.]+ (seconds|MiB)",
    r"decoding the video takes more processor time than a video of its length may",
]


def decode(file: bytes) -> int:
    """Decode the frames that a model would see; returns how many there are."""
    processor = read_video_processor(VIDEO_SETTINGS["qwen3_vl"], most_tokens=256, most_group_tokens=64)
    with open_frames(Video(file).read(LIMITS), FileDecoder(LIMITS), LIMITS) as frames:
        indices = processor.sample(frames.num_frames, frames.rate)
        return len(processor.resize(frames.at(indices), len(indices)))


def require_our_sentence(error: BadMedia) -> None:
    assert any(re.fullmatch(sentence, error.message) for sentence in SENTENCES), error.message
    assert error.facts["kind"] == "video"


@pytest.mark.parametrize("name", hostile_videos.FILES)
def test_a_hostile_video_is_refused_cheaply(name: str) -> None:
    file = hostile_videos.FILES[name]()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    try:
        assert decode(file) == 0
    except BadMedia as error:
        require_our_sentence(error)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < CPU_SECONDS
    # The largest process of all tests so far; it counts file-backed pages, too.
    limit = (LIMITS.decode_bytes + FFMPEG_BYTES) >> 10
    assert after.ru_maxrss < max(limit, before.ru_maxrss + 1)


@pytest.mark.parametrize("name", hostile_videos.PLAYLISTS)
def test_a_playlist_is_refused(name: str) -> None:
    with pytest.raises(BadMedia):
        decode(hostile_videos.PLAYLISTS[name]())


def test_no_other_file_and_no_address_is_opened(tmp_path: Path) -> None:
    """The frames of a video lie in a file that it names, and there is a server at the address that it names."""
    sample = made("-c:v", "mjpeg", "-f", "image2pipe", frames=1)
    secret = tmp_path / "secret.ts"
    secret.write_bytes(sample)
    asked = []

    class Listener(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    # The same tables with the sample inside give a frame.
    assert num_seen(mp4(width=48, height=32, codec=b"jpeg", num_samples=1, sample=sample)) == 1
    with http.server.HTTPServer(("127.0.0.1", 0), Listener) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/a.ts"
        for target in (f"file://{secret}", str(secret), address):
            reference = full(b"url ", target.encode() + b"\0")
            nothing = bytes(len(sample))
            tables = {"width": 48, "height": 32, "codec": b"jpeg", "num_samples": 1}
            assert num_seen(mp4(sample=nothing, reference=reference, **tables)) == 0  # type: ignore[arg-type]
            assert num_seen(hostile_videos.HLS % target.encode()) == 0
        server.shutdown()
    assert asked == []


def num_seen(file: bytes) -> int:
    """The number of frames; 0 if the file is refused."""
    try:
        return decode(file)
    except BadMedia as error:
        require_our_sentence(error)
        return 0


def test_odd_but_honest_videos_are_decoded() -> None:
    one = made("-c:v", "libx264", "-f", "matroska", frames=1)
    assert decode(one) == 1
    assert decode(hostile_videos.fragmented()) > 0
    fast = made("-c:v", "libx264", "-f", "matroska", rate="240")
    assert decode(fast) > 0
    for degrees in ("37", "-180", "1e9"):  # as metadata
        crooked = hostile_videos.turned(degrees)
        assert decode(crooked) > 0
    gif = made("-f", "gif")
    assert decode(gif) > 0


def test_damaged_videos_are_decoded_or_refused_in_our_words() -> None:
    rng = random.Random(14)
    seeds = [
        hostile_videos.matroska(),
        hostile_videos.fragmented(),
        made("-c:v", "mpeg4", "-f", "avi"),
        made("-f", "gif"),
    ]
    num_refused = 0
    for number in range(24):
        file = bytearray(seeds[number % len(seeds)])
        for _ in range(rng.randint(1, 12)):
            file[rng.randrange(len(file) if rng.random() < 0.5 else 400)] = rng.randrange(256)
        if rng.random() < 0.3:
            del file[rng.randrange(1, len(file)) :]
        try:
            decode(bytes(file))
        except BadMedia as error:
            num_refused += 1
            require_our_sentence(error)
    assert num_refused > 3


def test_a_frame_beyond_the_limit_is_not_read() -> None:
    """The size of a frame may differ from what the file declares."""
    file = made("-c:v", "mjpeg", "-f", "matroska", height=200, width=300)
    small = MediaLimits(pixels=50_000)
    with (
        pytest.raises(BadMedia, match=r"a frame may have at most 0\.05 megapixels, found 300 x 200"),
        open_frames(Video(file).read(LIMITS), FileDecoder(LIMITS), small) as frames,
    ):
        list(frames.at(np.array([0])))
