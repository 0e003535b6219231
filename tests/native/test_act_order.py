"""Matrices with act-order hold the values that GPTQ and compressed-tensors define, and products use them.

    w[row, col] = scales[row, g_idx[col]] * (codes[row, col] - zeros[row, g_idx[col]])

Products with such a matrix have the bits of products with one whose columns are stored in that order, for activations
in that order.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from argosy import _native as native
from argosy.config import ACT_ORDER_FORMATS
from tests.native import _native_testing as testing
from tests.native.grouped_formats import Bytes, Stored, raw
from tests.native.test_transcode import instruction_set  # noqa: F401  a fixture

END = "_act_order"
BASES = [name.removesuffix(END) for name in sorted(ACT_ORDER_FORMATS)]
Floats = npt.NDArray[np.float32]


def landed(format: str, rows: int, cols: int, parts: dict[str, Bytes]) -> Bytes:
    matrix = np.full(native.matrix_bytes(format, rows, cols), 0xA5, np.uint8)
    for part, data in parts.items():
        native.transcode(f"{format}:{part}", data, rows, cols, out=matrix)
    return matrix


def scales_of(stored: Stored) -> npt.NDArray[np.float64]:
    if stored.scale == "f16":
        return stored.scales.view(np.float16).astype(np.float64)
    return (stored.scales.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def groups_of(cols: int, group: int, seed: int) -> npt.NDArray[np.int32]:
    return (np.random.default_rng(seed).permutation(cols) // group).astype(np.int32)


def values_of(stored: Stored, groups: npt.NDArray[np.int32]) -> Floats:
    values = scales_of(stored)[:, groups] * (stored.codes - stored.zeros[:, groups])
    return values.astype(np.float32)


@dataclass
class Pair:
    """A matrix with act-order, and the same with its columns stored in that order, and rows in `row_order`."""

    bytes: Bytes
    in_place: Bytes
    order: npt.NDArray[np.int64]
    values: Floats

    @classmethod
    def random(
        cls, base: str, rows: int, cols: int, seed: int, row_order: npt.NDArray[np.int64] | None = None
    ) -> Pair:
        stored = Stored.random(base, rows, cols)
        stored.codes = np.random.default_rng([seed, 1]).integers(0, 1 << stored.bits, (rows, cols))
        groups = groups_of(cols, stored.group, seed)
        order = np.argsort(groups, kind="stable")
        matrix = landed(base + END, rows, cols, stored.compressed_tensors() | {"g_idx": raw(groups)})
        native.put_in_act_order(base + END, matrix, rows, cols)
        row_order = np.arange(rows) if row_order is None else row_order
        turned = replace(
            stored,
            codes=stored.codes[:, order][row_order],
            scales=np.ascontiguousarray(stored.scales[row_order]),
            zeros=stored.zeros[row_order],
        )
        return cls(
            matrix, landed(base, rows, cols, turned.compressed_tensors()), order, values_of(stored, groups)
        )


@pytest.mark.parametrize("base", BASES)
def test_a_matrix_has_the_values_that_its_formula_gives(base: str) -> None:
    for rows, cols in [(32, 96), (64, 160), (96, 256)]:
        stored = Stored.random(base, rows, cols, least_zero=1)
        groups = groups_of(cols, stored.group, 7)
        ways = [stored.compressed_tensors(), stored.gptq(1), stored.gptq(2)]
        ways += [stored.int8()] if stored.bits == 8 else []
        for parts in ways:
            matrix = landed(base + END, rows, cols, {"g_idx": raw(groups)} | parts)
            native.put_in_act_order(base + END, matrix, rows, cols)
            found = native.dequantize(base + END, matrix, rows, cols)
            np.testing.assert_array_equal(found, values_of(stored, groups))


@pytest.mark.parametrize("base", ["uint4_64_f16", "int8_32_bf16", "uint3_128_f16"])
def test_columns_in_their_places_stay_there(base: str) -> None:
    stored = Stored.random(base, 32, 160)
    expected = landed(base, 32, 160, stored.compressed_tensors())
    for groups in (np.arange(160) // stored.group, np.full(160, -1)):  # -1: compressed-tensors' if unused
        matrix = landed(
            base + END, 32, 160, stored.compressed_tensors() | {"g_idx": raw(groups.astype(np.int32))}
        )
        native.put_in_act_order(base + END, matrix, 32, 160)
        np.testing.assert_array_equal(matrix[: len(expected)], expected)
        assert matrix[len(expected) :].view(np.int32)[0] == -1


def test_groups_that_do_not_fit_the_matrix_are_refused() -> None:
    format = "uint4_64_f16" + END
    right = np.arange(160, dtype=np.int32) // 64
    for at in (0, 63, 64, 128, 159):
        for wrong in (-1, -(2**31), 3, 2**31 - 1, (right[at] + 1) % 3):
            damaged = right.copy()
            damaged[at] = wrong
            matrix = landed(format, 16, 160, {"g_idx": raw(damaged)})
            with pytest.raises(ValueError, match="g_idx"):
                native.put_in_act_order(format, matrix, 16, 160)
    with pytest.raises(ValueError, match="uint4_64_f16 has no act-order"):
        native.put_in_act_order("uint4_64_f16", np.zeros(1, np.uint8), 16, 160)


@pytest.mark.covering(1)
@pytest.mark.parametrize("base", BASES)
def test_products_have_the_bits_of_columns_stored_in_this_order(base: str, instruction_set: str) -> None:  # noqa: F811
    rows, cols, tokens = 37, 288, 5
    pairs = [Pair.random(base, rows, cols, seed) for seed in (1, 1, 2)]
    x = np.random.default_rng(3).standard_normal((tokens, cols)).astype(np.float32)
    runtime = native.Runtime(2, instruction_set=instruction_set)
    matrices = [native.Matrix(pair.bytes, 0, base + END, rows, cols) for pair in pairs]
    plain = native.Matrix(pairs[0].in_place, 0, base, rows, cols)
    out = [np.empty((tokens, rows), np.float32) for _ in range(4)]
    # Two orders, and a matrix in its places, in one call.
    native.matmul(runtime, [*matrices[:2], plain, matrices[2]], x, out)
    expected = np.empty((tokens, rows), np.float32)
    for pair, found in zip(pairs, [*out[:2], out[3]], strict=True):
        in_place = native.Matrix(pair.in_place, 0, base, rows, cols)
        native.matmul(runtime, [in_place], np.ascontiguousarray(x[:, pair.order]), [expected])
        np.testing.assert_array_equal(found, expected)
        assert np.abs(found - x @ pair.values.T).max() < 0.05 * np.abs(found).max()
    native.matmul(runtime, [plain], x, [expected])
    np.testing.assert_array_equal(out[2], expected)
    runtime.close()


@pytest.mark.parametrize("base", ["uint4_64_f16", "int8_32_bf16"])
@pytest.mark.parametrize("shares_order", [True, False])
def test_experts_have_the_bits_of_columns_stored_in_this_order(base: str, shares_order: bool) -> None:
    """Gate, up and down have orders of their own; reordered rows of gate and up give down its columns in order."""
    hidden, width, num_experts, tokens = 160, 96, 3, 100
    rng = np.random.default_rng(5)
    x = rng.standard_normal((tokens, hidden)).astype(np.float32)
    experts = []
    for seed in range(0, 9, 3):
        down = Pair.random(base, hidden, width, seed)
        gate = Pair.random(base, width, hidden, seed + 1, row_order=down.order)
        up = Pair.random(base, width, hidden, seed + (1 if shares_order else 2), row_order=down.order)
        experts.append((gate, up, down))
    shapes = [(width, hidden), (width, hidden), (hidden, width)]
    # What is computed: one expert and one token at a time, from columns stored in the order.
    runtime = native.Runtime(3)
    expected = np.zeros((num_experts, tokens, hidden), np.float32)
    for index, pairs in enumerate(experts):
        gate, up, down = (
            native.Matrix(pair.in_place, 0, base, *shape) for pair, shape in zip(pairs, shapes, strict=True)
        )
        if shares_order:
            testing.swiglu(
                runtime, gate, up, down, np.ascontiguousarray(x[:, pairs[0].order]), expected[index]
            )
            continue
        halves = [np.empty((tokens, width), np.float32) for _ in range(2)]
        for matrix, pair, half in zip((gate, up), pairs, halves, strict=False):
            native.matmul(runtime, [matrix], np.ascontiguousarray(x[:, pair.order]), [half])
        exact = halves[0].astype(np.float64)
        inner = (exact / (1 + np.exp(-exact)) * halves[1]).astype(np.float32)
        native.matmul(runtime, [down], inner, [expected[index]])
    arena, at, offsets = native.Arena(1 << 20), 0, np.empty((num_experts, 3), np.int64)
    for index, pairs in enumerate(experts):
        for number, pair in enumerate(pairs):
            offsets[index, number] = at
            arena.array()[at : at + len(pair.bytes)] = pair.bytes
            at += -(-len(pair.bytes) // 64) * 64
    starts = np.array([0, 3, 70, 170], np.int32)
    token = np.concatenate([rng.permutation(tokens)[:count] for count in np.diff(starts)]).astype(np.int32)
    row = np.arange(170, dtype=np.int32)[::-1].copy()
    found = np.empty((170, hidden), np.float32)
    testing.swiglu_experts(
        runtime, arena, [base + END] * 3, hidden, width, offsets, x, starts, token, row, found
    )
    of_expert = np.repeat(np.arange(num_experts), np.diff(starts))
    wanted = expected[of_expert, token]
    if shares_order:
        np.testing.assert_array_equal(found[row], wanted)
    else:  # the activation is another one
        np.testing.assert_allclose(found[row], wanted, rtol=0, atol=0.02 * np.abs(wanted).max())
    runtime.close()


@pytest.mark.parametrize("readers", [1, 3])
def test_a_store_completes_a_matrix_when_all_its_parts_have_landed(readers: int, tmp_path: Path) -> None:
    format, rows, cols = "uint4_64_f16" + END, 64, 160
    stored = Stored.random("uint4_64_f16", rows, cols, least_zero=1)
    groups = groups_of(cols, 64, 7)
    parts = {"g_idx": raw(groups)} | stored.gptq()
    expected = landed(format, rows, cols, parts)
    native.put_in_act_order(format, expected, rows, cols)
    damaged = groups.copy()
    damaged[5] = (damaged[5] + 1) % 3
    store, arena = native.Store(readers), native.Arena(1 << 20)
    for index, data in enumerate((groups, damaged)):
        path = tmp_path / f"{index}.bin"
        path.write_bytes(b"".join(part.tobytes() for part in (parts | {"g_idx": raw(data)}).values()))
        file_id, pieces, at = store.open(str(path)), [], 0
        for part, content in parts.items():
            blocks = f"{format}:{part}", rows, cols
            pieces += ((file_id, at, len(content), place, *blocks) for place in (0, 65536))  # two matrices
            at += len(content)
        for order in ([*range(len(pieces))], [*range(len(pieces))[::-1]]):
            ticket = store.fetch(arena, [pieces[i] for i in order])
            [(_, message, kind)] = store.wait_any([ticket])
            if index:
                assert kind == "not finite"
                assert re.match("1.bin: the matrix of bytes .* holds an order of columns", str(message))
                continue
            assert message is None
            for place in (0, 65536):
                np.testing.assert_array_equal(arena.array()[place : place + len(expected)], expected)
            arena.array()[:] = 0
    store.close()


def test_memory_that_is_no_order_is_read_within_its_bounds() -> None:
    """Packs are files of strangers: columns beyond the last one count as the last."""
    base, rows, cols = "uint4_64_f16", 16, 128
    pair = Pair.random(base, rows, cols, 1)
    rng = np.random.default_rng(1)
    order = pair.bytes[-cols * 4 :].view(np.int32)
    order[:] = rng.integers(-(2**31), 2**31, cols)
    order[0] = 2**31 - 1
    values = native.dequantize(base + END, pair.bytes, rows, cols)
    assert values.shape == (rows, cols)
    runtime, out = native.Runtime(1), np.empty((3, rows), np.float32)
    native.matmul(
        runtime, [native.Matrix(pair.bytes, 0, base + END, rows, cols)], np.ones((3, cols), np.float32), [out]
    )
    assert np.isfinite(out).all()
    runtime.close()
