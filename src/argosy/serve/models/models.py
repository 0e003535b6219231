"""The models of a server: which are in memory, and how they share the budget.

    name  ─ find ─>  entry: unloaded -> loading -> ready -> unloaded  ─ use ─>  Service, until the request has ended
                       ─ open fails ─>  failed  ─ the next request, after a while ─>  loading

A server with one model has it ready from start to end, and nothing here moves. A server with several loads a model when
a request first names it. A model takes its floor, and `budget/shares.py` divides what the floors leave among the models
in memory. Idle models give their experts first; a model is unloaded only if another one's floor does not fit otherwise,
after `idle_unload_s` without requests, or if a request asks for it and no other uses the model. A model whose floor
does not fit beside models that answer is refused. One that only experts of a model that is being read keep out waits
until they can leave.

A preset is a further name of a model: it loads nothing, and shares the model's engine, memory and queue. The name of a
model always means the model.

A server may have a library: its models come and go with their files (`Shelf`), and each is made ready, with tokenizer
and plan, when it is loaded, and forgotten when it is unloaded.

Requests for a model in memory never wait for memory that moves. All state here belongs to the event loop. Whatever
waits for an engine or a drive runs in a thread. `_moving` is held while memory changes hands, and not while a model is
read. The order of locks is `_moving`, then those of the engines; nothing here runs inside a turn. Memory is taken from
one model, and is with the system, before another one may use it. So the sum never exceeds the budget.

Elsewhere: `opened.py` opens an engine; `serve/answer/service.py` has the service of one model; `serve/dialects/body.py`
calls `use_model`.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Literal, ParamSpec, Protocol, TypeVar

from argosy.budget.requirements import require_budget
from argosy.budget.shares import IN_USE_S, Claim, divide
from argosy.config import MIB, Preset, format_bytes
from argosy.engine.progress import MOST_WAITS, RequestWait
from argosy.errors import ArgosyError, DoesNotFit, Overloaded, UsageError
from argosy.prompt.prompt import ToolCalling
from argosy.prompt.thinking import ThinkingSwitch
from argosy.serve.answer.facts import ModelFacts
from argosy.serve.answer.kept_items import KeptItems
from argosy.serve.answer.service import Service
from argosy.serve.answer.work import Work
from argosy.serve.http.caller import Caller
from argosy.serve.http.failures import Refused
from argosy.serve.http.log import where_it_failed
from argosy.serve.http.work import Threads

if TYPE_CHECKING:
    from starlette.requests import Request

    from argosy.prompt.tokenizer import Tokenizer

log = logging.getLogger("argosy.serve")

P = ParamSpec("P")
T = TypeVar("T")
State = Literal["unloaded", "loading", "ready", "failed"]
Progress = Callable[[str, float], None]  # the current task, and the share done from 0 to 1

LATEST = ":latest"  # the tag that a name without a tag means, for clients of Ollama

LOOK_S = 1.0  # how often to look for idle models, and for models that could use more memory
SHELF_S = 1.0  # the library is not looked at again before
_MOST_NAMES = 20  # of models, in an error
_SHELF_THREADS = 16
_RETRY_S = 10.0  # a model that could not be opened is not tried again before
_RETRY_STOPPING_S = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Abilities:
    """What a model's tokenizer and chat template say about it. The defaults are those of a model that was not read."""

    tools: ToolCalling = "generic"
    thinking: ThinkingSwitch | None = None
    can_infill: bool = False
    chat_template: str | None = None
    special_tokens: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls, tokenizer: Tokenizer | None, *, tools: ToolCalling, thinking: ThinkingSwitch, can_infill: bool
    ) -> Abilities:
        return cls(
            tools=tools, thinking=thinking, can_infill=can_infill,
            chat_template=None if tokenizer is None else tokenizer.chat_template,
            special_tokens={} if tokenizer is None else tokenizer.special_tokens,
        )  # fmt: skip


class Served(Protocol):
    """A model in memory."""

    @property
    def service(self) -> Service: ...

    def resize(self, share_bytes: int) -> None:
        """Have this much beyond the floor; the memory of others is with the system when this returns."""
        ...

    def close(self) -> None:
        """End running requests, and free the memory."""
        ...


