"""Leases of the expert cache, and runs over them: hits come first, each miss as it lands, nothing is left behind."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from argosy.errors import CorruptRecord, ReadFailed
from argosy.experts.cache import CachedRunner, ExpertCache
from argosy.experts.files import Key
from tests.experts.fake_store import MATRIX_BYTES, RUNTIME, FakeFiles, FakeStore, Truth, inputs, make_records
from tests.helpers.examples import given_few

NUM_LAYERS, NUM_EXPERTS = 3, 12


class Rig:
    """A cache over a fake store, and the expected outputs of its experts."""

    def __init__(self, *, num_slots: int, k: int = 2, num_pieces: int = 1, **store: Any) -> None:
        keys = [(layer, expert) for layer in range(NUM_LAYERS) for expert in range(NUM_EXPERTS)]
        self.k = k
        self.records, self.files = make_records(keys, num_pieces=num_pieces)
        self.store = FakeStore(self.files, **store)
        files = FakeFiles(self.store, self.records)
        self.truth = Truth(self.records, self.files)
        self.cache = ExpertCache(files, num_slots=num_slots, experts_per_token=k)

    def run(self, layer: int, experts: list[int], scan: Collection[int] = ()) -> list[list[int]]:
        """Run one whole lease; return its groups."""
        groups = []
        with self.cache.lease(layer, experts, scan) as lease:
            for group in lease:
                self.check(layer, group)
                groups.append(list(group))
        self.check_idle()
        return groups

    def check(self, layer: int, group: Sequence[int]) -> None:
        """Check that every matrix of the group is where the cache's table says."""
        self.truth.check(self.cache.table, layer, group)

    def check_idle(self) -> None:
        """Check that no read is in flight and every slot is available."""
        assert not self.store.in_flight
        trial = self.cache.slots.policies[0].copy()
        for i in range(trial.num_slots):
            assert trial.admit((0, NUM_EXPERTS + i), is_scan=False) is not None, "a slot is still pinned"


def all_of(groups: list[list[int]]) -> list[int]:
    return sorted(expert for group in groups for expert in group)


leases = st.lists(
    st.tuples(
        st.integers(0, NUM_LAYERS - 1),
        st.lists(st.integers(0, NUM_EXPERTS - 1), min_size=1, unique=True),
        st.sets(st.integers(0, NUM_EXPERTS - 1)),
    ),
    min_size=1,
    max_size=12,
)


@given_few(
    leases,
    st.integers(2, NUM_LAYERS * NUM_EXPERTS),
    st.integers(0, 1000),
    st.sampled_from([1, 2, 3]),
    few=30,
    many=150,
)
def test_every_expert_comes_exactly_once_with_its_own_bytes(
    asked: list[tuple[int, list[int], set[int]]], num_slots: int, seed: int, num_pieces: int
) -> None:
    rig = Rig(num_slots=num_slots, seed=seed, num_pieces=num_pieces)
    for layer, experts, scan in asked:
        groups = rig.run(layer, experts, scan)
        assert all_of(groups) == sorted(experts)
        assert all(groups)
    stats = rig.cache.stats
    assert stats.lookups == sum(len(experts) for _, experts, _ in asked)
    assert stats.lookups - stats.hits == rig.store.num_fetches
    assert stats.bytes_read == rig.store.num_fetches * 3 * MATRIX_BYTES


def test_hits_come_first_and_together() -> None:
    for seed in range(20):
        rig = Rig(num_slots=12, seed=seed)
        rig.run(0, [1, 3, 5])
        groups = rig.run(0, [0, 1, 2, 3, 4, 5])
        assert groups[0] == [1, 3, 5]
        assert all_of(groups[1:]) == [0, 2, 4]


def test_closing_waits_for_the_thread_that_commits_memory() -> None:
    class SlowArena:
        def __init__(self) -> None:
            self.closing, self.populated = threading.Event(), 0

        def populate(self, foreground: object = None) -> None:
            self.closing.wait(30)
            self.populated += 1

        def close(self) -> None:
            self.closing.set()

    cache = Rig(num_slots=4).cache
    cache._arena.close()
    cache._arena = arena = SlowArena()  # type: ignore[assignment]
    cache._populate()
    cache._populate()
    cache.close()
    assert arena.populated == 2
    assert "argosy-populate" not in [thread.name for thread in threading.enumerate()]


class Cores:
    """The turns of several models; `others` are in the way when they are taken again."""

    def __init__(self, store: FakeStore, *, others: bool) -> None:
        self._store, self._others = store, others
        self.are_ours = True
        self.in_flight: list[int] = []  # the reads in flight whenever they were taken again

    def release(self) -> None:
        assert self.are_ours
        self.are_ours = False

    def acquire(self) -> bool:
        assert not self.are_ours
        self.are_ours = True
        self.in_flight.append(len(self._store.in_flight))
        return not self._others


