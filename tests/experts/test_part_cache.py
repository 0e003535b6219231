"""Parts that adapters bring: an expert is in a group only when all of its parts are here, with however few slots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from argosy import _native
from argosy.experts.cache import ExpertCache, groups
from argosy.experts.files import Key
from argosy.experts.policy import CachePolicy
from tests.experts.fake_store import HIDDEN, WIDTH, FakeFiles, FakeStore, Truth, make_records
from tests.helpers.examples import given_few
from tests.native import _native_testing

NUM_LAYERS, NUM_EXPERTS = 3, 8
LAYERS_WITH_PARTS = (0, 2)
STRIDE = PART_BYTES = 128
Pair = tuple[int, int]  # (expert, adapter)


class Parts:
    """The parts of one adapter, in a file of the store, and where they lie in an arena."""

    def __init__(self, store: FakeStore, file_id: int, content: np.ndarray[Any, Any], num_slots: int) -> None:
        self.arena = arena = _native.Arena(num_slots * STRIDE)
        self.content = content
        self.policy = CachePolicy(num_slots=num_slots, layers=LAYERS_WITH_PARTS, experts_per_token=2)
        self.read = read = list[
            Key
        ]()  # closures must not hold self: native code is not seen by the collector
        begin = self._begin

        def fetch(placed: list[tuple[Key, int]], urgency: str) -> list[int]:
            read.extend(key for key, _ in placed)
            records = [
                (_native.Record([(file_id, begin(key), PART_BYTES, 0)], None), at) for key, at in placed
            ]
            return store.fetch_many(arena, records)

        adapter = _native.ExpertAdapter(arena)
        for layer in LAYERS_WITH_PARTS:
            adapter.add_layer(
                layer,
                format="f32",
                ranks=(1, 0, 0),
                scales=(1.0, 1.0, 1.0),
                hidden=HIDDEN,
                width=WIDTH,
                num_experts=NUM_EXPERTS,
            )
            assert adapter.part_bytes(layer) == PART_BYTES
        self.cache = _native.PartCache(
            _native_testing.ReadsInPython(store, fetch=fetch, bytes_of=lambda key: PART_BYTES),
            self.policy,
            adapter,
            slot_bytes=STRIDE,
            num_parts=len(LAYERS_WITH_PARTS) * NUM_EXPERTS,
        )

    @staticmethod
    def _begin(key: Key) -> int:
        return (LAYERS_WITH_PARTS.index(key[0]) * NUM_EXPERTS + key[1]) * STRIDE

    def check(self, key: Key) -> None:
        """Check that a part's bytes are in its slot."""
        slot, begin = self.policy.slot(key), self._begin(key)
        assert slot is not None
        at = slot * STRIDE
        here = self.arena.array()[at : at + PART_BYTES]
        assert np.array_equal(here, self.content[begin : begin + PART_BYTES])


class Rig:
    """A cache of experts over a fake store, and adapters with some slots each."""

    def __init__(self, *, num_slots: int, part_slots: Sequence[int], **store: Any) -> None:
        keys = [(layer, expert) for layer in range(NUM_LAYERS) for expert in range(NUM_EXPERTS)]
        records, files = make_records(keys, num_pieces=1)
        self.truth = Truth(records, files)
        rng = np.random.default_rng(1)
        contents = [
            rng.integers(0, 256, len(LAYERS_WITH_PARTS) * NUM_EXPERTS * STRIDE, np.uint8) for _ in part_slots
        ]
        files |= {f"parts {i}": content for i, content in enumerate(contents)}
        self.store = FakeStore(files, **store)
        self.cache = ExpertCache(FakeFiles(self.store, records), num_slots=num_slots, experts_per_token=2)
        self.core = self.cache.core
        self.parts = [
            Parts(self.store, i + 1, content, slots)
            for i, (content, slots) in enumerate(zip(contents, part_slots, strict=True))
        ]
        for number, parts in enumerate(self.parts):
            self.core.set_parts(number, parts.cache)

    def run(
        self, layer: int, experts: list[int], pairs: list[Pair], scan: Sequence[int] = ()
    ) -> list[list[int]]:
        """Run one lease to its end; return its groups."""
        self.core.open(layer, experts, list(scan), pairs)
        found = []
        for group in groups(self.cache):
            self.truth.check(self.cache.table, layer, group)
            for expert, adapter in pairs:
                if expert in group and adapter < len(self.parts) and layer in LAYERS_WITH_PARTS:
                    self.parts[adapter].check((layer, expert))
            found.append(list(group))
        self.core.end(is_whole=True)
        self.check_idle()
        return found

    def check_idle(self) -> None:
        """Check that no read is in flight and every slot is available."""
        assert not self.store.in_flight
        for policy in (self.cache.slots.policies[0], *(parts.policy for parts in self.parts)):
            assert not policy.pinned()


