"""The ear of the demo model: the encoder of Whisper tiny.en for 5 seconds, and a projector that was trained for it.

    tiny.en (PyPI) -> encoder, the first 5 s of its positions ─┐
                                                              ├─>  audio_tower.*, multi_modal_projector.*
    experts.gguf   -> projector ───────────────────────────────┘

`experts.gguf` also holds the two ear experts of each layer, along with the other experts.

Elsewhere: `ears.py` fetches tiny.en; `model/encoders/whisper_audio.py` runs the tower; `recipes/demo_model/` trained
the projector and the experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from argosy.checkpoint.landing import MatrixRef
from argosy.checkpoint.safetensors_write import TensorToWrite, encode
from argosy.demo.experts import TrainedExperts
from argosy.demo.parts import token_id
from argosy.errors import CheckpointError
from argosy.model.encoders import whisper_audio
from argosy.model.encoders.whisper_audio import WhisperAudioConfig
from argosy.model.whisper.files import WhisperFiles, open_whisper

SECONDS = 5
_POSITIONS_PER_SECOND = 50
_DTYPE = "F16"


class Hearing:
    """The demo model's parts for sounds: tensors, keys of `config.json`, and settings of their preparation.

    Args:
        whisper: the directory of tiny.en.   trained: holds the projector.
    """

    content_type, placeholder = "audio", "<empty_output>"  # a special token that the base never uses

    def __init__(self, whisper: Path, trained: TrainedExperts) -> None:
        self._files = open_whisper(whisper)
        self._trained = trained
        self._config = _tower(self._files, trained.hidden_size)

    def config(self, directory: Path) -> dict[str, Any]:
        """Return keys for `config.json`; the tokenizer is already in `directory`."""
        tower = self._config
        return {
            "audio_config": {
                "activation_function": "gelu",
                "hidden_size": tower.hidden_size,
                "intermediate_size": tower.mlp_width,
                "max_source_positions": tower.positions,
                "model_type": "voxtral_encoder",
                "num_attention_heads": tower.num_heads,
                "num_hidden_layers": tower.num_layers,
                "num_mel_bins": tower.num_mels,
            },
            "audio_token_id": token_id(directory, self.placeholder),
        }

    def tensors(self) -> Iterator[TensorToWrite]:
        for canonical, tensor in whisper_audio.tensors(self._config).items():
            read = partial(self._projector, canonical) if canonical.startswith("projector.") else None
            if read is None:
                read = partial(_stored, self._files.tensors[canonical], tensor.rows * tensor.cols)
            yield tensor.name, _DTYPE, tensor.shape, read

    def processor(self) -> dict[str, Any]:
        """Return the settings with which sounds are prepared."""
        return {
            "feature_extractor_type": "WhisperFeatureExtractor",
            "feature_size": self._config.num_mels,
        }

    def _projector(self, canonical: str) -> bytes:
        return encode(self._trained.projector(canonical.removeprefix("projector.")), _DTYPE)


def _tower(files: WhisperFiles, hidden_size: int) -> WhisperAudioConfig:
    config = files.config
    return WhisperAudioConfig(
        num_layers=config.encoder_layers,
        hidden_size=config.hidden_size,
        mlp_width=config.encoder_width,
        num_heads=config.encoder_heads,
        num_mels=config.num_mels,
        positions=min(SECONDS * _POSITIONS_PER_SECOND, config.sound_positions),
        joined=config.encoder_width // config.hidden_size,
        out_size=hidden_size,
    )


def _stored(ref: MatrixRef, num_values: int) -> bytes:
    """Return a tensor's first values as they are stored: of the positions, only the first seconds."""
    if ref.format != "f16":
        raise CheckpointError(f"{ref.name} is {ref.format}, expected f16", path=ref.path, tensor=ref.name)
    return np.fromfile(ref.path, np.uint8, 2 * num_values, offset=ref.offset).tobytes()
