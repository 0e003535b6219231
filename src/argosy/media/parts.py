"""The parts of a caller's message: text, pictures, sounds and videos, and their content with its digest.

    Image("cat.png")  ->  read(limits)  ->  Content: bytes or an array, and 32 bytes that identify it

A part only names its source; nothing is opened before `read`, and `read` never looks inside a file. Size limits come
first: a file that is too large is refused before its first byte is read.

Elsewhere: `decoder.py` decodes the bytes, in another process.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from argosy.errors import BadMedia, PromptTooLong, UsageError

Kind = Literal["picture", "sound", "video"]
Hearing = Literal["none", "native", "transcript"]
"""How an engine treats a sound in a prompt: refuse it, let the model hear it, or transcribe it."""
Detail = Literal["low", "high"]
# The most tokens of a picture with low detail: the fewest that DeepSeek-OCR takes.
LOW_DETAIL_TOKENS = 273
Source = str | os.PathLike[str] | bytes | NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaLimits:
    """The largest picture, sound and video that the engine accepts.

    file_bytes: size of an encoded file.
    pixels, side: size of a picture. The largest side of all four formats is 65535 or less.
    sound_s: seconds of a sound.
    transcribed_s: total seconds of the sounds in a request that are transcribed; see `RequestMedia`.
    decode_bytes: memory that decoding one file may take, beyond the decoding process itself.
    wall_s: seconds until the decoding process must answer. `worker.py` limits processor time more tightly.
    video_bytes: size of a video's encoded file, or of all its frames.
    video_frames, video_s: frames and seconds of a video, even if a model looks at few of them.
    video_wall_s: seconds that we wait for the decoding of a video.
    work_s: seconds that decoding and preparing all media of a request may take, not counting waits for other requests.
    """

    file_bytes: int = 32 << 20
    pixels: int = 50_000_000
    side: int = 16_384
    sound_s: float = 600.0
    transcribed_s: float = 1800.0
    decode_bytes: int = 256 << 20
    wall_s: float = 30.0
    video_bytes: int = 64 << 20
    video_frames: int = 50_000
    video_s: float = 600.0
    video_wall_s: float = 60.0
    work_s: float = 120.0


# A decoded picture takes 3 bytes a pixel, and 4 more while Pillow scales it. 24 megapixels is twice a typical photo.
PROMPT_LIMITS = MediaLimits(pixels=24_000_000)
"""The limits of an engine's media; its memory plan relies on them."""

FFMPEG_BYTES = 256 << 20
"""Memory of an ffmpeg process beyond the limit for decoding one file: frames that wait between its threads."""


@dataclass(frozen=True, slots=True, eq=False)
class Content:
    """The content of a part.

    data: the bytes of a file; or a read-only array from the caller: uint8 [height, width, 3] or [height, width],
        float32 [samples], or uint8 [frames, height, width, 3]; or the pictures that form a video.
    digest: 32 bytes; equal for equal content.
    rate: samples or frames per second, unless a file says so.
    detail: the detail with which the model sees a picture, see `Image`; part of the digest.
    """

    kind: Kind
    data: bytes | NDArray[Any] | tuple[Content, ...] = field(repr=False)
    digest: bytes
    rate: float | None = None
    detail: Detail = "high"


@dataclass(frozen=True, slots=True)
class Text:
    """Text of a message."""

    text: str


