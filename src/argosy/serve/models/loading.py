"""Move memory among the models of a server: loading, unloading, and dividing what the floors leave.

    a request names a model  ─>  its floor is taken from idle models, its share from all  ─>  read  ─>  ready

Requests for a model in memory never wait for memory to move. All state here belongs to the event loop; anything
that waits for an engine or a drive runs in a thread. `_moving` is held while memory changes hands, but not while a
model is read. The order of locks is `_moving`, then those of the engines; nothing here runs inside a turn. Memory
taken from one model is back with the system before another may use it, so the sum never exceeds the budget.

Elsewhere: `budget/shares.py` has the rule; `models.py` finds models and reports their state.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import ParamSpec, TypeVar

from argosy.budget.requirements import require_budget
from argosy.budget.shares import IN_USE_S, Demand, divide
from argosy.config import MIB, format_bytes
from argosy.errors import ArgosyError, DoesNotFit, Overloaded
from argosy.serve.answer.service import Service
from argosy.serve.http.log import where_it_failed
from argosy.serve.http.work import Threads
from argosy.serve.models.entry import Entry

log = logging.getLogger("argosy.serve")

P = ParamSpec("P")
T = TypeVar("T")

LOOK_S = 1.0  # how often to look for idle models and for models that could use more memory
_RETRY_S = 10.0  # the wait before retrying a model that could not be opened
_RETRY_STOPPING_S = 30


class Loader:
    """Brings the models of a server into memory and out of it, within one budget.

    Attributes:
        entries: its models.
        lasting: the only model, if it stays in memory and has all of the budget; None: models come and go.
        budget_bytes: the current budget.
        process_bytes: the process's part of it, not counting models.
        is_stopped: no more models are loaded.

    Args:
        idle_unload_s: unload a model after this long without requests; None: only if its memory is needed.
        num_threads: for calls that wait for an engine or a drive.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        *,
        budget_bytes: int,
        process_bytes: int,
        idle_unload_s: float | None,
        num_threads: int,
        clock: Callable[[], float],
    ) -> None:
        self.entries = list(entries)
        self.lasting = next((entry for entry in entries if entry.stays), None)
        self.budget_bytes, self.process_bytes = budget_bytes, process_bytes
        self.is_stopped = False
        self._idle_unload_s, self._clock = idle_unload_s, clock
        self._revoked: set[str] = set()
        self._moving = asyncio.Lock()
        self._threads = Threads(num_threads, thread_name_prefix="argosy-models")
        self._looking: asyncio.Task[None] | None = None
        self._is_closed = asyncio.Event()

    @property
    def held_bytes(self) -> int:
        """The memory that the process and its models hold of a shared budget."""
        return self.process_bytes + sum(entry.held_bytes for entry in self.entries)

    def services(self) -> list[Service]:
        """The services of the models in memory, the first one first."""
        return [entry.service for entry in self.entries if entry.service is not None]

    def opening(self, entry: Entry) -> asyncio.Task[None]:
        """The task that loads a model, started unless it is already running."""
        if entry.opening is None:
            entry.opening = asyncio.create_task(self._open(entry))
            entry.opening.add_done_callback(_retrieve)  # all waiting requests may have gone
        return entry.opening

    def in_thread(self, call: Callable[P, T], *args: P.args, **named: P.kwargs) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self._threads, partial(call, *args, **named))

    def revoke(self, tenant: str) -> None:
        """End a revoked tenant's requests and delete all of its data. Any thread may call this."""
        self._revoked.add(tenant)
        for entry in self.entries:
            if (service := entry.service) is not None:
                service.revoke(tenant)
            else:
                entry.forget(tenant)

    def erase(self, tenant: str) -> int:
        """End a tenant's running requests and delete its data. Any thread may call this.

        Returns:
            The number of answers that were kept for replay.
        """
        num_answers = 0
        for entry in self.entries:
            if (service := entry.service) is not None:
                num_answers += service.erase(tenant)
            else:
                entry.forget(tenant)
        return num_answers

    async def stop(self) -> None:
        """End running requests and loads."""
        self.is_stopped = True
        await asyncio.gather(*(self.in_thread(service.loop.close) for service in self.services()))

    async def close(self) -> None:
        """End everything and free the models loaded here. Closing twice is harmless."""
        if self._is_closed.is_set():
            return
        self._is_closed.set()
        await self.stop()
        if self._looking is not None:
            await self._looking
        opening = [entry.opening for entry in self.entries if entry.opening is not None]
        await asyncio.gather(*opening, return_exceptions=True)
        async with self._moving:
            for entry in self.entries:
                if entry.service is not None:
                    await self._unload(entry)
        self._threads.shutdown()

    async def unload(self, entry: Entry) -> bool:
        """Unload a model now, unless a request uses it or it must stay in memory.

        Returns:
            Whether it is out of memory.
        """
        if self.lasting is not None:
            return False
        # The client may disconnect; the change still completes.
        return await asyncio.shield(asyncio.create_task(self._unload_if_idle(entry)))

    async def _unload_if_idle(self, entry: Entry) -> bool:
        async with self._moving:
            if entry.is_idle:
                await self._unload(entry)
            return not entry.is_here

    async def resize(self, budget_bytes: int) -> None:
        """Change the memory budget while requests continue.

        Experts are evicted first, then KV blocks of the only model, or idle models. The memory is back with the
        system when this returns.

        Raises:
            DoesNotFit: it is less than current answers need, or more than the machine has; nothing has changed.
            Overloaded: a model is being loaded.
        """
        # The client may disconnect; the change still completes.
        await asyncio.shield(asyncio.create_task(self._resize(budget_bytes)))

    async def _resize(self, budget_bytes: int) -> None:
        async with self._moving:
            if self.lasting is not None and self.lasting.service is not None:
                await self.in_thread(self.lasting.service.resize, budget_bytes)
                self.budget_bytes = budget_bytes
                return
            await self.in_thread(require_budget, budget_bytes)
            here = [one for one in self.entries if one.is_here]
            if any(one.is_loading for one in here):
                raise Overloaded(
                    "a model is being loaded, and its share is fixed until then", retry_after_s=1
                )
            free_bytes = self._bytes_beside_floors() - self.budget_bytes + budget_bytes
            leaving: list[Entry] = []
            for idle in sorted((one for one in here if one.is_idle), key=lambda one: one.used_at):
                if free_bytes >= 0:
                    break
                leaving.append(idle)
                free_bytes += idle.floor_bytes
            if free_bytes < 0:
                needed = budget_bytes - free_bytes
                raise DoesNotFit(
                    f"models that answer now need {format_bytes(needed)} of memory, and the budget would be "
                    f"{format_bytes(budget_bytes)}",
                    hint=f"{-(-needed // MIB)}MiB works now",
                    needed_bytes=needed,
                    budget_bytes=budget_bytes,
                )
            await self._unload_all(leaving)
            self.budget_bytes = budget_bytes
            for entry in self.entries:
                if isinstance(entry.fault, DoesNotFit):  # under the old budget
                    entry.fault = None
            await self._divide()

    def _forget_unused(self, entry: Entry) -> None:
        """Free the preparations for a model that is not open."""
        if not entry.is_here:
            entry.release()

    async def _open(self, entry: Entry) -> None:
        """Make room for a model and read it."""
        try:
            while True:
                async with self._moving:
                    if not entry.num_uses or (entry.service is not None and not entry.is_leaving):
                        return
                    self._require_wanted()
                    if entry.fault is not None and self._clock() - entry.failed_at < _RETRY_S:
                        raise entry.fault.with_traceback(None)
                    await self._attempt(entry, entry.prepare, self.budget_bytes)
                    if await self._make_room(entry):
                        break
                    reading = [
                        one.opening for one in self.entries if one.is_loading and one.opening is not None
                    ]
                entry.has_no_room = True
                await asyncio.wait(reading, return_when=asyncio.FIRST_COMPLETED)
                entry.has_no_room = False
            log.info("models: %s is loaded, with %s", entry.name, format_bytes(entry.held_bytes))
            await self._read(entry)
        finally:
            entry.opening, entry.has_no_room = None, False
            self._forget_unused(entry)

    async def _read(self, entry: Entry) -> None:
        def tell(task: str, share: float) -> None:  # in a thread
            self._require_wanted()
            entry.share_read = share

        entry.share_read = None
        service = await self._attempt(entry, entry.open, entry.expert_bytes, tell)
        entry.service, entry.is_loading, entry.fault = service, False, None
        entry.used_at = self._clock()
        if self._looking is None and not self.is_stopped:  # even if all waiting requests have gone
            self._looking = asyncio.create_task(self._look())
        for tenant in tuple(self._revoked):  # the key was revoked while the model was being read
            service.revoke(tenant)

    async def _attempt(self, entry: Entry, call: Callable[P, T], *args: P.args, **named: P.kwargs) -> T:
        """Run a step of opening a model in a thread; a failure is remembered and not retried at once."""
        try:
            return await self.in_thread(call, *args, **named)
        except Exception as error:
            entry.is_loading, entry.expert_bytes = False, 0
            if self.is_stopped:
                raise _stopping() from None
            log.error("models: %s cannot be opened: %s", entry.name, where_it_failed(error))
            entry.fault = (
                error if isinstance(error, ArgosyError) else ArgosyError("the model cannot be opened")
            )
            entry.failed_at = self._clock()
            raise entry.fault from None

    def _require_wanted(self) -> None:
        """Raise if the server is stopping. Any thread may call this."""
        if self.is_stopped:
            raise _stopping()

    async def _make_room(self, entry: Entry) -> bool:
        """Take a model's floor from others, and its share of what the floors leave; `_moving` is held.

        Returns:
            False if experts of a model being read are in the way, because they can leave only afterwards. Nothing
            has changed then.

        Raises:
            Overloaded: the floors of answering models leave too little. Nothing has changed then.
        """
        needed, free_bytes = entry.floor_bytes, self._bytes_beside_floors()
        leaving: list[Entry] = []
        for idle in sorted((one for one in self.entries if one.is_idle), key=lambda one: one.used_at):
            if needed <= free_bytes:
                break
            leaving.append(idle)
            free_bytes += idle.floor_bytes
        if needed > free_bytes:
            raise self._no_room(entry, free_bytes)
        if needed > free_bytes - self._loading_bytes():
            return False
        await self._unload_all(leaving)
        await self._divide(entry)
        return True

    def _loading_bytes(self) -> int:
        """The memory for experts of models being read, which is fixed until they are ready."""
        return sum(one.expert_bytes for one in self.entries if one.is_loading)

    def _bytes_beside_floors(self) -> int:
        """What the process and the floors of the models in memory leave of the budget."""
        floors = sum(one.floor_bytes for one in self.entries if one.is_here)
        return self.budget_bytes - self.process_bytes - floors

    def _no_room(self, entry: Entry, free_bytes: int) -> Overloaded:
        needed = entry.floor_bytes
        busy = [one for one in self.entries if one.is_here and not one.is_idle]
        held = [(one.name, one.floor_bytes) for one in busy]
        parts = "  +  ".join(f"{name} {format_bytes(nbytes)}" for name, nbytes in held)
        enough = -(-(self.budget_bytes + needed - free_bytes) // MIB)
        free = format_bytes(max(0, free_bytes))
        budget = f"the budget of {format_bytes(self.budget_bytes)}"
        hint = f"start the server with `--memory {enough}MiB`"
        if held:
            said = f"models that answer now leave {free} of {budget}\n  {parts}  (without experts)"
            hint = f"try again when {' or '.join(name for name, _ in held)} has answered, or {hint}"
        else:
            said = f"{budget} leaves {free} for models"
        return Overloaded(
            f"{entry.name} needs {format_bytes(needed, rounds_up=True)}, and {said}",
            retry_after_s=int(_RETRY_S),
            hint=hint,
            needed_bytes=needed,
            free_bytes=free_bytes,
        )

    async def _divide(self, joining: Entry | None = None) -> None:
        """Give each model its share of the memory for experts, shrinking before growing; `_moving` is held.

        joining: a model about to be read, which takes its floor and its share.
        """
        free_bytes = self._bytes_beside_floors() - self._loading_bytes()
        if joining is not None:
            free_bytes -= joining.floor_bytes
        sharing = [entry for entry in self.entries if entry is joining or entry.state == "ready"]
        now = self._clock()
        demands = [self._demand(entry, now, is_joining=entry is joining) for entry in sharing]
        shares = list(zip(sharing, divide(free_bytes, demands), strict=True))
        for entry, share_bytes in shares:
            if share_bytes < entry.expert_bytes and entry.service is not None:
                await self.in_thread(entry.resize, share_bytes)
                entry.expert_bytes = share_bytes
        for entry, share_bytes in shares:
            if share_bytes > entry.expert_bytes and entry.service is not None:
                entry.expert_bytes = share_bytes  # set first, because allowed memory counts as used
                await self.in_thread(entry.resize, share_bytes)
        if joining is not None:
            (joining.expert_bytes,) = (share_bytes for entry, share_bytes in shares if entry is joining)
            joining.is_loading = True
        assert self.held_bytes <= self.budget_bytes

    @staticmethod
    def _demand(entry: Entry, now: float, *, is_joining: bool) -> Demand:
        return Demand(
            most_bytes=entry.most_bytes,
            held_bytes=entry.expert_bytes,
            used_at=entry.used_at,
            is_in_use=is_joining or entry.num_uses > 0 or now - entry.used_at < IN_USE_S,
        )

    async def _unload_all(self, leaving: Sequence[Entry]) -> None:
        """Unload idle models; the caller holds `_moving`. If no thread is free for one, the rest also stay."""
        for entry in leaving:
            entry.is_leaving = True  # no request can start to use one meanwhile
        try:
            for entry in leaving:
                await self._unload(entry)
        finally:
            for entry in leaving:
                entry.is_leaving = False

    async def _unload(self, entry: Entry) -> None:
        """Free a model's memory; the caller holds `_moving`."""
        assert entry.service is not None
        entry.is_leaving, is_told = True, not self.is_stopped
        try:
            await self.in_thread(entry.close)
        except Overloaded:  # no thread for it: the model stays as it is
            entry.is_leaving = False
            raise
        except Exception as error:
            log.error("models: %s did not end well: %s", entry.name, where_it_failed(error))
        entry.service, entry.is_leaving, entry.expert_bytes = None, False, 0
        self._forget_unused(entry)
        if is_told:
            log.info("models: %s is unloaded", entry.name)

    async def _look(self) -> None:
        """Periodically unload models that have been idle for long, and give answering models the memory they can
        use.
        """
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._is_closed.wait()
            if self._is_closed.is_set():
                return
            try:
                async with self._moving:
                    await self._look_once()
            except Exception as error:  # keep looking after any failure
                log.error("models: %s", where_it_failed(error))

    async def _look_once(self) -> None:
        now = self._clock()
        for entry in self.entries:
            if (
                self._idle_unload_s is not None
                and entry.is_idle
                and now - entry.used_at >= self._idle_unload_s
            ):
                await self._unload(entry)
        if any(self._could_use_more(entry) for entry in self.entries):
            await self._divide()

    @staticmethod
    def _could_use_more(entry: Entry) -> bool:
        if entry.state != "ready" or not entry.num_uses:
            return False
        return entry.expert_bytes < entry.most_bytes


def _retrieve(task: asyncio.Task[None]) -> None:
    if not task.cancelled():
        task.exception()


def _stopping() -> Overloaded:
    return Overloaded("the server is stopping", retry_after_s=_RETRY_STOPPING_S)
