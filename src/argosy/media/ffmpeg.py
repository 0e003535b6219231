"""Decode the files of videos with the system's `ffmpeg`, in processes with limits.

    bytes  ->  a file in memory  ->  ffprobe: frames, rate, sizes  ->  ffmpeg: chosen frames, one by one; the sound

A file is data from a stranger. The first bytes decide the format, so ffmpeg never guesses: a playlist or a list of
other files matches no supported format. ffmpeg gets the file as its stdin and may use no other protocol. It has no
access to our environment, cannot write files, has bounded memory, processor time and output, and uses common codecs
only. Each frame states its own size, which is checked before its pixels are read. No text from ffmpeg reaches a
caller.

Elsewhere: `frames.py` chooses between this and frames that a caller passes; `videos.py` says which frames are wanted.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from fractions import Fraction
from types import TracebackType
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from argosy.errors import ArgosyError, BadMedia, UsageError
from argosy.media.parts import FFMPEG_BYTES, MediaLimits, RequestMedia, require_length, require_pixels

_FORMATS = "MP4, MOV, WEBM, MKV, AVI or GIF"
_CODECS = (
    "h264,hevc,av1,libdav1d,vp8,vp9,mpeg4,mpeg2video,mjpeg,gif,"
    "aac,mp3,mp3float,opus,vorbis,flac,pcm_s16le,pcm_s16be,pcm_u8,pcm_f32le,alac"
)
_PROBE_SECONDS = 5.0
# Processor time of a decode: a constant, plus a share of the video's length.
_CPU_SECONDS, _CPU_SECONDS_PER_SECOND = 5.0, 0.5
_MOST_PROBE_BYTES = 1 << 16
_MOST_HEADER_BYTES = 32  # P6, width, height and 255
_FAST_SCALING = "bilinear+accurate_rnd+bitexact"
_EXIT_SECONDS = 5.0
_CHECK_SECONDS = 0.25  # so that a wait ends soon after the client disconnects
# The variables through which a program finds its shared libraries. All others are withheld.
_ENVIRONMENT = ("LD_LIBRARY_PATH", "NIX_LD", "NIX_LD_LIBRARY_PATH")
_NO_MEMORY = b"Cannot allocate memory"  # among the errors that ffmpeg writes
_MOST_ERROR_BYTES = 1 << 16  # the capacity of a pipe
# Threads of ffmpeg share one heap; otherwise each reserves its own.
_LESS_MEMORY = {"MALLOC_ARENA_MAX": "1", "AV_LOG_FORCE_NOCOLOR": "1", "LC_ALL": "C"}
# Sets limits on itself, then becomes the program.
_LIMITER = """
import os, resource, sys
data, cpu = map(int, sys.argv[1:3])
for limit, value in (("DATA", data), ("CPU", cpu), ("STACK", 1 << 20), ("NOFILE", 64), ("FSIZE", 0), ("CORE", 0)):
    number = getattr(resource, "RLIMIT_" + limit)
    hard = resource.getrlimit(number)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(number, (value, value))
