"""The towers of each family, from the files of towers: `TOWERS` there says which families have it, `PROJECTORS` how
GGUF files describe it."""

from __future__ import annotations

from collections.abc import Mapping

from argosy.installed import members
from argosy.model.encoders.encoder import Encoder
from argosy.model.encoders.projector import Projector

_FILES = (
    "qwen_vision",
    "glm_vision",
    "gemma_vision",
    "llama4_vision",
    "moon_vit",
    "pixtral_vision",
    "intern_vit",
    "step_vision",
    "minimax_vision",
    "deepseek_vision",
    "deep_encoder",
    "omni_audio",
    "whisper_audio",
)


def _by_family() -> dict[str, tuple[Encoder, ...]]:
    found: dict[str, tuple[Encoder, ...]] = {}
    for file in _MEMBERS:
        for family, encoder in file.TOWERS.items():
            found[family] = (*found.get(family, ()), encoder)
    return found


_MEMBERS = tuple(members("argosy.model.encoders", _FILES))
ENCODERS: Mapping[str, tuple[Encoder, ...]] = _by_family()
"""By the family of a `ModelConfig`."""
PROJECTORS: Mapping[str, Projector] = {
    name: projector for file in _MEMBERS for name, projector in getattr(file, "PROJECTORS", {}).items()
}
"""By `clip.projector_type`; a tower without one has no GGUF files."""
