"""Prepare a decoded sound for an encoder, as the Whisper feature extractor does.

    float32 [samples]  ->  windows of a Fourier transform  ->  mel bands  ->  log10, at most 80 dB below the loudest
                       ->  float32 [bands, frames]

Whisper always hears 30 seconds: shorter sounds are padded with silence, and longer ones cut. Other encoders hear a
sound at its own length, some followed by silence.

Elsewhere: `decoder.py` decodes and resamples; `model/encoders/` runs the encoders.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from argosy.errors import BadMedia, UnsupportedModel
from argosy.media.settings import PICTURE_KEYS, Settings

_FLOOR = 1e-10  # the least power of a band
_RANGE = 8.0  # dynamic range: powers of ten below the loudest
_FRAMES_AT_ONCE = 1024  # bounds the memory of the transform
Padding = Literal["none", "silence", "chunk"]
_TOP_HERTZ = 8000.0  # upper end of the highest band


@dataclass(frozen=True, slots=True)
class SoundProcessor:
    """Makes log-mel features from samples.

    rate: samples per second of the input.
    num_bands: mel bands.
    window: samples of a window, an even number.
    hop: samples from one frame to the next.
    chunk_samples: every sound is padded or cut to this; None: a sound keeps its own length.
    is_followed: silence follows a sound that keeps its length, up to the last frame that hears the sound.
    filters: float64 [frequencies, bands].
    """

    rate: int
    num_bands: int
    window: int
    hop: int
    chunk_samples: int | None
    is_followed: bool
    filters: NDArray[np.float64] = field(repr=False, compare=False)

    def num_frames(self, num_samples: int) -> int:
        """Return the number of frames of a sound; if nothing follows it, a remainder shorter than a hop makes no
        frame.
        """
        return self._samples_read(num_samples) // self.hop

    def _samples_read(self, num_samples: int) -> int:
        """Return the number of samples from which features are made."""
        if self.chunk_samples is not None:
            return self.chunk_samples
        return (
            -(-(num_samples + self.window // 2) // self.hop) * self.hop if self.is_followed else num_samples
        )

    def working_bytes(self, num_samples: int) -> int:
        """Return the most bytes that `prepare` allocates, its result included."""
        frequencies = self.window // 2 + 1
        piece = _FRAMES_AT_ONCE * 8 * (self.window + 5 * frequencies + 2 * self.num_bands)
        # The samples, padded, and mirrored at their ends; the features, and a copy while they are limited.
        return (
            4 * (2 * self._samples_read(num_samples) + 3 * self.num_frames(num_samples) * self.num_bands)
            + piece
        )

    def prepare(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        """Make features.

        Args:
            samples: float32 [samples], one channel at `rate`.

        Returns:
            float32 [bands, frames].

        Raises:
            BadMedia: the sound is too short for one window.
        """
        if (read := self._samples_read(samples.size)) != samples.size:
            samples = np.pad(samples[:read], (0, max(0, read - samples.size)))
        if samples.size <= self.window // 2:
            raise BadMedia(
                f"the sound is too short: it has {samples.size} samples, needed: more than {self.window // 2}",
                kind="sound",
                needed=self.window // 2 + 1,
                found=samples.size,
            )
        mel = self._log_bands(samples)
        return np.asarray(_scaled(np.maximum(mel, mel.max() - np.float32(_RANGE))), np.float32)

    def _log_bands(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return log10 of the power in each band: [bands, frames]; frames are centred on multiples of `hop`."""
        mirrored = np.pad(samples, self.window // 2, mode="reflect")
        hann = np.hanning(self.window + 1)[:-1]
        num_frames = samples.size // self.hop
        frames = np.lib.stride_tricks.sliding_window_view(mirrored, self.window)[:: self.hop]
        logs = np.empty((self.num_bands, num_frames), np.float32)
        for start in range(0, num_frames, _FRAMES_AT_ONCE):
            piece = slice(start, min(num_frames, start + _FRAMES_AT_ONCE))
            spectrum = np.fft.rfft(frames[piece] * hann)  # float64 [frames, frequencies]
            power = self.filters.T @ (spectrum.real**2 + spectrum.imag**2).T
            logs[:, piece] = np.log10(np.maximum(_FLOOR, power))
        return logs


def _scaled(log_power: Any) -> Any:
    return (log_power + 4) / 4


def silence_after(features: NDArray[np.float32]) -> np.float32:
    """Return the value of silent frames in a sound with these features [bands, frames]."""
    return max(features.max() - np.float32(_RANGE / 4), np.float32(_scaled(np.log10(_FLOOR))))


def read_sound_processor(
    raw: Mapping[str, object], *, padding: Padding, where: str = "preprocessor_config.json"
) -> SoundProcessor:
    """Make the processor that a checkpoint's settings describe.

    Args:
        raw: the object in `preprocessor_config.json`, or in `processor_config.json`, where it is `feature_extractor`.
        padding: "chunk": every sound fills `chunk_length` seconds, as for Whisper; "silence": zeros follow a sound up
            to the last frame that hears it, for towers that fill their windows with silence themselves; "none": as for
            Qwen3-Omni.
        where: the name of the file, for errors.

    Raises:
        UnsupportedModel: the processor is another one, or has an unknown setting.
        CheckpointError: a setting is malformed.
    """
    inner = raw.get("feature_extractor")
    if isinstance(inner, dict):
        raw, where = inner, f"{where}: feature_extractor"
    name = raw.get("feature_extractor_type")
    if name != "WhisperFeatureExtractor":
        raise UnsupportedModel(
            f"{where} asks for feature_extractor_type {name!r:.80}; supported: WhisperFeatureExtractor",
            key="feature_extractor_type",
            value=name,
            supported=["WhisperFeatureExtractor"],
        )
    settings = Settings(raw, where)
    rate = settings.integer("sampling_rate", 16_000, least=1_000, most=384_000)
    num_bands = settings.integer("feature_size", 80, most=1024)
    window = settings.integer("n_fft", 400, least=2, most=1 << 16)
    hop = settings.integer("hop_length", 160, most=1 << 16)
    seconds = settings.integer("chunk_length", 30, most=3600)
    settings.fixed("padding_value", 0)
    settings.fixed("padding_side", "right")
    settings.fixed("dither", 0)
    settings.fixed("do_normalize", False)
    # How a batch is padded, and values that the extractor computes from those above.
    settings.passed("truncation", "padding", "max_length", "n_samples", "nb_max_frames", "mel_filters")
    settings.finish(PICTURE_KEYS)
    if window % 2:
        raise UnsupportedModel(
            f"{where} asks for n_fft {window}; supported: even numbers",
            key="n_fft",
            value=window,
            supported="even numbers",
        )
    filters = _mel_filters(rate, num_bands, window)
    chunk = seconds * rate if padding == "chunk" else None
    return SoundProcessor(rate, num_bands, window, hop, chunk, padding == "silence", filters)


def _mel_filters(rate: int, num_bands: int, window: int) -> NDArray[np.float64]:
    """Return Slaney's triangles, each of area one: float64 [frequencies, bands]."""
    corners = _hertz(np.linspace(0.0, _mel(_TOP_HERTZ), num_bands + 2))
    frequencies = np.linspace(0, rate // 2, window // 2 + 1)
    slopes = corners - frequencies[:, None]  # [frequencies, bands + 2]
    widths = np.diff(corners)
    rising, falling = -slopes[:, :-2] / widths[:-1], slopes[:, 2:] / widths[1:]
    return np.maximum(0.0, np.minimum(rising, falling)) * (2.0 / (corners[2:] - corners[:-2]))


# Slaney's scale: linear up to 1000 Hz, which is 15 mel; from there 27 mel for each factor of 6.4.
_BREAK_HERTZ, _BREAK_MEL = 1000.0, 15.0
_MEL_PER_E = 27.0 / np.log(6.4)


def _mel(hertz: float) -> float:
    """Convert a frequency above the break, where the highest band ends, to mel."""
    return _BREAK_MEL + float(np.log(hertz / _BREAK_HERTZ) * _MEL_PER_E)


def _hertz(mels: NDArray[np.float64]) -> NDArray[np.float64]:
    linear = mels * (_BREAK_HERTZ / _BREAK_MEL)
    return np.where(mels < _BREAK_MEL, linear, _BREAK_HERTZ * np.exp((mels - _BREAK_MEL) / _MEL_PER_E))
