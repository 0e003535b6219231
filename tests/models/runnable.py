"""Make a checkpoint that the engine can open: itself, or its pack if the rows of its experts are not contiguous."""

from __future__ import annotations

from pathlib import Path

from argosy.checkpoint.pack import pack
from argosy.model.families import open_model


def runnable(directory: Path, scratch: Path) -> Path:
    """Return `directory`, or its pack below `scratch` with every weight unchanged."""
    files = open_model(directory)
    if not files.has_strided_experts:
        return directory
    packed = scratch / f"{directory.name}-packed"
    pack(files, packed, format="source")
    return packed
