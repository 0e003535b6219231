"""The store as Python sees it: bytes, checksums, faults, and ^C."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from argosy._native import Arena, Store, crc32c_wide, drive_probe, transcode
from argosy.machine.resources import process_footprint
from tests.helpers.forks import call_in_fork
from tests.native._native_testing import FaultyFileSystem, RealFileSystem

PAGE = 4096


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "experts.bin"
    path.write_bytes(np.random.default_rng(3).integers(0, 256, 8 * PAGE + 100, np.uint8).tobytes())
    return path


@pytest.fixture
def store() -> Iterator[Store]:
    store = Store(2)
    yield store
    store.close()


def fetch_one(
    store: Store,
    arena: Arena,
    file_id: int,
    offset: int,
    nbytes: int,
    dest_offset: int,
    checksum: int | None = None,
) -> tuple[str | None, str | None]:
    piece = (file_id, offset, nbytes, dest_offset)
    ticket = store.fetch(arena, [piece], None if checksum is None else [checksum])
    [(done, message, kind)] = store.wait_any([ticket])
    assert done == ticket
    return message, kind


def test_a_fetched_piece_begins_at_its_offset_within_the_alignment(store: Store, file: Path) -> None:
    arena, content = Arena(16 * PAGE), file.read_bytes()
    file_id = store.open(str(file))
    path, size, alignment, is_direct, why_not = store.info(file_id)
    assert (path, size, alignment) == (str(file), len(content), PAGE)
    assert is_direct == (why_not == "")

    for offset, nbytes in [(0, 1), (1, PAGE), (5000, 20_000), (len(content) - 7, 7), (0, len(content))]:
        wanted = content[offset : offset + nbytes]
        checksum = crc32c_wide(wanted)
        assert fetch_one(store, arena, file_id, offset, nbytes, PAGE, checksum=checksum) == (None, None)
        start = PAGE + offset % alignment
        assert arena.array()[start : start + nbytes].tobytes() == wanted


def test_a_file_is_opened_whatever_bytes_its_path_has(store: Store, file: Path) -> None:
    odd = os.fsdecode(os.fsencode(file.parent) + b"/m\xff\xc3")
    os.mkdir(odd)
    path = str(file.rename(Path(odd) / file.name))
    assert store.info(store.open(path))[0] == path
    assert drive_probe(path, PAGE, 2, 1, False) > 0
    with pytest.raises(FileNotFoundError) as missing:
        store.open(path + ".no")
    assert missing.value.filename == path + ".no"


def test_a_buffered_read_gives_the_reason_why_it_is_not_direct(store: Store, file: Path) -> None:
    file_id = store.open(str(file), direct=False)
    assert store.info(file_id)[3:] == (False, "buffered reads were requested")
    arena = Arena(16 * PAGE)
    assert fetch_one(store, arena, file_id, 3, 10_000, 0) == (None, None)
    assert arena.array()[3:10_003].tobytes() == file.read_bytes()[3:10_003]


def test_the_checksum_is_the_crc_of_four_quarters() -> None:
    def crc(data: bytes) -> int:
        value = 0xFFFFFFFF
        for byte in data:
            value ^= byte
            for _ in range(8):
                value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
        return value ^ 0xFFFFFFFF

    assert crc(b"123456789") == 0xE3069283
    for nbytes in (0, 1, 3, 4, 5, 31, 32, 33, 257):
        data = bytes(range(256)) * 2
        data = data[:nbytes]
        quarter = -(-nbytes // 4)
        words = [crc(data[i * quarter : (i + 1) * quarter]).to_bytes(4, "little") for i in range(4)]
        assert crc32c_wide(data) == crc(b"".join(words))
        assert crc32c_wide(np.frombuffer(data, np.uint8)) == crc32c_wide(data)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("eio", "io"), ("flip", "checksum"), ("truncated", "short"), ("short", None), ("eintr", None)],
)
def test_a_fault_fails_the_ticket_that_met_it_or_the_read_continues(
    file: Path, kind: Literal["eio", "flip", "truncated", "short", "eintr"], expected: str | None
) -> None:
    faulty = FaultyFileSystem(2, kind)
    store, arena, content = Store(1, faulty), Arena(4 * PAGE), file.read_bytes()
    file_id = store.open(str(file))
    checksum = crc32c_wide(content[:PAGE])
    kinds = [fetch_one(store, arena, file_id, 0, PAGE, 0, checksum=checksum)[1] for _ in range(3)]
    assert kinds == [None, expected, None]
    assert arena.array()[:PAGE].tobytes() == content[:PAGE]
    assert faulty.num_reads >= 3
    store.close()


def test_a_failure_names_the_file_and_bytes(file: Path) -> None:
    store, arena = Store(1, FaultyFileSystem(1, "eio")), Arena(16 * PAGE)
    file_id = store.open(str(file))
    assert fetch_one(store, arena, file_id, 10, 20, 0) == (
        "experts.bin: reading bytes 10 to 30: Input/output error",
        "io",
    )
    size = file.stat().st_size
    message, kind = fetch_one(store, arena, file_id, size - 1, 2, 0)
    assert kind == "short"
    assert message == f"experts.bin ends at byte {size}, but bytes {size - 1} to {size + 1} were requested"
    message, kind = fetch_one(store, arena, file_id, 0, 4, 0, checksum=0)
    assert kind == "checksum"
    assert message is not None
    assert message.startswith("experts.bin: bytes 0 to 4 have the checksum ")
    assert message.endswith(", expected 00000000")


def test_an_invalid_piece_is_refused_with_the_numbers(store: Store, file: Path) -> None:
    arena, file_id = Arena(PAGE), store.open(str(file))
    with pytest.raises(ValueError, match="multiple of 4096, found 1"):
        store.fetch(arena, [(file_id, 0, 10, 1)], None)
    with pytest.raises(ValueError, match="takes 8192 bytes at 0, but the arena ends at 4096"):
        store.fetch(arena, [(file_id, PAGE - 1, 2, 0)], None)
    with pytest.raises(ValueError, match="no file has the id 99"):
        store.fetch(arena, [(99, 0, 10, 0)], None)
    with pytest.raises(ValueError, match="1 pieces and 0 checksums"):
        store.fetch(arena, [(file_id, 0, 10, 0)], [])
    with pytest.raises(ValueError, match="no fetch has the ticket 12345"):
        store.wait_any([12345])
    with pytest.raises(FileNotFoundError, match="nothing here"):
        store.open("nothing here")
    with pytest.raises(IsADirectoryError):
        store.open(str(file.parent))
    with pytest.raises(ValueError, match="num_readers is 0, expected 1 to 1024"):
        Store(0)
    with pytest.raises(ValueError, match="unknown kind of fault 'fire'"):
        FaultyFileSystem(1, "fire")  # type: ignore[arg-type]
    assert store.pending() == 0
    assert store.wait_any([]) == []


def test_a_strip_may_take_the_memory_of_several_readers(tmp_path: Path) -> None:
    """A head of 140,000 rows that GPTQ packs down its columns has strips of 2.2 MB; a reader has 2 MiB."""
    rows, cols, block_type = 140_000, 64, "uint4_32_f16:gptq_codes"
    codes = np.random.default_rng(1).integers(0, 256, rows * cols // 2, np.uint8)
    (tmp_path / "head.bin").write_bytes(codes.tobytes())
    expected = transcode(block_type, codes, rows, cols)
    with pytest.raises(ValueError, match="in strips of 2240000 bytes, but the readers can transcode at most"):
        fetch_codes(Store(1), tmp_path / "head.bin", len(expected), rows, cols, block_type)
    found = fetch_codes(Store(2), tmp_path / "head.bin", len(expected), rows, cols, block_type)
    np.testing.assert_array_equal(found, expected)


def fetch_codes(
    store: Store, path: Path, nbytes: int, rows: int, cols: int, block_type: str
) -> NDArray[np.uint8]:
    arena = Arena(nbytes)
    piece = (store.open(str(path)), 0, path.stat().st_size, 0, block_type, rows, cols)
    try:
        [(_, message, _)] = store.wait_any([store.fetch(arena, [piece])])
    finally:
        store.close()
    assert message is None
    return arena.array()


def test_an_arena_that_becomes_smaller_gives_its_pages_back_and_refuses_reads_there(
    store: Store, file: Path
) -> None:
    size = 64 << 20
    arena, file_id = Arena(size), store.open(str(file))
    arena.populate()
    arena.array()[:] = 1
    before = process_footprint().resident_bytes
    arena.resize(size // 4)
    assert before - process_footprint().resident_bytes > size // 2
    assert arena.nbytes == len(arena.array()) == size // 4
    assert arena.array().all()
    with pytest.raises(ValueError, match=f"but the arena ends at {size // 4}"):
        store.fetch(arena, [(file_id, 0, PAGE, size // 4)], None)
    arena.populate()  # nothing beyond its size
    assert before - process_footprint().resident_bytes > size // 2
    arena.resize(size)
    assert arena.array()[: size // 4].all()
    assert not arena.array()[size // 4 :].any()
    with pytest.raises(ValueError, match=f"an arena of {size} bytes cannot have {size + 1}"):
        arena.resize(size + 1)
    arena.close()
    with pytest.raises(ValueError, match="closed"):
        arena.resize(0)


def test_an_arena_can_become_smaller_while_a_thread_populates_it() -> None:
    size = 256 << 20
    for _ in range(4):
        arena = Arena(size)
        before = process_footprint().resident_bytes
        populating = threading.Thread(target=arena.populate)
        populating.start()
        arena.resize(8 << 20)
        populating.join()
        assert process_footprint().resident_bytes - before < size // 4
        arena.close()


def test_a_thread_that_populates_an_arena_lets_others_go_first() -> None:
    """It takes the arena's mutex again at once, for every huge page."""
    size = 512 << 20
    for _ in range(2):
        arena = Arena(size)
        populating = threading.Thread(target=arena.populate)
        populating.start()
        before = process_footprint().resident_bytes
        for nth in range(1, 9):
            arena.resize(size - (nth << 12))
        grown = process_footprint().resident_bytes - before
        populating.join()
        arena.close()
        assert grown < size // 2


