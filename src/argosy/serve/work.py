"""Work that a request needs before the engine (parsing, rendering, tokenizing), in a few threads shared fairly.

    run(tenant, call)  ->  the tenant's own queue  ->  tenants in turn  ->  a thread  ->  result

A free thread goes to the tenant whose last job began longest ago, so a tenant with one job waits for the first free
thread, however many jobs another has queued. A tenant's queue is bounded.

Large jobs have a queue of their own with one thread, so that their memory is needed only once and small jobs never wait
for them. After each of them that thread rests.

Elsewhere: steps of the model run in the engine's own thread (`engine/loop.py`).
"""

from __future__ import annotations

import asyncio
import ctypes
import itertools
import threading
import time
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
# After a large job its thread rests for so many times as long as that took, so that a flood of them leaves time for the
# model: they take half of a core at most, and a quarter where they come to nothing.
_REST, _REST_AFTER_FAILURE = 1.0, 3.0
_LONGEST_REST_S = 1.0

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(slots=True, eq=False)
class _Job:
    call: Callable[[], Any]
    future: Future[Any]

    def run(self) -> bool:
        """Returns whether it came to its end."""
        try:
            result = self.call()
        except BaseException as error:
            _clear_frames(error)
            self.future.set_exception(error)
            return False
        self.future.set_result(result)
        return True


class WorkQueue:
    """Runs jobs of many tenants in `num_threads` threads; any event loop may ask.

    Args:
        max_waiting: jobs of one tenant beside those that run.
        is_large: its jobs take much memory and time.
    """

    def __init__(
        self, *, num_threads: int = NUM_THREADS, max_waiting: int = MAX_WAITING, is_large: bool = False
    ) -> None:
        self._max_waiting = max_waiting
        self._is_large = is_large
        self._threads = ThreadPoolExecutor(
            num_threads, thread_name_prefix="argosy-large" if is_large else "argosy-work"
        )
        self._lock = threading.Lock()  # guards what follows
        self._num_free = num_threads
        self._waiting: dict[str, deque[_Job]] = {}
        self._began: dict[str, int] = {}  # by tenant, the number of its last job
        self._numbers = itertools.count(1)

    async def run(self, tenant: str, call: Callable[P, T], *args: P.args, **named: P.kwargs) -> T:
        """Run `call` in a thread and return its result. Raises what `call` raises.

        Raises:
            TooMany: the queue of this tenant is full.
        """
        future: Future[T] = Future()
        job = _Job(lambda: call(*args, **named), future)
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
                self._threads.submit(self._run, job)

    def _next(self) -> _Job | None:
        """Take the next job of the tenant whose last one began longest ago."""
        for tenant in sorted(self._waiting, key=lambda tenant: self._began.get(tenant, 0)):
            queue = self._waiting[tenant]
            while queue and queue[0].future.cancelled():
                queue.popleft()
            if queue:
                self._began[tenant] = next(self._numbers)
                return queue.popleft()
            del self._waiting[tenant]
        return None

    def _run(self, job: _Job) -> None:
        began, is_done = time.monotonic(), False
        if job.future.set_running_or_notify_cancel():
            is_done = job.run()
        del job  # what it made is its request's alone
        if self._is_large:
            give_memory_back()
            rest = _REST if is_done else _REST_AFTER_FAILURE
            time.sleep(min(_LONGEST_REST_S, rest * (time.monotonic() - began)))
        with self._lock:
            self._num_free += 1
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
