"""Configurations of Ministral-3 and of Mistral-Small-3 in its wrapper."""

from __future__ import annotations

from tests.models.configuration import Configuration
from tests.models.tiny_ministral import ministral3, mistral_small_3, wrapped_ministral3

_GROWING = ministral3()["rope_parameters"]

CONFIGURATIONS = (
    Configuration(name="ministral3_plain", config=ministral3()),
    Configuration(name="mistral_small_3", config=mistral_small_3(num_key_value_heads=3)),
    Configuration(
        name="mistral3_ministral3_tied_window_f32",
        config=wrapped_ministral3(
            num_hidden_layers=2,
            rope_parameters=_GROWING | {"factor": 4.0, "original_max_position_embeddings": 12},
            sliding_window=9,
            tie_word_embeddings=True,
        ),
        dtype="F32",
    ),
)
