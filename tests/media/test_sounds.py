from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from argosy.errors import BadMedia, CheckpointError, UnsupportedModel
from argosy.media.resample import Resampler
from argosy.media.sounds import read_sound_processor, silence_after
from tests.media.samples import SOUND_SETTINGS, wave
from tests.media.test_pictures import OMNI


def samples_of(seconds: float) -> Any:
    return wave(seconds, 16_000)[:, 0].astype(np.float32)


def test_whisper_hears_thirty_seconds_of_any_sound() -> None:
    processor = read_sound_processor(SOUND_SETTINGS["whisper"], padding="chunk")
    short, long = processor.prepare(samples_of(1)), processor.prepare(samples_of(40))
    assert short.shape == long.shape == (80, 3000)
    assert processor.num_frames(5) == processor.num_frames(10**9) == 3000
    assert np.array_equal(long, processor.prepare(samples_of(30)))


def test_without_padding_a_sound_keeps_its_length() -> None:
    processor = read_sound_processor(OMNI, padding="none")
    assert processor.num_bands == 128
    for count in (201, 319, 320, 16_001):
        features = processor.prepare(samples_of(2)[:count])
        assert features.shape == (128, count // 160) == (128, processor.num_frames(count))
        assert features.dtype == np.float32


def test_frames_of_a_sound_that_silence_follows_are_those_of_a_whole_chunk() -> None:
    settings = SOUND_SETTINGS["whisper"]
    followed = read_sound_processor(settings, padding="silence")
    whole = read_sound_processor(settings, padding="chunk")
    for count in (1, 120, 160, 16_001, 16_119, 16_121):
        samples = samples_of(2)[-count:] + np.float32(0.01)
        features, expected = followed.prepare(samples), whole.prepare(samples)
        num_frames = features.shape[1]
        assert num_frames == followed.num_frames(count) == -(-(count + 200) // 160)
        assert abs(features - expected[:, :num_frames]).max() < 1e-6
        assert np.array_equal(
            expected[:, num_frames:], np.full((80, 3000 - num_frames), silence_after(features))
        )


def test_a_long_sound_in_pieces_equals_its_parts() -> None:
    """4096 frames are computed at a time; the frames around that place must not show it."""
    processor = read_sound_processor(OMNI, padding="none")
    samples = samples_of(45)
    whole, part = processor.prepare(samples), processor.prepare(samples[4000 * 160 : 4200 * 160])
    # The loudest value bounds all others, and it differs between the two.
    floor = max(whole.min(), part.min())
    differences = np.maximum(whole[:, 4002:4198], floor) - np.maximum(part[:, 2:198], floor)
    assert abs(differences).max() < 1e-5


def test_a_sound_too_short_for_a_window_is_refused() -> None:
    with pytest.raises(BadMedia, match="has 200 samples, needed: more than 200"):
        read_sound_processor(OMNI, padding="none").prepare(samples_of(1)[:200])


@pytest.mark.parametrize(
    "changed",
    [
        {"dither": 0.1},
        {"padding_value": 1.0},
        {"padding_side": "left"},
        {"do_normalize": True},
        {"n_fft": 401},
        {"preemphasis": 0.97},
        {"feature_extractor_type": "Gemma4AudioFeatureExtractor"},
    ],
)
def test_a_setting_that_would_change_the_features_is_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModel) as refused:
        read_sound_processor({**SOUND_SETTINGS["whisper"], **changed}, padding="chunk")
    assert refused.value.facts["key"] == next(iter(changed))


def test_a_malformed_setting_is_refused() -> None:
    with pytest.raises(CheckpointError, match="hop_length is 0; expected a whole number"):
        read_sound_processor({**SOUND_SETTINGS["whisper"], "hop_length": 0}, padding="chunk")


@pytest.mark.parametrize(
    ("rate", "wanted"), [(8_000, 16_000), (44_100, 16_000), (16_000, 16_000), (11_025, 24_000)]
)
def test_pieces_do_not_change_what_resampling_gives(rate: int, wanted: int) -> None:
    samples = wave(1.3, rate)[:, 0].astype(np.float32)
    whole, parts = Resampler(rate, wanted), Resampler(rate, wanted)
    whole.add(samples)
    for start in range(0, samples.size, 777):
        parts.add(samples[start : start + 777])
    expected = whole.finish()
    assert np.array_equal(parts.finish(), expected)
    assert expected.size == -(-samples.size * wanted // rate)