@dataclass(frozen=True, slots=True, eq=False)
class _Part(ABC):
    """A part with a source: a path, the bytes of a file, or an array."""

    source: Source = field(repr=False)

    kind: ClassVar[Kind]
    limit: ClassVar[str] = "file_bytes"

    def read(self, limits: MediaLimits) -> Content:
        """Read the source.

        Raises:
            BadMedia: the source is too large or empty, or the array has the wrong type or shape.
            UsageError: the file does not exist or cannot be read.
        """
        if isinstance(self.source, np.ndarray):
            self._check_array(self.source, limits)
            data = np.array(self.source, order="C")
            data.flags.writeable = False
            rate = self._rate()
            digest = blake3(f"{self.kind} {data.dtype.str} {data.shape} {rate}\n".encode())
            digest.update(data.reshape(-1).view(np.uint8).data)
            return Content(self.kind, data, digest.digest(), rate)
        if self._rate() is not None:
            raise UsageError(f"a rate belongs to an array; the file of a {self.kind} has its own")
        content = self.source if isinstance(self.source, bytes) else self._read_file(self.source, limits)
        self._require_size(len(content), limits)
        return Content(self.kind, content, blake3(content).digest())

    def _rate(self) -> float | None:
        return None

    @abstractmethod
    def _check_array(self, array: NDArray[Any], limits: MediaLimits) -> None:
        """Refuse an array of the wrong type, shape or size."""

    def _read_file(self, path: str | os.PathLike[str], limits: MediaLimits) -> bytes:
        try:
            # Opening a named pipe would wait for its writer.
            with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise UsageError(
                        f"{os.fspath(path)} is not a file, so no {self.kind} can be read from it"
                    )
                self._require_size(status.st_size, limits)
                return file.read(getattr(limits, self.limit) + 1)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "the path is invalid"
            raise UsageError(f"cannot read the {self.kind} {os.fspath(path)}: {reason}") from None

    def _require_size(self, nbytes: int, limits: MediaLimits) -> None:
        if not nbytes:
            raise BadMedia(f"the {self.kind} is empty: it has 0 bytes", kind=self.kind, found=0)
        most: int = getattr(limits, self.limit)
        if nbytes > most:
            raise BadMedia(
                f"the file of a {self.kind} may have at most {most:,} bytes, found {nbytes:,}",
                kind=self.kind,
                needed=most,
                found=nbytes,
            )


@dataclass(frozen=True, slots=True, eq=False)
class Image(_Part):
    """A picture: a path, the bytes of a PNG, JPEG, WEBP or GIF file, or uint8 [height, width, 3] or [height, width].

    detail: "low" shows the picture to the model with at most 256 tokens; "high" with all that the engine allows.
    """

    detail: Detail = "high"

    kind: ClassVar[Kind] = "picture"

    def read(self, limits: MediaLimits) -> Content:
        """Read the source; see `_Part.read`."""
        content = _Part.read(self, limits)
        if self.detail == "high":
            return content
        return replace(content, digest=blake3(content.digest + b"low").digest(), detail="low")

    def _check_array(self, array: NDArray[Any], limits: MediaLimits) -> None:
        if array.dtype != np.uint8 or array.ndim not in (2, 3) or array.shape[2:] not in ((), (3,)):
            raise _wrong_array("picture", "uint8 [height, width, 3] or [height, width]", array)
        require_pixels(array.shape[0], array.shape[1], limits)


@dataclass(frozen=True, slots=True, eq=False)
class Audio(_Part):
    """A sound: a path, the bytes of a WAV, MP3, FLAC or OGG file, or mono float32 [samples] with their rate.

    rate: samples per second; only for an array.
    """

    rate: float | None = None

    kind: ClassVar[Kind] = "sound"

    def _rate(self) -> float | None:
        return self.rate

    def _check_array(self, array: NDArray[Any], limits: MediaLimits) -> None:
        if array.dtype != np.float32 or array.ndim != 1:
            raise _wrong_array("sound", "float32 [samples]", array)
        if self.rate is None:
            raise UsageError("an array of samples needs `rate`, the number of samples per second")
        require_rate(self.rate)
        require_seconds(array.size / self.rate, limits)
        if not array.size or not np.isfinite(array).all():
            fault = "has no samples" if not array.size else "has a sample that is not a finite number"
            raise BadMedia(f"the sound {fault}", kind="sound")


