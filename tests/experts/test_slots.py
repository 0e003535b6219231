"""Slots of several sizes: where they lie, what they take, and that each expert lands in one that is large enough."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from argosy.checkpoint.files import ExpertMatrix, ExpertRecord
from argosy.checkpoint.landing import Piece
from argosy.experts.cache import ExpertCache
from argosy.experts.files import Key, memory_of, resident_bytes
from argosy.experts.slots import SlotLayout, Slots, lay_out
from tests.experts.fake_store import FakeFiles, FakeStore, Truth, make_records
from tests.helpers.examples import given_few

PAGE = 4096
NUM_EXPERTS, K = 16, 4


def records_of(sizes: list[int], num_experts: int = NUM_EXPERTS) -> dict[Key, ExpertRecord]:
    """Make a record for each expert; those of layer i are in one piece of sizes[i] pages."""
    records: dict[Key, ExpertRecord] = {}
    end = 0
    for layer, pages in enumerate(sizes):
        for expert in range(num_experts):
            matrix = ExpertMatrix(0, 0, "f32", 1, 1)
            records[layer, expert] = ExpertRecord(
                (Piece(Path("x"), end, pages * PAGE),), matrix, matrix, matrix
            )
            end += pages * PAGE
    return records


def ends(layout: SlotLayout, num_slots: int) -> list[int]:
    """Where each of the first slots ends, in bytes."""
    return sorted(
        int(place) + kind.slot_bytes
        for kind, count in zip(layout.kinds, layout.counts(num_slots), strict=True)
        for place in kind.places[:count]
    )


models = st.lists(st.integers(1, 12), min_size=1, max_size=10)


@given_few(models, st.integers(1, 6), st.integers(1, 5), few=40, many=200)
def test_any_number_of_slots_fits_into_its_memory(sizes: list[int], num_experts: int, k: int) -> None:
    records = records_of(sizes, num_experts)
    layout = lay_out(records, experts_per_token=k)
    for num_slots in range(len(records) + 1):
        found = ends(layout, num_slots)
        assert not found or found[-1] <= num_slots * layout.slot_bytes
        if num_slots >= min(k, len(records)):
            assert len(found) == num_slots
            assert all(layout.counts(num_slots)), "a layer has no slot"


@given_few(models, st.integers(1, 6), st.integers(1, 5), few=40, many=200)
def test_slots_lie_end_to_end_and_hold_every_expert_of_their_layers(
    sizes: list[int], num_experts: int, k: int
) -> None:
    records = records_of(sizes, num_experts)
    layout = lay_out(records, experts_per_token=k)
    begins = sorted(int(place) for kind in layout.kinds for place in kind.places)
    assert begins == [0, *ends(layout, len(records))[:-1]]
    assert sorted(layer for kind in layout.kinds for layer in kind.layers) == list(range(len(sizes)))
    for kind in layout.kinds:
        assert kind.slot_bytes == max(sizes[layer] for layer in kind.layers) * PAGE
        assert kind.num_experts == num_experts * len(kind.layers)
    assert 1 <= len(layout.kinds) <= min(4, max(1, k))
    assert layout.slot_bytes <= max(sizes) * PAGE


def test_equal_experts_have_one_kind_of_slots() -> None:
    layout = lay_out(records_of([3] * 5), experts_per_token=K)
    assert [kind.slot_bytes for kind in layout.kinds] == [3 * PAGE]
    assert layout.slot_bytes == 3 * PAGE
    assert layout.counts(17) == [17]


def test_two_sizes_in_equal_shares_take_their_mean() -> None:
    records = records_of([6, 8, 6, 8])
    layout = lay_out(records, experts_per_token=K)
    assert layout.slot_bytes == 7 * PAGE
    assert layout.slot_bytes * len(records) == resident_bytes(records)
    assert layout.counts(33) == [17, 16]


def test_a_kind_with_few_experts_costs_little_more_than_its_share() -> None:
    records = records_of([100] * 31 + [300])
    layout = lay_out(records, experts_per_token=8)
    mean = sum(map(memory_of, records.values())) / len(records)
    assert layout.slot_bytes <= 1.18 * mean  # of the first 8 slots, one has 300 pages: (7 * 100 + 300) / 8
    assert layout.counts(8) == [7, 1]
    assert layout.counts(320) == [310, 10]


def test_sizes_that_hardly_differ_share_a_kind() -> None:
    layout = lay_out(records_of([100, 101, 200, 202, 203, 300, 400, 500]), experts_per_token=8)
    assert len(layout.kinds) == 4
    assert {(0, 1), (2, 3, 4)} < {kind.layers for kind in layout.kinds}


def test_a_model_without_experts_has_no_slots() -> None:
    layout = lay_out({}, experts_per_token=0)
    assert (layout.slot_bytes, layout.kinds, layout.counts(0)) == (0, (), [])


class Rig:
    """A cache for layers whose experts have two sizes."""

    def __init__(self, num_slots: int, **store: Any) -> None:
        keys = [(layer, expert) for layer in range(4) for expert in range(NUM_EXPERTS)]
        self.records, self.files = make_records(keys, num_pieces=1)
        for key, record in self.records.items():
            if key[0] % 2:  # three pieces take more blocks than one
                self.records[key] = ExpertRecord(
                    tuple(
                        Piece(
                            record.pieces[0].path,
                            record.pieces[0].offset + i * (size := record.nbytes // 3),
                            size,
                        )
                        for i in range(3)
                    ),
                    *(
                        ExpertMatrix(i, 0, "f32", matrix.rows, matrix.cols)
                        for i, matrix in enumerate(record.matrices)
                    ),
                )
        self.store = FakeStore(self.files, **store)
        files = FakeFiles(self.store, self.records)
        self.truth = Truth(self.records, self.files)
        self.cache = ExpertCache(files, num_slots=num_slots, experts_per_token=K)

    def run(self, layer: int, experts: list[int], scan: set[int], hint: list[int]) -> None:
        found: list[int] = []
        with self.cache.lease(layer, experts, scan) as lease:
            self.cache.guess((layer + 1) % 4, [hint], is_sweep=True)
            for group in lease:
                self.truth.check(self.cache.table, layer, group)
                found += group
        assert sorted(found) == sorted(experts)


leases = st.lists(
    st.tuples(
        st.integers(0, 3),
        st.lists(st.integers(0, NUM_EXPERTS - 1), min_size=1, unique=True),
        st.sets(st.integers(0, NUM_EXPERTS - 1)),
        st.lists(st.integers(0, NUM_EXPERTS - 1), unique=True),
        st.integers(K, 4 * NUM_EXPERTS),
    ),
    min_size=1,
    max_size=12,
)


@given_few(leases, st.integers(0, 1000), few=30, many=150)
def test_every_expert_has_its_own_bytes_in_slots_of_two_sizes_whose_number_changes(
    asked: list[tuple[int, list[int], set[int], list[int], int]], seed: int
) -> None:
    rig = Rig(4 * NUM_EXPERTS, seed=seed, begun=0.5)
    assert [kind.layers for kind in rig.cache.slots._layout.kinds] == [(0, 2), (1, 3)]
    for number, (layer, experts, scan, hint, num_slots) in enumerate(asked):
        rig.run(layer, experts, scan, hint)
        rig.cache.resize(num_slots, held=num_slots + number % 3)
        assert rig.cache._arena.nbytes >= num_slots * rig.cache.slot_bytes
        resident = rig.cache.slots.resident()
        assert len(resident) == rig.cache.slots.num_resident <= num_slots
        for layer_of, expert in resident:
            rig.truth.check(rig.cache.table, layer_of, [expert])


@pytest.mark.parametrize("num_slots", [K, 40])
def test_a_layer_gets_all_its_experts_however_few_slots_its_kind_has(num_slots: int) -> None:
    rig = Rig(num_slots)
    for layer in (0, 1, 2, 3):
        rig.run(layer, list(range(NUM_EXPERTS)), set(range(NUM_EXPERTS)), [])
    assert rig.cache.slots.is_full


def test_a_slot_for_every_expert_holds_every_expert() -> None:
    rig = Rig(4 * NUM_EXPERTS)
    for layer in (0, 1, 2, 3):
        rig.run(layer, list(range(NUM_EXPERTS)), set(), [])
    assert rig.cache.core.has_all
    assert rig.cache.slots.is_full


def test_the_slots_that_go_first_are_the_last_of_each_kind() -> None:
    layout = lay_out(records_of([6, 8]), experts_per_token=K)
    slots = Slots(layout, num_slots=8, experts_per_token=K)
    for layer in (0, 1):
        for expert in range(4):
            assert slots.policy_of[layer].admit((layer, expert), is_scan=False) == expert
        slots.policy_of[layer].unpin(layer, range(4))
    slots.resize(6)
    copies = slots.moves(6)
    assert slots.num_resident == 6
    begins = {key: (begin, to, nbytes) for key, begin, to, nbytes in copies}
    # The oldest expert of each kind leaves, and the one in the last slot takes its place.
    assert begins == {
        (0, 3): ((3 * 14) * PAGE, 0, 6 * PAGE),
        (1, 3): ((3 * 14 + 6) * PAGE, 6 * PAGE, 8 * PAGE),
    }
