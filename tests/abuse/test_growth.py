"""No reader of strangers' data takes much more than twice as long, or much more memory, for twice the input."""

from __future__ import annotations

from itertools import groupby

import pytest

from tests.abuse.growth import Growth, Row, measure, measure_memory
from tests.abuse.readers import rows

_LEAST_S = 0.0005
_FEW = 32


def _room(row: Row) -> str:
    return row.reader.partition(":")[0].partition(" ")[0].partition(".")[0]


@pytest.fixture(scope="module")
def rows_by_room(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for room, some in groupby(rows(tmp_path_factory.mktemp("files")), key=_room):
        found.setdefault(room, []).extend(some)
    return found


@pytest.mark.full
@pytest.mark.parametrize("part", range(3))
def test_no_reader_takes_time_that_grows_faster_than_its_input(
    rows_by_room: dict[str, list[Row]], part: int
) -> None:
    slow = []
    for row in [row for some in rows_by_room.values() for row in some][part::3]:
        growth = measure(row, least_s=_LEAST_S)
        if growth.is_slow:
            slow.append(f"{row.name}: {growth.ratio:.1f} times as long for four times {growth.n}")
    assert not slow, "\n".join(slow)


@pytest.mark.full
def test_no_body_takes_memory_that_grows_faster_than_it(rows_by_room: dict[str, list[Row]]) -> None:
    large = []
    for row in rows_by_room["body"] + rows_by_room["strict_json"] + rows_by_room["template"]:
        growth = Growth(n=min(_FEW, row.most // 4))
        growth.peaks = measure_memory(row, growth.n)
        if growth.is_large:
            large.append(f"{row.name}: {growth.memory_ratio:.1f} times the memory for four times {growth.n}")
    assert not large, "\n".join(large)


def test_a_reader_whose_cost_is_quadratic_is_detected() -> None:
    quadratic = Row(
        "a reader", "of pairs", lambda n: "a" * n, lambda text: sum(1 for _ in text for _ in text), 1 << 12
    )
    assert measure(quadratic, least_s=10 * _LEAST_S).is_slow
    copies = Row("a reader", "of copies", lambda n: n, lambda n: ["a" * (at + n) for at in range(n)], 1 << 10)
    growth = measure(copies, least_s=_LEAST_S)
    growth.peaks = measure_memory(copies, 256)
    assert growth.is_large
