"""Videos that a stranger may send: cut, lying, nested, huge, and playlists that name other files."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Callable

import numpy as np

from tests.media.samples import encoded, palette_image, pattern, png, wav, wave

Make = Callable[[], bytes]


def box(kind: bytes, *content: bytes) -> bytes:
    """A box of MP4."""
    body = b"".join(content)
    return struct.pack(">I4s", 8 + len(body), kind) + body


def full(kind: bytes, *content: bytes) -> bytes:
    """A box with version 0 and no flags."""
    return box(kind, bytes(4), *content)


def mp4(
    *,
    width: int = 16,
    height: int = 16,
    time_scale: int = 10,
    step: int = 1,
    codec: bytes = b"mp4v",
    num_samples: int = 4,
    duration: int = 4,
    sample: bytes = b"\0" * 64,
    reference: bytes = b"",
    sample_size: int | None = None,
    chunk_offset: int | None = None,
) -> bytes:
    """An MP4 with one track of video, whose tables say what we want."""
    ftyp = box(b"ftyp", b"isom", bytes(4), b"isommp42")
    data = box(b"mdat", sample * min(num_samples, 64))
    matrix = struct.pack(">9i", 0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)
    sides = struct.pack(">HH", width & 0xFFFF, height & 0xFFFF)
    entry = bytes(6) + struct.pack(">H", 1) + bytes(16) + sides
    entry += struct.pack(">IIIH", 0x480000, 0x480000, 0, 1)
    entry += bytes(32) + struct.pack(">Hh", 24, -1)
    drefs = full(b"dref", struct.pack(">I", 1), reference or full(b"url ", b"")[:8] + b"\0\0\0\1")
    at = len(ftyp) + 8 if chunk_offset is None else chunk_offset
    table = box(
        b"stbl",
        full(b"stsd", struct.pack(">I", 1), box(codec, entry)),
        full(b"stts", struct.pack(">III", 1, num_samples, step)),
        full(b"stsc", struct.pack(">IIII", 1, 1, num_samples, 1)),
        full(b"stsz", struct.pack(">II", len(sample) if sample_size is None else sample_size, num_samples)),
        full(b"stco", struct.pack(">II", 1, at)),
    )
    media = box(
        b"mdia",
        full(b"mdhd", struct.pack(">IIIIHH", 0, 0, time_scale, duration, 0x55C4, 0)),
        full(b"hdlr", bytes(4), b"vide", bytes(12), b"v\0"),
        box(b"minf", full(b"vmhd", bytes(8)), box(b"dinf", drefs), table),
    )
    sides = struct.pack(">II", width << 16 & 0xFFFFFFFF, height << 16 & 0xFFFFFFFF)
    header = full(b"tkhd", struct.pack(">IIIII", 0, 0, 1, 0, duration), bytes(16), matrix, sides)
    track = box(b"trak", header, media)
    movie = full(b"mvhd", struct.pack(">IIII", 0, 0, time_scale, duration), bytes(76), struct.pack(">I", 2))
    return ftyp + data + box(b"moov", movie, track)


def made(*options: str, frames: int = 12, height: int = 32, width: int = 48, rate: str = "10") -> bytes:
    """A file that ffmpeg writes to a pipe."""
    clip = np.stack([pattern(height, width, seed=seed) for seed in range(frames)])
    raw = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-video_size", f"{width}x{height}", "-framerate", rate)
    command = ["ffmpeg", "-v", "error", *raw, "-i", "pipe:0", *options, "pipe:1"]
    return subprocess.run(command, input=clip.tobytes(), capture_output=True, check=True).stdout


def matroska() -> bytes:
    return made("-c:v", "libx264", "-f", "matroska")


def fragmented() -> bytes:
    return made("-c:v", "libx264", "-movflags", "frag_keyframe+empty_moov", "-f", "mp4")


def sound_alone() -> bytes:
    tone = ("-f", "lavfi", "-i", "sine=duration=1", "-c:a", "aac", "-f", "matroska", "pipe:1")
    return subprocess.run(["ffmpeg", "-v", "error", *tone], capture_output=True, check=True).stdout


def turned(degrees: str) -> bytes:
    """A video whose metadata say that it is to be turned."""
    flat = fragmented()
    fragments = ("-c", "copy", "-movflags", "frag_keyframe+empty_moov", "-f", "mp4", "pipe:1")
    command = ["ffmpeg", "-v", "error", "-display_rotation", degrees, "-i", "pipe:0", *fragments]
    return subprocess.run(command, input=flat, capture_output=True, check=True).stdout


def _alias(path: bytes) -> bytes:
    """A reference to another file, as QuickTime has it."""
    body = (
        bytes(4) + b"alis" + bytes(2) + bytes(140) + struct.pack(">HH", 2, len(path)) + path + b"\xff\xff\0\0"
    )
    return struct.pack(">I", 4 + len(body)) + body[4:]


HLS = b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n%s\n#EXT-X-ENDLIST\n"
PLAYLISTS: dict[str, Make] = {
    "hls_of_a_file": lambda: HLS % b"file:///etc/passwd",
    "hls_of_an_address": lambda: HLS % b"http://127.0.0.1:9/a.ts",
    "concat_list": lambda: b"ffconcat version 1.0\nfile '/etc/passwd'\n",
    "concat_protocol": lambda: b"concat:file:///etc/passwd|file:///etc/hosts",
    "dash": lambda: (
        b'<?xml version="1.0"?><MPD><Period><BaseURL>http://127.0.0.1:9/</BaseURL></Period></MPD>'
    ),
    "sdp": lambda: b"v=0\no=- 0 0 IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
    "svg": lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "subtitles": lambda: b"1\n00:00:00,000 --> 00:00:01,000\nHello\n",
    "hls_within_an_avi": lambda: b"RIFF\xff\xff\xff\xffAVI " + HLS % b"file:///etc/passwd",
    "hls_within_an_mp4": lambda: box(b"ftyp", b"isom", bytes(4)) + HLS % b"file:///etc/passwd",
    "hls_within_a_gif": lambda: b"GIF89a" + HLS % b"http://127.0.0.1:9/a.ts",
}
FILES: dict[str, Make] = {
    **PLAYLISTS,
    "one_byte": lambda: b"\0",
    "text": lambda: b"a video of a cat" * 100,
    "zeros": lambda: bytes(1 << 16),
    "a_picture": lambda: png(pattern(20, 30)),
    "a_sound": lambda: wav(wave(0.2, 16_000), 16_000),
    "mp4_header_alone": lambda: box(b"ftyp", b"isom", bytes(4), b"isom"),
    "mp4_without_tables": lambda: box(b"ftyp", b"isom", bytes(4)) + box(b"moov"),
    "mp4_box_beyond_the_end": lambda: box(b"ftyp", b"isom", bytes(4)) + struct.pack(">I4s", 0x7FFFFFFF, b"moov"),
    "mp4_boxes_in_boxes": lambda: _nested(2000),
    "mp4_no_frames": lambda: mp4(num_samples=0, duration=0),
    "mp4_of_noise": lambda: mp4(sample=pattern(8, 8).tobytes()),
    "mp4_huge_size": lambda: mp4(width=65535, height=65535),
    "mp4_zero_size": lambda: mp4(width=0, height=0),
    "mp4_wide": lambda: mp4(width=65535, height=1),
    "mp4_million_frames_a_second": lambda: mp4(time_scale=1_000_000, num_samples=60),
    "mp4_slower_than_a_day": lambda: mp4(time_scale=1, step=100_000, num_samples=4, duration=400_000),
    "mp4_four_billion_frames": lambda: mp4(num_samples=0xFFFFFFFF, duration=0xFFFFFFFF),
    "mp4_many_frames_of_nothing": lambda: mp4(num_samples=2_000_000, sample=b"", sample_size=0),
    "mp4_samples_beyond_the_end": lambda: mp4(chunk_offset=0xFFFFFFF0),
    "mp4_sample_of_four_gigabytes": lambda: mp4(sample_size=0xFFFFFFFF),
    "mp4_unknown_codec": lambda: mp4(codec=b"evil"),
    "mp4_codec_that_is_not_common": lambda: mp4(codec=b"SVQ3"),
    "mp4_reference_to_a_file": lambda: mp4(reference=_alias(b"/etc/passwd")),
    "mp4_url_of_a_file": lambda: mp4(reference=full(b"url ", b"file:///etc/passwd\0")),
    "mp4_url_of_an_address": lambda: mp4(reference=full(b"url ", b"http://127.0.0.1:9/\0")),
    "mkv_header_alone": lambda: matroska()[:60],
    "mkv_of_noise": lambda: matroska()[:64] + pattern(40, 40).tobytes(),
    "avi_header_alone": lambda: b"RIFF" + struct.pack("<I", 4) + b"AVI ",
    "gif_cut": lambda: encoded(palette_image(40, 50), "GIF")[:20],
    "sound_alone": sound_alone,
}  # fmt: skip


def _nested(levels: int) -> bytes:
    inner = b""
    for _ in range(levels):
        inner = box(b"moov", inner)
    return box(b"ftyp", b"isom", bytes(4)) + inner
