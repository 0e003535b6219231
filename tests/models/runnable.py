"""What the engine opens for a checkpoint: itself, or a pack of it where rows of its experts do not lie together."""

from __future__ import annotations

from pathlib import Path

from argosy.checkpoint.pack import pack
from argosy.model.families import open_model


def runnable(directory: Path, scratch: Path) -> Path:
    """`directory`, or its pack below `scratch`, with every weight as it is."""
    files = open_model(directory)
    if not files.has_strided_experts:
        return directory
    packed = scratch / f"{directory.name}-packed"
    pack(files, packed, format="source")
    return packed
