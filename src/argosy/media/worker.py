"""Decodes one picture or sound after another, in its own process, which may be killed.

    stdin: one JSON request and the bytes of a file  ->  decode  ->  stdout: one JSON answer and the pixels or samples

For a picture, the worker first reports the size, and decodes only if `true` comes back.

A file is data from a stranger, and decoders are written in C. So this process has no files, no network, little memory,
and a fresh allowance of processor time for each request; when the allowance is used up, the kernel ends the process.
An answer consists of numbers and our own names; no text from a library leaves this process.

Pictures are PNG, JPEG, WEBP and GIF, told apart by their first bytes; only the first of several frames counts. EXIF
orientation is applied, and transparent parts become white, as in the reference processors. Rows are converted to RGB
and sent piece by piece, so a picture takes no more memory than one decoded copy.

Sounds are WAV, MP3, FLAC and OGG Vorbis, mixed to one channel by their mean and resampled.

Elsewhere: `decoder.py` starts this process, enforces the wall time, and turns refusals into sentences.
"""

from __future__ import annotations

import io
import json
import os
import resource
import select
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple

import miniaudio
import numpy as np
from numpy.typing import NDArray
from PIL import (
    ExifTags,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    MpoImagePlugin,
    PngImagePlugin,
    WebPImagePlugin,
)

from argosy.confine import forbid_files, limit_memory, limit_resource, virtual_bytes
from argosy.media.resample import Resampler

_IDLE_SECONDS = 10.0  # then the process ends and frees its memory; the next request starts a new one
# Processor time: one second for any file, and this much more for the largest allowed files.
_CPU_SECONDS = 1.0
_CPU_SECONDS_PER_MEGAPIXEL = 0.1
_CPU_SECONDS_PER_SECOND = 0.01  # CPU time for each second of sound
_PIECE_BYTES = 1 << 20  # pixels in one piece of an answer
_FRAMES_AT_ONCE = 1 << 14  # samples of a sound
_MOST_CHANNELS = 8
_SLACK_BYTES = 16 << 20  # for pieces, tables and the decoders' buffers

# A Pillow image takes a byte, two bytes or four bytes per pixel, by its mode.
_BYTES_PER_PIXEL = {"1": 1, "L": 1, "P": 1, "I;16": 2}
# The decoder for animations holds two canvases, a copy of the frame and the image itself; a lossless frame needs one
# more copy.
_WEBP_BYTES_PER_PIXEL = 20
# A block of 64 pixels takes at least one bit.
_MOST_PIXELS_PER_JPEG_BYTE = 512
# A progressive JPEG keeps all of its coefficients, two bytes each.
_COEFFICIENT_BYTES = 2

_PNG, _JPEG, _RIFF = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF"
_READERS: dict[str, type[ImageFile.ImageFile]] = {
    "PNG": PngImagePlugin.PngImageFile,
    "JPEG": JpegImagePlugin.JpegImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "GIF": GifImagePlugin.GifImageFile,
}
_SOUNDS: dict[str, Callable[[bytes], miniaudio.SoundFileInfo]] = {
    "WAV": miniaudio.wav_get_info,
    "MP3": miniaudio.mp3_get_info,
    "FLAC": miniaudio.flac_get_info,
    "OGG": miniaudio.vorbis_get_info,
}
# PNG chunks that may give the orientation, and may come after the pixels.
_PNG_TEXTS = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")

_T = Image.Transpose
_TURNS = {
    2: _T.FLIP_LEFT_RIGHT,
    3: _T.ROTATE_180,
    4: _T.FLIP_TOP_BOTTOM,
    5: _T.TRANSPOSE,
    6: _T.ROTATE_270,
    7: _T.TRANSVERSE,
    8: _T.ROTATE_90,
}


class Refused(Exception):
    """The file is refused; `reason` is a name that `decoder.py` knows, with the numbers for its sentence."""

    def __init__(self, reason: str, **facts: float) -> None:
        super().__init__(reason)
        self.reason = reason
        self.facts = facts


class Answer(NamedTuple):
    """shape: the shape of the array that the pieces form."""

    shape: tuple[int, ...]
    pieces: Iterator[bytes | memoryview]


