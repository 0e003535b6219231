"""The models of a server: which ones are in memory, and how they share the budget.

    name  ─ find ─>  entry: unloaded -> loading -> ready -> unloaded  ─ use ─>  Service, until the request ends
                       ─ open fails ─>  failed  ─ the next request, after a while ─>  loading

A model is loaded when a request first names it. A server's only model is there from start to end, and has all of the
budget, unless it may be unloaded. A model takes its floor, and `budget/shares.py` divides what the floors leave among
the models in memory. Idle models give their experts first; a model is unloaded only if another one's floor does not fit
otherwise, after `idle_unload_s` without requests, or if a request asks for it and no other uses the model. A model
whose floor does not fit beside models that answer is refused. One that only experts of a model that is being read keep
out waits until they can leave.

A preset is another name for a model: it loads nothing and shares the model's engine, memory and queue. A model's
own name always means the model.

A server may have a library: its models come and go with their files, and each is made ready, with tokenizer
and plan, when it is loaded, and forgotten when it is unloaded.

Elsewhere: `loading.py` moves memory; `entry.py` is a model; `serve/answer/service.py` has the service of one model;
`serve/dialects/body.py` calls `use_model`.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from time import monotonic
from typing import TYPE_CHECKING, Protocol

from argosy.config import Preset
from argosy.engine.progress import MOST_WAITS, RequestWait
from argosy.errors import UsageError
from argosy.serve.answer.service import Common, Service
from argosy.serve.http.caller import Caller
from argosy.serve.http.failures import Refused
from argosy.serve.models.entry import Abilities, Entry, Offer, Offers, Standing, Waiter
from argosy.serve.models.loading import Loader

if TYPE_CHECKING:
    from starlette.requests import Request

log = logging.getLogger("argosy.serve")

LATEST = ":latest"  # the default tag of names, for clients of Ollama

LIBRARY_S = 1.0  # the shortest time between two looks at the library
_MOST_NAMES = 20  # model names listed in an error
_LIBRARY_THREADS = 16


class Presets(Protocol):
    """The current presets of a server's models, each with the id of its model. Call both methods in a thread."""

    def find(self, name: str) -> Preset | None:
        """The preset of that name, or None if there is none for a model of this server.

        Raises:
            UsageError: its file is damaged.
        """
        ...

    def all(self) -> list[Preset]:
        """All usable presets."""
        ...