os.execv(sys.argv[3], sys.argv[3:])
"""


@dataclass(frozen=True, slots=True)
class Track:
    """The video track of a file. Frames are counted, because the number that the file declares cannot be trusted."""

    num_frames: int
    rate: float
    has_sound: bool


class VideoFile:
    """The file of a video, in memory while it is decoded; use it as a context manager.

    Raises:
        BadMedia: the format is not supported.   UsageError: ffmpeg is missing.
    """

    def __init__(self, data: bytes, limits: MediaLimits, request: RequestMedia | None = None) -> None:
        self._limits = limits
        self._format = _format_of(data)
        self._ffmpeg, self._ffprobe = _program("ffmpeg"), _program("ffprobe")
        self._patience = _Patience(limits.video_wall_s, request or RequestMedia(limits))
        self._file = os.memfd_create("video", os.MFD_CLOEXEC)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(self._file, view) :]
        except BaseException:
            self._close()
            raise

    def __enter__(self) -> VideoFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        os.close(self._file)

    def track(self, *, counts_decoded: bool = False) -> Track:
        """Look at the streams and count frames.

        Args:
            counts_decoded: count decoded frames. Otherwise count packets, which is faster; in some formats a packet
                may not hold a frame of its own.

        Raises:
            BadMedia: the file contains no video, or is damaged, too large or too long.
        """
        count = "frames" if counts_decoded else "packets"
        shown = f"stream=width,height,avg_frame_rate,r_frame_rate,nb_read_{count}"
        found = self._probe("V:0", f"-count_{count}", "-show_entries", shown)
        if found is None:
            raise BadMedia("the file has no video that can be read", kind="video")
        try:
            height, width = int(found["height"]), int(found["width"])
            num_frames = int(found[f"nb_read_{count}"])
            rate = _rate(found["avg_frame_rate"]) or _rate(found["r_frame_rate"])
        except (KeyError, ValueError, TypeError):
            raise self._damaged() from None
        _require_frame(height, width, self._limits)
        require_length(num_frames, rate, self._limits)
        return Track(num_frames, rate, self._probe("a:0", "-show_entries", "stream=codec_type") is not None)

    def frames(
        self,
        indices: Sequence[int],
        track: Track,
        turn: AbstractContextManager[object] | None = None,
    ) -> Generator[NDArray[np.uint8], None, None]:
        """Yield the frames with these indices, ascending and distinct: uint8 [height, width, 3], turned upright.

        There may be fewer: frames that cannot be decoded are left out, and so are frames after the end.

        Args:
            turn: the lock held while a frame exists; None: nothing else decodes.

        Raises:
            BadMedia: decoding takes too much time or memory, or a frame is too large.
        """
        process = self._start(
            self._ffmpeg,
            _CPU_SECONDS + _CPU_SECONDS_PER_SECOND * track.num_frames / track.rate,
            *("-nostdin", "-v", "error", "-filter_threads", "1"),
            *self._input("-threads", "1", "-max_pixels", str(self._limits.pixels)),
            *(
                "-map",
                "0:V:0",
                "-vf",
                f"select={_chosen(indices)}",
                "-fps_mode",
                "passthrough",
                "-frames:v",
                str(len(indices)),
            ),
            *("-sws_flags", _FAST_SCALING, "-c:v", "ppm", "-pix_fmt", "rgb24", "-threads", "1"),
            # Otherwise eight frames would wait for the pipe.
            *("-thread_queue_size", "1", "-f", "image2pipe", "pipe:1"),
        )
        with process:
            for _ in indices:
                header = process.read_header()
                if not header:
                    process.require_enough_memory()  # otherwise ffmpeg leaves frames out
                    break
                match = re.fullmatch(rb"P6\n(\d{1,5}) (\d{1,5})\n255\n", header)
                if match is None:
                    raise self._damaged()
                width, height = int(match[1]), int(match[2])
                _require_frame(height, width, self._limits)
                with turn or nullcontext():
                    yield np.frombuffer(process.read(3 * height * width), np.uint8).reshape(height, width, 3)

    def sound(self, rate: int) -> NDArray[np.float32]:
        """Decode the sound: float32 [samples], one channel; none if it cannot be decoded.

        Raises:
            BadMedia: decoding takes too much time, or the sound is too long.
        """
        most = round(self._limits.sound_s * rate)
        process = self._start(
            self._ffmpeg,
            _CPU_SECONDS + _CPU_SECONDS_PER_SECOND * self._limits.video_s / 10,
            *("-nostdin", "-v", "quiet", "-filter_threads", "1"),
            *self._input("-threads", "1"),
            *("-map", "0:a:0", "-ac", "1", "-ar", str(rate), "-c:a", "pcm_f32le", "-f", "f32le", "pipe:1"),
        )
        with process:
            data = process.read_all(4 * most + 1)
        if len(data) > 4 * most:
            raise BadMedia(
                f"the sound of a video may take at most {self._limits.sound_s:g} seconds",
                hint="cut the video into pieces",
                kind="video",
                needed=self._limits.sound_s,
            )
        samples = np.frombuffer(data[: len(data) // 4 * 4], np.float32)
        return samples if np.isfinite(samples).all() else np.zeros(0, np.float32)

    def _probe(self, stream: str, *wanted: str) -> dict[str, Any] | None:
        """Return facts about one stream, or None if there is no such stream."""
        process = self._start(
            self._ffprobe,
            _PROBE_SECONDS if "-count_frames" not in wanted else self._limits.video_wall_s,
            *("-v", "quiet", "-threads", "1", "-select_streams", stream, *wanted, "-of", "json"),
            *self._input(),
        )
        with process:
            answer = process.read_all(_MOST_PROBE_BYTES)
        try:
            streams = json.loads(answer or b"{}").get("streams", [])
            return dict(streams[0]) if streams else None
        except (ValueError, TypeError, AttributeError, RecursionError):
            raise self._damaged() from None

    def _input(self, *more: str) -> tuple[str, ...]:
        limits = ("-protocol_whitelist", "fd", "-codec_whitelist", _CODECS)
        return (*limits, *more, "-f", self._format, "-i", "fd:")

    def _start(self, program: str, cpu_s: float, *arguments: str) -> _Process:
        os.lseek(self._file, 0, os.SEEK_SET)
        memory = self._limits.decode_bytes + FFMPEG_BYTES  # counted in the plan (`allowances.media_bytes`)
        cpu_s = min(cpu_s, self._limits.video_wall_s)
        return _Process(program, memory, cpu_s, arguments, self._file, self._patience)

    def _damaged(self) -> BadMedia:
        return BadMedia(
            "the video is damaged or incomplete", hint="save it again, or convert it to MP4", kind="video"
        )


class _Patience:
    """The time limit for waiting on all of ffmpeg's processes together; our own work on frames does not count.

    `request` counts the same time for all media, and may end the wait.
    """

    def __init__(self, seconds: float, request: RequestMedia) -> None:
        self._seconds = self._left_s = seconds
        self._request = request

    def wait(self, ready: select.poll) -> None:
        """Wait until output is ready to read.

        Raises:
            BadMedia: the wait took too long.
        """
        while self._left_s > 0:
            begin = time.monotonic()
            with self._request.work():
                is_ready = ready.poll(1000 * min(self._left_s, _CHECK_SECONDS))
            self._left_s -= time.monotonic() - begin
            if is_ready:
                return
        raise _too_slow(f"takes more than {self._seconds:g} seconds")


class _Process:
    """One run of ffmpeg or ffprobe, which is killed at the end."""

    def __init__(
        self,
        program: str,
        memory: int,
        cpu_s: float,
        arguments: Sequence[str],
        source: int,
        patience: _Patience,
    ) -> None:
        if not sys.executable:
            raise ArgosyError("videos need a Python interpreter to start ffmpeg with limits")
        limiter = [sys.executable, "-I", "-S", "-c", _LIMITER, str(memory), str(-int(-cpu_s // 1))]
        self._memory = memory
        # Nothing reads the errors meanwhile: text that does not fit the pipe is lost, and ffmpeg does not wait for
        # room.
        self._errors, errors = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            self._process = subprocess.Popen(
                [*limiter, program, *arguments],
                stdin=source,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=_LESS_MEMORY | {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
                cwd="/",
                bufsize=0,
            )
        except BaseException:
            os.close(self._errors)
            raise
        finally:
            os.close(errors)
        assert self._process.stdout is not None
        self._source = self._process.stdout.fileno()
        self._poll = select.poll()
        self._poll.register(self._source, select.POLLIN)
        self._patience = patience
        self._rest = b""

    def __enter__(self) -> _Process:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # a device may block it; reaped later
            self._process.wait(_EXIT_SECONDS)
        assert self._process.stdout is not None
        self._process.stdout.close()
        os.close(self._errors)

    def read_header(self) -> bytes:
        """Read up to the third end of line; empty at the end.

        Raises:
            BadMedia: the output is something else.
        """
        data = self._rest
        while data.count(b"\n") < 3 and len(data) <= _MOST_HEADER_BYTES:
            piece = self._some(1 << 16)
            if not piece:
                if data:
                    self._fail()
                return b""
            data += piece
        parts = data.split(b"\n", 3)
        if len(parts) < 4:
            self._fail()
        header = b"\n".join(parts[:3]) + b"\n"
        self._rest = parts[3]
        return header

    def read(self, nbytes: int) -> bytearray:
        """Read exactly `nbytes` bytes.

        Raises:
            BadMedia: the output is shorter.
        """
        data = bytearray(nbytes)
        first = self._rest[:nbytes]
        data[: len(first)] = first
        self._rest = self._rest[len(first) :]
        view = memoryview(data)[len(first) :]
        while view:
            self._patience.wait(self._poll)
            count = os.readv(self._source, [view])
            if not count:
                self._fail()
            view = view[count:]
        return data

    def read_all(self, most: int) -> bytes:
        """Read to the end, but at most so many bytes."""
        pieces, left = [], most
        while left and (piece := self._some(min(left, 1 << 20))):
            pieces.append(piece)
            left -= len(piece)
        return b"".join(pieces)

    def _some(self, most: int) -> bytes:
        self._patience.wait(self._poll)
        piece = os.read(self._source, most)
        if not piece:
            self._require_within_time()
        return piece

    def _require_within_time(self) -> None:
        """Refuse an output that seems to end, but was cut off because the processor time ran out."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_EXIT_SECONDS)
        # The kernel sends SIGXCPU at the soft limit and SIGKILL at the hard limit, and the two are equal.
        if self._process.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
            raise _too_slow("takes more processor time than a video of its length may")

    def require_enough_memory(self) -> None:
        """Check at the end that ffmpeg had enough memory.

        Raises:
            BadMedia: ffmpeg ran out of memory.
        """
        with contextlib.suppress(BlockingIOError):
            if _NO_MEMORY in os.read(self._errors, _MOST_ERROR_BYTES):
                raise BadMedia(
                    f"decoding the video takes more than {self._memory >> 20} MiB",
                    hint="make its frames smaller",
                    kind="video",
                    needed=self._memory,
                )

    def _fail(self) -> NoReturn:
        self._require_within_time()
        self.require_enough_memory()
        raise BadMedia("the video is damaged: its decoder failed", kind="video")