def test_a_wait_ends_when_its_time_is_over(file: Path) -> None:
    faulty = FaultyFileSystem(1, "hold")
    store, arena = Store(1, faulty), Arena(PAGE)
    ticket = store.fetch(arena, [(store.open(str(file)), 0, PAGE, 0)], None)
    assert store.wait_any([ticket], 0) == []
    assert store.wait_any([ticket], 10) == []
    faulty.release()
    assert store.wait_any([ticket], 60_000) == [(ticket, None, None)]
    with pytest.raises(ValueError, match="most_ms is -1, expected 0 to 86400000"):
        store.wait_any([], -1)
    store.close()


def test_a_cancelled_ticket_is_forgotten(file: Path) -> None:
    by_threads = RealFileSystem(has_queue=False)  # with one reader it is known which reads have not begun
    faulty = FaultyFileSystem(1, "delay", num_faults=1000, delay_seconds=0.05, inner=by_threads)
    store, arena = Store(1, faulty), Arena(8 * PAGE)
    file_id = store.open(str(file))
    tickets = [store.fetch(arena, [(file_id, i * PAGE, PAGE, i * PAGE)], None) for i in range(4)]
    assert store.cancel(tickets[3])
    assert not store.cancel(tickets[3])
    for ticket in tickets[:3]:
        assert store.wait_any([ticket]) == [(ticket, None, None)]
    assert not arena.array()[3 * PAGE : 4 * PAGE].any()
    store.close()