leases = st.lists(
    st.tuples(
        st.integers(0, NUM_LAYERS - 1),
        st.lists(st.integers(0, NUM_EXPERTS - 1), min_size=1, unique=True),
        st.sets(st.integers(0, NUM_EXPERTS - 1)),
        st.lists(st.tuples(st.integers(0, NUM_EXPERTS - 1), st.integers(0, 3)), max_size=20),
    ),
    min_size=1,
    max_size=12,
)
slots = st.lists(st.integers(1, 2 * NUM_EXPERTS), min_size=1, max_size=3)


@given_few(leases, st.integers(2, 24), slots, st.integers(0, 1000), few=60, many=300)
def test_every_expert_comes_once_with_its_parts(
    asked: list[tuple[int, list[int], set[int], list[Pair]]], num_slots: int, part_slots: list[int], seed: int
) -> None:
    rig = Rig(num_slots=num_slots, part_slots=part_slots, seed=seed)
    for layer, experts, scan, pairs in asked:
        groups = rig.run(layer, experts, pairs, sorted(scan))
        assert sorted(expert for group in groups for expert in group) == sorted(experts)
        assert all(groups)


@given_few(leases, st.integers(2, 24), slots, st.integers(0, 1000), few=40, many=300)
def test_a_read_that_fails_ends_the_lease_and_leaves_nothing(
    asked: list[tuple[int, list[int], set[int], list[Pair]]], num_slots: int, part_slots: list[int], seed: int
) -> None:
    fails = lambda number: ("no", "io") if number < 100 and number % 7 == seed % 7 else None  # noqa: E731
    rig = Rig(num_slots=num_slots, part_slots=part_slots, seed=seed, fail=fails)
    for layer, experts, scan, pairs in asked:
        while True:  # reads succeed in the end
            try:
                rig.run(layer, experts, pairs, sorted(scan))
                break
            except Exception:
                failed = rig.core.failed_adapter
                assert failed == -1 or failed in {adapter for _, adapter in pairs}
                rig.core.end(is_whole=False)
                rig.check_idle()


@pytest.mark.parametrize("refuse", range(1, 9))
def test_a_read_that_cannot_begin_leaves_nothing(refuse: int) -> None:
    pairs = [(expert, adapter) for expert in range(4) for adapter in range(2)]
    rig = Rig(num_slots=4, part_slots=[8, 8], refuse=refuse)
    with pytest.raises(OSError, match="no"):
        rig.run(0, [0, 1, 2, 3], pairs)
    rig.check_idle()
    rig.run(0, [0, 1, 2, 3], pairs)


def test_reads_of_parts_begin_with_those_of_experts() -> None:
    rig = Rig(num_slots=8, part_slots=[8])
    rig.core.open(0, [0, 1], [], [(0, 0), (1, 0)])
    assert rig.core.num_in_flight == 4
    rig.core.end(is_whole=False)
    rig.check_idle()


def test_parts_stay_for_the_next_lease() -> None:
    rig = Rig(num_slots=8, part_slots=[8, 1])
    pairs = [(0, 0), (1, 0), (1, 1), (2, 1)]
    assert rig.run(0, [0, 1, 2, 3], pairs)
    before = list(rig.parts[0].read)
    assert rig.run(0, [0, 1, 3], pairs)[0] == [0, 3]  # the part of 1 in adapter 1 left for that of 2
    assert rig.parts[0].read == before


def test_a_cache_with_all_experts_does_not_have_all_without_their_parts() -> None:
    rig = Rig(num_slots=NUM_LAYERS * NUM_EXPERTS, part_slots=[2 * NUM_EXPERTS])
    everyone = list(range(NUM_EXPERTS))
    for layer in range(NUM_LAYERS):
        rig.run(layer, everyone, [])
    assert not rig.core.has_all
    for layer in LAYERS_WITH_PARTS:
        rig.run(layer, everyone, [(expert, 0) for expert in everyone])
    assert rig.core.has_all
    rig.core.set_parts(0, None)
    assert rig.core.has_all
    assert rig.run(0, [1], [(1, 0)]) == [[1]]  # an adapter without parts counts for nothing


