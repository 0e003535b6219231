"""A model of a server: what brings it into memory, what it is then, and how it stands.

    Source  ─ prepare, open ─>  Opened: a service, until `close`  ─ release ─>  Source

Elsewhere: `loading.py` decides when; `opened.py` opens engines; `models.py` finds an entry by name.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from argosy.errors import ArgosyError
from argosy.prompt.prompt import ToolCalling
from argosy.prompt.thinking import ThinkingSwitch
from argosy.serve.answer.facts import ModelFacts
from argosy.serve.answer.service import Service

if TYPE_CHECKING:
    from argosy.prompt.tokenizer import Tokenizer

State = Literal["unloaded", "loading", "ready", "failed"]
Progress = Callable[[str, float], None]  # the current task, and the share done from 0 to 1


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


class Opened(Protocol):
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

    def open(self, share_bytes: int, progress: Progress) -> Opened:
        """Bring the model into memory; `progress` raises if it is no longer wanted."""
        ...

    def forget(self, tenant: str) -> None:
        """Delete what files keep of a revoked tenant, while the model is not in memory."""
        ...


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
class Waiter:
    """A request that waits for a model, by its id."""

    name: str
    since: float


class Entry:
    """A model of the server."""

    def __init__(self, source: Source, opened: Opened | None = None) -> None:
        self.source = source
        self.opened = opened
        self.is_loading = False  # it has memory, and is being read
        self.share_read: float | None = None  # of the part of it that is being read
        self.has_no_room = False  # it waits for memory of models that are being read
        self.waiters: list[Waiter] = []
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
        if self.opened is not None:
            return self.opened.service.model
        return self.source.facts

    @property
    def name(self) -> str:
        return self.source.facts.id

    @property
    def state(self) -> State:
        if self.opened is not None and not self.is_leaving:
            return "ready"
        if self.is_loading:
            return "loading"
        return "unloaded" if self.fault is None else "failed"

    @property
    def is_here(self) -> bool:
        """Whether it has memory."""
        return self.opened is not None or self.is_loading

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
        return self.source.floor_bytes + self.expert_bytes if self.is_here else 0


class Lasting:
    """The `Source` and the `Opened` of a server's only model, which stays in memory.

    Whoever opened its engine closes it.
    """

    floor_bytes = most_bytes = 0  # nobody else needs its memory

    def __init__(self, service: Service) -> None:
        self.service = service

    @property
    def facts(self) -> ModelFacts:
        return self.service.model

    def abilities(self, *, may_read: bool = False) -> Abilities:
        """See `Source`."""
        prompts = self.service.prompts
        return Abilities.of(
            self.service.tokenizer, tools=prompts.tool_calling, thinking=self.service.thinking,
            can_infill=prompts.can_infill,
        )  # fmt: skip

    def prepare(self, budget_bytes: int) -> None:
        """It is open from start to end."""

    def release(self) -> None:
        """It is open from start to end."""

    def open(self, share_bytes: int, progress: Progress) -> Opened:
        """See `Source`."""
        return self

    def forget(self, tenant: str) -> None:
        """Its engine is open, and forgets."""

    def resize(self, share_bytes: int) -> None:
        """It has all of the budget."""

    def close(self) -> None:
        """See `Opened`."""
        self.service.loop.close()
