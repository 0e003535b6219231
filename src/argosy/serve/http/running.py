"""The running requests, and everything that ends them.

    gate: a request begins  ->  Running.entered        its key, persons and model become known  ->  Run.go_on
    a stop, a revoked key, an erasure, the end of the server  ->  Running.look ─┐
    the client leaves  ─────────────────────────────────────────────────────────┴─>  Run.end(why)
    Run.end  ->  the request's task is cancelled, wherever it waits; threads that work for it call Run.go_on

`Running.why_not` decides whether a request may start and whether a running one must end. `look` calls it for every
running request and ends those that may not go on, before their next token or event. The error that ends a request
is its answer, as a status or as the last event of its stream. Operators' commands are not ended: once begun, they
finish.

Elsewhere: `guard/stops.py` keeps an operator's stops; `serve/admin/key_watch.py` notices revoked keys; `gate.py`
enters requests, and `streams.py` writes the last event.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TypeVar

from starlette.types import Receive

from argosy.errors import ArgosyError, Overloaded, Revoked
from argosy.guard.keys import Key

_ERASE_S = 30.0  # how long an erasure waits for threads that still work for the key
_LOOK_S = 0.01
_RETRY_STOPPING_S = 30

T = TypeVar("T")
WhyNot = Callable[[Key | None, Collection[str], Collection[str]], ArgosyError | None]


class GoneAway(Exception):
    """The client has disconnected."""


class Running:
    """The running requests of a server.

    Args:
        stopped: given a key and the `uses` and `persons` of a `Run`, returns why it may not run, or None if it may.
    """

    def __init__(self, stopped: WhyNot = lambda key, uses, persons: None) -> None:
        self._stopped = stopped
        self._runs: set[Run] = set()  # used only by the event loop
        self._events: asyncio.AbstractEventLoop | None = None
        self._is_over = False
        self._revoked: set[str] = set()
        self._erasing: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._at_work: Counter[str] = Counter()  # working threads by tenant; guarded by the lock

    def __len__(self) -> int:
        return len(self._runs)

    def why_not(self, run: Run) -> ArgosyError | None:
        """Why a request may not run now, or None if it may. Any thread may call this."""
        if self._is_over:
            return Overloaded("the server is stopping", retry_after_s=_RETRY_STOPPING_S)
        if run.tenant in self._revoked:
            return Revoked("the key was revoked")
        if self._erasing[run.tenant]:
            return Overloaded("the data of this key was erased, and with it this request", retry_after_s=1)
        return self._stopped(run.key, run.uses, run.persons)

    @contextmanager
    def entered(self, run: Run) -> Iterator[None]:
        """Run a request in the current task. If it is ended, the error that ended it is raised."""
        task = asyncio.current_task()
        assert task is not None
        run._task, self._events = task, task.get_loop()
        self._runs.add(run)
        try:
            run.go_on()
            yield
        except asyncio.CancelledError:
            if run.ended is None:  # cancelled by uvicorn, which closes the connection
                raise
            raise run.ended.with_traceback(None) from None
        finally:
            if run._is_cancelled:
                task.uncancel()
            if run._watching is not None:
                run._watching.cancel()
            run._task = None
            self._runs.discard(run)
            run.ended = run.ended or GoneAway()  # tells threads that still work for it

    def look(self) -> None:
        """End the requests that may not go on. Call this in the event loop."""
        for run in tuple(self._runs):
            if (why := self.why_not(run)) is not None:
                run.end(why)

    def look_soon(self) -> None:
        """`look`, from any thread."""
        if self._events is not None:
            with suppress(RuntimeError):  # the event loop is closed, so nothing runs
                self._events.call_soon_threadsafe(self.look)

    def revoke(self, key_id: str) -> None:
        """End a key's requests and refuse new ones for good. Any thread may call this."""
        self._revoked.add(key_id)
        self.look_soon()

    def stop(self) -> None:
        """End all requests and refuse new ones. Call this in the event loop."""
        self._is_over = True
        self.look()

    async def erase(self, key_id: str, erase: Callable[[], T]) -> T:
        """End a key's requests, then call `erase` in a thread. New requests are refused until that is done.

        Raises:
            Overloaded: threads were still working for those requests at the end and may have kept something after
                the erasure.
        """
        self._erasing[key_id] += 1
        try:
            self.look()
            until = time.monotonic() + _ERASE_S
            while self.is_at_work(key_id) and time.monotonic() < until:
                await asyncio.sleep(_LOOK_S)
            was_at_work = self.is_at_work(key_id)
            made = await asyncio.to_thread(erase)
        finally:
            self._erasing[key_id] -= 1
            self._erasing += Counter()  # drops zeros
        if was_at_work:
            raise Overloaded(
                f"the data was erased, but a request of this key has not ended within {_ERASE_S:.0f} s",
                retry_after_s=int(_ERASE_S),
                hint="erase again, because that request may have kept something",
            )
        return made

    def is_at_work(self, tenant: str) -> bool:
        """Whether a thread is working for a tenant, even for an ended request."""
        with self._lock:
            return self._at_work[tenant] > 0

    @contextmanager
    def at_work(self, tenant: str) -> Iterator[None]:
        """Count a thread as working for a tenant."""
        with self._lock:
            self._at_work[tenant] += 1
        try:
            yield
        finally:
            with self._lock:
                self._at_work[tenant] -= 1
                if not self._at_work[tenant]:
                    del self._at_work[tenant]


@dataclass(slots=True, eq=False)
class Run:
    """A request, its client, and the reason why it has ended.

    persons: the users that its client names.
    uses: the id of the model that it uses, and the preset's name if it names one; empty until then.
    ended: why it has ended; None while it runs.
    """

    key: Key | None = None
    persons: Collection[str] = ()
    uses: Collection[str] = ()
    ended: Exception | None = None
    running: Running = field(default_factory=Running)
    _task: asyncio.Task[object] | None = None  # while it runs
    _watching: asyncio.Task[None] | None = None
    _is_cancelled: bool = False

    @property
    def tenant(self) -> str:
        """Prompt prefixes are shared only within a tenant."""
        return "" if self.key is None else self.key.id

    def go_on(self) -> None:
        """Raise the error that has ended the request, or that forbids it to run. Any thread may call this."""
        if (why := self.ended or self.running.why_not(self)) is not None:
            raise why.with_traceback(None)

    def end(self, why: Exception) -> None:
        """End the request by cancelling its task. Call this in the event loop; only the first call has an effect."""
        if self.ended is None:
            self.ended = why
            if self._task is not None:
                self._is_cancelled = self._task.cancel()

    def let_finish(self) -> None:
        """Stop cancelling its task: only the end of its answer is still to be sent."""
        self._task = None

    def watch(self, receive: Receive) -> None:
        """End the request if its client disconnects while it runs. Nothing else may be reading its body."""
        if self._task is not None and self._watching is None:
            self._watching = asyncio.create_task(self._watch(receive))

    async def _watch(self, receive: Receive) -> None:
        try:
            while (await receive())["type"] != "http.disconnect":
                pass
        except Exception as error:
            self.end(error)
        self.end(GoneAway())

    def work(self, call: Callable[[], T]) -> T:
        """Run a call for the request in a thread. Erasing the key waits for it, because it may store something.

        Raises what `go_on` and `call` raise.
        """
        with self.running.at_work(self.tenant):
            self.go_on()
            return call()
