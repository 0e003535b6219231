"""Which expert is in which slot, and which one is evicted next."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator

from hypothesis import strategies as st

from argosy.experts.files import Key
from argosy.experts.policy import CachePolicy
from tests.helpers.examples import given_few

Asked = tuple[int, list[int], bool]  # layer, experts, is_scan


def lease(policy: CachePolicy, layer: int, experts: Iterable[int], *, is_scan: bool = False) -> int:
    """Request experts as a lease does: pin hits, admit misses, unpin computed experts; return the number of hits."""
    if not is_scan:
        policy.begin(layer)
    held, missing = policy.find(layer, list(experts))
    num_hits = len(held)
    policy.use(layer, held, is_scan=is_scan)
    while missing:
        while missing and policy.admit((layer, missing[0]), is_scan=is_scan) is not None:
            held.append(missing.pop(0))
        assert held, "no slot is to be had although nothing is pinned"
        policy.unpin(layer, held)
        held = []
    policy.unpin(layer, held)
    return num_hits


def decode(policy: CachePolicy, token: list[list[int]]) -> None:
    for layer, experts in enumerate(token):
        lease(policy, layer, experts)


def sweep(policy: CachePolicy, *, num_layers: int, num_experts: int) -> None:
    for layer in range(num_layers):
        lease(policy, layer, range(num_experts), is_scan=True)


def oldest_first(policy: CachePolicy, *, floor: int, asking_layer: int | None = None) -> Iterator[Key]:
    """The experts in the order in which they are evicted, by exhaustive search; nothing may be pinned.

    First those in the window, then the oldest above its layer's floor; of equally old ones, that of the layer with the
    latest turn. When every layer is at its floor, the oldest of all.
    """
    yield from policy.window()
    ages = policy.ages()
    while ages:
        counts = Counter(key[0] for _, _, key, _ in ages)
        above = [one for one in ages if one[2][0] == asking_layer or counts[one[2][0]] > floor]
        first = max(above or ages, key=lambda one: (one[0], one[1], -one[2][0], -one[2][1]))
        ages.remove(first)
        yield first[2]


def evicted_next(policy: CachePolicy, *, num_slots: int, num_layers: int) -> set[Key]:
    """The experts beyond `num_slots` that misses of decode evict, if they come in a layer of their own."""
    floor = min(policy.guess_slots, num_slots // num_layers)
    beyond = max(0, policy.num_resident - num_slots)
    return set(itertools.islice(oldest_first(policy, floor=floor), beyond))


def check(policy: CachePolicy, pinned: dict[Key, int]) -> None:
    resident = policy.resident()
    assert len(set(resident)) == len(resident)
    slots = {key: policy.slot(key) for key in resident}
    assert len(set(slots.values())) == len(resident), "two experts in one slot"
    assert all(slot is not None and 0 <= slot < policy.num_slots for slot in slots.values())
    for key, slot in pinned.items():
        assert slots[key] == slot, f"{key} was pinned in slot {slot}"


# Layers, experts, experts per token.
sizes = st.tuples(st.integers(1, 4), st.integers(1, 12), st.integers(1, 4))


@st.composite
def histories(draw: st.DrawFn) -> tuple[int, int, int, int, list[Asked]]:
    num_layers, num_experts, k = draw(sizes)
    k = min(k, num_experts)
    num_slots = draw(st.integers(k, num_layers * num_experts))
    experts = st.lists(st.integers(0, num_experts - 1), min_size=1, unique=True)
    asked = st.lists(st.tuples(st.integers(0, num_layers - 1), experts, st.booleans()), max_size=40)
    return num_layers, num_experts, k, num_slots, draw(asked)


@given_few(histories(), st.data(), few=40, many=200)
def test_a_pinned_expert_keeps_its_slot_and_no_slot_holds_two(
    history: tuple[int, int, int, int, list[Asked]], data: st.DataObject
) -> None:
    num_layers, _, k, num_slots, asked = history
    policy = CachePolicy(num_slots=num_slots, layers=range(num_layers), experts_per_token=k)
    pinned: dict[Key, int] = {}
    for layer, experts, is_scan in asked:
        if not is_scan:
            policy.begin(layer)
        for expert in experts:
            key = (layer, expert)
            slot = policy.slot(key)
            if slot is not None:
                policy.use(layer, [expert], is_scan=is_scan)
                pinned[key] = slot
            elif (slot := policy.admit(key, is_scan=is_scan)) is not None:
                pinned[key] = slot
                if data.draw(st.integers(0, 9)) == 0:  # its bytes never arrive
                    policy.drop(key)
                    del pinned[key]
                    assert policy.slot(key) is None
            check(policy, pinned)
        for key in data.draw(st.permutations(sorted(pinned)))[: data.draw(st.integers(0, len(pinned)))]:
            policy.unpin(key[0], [key[1]])
            del pinned[key]
        check(policy, pinned)


@given_few(histories(), few=40, many=200)
def test_any_number_of_experts_passes_through_any_number_of_slots(
    history: tuple[int, int, int, int, list[Asked]],
) -> None:
    num_layers, _, k, num_slots, asked = history
    policy = CachePolicy(num_slots=num_slots, layers=range(num_layers), experts_per_token=k)
    for layer, experts, is_scan in asked:
        lease(policy, layer, experts, is_scan=is_scan)
        check(policy, {})
    assert len(policy.resident()) <= num_slots


@given_few(histories(), st.lists(st.integers(1, 48), min_size=1), few=40, many=200)
def test_the_number_of_slots_may_change_between_leases(
    history: tuple[int, int, int, int, list[Asked]], sizes: list[int]
) -> None:
    num_layers, _, k, num_slots, asked = history
    policy = CachePolicy(num_slots=num_slots, layers=range(num_layers), experts_per_token=k)
    for number, (layer, experts, is_scan) in enumerate(asked):
        before = {key: policy.slot(key) for key in policy.resident()}
        num_slots = max(k, sizes[number % len(sizes)])
        next_to_go = evicted_next(policy, num_slots=num_slots, num_layers=num_layers)
        held = num_slots + number % 3
        policy.resize(num_slots)
        moves = policy.moves(max(held, num_slots))
        kept = {key: slot for key, slot in before.items() if key not in next_to_go}
        moved = {key: to for key, _, to in moves}
        assert set(policy.resident()) == kept.keys()
        assert {key: slot for key, slot, _ in moves} == {
            key: slot for key, slot in kept.items() if slot is not None and slot >= held
        }
        assert all(slot < num_slots for slot in moved.values())
        assert {key: policy.slot(key) for key in kept} == kept | moved
        assert not set(moved.values()) & {slot for key, slot in kept.items() if key not in moved}
        lease(policy, layer, experts, is_scan=is_scan)
        if number % 2:
            for key in sorted(policy.resident())[:2]:  # their bytes never arrived
                policy.drop(key)
        assert policy.num_resident == len(policy.resident()) <= num_slots
        policy.moves(num_slots)
        check(policy, {})
        new = CachePolicy(num_slots=num_slots, layers=range(num_layers), experts_per_token=k)
        assert (policy.floor, policy.window_slots) == (new.floor, new.window_slots)
    trial = [policy.admit((0, 1000 + i), is_scan=False) for i in range(num_slots)]
    assert sorted(slot for slot in trial if slot is not None) == list(range(num_slots))


@given_few(histories(), few=40, many=200)
def test_slots_are_filled_before_any_expert_is_evicted(
    history: tuple[int, int, int, int, list[Asked]],
) -> None:
    num_layers, _, k, num_slots, asked = history
    policy = CachePolicy(num_slots=num_slots, layers=range(num_layers), experts_per_token=k)
    seen: set[Key] = set()
    for layer, experts, is_scan in asked:
        lease(policy, layer, experts, is_scan=is_scan)
        seen |= {(layer, expert) for expert in experts}
        assert len(policy.resident()) == policy.num_resident == min(num_slots, len(seen))


def test_the_least_recently_used_expert_is_evicted_first() -> None:
    policy = CachePolicy(num_slots=4, layers=range(1), experts_per_token=1)
    for expert in (0, 1, 2, 3, 0, 1):
        lease(policy, 0, [expert])
    lease(policy, 0, [4])
    assert set(policy.resident()) == {(0, 0), (0, 1), (0, 3), (0, 4)}


def test_experts_used_more_often_stay_longer() -> None:
    policy = CachePolicy(num_slots=3, layers=range(1), experts_per_token=1)
    for expert in (0, 0, 0, 0, 1, 2, 3):
        lease(policy, 0, [expert])
    assert set(policy.resident()) == {(0, 0), (0, 2), (0, 3)}
    for expert in range(4, 30):  # uses long ago count little
        lease(policy, 0, [expert])
    assert (0, 0) not in policy.resident()


def test_uses_are_remembered_after_an_expert_is_evicted() -> None:
    policy = CachePolicy(num_slots=2, layers=range(1), experts_per_token=1)
    for expert in (0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8):
        lease(policy, 0, [expert])
    assert (0, 0) not in policy.resident()
    for expert in (0, 9, 10, 11):
        lease(policy, 0, [expert])
    assert (0, 0) in policy.resident()


def test_age_counts_the_turns_of_an_experts_own_layer() -> None:
    policy = CachePolicy(num_slots=6, layers=range(2), experts_per_token=1)
    for expert in range(3):
        lease(policy, 1, [expert])
    for expert in range(3):
        lease(policy, 0, [expert])
    for _ in range(6):
        lease(policy, 1, [2])
    lease(policy, 1, [3])  # layer 0 has had no turn since its last expert was used
    assert {(0, 0), (0, 1), (0, 2), (1, 2), (1, 3)} < set(policy.resident())


def test_of_two_equally_old_experts_the_one_whose_layer_comes_last_is_evicted() -> None:
    policy = CachePolicy(num_slots=8, layers=range(4), experts_per_token=1)
    for expert in (0, 1):
        decode(policy, [[expert]] * 4)
    lease(policy, 0, [2])  # layers 1, 2 and 3 come before layer 0 again
    assert (0, 0) not in policy.resident()
    lease(policy, 1, [2])
    assert (0, 1) not in policy.resident() or (1, 0) not in policy.resident()
    for layer in (2, 3):
        assert lease(policy, layer, [0, 1]) == 2


@given_few(histories(), few=40, many=200)
def test_the_evicted_expert_is_the_oldest_by_exhaustive_search(
    history: tuple[int, int, int, int, list[Asked]],
) -> None:
    num_layers, _, k, num_slots, asked = history
    policy = CachePolicy(num_slots=num_slots, layers=range(num_layers), experts_per_token=k)
    for layer, experts, _ in asked:
        policy.begin(layer)
        for expert in experts:
            key, before = (layer, expert), set(policy.resident())
            if policy.slot(key) is not None:
                policy.use(layer, [expert], is_scan=False)
                policy.unpin(layer, [expert])
                continue
            expected = set[Key]()
            if len(before) == num_slots:
                expected = {next(oldest_first(policy, floor=policy.floor, asking_layer=layer))}
            policy.admit(key, is_scan=False)
            policy.unpin(layer, [expert])
            assert before - set(policy.resident()) == expected


def test_decode_that_fits_the_cache_never_misses_again() -> None:
    policy = CachePolicy(num_slots=12, layers=range(3), experts_per_token=2)
    tokens = [[[0, 1], [2, 3], [4, 5]], [[6, 1], [2, 7], [0, 5]]]
    for token in tokens:
        decode(policy, token)
    for token in tokens * 3:
        for layer, experts in enumerate(token):
            assert lease(policy, layer, experts) == 2


def test_with_fewer_slots_the_experts_stay_that_are_used_most() -> None:
    policy = CachePolicy(num_slots=24, layers=range(2), experts_per_token=2)
    for number in range(8):  # 0 and 1 in every token, and each of the others once
        decode(policy, [[0, 1, 2 + number]] * 2)
    lease(policy, 0, [20, 21, 22, 23], is_scan=True)
    assert policy.num_resident == 24
    slots = {key: policy.slot(key) for key in policy.resident()}
    policy.resize(20)
    assert policy.moves(20) == []  # the experts that were only swept in had the last slots
    assert not set(policy.resident()) & {(0, expert) for expert in (20, 21, 22, 23)}
    policy.resize(6)
    assert len(policy.moves(20)) == 0
    moves = policy.moves(10) + policy.moves(6)
    assert set(policy.resident()) == {(layer, expert) for layer in range(2) for expert in (0, 1, 9)}
    assert {key for key, _, _ in moves} == {key for key in policy.resident() if slots[key] >= 6}


def test_an_expert_that_is_being_read_stays_while_slots_go() -> None:
    policy = CachePolicy(num_slots=6, layers=range(1), experts_per_token=2)
    assert policy.admit((0, 5), is_scan=True) == 0  # its read has begun
    lease(policy, 0, [0, 1, 2, 3, 4])
    policy.resize(2)
    assert set(policy.resident()) == {(0, 4), (0, 5)}
    assert policy.moves(2) == [((0, 4), 5, 1)]
    policy.unpin(0, [5])
    policy.resize(1)
    assert policy.moves(1) == [((0, 4), 1, 0)]


def test_a_layer_keeps_its_share_while_others_request_experts() -> None:
    policy = CachePolicy(num_slots=8, layers=range(4), experts_per_token=2)
    decode(policy, [[0, 1]] * 4)
    for expert in range(2, 40):
        lease(policy, 3, [expert])
    for layer in range(3):
        assert lease(policy, layer, [0, 1]) == 2


def test_with_fewer_slots_than_one_token_needs_there_are_still_hits() -> None:
    num_layers, k = 8, 4
    policy = CachePolicy(num_slots=num_layers * k // 2, layers=range(num_layers), experts_per_token=k)
    hits = 0
    for _ in range(20):
        for layer in range(num_layers):
            hits += lease(policy, layer, range(k))
    assert hits > 0  # a plain global LRU evicts each expert just before it is needed again


def test_a_sweep_leaves_three_quarters_of_what_decode_uses() -> None:
    num_layers, num_experts, k = 6, 64, 4
    policy = CachePolicy(num_slots=96, layers=range(num_layers), experts_per_token=k)
    for start in range(0, 16, k):  # 16 experts of each layer fill the slots
        decode(policy, [list(range(start, start + k))] * num_layers)
    used = set(policy.resident())
    assert len(used) == 96
    for _ in range(3):
        sweep(policy, num_layers=num_layers, num_experts=num_experts)
        assert len(used & set(policy.resident())) >= 72


def test_a_sweep_takes_slots_only_once() -> None:
    num_layers, num_experts = 6, 64
    policy = CachePolicy(num_slots=96, layers=range(num_layers), experts_per_token=4)
    for start in range(0, 16, 4):
        decode(policy, [list(range(start, start + 4))] * num_layers)
    sweep(policy, num_layers=num_layers, num_experts=num_experts)
    left = {key for key in policy.resident() if key[1] < 16}
    sweep(policy, num_layers=num_layers, num_experts=num_experts)
    assert left <= set(policy.resident())


def test_a_second_sweep_hits_the_experts_that_the_first_left() -> None:
    policy = CachePolicy(num_slots=32, layers=range(4), experts_per_token=2)
    sweep(policy, num_layers=4, num_experts=16)
    hits = sum(lease(policy, layer, range(16), is_scan=True) for layer in range(4))
    assert hits >= 24  # of 64 lookups with 32 slots; plain LRU would have no hits


def test_a_sweep_does_not_make_an_expert_younger() -> None:
    policy = CachePolicy(num_slots=4, layers=range(1), experts_per_token=1)
    for expert in range(4):
        lease(policy, 0, [expert])
    lease(policy, 0, [0], is_scan=True)
    lease(policy, 0, [4])
    assert (0, 0) not in policy.resident()


def test_decode_takes_back_the_slots_that_a_sweep_took() -> None:
    policy = CachePolicy(num_slots=16, layers=range(1), experts_per_token=2)
    lease(policy, 0, range(16))
    lease(policy, 0, range(16, 64), is_scan=True)
    kept = {key for key in policy.resident() if key[1] < 16}
    assert len(kept) == 12
    lease(policy, 0, [64, 65, 66, 67])
    assert kept <= set(policy.resident())


def test_an_expert_that_never_arrived_gives_its_slot_to_the_next() -> None:
    policy = CachePolicy(num_slots=1, layers=range(1), experts_per_token=1)
    slot = policy.admit((0, 3), is_scan=False)
    assert policy.admit((0, 4), is_scan=False) is None
    policy.drop((0, 3))
    assert policy.slot((0, 3)) is None
    assert policy.admit((0, 4), is_scan=False) == slot
