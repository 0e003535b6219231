"""The type of the entries in `configurations.py` and `configurations_latent.py`: a checkpoint to make."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tests.models.tiny import RawConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """A checkpoint to make: its config.json, and how its weights are stored."""

    name: str
    config: RawConfig
    dtype: str = "BF16"
    num_shards: int = 1


def yarn(factor: float, original: int, **more: Any) -> dict[str, Any]:
    return {"factor": factor, "original_max_position_embeddings": original} | more
