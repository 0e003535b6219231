"""Cache the facts in model headers, so that listing models reads no header twice.

One file in the user's cache directory. An entry is valid for files of the same sizes and times, read by the same
version.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from importlib import metadata
from typing import Any

from argosy.directory import Directory
from argosy.library.places import Model
from argosy.machine import resources
from argosy.strict_json import JsonError, parse_json
from argosy.user_directories import cache_directory

_FILE = "library-facts.json"
_MOST_BYTES = 4 << 20
_MOST_ENTRIES = 1000


class FactsCache:
    """Facts by model, as plain JSON objects. `save` writes new ones."""

    def __init__(self) -> None:
        self._facts: dict[str, dict[str, Any]] = {}
        self._is_changed = False
        with suppress(OSError, JsonError):
            with Directory(cache_directory()) as cache:
                raw = parse_json(cache.read(_FILE, _MOST_BYTES))
            if isinstance(raw, dict):
                self._facts = {key: value for key, value in raw.items() if isinstance(value, dict)}

    def get(self, model: Model) -> dict[str, Any] | None:
        return self._facts.get(key_of(model))

    def put(self, model: Model, facts: dict[str, Any]) -> None:
        self._facts[key_of(model)] = facts
        self._is_changed = True

    def save(self) -> None:
        """Save the facts; if that fails, headers are read again the next time."""
        if not self._is_changed:
            return
        newest = dict(list(self._facts.items())[-_MOST_ENTRIES:])
        with (
            suppress(OSError),
            Directory(cache_directory(), make=True) as cache,
            cache.replacing(_FILE) as write,
        ):
            write(json.dumps(newest).encode())


def key_of(model: Model) -> str:
    """A key that is equal as long as the model's files, and the code that reads them, are unchanged."""
    towers = () if model.tower is None else (model.tower,)
    files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in (*model.files, *towers)]
    names = ("config.json", "params.json", "hf_quant_config.json", "generation_config.json")
    beside = (*(model.path / name for name in names), model.manifest)
    files += [
        (str(path), path.stat().st_size, path.stat().st_mtime_ns)
        for path in beside
        if path is not None and path.exists()
    ]
    known = (metadata.version("argosy"), resources.usable_cores(), str(model.path), files)
    return hashlib.sha256(repr(known).encode()).hexdigest()[:32]