class Source(Protocol):
    """A model that can be brought into memory, as often as needed."""

    @property
    def facts(self) -> ModelFacts: ...

    def abilities(self, *, may_read: bool = False) -> Abilities:
        """What it can do; what is only in files, and was not read yet, is unknown unless it may be read now."""
        ...

    @property
    def floor_bytes(self) -> int:
        """Memory of the model with the fewest experts, without what models share."""
        ...

    @property
    def most_bytes(self) -> int:
        """What it can use beyond that."""
        ...

    def prepare(self, budget_bytes: int) -> None:
        """Have what is needed before it is opened, such as its floor in the server's budget.

        Raises what `open` raises, and DoesNotFit.
        """
        ...

    def release(self) -> None:
        """Free what `prepare` made; it is not open."""
        ...

    def open(self, share_bytes: int, progress: Progress) -> Served:
        """Bring the model into memory; `progress` raises if it is no longer wanted."""
        ...

    def forget(self, tenant: str) -> None:
        """Delete what files keep of a revoked tenant, while the model is not in memory."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Shelved:
    """What a library has now.

    sources: by the name for clients; a model whose files are unchanged keeps its source.
    others: further names in lower case, such as aliases, and the names that they stand for.
    faults: models that cannot run, and why.
    """

    sources: Mapping[str, Source]
    others: Mapping[str, str]
    faults: Mapping[str, str]


class Shelf(Protocol):
    """A library whose models a server has."""

    def look(self) -> Shelved:
        """Find its models now. It may read headers of new ones: call it in a thread."""
        ...


class Presets(Protocol):
    """The presets of a server's models as they are now, each with the id of its model. Call both in a thread."""

    def find(self, name: str) -> Preset | None:
        """The preset of that name; None: there is none, or none of a model that this server has.

        Raises:
            UsageError: it is damaged.
        """
        ...

    def all(self) -> list[Preset]:
        """Those that can be used."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """The budget of a server with several models, and what its process takes beside them."""

    budget_bytes: int
    process_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """The facts about a model that clients may know."""

    facts: ModelFacts
    state: State
    abilities: Abilities


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """A model now.

    service: None: it is not in memory.
    memory_bytes: its part of the memory that models share; `expert_bytes` of it can be taken while it runs.
    unloads_in_s: seconds until it is unloaded if no request uses it; None: no time is set.
    """

    facts: ModelFacts
    state: State
    service: Service | None
    memory_bytes: int
    expert_bytes: int
    unloads_in_s: float | None


@dataclass(slots=True, eq=False)
class _Waiter:
    """A request that waits for a model, by its id."""

    name: str
    since: float


class _Entry:
    """A model of the server."""

    def __init__(self, source: Source | None, served: Served | None = None) -> None:
        self.source = source
        self.served = served
        self.is_loading = False  # it has memory, and is being read
        self.share_read: float | None = None  # of the part of it that is being read
        self.has_no_room = False  # it waits for memory of models that are being read
        self.waiters: list[_Waiter] = []
        self.is_leaving = False  # it is being closed, and still has memory
        self.fault: ArgosyError | None = None  # why it could not be opened
        self.failed_at = 0.0
        self.num_uses = 0  # requests that use it, or wait for it
        self.used_at = 0.0
        self.expert_bytes = 0  # the memory for experts beyond its floor
        self.opening: asyncio.Task[None] | None = None

    @property
    def facts(self) -> ModelFacts:
        """What clients may know: of a model in memory, with the context that its budget leaves."""
        if self.served is not None:
            return self.served.service.model
        assert self.source is not None
        return self.source.facts

    @property
    def name(self) -> str:
        return self.facts.id if self.source is None else self.source.facts.id

    @property
    def state(self) -> State:
        if self.served is not None and not self.is_leaving:
            return "ready"
        if self.is_loading:
            return "loading"
        return "unloaded" if self.fault is None else "failed"

    @property
    def is_here(self) -> bool:
        """Whether it has memory."""
        return self.served is not None or self.is_loading

    @property
    def is_free(self) -> bool:
        """Whether it is neither in memory nor used by a request or load, so it can be removed from the server."""
        return not (self.is_here or self.num_uses or self.opening)

    @property
    def is_idle(self) -> bool:
        return self.state == "ready" and not self.num_uses

    @property
    def held_bytes(self) -> int:
        """The memory that it has now, of what models share."""
        if self.source is None or not self.is_here:
            return 0
        return self.source.floor_bytes + self.expert_bytes


class _Lasting:
    """The only model of a server: whoever opened it closes it."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def resize(self, share_bytes: int) -> None:
        """Nobody else needs its memory."""

    def close(self) -> None:
        self.service.loop.close()


