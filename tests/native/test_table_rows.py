"""Rows of a table on the drive are those of its files, whatever is cached, shared, or read in waves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from argosy._native import Arena, Record, Runtime, Store, TableRows, table_rows_bytes
from tests.native._native_testing import FaultyFileSystem

NUM_ROWS, COLS = 3000, 160
ROW_BYTES = 2 * COLS  # bf16
FIRST = 1777  # row of the second file


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return Runtime(2)


@pytest.fixture
def store() -> Iterator[Store]:
    store = Store(2)
    yield store
    store.close()


class BfloatTable:
    """A bf16 table in two files, with other bytes before and after it."""

    def __init__(self, directory: Path) -> None:
        bits = np.random.default_rng(1).integers(0, 1 << 14, (NUM_ROWS, COLS), np.uint16)
        self.values = (bits.astype(np.uint32) << 16).view(np.float32)
        self.paths = [directory / "first.bin", directory / "second.bin"]
        for path, rows in zip(self.paths, (bits[:FIRST], bits[FIRST:]), strict=True):
            path.write_bytes(b"\xff" * 1001 + rows.tobytes() + b"\xff" * 10)

    def parts(self, store: Store) -> list[tuple[str | None, list[tuple[int, int, int]]]]:
        files = [store.open(str(path)) for path in self.paths]
        return [(None, [(0, files[0], 1001), (FIRST, files[1], 1001)])]

    def open(self, store: Store, *, cache_bytes: int = 0, most_rows: int = 4096) -> TableRows:
        return TableRows(store, "bf16", NUM_ROWS, COLS, self.parts(store), cache_bytes, most_rows)


@pytest.fixture
def table(tmp_path: Path) -> BfloatTable:
    return BfloatTable(tmp_path)


def read(
    rows: TableRows, runtime: Runtime, wanted: NDArray[np.int64], cols: int = COLS
) -> NDArray[np.float32]:
    rows.begin(wanted)
    assert rows.advance(10_000)
    assert rows.fault is None
    out = np.full((len(wanted), cols), np.nan, np.float32)
    assert rows.write(runtime, out)
    return out


@pytest.mark.parametrize("cache_bytes", [0, 5000, 100_000, NUM_ROWS * (ROW_BYTES + 5)])
def test_rows_are_those_of_the_files(
    store: Store, runtime: Runtime, table: BfloatTable, cache_bytes: int
) -> None:
    rows, rng = table.open(store, cache_bytes=cache_bytes), np.random.default_rng(2)
    for count in (1, 40, 3000, 40, 0, 700):
        wanted = rng.integers(0, NUM_ROWS, count)
        if count > 1:
            wanted[:2] = FIRST - 1, FIRST  # neighbours in different files
            wanted[-3:] = 0, NUM_ROWS - 1, 0
        np.testing.assert_array_equal(read(rows, runtime, wanted), table.values[wanted])
    asked, found, _, num_read, _ = rows.stats
    assert asked == 3781
    assert found + num_read <= asked
    assert (found > 500) == (cache_bytes > 100_000)


def test_rows_that_share_a_page_are_read_once_and_others_never_again(
    store: Store, runtime: Runtime, table: BfloatTable
) -> None:
    rows = table.open(store, cache_bytes=NUM_ROWS * (ROW_BYTES + 5))
    wanted = np.array([5, 6, 5, 7, 6], np.int64)
    read(rows, runtime, wanted)
    assert rows.stats[1:2] + rows.stats[3:] == (0, 3, 4096)
    read(rows, runtime, wanted)
    assert rows.stats[1:2] + rows.stats[3:] == (5, 3, 4096)


def test_rows_that_are_used_again_stay_while_others_pass(
    store: Store, runtime: Runtime, table: BfloatTable
) -> None:
    rows = table.open(store, cache_bytes=200 * (ROW_BYTES + 5))
    often = np.arange(40, dtype=np.int64) * 7
    for _ in range(3):
        read(rows, runtime, often)
    read(rows, runtime, np.arange(300, NUM_ROWS))  # a scan of many times the cache
    before = rows.stats[1]
    read(rows, runtime, often)
    assert rows.stats[1] - before >= 36


def test_more_rows_than_landing_memory_come_in_waves(store: Store, runtime: Runtime, tmp_path: Path) -> None:
    values = np.random.default_rng(1).standard_normal((100, 65_536)).astype(np.float32)
    (tmp_path / "wide.bin").write_bytes(values.tobytes())
    parts = [(None, [(0, store.open(str(tmp_path / "wide.bin")), 0)])]
    rows = TableRows(store, "f32", 100, 65_536, parts, 0, 128)  # 8 MiB hold 31 rows
    wanted = np.random.default_rng(2).permutation(100).astype(np.int64)
    np.testing.assert_array_equal(read(rows, runtime, wanted, 65_536), values[wanted])


@pytest.mark.parametrize("block_type", ["Q8_0", "mxfp8"])
def test_codes_are_decoded_with_their_scales(
    store: Store, runtime: Runtime, tmp_path: Path, block_type: str
) -> None:
    rng, path = np.random.default_rng(4), tmp_path / "codes.bin"
    if block_type == "Q8_0":
        scales = rng.standard_normal((50, 5)).astype(np.float16)
        codes = rng.integers(-127, 128, (50, 5, 32), np.int8)
        blocks = np.concatenate((scales[:, :, None].view(np.uint8), codes.view(np.uint8)), axis=2)
        path.write_bytes(blocks.tobytes())
        values = (scales.astype(np.float32)[:, :, None] * codes).reshape(50, COLS)
        file = store.open(str(path))
        parts = [("Q8_0", [(0, file, 0), (20, file, 20 * 170)])]
        rows = TableRows(store, "q8", 50, COLS, parts, 9000, 64)
    else:
        exponents = rng.integers(120, 130, (50, 5), np.uint8)
        codes = rng.integers(0, 0x70, (50, COLS), np.uint8)
        path.write_bytes(codes.tobytes() + exponents.tobytes())
        mantissa = np.where(codes >> 3 > 0, 1 + (codes & 7) / 8, (codes & 7) / 4)
        values = np.ldexp(mantissa, np.maximum(codes >> 3, 0).astype(int) - 7)
        values[codes >> 3 == 0] = (codes[codes >> 3 == 0] & 7) * 2.0**-9
        values *= np.repeat(2.0 ** (exponents.astype(float) - 127), 32, axis=1)
        file = store.open(str(path))
        parts = [("mxfp8_codes", [(0, file, 0)]), ("mxfp8_scales", [(0, file, 50 * COLS)])]
        rows = TableRows(store, "mxfp8", 50, COLS, parts, 9000, 64)
    for _ in range(2):
        wanted = rng.integers(0, 50, 37)
        np.testing.assert_array_equal(read(rows, runtime, wanted), values[wanted].astype(np.float32))


def test_codes_and_scales_that_are_no_numbers_are_faults_of_their_rows(
    store: Store, runtime: Runtime, tmp_path: Path
) -> None:
    codes, scales = np.zeros((20, 32), np.uint8), np.full(20, 127, np.uint8)
    codes[1, 31], codes[3, 0], scales[17] = 0x7F, 0xFF, 0xFF
    (tmp_path / "codes.bin").write_bytes(codes.tobytes() + scales.tobytes())
    file = store.open(str(tmp_path / "codes.bin"))
    rows = TableRows(
        store, "mxfp8", 20, 32, [("mxfp8_codes", [(0, file, 0)]), ("mxfp8_scales", [(0, file, 640)])], 0, 64
    )
    for wanted, ill in (([3, 0, 3, 2], [0, 2]), ([*range(20)], [1, 3, 17]), ([0] * 18 + [17], [18])):
        rows.begin(np.array(wanted))
        assert rows.advance(10_000)
        assert not rows.write(runtime, np.empty((len(wanted), 32), np.float32))
        message, kind, indices = rows.fault or ("", None, [])
        assert "not a finite number" in message
        assert (kind, indices) == ("not finite", ill)


@pytest.mark.parametrize("cache_bytes", [0, 5000, NUM_ROWS * (ROW_BYTES + 5)])
def test_no_row_is_zeros_and_is_not_counted(
    store: Store, runtime: Runtime, table: BfloatTable, cache_bytes: int
) -> None:
    rows = table.open(store, cache_bytes=cache_bytes)
    for _ in range(2):
        found = read(rows, runtime, np.array([-1, 7, -1, -1, 8, 7]))
        np.testing.assert_array_equal(found[[1, 4, 5]], table.values[[7, 8, 7]])
        assert not found[[0, 2, 3]].any()
    asked, found_rows, _, num_read, _ = rows.stats
    assert (asked, num_read) == (6, 2 if cache_bytes else 4)
    assert found_rows == (3 if cache_bytes else 0)


def test_a_failed_read_names_the_rows_that_are_missing_and_may_be_repeated(
    runtime: Runtime, table: BfloatTable
) -> None:
    faulty = FaultyFileSystem(2, "eio")
    store = Store(2, faulty)
    rows = table.open(store, cache_bytes=100_000)
    wanted = np.array([2000, 5, 1000, 2000], np.int64)  # three reads, in the order of the rows
    rows.begin(wanted)
    assert rows.advance(10_000)
    message, kind, indices = rows.fault or ("", None, [])
    assert kind == "io"
    assert message
    assert indices in ([1], [2], [0, 3])
    with pytest.raises(ValueError, match="rows are missing"):
        rows.write(runtime, np.empty((4, COLS), np.float32))
    np.testing.assert_array_equal(read(rows, runtime, wanted), table.values[wanted])
    store.close()


def test_a_table_that_was_cut_short_is_a_fault(store: Store, runtime: Runtime, table: BfloatTable) -> None:
    rows = table.open(store)
    with table.paths[1].open("r+b") as file:
        file.truncate(5000)
    rows.begin(np.array([3, NUM_ROWS - 1], np.int64))
    assert rows.advance(10_000)
    _, kind, indices = rows.fault or ("", None, [])
    assert (kind, indices) == ("short", [1])


def test_rows_and_tables_that_do_not_exist_are_refused(store: Store, table: BfloatTable) -> None:
    rows = table.open(store, most_rows=8)
    for wanted in ([-2], [NUM_ROWS]):
        with pytest.raises(ValueError, match=r"rows\[0\] is"):
            rows.begin(np.array(wanted, np.int64))
    with pytest.raises(ValueError, match="asks for 9 rows, expected at most 8"):
        rows.begin(np.zeros(9, np.int64))
    parts = table.parts(store)
    file = parts[0][1][0][1]
    for format, num_rows, cols, given, most in (
        ("bf16", 0, COLS, parts, 8),
        ("bf16", 1 << 32, COLS, parts, 8),
        ("bf16", NUM_ROWS, 1 << 40, parts, 8),
        ("bf16", NUM_ROWS, COLS, [], 8),
        ("bf16", NUM_ROWS, COLS, [(None, [])], 8),
        ("bf16", NUM_ROWS, COLS, [(None, [(1, file, 0)])], 8),
        ("bf16", NUM_ROWS, COLS, [(None, [(0, file, 0), (0, file, 0)])], 8),
        ("bf16", NUM_ROWS, COLS, [(None, [(0, file, 1 << 50)])], 8),
        ("bf16", NUM_ROWS, COLS, [(None, [(0, file, -1)])], 8),
        ("q8", NUM_ROWS, COLS, [("Q4_0", [(0, file, 0)])], 8),
        ("q8", NUM_ROWS, COLS + 1, [("Q8_0", [(0, file, 0)])], 8),
        ("f8", NUM_ROWS, COLS, [("f8_codes", [(0, file, 0)]), ("f8_scales", [(0, file, 0)])], 8),
        ("bf16", NUM_ROWS, COLS, parts, 0),
        ("bf16", NUM_ROWS, COLS, parts, 1 << 60),
    ):
        with pytest.raises(ValueError, match=r"table|memory|expected"):
            TableRows(store, format, num_rows, cols, given, 0, most)  # type: ignore[arg-type]


def test_the_memory_is_what_the_plan_counts(store: Store, table: BfloatTable) -> None:
    bare = table_rows_bytes("bf16", 1 << 20, COLS, table.parts(store), 0, 64)
    cached = table_rows_bytes("bf16", 1 << 20, COLS, table.parts(store), 64 << 20, 64)
    whole = table_rows_bytes("bf16", 1 << 20, COLS, table.parts(store), 1 << 40, 64)
    assert bare < 3 << 20
    assert abs(cached - bare - (64 << 20)) <= 2 << 20
    assert abs(whole - bare - (ROW_BYTES + 5 << 20)) <= 2 << 20


def test_rows_land_before_experts_that_are_read_ahead(tmp_path: Path, table: BfloatTable) -> None:
    (tmp_path / "experts.bin").write_bytes(bytes(24 << 20))
    store = Store(2, bytes_per_s=100 << 20)
    try:
        rows, arena = table.open(store), Arena(24 << 20)
        experts, size = store.open(str(tmp_path / "experts.bin")), 1 << 20
        records = [(Record([(experts, at * size, size, at * size)]), 0) for at in range(24)]
        ahead = store.fetch_many(arena, records, "soon")
        rows.begin(np.arange(0, NUM_ROWS, 100))
        while not rows.advance(0):
            pass
        done = store.wait_any(ahead, 1)
        assert len(done) < len(ahead) - 4
        assert rows.stats[2] == 0  # late
        store.drop([ticket for ticket in ahead if ticket not in {number for number, _, _ in done}])
    finally:
        store.close()
