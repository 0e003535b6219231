"""Decode pictures and sounds in another process, which is killed and replaced when it exceeds a limit.

    Content  ->  FileDecoder  ->  worker.py, in its own process  ->  uint8 [height, width, 3] or float32 [samples]

This process never looks into a file. It sends the bytes, waits for a bounded time, and checks the answer's size before
reading it. The worker refuses a file with a name from a short list and a few numbers; this module has the sentences.

Elsewhere: `parts.py` reads the content; `pictures.py` and `sounds.py` prepare pixels and samples for a model.
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from argosy.confined_process import ConfinedProcess, Gone
from argosy.errors import ArgosyError, BadMedia
from argosy.media.parts import (
    HIGHEST_RATE,
    LOWEST_RATE,
    Content,
    Kind,
    MediaLimits,
    require_pixels,
    require_rate,
    require_seconds,
)

_PACKAGES = ("PIL", "numpy", "miniaudio", "_cffi_backend", "soxr")
# More threads would only reserve memory; and glibc must return freed memory, so that the next picture can use it.
_LESS_MEMORY = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
_MOST_HEADER_BYTES = 1 << 10
_Check = Callable[[int, int], object]
_FORMATS = {"picture": "PNG, JPEG, WebP or GIF", "sound": "WAV, MP3, FLAC or OGG Vorbis"}


class FileDecoder:
    """Decodes one file at a time; the process starts on first use and ends after ten idle seconds."""

    def __init__(self, limits: MediaLimits | None = None) -> None:
        self.limits = limits or MediaLimits()
        self._worker: ConfinedProcess | None = None
        self._lock = threading.Lock()

    def picture(
        self, content: Content, check: Callable[[int, int], object] = lambda height, width: None
    ) -> NDArray[np.uint8]:
        """Decode a picture: uint8 RGB [height, width, 3].

        Args:
            check: called before decoding with the height and width of the decoded picture; it may refuse them with an
                `ArgosyError`.

        Raises:
            BadMedia: it cannot be decoded within the limits.
        """
        if isinstance(content.data, np.ndarray):
            array = content.data
            check(*array.shape[:2])
            return np.repeat(array[:, :, None], 3, axis=2) if array.ndim == 2 else array
        assert isinstance(content.data, bytes)
        shape, payload = self._ask("picture", {"ask": "picture"}, content.data, check)
        return np.frombuffer(payload, np.uint8).reshape(shape)

    def sound(self, content: Content, rate: int) -> NDArray[np.float32]:
        """Decode a sound and resample it: float32 [samples], one channel, `rate` samples per second.

        Raises:
            BadMedia: it cannot be decoded within the limits.
        """
        if isinstance(content.data, np.ndarray):
            from argosy.media.resample import Resampler

            assert content.rate is not None
            resampler = Resampler(content.rate, rate)
            resampler.add(content.data)
            return resampler.finish()
        assert isinstance(content.data, bytes | bytearray)
        _, payload = self._ask("sound", {"ask": "sound", "rate": rate}, content.data, None)
        return np.frombuffer(payload, np.float32)

    def close(self) -> None:
        with self._lock:
            self._stop()

    def _stop(self) -> None:
        if self._worker is not None:
            self._worker.stop()
            self._worker = None

    def _ask(
        self, kind: Kind, request: dict[str, Any], data: bytes, check: _Check | None
    ) -> tuple[tuple[int, ...], bytearray]:
        limits = asdict(self.limits) | {"lowest_rate": LOWEST_RATE, "highest_rate": HIGHEST_RATE}
        line = json.dumps({**request, "nbytes": len(data), "limits": limits}).encode("ascii") + b"\n"
        with self._lock:
            for _ in range(2):  # an idle first process may have just ended
                worker = self._started()
                try:
                    answer = self._exchange(kind, worker, line, data, check)
                except Gone as gone:
                    self._stop()
                    # A process that ended by itself, or before it received the whole file, decoded nothing.
                    if not gone.is_early and gone.returncode != 0:
                        raise self._ended(kind, gone) from None
                    continue
                except BaseException:
                    self._stop()
                    raise
                if isinstance(answer, ArgosyError):
                    raise answer
                return answer
        raise ArgosyError("the process that decodes pictures and sounds ended without an answer")

    def _started(self) -> ConfinedProcess:
        """Return the running process, or start a new one."""
        if self._worker is None or not self._worker.is_alive:
            self._stop()
            self._worker = ConfinedProcess(
                "argosy.media.worker", _PACKAGES, purpose="pictures and sounds", environment=_LESS_MEMORY
            )
        try:
            self._worker.await_ready()
        except Gone:
            self._stop()
            raise ArgosyError("the process that decodes pictures and sounds did not start") from None
        return self._worker

    def _exchange(
        self, kind: Kind, worker: ConfinedProcess, line: bytes, data: bytes, check: _Check | None
    ) -> tuple[tuple[int, ...], bytearray] | ArgosyError:
        """Send one request and read its answer; an answer that breaks the protocol counts as a process that ended."""
        deadline = time.monotonic() + self.limits.wall_s
        worker.write(line, deadline)
        worker.write(data, deadline)
        if check is not None:
            shape, _ = self._header(kind, worker, deadline, num_axes=2)
            if isinstance(shape, BadMedia):
                return shape
            try:
                check(shape[0], shape[1])
            except ArgosyError as refusal:
                worker.write(b"false\n", deadline)
                worker.read_line(_MOST_HEADER_BYTES, deadline)
                return refusal
            worker.write(b"true\n", deadline)
        shape, payload = self._header(kind, worker, deadline, num_axes=1 if check is None else 3)
        if isinstance(shape, BadMedia):
            return shape
        return shape, worker.read(_payload_bytes(kind, shape), payload, deadline)

    def _header(
        self, kind: Kind, worker: ConfinedProcess, deadline: float, *, num_axes: int
    ) -> tuple[tuple[int, ...] | BadMedia, bytes]:
        """Read the line that gives a shape within the limits, or the refusal; return the bytes after it as well."""
        header, payload = worker.read_line(_MOST_HEADER_BYTES, deadline)
        try:
            answer = json.loads(header)
            if "refused" in answer:
                return self._refusal(kind, str(answer["refused"]), dict(answer["facts"])), payload
            shape = tuple(answer["shape"])
            if len(shape) != num_axes or not all(type(side) is int and side > 0 for side in shape):
                raise ValueError
            self._require_allowed(kind, shape)
        except (ValueError, KeyError, TypeError):
            raise Gone from None
        return shape, payload

    def _require_allowed(self, kind: Kind, shape: tuple[int, ...]) -> None:
        if kind == "sound":
            if shape[0] > self.limits.sound_s * HIGHEST_RATE:
                raise ValueError
        elif shape[0] * shape[1] > self.limits.pixels or shape[2:] not in ((), (3,)):
            raise ValueError

    def _refusal(self, kind: Kind, reason: str, facts: dict[str, Any]) -> BadMedia:
        """Turn a refusal into a sentence; raise KeyError, TypeError or ValueError if the refusal is unknown."""
        try:
            if reason == "size":
                require_pixels(int(facts["height"]), int(facts["width"]), self.limits)
            if reason == "rate":
                require_rate(float(facts["found"]))
            if reason == "length":
                require_seconds(float(facts["found"]), self.limits)
        except BadMedia as error:
            return error
        most = self.limits.decode_bytes
        if reason == "format":
            return BadMedia(
                f"unsupported {kind} format; use {_FORMATS[kind]}",
                kind=kind,
                needed=_FORMATS[kind],
            )
        if reason == "damaged":
            return BadMedia(
                f"the {kind} is damaged or incomplete", hint="save it again, or convert it", kind=kind
            )
        if reason == "channels":
            needed, found = int(facts["needed"]), int(facts["found"])
            return BadMedia(
                f"a sound may have 1 to {needed} channels, found {found}",
                kind=kind,
                needed=needed,
                found=found,
            )
        if reason == "memory":
            width, height, needed = int(facts["width"]), int(facts["height"]), int(facts["needed"])
            return BadMedia(
                f"decoding a picture may take at most {most >> 20} MiB, and this one of {width:,} x {height:,} pixels "
                f"needs {needed >> 20}",
                hint="scale the picture down",
                kind=kind,
                needed=most,
                found=needed,
            )
        if reason == "out_of_memory":
            return BadMedia(f"decoding the {kind} takes more than {most >> 20} MiB", kind=kind, needed=most)
        raise ValueError(reason)

    def _ended(self, kind: Kind, gone: Gone) -> BadMedia:
        if gone.is_late:
            return BadMedia(
                f"decoding the {kind} takes more than {self.limits.wall_s:g} seconds",
                kind=kind,
                needed=self.limits.wall_s,
            )
        if gone.returncode == -signal.SIGPROF:
            return BadMedia(
                f"decoding the {kind} takes more processor time than a {kind} of its size may", kind=kind
            )
        return BadMedia(f"the {kind} is damaged: its decoder failed", kind=kind)


def _payload_bytes(kind: Kind, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * (4 if kind == "sound" else 1)