@pytest.mark.parametrize("others", [False, True])
def test_a_lease_lends_the_cores_while_it_waits_and_takes_them_seldom_once_others_use_them(
    others: bool,
) -> None:
    rig = Rig(num_slots=8, seed=5)
    rig.cache.lent = cores = Cores(rig.store, others=others)
    kept: list[bool] = []  # whether the cores were kept during a wait
    wait_any = rig.store.wait_any

    def watched(*args: Any) -> list[tuple[int, str | None, str | None]]:
        kept.append(cores.are_ours)
        return wait_any(*args)

    rig.store.wait_any = watched  # type: ignore[method-assign]
    with rig.cache.lease(0, list(range(NUM_EXPERTS))) as lease:
        for group in lease:
            assert cores.are_ours  # experts are computed
            rig.check(0, group)
    assert len(kept) > 2
    assert not any(kept)
    assert cores.in_flight[0] > 0
    assert any(cores.in_flight[1:]) == (not others)
    rig.cache.lent = None
    rig.run(2, [0, 1])
    assert kept[-1]


def test_all_misses_are_issued_before_the_first_wait() -> None:
    rig = Rig(num_slots=12)
    rig.run(0, [1])
    rig.store.log.clear()
    with rig.cache.lease(0, [0, 1, 2, 3]) as lease:
        assert rig.store.log == [("fetch", 3)]  # before the hits are computed
        list(lease)


def test_with_too_few_slots_every_slot_has_a_read_in_flight() -> None:
    rig = Rig(num_slots=4)
    assert all_of(rig.run(1, list(range(12)))) == list(range(12))
    assert rig.store.most_in_flight == 4


def test_experts_that_decode_waits_for_are_read_before_those_of_a_sweep() -> None:
    rig = Rig(num_slots=12)
    fetched = []
    fetch = rig.cache._files.fetch

    def record(arena: Any, experts: list[tuple[Key, int]], **urgency: Any) -> list[int]:
        fetched.extend(key[1] for key, _ in experts)
        return fetch(arena, experts, **urgency)

    rig.cache._files.fetch = record  # type: ignore[method-assign]
    rig.run(0, [0, 1, 2, 3, 4, 5], scan=[0, 1, 3, 4])
    assert fetched == [2, 5, 0, 1, 3, 4]


def test_weights_stay_until_the_next_group_is_requested() -> None:
    for seed in range(20):
        rig = Rig(num_slots=3, k=1, seed=seed)
        rig.run(0, [0, 1, 2])
        with rig.cache.lease(0, list(range(12))) as lease:
            for group in lease:
                rig.check(0, group)
                if rig.store.in_flight:  # reads in flight land elsewhere
                    results = rig.store.wait_any(list(rig.store.in_flight))
                    rig.check(0, group)
                    _put_back(rig.store, results)


def _put_back(store: FakeStore, results: list[tuple[int, str | None, str | None]]) -> None:
    """Let the next wait find reads that landed early."""
    early = {ticket for ticket, _, _ in results}
    wait_any = store.wait_any

    def wait(tickets: list[int]) -> list[tuple[int, str | None, str | None]]:
        landed = [(ticket, None, None) for ticket in tickets if ticket in early]
        if landed:
            early.difference_update(ticket for ticket, _, _ in landed)
            return list(landed)
        return wait_any(tickets)

    store.wait_any = wait  # type: ignore[method-assign]


def run_and_check(rig: Rig, layer: int, experts: list[int], scan: Collection[int] = ()) -> list[list[int]]:
    """Run experts and check that outputs are written when their experts are yielded, and no sooner."""
    dispatch, rows, out = inputs(experts, scan)
    groups: list[list[int]] = []
    with CachedRunner(RUNTIME, rig.cache).run(layer, dispatch, rows, out) as run:
        assert np.isnan(out).all()
        for group in run:
            groups.append(list(group))
            rig.truth.check_outputs(layer, group, dispatch, out)
            done = [row for expert in all_of(groups) for row in dispatch.assignments(expert)]
            assert np.isnan(np.delete(out, done, axis=0)).all()
    rig.check_idle()
    return groups


@given_few(leases, st.integers(2, NUM_LAYERS * NUM_EXPERTS), st.integers(0, 1000), few=25, many=100)
def test_a_run_writes_the_outputs_of_every_expert_once(
    asked: list[tuple[int, list[int], set[int]]], num_slots: int, seed: int
) -> None:
    rig = Rig(num_slots=num_slots, seed=seed)
    for layer, experts, scan in asked:
        assert all_of(run_and_check(rig, layer, experts, scan)) == sorted(experts)
    assert rig.cache.stats.compute_s > 0