def _too_slow(what: str) -> BadMedia:
    return BadMedia(f"decoding the video {what}", hint="cut it into pieces, or make it smaller", kind="video")


def _format_of(data: bytes) -> str:
    """Return ffmpeg's name for the format that the first bytes show."""
    if data[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
        return "mov"
    if data.startswith(b"\x1aE\xdf\xa3"):
        return "matroska"
    if data.startswith(b"RIFF") and data[8:12] == b"AVI ":
        return "avi"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "gif"
    raise BadMedia(f"unsupported video format; use {_FORMATS}", kind="video", needed=_FORMATS)


def _program(name: str) -> str:
    path = shutil.which(name)
    if path is None or not _reads_descriptors(path):
        found = "it is not installed" if path is None else "an older one is installed"
        raise UsageError(
            f"the file of a video needs the program {name}, version 6.0 or later, and {found}",
            hint="install ffmpeg (`apt install ffmpeg`), or pass frames: Video([...], rate=2)",
        )
    return path


@functools.cache
def _reads_descriptors(path: str) -> bool:
    """Whether a program of ffmpeg supports the protocol `fd`, new in version 6.0."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        listed = subprocess.run(
            [path, "-v", "quiet", "-protocols"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=10,
            check=False,
        )
        return b"fd" in listed.stdout.split()
    return False


def _chosen(indices: Sequence[int]) -> str:
    """Return an ffmpeg expression that is true for frames with these ascending indices.

    The expression is a binary search, because ffmpeg refuses a sum of more than a hundred comparisons.
    """
    if len(indices) == 1:
        return f"eq(n\\,{indices[0]})"
    middle = len(indices) // 2
    lower, upper = _chosen(indices[:middle]), _chosen(indices[middle:])
    return f"if(lt(n\\,{indices[middle]})\\,{lower}\\,{upper})"


def _rate(text: object) -> float:
    """Return frames per second from a fraction; 0 if it is missing."""
    try:
        return float(Fraction(str(text)))
    except (ValueError, ZeroDivisionError, OverflowError):
        return 0.0


def _require_frame(height: int, width: int, limits: MediaLimits) -> None:
    try:
        require_pixels(height, width, limits)
    except BadMedia as error:
        raise BadMedia(
            error.message.replace("picture", "frame"),
            hint="scale the video down",
            **{**error.facts, "kind": "video"},
        ) from None
