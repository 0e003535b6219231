"""The towers of each family, from the files of towers: each says in `TOWERS` which families have it."""

from __future__ import annotations

from collections.abc import Mapping

from argosy.installed import members
from argosy.model.encoders.encoder import Encoder

_FILES = ("qwen_vision", "glm_vision", "gemma_vision", "moon_vit", "omni_audio", "whisper_audio")


def _by_family() -> dict[str, tuple[Encoder, ...]]:
    found: dict[str, tuple[Encoder, ...]] = {}
    for file in members("argosy.model.encoders", _FILES):
        for family, encoder in file.TOWERS.items():
            found[family] = (*found.get(family, ()), encoder)
    return found


ENCODERS: Mapping[str, tuple[Encoder, ...]] = _by_family()
"""By the family of a `ModelConfig`."""
