"""Where Argosy keeps files for a user: those it can make again, and those it cannot."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def cache_directory() -> Path:
    """`ARGOSY_CACHE`, or `argosy` in the user's cache directory: what is there can be made again."""
    if own := os.environ.get("ARGOSY_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "argosy"


def measurement_file(kind: str, facts: object) -> Path:
    """The file in the cache directory for measurements that are valid for these facts, which `repr` tells apart."""
    return cache_directory() / f"{kind}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}.json"


def data_directory() -> Path:
    """`argosy` in the user's data directory: what is there is known nowhere else."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "argosy"
