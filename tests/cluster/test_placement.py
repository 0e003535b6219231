"""Owners of experts: shares, stability, and who runs what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from argosy._native import Owner, Owners
from argosy.checkpoint.shards import ALL_SHARDS, NUM_SHARDS, shard_of, shards_of_share
from argosy.cluster.placement import Host, allot, place, weights

GB = 10**9
LAYERS, EXPERTS = range(1, 13), 128


def host(name: str, cache: float = 50, drive: float = 2.0, shards: int = ALL_SHARDS) -> Host:
    return Host(name=name, cache_bytes=int(cache * GB), disk_bytes_per_s=drive * GB, shards=shards)


def owners_of(hosts: Sequence[Host], replicas: int = 2) -> dict[tuple[int, int], list[str]]:
    placed = place(hosts, LAYERS, num_experts=EXPERTS, expert_bytes=1000 * GB, replicas=replicas)
    return {
        (layer, expert): [hosts[i].name for i in row if i >= 0]
        for layer, table in placed.items()
        for expert, row in enumerate(table.tolist())
    }


def test_shards_have_equally_many_experts_of_a_layer() -> None:
    for layer in LAYERS:
        counts = Counter(shard_of(layer, expert) for expert in range(EXPERTS))
        assert set(counts.values()) == {EXPERTS // NUM_SHARDS}


def test_every_expert_has_as_many_different_owners_as_asked_for() -> None:
    hosts = [host(f"h{i}") for i in range(4)]
    for replicas in (1, 2, 3):
        found = owners_of(hosts, replicas)
        assert {len(set(names)) for names in found.values()} == {replicas}
    assert {len(names) for names in owners_of(hosts[:1], 2).values()} == {1}  # there is no second


def test_a_host_that_leaves_moves_only_the_experts_that_it_owned() -> None:
    hosts = [host(f"h{i}") for i in range(5)]
    before, after = owners_of(hosts), owners_of(hosts[:-1])
    for key, names in before.items():
        if "h4" not in names:
            assert after[key] == names
        else:
            kept = [name for name in names if name != "h4"]
            assert [name for name in after[key] if name in kept] == kept
    assert sum("h4" in names for names in before.values()) > 0


def test_the_order_of_hosts_does_not_matter() -> None:
    hosts = [host(f"h{i}") for i in range(4)]
    assert owners_of(hosts) == owners_of(hosts[::-1])


def test_a_share_is_what_a_host_keeps_and_its_part_of_what_nobody_keeps() -> None:
    slow, fast = host("slow", cache=100, drive=1), host("fast", cache=100, drive=3)
    shares = weights([slow, fast], 1000 * GB)
    assert shares == pytest.approx([0.1 + 0.8 / 4, 0.1 + 0.8 * 3 / 4])
    # At these shares both need the same time for the bytes that they read.
    times = [(share * 1000 - 100) / drive for share, drive in zip(shares, (1, 3), strict=True)]
    assert times[0] == pytest.approx(times[1])


def test_hosts_that_keep_everything_share_by_memory() -> None:
    assert weights([host("a", cache=600), host("b", cache=1800)], 1000 * GB) == pytest.approx([0.375, 0.625])


def test_a_drive_of_which_nothing_is_known_counts_as_the_usual_one() -> None:
    shares = weights([host("a", drive=0), host("b", drive=2), host("c", drive=4)], 1000 * GB)
    assert shares[0] == pytest.approx(1 / 3)


def test_first_owners_follow_the_weights() -> None:
    hosts = [host("small", cache=100, drive=1), host("large", cache=100, drive=3)]
    first = Counter(names[0] for names in owners_of(hosts).values())
    expected = weights(hosts, 1000 * GB)[1]
    assert first["large"] / (len(LAYERS) * EXPERTS) == pytest.approx(expected, abs=0.03)


def test_only_hosts_with_the_files_of_a_shard_own_its_experts() -> None:
    even = sum(1 << shard for shard in range(0, NUM_SHARDS, 2))
    hosts = [host("even", shards=even), host("odd", shards=ALL_SHARDS ^ even)]
    for (layer, expert), names in owners_of(hosts).items():
        assert names == (["even"] if shard_of(layer, expert) % 2 == 0 else ["odd"])


def owner(name: str, *, drive: float = 1e9, has: Sequence[int] = (), peer: int | None = 1) -> Owner:
    """A worker whose experts take 1 ms in memory, and 10 ms more from a drive of 1 GB/s."""
    found = Owner(name)
    found.set_rates(10**7, drive)
    found.remember(3, num_layers=2, num_experts=8)
    found.note(0, has)
    found.peer = peer
    return found


def table_of(hosts: Sequence[Owner], owners: Sequence[int] = (0, 1), here: Owner | None = None) -> Owners:
    """Eight experts, each owned by the same hosts."""
    return Owners(hosts, np.tile(np.array(owners, np.int16), (2, 8, 1)), here)


def chosen(owners: Owners, experts: Sequence[int]) -> Mapping[str, list[int]]:
    return {one.name: given for one, given in owners.choose(0, experts)}


def test_a_remembered_expert_is_forgotten_when_others_took_its_slot() -> None:
    worker = owner("a", has=[1, 2, 3])
    worker.note(0, [1, 4])
    assert [worker.has(0, expert) for expert in (1, 2, 3, 4)] == [True, False, True, True]
    worker.note(1, [1])
    assert [worker.has(0, expert) for expert in (1, 2, 3, 4)] == [True, False, False, True]
    assert worker.has(1, 1)
    assert worker.num_remembered == 3
    worker.forget()
    assert worker.num_remembered == 0
    assert not worker.has(0, 1)
    worker.note(0, [9])  # no expert of this model
    worker.note(7, [1])
    assert worker.num_remembered == 0


def test_a_worker_that_keeps_everything_has_every_expert() -> None:
    worker = Owner("a")
    assert not worker.has(0, 3)
    worker.is_resident = True
    assert worker.has(0, 3)


def test_the_owner_that_has_an_expert_in_memory_runs_it() -> None:
    hosts = [owner("a"), owner("b", has=[1, 2, 3])]
    assert chosen(table_of(hosts), [1, 2, 3]) == {"b": [1, 2, 3]}


def test_misses_go_where_the_queue_is_shorter() -> None:
    assert chosen(table_of([owner("a"), owner("b")]), [1, 2, 3, 4]) == {"a": [1, 3], "b": [2, 4]}


def test_a_faster_drive_gets_more_misses() -> None:
    hosts = [owner("a", drive=0.5e9), owner("b", drive=1e9)]
    assert {name: len(experts) for name, experts in chosen(table_of(hosts), range(6)).items()} == {
        "a": 2,
        "b": 4,
    }


def test_an_expert_without_an_owner_is_left_to_the_caller() -> None:
    hosts = [owner("a")]
    table = np.full((2, 8, 1), -1, np.int16)
    table[0, 1] = 0
    assert chosen(Owners(hosts, table), [1, 2]) == {"a": [1]}


def test_an_owner_that_is_expected_to_answer_in_time_is_asked_before_this_machine_and_that_before_a_slow_one() -> (
    None
):
    slow, away, aside, usable = (owner(name) for name in ("slow", "away", "aside", "usable"))
    here = owner("here", peer=None)
    slow.is_slow, away.peer, aside.is_set_aside = True, None, True
    hosts = [slow, away, aside, usable, here]
    everyone = table_of(hosts, (0, 1, 2, 3), here)
    assert everyone.candidates(0, 1, []) == [usable]
    assert everyone.candidates(0, 1, [usable]) == [here]
    assert everyone.candidates(0, 1, [usable, here]) == [slow]
    assert table_of(hosts[:-1], (0, 1, 2)).candidates(0, 1, []) == [slow]
    assert table_of(hosts[:-1], (1, 2)).candidates(0, 1, []) == []
    assert everyone.owners_of(0, 1) == [slow, away, aside, usable]
    assert [everyone.is_usable(one) for one in hosts] == [False, False, False, True, True]


@pytest.mark.parametrize(
    "change",
    [
        {"table": np.zeros((2, 8), np.int16)},
        {"table": np.zeros((2, 8, 1), np.int32)},
        {"table": np.full((2, 8, 1), 2, np.int16)},
        {"table": np.full((2, 8, 1), -2, np.int16)},
        {"hosts": [None]},
    ],
)
def test_a_table_of_owners_names_hosts_that_there_are(change: dict[str, object]) -> None:
    arguments = {"hosts": [owner("a"), owner("b")], "table": np.zeros((2, 8, 1), np.int16), "here": None}
    Owners(**arguments)  # type: ignore[arg-type]
    with pytest.raises((ValueError, TypeError)):
        Owners(**(arguments | change))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not among the hosts"):
        table_of([owner("a"), owner("b")], here=Owner("a stranger"))
    for layer, expert in ((2, 0), (0, 8), (-1, 0), (0, -1)):
        with pytest.raises(ValueError, match="has no expert"):
            table_of([owner("a"), owner("b")]).choose(layer, [expert])


def test_every_shard_is_allotted_to_as_many_hosts_as_asked_for_by_their_weights() -> None:
    hosts = [host("small", cache=20), host("large", cache=60), host("larger", cache=80)]
    for replicas in (1, 2):
        masks = allot(hosts, expert_bytes=160 * GB, replicas=replicas)
        for shard in range(NUM_SHARDS):
            assert sum(mask >> shard & 1 for mask in masks) == replicas
    counts = [mask.bit_count() for mask in allot(hosts, expert_bytes=160 * GB, replicas=1)]
    assert counts == sorted(counts)
    assert counts[0] == pytest.approx(NUM_SHARDS / 8, abs=6)


def test_a_host_is_allotted_only_shards_that_it_can_have_and_others_take_its_place() -> None:
    first = shards_of_share(1, 2)
    masks = allot([host("some", shards=first), host("a"), host("b")], expert_bytes=1000 * GB, replicas=2)
    assert masks[0] & ~first == 0
    assert masks[1] & masks[2] & ~first == ALL_SHARDS ^ first  # what `some` cannot have has the other two


def test_a_further_host_takes_over_shards_and_gives_nobody_new_ones() -> None:
    hosts = [host(f"h{i}") for i in range(4)]
    before = allot(hosts[:3], expert_bytes=1000 * GB, replicas=2)
    after = allot(hosts, expert_bytes=1000 * GB, replicas=2)
    assert all(later & ~mask == 0 for later, mask in zip(after, before, strict=False))
    assert 0 < after[3].bit_count() < NUM_SHARDS
