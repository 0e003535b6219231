"""Work before the engine is shared fairly; the tests check the order in which jobs run, not their duration."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Awaitable, Callable
from types import SimpleNamespace

import pytest

from argosy.guard.limits import TooMany
from argosy.serve import work
from argosy.serve.work import WorkQueue


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
    now = iter([0.0, 0.25, 10.0, 10.25, 20.0, 30.0])  # the beginning and end of three jobs
    monkeypatch.setattr(work, "time", SimpleNamespace(monotonic=lambda: next(now), sleep=rests.append))

    async def test() -> None:
        queue = WorkQueue(num_threads=1, is_large=True)
        assert await queue.run("a", int, "1") == 1
        with pytest.raises(ZeroDivisionError):
            await queue.run("a", lambda: 1 // 0)
        assert await queue.run("a", int, "2") == 2
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
