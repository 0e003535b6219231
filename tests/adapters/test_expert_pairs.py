"""Experts with an adapter's pairs compute (W + scale * up.T @ down) x, whatever formats weights and pairs have, and a
token's bits do not depend on the adapters of the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from argosy import _native
from argosy.adapters.files import ExpertPart, PairFormat
from tests.native.test_act_order import Pair as ActOrder

HIDDEN, WIDTH, NUM_EXPERTS, LAYER = 128, 64, 4, 3
RUNTIMES = [_native.Runtime(1), _native.Runtime(2)]
ACT_ORDER = "int4_32_f16_act_order"
FORMATS = ["f32", "bf16", "q8", "q4", "mxfp4", ACT_ORDER]
PAIR_FORMATS: list[PairFormat] = ["f32", "f16", "bf16", "f32"]
SHAPES = [(WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH)]


def weights_of(format: Any, shape: tuple[int, int], rng: np.random.Generator) -> tuple[Any, Any]:
    """Return the bytes of a random matrix, and its values."""
    rows, cols = shape
    if format == ACT_ORDER:
        pair = ActOrder.random("int4_32_f16", rows, cols, int(rng.integers(1 << 16)))
        return pair.bytes, pair.values
    matrix = np.zeros(_native.matrix_bytes(format, rows, cols), np.uint8)
    if format == "mxfp4":
        blocks = rng.integers(0, 256, (rows, cols // 32, 17)).astype(np.uint8)
        blocks[..., 0] = rng.integers(120, 124, blocks.shape[:2])
        _native.transcode("MXFP4", blocks.reshape(-1), rows, cols, out=matrix)
    else:
        _native.quantize(format, (0.2 * rng.standard_normal(shape)).astype(np.float32), matrix)
    return matrix, _native.dequantize(format, matrix, rows, cols)


@dataclass
class Experts:
    """Four experts in a table, and their values."""

    table: _native.ExpertTable
    values: list[list[Any]]
    down_bias: Any
    has_gate: bool


def make_experts(format: Any, has_gate: bool = True) -> Experts:
    rng = np.random.default_rng(3)
    first = 0 if has_gate else 1
    made = [[weights_of(format, shape, rng) for shape in SHAPES[first:]] for _ in range(NUM_EXPERTS)]
    matrices = [matrix for expert in made for matrix, _ in expert]
    arena = _native.Arena(sum(len(matrix) for matrix in matrices))
    arena.array()[:] = np.concatenate(matrices)
    sizes = [len(matrix) for matrix, _ in made[0]]
    table = _native.ExpertTable(
        arena, hidden=HIDDEN, activation=("silu", 0.0, 0.0) if has_gate else ("relu2", 0.0, 0.0)
    )
    down_bias = rng.standard_normal((NUM_EXPERTS, HIDDEN), np.float32)
    starts = np.tile(np.cumsum([0, *sizes[:-1]], dtype=np.int64), (NUM_EXPERTS, 1))
    table.add_layer(LAYER, formats=[format] * len(sizes), width=WIDTH, starts=starts, down_bias=down_bias)
    table.place([((LAYER, expert), expert * sum(sizes)) for expert in range(NUM_EXPERTS)])
    return Experts(table, [[values for _, values in expert] for expert in made], down_bias, has_gate)


@dataclass
class Adapter:
    """Random pairs, in memory from `place` on: the part of expert 0 is the last in the arena."""

    native: _native.ExpertAdapter
    part: ExpertPart
    arena: _native.Arena
    deltas: list[list[Any]]  # of each expert: gate, up, down

    def place(self) -> Adapter:
        places = [((LAYER, expert), (NUM_EXPERTS - 1 - expert) * self.part.nbytes) for expert in range(4)]
        self.native.place(places)
        return self


def numbers(format: PairFormat, shape: tuple[int, int], rng: np.random.Generator) -> tuple[Any, Any]:
    """Return the stored numbers, and their values."""
    values = (0.3 * rng.standard_normal(shape)).astype(np.float32)
    if format == "f32":
        return values, values
    if format == "f16":
        return values.astype(np.float16), values.astype(np.float16).astype(np.float32)
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    return bits, (bits.astype(np.uint32) << 16).view(np.float32)


def make_adapter(format: PairFormat, ranks: tuple[int, int, int], seed: int) -> Adapter:
    part = ExpertPart(format=format, ranks=ranks, scales=(0.5, 2.0, -1.0), hidden=HIDDEN, width=WIDTH)
    arena, rng = _native.Arena(NUM_EXPERTS * part.nbytes), np.random.default_rng(seed)
    deltas = []
    for expert in range(NUM_EXPERTS):
        memory = arena.array()[(NUM_EXPERTS - 1 - expert) * part.nbytes :]
        deltas.append([])
        for matrix, at in enumerate(part.offsets):
            values = []
            for start, shape in zip(at, part.shapes(matrix), strict=True):
                stored, value = numbers(format, shape, rng)
                memory[start : start + stored.nbytes] = stored.view(np.uint8).reshape(-1)
                values.append(value.astype(np.float64))
            deltas[-1].append(part.scales[matrix] * values[1].T @ values[0])
    native = _native.ExpertAdapter(arena)
    native.add_layer(
        LAYER, format=format, ranks=ranks, scales=part.scales,
        hidden=HIDDEN, width=WIDTH, num_experts=NUM_EXPERTS,
    )  # fmt: skip
    return Adapter(native, part, arena, deltas)


RNG = np.random.default_rng(7)
TOKENS = 23
CHOICES = np.stack([RNG.permutation(NUM_EXPERTS)[:2] for _ in range(TOKENS)]).astype(np.int32)
ROWS = RNG.standard_normal((TOKENS, HIDDEN), np.float32)
# One token at a time, some that follow one another, and tokens without.
ADAPTERS = np.array([0, 1, -1, 0, 1, -1] + [1] * 8 + [0] * 6 + [-1] * 3, np.int32)


def run(experts: Experts, adapters: Any, tokens: Any = slice(None), threads: int = 2) -> Any:
    choices, rows = np.ascontiguousarray(CHOICES[tokens]), np.ascontiguousarray(ROWS[tokens])
    dispatch = _native.Dispatch(choices, np.ones(len(rows), np.bool_), NUM_EXPERTS, adapters[tokens].copy())
    out = np.full((choices.size, HIDDEN), np.nan, np.float32)
    experts.table.run(RUNTIMES[threads - 1], LAYER, dispatch.experts, dispatch, rows, out)
    return out


def expected(experts: Experts, adapters: list[Adapter]) -> Any:
    out = np.empty((CHOICES.size, HIDDEN))
    for assignment, expert in enumerate(CHOICES.reshape(-1).tolist()):
        token = assignment // 2
        values = [value.astype(np.float64) for value in experts.values[expert]]
        if (number := ADAPTERS[token]) >= 0:
            deltas = adapters[number].deltas[expert][3 - len(values) :]
            values = [value + delta for value, delta in zip(values, deltas, strict=True)]
        *first, down = values
        products = [matrix @ ROWS[token].astype(np.float64) for matrix in first]
        if experts.has_gate:
            inner = products[0] / (1 + np.exp(-products[0])) * products[1]
        else:
            inner = np.maximum(products[0], 0) ** 2
        out[assignment] = down @ inner + experts.down_bias[expert]
    return out


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("has_gate", [True, False])
def test_experts_with_pairs_compute_the_sum_of_both_and_a_token_alone_has_the_same_bits(
    format: str, has_gate: bool
) -> None:
    experts, of_pairs = make_experts(format, has_gate), PAIR_FORMATS[FORMATS.index(format) % 3 :]
    ranks = [(16, 5, 8), (0, 3, 0)] if has_gate else [(0, 5, 8), (0, 0, 33)]
    adapters = [make_adapter(of_pairs[i], ranks[i], seed=i).place() for i in range(2)]
    without = run(experts, ADAPTERS)  # the table has no adapters yet
    for number, adapter in enumerate(adapters):
        experts.table.set_adapter(number, adapter.native)

    found, exact = run(experts, ADAPTERS), expected(experts, adapters)
    size = np.abs(exact).max(axis=1, keepdims=True)
    # Activations become int8 beside quantised weights, which are off by up to 1/254 of a group's largest.
    tolerance = 2e-5 if format in ("f32", "bf16") else 3e-2
    assert np.abs((found - exact) / size).max() < tolerance
    assert np.abs((without - exact) / size).max() > 10 * tolerance

    np.testing.assert_array_equal(run(experts, ADAPTERS, threads=1), found)
    for token in range(TOKENS):
        alone = run(experts, ADAPTERS, slice(token, token + 1))
        np.testing.assert_array_equal(alone, found[2 * token : 2 * token + 2])
    none = np.repeat(ADAPTERS < 0, 2)
    np.testing.assert_array_equal(found[none], without[none])


def test_a_table_without_the_adapter_of_a_token_runs_it_without_pairs() -> None:
    experts, adapter = make_experts("q4"), make_adapter("bf16", (8, 8, 8), 1).place()
    without = run(experts, np.full(TOKENS, -1, np.int32))
    experts.table.set_adapter(9, adapter.native)
    np.testing.assert_array_equal(run(experts, ADAPTERS), without)
    assert (run(experts, np.full(TOKENS, 9, np.int32)) != without).any(axis=1).all()
    experts.table.set_adapter(9, None)
    np.testing.assert_array_equal(run(experts, np.full(TOKENS, 9, np.int32)), without)


def test_a_run_refuses_pairs_that_are_not_in_memory() -> None:
    experts, adapter = make_experts("f32"), make_adapter("f16", (4, 4, 4), 1)
    experts.table.set_adapter(0, adapter.native)
    with pytest.raises(ValueError, match=r"the pairs of expert \d of layer 3 are not in memory"):
        run(experts, ADAPTERS)
    adapter.place()
    assert adapter.native.has_places(LAYER, range(4))
    run(experts, ADAPTERS)
    adapter.native.place([((LAYER, int(CHOICES[0, 0])), -1)])
    assert not adapter.native.has_places(LAYER, range(4))
    assert adapter.native.has_places(LAYER + 1, range(9))
    with pytest.raises(ValueError, match="are not in memory"):
        run(experts, ADAPTERS)
    run(experts, np.full(TOKENS, -1, np.int32))  # tokens without it need no part


def test_a_dispatch_of_some_experts_keeps_the_adapters_of_its_tokens() -> None:
    experts, adapter = make_experts("f32"), make_adapter("f32", (4, 4, 4), 1).place()
    experts.table.set_adapter(1, adapter.native)
    everything = run(experts, ADAPTERS)
    dispatch = _native.Dispatch(CHOICES, np.ones(TOKENS, np.bool_), NUM_EXPERTS, ADAPTERS).only([2])
    out = np.zeros_like(everything)
    experts.table.run(RUNTIMES[0], LAYER, [2], dispatch, ROWS, out)
    chosen = CHOICES.reshape(-1) == 2
    np.testing.assert_array_equal(out[chosen], everything[chosen])


@given(
    st.sampled_from(["f32", "f16", "bf16"]),
    st.tuples(*[st.integers(0, 70)] * 3).filter(any),
    st.integers(1, 300),
    st.integers(1, 300),
)
def test_a_part_has_the_layout_of_the_files(format: PairFormat, ranks: Any, hidden: int, width: int) -> None:
    part = ExpertPart(format=format, ranks=ranks, scales=(1.0, 1.0, 1.0), hidden=hidden, width=width)
    adapter = _native.ExpertAdapter(_native.Arena(3 * part.nbytes))
    adapter.add_layer(
        0, format=format, ranks=ranks, scales=part.scales, hidden=hidden, width=width, num_experts=2
    )
    assert adapter.part_bytes(0) == part.nbytes
    assert adapter.offsets(0) == [list(pair) for pair in part.offsets]
    adapter.place([((0, 1), 2 * part.nbytes)])
    for at in (2 * part.nbytes + 1, -2, 1 << 62):
        with pytest.raises(ValueError, match="does not lie inside memory"):
            adapter.place([((0, 1), at)])


def test_an_adapter_refuses_layers_that_it_cannot_have() -> None:
    def add(adapter: _native.ExpertAdapter, **changed: Any) -> None:
        sizes: dict[str, Any] = {
            "format": "bf16", "ranks": (1, 2, 3), "scales": (1.0, 1.0, 1.0),
            "hidden": 8, "width": 4, "num_experts": 2,
        }  # fmt: skip
        adapter.add_layer(changed.pop("layer", 0), **(sizes | changed))

    adapter = _native.ExpertAdapter(_native.Arena(1024))
    for changed, message in [
        ({"format": "q8"}, "format that is not one of f32, f16, bf16"),
        ({"ranks": (0, 0, 0)}, "no pairs"),
        ({"ranks": (-1, 2, 3)}, r"ranks\[0\] is -1"),
        ({"ranks": (1, 1 << 40, 3)}, r"ranks\[1\] is"),
        ({"scales": (1.0, float("nan"), 1.0)}, r"scales\[1\] is nan, expected a finite number"),
        ({"hidden": 0}, "hidden is 0"),
        ({"width": 1 << 40}, "width is"),
        ({"num_experts": 0}, "num_experts is 0"),
        ({"layer": -1}, "layer is -1"),
    ]:
        with pytest.raises(ValueError, match=message):
            add(adapter, **changed)
    add(adapter)
    with pytest.raises(ValueError, match="layer 0 was already added"):
        add(adapter)
    with pytest.raises(ValueError, match="expert is 2, expected 0 to 1"):
        adapter.place([((0, 2), 0)])
    with pytest.raises(ValueError, match="layer 1 has no pairs in this adapter"):
        adapter.place([((1, 0), 0)])


def test_a_table_refuses_an_adapter_that_does_not_fit_its_experts() -> None:
    def adapter(layer: int = LAYER, **changed: Any) -> _native.ExpertAdapter:
        made = _native.ExpertAdapter(_native.Arena(1024))
        sizes = {"hidden": HIDDEN, "width": WIDTH, "num_experts": NUM_EXPERTS} | changed
        made.add_layer(layer, format="f16", ranks=(1, 0, 0), scales=(1.0, 1.0, 1.0), **sizes)
        return made

    table = make_experts("f32").table
    table.set_adapter(0, adapter())
    for wrong, message in [
        (adapter(layer=4), "layer 4 has no experts in this table"),
        (adapter(hidden=HIDDEN - 1), "have hidden 127, and the experts 128"),
        (adapter(width=WIDTH + 1), "have width 65, and the experts 64"),
        (adapter(num_experts=5), "have num_experts 5, and the experts 4"),
    ]:
        with pytest.raises(ValueError, match=message):
            table.set_adapter(0, wrong)
    with pytest.raises(ValueError, match="number is -1"):
        table.set_adapter(-1, adapter())
    with pytest.raises(ValueError, match="its experts have no gate"):
        make_experts("f32", has_gate=False).table.set_adapter(0, adapter())
