"""Where Argosy keeps files for a user: those it can make again, and those it cannot."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from argosy.errors import UsageError


def home_directory(environment: Mapping[str, str] | None = None) -> Path:
    """`HOME`, or the home directory of this user's entry in the system.

    Raises:
        UsageError: there is neither, as for an arbitrary user id in a container.
    """
    environment = os.environ if environment is None else environment
    try:
        return Path(environment.get("HOME") or Path.home())
    except RuntimeError:
        raise UsageError(
            "this user has no home directory, and HOME is not set", hint="`export HOME=DIR` names a directory"
        ) from None


def cache_directory() -> Path:
    """`ARGOSY_CACHE`, or `argosy` in the user's cache directory: what is there can be made again."""
    if own := os.environ.get("ARGOSY_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or home_directory() / ".cache") / "argosy"


def measurement_file(kind: str, facts: object) -> Path:
    """The file in the cache directory for measurements that are valid for these facts, which `repr` tells apart."""
    return cache_directory() / f"{kind}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}.json"


def data_directory() -> Path:
    """`argosy` in the user's data directory: what is there is known nowhere else."""
    return Path(os.environ.get("XDG_DATA_HOME") or home_directory() / ".local" / "share") / "argosy"


def state_directory() -> Path:
    """`argosy` in the user's state directory: what is there is about processes that run now."""
    return Path(os.environ.get("XDG_STATE_HOME") or home_directory() / ".local" / "state") / "argosy"