@dataclass(frozen=True, slots=True, eq=False)
class Video(_Part):
    """A video: a path, the bytes of a file, uint8 [frames, height, width, 3], or a list of pictures, its frames.

    A file needs the program `ffmpeg`; frames do not. A frame may be anything that `Image` accepts.

    rate: frames per second; only for frames.
    """

    source: Source | Sequence[Source] = field(repr=False)  # type: ignore[assignment]  # `read` knows lists
    rate: float | None = None

    kind: ClassVar[Kind] = "video"
    limit: ClassVar[str] = "video_bytes"

    def read(self, limits: MediaLimits) -> Content:
        """Read the source; see `_Part.read` and, for each frame of a list, `Image.read`."""
        if isinstance(self.source, list | tuple):
            return self._read_frames(self.source, limits)
        return _Part.read(self, limits)

    def _read_frames(self, sources: Sequence[Source], limits: MediaLimits) -> Content:
        rate = self._require_frames(len(sources), limits)
        frames: list[Content] = []
        num_bytes = 0
        for source in sources:
            frame = Image(source).read(limits)
            num_bytes += frame.data.nbytes if isinstance(frame.data, np.ndarray) else len(frame.data)
            if num_bytes > limits.video_bytes:
                raise BadMedia(
                    f"the frames of a video may have at most {limits.video_bytes:,} bytes together",
                    hint="pass fewer or smaller frames",
                    kind="video",
                    needed=limits.video_bytes,
                )
            frames.append(frame)
        digest = blake3(f"frames {rate}\n".encode() + b"".join(frame.digest for frame in frames))
        return Content("video", tuple(frames), digest.digest(), rate)

    def _rate(self) -> float | None:
        return self.rate

    def _check_array(self, array: NDArray[Any], limits: MediaLimits) -> None:
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3:
            raise _wrong_array("video", "uint8 [frames, height, width, 3]", array)
        self._require_frames(array.shape[0], limits)
        require_pixels(array.shape[1], array.shape[2], limits)

    def _require_frames(self, num_frames: int, limits: MediaLimits) -> float:
        """Check the number of frames and their rate; return the rate."""
        if self.rate is None:
            raise UsageError("frames need `rate`, the number of frames per second")
        require_length(num_frames, self.rate, limits)
        return self.rate


Part = Text | Image | Audio | Video

_LEAST_TRANSCRIBED_S = 5.0  # a shorter sound takes as much work: Whisper pads it to a window of 30 seconds


class RequestMedia:
    """Bounds the media of one request together: their tokens, the time they take, and the seconds of transcribed sound.

    Args:
        most_tokens: the most tokens of the prompt; None: no limit.
        check: called before each piece of work; an exception from it ends the work. A server uses it to end work when
        a client disconnects.
    """

    def __init__(
        self,
        limits: MediaLimits = PROMPT_LIMITS,
        *,
        most_tokens: int | None = None,
        check: Callable[[], object] = lambda: None,
    ) -> None:
        self._limits = limits
        self._most_tokens = most_tokens
        self.check = check
        self._num_tokens = 0
        self._worked_s = self._transcribed_s = 0.0

    def require_room(self, num_tokens: int) -> None:
        """Check, before decoding a medium, that its tokens can still fit the prompt.

        Raises:
            PromptTooLong: they cannot.
        """
        needed = self._num_tokens + num_tokens
        if self._most_tokens is not None and needed > self._most_tokens:
            raise PromptTooLong.of(needed, self._most_tokens + 1, is_all=False)

    def add_tokens(self, num_tokens: int) -> None:
        """Count the tokens of a medium. Raises what `require_room` raises."""
        self.require_room(num_tokens)
        self._num_tokens += num_tokens

    @contextlib.contextmanager
    def work(self) -> Iterator[None]:
        """Count the time of a piece of work. Waits for other requests belong outside.

        Raises:
            UsageError: earlier pieces used up the time.
        """
        self.check()
        most_s = self._limits.work_s
        if self._worked_s >= most_s:
            raise UsageError(
                f"preparing the pictures, sounds and videos of a request may take at most {most_s:g} seconds",
                hint="send fewer or smaller ones; frames that are smaller take less time",
                needed=most_s,
            )
        begin = time.monotonic()
        try:
            yield
        finally:
            self._worked_s += time.monotonic() - begin

    def add_transcribed(self, seconds: float) -> None:
        """Count one more sound that is transcribed for the prompt, before the work on it begins.

        Raises:
            UsageError: the sounds are too long together.
        """
        self._transcribed_s += max(seconds, _LEAST_TRANSCRIBED_S)
        most_s = self._limits.transcribed_s
        if self._transcribed_s > most_s:
            raise UsageError(
                f"the sounds of a conversation that are transcribed may take at most {most_s:,g} seconds "
                f"together, found at least {self._transcribed_s:,.1f} "
                f"(each counts as {_LEAST_TRANSCRIBED_S:g} or more)",
                hint="leave out earlier sounds, or send their transcripts as text",
                needed=most_s,
                found=self._transcribed_s,
            )


