"""A model of a server: what is offered, what brings it into memory and out of it, and how it stands.

    Offer  ─ prepare ─>  Ready  ─ open ─>  Service, until `close`  ─ release ─>  Offer

Elsewhere: `loading.py` decides when; `opened.py` makes the service of an open engine; `models.py` finds an entry by
name; `engine/shared.py` has models without weights.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

from argosy.config import EngineConfig
from argosy.engine.shared import Ready
from argosy.errors import ArgosyError
from argosy.observe.recorder import Recorder
from argosy.prompt.builder import PromptBuilder
from argosy.prompt.prompt import ToolCalling
from argosy.prompt.thinking import ThinkingSwitch, switch_of
from argosy.serve.answer.facts import ModelFacts
from argosy.serve.answer.service import Common, Service
from argosy.serve.models.opened import facts_of_engine, facts_of_ready, service_for

if TYPE_CHECKING:
    from argosy.engine.engine import Engine
    from argosy.forecast.forecast import Speeds
    from argosy.prompt.tokenizer import Tokenizer

log = logging.getLogger("argosy.serve")

LOADING_SAID_S = 10.0  # how often the log tells of a model that is loaded

State = Literal["unloaded", "loading", "ready", "failed"]
Progress = Callable[[str, float], None]  # the current task, and the fraction done


@dataclass(frozen=True, slots=True, kw_only=True)
class Abilities:
    """A model's abilities according to its tokenizer and chat template. The defaults are for an unread model."""

    tools: ToolCalling = "generic"
    thinking: ThinkingSwitch | None = None
    can_infill: bool = False
    chat_template: str | None = None
    special_tokens: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, prompts: PromptBuilder | Ready, tokenizer: Tokenizer | None) -> Self:
        return cls(
            tools=prompts.tool_calling, thinking=switch_of(prompts.variables), can_infill=prompts.can_infill,
            chat_template=None if tokenizer is None else tokenizer.chat_template,
            special_tokens={} if tokenizer is None else tokenizer.special_tokens,
        )  # fmt: skip


