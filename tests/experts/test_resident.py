"""The resident runner reads every expert once, and from then on only runs it."""

from __future__ import annotations

import pytest

from argosy.errors import CorruptRecord
from argosy.experts.files import ExpertFiles
from argosy.experts.resident import load_resident
from tests.experts.fake_store import RUNTIME, FakeStore, Truth, inputs, make_records

KEYS = [(layer, expert) for layer in (0, 2) for expert in range(50)]  # layer 1 is dense


@pytest.mark.parametrize("num_pieces", [1, 2, 3])
@pytest.mark.parametrize("alignment", [1, 64, 512])
def test_every_expert_is_read_once_and_runs_where_it_lies(num_pieces: int, alignment: int) -> None:
    records, content = make_records(KEYS, num_pieces=num_pieces)
    store = FakeStore(content, alignment=alignment, seed=num_pieces)
    files = ExpertFiles(store, records, open_file=store.open)  # type: ignore[arg-type]
    shares: list[float] = []
    runner = load_resident(
        store,  # type: ignore[arg-type]
        files,
        RUNTIME,
        progress=lambda what, share: shares.append(share),
    )

    assert store.num_fetches == len(KEYS)
    assert not store.in_flight
    assert shares == sorted(shares)
    assert shares[-1] == 1
    truth = Truth(records, content)
    for layer in (0, 2):
        dispatch, rows, out = inputs([7, 3, 49], scan=[3])
        with runner.run(layer, dispatch, rows, out) as groups:
            (group,) = groups
        assert list(group) == [3, 7, 49]
        truth.check_outputs(layer, group, dispatch, out)
        truth.check(runner.resident, layer, range(50))
    assert (runner.stats.lookups, runner.stats.hits, runner.num_resident) == (2 * 53, 2 * 53, len(KEYS))
    assert store.num_fetches == len(KEYS)


def test_a_damaged_expert_is_named_and_stops_the_start_with_no_read_in_flight() -> None:
    records, content = make_records(KEYS, num_pieces=1)
    store = FakeStore(content, fail=lambda number: ("sum differs", "checksum") if number == 60 else None)
    files = ExpertFiles(store, records, open_file=store.open)  # type: ignore[arg-type]
    with pytest.raises(CorruptRecord, match=r"layer 2, expert 9: "):
        load_resident(store, files, RUNTIME)  # type: ignore[arg-type]
    assert not store.in_flight


def test_an_interrupted_start_leaves_no_read_in_flight() -> None:
    records, content = make_records(KEYS, num_pieces=1)
    store = FakeStore(content)
    files = ExpertFiles(store, records, open_file=store.open)  # type: ignore[arg-type]

    def interrupt(what: str, share: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_resident(store, files, RUNTIME, progress=interrupt)  # type: ignore[arg-type]
    assert store.num_fetches > 0
    assert not store.in_flight
