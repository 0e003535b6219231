"""Dispatches group choices by expert; a table runs experts where they were last placed, and refuses all others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from argosy import _native
from argosy.config import Format
from tests.native import _native_testing

HIDDEN, WIDTH, NUM_EXPERTS = 64, 32, 4
RUNTIME = _native.Runtime(2)


@given(st.data())
def test_a_dispatch_sorts_assignments_by_expert_and_keeps_their_order(data: Any) -> None:
    shape = data.draw(st.tuples(st.integers(0, 9), st.integers(1, 4)))
    choices = data.draw(arrays.arrays(np.int32, shape, elements=st.integers(0, 6)))
    is_decode = data.draw(arrays.arrays(np.bool_, shape[0]))
    dispatch = _native.Dispatch(choices, is_decode, 7)
    flat = choices.reshape(-1)

    assert (dispatch.num_tokens, dispatch.experts_per_token) == shape
    assert dispatch.experts == np.unique(flat).tolist()
    assert dispatch.scan == sorted(set(dispatch.experts) - set(choices[is_decode].reshape(-1).tolist()))
    for expert in dispatch.experts:
        assert dispatch.assignments(expert) == np.flatnonzero(flat == expert).tolist()
    np.testing.assert_array_equal(dispatch.choices(), choices)


def test_a_dispatch_refuses_invalid_experts() -> None:
    with pytest.raises(ValueError, match=r"choices\[1\] is 4, expected 0 to 3"):
        _native.Dispatch(np.array([[0, 4]], np.int32), np.array([True]), 4)
    with pytest.raises(ValueError, match=r"is_decode has shape \[2\], expected \[1\]"):
        _native.Dispatch(np.array([[0, 1]], np.int32), np.array([True, True]), 4)
    with pytest.raises(ValueError, match="no token chose expert 2"):
        _native.Dispatch(np.array([[0, 1]], np.int32), np.array([True]), 4).assignments(2)


class Experts:
    """Four experts of random weights and biases, one after another in an arena, and a table of them."""

    def __init__(self, format: Format) -> None:
        rng = np.random.default_rng(3)
        shapes = [(WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH)]
        sizes = [_native.matrix_bytes(format, *shape) for shape in shapes]
        self.starts = np.tile(np.cumsum([0, *sizes[:-1]], dtype=np.int64), (NUM_EXPERTS, 1))
        self.format, self.expert_bytes = format, sum(sizes)
        self.arena = _native.Arena((NUM_EXPERTS + 1) * self.expert_bytes)  # one place stays free
        memory = self.arena.array()
        for expert in range(NUM_EXPERTS):
            for start, size, shape in zip(self.starts[expert], sizes, shapes, strict=True):
                weights = rng.standard_normal(shape, np.float32)
                at = expert * self.expert_bytes + int(start)
                _native.quantize(format, weights, memory[at : at + size])
        self.biases = {
            "gate_bias": rng.standard_normal((NUM_EXPERTS, WIDTH), np.float32),
            "up_bias": rng.standard_normal((NUM_EXPERTS, WIDTH), np.float32),
            "down_bias": rng.standard_normal((NUM_EXPERTS, HIDDEN), np.float32),
        }
        self.places = [((5, expert), expert * self.expert_bytes) for expert in range(NUM_EXPERTS)]
        self.table = _native.ExpertTable(self.arena, hidden=HIDDEN, activation=("clamped", 7.0, 1.7))
        self.table.add_layer(
            5, formats=(format, format, format), width=WIDTH, starts=self.starts, **self.biases
        )

    def expected(self, choices: Any, rows: Any) -> Any:
        """Compute the outputs with one call per assignment, from the weights in their first places."""
        out = np.empty((choices.size, HIDDEN), np.float32)
        for assignment, expert in enumerate(choices.reshape(-1).tolist()):
            only = np.zeros(1, np.int32)
            _native_testing.swiglu_experts(
                RUNTIME, self.arena, (self.format,) * 3, HIDDEN, WIDTH,
                self.starts[expert : expert + 1] + self.places[expert][1],
                rows[assignment // choices.shape[1]][None], np.array([0, 1], np.int32), only, only,
                out[assignment : assignment + 1], activation=("clamped", 7.0, 1.7),
                **{name: np.ascontiguousarray(bias[expert : expert + 1]) for name, bias in self.biases.items()},
            )  # fmt: skip
        return out


CHOICES = np.array([[2, 0], [2, 1], [0, 2]], np.int32)
DISPATCH = _native.Dispatch(CHOICES, np.array([True, True, False]), NUM_EXPERTS)
ROWS = np.random.default_rng(4).standard_normal((3, HIDDEN), np.float32)


def run(table: _native.ExpertTable, experts: list[int], out: Any, layer: int = 5) -> None:
    assert table.run(RUNTIME, layer, experts, DISPATCH, ROWS, out) > 0


@pytest.mark.parametrize("format", ["f32", "q4"])
def test_experts_run_in_any_groups_and_order_each_into_its_own_rows(format: Format) -> None:
    experts = Experts(format)
    experts.table.place(experts.places)
    expected = experts.expected(CHOICES, ROWS)
    for groups in ([[0, 1, 2]], [[2], [0, 1]], [[1, 0], [2]]):
        out, done = np.full((6, HIDDEN), np.nan, np.float32), np.zeros(6, np.bool_)
        for group in groups:
            run(experts.table, group, out)
            done |= np.isin(CHOICES.reshape(-1), group)
            np.testing.assert_array_equal(out[done], expected[done])
            assert np.isnan(out[~done]).all()
    assert experts.table.num_runs == 9
    assert experts.table.nbytes == experts.arena.nbytes


def test_an_expert_runs_where_it_was_last_placed() -> None:
    experts = Experts("q4")
    expected = experts.expected(CHOICES, ROWS)
    experts.table.place(experts.places)
    memory, free = experts.arena.array(), NUM_EXPERTS * experts.expert_bytes
    memory[free:] = memory[2 * experts.expert_bytes : 3 * experts.expert_bytes]
    memory[2 * experts.expert_bytes : 3 * experts.expert_bytes] = 0
    experts.table.place([((5, 2), free)])
    out = np.empty((6, HIDDEN), np.float32)
    run(experts.table, [0, 1, 2], out)
    np.testing.assert_array_equal(out, expected)


def test_a_place_outside_the_memory_is_refused() -> None:
    experts = Experts("q4")
    for at in (-1, experts.expert_bytes * NUM_EXPERTS + 1, 2**62, 2**63 - 1, -(2**63)):
        with pytest.raises(ValueError, match="does not lie inside memory of"):
            experts.table.place([((5, 2), at)])
    for key, sentence in (((5, 4), "expert is 4, expected 0 to 3"), ((4, 0), "layer 4 has no experts")):
        with pytest.raises(ValueError, match=sentence):
            experts.table.place([(key, 0)])


def test_an_expert_that_cannot_run_is_refused_and_writes_nothing() -> None:
    experts = Experts("q4")
    experts.table.place(experts.places[:2])
    out = np.full((6, HIDDEN), np.nan, np.float32)
    refusals: list[tuple[list[int], int, str]] = [
        ([0, 2], 5, "expert 2 of layer 5 has no place in memory"),
        ([0, 0], 5, "expert 0 of layer 5 is named twice"),
        ([3], 5, "no token of layer 5 chose expert 3"),
        ([0], 1, "layer 1 has no experts in this table"),
    ]
    for asked, layer, sentence in refusals:
        with pytest.raises(ValueError, match=sentence):
            run(experts.table, asked, out, layer)
    with pytest.raises(ValueError, match=r"out has shape \[5, 64\], expected \[6, 64\]"):
        run(experts.table, [0], out[:5])
    assert np.isnan(out).all()
    assert experts.table.num_runs == 0


def test_a_layer_can_be_added_only_once() -> None:
    experts = Experts("q4")
    with pytest.raises(ValueError, match="layer 5 was already added"):
        experts.table.add_layer(5, formats=("q4", "q4", "q4"), width=WIDTH, starts=experts.starts)