class Models:
    """All models of a server, by name; the first one answers requests that name none. In a library it is the one used
    last, or its only one.

    Args:
        memory: None: there is one model, which is in memory already.
        any_model: unknown names mean the first model.
        idle_unload_s: unload a model after so long without requests; None: only if its memory is needed.
        work: threads for the work before the engines.
        kept: items of earlier responses, of all models.
        presets: None: there are none.
        default: the name that requests mean that name no model; None: the first model.
        clock: seconds.
    """

    def __init__(
        self,
        entries: Sequence[_Entry],
        *,
        memory: Memory | None,
        any_model: bool,
        idle_unload_s: float | None = None,
        work: Work,
        kept: KeptItems,
        shelf: Shelf | None = None,
        presets: Presets | None = None,
        default: str | None = None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._presets, self._default = presets, default
        self.is_draining = False  # the server is about to stop; requests that run go on, and load models
        self._is_stopped = False
        self.work = work
        self.kept = kept
        self.memory = memory
        self._entries = list(entries)
        self._any_model = any_model
        self._idle_unload_s = idle_unload_s
        self._clock = clock
        self._revoked: set[str] = set()
        self._moving = asyncio.Lock()
        # Each model may be read at once, and be resized or closed; a thread that waits takes no other's.
        num_threads = 2 * len(self._entries) if shelf is None else _SHELF_THREADS
        self._threads = Threads(num_threads, thread_name_prefix="argosy-models")
        self._shelf = shelf
        self._shelved = Shelved(sources={}, others={}, faults={})
        self._shelved_at: float | None = None
        self._shelving = asyncio.Lock()
        self._looking: asyncio.Task[None] | None = None
        self._is_closed = asyncio.Event()

    @classmethod
    def of(cls, service: Service, *, presets: Presets | None = None, default: str | None = None) -> Models:
        """A server's only model, which is in memory from start to end."""
        entry = _Entry(None, _Lasting(service))
        return cls(
            [entry], memory=None, any_model=service.any_model, work=service.work, kept=service.kept, presets=presets,
            default=default,
        )  # fmt: skip

    @classmethod
    def sharing(
        cls,
        sources: Sequence[Source],
        memory: Memory,
        *,
        any_model: bool = False,
        idle_unload_s: float | None = None,
        work: Work | None = None,
        kept: KeptItems | None = None,
        shelf: Shelf | None = None,
        presets: Presets | None = None,
        default: str | None = None,
        clock: Callable[[], float] = monotonic,
    ) -> Models:
        """Models that share a budget, and those of a library; none is in memory yet."""
        return cls(
            [_Entry(source) for source in sources],
            memory=memory, any_model=any_model, idle_unload_s=idle_unload_s, work=work or Work(),
            kept=KeptItems() if kept is None else kept, shelf=shelf, presets=presets, default=default, clock=clock,
        )  # fmt: skip

    # ── a library ───────────────────────────────────────────────────────────────────────────────────────────────

    async def look(self, name: str | None = None) -> None:
        """See which models the library has now; with a name, only if no such model is in memory.

        Without a library, and within SHELF_S of the last look, nothing happens.
        """
        known = None if name is None else self._known(name)
        if self._shelf is None or (known is not None and known.is_here):
            return
        async with self._shelving:  # those who came meanwhile find it done
            if self._shelved_at is not None and self._clock() - self._shelved_at < SHELF_S:
                return
            self._shelved = shelved = await self._in_thread(self._shelf.look)
            self._shelved_at = self._clock()
            entries = {
                one.name: one
                for one in self._entries
                if not one.is_free or shelved.sources.get(one.name) is one.source
            }
            self._entries = [
                entries.pop(name) if name in entries else _Entry(source)
                for name, source in shelved.sources.items()
            ] + list(entries.values())

    # ── for requests ────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def names(self) -> list[str]:
        return [entry.name for entry in self._entries]

    @property
    def has_shelf(self) -> bool:
        """Whether its models are those of a library."""
        return self._shelf is not None

    @property
    def takes_media(self) -> bool:
        """Whether any model takes pictures or sounds."""
        return self._shelf is not None or any(entry.facts.media_kinds for entry in self._entries)

    @property
    def budget_bytes(self) -> int:
        """The memory budget of the server now."""
        if self.memory is not None:
            return self.memory.budget_bytes
        return sum(service.loop.snapshot().engine.budget_bytes for service in self.services())

    @property
    def held_bytes(self) -> int:
        """The memory that the process and its models have now, of a budget that models share."""
        process_bytes = 0 if self.memory is None else self.memory.process_bytes
        return process_bytes + sum(entry.held_bytes for entry in self._entries)

    def _known(self, name: str) -> _Entry | None:
        found = {entry.name: entry for entry in self._entries}
        for wanted in (name, name.removesuffix(LATEST), name + LATEST):
            for whole in (wanted, self._shelved.others.get(wanted.lower())):
                if whole in found:
                    return found[whole]
        return None

    def _first(self) -> _Entry | None:
        """The model of requests that name none."""
        if self._shelf is None:
            return self._entries[0]
        here = sorted((one for one in self._entries if one.is_here), key=lambda one: one.used_at)
        return (here or self._entries)[-1] if here or len(self._entries) == 1 else None

    def _find(self, name: str | None) -> _Entry:
        entry = None if name is None else self._known(name)
        if entry is None and (name is None or self._any_model):
            entry = self._first()
        if entry is not None:
            return entry
        said = "no model is named" if name is None else f"the model {json.dumps(name)} does not exist"
        names = self.names[:_MOST_NAMES] + (
            [f"{len(self.names) - _MOST_NAMES} more"] if len(self.names) > _MOST_NAMES else []
        )
        hint = "`argosy serve --any-model` accepts every model name"
        if self._shelf is not None:
            hint = "`argosy list` shows the models that are here; `argosy search WORDS` finds others to pull"
            fault = self._shelved.faults.get(name or "")
            said = said if fault is None else f"the model {json.dumps(name)} cannot run: {fault}"
        raise Refused(
            404, f"{said}; this server has: {', '.join(names) or 'none yet'}", hint=hint, param="model",
            code="model_not_found",
        )  # fmt: skip

    async def named(self, name: str | None) -> tuple[str | None, Preset | None]:
        """The model that a request's name means, and the preset if it is one's. Looks at the library if need be.

        Raises:
            Refused: it is a preset that cannot be used.
        """
        if name is not None:
            await self.look(name)
        if self._presets is None or self._is_model(name or self._default):
            return name, None
        preset = await asyncio.to_thread(self._preset, name)
        return (name, None) if preset is None else (preset.model, preset)

    def _preset(self, name: str | None) -> Preset | None:
        """The preset that a request's name means. Reads a file: call it in a thread. Raises what `named` raises."""
        names = [] if name is None else [name]
        if name is None or (self._any_model and self._known(name) is None):
            names += [] if self._default is None else [self._default]
        for one in names:
            if self._presets is None or self._is_model(one):
                return None
            try:
                preset = self._presets.find(one.removesuffix(LATEST))
            except UsageError as error:
                log.error("models: %s", error.message)
                raise Refused(
                    404, f"the preset {json.dumps(one)} cannot be used: its file is damaged",
                    hint="`argosy preset NAME` on the server's machine says what is wrong", param="model",
                    code="model_not_found",
                ) from None  # fmt: skip
            if preset is not None and self._known(preset.model) is not None:
                return preset
        return None

    def _is_model(self, name: str | None) -> bool:
        """Whether a model has exactly this name; a short form of one may be the name of a preset."""
        return any(entry.name == name for entry in self._entries)

    def presets(self) -> list[Preset]:
        """The presets that requests can name. Reads files: call it in a thread."""
        known = [] if self._presets is None else self._presets.all()
        return [one for one in known if not self._is_model(one.name) and self._known(one.model) is not None]

    def id_of(self, name: str | None) -> str:
        """The id of the model with this name.

        Raises:
            Refused: there is no such model.
        """
        return self._find(name).name

    async def use(self, name: str | None, until: ExitStack, request_id: str = "") -> Service:
        """The service of a model, which is loaded if it is not in memory. It stays until `until` is closed.

        Args:
            request_id: for `waits`; empty: it waits unseen.

        Raises:
            Refused: there is no such model.
            Overloaded: it does not fit beside models that answer now, or the server is stopping.
            ArgosyError: it cannot be opened.
        """
        entry = self._find(name)
        entry.num_uses += 1  # from now on it stays
        until.callback(self._end_use, entry)
        while entry.served is None or entry.is_leaving:
            if entry.opening is None:
                entry.opening = asyncio.create_task(self._open(entry))
                entry.opening.add_done_callback(_retrieve)  # all who wait may have gone
            with self._waiting(entry, request_id):
                await asyncio.shield(entry.opening)
        return entry.served.service

    @contextmanager
    def _waiting(self, entry: _Entry, request_id: str) -> Iterator[None]:
        waiter = _Waiter(request_id, self._clock())
        entry.waiters.append(waiter)
        try:
            yield
        finally:
            entry.waiters.remove(waiter)

    def waits(self) -> list[tuple[str, RequestWait]]:
        """The requests that wait for their models, the first MOST_WAITS of each, with the model's id."""
        now = self._clock()
        return [
            (
                entry.name,
                RequestWait(
                    name=waiter.name, why="room" if entry.has_no_room else "model", ahead=0, seconds=now - waiter.since,
                    share_done=entry.share_read if entry.is_loading else None,
                ),
            )
            for entry in self._entries
            for waiter in entry.waiters[:MOST_WAITS]
            if waiter.name
        ]  # fmt: skip

    def _end_use(self, entry: _Entry) -> None:
        entry.num_uses -= 1
        entry.used_at = self._clock()

    def services(self) -> list[Service]:
        """The services of the models in memory, the first one first."""
        return [entry.served.service for entry in self._entries if entry.served is not None]

    def hearing(self) -> Service | None:
        """The service with ears, if there is one: a server of several models has none."""
        served = None if self.memory is not None else self._entries[0].served
        return None if served is None or served.service.ears is None else served.service

    def shown(self) -> Service | None:
        """The service of the model in memory that was used last."""
        ready = [entry for entry in self._entries if entry.served is not None]
        ready.sort(key=lambda entry: (entry.num_uses > 0, entry.used_at))
        return ready[-1].served.service if ready and ready[-1].served is not None else None

    def facts(self) -> list[Standing]:
        """The standing of each model, without presets."""
        return [self._standing(entry) for entry in self._entries]

    def standing(self, name: str | None, preset: Preset | None = None) -> Standing:
        """The standing of the model with a name, as `named` has both.

        Raises:
            Refused: there is no such model.
        """
        found = self._standing(self._find(name))
        return found if preset is None else replace(found, facts=found.facts.under(preset))

    def _standing(self, entry: _Entry) -> Standing:
        unloads_in_s = None
        if self._idle_unload_s is not None and entry.source is not None:
            idle_s = 0.0 if entry.num_uses else self._clock() - entry.used_at
            unloads_in_s = max(0.0, self._idle_unload_s - idle_s)
        return Standing(
            facts=entry.facts,
            state=entry.state,
            service=None if entry.served is None else entry.served.service,
            memory_bytes=entry.held_bytes,
            expert_bytes=entry.expert_bytes,
            unloads_in_s=unloads_in_s,
        )

    def listed(self, name: str | None = None) -> list[Listing]:
        """All models and presets, or the one with this name. It may read a model's files and render its chat template:
        run it in a thread.

        Raises:
            Refused: there is no such model.   ArgosyError: it cannot be read.
        """
        if name is not None:
            preset = self._preset(name)
            return [self._listing(self._find(preset.model if preset else name), preset, may_read=True)]
        return [self._listing(entry, may_read=False) for entry in self._entries] + [
            self._listing(entry, preset, may_read=False)
            for preset in self.presets()
            if (entry := self._known(preset.model)) is not None
        ]

    @staticmethod
    def _listing(entry: _Entry, preset: Preset | None = None, *, may_read: bool) -> Listing:
        if entry.source is not None:
            abilities = entry.source.abilities(may_read=may_read)
        else:
            assert entry.served is not None
            service = entry.served.service
            abilities = Abilities.of(
                service.tokenizer, tools=service.prompts.tool_calling, thinking=service.thinking,
                can_infill=service.prompts.can_infill,
            )  # fmt: skip
        facts = entry.facts if preset is None else entry.facts.under(preset)
        return Listing(facts=facts, state=entry.state, abilities=abilities)

    async def resize(self, budget_bytes: int) -> None:
        """Have another memory budget from now on; requests go on meanwhile.

        Experts leave first; then KV blocks of the only model, or idle models. The memory is with the system when this
        returns.

        Raises:
            DoesNotFit: it is less than answers need now, or more than the machine has; nothing has changed.
            Overloaded: a model is being loaded.
        """
        if self.memory is None:
            for service in self.services():
                await self._in_thread(service.resize, budget_bytes)
            return
        # Whoever asks may leave, and what has begun is finished.
        await asyncio.shield(asyncio.create_task(self._resize(budget_bytes)))

    async def _resize(self, budget_bytes: int) -> None:
        async with self._moving:
            assert self.memory is not None
            await self._in_thread(require_budget, budget_bytes)
            here = [one for one in self._entries if one.is_here and one.source is not None]
            if any(one.is_loading for one in here):
                raise Overloaded(
                    "a model is being loaded, and its share is fixed until then", retry_after_s=1
                )
            free_bytes = self._bytes_beside_floors() - self.memory.budget_bytes + budget_bytes
            leaving: list[_Entry] = []
            for idle in sorted((one for one in here if one.is_idle), key=lambda one: one.used_at):
                if free_bytes >= 0:
                    break
                assert idle.source is not None
                leaving.append(idle)
                free_bytes += idle.source.floor_bytes
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
            self.memory = replace(self.memory, budget_bytes=budget_bytes)
            await self._divide()

    async def unload(self, name: str | None) -> bool:
        """Unload a model now, unless a request uses it. A model that was not loaded here stays.

        Returns:
            Whether it is out of memory.

        Raises:
            Refused: there is no such model.
        """
        entry = self._find(name)
        if entry.source is None:
            return False
        # Whoever asks may leave, and what has begun is finished.
        return await asyncio.shield(asyncio.create_task(self._unload_if_idle(entry)))

    async def _unload_if_idle(self, entry: _Entry) -> bool:
        async with self._moving:
            if entry.is_idle:
                await self._unload(entry)
            return not entry.is_here

    def revoke(self, tenant: str) -> None:
        """End all requests of a revoked tenant, and delete all of its data. Any thread may call this."""
        self._revoked.add(tenant)
        for entry in self._entries:
            if (served := entry.served) is not None:
                served.service.revoke(tenant)
            elif entry.source is not None:
                entry.source.forget(tenant)
        self.kept.forget(tenant)

    def drop_expired(self) -> None:
        """Free stored responses that are too old."""
        self.kept.drop_expired()

    def erase(self, tenant: str) -> tuple[int, int]:
        """End the running requests of a tenant, and delete what is kept of it. Any thread may call this.

        Returns:
            The number of stored responses with their items, and of answers that were kept for replay.
        """
        num_answers = 0
        for entry in self._entries:
            if (served := entry.served) is not None:
                num_answers += served.service.erase(tenant)
            elif entry.source is not None:
                entry.source.forget(tenant)
        return self.kept.erase(tenant), num_answers

    # ── the life of the server ──────────────────────────────────────────────────────────────────────────────────

    async def preload(self, names: Sequence[str]) -> None:
        """Look at the library, and load models one after another. Raises what `use` raises."""
        await self.look()
        for name in names:
            base, _ = await self.named(name)
            with ExitStack() as used:
                await self.use(base, used)

    async def stop(self) -> None:
        """End running requests, and loads."""
        self._is_stopped = True
        await asyncio.gather(*(self._in_thread(service.loop.close) for service in self.services()))

    async def close(self) -> None:
        """End everything, and free the models that were loaded here. Closing twice is harmless."""
        if self._is_closed.is_set():
            return
        self._is_closed.set()
        await self.stop()
        if self._looking is not None:
            await self._looking
        opening = [entry.opening for entry in self._entries if entry.opening is not None]
        await asyncio.gather(*opening, return_exceptions=True)
        async with self._moving:
            for entry in self._entries:
                if entry.served is not None:
                    await self._unload(entry)
        self._threads.shutdown()

    def _forget_unused(self, entry: _Entry) -> None:
        """Free what was made for a model that is not open."""
        if entry.source is not None and not entry.is_here:
            entry.source.release()

    # ── moving memory ───────────────────────────────────────────────────────────────────────────────────────────

    async def _open(self, entry: _Entry) -> None:
        """Make room for a model, and read it."""
        assert entry.source is not None
        try:
            while True:
                async with self._moving:
                    if not entry.num_uses or (entry.served is not None and not entry.is_leaving):
                        return
                    self._require_wanted()
                    if entry.fault is not None and self._clock() - entry.failed_at < _RETRY_S:
                        raise entry.fault.with_traceback(None)
                    assert self.memory is not None
                    await self._attempt(entry, entry.source.prepare, self.memory.budget_bytes)
                    if await self._make_room(entry):
                        break
                    reading = [
                        one.opening for one in self._entries if one.is_loading and one.opening is not None
                    ]
                entry.has_no_room = True
                await asyncio.wait(reading, return_when=asyncio.FIRST_COMPLETED)
                entry.has_no_room = False
            log.info("models: %s is loaded, with %s", entry.name, format_bytes(entry.held_bytes))
            await self._read(entry)
        finally:
            entry.opening, entry.has_no_room = None, False
            self._forget_unused(entry)

    async def _read(self, entry: _Entry) -> None:
        source = entry.source
        assert source is not None

        def tell(task: str, share: float) -> None:  # in a thread
            self._require_wanted()
            entry.share_read = share

        entry.share_read = None
        served = await self._attempt(entry, source.open, entry.expert_bytes, tell)
        entry.served, entry.is_loading, entry.fault = served, False, None
        entry.used_at = self._clock()
        if self._looking is None and not self._is_stopped:  # also if all who waited have gone
            self._looking = asyncio.create_task(self._look())
        for tenant in tuple(self._revoked):  # its key was revoked while the model was read
            served.service.revoke(tenant)

    async def _attempt(self, entry: _Entry, call: Callable[P, T], *args: P.args, **named: P.kwargs) -> T:
        """Do a part of opening a model in a thread; what fails is remembered, and not tried again at once."""
        try:
            return await self._in_thread(call, *args, **named)
        except Exception as error:
            entry.is_loading, entry.expert_bytes = False, 0
            if self._is_stopped:
                raise _stopping() from None
            log.error("models: %s cannot be opened: %s", entry.name, where_it_failed(error))
            entry.fault = (
                error if isinstance(error, ArgosyError) else ArgosyError("the model cannot be opened")
            )
            entry.failed_at = self._clock()
            raise entry.fault from None

    def _require_wanted(self) -> None:
        """Raise if the server is stopping. Any thread may call this."""
        if self._is_stopped:
            raise _stopping()

    async def _make_room(self, entry: _Entry) -> bool:
        """Take the floor of a model from others, and its share of what floors leave; `_moving` is held.

        Returns:
            False if experts of a model that is being read are in the way: they can leave once it is read. Nothing has
            changed then.

        Raises:
            Overloaded: the floors of models that answer leave too little. Nothing has changed then.
        """
        assert entry.source is not None
        needed, free_bytes = entry.source.floor_bytes, self._bytes_beside_floors()
        leaving: list[_Entry] = []
        for idle in sorted((one for one in self._entries if one.is_idle), key=lambda one: one.used_at):
            if needed <= free_bytes:
                break
            assert idle.source is not None
            leaving.append(idle)
            free_bytes += idle.source.floor_bytes
        if needed > free_bytes:
            raise self._no_room(entry, free_bytes)
        if needed > free_bytes - self._loading_bytes():
            return False
        await self._unload_all(leaving)
        await self._divide(entry)
        return True

    def _loading_bytes(self) -> int:
        """Memory for experts of models that are being read; it is fixed until then."""
        return sum(one.expert_bytes for one in self._entries if one.is_loading)

    def _bytes_beside_floors(self) -> int:
        """The rest of the budget after the process and the floors of the models in memory."""
        assert self.memory is not None
        floors = sum(
            one.source.floor_bytes for one in self._entries if one.is_here and one.source is not None
        )
        return self.memory.budget_bytes - self.memory.process_bytes - floors

    def _no_room(self, entry: _Entry, free_bytes: int) -> Overloaded:
        assert self.memory is not None
        assert entry.source is not None
        needed = entry.source.floor_bytes
        busy = [one for one in self._entries if one.is_here and not one.is_idle]
        held = [(one.name, one.source.floor_bytes) for one in busy if one.source is not None]
        parts = "  +  ".join(f"{name} {format_bytes(nbytes)}" for name, nbytes in held)
        enough = -(-(self.memory.budget_bytes + needed - free_bytes) // MIB)
        return Overloaded(
            f"{entry.name} needs {format_bytes(needed)}, and models that answer now leave {format_bytes(free_bytes)} "
            f"of the budget of {format_bytes(self.memory.budget_bytes)}\n  {parts}  (without experts)",
            retry_after_s=int(_RETRY_S),
            hint=f"try again when {' or '.join(name for name, _ in held)} has answered, "
            f"or start the server with `--memory {enough}MiB`",
            needed_bytes=needed,
            free_bytes=free_bytes,
        )

    async def _divide(self, joining: _Entry | None = None) -> None:
        """Give each model its share of the memory for experts; `_moving` is held. Shrink some before others grow.

        joining: a model that is about to be read; it takes its floor and its share.
        """
        free_bytes = self._bytes_beside_floors() - self._loading_bytes()
        if joining is not None:
            assert joining.source is not None
            free_bytes -= joining.source.floor_bytes
        sharing = [
            (entry, entry.source)
            for entry in self._entries
            if entry.source is not None and (entry is joining or entry.state == "ready")
        ]
        now = self._clock()
        claims = [self._claim(*one, now, is_joining=one[0] is joining) for one in sharing]
        shares = [
            (entry, share) for (entry, _), share in zip(sharing, divide(free_bytes, claims), strict=True)
        ]
        for entry, share_bytes in shares:
            if share_bytes < entry.expert_bytes and entry.served is not None:
                await self._in_thread(entry.served.resize, share_bytes)
                entry.expert_bytes = share_bytes
        for entry, share_bytes in shares:
            if share_bytes > entry.expert_bytes and entry.served is not None:
                entry.expert_bytes = share_bytes  # first: what is allowed counts as used
                await self._in_thread(entry.served.resize, share_bytes)
        if joining is not None:
            (joining.expert_bytes,) = (share_bytes for entry, share_bytes in shares if entry is joining)
            joining.is_loading = True
        assert self.memory is not None
        assert self.held_bytes <= self.memory.budget_bytes

    @staticmethod
    def _claim(entry: _Entry, source: Source, now: float, *, is_joining: bool) -> Claim:
        return Claim(
            most_bytes=source.most_bytes,
            held_bytes=entry.expert_bytes,
            used_at=entry.used_at,
            is_in_use=is_joining or entry.num_uses > 0 or now - entry.used_at < IN_USE_S,
        )

    async def _unload_all(self, leaving: Sequence[_Entry]) -> None:
        """Unload idle models; `_moving` is held. If one stays, for want of a thread, so do those after it."""
        for entry in leaving:
            entry.is_leaving = True  # no request begins to use one meanwhile
        try:
            for entry in leaving:
                await self._unload(entry)
        finally:
            for entry in leaving:
                entry.is_leaving = False

    async def _unload(self, entry: _Entry) -> None:
        """Free a model's memory; `_moving` is held."""
        assert entry.served is not None
        entry.is_leaving, is_told = True, not self._is_stopped
        try:
            await self._in_thread(entry.served.close)
        except Overloaded:  # no thread for it: the model stays as it is
            entry.is_leaving = False
            raise
        except Exception as error:
            log.error("models: %s did not end well: %s", entry.name, where_it_failed(error))
        entry.served, entry.is_leaving, entry.expert_bytes = None, False, 0
        self._forget_unused(entry)
        if entry.source is not None and is_told:
            log.info("models: %s is unloaded", entry.name)

    async def _look(self) -> None:
        """Now and then, unload models that are idle for long, and give models that answer what they can use."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._is_closed.wait()
            if self._is_closed.is_set():
                return
            try:
                async with self._moving:
                    await self._look_once()
            except Exception as error:  # look again after any failure
                log.error("models: %s", where_it_failed(error))

    async def _look_once(self) -> None:
        now = self._clock()
        for entry in self._entries:
            if (
                self._idle_unload_s is not None
                and entry.is_idle
                and now - entry.used_at >= self._idle_unload_s
            ):
                await self._unload(entry)
        if any(self._could_use_more(entry) for entry in self._entries):
            await self._divide()

    @staticmethod
    def _could_use_more(entry: _Entry) -> bool:
        source = entry.source
        if source is None or entry.state != "ready" or not entry.num_uses:
            return False
        return entry.expert_bytes < source.most_bytes

    def _in_thread(self, call: Callable[P, T], *args: P.args, **named: P.kwargs) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self._threads, partial(call, *args, **named))


def models_of(request: Request) -> Models:
    """All models of the server."""
    models: Models = request.app.state.models
    return models


async def use_model(request: Request, name: str | None = None) -> Service:
    """The service of the model that a request names, for the rest of the request; None: the first model.

    The model is loaded if it is not in memory, and stays until the request has ended. Raises what `Models.use` and
    `Run.go_on` raise.
    """
    caller: Caller = request.state.caller
    models = models_of(request)
    name, preset = await models.named(name)
    caller.uses = (models.id_of(name), *([] if preset is None else [preset.name]))
    caller.go_on()  # a model that is stopped is not loaded
    service = await models.use(name, caller.ending, caller.request_id)
    request.state.service = service = service if preset is None else service.under(preset)
    return service


def _retrieve(task: asyncio.Task[None]) -> None:
    if not task.cancelled():
        task.exception()


def _stopping() -> Overloaded:
    return Overloaded("the server is stopping", retry_after_s=_RETRY_STOPPING_S)
