"""The resident source: every expert is read once, and then only looked up."""

from __future__ import annotations

import pytest

from argosy.errors import CorruptRecord
from argosy.experts.source import ExpertFiles, load_resident
from tests.experts.fake_store import MATRIX_BYTES, FakeStore, make_records, matrix_content

KEYS = [(layer, expert) for layer in (0, 2) for expert in range(50)]  # layer 1 is dense


@pytest.mark.parametrize("num_pieces", [1, 2, 3])
@pytest.mark.parametrize("alignment", [1, 64, 512])
def test_every_expert_is_read_once_and_lies_where_the_lease_says(num_pieces: int, alignment: int) -> None:
    records, content = make_records(KEYS, num_pieces=num_pieces)
    store = FakeStore(content, alignment=alignment, seed=num_pieces)
    files = ExpertFiles(store, records, open_file=store.open)  # type: ignore[arg-type]
    shares: list[float] = []
    source = load_resident(store, files, progress=lambda what, share: shares.append(share))  # type: ignore[arg-type]

    assert store.num_fetches == len(KEYS)
    assert not store.in_flight
    assert shares == sorted(shares)
    assert shares[-1] == 1
    memory = source.arena.array()
    for layer in (0, 2):
        with source.lease(layer, [7, 3, 49], scan=[3]) as lease:
            (group,) = lease
        assert list(group) == [7, 3, 49]
        for expert in group:
            offsets = source.offsets[layer, expert].tolist()
            found = [memory[at : at + MATRIX_BYTES].tobytes() for at in offsets]
            assert found == matrix_content(records, content, (layer, expert))
    assert (source.stats.lookups, source.stats.hits) == (6, 6)
    assert store.num_fetches == len(KEYS)


def test_a_damaged_expert_stops_the_start_with_its_name_and_no_read_in_flight() -> None:
    records, content = make_records(KEYS, num_pieces=1)
    store = FakeStore(content, fail=lambda number: ("sum differs", "checksum") if number == 60 else None)
    files = ExpertFiles(store, records, open_file=store.open)  # type: ignore[arg-type]
    with pytest.raises(CorruptRecord, match=r"layer 2, expert 9: "):
        load_resident(store, files)  # type: ignore[arg-type]
    assert not store.in_flight


def test_an_interrupted_start_leaves_no_read_in_flight() -> None:
    records, content = make_records(KEYS, num_pieces=1)
    store = FakeStore(content)
    files = ExpertFiles(store, records, open_file=store.open)  # type: ignore[arg-type]

    def interrupt(what: str, share: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_resident(store, files, progress=interrupt)  # type: ignore[arg-type]
    assert store.num_fetches > 0
    assert not store.in_flight
