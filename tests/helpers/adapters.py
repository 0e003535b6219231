"""Open an engine with adapters, for tests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from argosy import Engine
from tests.models.runnable import runnable


@contextmanager
def open_adapted(
    base: Path, adapters: Mapping[str, Path | tuple[Path, float]], **options: Any
) -> Iterator[Engine]:
    """An engine in float32; `adapters` are paths, or paths with factors, by name.

    A pack of the base lies beside it, if its experts cannot be read as they are.
    """
    if base.is_dir():
        packed = base.with_name(f"{base.name}-packed")
        base = packed if packed.exists() else runnable(base, base.parent)
    settings = {"memory": "4GiB", "kv_dtype": "f32", "threads": 1} | options
    with Engine.open(base, loras=dict(adapters), **settings) as engine:
        yield engine