def test_an_interrupt_ends_a_wait_at_once(file: Path) -> None:
    faulty = FaultyFileSystem(1, "hold")
    store, arena = Store(1, faulty), Arena(PAGE)
    file_id = store.open(str(file))
    ticket = store.fetch(arena, [(file_id, 0, PAGE, 0)], None)
    timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        store.wait_any([ticket])
    timer.join()
    faulty.release()
    assert store.cancel(ticket)
    store.close()


def test_other_threads_run_during_a_wait(file: Path) -> None:
    faulty = FaultyFileSystem(1, "hold")
    store, arena = Store(1, faulty), Arena(PAGE)
    ticket = store.fetch(arena, [(store.open(str(file)), 0, PAGE, 0)], None)
    waiter = threading.Thread(target=store.wait_any, args=([ticket],))
    waiter.start()
    time.sleep(0.05)  # the waiter is in its wait, most likely
    faulty.release()  # nobody would, if a wait kept this thread from running
    waiter.join()
    store.close()


def test_a_view_outlives_its_closed_arena(store: Store, file: Path) -> None:
    arena, file_id = Arena(2 * PAGE), store.open(str(file))
    assert arena.nbytes == 2 * PAGE
    view = arena.array()
    assert fetch_one(store, arena, file_id, 0, PAGE, 0) == (None, None)
    arena.close()
    assert view[:PAGE].tobytes() == file.read_bytes()[:PAGE]
    with pytest.raises(ValueError, match="the arena is closed"):
        arena.array()
    with pytest.raises(ValueError, match="the arena is closed"):
        store.fetch(arena, [(file_id, 0, 1, 0)], None)
    with pytest.raises(MemoryError, match="cannot reserve"):
        Arena(1 << 60)


