"""Writing safetensors: the format's own library reads what Argosy writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from argosy.checkpoint.safetensors import open_tensors
from argosy.checkpoint.safetensors_write import encode, to_bfloat16_bits, write_safetensors


def test_a_written_file_is_read_by_the_reference_library_and_by_our_reader(tmp_path: Path):
    from safetensors.numpy import load_file

    tensors: dict[str, NDArray[Any]] = {
        "one": np.arange(6, dtype=np.float32).reshape(2, 3),
        "two": np.array([[1.5], [-2.0]], dtype=np.float16),
        "empty": np.zeros((0, 4), dtype=np.float32),
    }
    dtypes = {np.dtype("float32"): "F32", np.dtype("float16"): "F16"}
    path = tmp_path / "model.safetensors"
    write_safetensors(
        path, ((n, dtypes[t.dtype], t.shape, t.tobytes) for n, t in tensors.items()), {"a": "b"}
    )
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert np.array_equal(found[name], tensor)
    refs = open_tensors(tmp_path)
    assert refs["one"].offset % 8 == 0
    assert refs["two"].shape == (2, 1)


def test_tensors_are_made_one_at_a_time_in_order(tmp_path: Path):
    made: list[str] = []

    def make(name: str) -> bytes:
        made.append(name)
        return bytes(4)

    names = ["b", "a", "c"]
    write_safetensors(tmp_path / "x", ((name, "F32", (1,), lambda name=name: make(name)) for name in names))
    assert made == names


def test_a_tensor_whose_length_contradicts_its_shape_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="'a' came as 3 bytes, expected 4"):
        write_safetensors(tmp_path / "x", [("a", "F16", (2,), lambda: bytes(3))])
    with pytest.raises(ValueError, match="given twice"):
        write_safetensors(tmp_path / "x", [("a", "F16", (1,), lambda: bytes(2))] * 2)


def test_bfloat16_rounds_to_nearest_ties_to_even():
    exact, below, tie_even, tie_odd, above = 0x3F80_0000, 0x3F80_7FFF, 0x3F80_8000, 0x3F81_8000, 0x3F80_8001
    values = np.array([exact, below, tie_even, tie_odd, above], dtype=np.uint32).view(np.float32)
    assert to_bfloat16_bits(values).tolist() == [0x3F80, 0x3F80, 0x3F80, 0x3F82, 0x3F81]
    assert to_bfloat16_bits(np.array([np.inf, -np.inf, np.nan, -0.0], np.float32)).tolist() == [
        0x7F80,
        0xFF80,
        0x7FC0,
        0x8000,
    ]


@pytest.mark.parametrize(("dtype", "value"), [("F16", 65520.0), ("BF16", 3.4e38), ("F32", np.nan)])
def test_a_number_that_the_dtype_cannot_hold_is_refused(dtype: str, value: float):
    with pytest.raises(ValueError, match=f"too large for {dtype}"):
        encode(np.array([1.0, value], dtype=np.float32), dtype)
