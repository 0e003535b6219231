"""Work before the engine is shared fairly; the tests check the order in which jobs run, not their duration."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Awaitable, Callable
from types import SimpleNamespace

import pytest

from argosy.errors import Overloaded
from argosy.guard.limits import TooMany
from argosy.serve.http import work
from argosy.serve.http.work import Threads, WorkQueue


class Jobs:
    """Jobs that end only when the test lets them, and the order in which they began."""

    def __init__(self) -> None:
        self.began: list[str] = []
        self._changed = threading.Condition()
        self._may_end = 0

    def job(self, name: str) -> Callable[[], str]:
        def run() -> str:
            with self._changed:
                self.began.append(name)
                number = len(self.began)
                self._changed.notify_all()
                assert self._changed.wait_for(lambda: self._may_end >= number, 20)
            return name

        return run

    def let_end(self, num_jobs: int) -> None:
        """Let the first `num_jobs` that began end."""
        with self._changed:
            self._may_end = num_jobs
            self._changed.notify_all()

    async def until_began(self, num_jobs: int) -> None:
        def wait() -> None:
            with self._changed:
                assert self._changed.wait_for(lambda: len(self.began) >= num_jobs, 20)

        await asyncio.to_thread(wait)


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 60))


def test_a_tenant_waits_for_one_job_per_thread_however_many_another_has_queued() -> None:
    async def test() -> None:
        queue, jobs = WorkQueue(num_threads=2), Jobs()
        many = [asyncio.ensure_future(queue.run("many", jobs.job(f"many {at}"))) for at in range(12)]
        await jobs.until_began(2)
        one = asyncio.ensure_future(queue.run("one", jobs.job("one")))
        await asyncio.sleep(0)
        jobs.let_end(1)
        await jobs.until_began(3)
        assert jobs.began == ["many 0", "many 1", "one"]
        jobs.let_end(100)
        assert await asyncio.gather(*many, one) == [*(f"many {at}" for at in range(12)), "one"]

    run(test)


def test_tenants_take_turns_and_the_jobs_of_each_keep_their_order() -> None:
    async def test() -> None:
        queue, jobs = WorkQueue(num_threads=1), Jobs()
        asked = [("a", 4), ("b", 2), ("c", 1)]
        waiting = [
            asyncio.ensure_future(queue.run(tenant, jobs.job(f"{tenant}{at}")))
            for tenant, number in asked for at in range(number)
        ]  # fmt: skip
        await jobs.until_began(1)
        jobs.let_end(100)
        await asyncio.gather(*waiting)
        assert jobs.began == ["a0", "b0", "c0", "a1", "b1", "a2", "a3"]

    run(test)


def test_a_thread_rests_after_a_large_job_in_proportion_to_its_time_and_longer_after_a_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rests: list[float] = []
    now = [0.0]
    monkeypatch.setattr(work, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=rests.append))

    def work_for(seconds: float, divisor: int = 1) -> float:
        now[0] += seconds
        return seconds / divisor

    async def test() -> None:
        queue = WorkQueue(num_threads=1, is_large=True)
        assert await queue.run("a", work_for, 0.25) == 0.25
        with pytest.raises(ZeroDivisionError):
            await queue.run("a", work_for, 0.25, divisor=0)
        assert await queue.run("a", work_for, 10.0) == 10.0
        while len(rests) < 3:
            await asyncio.sleep(0.001)
        assert rests == [0.25, 0.75, 1.0]

    run(test)


def test_threads_do_not_rest_after_small_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: float) -> None:
        raise AssertionError("it rests")

    monkeypatch.setattr(work, "time", SimpleNamespace(monotonic=lambda: 0.0, sleep=refuse))

    async def test() -> None:
        queue = WorkQueue(num_threads=1)
        assert [await queue.run("a", int, "1") for _ in range(3)] == [1, 1, 1]

    run(test)


def test_a_tenant_with_a_full_queue_is_told_when_to_retry_and_others_are_admitted() -> None:
    async def test() -> None:
        queue, jobs = WorkQueue(num_threads=1, max_waiting=2), Jobs()
        waiting = [asyncio.ensure_future(queue.run("a", jobs.job("runs")))]
        await jobs.until_began(1)
        waiting += [asyncio.ensure_future(queue.run("a", jobs.job("waits"))) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(TooMany) as caught:
            await queue.run("a", jobs.job("refused"))
        assert caught.value.retry_after_s > 0
        waiting.append(asyncio.ensure_future(queue.run("b", jobs.job("b"))))
        await asyncio.sleep(0)
        jobs.let_end(100)
        await asyncio.gather(*waiting)
        assert jobs.began == ["runs", "b", "waits", "waits"]
        assert await queue.run("a", jobs.job("later")) == "later"

    run(test)


def test_a_job_whose_client_is_gone_is_not_run_and_frees_its_place() -> None:
    async def test() -> None:
        queue, jobs = WorkQueue(num_threads=1, max_waiting=1), Jobs()
        first = asyncio.ensure_future(queue.run("a", jobs.job("first")))
        await jobs.until_began(1)
        gone = asyncio.ensure_future(queue.run("a", jobs.job("gone")))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        second = asyncio.ensure_future(queue.run("a", jobs.job("second")))
        jobs.let_end(100)
        assert await asyncio.gather(first, second) == ["first", "second"]
        assert jobs.began == ["first", "second"]

    run(test)


def test_an_exception_in_a_job_reaches_its_caller_and_the_thread_continues() -> None:
    async def test() -> None:
        for queue in (WorkQueue(num_threads=1), WorkQueue(num_threads=1, is_large=True)):
            with pytest.raises(ZeroDivisionError):
                await queue.run("a", lambda: 1 // 0)
            assert await queue.run("a", int, "7") == 7

    run(test)


def test_a_panic_of_a_library_is_an_exception_for_its_caller() -> None:
    def panic() -> None:
        raise type("PanicException", (BaseException,), {})

    async def test() -> None:
        with pytest.raises(RuntimeError, match="PanicException in a library"):
            await WorkQueue(num_threads=1).run("a", panic)

    run(test)


def test_a_failed_job_holds_no_reference_to_its_data() -> None:
    class Large:
        pass

    async def test() -> None:
        queue, held = WorkQueue(num_threads=1, is_large=True), [Large()]
        gone = weakref.ref(held[0])

        def fail() -> None:
            worked_on = held.pop()
            try:
                raise ValueError(type(worked_on))
            except ValueError:
                raise ZeroDivisionError from None

        gc.disable()
        try:
            with pytest.raises(ZeroDivisionError) as caught:
                await queue.run("a", fail)
            assert caught.value.__context__ is not None
            assert gone() is None
        finally:
            gc.enable()

    run(test)


def refuse_threads(monkeypatch: pytest.MonkeyPatch, num_refused: int) -> None:
    """Have the system refuse the next threads, as it does at the limit of a control group."""
    left, start = [num_refused], threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if left[0]:
            left[0] -= 1
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)


def test_threads_that_cannot_start_give_their_places_back_and_their_requests_are_told_to_retry(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def test() -> None:
        queue = WorkQueue(num_threads=2)
        refuse_threads(monkeypatch, 2)
        for _ in range(2):
            with pytest.raises(Overloaded, match="no more threads") as refused:
                await queue.run("a", int, "1")
            assert refused.value.retry_after_s > 0
        assert [await queue.run("a", int, str(number)) for number in range(4)] == [0, 1, 2, 3]

    run(test)


def test_a_job_without_a_thread_of_its_own_is_run_by_the_thread_that_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def test() -> None:
        queue, jobs = WorkQueue(num_threads=2), Jobs()
        first = asyncio.ensure_future(queue.run("a", jobs.job("first")))
        await jobs.until_began(1)
        refuse_threads(monkeypatch, 1)
        second = asyncio.ensure_future(queue.run("a", jobs.job("second")))
        await asyncio.sleep(0)
        jobs.let_end(2)
        assert await asyncio.gather(first, second) == ["first", "second"]

    run(test)


def test_threads_take_one_job_after_the_other_and_end_when_none_has_come_for_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(work, "_LINGER_S", 0.2)

    async def test() -> None:
        queue = WorkQueue(num_threads=2)
        used = {await queue.run("someone", threading.current_thread) for _ in range(20)}
        assert len(used) <= 2
        for thread in used:
            await asyncio.to_thread(thread.join, 20)
            assert not thread.is_alive()
        assert await queue.run("someone", threading.current_thread) not in used

    run(test)


def test_a_pool_whose_threads_cannot_start_tells_its_callers_to_retry(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refuse_threads(monkeypatch, 1)
    with Threads(1) as pool:
        with pytest.raises(Overloaded, match="no more threads"):
            pool.submit(int, "1")
        assert pool.submit(int, "2").result(20) == 2


def test_a_queue_has_stopped_once_jobs_wait_and_none_begins_or_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(work, "time", SimpleNamespace(monotonic=lambda: now[0]))

    async def test() -> None:
        queue, jobs = WorkQueue(num_threads=1), Jobs()
        now[0] += 2 * work.JOB_S  # an idle queue never stops
        waiting = [asyncio.ensure_future(queue.run("a", jobs.job("hangs")))]
        await jobs.until_began(1)
        now[0] += 2 * work.JOB_S  # nobody waits
        assert not queue.has_stopped
        waiting.append(asyncio.ensure_future(queue.run("a", jobs.job("waits"))))
        await asyncio.sleep(0)
        assert not queue.has_stopped
        now[0] += 2 * work.JOB_S
        assert queue.has_stopped
        jobs.let_end(1)
        await jobs.until_began(2)
        assert not queue.has_stopped
        jobs.let_end(2)
        await asyncio.gather(*waiting)

    run(test)


# Counts the arenas of a process in which several threads hold memory at once.
_COUNT_ARENAS = """
import ctypes, sys, tempfile, threading
from argosy.serve.http.work import share_one_heap
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.fdopen.restype, libc.fclose.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
libc.malloc_info.argtypes = [ctypes.c_int, ctypes.c_void_p]
if sys.argv[1] == "one":
    share_one_heap()
have = threading.Barrier(4)
def hold():
    assert libc.malloc(4096)
    have.wait(60)
threads = [threading.Thread(target=hold) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
with tempfile.NamedTemporaryFile() as told:
    stream = libc.fdopen(told.fileno(), b"w")
    libc.malloc_info(0, stream)
    libc.fflush(ctypes.c_void_p(stream))
    print(open(told.name).read().count("<heap nr="))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_info"), reason="the C library is not glibc")
def test_threads_of_a_server_share_one_heap() -> None:
    def num_arenas(share: str) -> int:
        command = [sys.executable, "-c", _COUNT_ARENAS, share]
        return int(subprocess.run(command, capture_output=True, check=True, text=True, timeout=60).stdout)

    assert num_arenas("one") == 1
    assert num_arenas("own") > 1
