"""Write safetensors files that say whatever a test wants them to say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Entry = dict[str, Any]


def entry(dtype: str, shape: list[int], begin: int, end: int) -> Entry:
    """One tensor's entry in a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write_raw(
    path: Path, header: bytes | dict[str, Any], data: bytes = b"", *, length: int | None = None
) -> Path:
    """Write a file with this header and these bytes; `length` may lie about the header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def write_index(directory: Path, weight_map: Any, **more: Any) -> Path:
    """Write an index file with this weight map."""
    path = directory / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": weight_map} | more))
    return path