LOWEST_RATE, HIGHEST_RATE = 1_000, 384_000
HIGHEST_FRAME_RATE = 1_000


def require_pixels(height: int, width: int, limits: MediaLimits) -> None:
    """Refuse a picture that is too large.

    Raises:
        BadMedia: the picture has no pixels, too many, or a side that is too long.
    """
    facts: dict[str, Any] = {"kind": "picture", "height": height, "width": width}
    if height < 1 or width < 1:
        raise BadMedia(f"the picture has no pixels: its size is {width} x {height}", **facts)
    if max(height, width) > limits.side:
        raise BadMedia(
            f"a side of a picture may have at most {limits.side:,} pixels, found {width:,} x {height:,}",
            hint="scale the picture down",
            needed=limits.side,
            found=max(height, width),
            **facts,
        )
    if height * width > limits.pixels:
        raise BadMedia(
            f"a picture may have at most {limits.pixels / 1e6:g} megapixels, found {width:,} x {height:,} "
            f"= {height * width / 1e6:.2f}",
            hint="scale the picture down",
            needed=limits.pixels,
            found=height * width,
            **facts,
        )


def require_rate(rate: float) -> None:
    """Refuse an implausible rate.

    Raises:
        BadMedia: the rate is below 1000 or above 384000 samples per second.
    """
    if not LOWEST_RATE <= rate <= HIGHEST_RATE:
        raise BadMedia(
            f"the rate of a sound must be {LOWEST_RATE:,} to {HIGHEST_RATE:,} samples per second, found {rate:,.0f}",
            kind="sound",
            needed=(LOWEST_RATE, HIGHEST_RATE),
            found=rate,
        )


def require_seconds(seconds: float, limits: MediaLimits) -> None:
    """Refuse a sound that is too long.

    Raises:
        BadMedia: the sound is longer than the limit.
    """
    if seconds > limits.sound_s:
        raise BadMedia(
            f"a sound may take at most {limits.sound_s:g} seconds, found {seconds:,.1f}",
            hint="cut the sound into pieces",
            kind="sound",
            needed=limits.sound_s,
            found=seconds,
        )


def require_length(num_frames: int, rate: float, limits: MediaLimits) -> None:
    """Refuse a video with too many frames, or none.

    Raises:
        BadMedia: the video has no frames, has too many, or is too long; or its rate is implausible.
    """
    facts: dict[str, Any] = {"kind": "video"}
    if num_frames < 1:
        raise BadMedia("the video has no frames", found=num_frames, **facts)
    if not 0 < rate <= HIGHEST_FRAME_RATE:
        raise BadMedia(
            f"the rate of a video must be above 0 and at most {HIGHEST_FRAME_RATE} frames per second, found {rate:,g}",
            needed=HIGHEST_FRAME_RATE,
            found=rate,
            **facts,
        )
    for found, most, unit in (
        (num_frames, limits.video_frames, "frames"),
        (num_frames / rate, limits.video_s, "seconds"),
    ):
        if found > most:
            raise BadMedia(
                f"a video may have at most {most:,g} {unit}, found {found:,.10g}",
                hint="cut the video into pieces",
                needed=most,
                found=found,
                **facts,
            )


def _wrong_array(kind: Kind, needed: str, array: NDArray[Any]) -> BadMedia:
    found = f"{array.dtype} {list(array.shape)}"
    return BadMedia(
        f"the array of a {kind} must be {needed}, found {found}", kind=kind, needed=needed, found=found
    )
