"""Which files an administrator of a server may load: those below one directory, whatever links say."""

from __future__ import annotations

import itertools
import os
import stat
from pathlib import Path

from argosy.errors import CheckpointError, UsageError

_MOST_FILES = 256  # in the directory of an adapter


def find_below(root: Path, text: str) -> Path:
    """Return the adapter at a path relative to `root`, or at an absolute one below it.

    Raises:
        UsageError: it is missing, or it or one of its files is outside, through links too, or is no ordinary file.
            What is outside looks as if it were missing.
        CheckpointError: its directory has too many files.
    """
    missing = UsageError(f"there is no adapter {text[:200]!a} in the server's directory for adapters")
    try:
        base = os.path.realpath(root, strict=True)
        found = os.path.realpath(os.path.join(base, text), strict=True)
        if not _is_below(found, base) or not _is_ordinary(found):
            raise missing
        if os.path.isdir(found):
            with os.scandir(found) as entries:
                names = [entry.name for entry in itertools.islice(entries, _MOST_FILES + 1)]
            inside = [os.path.realpath(os.path.join(found, name), strict=True) for name in names]
            if len(names) > _MOST_FILES:
                raise CheckpointError(f"the adapter {text[:200]!a} has more than {_MOST_FILES} files")
            if not all(_is_below(path, base) and _is_ordinary(path) for path in inside):
                raise missing
    except (OSError, ValueError):  # ValueError: a zero byte
        raise missing from None
    return Path(found)


def _is_below(path: str, base: str) -> bool:
    return path != base and os.path.commonpath([path, base]) == base


def _is_ordinary(path: str) -> bool:
    mode = os.stat(path).st_mode
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode)
