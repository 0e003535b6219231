"""Read and write safetensors files with numpy alone, independently of the reader under test.

    8 bytes: header length, little-endian | JSON header | the tensors' bytes, back to back

Weights are BF16, F16 or F32; bf16 values are float32 arrays here, rounded to the nearest even when written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.generic]

NUMPY_DTYPE = {
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "U8": "u1",
    "F8_E8M0": "u1",
    "I8": "i1",
    "U32": "<u4",
    "F8_E4M3": "u1",
}


def read_header(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """Return the JSON header without its metadata, and the offset at which tensors begin."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


def read_safetensors(path: Path) -> dict[str, Array]:
    """Return every tensor of one file; bf16 and f16 become float32."""
    header, begin = read_header(path)
    content = path.read_bytes()
    tensors = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        stored = np.frombuffer(content[begin + first : begin + last], NUMPY_DTYPE[entry["dtype"]])
        tensors[name] = decode(entry["dtype"], stored).reshape(entry["shape"])
    return tensors


def read_checkpoint(directory: Path) -> dict[str, Array]:
    """Return every tensor of a checkpoint: one `model.safetensors`, or the shards that its index names."""
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        return read_safetensors(directory / "model.safetensors")
    shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    return {name: tensor for shard in shards for name, tensor in read_safetensors(directory / shard).items()}


def write_safetensors(path: Path, tensors: Mapping[str, tuple[str, Array]]) -> None:
    """Write `name -> (dtype, array)` in the given order, as the format's own library would."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    parts = []
    offset = 0
    for name, (dtype, array) in tensors.items():
        part = encode(dtype, array).tobytes()
        header[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [offset, offset + len(part)],
        }
        parts.append(part)
        offset += len(part)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.writelines([len(text).to_bytes(8, "little"), text, *parts])


def write_checkpoint(
    directory: Path, tensors: Mapping[str, tuple[str, Array]], *, num_shards: int = 1
) -> None:
    """Write one file, or shards with their index; each shard takes every n-th tensor, which separates neighbours."""
    if num_shards == 1:
        write_safetensors(directory / "model.safetensors", tensors)
        return
    weight_map = {}
    for shard in range(num_shards):
        file_name = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        names = list(tensors)[shard::num_shards]
        write_safetensors(directory / file_name, {name: tensors[name] for name in names})
        weight_map |= dict.fromkeys(names, file_name)
    total = sum(encode(dtype, array).nbytes for dtype, array in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": {name: weight_map[name] for name in tensors}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def encode(dtype: str, array: Array) -> Array:
    """Return the stored form of these values."""
    if dtype != "BF16":
        return np.ascontiguousarray(array, NUMPY_DTYPE[dtype])
    bits = np.array(array, "<f4", order="C").reshape(-1).view("<u4")
    bits += (bits >> 16) & 1
    bits += 0x7FFF
    return bits.view("<u2")[1::2].reshape(np.shape(array))  # the upper halves


def decode(dtype: str, stored: Array) -> Array:
    """Return the values of the stored form."""
    if dtype == "BF16":
        bits = stored.astype("<u4")
        bits <<= 16
        return bits.view("<f4")
    return stored.astype("<f4") if dtype == "F16" else stored.copy()


def edit_header(path: Path, edit: Callable[[dict[str, dict[str, Any]]], None]) -> None:
    """Change the header and leave the tensors' bytes unchanged, to make a file lie."""
    header, begin = read_header(path)
    data = path.read_bytes()[begin:]
    edit(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