# ── pictures ────────────────────────────────────────────────────────────────────────────────────────────────────────


class Picture:
    """A picture whose header was read.

    Attributes:
        height, width: the size after decoding, from the header alone if the format allows.
    """

    def __init__(self, data: bytes, limits: dict[str, Any]) -> None:
        self._image = image = _open_picture(data, limits)
        is_in_header = (
            image.format != "PNG" or "exif" in image.info or not any(text in data for text in _PNG_TEXTS)
        )
        self.height, self.width = self._turned(_orientation(image, is_in_header=is_in_header))

    def decode(self) -> Answer:
        """Decode to uint8 RGB [height, width, 3]."""
        image = self._image
        size = image.size
        try:
            image.load()
        except MemoryError:
            raise
        except Exception:  # decoders report damage in many ways
            raise Refused("damaged") from None
        orientation = _orientation(image, is_in_header=True)
        height, width = self._turned(orientation)
        if image.size != size or (height, width) != (self.height, self.width):
            raise Refused("damaged")
        return Answer((height, width, 3), _rows(image, orientation, height, width))

    def _turned(self, orientation: int) -> tuple[int, int]:
        height, width = self._image.height, self._image.width
        return (width, height) if orientation >= 5 else (height, width)


def _open_picture(data: bytes, limits: dict[str, Any]) -> ImageFile.ImageFile:
    """Read the header, check the declared size, and allow the time that a picture of this size takes."""
    name = _picture_format(data)
    if name == "WEBP":  # its reader allocates a canvas at once
        _check_size(*_webp_size(data), _WEBP_BYTES_PER_PIXEL, len(data), limits)
    try:
        image = _READERS[name](io.BytesIO(data))
        components = len(image.getbands())
        bytes_per_pixel = _BYTES_PER_PIXEL.get(image.mode, 4)
    except MemoryError:
        raise
    except Exception:
        raise Refused("damaged") from None
    if "progressive" in image.info:
        bytes_per_pixel += _COEFFICIENT_BYTES * components
    if name == "WEBP":
        bytes_per_pixel = _WEBP_BYTES_PER_PIXEL
    _check_size(image.width, image.height, bytes_per_pixel, len(data), limits)
    if name == "JPEG" and image.width * image.height > _MOST_PIXELS_PER_JPEG_BYTE * len(data):
        raise Refused("damaged")  # the decoder would fill the missing part with grey
    _allow_seconds(max(_CPU_SECONDS, _CPU_SECONDS_PER_MEGAPIXEL * image.width * image.height / 1e6))
    return image


def _picture_format(data: bytes) -> str:
    if data.startswith(_PNG):
        return "PNG"
    if data.startswith(_JPEG):
        return "JPEG"
    if data.startswith(_RIFF) and data[8:12] == b"WEBP":
        return "WEBP"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    raise Refused("format")