class Recording(Protocol):
    """Opens the recorder of a model's routing (`experts/recording.py`), and saves what it counted."""

    recorder: Recorder | None

    def __call__(self, files: Any, config: EngineConfig) -> Recorder: ...

    def save(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A model that a server may have. One of `make`, `ready` and `serve` brings it into memory.

    key: equal as long as its files are unchanged.
    make: reads its tokenizer and plans it in a budget; raises DoesNotFit, CheckpointError and related errors.
    ready: what `make` makes, there from start to end: the model, and predictions of its speed or None.
    serve: makes the service of a server's only model, which stays in memory and has all of the budget. The opener
        of its engine closes it.
    """

    facts: ModelFacts
    key: object
    make: Callable[[int | None], tuple[Ready, Speeds | None]] | None = None
    ready: tuple[Ready, Speeds | None] | None = None
    serve: Callable[[Common], Service] | None = None

    @classmethod
    def of_ready(cls, ready: Ready, speeds: Speeds | None = None) -> Self:
        """A model that stays ready while it comes and goes."""
        return cls(facts=facts_of_ready(ready), key=ready, ready=(ready, speeds))

    @classmethod
    def of_engine(
        cls, engine: Engine, name: str, *, recorder: Recorder | None = None, speeds: Speeds | None = None
    ) -> Self:
        """A server's only model, whose engine is open and stays so; `recorder` has the choices of recent tokens."""
        facts = facts_of_engine(engine, name)

        def serve(common: Common) -> Service:
            replay_bytes = engine.plan.claimed["replay_bytes"] - common.kept.max_bytes
            return service_for(
                engine, facts, common, replay_bytes=replay_bytes, recorder=recorder, speeds=speeds
            )

        return cls(facts=facts, key=engine, serve=serve)


@dataclass(frozen=True, slots=True, kw_only=True)
class Offers:
    """What a library has now.

    others: further names in lower case, such as aliases, and the names that they stand for.
    faults: models that cannot run, and why.
    """

    offers: Sequence[Offer] = ()
    others: Mapping[str, str] = field(default_factory=dict)
    faults: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """The current state of a model.

    service: None if the model is not in memory.
    memory_bytes: its part of the memory shared by models, of which `expert_bytes` can be taken while it runs.
    unloads_in_s: seconds until it is unloaded if no request uses it; None if no time is set.
    abilities: those of a model that was not read, except in a list: finding out takes a while.
    """

    facts: ModelFacts
    state: State
    service: Service | None
    memory_bytes: int
    expert_bytes: int
    unloads_in_s: float | None
    abilities: Abilities = field(default_factory=Abilities)


@dataclass(slots=True, eq=False)
class Waiter:
    """A request waiting for a model."""

    name: str
    since: float


class Entry:
    """A model of the server. It is made ready for each time that it is opened, if it is not yet.

    `prepare`, `open`, `resize`, `close`, `release` and `forget` take a while: call them in a thread.

    Args:
        record: makes what records the routing while the model is open; None: nothing is recorded.
        note_use: called, in a thread, with the model's name when it is opened; None: nobody wants to know.
    """

    _reading = threading.Lock()  # one at a time: a tokenizer that is read for a list counts in no budget

    def __init__(
        self,
        offer: Offer,
        common: Common,
        *,
        record: Callable[[], Recording] | None = None,
        note_use: Callable[[str], None] | None = None,
    ) -> None:
        self.offer = offer
        self.is_loading = False  # it has memory and is being read
        self.share_read: float | None = None  # fraction read of the current part
        self.has_no_room = False  # it waits for memory held by models being read
        self.waiters: list[Waiter] = []
        self.is_leaving = False  # it is being closed and still has memory
        self.fault: ArgosyError | None = None  # why it could not be opened
        self.failed_at = 0.0
        self.num_uses = 0  # requests that use it or wait for it
        self.used_at = 0.0
        self.expert_bytes = 0  # the memory for experts beyond its floor
        self.opening: asyncio.Task[None] | None = None
        self.service: Service | None = None  # while it is in memory
        self._common, self._record, self._note_use = common, record, note_use
        self._facts = offer.facts
        self._made = offer.ready
        self._abilities: Abilities | None = None
        self._closing = ExitStack()  # what `open` opened
        if offer.ready is not None:
            self._abilities = Abilities.of(offer.ready[0], offer.ready[0].tokenizer)
        if offer.serve is not None:
            self.service = offer.serve(common)

    @property
    def stays(self) -> bool:
        """Whether it is the server's only model, which is in memory from start to end."""
        return self.offer.serve is not None

    @property
    def facts(self) -> ModelFacts:
        """The facts for clients; for a model in memory, with the context that its budget leaves."""
        service = self.service
        return self._facts if service is None else service.model

    @property
    def name(self) -> str:
        return self.offer.facts.id

    @property
    def adapters(self) -> Sequence[str]:
        """The names of its adapters; of those loaded while it serves, only while it is in memory."""
        service = self.service
        return self._facts.adapters if service is None else [one.name for one in service.loop.engine.adapters]

    @property
    def state(self) -> State:
        if self.service is not None and not self.is_leaving:
            return "ready"
        if self.is_loading:
            return "loading"
        return "unloaded" if self.fault is None else "failed"

    @property
    def is_here(self) -> bool:
        """Whether it holds memory."""
        return self.service is not None or self.is_loading

    @property
    def is_free(self) -> bool:
        """Whether it is neither in memory nor in use, so that it can be removed from the server."""
        return not (self.is_here or self.num_uses or self.opening)

    @property
    def is_idle(self) -> bool:
        return self.state == "ready" and not self.num_uses

    @property
    def floor_bytes(self) -> int:
        """The memory of the model with the fewest experts, without what models share; 0 until it is prepared."""
        made = self._made
        return 0 if made is None else made[0].floor_bytes

    @property
    def most_bytes(self) -> int:
        """What it can use beyond its floor."""
        made = self._made
        return 0 if made is None else made[0].most_bytes

    @property
    def held_bytes(self) -> int:
        """The memory that it holds of what models share."""
        return self.floor_bytes + self.expert_bytes if self.is_here else 0

    def abilities(self, *, may_read: bool = False) -> Abilities:
        """What the model can do. Facts in files that have not been read are unknown unless they may be read now."""
        if (service := self.service) is not None and self.stays:
            return Abilities.of(service.prompts, service.tokenizer)
        if self._abilities is None and may_read:
            with self._reading:
                if self._abilities is None:
                    self._make()
        return self._abilities or Abilities()

    def _make(self, budget_bytes: int | None = None) -> tuple[Ready, Speeds | None]:
        assert self.offer.make is not None
        made = ready, _ = self.offer.make(budget_bytes)
        self._abilities = Abilities.of(ready, ready.tokenizer)
        self._facts = replace(facts_of_ready(ready), created=self._facts.created)
        return made

    def prepare(self, budget_bytes: int) -> None:
        """Prepare to open the model, for example by checking its floor against the server's budget.

        Raises what `open` raises, and DoesNotFit.
        """
        with self._reading:
            if self._made is None:
                self._made = self._make(budget_bytes)

    def release(self) -> None:
        """Free what `prepare` made; the model is not open."""
        self._made = self.offer.ready

    def open(self, share_bytes: int, progress: Progress) -> Service:
        """Bring the model into memory, with so much beyond its floor; `progress` raises if it is no longer wanted."""
        assert self._made is not None
        ready, speeds = self._made
        recording = None if self._record is None else self._record()
        engine = ready.open(share_bytes, progress=_told(ready.name, progress), recorder=recording)
        try:
            service = service_for(
                engine, self._facts, self._common, replay_bytes=engine.plan.claimed["replay_bytes"],
                recorder=None if recording is None else recording.recorder, speeds=speeds,
            )  # fmt: skip
        except BaseException:
            ready.close(engine)
            raise
        if recording is not None:
            self._closing.callback(recording.save)
        self._closing.callback(ready.close, engine)
        self._closing.callback(service.loop.close)
        if self._note_use is not None:
            self._note_use(ready.name)
        return service

    def resize(self, share_bytes: int) -> None:
        """Use this much memory beyond the floor; any freed memory is back with the system when this returns."""
        assert self.service is not None
        assert self._made is not None
        self.service.resize(self._made[0].budget_bytes(share_bytes), is_share=True)

    def close(self) -> None:
        """End running requests and free the memory."""
        if self.stays and self.service is not None:
            self.service.loop.close()
        self._closing.close()

    def forget(self, tenant: str) -> None:
        """Delete a tenant's data in files while the model is not in memory; models of a library keep none."""
        if self.offer.ready is not None:
            self.offer.ready[0].forget(tenant)


def _told(name: str, progress: Progress, clock: Callable[[], float] = time.monotonic) -> Progress:
    """Progress of loading a model, for the log as well, every LOADING_SAID_S."""
    said_at = clock()

    def tell(task: str, share: float) -> None:
        nonlocal said_at
        progress(task, share)
        if (now := clock()) - said_at >= LOADING_SAID_S:
            said_at = now
            log.info("loading %s: %s (%.0f %%)", name, task, 100 * share)

    return tell