guesses = st.tuples(
    st.lists(st.integers(0, NUM_EXPERTS - 1), max_size=4, unique=True),
    st.lists(st.tuples(st.integers(0, NUM_EXPERTS - 1), st.integers(0, 3)), max_size=12),
    st.booleans(),
)


def run_guessing(rig: Rig, asked: Any, guess: Any, num_groups: int) -> list[int]:
    """Run a lease in which the experts of the next layer are guessed, at most for some groups; return its experts."""
    layer, experts, scan, pairs = asked
    guessed, guessed_pairs, is_sweep = guess
    rig.core.open(layer, experts, sorted(scan), pairs)
    rig.core.guess(
        (layer + 1) % NUM_LAYERS, [[expert] for expert in guessed], is_sweep=is_sweep, pairs=guessed_pairs
    )
    found: list[int] = []
    for number, group in enumerate(groups(rig.cache)):
        if number == num_groups:
            break
        rig.truth.check(rig.cache.table, layer, group)
        for expert, adapter in pairs:
            if expert in group and adapter < len(rig.parts) and layer in LAYERS_WITH_PARTS:
                rig.parts[adapter].check((layer, expert))
        found += group
    rig.core.end(is_whole=num_groups > len(experts))
    return found


def settle(rig: Rig) -> None:
    rig.core.forget_hint()
    while rig.core.num_early:
        rig.core.collect_early()
    rig.check_idle()


@given_few(
    leases,
    st.lists(guesses, min_size=12, max_size=12),
    st.integers(8, 24),
    slots,
    st.sampled_from([0.0, 0.5, 1.0]),
    st.integers(0, 1000),
    few=80,
    many=500,
)
def test_parts_of_guessed_experts_are_early_late_wrong_or_abandoned_and_always_right(
    asked: Any, guessed: Any, num_slots: int, part_slots: list[int], begun: float, seed: int
) -> None:
    rig = Rig(num_slots=num_slots, part_slots=part_slots, seed=seed, begun=begun, given_up=0.5)
    for number, (lease, guess) in enumerate(zip(asked, guessed, strict=False)):
        most = 1 if number % 4 == seed % 4 else 99
        found = run_guessing(rig, lease, guess, most)
        assert most < 99 or sorted(found) == sorted(lease[1])
        if number % 5 == seed % 5:
            rig.core.set_parts(0, rig.parts[0].cache)  # ends its early reads
    settle(rig)


@given_few(leases, st.lists(guesses, min_size=12, max_size=12), slots, st.integers(0, 1000), few=40, many=300)
def test_a_part_that_fails_in_a_guess_is_harmless(
    asked: Any, guessed: Any, part_slots: list[int], seed: int
) -> None:
    fails = lambda number: ("no", "io") if number < 60 and number % 5 == seed % 5 else None  # noqa: E731
    rig = Rig(num_slots=16, part_slots=part_slots, seed=seed, begun=0.5, given_up=0.5, fail=fails)
    for lease, guess in zip(asked, guessed, strict=False):
        while True:
            try:
                assert sorted(run_guessing(rig, lease, guess, 99)) == sorted(lease[1])
                break
            except Exception:  # of the lease, never of the guess
                assert rig.core.failure is not None
                rig.core.end(is_whole=False)
    settle(rig)


def test_a_guessed_part_is_read_with_its_expert_and_the_lease_takes_it_over() -> None:
    rig = Rig(num_slots=16, part_slots=[16, 16])
    rig.core.open(1, [0], [])
    rig.core.guess(2, [[3], [4]], is_sweep=False, pairs=[(3, 0), (3, 1), (5, 0)])
    assert rig.core.counts.parts_ahead == 2  # 5 is not guessed
    assert rig.core.num_early == 4
    assert rig.core.early == [(2, 3), (2, 4)]
    for group in groups(rig.cache):
        assert group == [0]
    rig.core.end(is_whole=True)
    rig.run(2, [3], [(3, 0), (3, 1)])
    assert rig.core.counts.parts_late == 0
    rig.run(2, [4], [(4, 1)])
    assert rig.core.counts.parts_late == 1