def test_an_arena_takes_no_memory_until_it_is_used() -> None:
    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE

    before = resident_bytes()
    arena = Arena(256 << 20)
    assert resident_bytes() - before < 16 << 20
    arena.array()[: 64 << 20] = 1
    assert resident_bytes() - before > 60 << 20
    arena.close()
    assert resident_bytes() - before < 16 << 20


def test_buffered_reads_leave_nothing_in_the_page_cache(store: Store, tmp_path: Path) -> None:
    path, nbytes = tmp_path / "large.bin", 8 << 20
    with open(path, "wb") as out:
        out.write(os.urandom(nbytes))
        out.flush()
        os.fsync(out.fileno())
        os.posix_fadvise(out.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached_bytes(path) != 0:
        pytest.skip("this file system keeps its files in memory, or cannot tell")
    file_id = store.open(str(path), direct=False)
    arena = Arena(nbytes + PAGE)
    for first, last in [(0, nbytes), (5000, nbytes - 70_000), (3 * PAGE + 1, 2 << 20)]:
        assert fetch_one(store, arena, file_id, first, last - first, 0) == (None, None)
        assert cached_bytes(path) == 0


def cached_bytes(path: Path) -> int | None:
    """Return how many bytes of a file are in the page cache, by mincore(2)."""
    import ctypes
    import mmap

    libc = ctypes.CDLL(None, use_errno=True)
    nbytes = path.stat().st_size
    with open(path, "r+b") as handle, mmap.mmap(handle.fileno(), nbytes) as mapping:
        pages = (ctypes.c_ubyte * (nbytes // mmap.PAGESIZE))()
        start = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        if libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(nbytes), pages) != 0:
            return None
        return sum(page & 1 for page in pages) * mmap.PAGESIZE


def test_stats_count_reads_and_bytes(store: Store, file: Path) -> None:
    arena, file_id = Arena(16 * PAGE), store.open(str(file))
    fetch_one(store, arena, file_id, 0, 2 * PAGE, 0)
    stats = store.stats()
    assert (stats["bytes_read"], stats["reads"]) == (2 * PAGE, 1)
    assert 0 < stats["read_seconds"] < 10
    assert 0 < stats["busy_seconds"] < 10


def test_the_probe_returns_a_bandwidth_or_the_reason_for_none(file: Path) -> None:
    assert drive_probe(str(file), PAGE, 16, 2, False) > 0
    with pytest.raises(ValueError, match="too few for one record of 1048576 bytes"):
        drive_probe(str(file), 1 << 20, 1, 1, False)
    with pytest.raises(FileNotFoundError):
        drive_probe("nothing here", PAGE, 1, 1, False)


def test_the_probe_reads_no_holes_which_would_make_a_drive_look_fast(tmp_path: Path) -> None:
    path = tmp_path / "copy"
    with path.open("wb") as file:
        file.truncate(64 * PAGE)
    with pytest.raises(ValueError, match="holes included"):
        drive_probe(str(path), PAGE, 1, 1, False)
    with path.open("r+b") as file:
        file.seek(32 * PAGE)
        file.write(bytes(2 * PAGE))
    assert drive_probe(str(path), 2 * PAGE, 3, 1, False) > 0
    with pytest.raises(ValueError, match="holes included"):
        drive_probe(str(path), 3 * PAGE, 1, 1, False)


def test_a_closed_store_refuses_fetches(file: Path) -> None:
    store = Store(1, RealFileSystem())
    file_id = store.open(str(file))
    store.close()
    store.close()
    with pytest.raises(ValueError, match="the store is closed"):
        store.fetch(Arena(PAGE), [(file_id, 0, 1, 0)], None)


def test_stores_take_the_queues_of_earlier_ones_except_in_a_fork(file: Path) -> None:
    counts = []
    for _ in range(3):  # the kernel needs 40 ms to destroy a queue
        counts.append(num_kernel_queues())
        many = [Store(1) for _ in range(8)]
        while many:
            many.pop().close()
        assert read_all(file) == file.read_bytes()
    if not counts[1]:
        pytest.skip("the kernel has no asynchronous reads")
    assert counts[0] <= counts[1] == counts[2] <= counts[0] + 4
    assert call_in_fork(read_all, file)[0] == file.read_bytes()


def read_all(file: Path) -> bytes:
    store, arena, nbytes = Store(2), Arena(16 * PAGE), file.stat().st_size
    assert fetch_one(store, arena, store.open(str(file)), 0, nbytes, 0) == (None, None)
    store.close()
    return arena.array()[:nbytes].tobytes()


def num_kernel_queues() -> int:
    """Rings of Linux AIO in the address space of this process."""
    return Path("/proc/self/maps").read_text().count("/[aio]")
