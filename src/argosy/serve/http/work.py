"""Run work before the engine (parsing, rendering, tokenizing) in a few threads that tenants share fairly.

    run(tenant, call)  ->  the tenant's own queue  ->  tenants in turn  ->  a thread  ->  result

A free thread goes to the tenant whose last job began longest ago. A tenant with one job therefore waits only for
the first free thread, however many jobs another tenant has queued. A tenant's queue is bounded.

A thread starts with the first job and ends after a while without any. If the system refuses a thread, the running
threads take its job; if none runs, every waiting job is refused, so that none waits for a thread that never comes.

Large jobs have their own queue with one thread, so that only one of them needs memory at a time and small jobs never
wait for them. After each large job the thread rests.

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

from argosy.config import counted
from argosy.errors import as_exception, refused_by_system
from argosy.guard.limits import TooMany

NUM_THREADS = 2
MAX_WAITING = 256  # jobs per tenant
JOB_S = 120.0  # a queue in which no waiting job has begun or ended for this long has stopped
LARGE_JOB_S = 900.0  # the same for large jobs
_RETRY_S = 2
# A thread without a job ends after this long. Starting a thread can block the event loop for milliseconds.
_LINGER_S = 5.0
# After a large job the thread rests for this multiple of the job's time, but at most a second, so that a flood of
# large jobs leaves time for the model: jobs of up to a third of a second use half a core, or a quarter if they
# fail.
_REST, _REST_AFTER_FAILURE = 1.0, 3.0
_LONGEST_REST_S = 1.0

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(slots=True, eq=False)
class _Job:
    call: Callable[[], Any]
    future: Future[Any]

    def run(self) -> bool:
        """Run the call; return whether it succeeded."""
        try:
            result = self.call()
        except BaseException as error:
            _clear_frames(error)
            self.future.set_exception(as_exception(error))
            return False
        self.future.set_result(result)
        return True


class WorkQueue:
    """Runs the jobs of many tenants in `num_threads` threads; any event loop may use it.

    Args:
        max_waiting: the longest queue of one tenant, not counting running jobs.
        is_large: the jobs take much memory and time.
        job_s: how long a job may take before `has_stopped`; None: JOB_S, or LARGE_JOB_S for large jobs.
    """

    def __init__(
        self, *, num_threads: int = NUM_THREADS, max_waiting: int = MAX_WAITING, is_large: bool = False,
        job_s: float | None = None,
    ) -> None:  # fmt: skip
        self._max_waiting = max_waiting
        self._is_large = is_large
        self._num_threads = num_threads
        self._job_s = job_s or (LARGE_JOB_S if is_large else JOB_S)
        # guards the following fields; notified of new jobs
        self._changed = threading.Condition(threading.Lock())
        self._num_running = 0  # threads
        self._num_idle = 0  # threads waiting for a job
        self._waiting: dict[str, deque[_Job]] = {}
        self._began: dict[str, int] = {}  # tenant -> number of its last job
        self._numbers = itertools.count(1)
        self._moved_at = 0.0  # when a job last began or ended, or entered an empty queue

    @property
    def has_stopped(self) -> bool:
        """Whether jobs are waiting and none has begun or ended for longer than a job may take."""
        with self._changed:
            return any(self._waiting.values()) and time.monotonic() - self._moved_at > self._job_s

    async def run(self, tenant: str, call: Callable[P, T], *args: P.args, **named: P.kwargs) -> T:
        """Run `call` in a thread and return its result. Raises what `call` raises.

        Raises:
            TooMany: the queue of this tenant is full.
            Overloaded: the system refuses a thread and none of the queue is running.
        """
        future: Future[T] = Future()
        job = _Job(lambda: call(*args, **named), future)
        with self._changed:
            if not any(self._waiting.values()):
                self._moved_at = time.monotonic()
            queue = self._waiting.setdefault(tenant, deque())
            if len(queue) >= self._max_waiting:
                raise TooMany(
                    f"{counted(len(queue), 'request')} of this key already waiting to be read, which is the limit",
                    retry_after_s=_RETRY_S,
                )
            queue.append(job)
            num_waiting = sum(map(len, self._waiting.values()))
            is_new_thread = num_waiting > self._num_idle and self._num_running < self._num_threads
            self._num_running += is_new_thread
            self._changed.notify()
        if is_new_thread:
            self._start_thread()
        try:
            return await asyncio.wrap_future(future)
        finally:
            self._drop(tenant, job)  # the client may have disconnected while the job waited

    def _drop(self, tenant: str, job: _Job) -> None:
        with self._changed:
            queue = self._waiting.get(tenant, deque())
            if job in queue:
                queue.remove(job)

    def _start_thread(self) -> None:
        """Start a thread, already counted as running; if none is left, refuse the waiting jobs."""
        name = "argosy-large" if self._is_large else "argosy-work"
        try:
            threading.Thread(target=self._run, name=name, daemon=True).start()
        except RuntimeError as error:
            with self._changed:
                self._num_running -= 1
                refused = (
                    [] if self._num_running else [job for queue in self._waiting.values() for job in queue]
                )
                if refused:
                    self._waiting.clear()
            for job in refused:
                if job.future.set_running_or_notify_cancel():
                    job.future.set_exception(refused_by_system(error) or error)

    def _next(self) -> _Job | None:
        """Take the next job of the tenant whose last job began longest ago."""
        for tenant in sorted(self._waiting, key=lambda tenant: self._began.get(tenant, 0)):
            queue = self._waiting[tenant]
            while queue and queue[0].future.cancelled():
                queue.popleft()
            if queue:
                self._began[tenant] = next(self._numbers)
                return queue.popleft()
            del self._waiting[tenant]
        return None

    def _run(self) -> None:
        while True:
            with self._changed:
                self._moved_at = time.monotonic()
                while (job := self._next()) is None:
                    self._num_idle += 1
                    was_told = self._changed.wait(_LINGER_S)
                    self._num_idle -= 1
                    if not was_told and not any(self._waiting.values()):
                        self._num_running -= 1
                        return
                began = self._moved_at = time.monotonic()
            is_done = False
            if job.future.set_running_or_notify_cancel():
                is_done = job.run()
            del job  # keep no reference to its result
            if self._is_large:
                give_memory_back()
                rest = _REST if is_done else _REST_AFTER_FAILURE
                time.sleep(min(_LONGEST_REST_S, rest * (time.monotonic() - began)))


class Threads(ThreadPoolExecutor):
    """A pool for calls that wait for files and engines. If the system refuses a thread, `submit` raises Overloaded."""

    def submit(self, call: Callable[P, T], /, *args: P.args, **named: P.kwargs) -> Future[T]:
        """Raises: Overloaded: the system refuses a thread."""
        try:
            return super().submit(call, *args, **named)
        except RuntimeError as error:
            raise refused_by_system(error) or error from None


def _clear_frames(error: BaseException) -> None:
    """Free the locals of failed calls, because reference cycles keep an error alive for long, and the body with it."""
    found: BaseException | None = error
    while found is not None:
        traceback.clear_frames(found.__traceback__)
        found = found.__context__


def give_memory_back() -> None:
    """Make the C library return the free memory of all threads' arenas to the system, if possible.

    Otherwise half of a long text's memory stays with the process, because small blocks in use lie in between.
    """
    if _malloc_trim is not None:
        _malloc_trim(0)


def share_one_heap() -> None:
    """Make all threads started later allocate from a single arena of the C library, if possible.

    With an arena per thread, one thread's free memory is useless to another, and a server with many threads grows
    by fragmentation for hours.
    """
    if _mallopt is not None:
        _mallopt(_M_ARENA_MAX, 1)


_M_ARENA_MAX = -8  # <malloc.h>
_malloc_trim, _mallopt = (
    getattr(ctypes.CDLL(None), name, None) for name in ("malloc_trim", "mallopt")
)  # these exist in glibc