class Models:
    """All models of a server, by name; the first one answers requests that name none. In a library it is the one used
    last, or its only one.

    Args:
        offers: the models; or what finds those of a library now, which may read headers of new ones.
        to_entry: makes an entry of an offer.
        common: their shared parts; with its `any_model`, unknown names mean the first model.
        process_bytes: the process's part of the budget, not counting models.
        idle_unload_s: unload a model after this long without requests; None: only if its memory is needed.
        presets: None for none.
        default: the model for requests that name none; None: the first model.
        clock: seconds.
    """

    def __init__(
        self,
        offers: Sequence[Offer] | Callable[[], Offers],
        to_entry: Callable[[Offer], Entry],
        common: Common,
        *,
        budget_bytes: int,
        process_bytes: int,
        idle_unload_s: float | None = None,
        presets: Presets | None = None,
        default: str | None = None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._presets, self._default = presets, default
        self.is_draining = False  # the server is about to stop; running requests continue and may load models
        self.work, self.kept, self._any_model = common.work, common.kept, common.any_model
        self._idle_unload_s = idle_unload_s
        self._clock = clock
        self._library, self._to_entry = (offers if callable(offers) else None), to_entry
        entries = [] if callable(offers) else [to_entry(offer) for offer in offers]
        # All models may be read, resized or closed at the same time without taking each other's thread.
        num_threads = _LIBRARY_THREADS if self.has_library else 2 * len(entries)
        self.loader = Loader(
            entries, budget_bytes=budget_bytes, process_bytes=process_bytes, idle_unload_s=idle_unload_s,
            num_threads=num_threads, clock=clock,
        )  # fmt: skip
        self._found = Offers()
        self._looked_at: float | None = None
        self._looking = asyncio.Lock()

    # ── a library ───────────────────────────────────────────────────────────────────────────────────────────────

    async def look(self, name: str | None = None) -> None:
        """Refresh the list of the library's models; with a name, only if no such model is in memory.

        Without a library, and within LIBRARY_S of the last look, nothing happens.
        """
        known = None if name is None else self._known(name)
        if self._library is None or (known is not None and known.is_here):
            return
        async with self._looking:  # callers who waited find it done
            if self._looked_at is not None and self._clock() - self._looked_at < LIBRARY_S:
                return
            self._found = found = await self.loader.in_thread(self._library)
            self._looked_at = self._clock()
            known_before = {one.name: one for one in self._entries}
            entries = []
            for offer in found.offers:
                entry = known_before.pop(offer.facts.id, None)
                if entry is None or (entry.is_free and entry.offer.key != offer.key):
                    entry = self._to_entry(offer)
                entries.append(entry)
            self.loader.entries = entries + [one for one in known_before.values() if not one.is_free]

    # ── for requests ────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def names(self) -> list[str]:
        return [entry.name for entry in self._entries]

    @property
    def has_library(self) -> bool:
        """Whether the models come from a library."""
        return self._library is not None

    @property
    def takes_media(self) -> bool:
        """Whether any model takes pictures or sounds."""
        return self.has_library or any(entry.facts.media_kinds for entry in self._entries)

    @property
    def _entries(self) -> list[Entry]:
        return self.loader.entries

    @property
    def has_one(self) -> bool:
        """Whether the server has a single model with the whole budget."""
        return self.loader.lasting is not None

    @property
    def budget_bytes(self) -> int:
        """The server's current memory budget."""
        return self.loader.budget_bytes

    @property
    def process_bytes(self) -> int:
        """The process's part of the budget, not counting models."""
        return self.loader.process_bytes

    @property
    def held_bytes(self) -> int:
        """The memory that the process and its models hold of a shared budget."""
        return self.loader.held_bytes

    def _known(self, name: str) -> Entry | None:
        found = {entry.name: entry for entry in self._entries}
        for wanted in (name, name.removesuffix(LATEST), name + LATEST):
            for whole in (wanted, self._found.others.get(wanted.lower())):
                if whole in found:
                    return found[whole]
        return None

    def _first(self) -> Entry | None:
        """The model for requests that name none."""
        if not self.has_library:
            return self._entries[0]
        here = sorted((one for one in self._entries if one.is_here), key=lambda one: one.used_at)
        return (here or self._entries)[-1] if here or len(self._entries) == 1 else None

    def split(self, name: str | None) -> tuple[str | None, str | None]:
        """The model and the adapter that MODEL:ADAPTER names, unless a model has the whole name.

        Raises:
            Refused: the model has adapters, but none of this name.
        """
        if name is None or self._known(name) is not None:
            return name, None
        base, _, adapter = name.removesuffix(LATEST).rpartition(":")
        entry = self._known(base)
        if entry is None or not entry.adapters:
            return name, None
        if adapter not in entry.adapters:
            said = f"the model {json.dumps(entry.name)} has no adapter {json.dumps(adapter)}"
            raise Refused(
                404, f"{said}; it has: {', '.join(entry.adapters)}", param="model", code="model_not_found"
            )
        return entry.name, adapter

    def _find(self, name: str | None) -> Entry:
        base, _ = self.split(name)
        entry = None if base is None else self._known(base)
        if entry is None and (name is None or self._any_model):
            entry = self._first()
        if entry is not None:
            return entry
        said = "no model is named" if name is None else f"the model {json.dumps(name)} does not exist"
        names = self.names[:_MOST_NAMES] + (
            [f"{len(self.names) - _MOST_NAMES} more"] if len(self.names) > _MOST_NAMES else []
        )
        hint = "`argosy serve --any-model` accepts every model name"
        if self.has_library:
            hint = "`argosy list` shows the models that are here; `argosy search WORDS` finds others to pull"
            fault = self._found.faults.get(name or "")
            said = said if fault is None else f"the model {json.dumps(name)} cannot run: {fault}"
        raise Refused(
            404, f"{said}; this server has: {', '.join(names) or 'none yet'}", hint=hint, param="model",
            code="model_not_found",
        )  # fmt: skip

    async def named(self, name: str | None) -> tuple[str | None, Preset | None]:
        """The model that a request's name means, and the preset if the name is a preset's. Looks at the library if
        necessary.

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
        """The preset that a request's name means. Call it in a thread, because it reads a file. Raises what `named`
        raises.
        """
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
        """Whether a model has exactly this name, because a shortened name may be a preset's."""
        return any(entry.name == name for entry in self._entries)

    def presets(self) -> list[Preset]:
        """The presets that requests can name. Call it in a thread, because it reads files."""
        known = [] if self._presets is None else self._presets.all()
        return [one for one in known if not self._is_model(one.name) and self._known(one.model) is not None]

    def id_of(self, name: str | None) -> str:
        """The id of the model with this name, or of the model with its adapter.

        Raises:
            Refused: there is no such model.
        """
        entry, (_, adapter) = self._find(name), self.split(name)
        return entry.name if adapter is None else f"{entry.name}:{adapter}"

    async def use(self, name: str | None, until: ExitStack, request_id: str = "") -> Service:
        """The service of a model, which is loaded if necessary and stays in memory until `until` is closed.

        Args:
            request_id: the id to show in `waits`; empty to wait unseen.

        Raises:
            Refused: there is no such model.
            Overloaded: it does not fit alongside models that are answering, or the server is stopping.
            ArgosyError: it cannot be opened.
        """
        entry = self._find(name)
        entry.num_uses += 1  # this keeps it in memory
        until.callback(self._end_use, entry)
        while entry.service is None or entry.is_leaving:
            opening = self.loader.opening(entry)
            with self._waiting(entry, request_id):
                await asyncio.shield(opening)
        return entry.service

    @contextmanager
    def _waiting(self, entry: Entry, request_id: str) -> Iterator[None]:
        waiter = Waiter(request_id, self._clock())
        entry.waiters.append(waiter)
        try:
            yield
        finally:
            entry.waiters.remove(waiter)

    def waits(self) -> list[tuple[str, RequestWait]]:
        """The requests that wait for models, up to MOST_WAITS per model, with the model's id."""
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

    def _end_use(self, entry: Entry) -> None:
        entry.num_uses -= 1
        entry.used_at = self._clock()

    def services(self) -> list[Service]:
        """The services of the models in memory, the first one first."""
        return self.loader.services()

    def hearing(self) -> Service | None:
        """The service with ears, if any; a server of several models has none."""
        return next((service for service in self.services() if service.ears is not None), None)

    def shown(self) -> Service | None:
        """The service of the most recently used model in memory."""
        here = [entry for entry in self._entries if entry.service is not None]
        here.sort(key=lambda entry: (entry.num_uses > 0, entry.used_at))
        return here[-1].service if here else None

    def facts(self) -> list[Standing]:
        """The standing of each model, without presets."""
        return [self._standing(entry) for entry in self._entries]

    def standing(self, name: str | None, preset: Preset | None = None) -> Standing:
        """The standing of a model and preset that `named` returned.

        Raises:
            Refused: there is no such model.
        """
        return self._standing(self._find(name), preset)

    def _standing(
        self, entry: Entry, preset: Preset | None = None, abilities: Abilities | None = None, adapter: str | None = None
    ) -> Standing:  # fmt: skip
        unloads_in_s = None
        if self._idle_unload_s is not None:
            idle_s = 0.0 if entry.num_uses else self._clock() - entry.used_at
            unloads_in_s = max(0.0, self._idle_unload_s - idle_s)
        facts = entry.facts if adapter is None else entry.facts.adapted(adapter)
        return Standing(
            facts=facts if preset is None else facts.under(preset),
            state=entry.state,
            service=entry.service,
            memory_bytes=entry.held_bytes,
            expert_bytes=entry.expert_bytes,
            unloads_in_s=unloads_in_s,
            abilities=abilities or Abilities(),
        )

    def listed(self, name: str | None = None) -> list[Standing]:
        """All models with their adapters and presets, or the one with this name, with their abilities. It may read a
        model's files and render its chat template: run it in a thread.

        Raises:
            Refused: there is no such model.   ArgosyError: it cannot be read.
        """
        if name is not None:
            preset = self._preset(name)
            entry, (_, adapter) = self._find(preset.model if preset else name), self.split(name)
            return [
                self._standing(entry, preset, entry.abilities(may_read=True), None if preset else adapter)
            ]
        found: list[tuple[Entry, Preset | None, str | None]] = []
        for entry in self._entries:
            found += [(entry, None, adapter) for adapter in (None, *entry.adapters)]
        for preset in self.presets():
            if (known := self._known(preset.model)) is not None:
                found.append((known, preset, None))
        return [self._standing(entry, preset, entry.abilities(), adapter) for entry, preset, adapter in found]

    async def unload(self, name: str | None) -> bool:
        """Unload a model now, unless a request uses it. A model not loaded here stays.

        Returns:
            Whether it is out of memory.

        Raises:
            Refused: there is no such model.
        """
        return await self.loader.unload(self._find(name))

    async def resize(self, budget_bytes: int) -> None:
        """Change the memory budget; see `Loader.resize`."""
        await self.loader.resize(budget_bytes)

    def revoke(self, tenant: str) -> None:
        """End a revoked tenant's requests and delete all of its data. Any thread may call this."""
        self.loader.revoke(tenant)
        self.kept.forget(tenant)

    def drop_expired(self) -> None:
        """Free expired responses."""
        self.kept.drop_expired()

    def erase(self, tenant: str) -> tuple[int, int]:
        """End a tenant's running requests and delete its data. Any thread may call this.

        Returns:
            The number of deleted responses with their items, and of deleted answers for replay.
        """
        num_answers = self.loader.erase(tenant)
        return self.kept.erase(tenant), num_answers

    # ── the life of the server ──────────────────────────────────────────────────────────────────────────────────

    async def preload(self, names: Sequence[str]) -> None:
        """Look at the library and load models one after another. Raises what `use` raises."""
        await self.look()
        for name in names:
            base, _ = await self.named(name)
            with ExitStack() as used:
                await self.use(base, used)

    async def stop(self) -> None:
        """End running requests and loads."""
        await self.loader.stop()

    async def close(self) -> None:
        """End everything and free the models loaded here. Closing twice is harmless."""
        await self.loader.close()


def models_of(request: Request) -> Models:
    """The models of a request's server."""
    models: Models = request.app.state.models
    return models


async def use_model(request: Request, name: str | None = None) -> Service:
    """The service of the model that a request names, or of the first model, for the rest of the request.

    The model is loaded if necessary and stays in memory until the request ends. Raises what `Models.use` and
    `Run.go_on` raise.
    """
    caller: Caller = request.state.caller
    models = models_of(request)
    name, preset = await models.named(name)
    base, adapter = models.split(name)
    caller.uses = (
        models.id_of(base),
        *([] if adapter is None else [models.id_of(name)]),
        *([preset.name] if preset else []),
    )
    caller.go_on()  # do not load a stopped model
    service = await models.use(base, caller.ending, caller.request_id)
    if adapter is not None:
        found = {one.name: one for one in service.loop.engine.adapters}
        if adapter not in found:
            raise Refused(404, f"the adapter {adapter} was dropped", param="model", code="model_not_found")
        service = service.adapted(found[adapter])
    request.state.service = service = service if preset is None else service.under(preset)
    return service
