"""Hints about the experts of the next layer start reads early; a wrong hint costs only the reads."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import strategies as st

from argosy.errors import ReadFailed
from tests.experts.fake_store import MATRIX_BYTES
from tests.experts.test_cache import NUM_EXPERTS, NUM_LAYERS, Rig, all_of
from tests.helpers.examples import given_few

ALL = list(range(NUM_EXPERTS))


def lease_and_expect(
    rig: Rig,
    layer: int,
    experts: list[int],
    scan: set[int],
    hint: tuple[int, list[int]] | None,
    *,
    is_guess: bool = False,
) -> list[int]:
    found: list[int] = []
    with rig.cache.lease(layer, experts, scan) as lease:
        if hint is not None:
            before = len(rig.store.log)
            rig.cache.guess(hint[0], [hint[1][:1], hint[1][1:]], is_sweep=not is_guess)
            assert not {"wait", "cancel"} & {kind for kind, _ in rig.store.log[before:]}, "a hint waited"
        for group in lease:
            rig.check(layer, group)
            found += group
    return sorted(found)


def trusting_rig(**options: Any) -> Rig:
    """Make a rig whose cache reads every guess."""
    rig = Rig(**options)
    rig.cache.core.trust(0.0)
    return rig


def check_all_slots_can_be_had(rig: Rig) -> None:
    trial = rig.cache.slots.policies[0].copy()
    for i in range(trial.num_slots):
        assert trial.admit((0, NUM_EXPERTS + i), is_scan=False) is not None, "a slot is still pinned"


experts = st.lists(st.integers(0, NUM_EXPERTS - 1), min_size=1, unique=True)
steps = st.lists(
    st.tuples(
        st.integers(0, NUM_LAYERS - 1),
        experts,
        st.sets(st.integers(0, NUM_EXPERTS - 1)),
        st.none() | st.tuples(st.integers(0, NUM_LAYERS - 1), experts),
    ),
    min_size=1,
    max_size=12,
)


@given_few(
    steps,
    st.integers(2, NUM_LAYERS * NUM_EXPERTS),
    st.integers(0, 1000),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.sampled_from([0.0, 0.5]),
    st.booleans(),
    few=60,
    many=500,
)
def test_whatever_was_hinted_or_guessed_every_expert_comes_once_with_its_own_bytes(
    asked: list[tuple[int, list[int], set[int], tuple[int, list[int]] | None]],
    num_slots: int,
    seed: int,
    begun: float,
    given_up: float,
    is_guess: bool,
) -> None:
    rig = trusting_rig(num_slots=num_slots, seed=seed, begun=begun, given_up=given_up)
    for layer, wanted, scan, hint in asked:
        found = lease_and_expect(rig, layer, wanted, scan, hint, is_guess=is_guess)
        assert found == sorted(wanted)
        policy = rig.cache.slots
        assert set(rig.cache.core.early) <= policy.resident()
    stats = rig.cache.stats
    assert stats.lookups == sum(len(wanted) for _, wanted, _, _ in asked)
    assert stats.bytes_read % (3 * MATRIX_BYTES) == 0
    assert stats.lookups - stats.hits + stats.idle_reads == stats.bytes_read // (3 * MATRIX_BYTES)
    rig.cache.core.forget_hint()
    while rig.cache.core.early:
        rig.cache.core.collect_early()
    assert not rig.store.in_flight
    check_all_slots_can_be_had(rig)


@given_few(
    steps,
    st.lists(st.integers(2, NUM_LAYERS * NUM_EXPERTS), min_size=1),
    st.integers(0, 1000),
    few=40,
    many=200,
)
def test_the_number_of_slots_may_change_while_reads_of_a_hint_are_in_flight(
    asked: list[tuple[int, list[int], set[int], tuple[int, list[int]] | None]], sizes: list[int], seed: int
) -> None:
    rig = trusting_rig(num_slots=NUM_LAYERS * NUM_EXPERTS, seed=seed, begun=0.5, given_up=0.3)
    for number, (layer, wanted, scan, hint) in enumerate(asked):
        assert lease_and_expect(rig, layer, wanted, scan, hint) == sorted(wanted)
        rig.cache.resize(sizes[number % len(sizes)])
        assert not rig.store.in_flight  # nothing writes to memory that was given back
        check_all_slots_can_be_had(rig)
        for key in rig.cache.slots.resident():
            rig.check(key[0], [key[1]])


def test_the_next_lease_takes_over_the_reads_of_its_hint() -> None:
    for seed in range(10):
        rig = trusting_rig(num_slots=36, seed=seed)
        lease_and_expect(rig, 0, [0, 1, 2], {0, 1, 2}, (1, [3, 4, 5]))
        assert len(rig.store.ahead) == 3
        fetches = rig.store.num_fetches
        assert all_of(rig.run(1, [3, 4, 5])) == [3, 4, 5]
        assert rig.store.num_fetches == fetches
        assert (rig.cache.stats.reads_ahead, rig.cache.stats.hits, rig.cache.stats.idle_reads) == (3, 0, 0)


def test_an_open_lease_reads_all_its_own_experts_before_those_of_the_hint() -> None:
    rig = trusting_rig(num_slots=8, k=2)  # a window of 2
    with rig.cache.lease(0, ALL, ALL) as lease:
        rig.cache.guess(1, [ALL, []], is_sweep=True)
        for group in lease:
            rig.check(0, group)
            if rig.cache.core.is_short_of_slots:
                assert not rig.store.ahead
    assert len(rig.store.ahead) >= 1


def test_a_sweep_over_layers_never_leaves_the_drive_idle_and_reads_nothing_twice() -> None:
    rig = trusting_rig(num_slots=24, k=2, begun=1.0)
    for layer in range(NUM_LAYERS):
        following = (layer + 1, ALL) if layer + 1 < NUM_LAYERS else None
        assert lease_and_expect(rig, layer, ALL, set(ALL), following) == ALL
        if following:
            assert rig.store.in_flight, "nothing is being read between two layers"
    assert rig.store.num_fetches == NUM_LAYERS * NUM_EXPERTS


def test_a_hint_takes_no_more_than_the_window_and_evicts_no_pinned_expert() -> None:
    rig = trusting_rig(num_slots=16, k=2)
    for layer in range(NUM_LAYERS):
        rig.run(layer, [0, 1, 2, 3])
    window = rig.cache.slots.policies[0].window_slots
    with rig.cache.lease(0, [0, 1, 2, 3]) as lease:
        rig.cache.guess(2, [ALL, []], is_sweep=True)
        assert 0 < len(rig.cache.core.early) <= window
        for group in lease:
            rig.check(0, group)
    kept = sum(rig.cache.slots.slot((layer, expert)) is not None for layer in (0, 1) for expert in range(4))
    assert kept >= 8 - window


def test_resident_experts_of_a_hint_stay_until_they_are_requested() -> None:
    rig = trusting_rig(num_slots=8, k=2)  # a window of 2
    rig.run(2, list(range(8)))
    rig.run(1, [0], scan=[0])
    with rig.cache.lease(2, [7]) as lease:
        rig.cache.guess(1, [[0, 1, 2], []], is_sweep=True)
        list(lease)
    assert len(rig.cache.core.early) == 1, "the window has one slot left beside the expert that is there"
    hits = rig.cache.stats.hits
    rig.run(1, [0, 1, 2])
    assert rig.cache.stats.hits - hits == 1


def test_a_hint_is_dropped_without_waiting_when_another_layer_leases_first() -> None:
    rig = trusting_rig(num_slots=24)
    lease_and_expect(rig, 0, [0], set(), (1, [3, 4, 5]))
    assert len(rig.store.in_flight) == 3
    rig.run(2, [7])
    assert not rig.cache.core.early
    assert all(rig.cache.slots.slot((1, expert)) is None for expert in (3, 4, 5))
    assert not {kind for kind, _ in rig.store.log} & {"cancel"}


def test_a_read_of_a_wrong_hint_still_serves_a_later_lease() -> None:
    rig = trusting_rig(num_slots=24, begun=1.0)
    lease_and_expect(rig, 0, [0], set(), (1, [3]))
    while rig.cache.core.early:  # the read has begun, so one of these leases sees it land
        list_of(rig, 2, [7])
    assert rig.cache.stats.idle_reads == 1
    fetches = rig.store.num_fetches
    list_of(rig, 1, [3])
    assert rig.store.num_fetches == fetches


def list_of(rig: Rig, layer: int, wanted: list[int]) -> None:
    assert lease_and_expect(rig, layer, wanted, set(), None) == sorted(wanted)


def test_an_early_read_that_fails_is_reported_only_to_a_lease_that_needs_it() -> None:
    failing = {2, 3}
    rig = trusting_rig(
        num_slots=24, begun=1.0, fail=lambda number: ("broke", "io") if number in failing else None
    )
    lease_and_expect(rig, 0, [0], set(), (1, [3]))
    while rig.cache.core.early:
        list_of(rig, 0, [0])  # no lease needs the failed expert: no error
    lease_and_expect(rig, 0, [0], set(), (1, [3]))
    with pytest.raises(ReadFailed, match="layer 1, expert 3"):
        list_of(rig, 1, [3])
    list_of(rig, 1, [3])
    check_all_slots_can_be_had(rig)


def test_a_hint_whose_reads_cannot_be_started_leaves_nothing_behind() -> None:
    rig = trusting_rig(num_slots=24, refuse=2)
    rig.run(0, [0])
    with rig.cache.lease(0, [0]), pytest.raises(OSError, match="no"):
        rig.cache.guess(1, [[3, 4], []], is_sweep=True)
    rig.check_idle()
    list_of(rig, 1, [3, 4])


def test_closing_ends_early_reads() -> None:
    rig = trusting_rig(num_slots=24, begun=1.0)
    lease_and_expect(rig, 0, [0], set(), (1, ALL))
    assert rig.store.in_flight
    rig.cache.close()
    assert not rig.store.in_flight


def test_a_hint_of_the_same_layer_does_not_disturb_its_lease() -> None:
    rig = trusting_rig(num_slots=6)
    assert lease_and_expect(rig, 0, ALL, set(ALL), (0, ALL)) == ALL
    rig.check_idle()


def test_decode_moves_early_reads_out_of_the_window() -> None:
    rig = trusting_rig(num_slots=8, k=2)
    lease_and_expect(rig, 0, [0, 1], set(), (1, [2, 3]))
    list_of(rig, 1, [2, 3])
    rig.run(2, ALL, scan=ALL)  # a sweep evicts only experts that a sweep brought in
    assert all(rig.cache.slots.slot((1, expert)) is not None for expert in (2, 3))


def test_the_hint_of_a_failed_lease_can_be_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = trusting_rig(num_slots=12, begun=0.5)

    def interrupted(tickets: list[int], block: bool = True) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(rig.store, "wait_any", interrupted)
        with pytest.raises(KeyboardInterrupt):
            lease_and_expect(rig, 0, [0, 1, 2], set(), (1, [4, 5]))
    list_of(rig, 2, [1, 2])
    list_of(rig, 1, [4, 5])


# ── guesses ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_right_guess_is_taken_over_and_made_urgent() -> None:
    rig = trusting_rig(num_slots=24)
    lease_and_expect(rig, 0, [0, 1], set(), (1, [3, 4]), is_guess=True)
    assert len(rig.store.guessed) == 2
    assert all_of(rig.run(1, [3, 5])) == [3, 5]
    assert len(rig.store.hurried) == 1
    assert (rig.cache.stats.reads_ahead, rig.store.num_fetches) == (1, 2 + 2 + 1)


def test_guesses_are_read_from_the_start_and_no_more_once_they_were_wrong_too_often() -> None:
    rig = Rig(num_slots=8, k=2)
    for turn in range(60):
        layer, following = turn % NUM_LAYERS, (turn + 1) % NUM_LAYERS
        wanted = [(3 * turn) % NUM_EXPERTS, (3 * turn + 1) % NUM_EXPERTS]
        right, wrong = (3 * turn + 3) % NUM_EXPERTS, (3 * turn + 5) % NUM_EXPERTS
        with rig.cache.lease(layer, wanted) as lease:
            rig.cache.guess(following, [[right], [wrong]], is_sweep=False)
            list(lease)
        if not turn:
            assert len(rig.store.guessed) == 2
            assert rig.cache.core.is_trusted(1, is_sweep=False)
    assert rig.cache.core.is_trusted(0, is_sweep=False)
    assert not rig.cache.core.is_trusted(1, is_sweep=False)
    assert rig.store.guessed


def test_a_guess_takes_few_slots_and_does_not_evict_guessed_experts() -> None:
    rig = trusting_rig(num_slots=24, k=2)
    for layer in range(NUM_LAYERS):
        rig.run(layer, list(range(8)))  # all slots hold experts that decode used
    before = rig.cache.slots.resident()
    with rig.cache.lease(0, [0, 1]) as lease:
        rig.cache.guess(1, [[0], [8, 9, 10, 11]], is_sweep=False)
        list(lease)
    assert len(before - rig.cache.slots.resident()) <= rig.cache.slots.policies[0].guess_slots
    assert rig.cache.slots.slot((1, 0)) is not None


def test_a_read_dropped_midway_is_repeated_when_it_is_needed_after_all() -> None:
    rig = trusting_rig(num_slots=24, begun=1.0, given_up=1.0)
    lease_and_expect(rig, 0, [0], set(), (1, [3]), is_guess=True)
    rig.cache.core.forget_hint()
    assert all_of(rig.run(1, [3])) == [3]


def test_a_cache_for_a_few_tokens_wants_no_guesses() -> None:
    assert not Rig(num_slots=7, k=2).cache.wants_guess(is_sweep=False)
    # In the first step a larger cache wants a guess, to see how often it is right.
    assert Rig(num_slots=8, k=2).cache.wants_guess(is_sweep=False)
