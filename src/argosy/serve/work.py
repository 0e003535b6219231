"""Work that a request needs before the engine (parsing, rendering, tokenizing), in a few threads shared fairly.

    run(tenant, call)  ->  the tenant's own queue  ->  tenants in turn  ->  a thread  ->  result

A free thread goes to the tenant whose last job began longest ago, so a tenant with one job waits for the first free
thread, however many jobs another has queued.
A tenant's queue is bounded, and only one large job runs at a time, so that its memory is needed only once.

Elsewhere: steps of the model run in the engine's own thread (`engine/loop.py`).
"""

from __future__ import annotations

import asyncio
import ctypes
import itertools
import threading
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from argosy.guard.limits import TooMany

NUM_THREADS = 2
MAX_WAITING = 256  # jobs of one tenant
_RETRY_S = 2

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(slots=True, eq=False)
class _Job:
    call: Callable[[], Any]
    is_large: bool
    future: Future[Any]

    def run(self) -> None:
        try:
            result = self.call()
        except BaseException as error:
            _clear_frames(error)
            self.future.set_exception(error)
        else:
            self.future.set_result(result)


class WorkQueue:
    """Runs jobs of many tenants in `num_threads` threads; any event loop may ask."""

    def __init__(self, *, num_threads: int = NUM_THREADS, max_waiting: int = MAX_WAITING) -> None:
        self._max_waiting = max_waiting
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="argosy-work")
        self._lock = threading.Lock()  # guards what follows
        self._num_free = num_threads
        self._has_large = False  # one runs
        self._waiting: dict[str, deque[_Job]] = {}
        self._began: dict[str, int] = {}  # by tenant, the number of its last job
        self._numbers = itertools.count(1)

    async def run(self, tenant: str, call: Callable[P, T], *args: P.args, **named: P.kwargs) -> T:
        """Run `call` in a thread and return its result. Raises what `call` raises.

        Raises:
            TooMany: the queue of this tenant is full.
        """
        return await self._result(tenant, lambda: call(*args, **named), is_large=False)

    async def run_large(self, tenant: str, call: Callable[P, T], *args: P.args, **named: P.kwargs) -> T:
        """Do the same for a job that needs much memory: only one such job runs at a time."""
        return await self._result(tenant, lambda: call(*args, **named), is_large=True)

    async def _result(self, tenant: str, call: Callable[[], T], *, is_large: bool) -> T:
        future: Future[T] = Future()
        job = _Job(call, is_large, future)
        with self._lock:
            queue = self._waiting.setdefault(tenant, deque())
            if len(queue) >= self._max_waiting:
                raise TooMany(
                    f"{len(queue)} requests of this key wait to be read, which is as many as may",
                    retry_after_s=_RETRY_S,
                )
            queue.append(job)
        self._start_jobs()
        try:
            return await asyncio.wrap_future(future)
        finally:
            self._drop(tenant, job)  # of a client that hung up while it waited

    def _drop(self, tenant: str, job: _Job) -> None:
        with self._lock:
            queue = self._waiting.get(tenant, deque())
            if job in queue:
                queue.remove(job)

    def _start_jobs(self) -> None:
        with self._lock:
            while self._num_free and (job := self._next()) is not None:
                self._num_free -= 1
                self._has_large |= job.is_large
                self._threads.submit(self._run, job)

    def _next(self) -> _Job | None:
        """Take the next job of the tenant whose last one began longest ago."""
        for tenant in sorted(self._waiting, key=lambda tenant: self._began.get(tenant, 0)):
            queue = self._waiting[tenant]
            while queue and queue[0].future.cancelled():
                queue.popleft()
            if queue and not (queue[0].is_large and self._has_large):
                self._began[tenant] = next(self._numbers)
                return queue.popleft()
            if not queue:
                del self._waiting[tenant]
        return None

    def _run(self, job: _Job) -> None:
        if job.future.set_running_or_notify_cancel():
            job.run()
        is_large = job.is_large
        del job  # what it made is its request's alone
        if is_large:
            give_memory_back()
        with self._lock:
            self._num_free += 1
            self._has_large &= not is_large
        self._start_jobs()


def _clear_frames(error: BaseException) -> None:
    """Let go of what the calls that failed held: an error lives on in circles that are found late, a body with it."""
    found: BaseException | None = error
    while found is not None:
        traceback.clear_frames(found.__traceback__)
        found = found.__context__


def give_memory_back() -> None:
    """Have the C library give the system what it holds free, in every thread's arena; nothing where it cannot.

    Without it half of what a long text took stays with the process, as small blocks that are in use lie between.
    """
    if _malloc_trim is not None:
        _malloc_trim(0)


_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