def test_a_run_starts_its_reads_on_entry_and_ends_them_on_exit() -> None:
    rig = Rig(num_slots=6)
    runner = CachedRunner(RUNTIME, rig.cache)
    run = runner.run(0, *inputs([0, 1, 2]))
    assert not rig.store.log
    with run as groups:
        assert rig.store.log == [("fetch", 3)]
        next(iter(groups))
    rig.check_idle()


def test_a_run_whose_read_fails_can_be_retried() -> None:
    for fails in (1, 2, 4):
        rig = Rig(
            num_slots=6, fail=lambda number, fails=fails: ("it broke", "io") if number == fails else None
        )
        with pytest.raises(ReadFailed, match="layer 1, expert"):
            run_and_check(rig, 1, [0, 3, 5, 8])
        rig.check_idle()
        assert all_of(run_and_check(rig, 1, [0, 3, 5, 8])) == [0, 3, 5, 8]


def interrupt(rig: Rig, stop_after: int) -> None:
    with rig.cache.lease(0, list(range(10))) as lease:
        for _ in itertools.islice(lease, stop_after):
            pass
        raise KeyboardInterrupt


@pytest.mark.parametrize("stop_after", [0, 1, 2])
def test_an_interrupted_lease_leaves_no_read_in_flight_and_no_slot_taken(stop_after: int) -> None:
    for seed in range(20):
        rig = Rig(num_slots=6, seed=seed)
        rig.run(0, [0, 1])
        with pytest.raises(KeyboardInterrupt):
            interrupt(rig, stop_after)
        rig.check_idle()
        assert all_of(rig.run(0, list(range(10)))) == list(range(10))


def test_an_interrupt_while_waiting_leaves_no_read_in_flight() -> None:
    rig = Rig(num_slots=6)
    wait_any = rig.store.wait_any

    def interrupted(tickets: list[int]) -> Any:
        raise KeyboardInterrupt

    rig.store.wait_any = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt), rig.cache.lease(0, [0, 1, 2]) as lease:
        list(lease)
    rig.check_idle()
    rig.store.wait_any = wait_any  # type: ignore[method-assign]
    assert all_of(rig.run(0, [0, 1, 2])) == [0, 1, 2]


@pytest.mark.parametrize(
    ("kind", "error"), [("io", ReadFailed), ("short", ReadFailed), ("checksum", CorruptRecord)]
)
@pytest.mark.parametrize("fails", [1, 2, 3, 5])
def test_a_failed_read_is_named_and_the_cache_continues(
    kind: str, error: type[Exception], fails: int
) -> None:
    for seed in range(20):
        rig = Rig(num_slots=6, seed=seed, fail=lambda number: ("it broke", kind) if number == fails else None)
        with pytest.raises(error, match=r"experts\.bin: layer 2, expert \d+: .*it broke") as raised:
            rig.run(2, [0, 3, 4, 5, 8])
        failed = raised.value.facts["expert"]  # type: ignore[attr-defined]
        assert raised.value.facts["layer"] == 2  # type: ignore[attr-defined]
        rig.check_idle()
        assert rig.cache.slots.slot((2, failed)) is None
        assert all_of(rig.run(2, [0, 3, 4, 5, 8])) == [0, 3, 4, 5, 8]


def test_every_read_failing_at_once_still_leaves_a_usable_cache() -> None:
    broken = True
    rig = Rig(num_slots=6, fail=lambda number: ("no", "io") if broken else None)
    for _ in range(5):
        with pytest.raises(ReadFailed):
            rig.run(0, [0, 1, 2, 3])
        rig.check_idle()
        assert not rig.cache.slots.resident()
    broken = False
    rig.run(0, [0, 1, 2, 3])


@pytest.mark.parametrize("refused", [1, 3, 8])
def test_a_read_that_cannot_be_started_leaves_nothing_behind(refused: int) -> None:
    """The first two reads are refused as the lease opens, the last while it is iterated."""
    for seed in range(10):
        rig = Rig(num_slots=6, seed=seed, refuse=refused)
        with pytest.raises(OSError, match="no"):
            rig.run(0, list(range(10)))
        rig.check_idle()
        assert all_of(rig.run(0, list(range(10)))) == list(range(10))


def test_a_lease_that_was_never_opened_holds_nothing() -> None:
    rig = Rig(num_slots=4)
    rig.run(0, [0, 1])
    rig.cache.lease(0, [0, 1, 2])
    rig.check_idle()
    assert rig.cache.stats.lookups == 2


def test_a_sweep_that_finds_many_prefetched_experts_frees_slots_before_all_are_computed() -> None:
    rig = Rig(num_slots=40, k=2)
    everyone = list(range(NUM_EXPERTS))
    with rig.cache.lease(0, everyone, everyone) as lease:
        for number, group in enumerate(lease):
            rig.check(0, group)
            assert len(group) <= 8
            if number == 2:
                break  # experts that have landed but were not yielded are also released
    rig.check_idle()