def _webp_size(data: bytes) -> tuple[int, int]:
    """Return width and height from a WEBP header: of the canvas, of a lossy frame or of a lossless frame."""
    chunk, rest = data[12:16], data[20:30]
    if len(rest) < 10:
        raise Refused("damaged")
    if chunk == b"VP8X":
        return 1 + int.from_bytes(rest[4:7], "little"), 1 + int.from_bytes(rest[7:10], "little")
    if chunk == b"VP8 ":
        return int.from_bytes(rest[6:8], "little") & 0x3FFF, int.from_bytes(rest[8:10], "little") & 0x3FFF
    if chunk == b"VP8L":
        bits = int.from_bytes(rest[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    raise Refused("damaged")


def _check_size(
    width: int, height: int, bytes_per_pixel: int, file_bytes: int, limits: dict[str, Any]
) -> None:
    if not width or not height or max(width, height) > limits["side"] or width * height > limits["pixels"]:
        raise Refused("size", width=width, height=height)
    needed = width * height * bytes_per_pixel + file_bytes + _SLACK_BYTES
    if needed > limits["decode_bytes"]:
        raise Refused("memory", width=width, height=height, needed=needed)


def _orientation(image: ImageFile.ImageFile, *, is_in_header: bool) -> int:
    """Return the picture's orientation, 1 to 8 as in EXIF; 1 if it is absent or unreadable."""
    try:
        # A PNG's own `getexif` decodes the pixels first, to reach the chunks after them.
        exif = Image.Image.getexif(image) if is_in_header else image.getexif()
        found = exif.get(ExifTags.Base.Orientation, 1)
    except MemoryError:
        raise
    except Exception:
        if not is_in_header:  # the pixels cannot be read
            raise Refused("damaged") from None
        return 1
    return found if type(found) is int and found in _TURNS else 1


def _rows(image: Image.Image, orientation: int, height: int, width: int) -> Iterator[bytes]:
    """Yield the rows of the oriented picture as RGB, some at a time, each from its own box of the decoded image."""
    right, bottom = image.size
    num_rows = max(1, _PIECE_BYTES // (3 * width))
    for top in range(0, height, num_rows):
        end = min(height, top + num_rows)
        box = {
            3: (0, bottom - end, right, bottom - top),
            4: (0, bottom - end, right, bottom - top),
            5: (top, 0, end, bottom),
            6: (top, 0, end, bottom),
            7: (right - end, 0, right - top, bottom),
            8: (right - end, 0, right - top, bottom),
        }.get(orientation, (0, top, right, end))
        piece = image.crop(box)
        if orientation in _TURNS:
            piece = piece.transpose(_TURNS[orientation])
        yield _rgb(piece).tobytes()


def _rgb(image: Image.Image) -> Image.Image:
    """Convert as the reference's `convert_to_rgb` does: transparency on white, otherwise Pillow's conversion."""
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")


# ── sounds ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def decode_sound(data: bytes, limits: dict[str, Any], rate: int) -> Answer:
    """Decode to float32 [samples] at `rate`, one channel."""
    name = _sound_format(data)
    if name == "WAV":
        _check_wav(data)
    try:
        info = _SOUNDS[name](data)
    except MemoryError:
        raise
    except Exception:  # miniaudio divides by a rate of zero, among other things
        raise Refused("damaged") from None
    if not 1 <= info.nchannels <= _MOST_CHANNELS:
        raise Refused("channels", found=info.nchannels, needed=_MOST_CHANNELS)
    if not limits["lowest_rate"] <= info.sample_rate <= limits["highest_rate"]:
        raise Refused("rate", found=info.sample_rate)
    # A length of 0 means unknown.
    declared, most = info.num_frames, int(limits["sound_s"] * info.sample_rate)
    if declared > most:
        raise Refused("length", found=declared / info.sample_rate)
    _allow_seconds(max(_CPU_SECONDS, _CPU_SECONDS_PER_SECOND * declared / info.sample_rate))
    resampler, num_frames = Resampler(info.sample_rate, rate), 0
    try:
        for piece in _pieces(data, info, _is_eight_bits(name, data)):
            num_frames += piece.size
            if num_frames > most:
                raise Refused("length", found=num_frames / info.sample_rate)
            resampler.add(piece)
        samples = resampler.finish()
    except (Refused, MemoryError):
        raise
    except Exception:
        raise Refused("damaged") from None
    if declared not in (0, num_frames) or not samples.size or not np.isfinite(samples).all():
        raise Refused("damaged")
    return Answer(samples.shape, iter((samples.data,)))


def _sound_format(data: bytes) -> str:
    if data.startswith(_RIFF) and data[8:12] == b"WAVE":
        return "WAV"
    if data.startswith(b"fLaC"):
        return "FLAC"
    if data.startswith(b"OggS"):
        return "OGG"
    # Frames of an MP3 begin with eleven ones; tags may come before them.
    if data.startswith(b"ID3") or (data[:1] == b"\xff" and data[1:2] >= b"\xe0"):
        return "MP3"
    raise Refused("format")


def _check_wav(data: bytes) -> None:
    """Refuse a truncated WAV; its decoder would return the samples that remain."""
    at = 12
    while at + 8 <= len(data):
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        if data[at : at + 4] == b"data":
            # Programs that write to a pipe do not know the size, and write this instead.
            if at + 8 + size > len(data) and size != 0xFFFFFFFF:
                raise Refused("damaged")
            return
        at += 8 + size + size % 2
    raise Refused("damaged")


def _is_eight_bits(name: str, data: bytes) -> bool:
    """Whether the file is a WAV of plain bytes, not of 8-bit logarithms."""
    at = data.find(b"fmt ", 12)
    tag, bits = data[at + 8 : at + 10], data[at + 22 : at + 24]
    return name == "WAV" and at > 0 and tag in (b"\1\0", b"\xfe\xff") and bits == b"\x08\0"


def _pieces(data: bytes, info: miniaudio.SoundFileInfo, is_eight_bits: bool) -> Iterator[NDArray[np.float32]]:
    """Yield float32 [samples], the mean of the channels."""
    # miniaudio puts 128, the silence of 8 bits, at 0.004; libsndfile puts it at 0.
    wanted = miniaudio.SampleFormat.UNSIGNED8 if is_eight_bits else miniaudio.SampleFormat.FLOAT32
    stream = miniaudio.stream_memory(data, wanted, info.nchannels, info.sample_rate, _FRAMES_AT_ONCE)
    for piece in stream:
        samples = np.asarray(piece)
        if is_eight_bits:
            samples = (samples.astype(np.float32) - 128) / 128
        samples = samples.reshape(-1, info.nchannels)
        yield samples[:, 0].copy() if info.nchannels == 1 else samples.mean(axis=1, dtype=np.float32)


# ── the process ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _allow_seconds(seconds: float) -> None:
    """Let the process use this much processor time from now on; the kernel then ends it."""
    signal.setitimer(signal.ITIMER_PROF, seconds)


def _warm_up() -> None:
    """Decode samples that make Pillow load all of its plugins, which later would need files."""
    assert MpoImagePlugin  # needed for a JPEG with several pictures
    Image.preinit()
    limits = {
        "side": 9,
        "pixels": 81,
        "decode_bytes": 1 << 30,
        "sound_s": 1,
        "lowest_rate": 1,
        "highest_rate": 99_999,
    }
    for name in _READERS:
        file = io.BytesIO()
        Image.new("P" if name == "GIF" else "RGB", (2, 2)).save(file, name)
        for _ in Picture(file.getvalue(), limits).decode().pieces:
            pass
    Resampler(8_000, 16_000).finish()


def _serve(source: BinaryIO, sink: BinaryIO, request: dict[str, Any]) -> None:
    data, limits = source.read(request["nbytes"]), request["limits"]
    try:
        if request["ask"] == "picture":
            picture = Picture(data, limits)
            _say(sink, {"shape": (picture.height, picture.width)})
            if source.readline() != b"true\n":
                _say(sink, {})  # so that the next request is not read together with this line
                return
            answer = picture.decode()
        else:
            answer = decode_sound(data, limits, request["rate"])
    except Refused as refusal:
        _say(sink, {"refused": refusal.reason, "facts": refusal.facts})
    except MemoryError:
        _say(sink, {"refused": "out_of_memory", "facts": {}})
    else:
        _say(sink, {"shape": answer.shape}, answer.pieces)


def _say(sink: BinaryIO, header: dict[str, Any], pieces: Iterable[bytes | memoryview] = ()) -> None:
    sink.write(json.dumps(header).encode("ascii") + b"\n")
    for piece in pieces:
        sink.write(piece)
    sink.flush()


def main() -> None:
    """Answer requests until stdin ends or no request arrives for a while."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ^C is for the process that waits for the answer
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    # A signal that the parent blocks would be blocked here too.
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    warnings.simplefilter("ignore")
    Image.MAX_IMAGE_PIXELS = None  # the limits of each request decide
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    _warm_up()
    ready_bytes = virtual_bytes()
    forbid_files()
    limit_resource(resource.RLIMIT_NPROC, 0)
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    sink.write(b"ready\n")
    sink.flush()
    while select.select([source], [], [], _IDLE_SECONDS)[0]:
        line = source.readline()
        if not line:
            return
        request = json.loads(line)
        limit_memory(ready_bytes + request["limits"]["decode_bytes"])
        _allow_seconds(_CPU_SECONDS)
        _serve(source, sink, request)
        _allow_seconds(0)  # no limit while waiting


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:
        os._exit(0)
