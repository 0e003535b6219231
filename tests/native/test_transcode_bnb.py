"""Tensors of bitsandbytes become weights by its formula, products multiply these, and other tensors are refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from numpy.typing import NDArray

from argosy import _native as native
from tests.models.hub_schemes import NF4, Stored, bnb_4bit, bnb_8bit, dynamic_map

SHAPES = [(1, 64), (17, 64), (40, 320), (70, 2880)]


@pytest.fixture(params=native.instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def block_type(format: str, name: str, size: int) -> str:
    """Return the block type of a tensor, by the end of its name."""
    if "quant_state" in name:
        return f"{format}_state_1x{size}"
    end = {
        "weight": "codes", "weight.quant_map": "map", "weight.absmax": "scales" if format == "bnb4" else "absmax",
        "weight.nested_absmax": "factors", "weight.nested_quant_map": "nested_map", "SCB": "largest",
        "weight_format": "order",
    }[name]  # fmt: skip
    return f"{format}_{end}"


def stored(format: str, shape: tuple[int, int], seed: int = 0) -> Stored:
    rng = np.random.default_rng([seed, *shape])
    if format == "int8_row":
        return bnb_8bit(rng, shape, 0.02)
    return bnb_4bit("nf4" if seed % 2 == 0 else "fp4", is_double=format == "bnb4_double")(rng, shape, 0.02)


def as_bytes(array: NDArray[np.generic]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def land(format: str, shape: tuple[int, int], parts: Stored) -> NDArray[np.uint8]:
    matrix = np.full(native.matrix_bytes(format, *shape), 0xA5, np.uint8)
    for name, (_, values) in parts[0].items():
        data = as_bytes(values)
        native.transcode(block_type(format, name, data.size), data, *shape, out=matrix)
    return matrix


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("format", ["int8_row", "bnb4", "bnb4_double"])
@pytest.mark.parametrize("seed", [0, 1])
def test_weights_follow_the_formula(format: str, shape: tuple[int, int], seed: int) -> None:
    parts = stored(format, shape, seed)
    found = native.dequantize(format, land(format, shape, parts), *shape)
    np.testing.assert_allclose(found, parts[1], rtol=2**-20, atol=0)
    if format == "bnb4":
        np.testing.assert_array_equal(found, parts[1])


@pytest.mark.parametrize("format", ["int8_row", "bnb4", "bnb4_double"])
def test_products_follow_the_definition(format: str, instruction_set: str) -> None:
    shape = (70, 2880)
    parts = stored(format, shape)
    matrix, weights = land(format, shape, parts), parts[1].astype(np.float64)
    runtime = native.Runtime(2, instruction_set=instruction_set)
    x = np.random.default_rng(1).standard_normal((40, shape[1]), dtype=np.float32)
    whole, alone = np.empty((40, shape[0]), np.float32), np.empty((1, shape[0]), np.float32)
    given = native.Matrix(matrix, 0, format, *shape)
    native.matmul(runtime, [given], x, [whole])
    assert np.all(np.abs(whole - x @ weights.T) <= 4e-6 * (np.abs(x) @ np.abs(weights).T))
    for token in range(0, 40, 13):
        native.matmul(runtime, [given], x[token : token + 1], [alone])
        assert np.array_equal(alone[0], whole[token])
    runtime.close()


def test_a_matrix_takes_little_more_than_its_file() -> None:
    shape = (768, 2048)
    for format, most in (("int8_row", 8.02), ("bnb4", 4.53), ("bnb4_double", 4.22)):
        assert native.matrix_bytes(format, *shape) * 8 / (shape[0] * shape[1]) < most


STATE = {
    "quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [40, 320], "nested_blocksize": 256,
    "nested_dtype": "float32", "nested_offset": -1.25e-2,
}  # fmt: skip


def text(**changes: object) -> NDArray[np.uint8]:
    changed = {key: value for key, value in (STATE | changes).items() if value is not None}
    return np.frombuffer(json.dumps(changed).encode(), np.uint8)


@pytest.mark.parametrize("offset", [0.05199483409523964, -1.5e-05, 3, 0.0, 1e-300, -0.25])
@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
def test_the_offset_of_scales_is_read_from_the_text(offset: float, separators: tuple[str, str]) -> None:
    parts = stored("bnb4_double", (40, 320))
    data = np.frombuffer(
        json.dumps(STATE | {"nested_offset": offset}, separators=separators).encode(), np.uint8
    )
    parts[0]["weight.quant_state.bitsandbytes__nf4"] = "U8", data
    found = native.dequantize("bnb4_double", land("bnb4_double", (40, 320), parts), 40, 320)
    codes = np.stack([parts[0]["weight"][1] >> 4, parts[0]["weight"][1] & 15], axis=1).reshape(-1, 64)
    factors = np.repeat(parts[0]["weight.nested_absmax"][1], 256)[: len(codes)]
    scales = dynamic_map()[parts[0]["weight.absmax"][1]] * factors + np.float32(offset)
    np.testing.assert_allclose(found.reshape(-1, 64), NF4[codes] * scales[:, None], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    "data",
    [
        text(blocksize=128),
        text(blocksize=None),
        text(blocksize="64"),
        text(shape=[320, 40]),
        text(shape=[40, 320, 1]),
        text(shape=40),
        text(nested_blocksize=64),
        text(nested_offset=None),
        text(nested_offset="0.1"),
        text(nested_offset=float("nan")),
        text(nested_offset=float("inf")),
        text(nested_offset=1e200),
        text()[:-40],
        text()[:-1],
        np.concatenate([text(), text()]),
        np.zeros(1, np.uint8),
        np.full(300, ord('"'), np.uint8),
        np.frombuffer(b'{"blocksize"', np.uint8),
    ],
)  # fmt: skip
def test_another_state_is_refused(data: NDArray[np.uint8]) -> None:
    with pytest.raises(ValueError, match="holds a quant_state of another shape or another blocksize"):
        native.transcode(f"bnb4_double_state_1x{data.size}", data, 40, 320)


def test_numbers_that_make_no_weights_are_refused() -> None:
    shape = (40, 320)
    nested = dynamic_map()
    nested[3] *= 1.01
    for name, values, sentence in [
        ("bnb4_map", np.where(np.arange(16) == 3, np.nan, NF4), "not a finite number"),
        ("bnb4_double_map", NF4 * 2, "not a finite number"),
        ("bnb4_scales", np.full(200, np.inf), "not a finite number"),
        ("bnb4_double_factors", np.array([np.nan]), "not a finite number"),
        ("bnb4_double_factors", np.array([1e38]), "not a finite number"),
        ("bnb4_double_nested_map", nested, "values of 8-bit scales that are not those of bitsandbytes"),
        ("int8_row_largest", np.full(40, np.nan), "not a finite number"),
    ]:
        with pytest.raises(ValueError, match=f"{name} data holds .*{sentence}"):
            native.transcode(name, as_bytes(values.astype(np.float32)), *shape)
    with pytest.raises(ValueError, match="another weight_format than 0"):
        native.transcode("int8_row_order", np.ones(1, np.uint8), *shape)


def test_rows_are_whole_blocks() -> None:
    for name in ("bnb4_codes", "bnb4_map", "bnb4_double_absmax"):
        with pytest.raises(ValueError, match="cols is 96, expected a multiple of"):
            native.transcode(name, np.zeros(0, np.uint8), 3, 96)
    with pytest.raises(ValueError, match="unknown block type 'bnb4_state_2x10'"):
        native.transcode("bnb4_state_2x10", np.zeros(10, np.uint8), 1, 64)
