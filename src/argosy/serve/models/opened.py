"""A model in memory, as a server has it: the engine, the thread that steps it, and the service.

    Offer  ─ prepare ─>  Ready  ─ open ─>  OpenedModel: Engine, EngineLoop, Service  ─ close, release ─>  Offer

Elsewhere: `loading.py` decides when a model is opened and closed; `engine/shared.py` has models without weights.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, Self

from argosy.budget.memory_plan import MemoryPlan
from argosy.config import EngineConfig, ModelConfig, SamplingDefaults
from argosy.engine.engine import Engine
from argosy.engine.ledger import DecodeSteps
from argosy.engine.loop import EngineLoop
from argosy.engine.shared import Ready
from argosy.forecast.verification import Verification, compare_decode
from argosy.media.parts import Hearing, Kind
from argosy.observe.live import LiveCache
from argosy.observe.recorder import Recorder
from argosy.prompt.replay import ReplayMemory
from argosy.prompt.reranking import RERANK_FORMS, Reranking
from argosy.prompt.thinking import switch_of
from argosy.serve.answer.facts import ModelFacts
from argosy.serve.answer.service import Common, Service
from argosy.serve.http.log import where_it_failed
from argosy.serve.models.entry import Abilities, Progress
from argosy.serve.models.models import Shelved

if TYPE_CHECKING:
    from argosy.forecast.forecast import Speeds

log = logging.getLogger("argosy.serve")

LOADING_SAID_S = 10.0  # how often the log tells of a model that is loaded


class Recording(Protocol):
    """Opens the recorder of a model's routing (`experts/recording.py`), and saves what it counted."""

    recorder: Recorder | None

    def __call__(self, files: Any, config: EngineConfig) -> Recorder: ...

    def save(self) -> None: ...


class OpenedModel:
    """A model that its source opened. `close` frees its memory."""

    def __init__(
        self,
        ready: Ready,
        facts: ModelFacts,
        common: Common,
        share_bytes: int,
        *,
        progress: Progress,
        recording: Recording | None,
        speeds: Speeds | None,
    ) -> None:
        self._ready, self._recording = ready, recording
        self._engine = ready.open(share_bytes, progress=progress, recorder=recording)
        try:
            self.service = service_for(
                self._engine, facts, common, replay_bytes=self._engine.plan.claimed["replay_bytes"],
                recorder=None if recording is None else recording.recorder, speeds=speeds,
            )  # fmt: skip
        except BaseException:
            ready.close(self._engine)
            raise

    def resize(self, share_bytes: int) -> None:
        """See `entry.Opened`."""
        self.service.resize(self._ready.budget_bytes(share_bytes), is_share=True)

    def close(self) -> None:
        """See `entry.Opened`."""
        self.service.loop.close()
        self._ready.close(self._engine)
        if self._recording is not None:
            self._recording.save()


def service_for(
    engine: Engine,
    facts: ModelFacts,
    common: Common,
    *,
    replay_bytes: int,
    recorder: Recorder | None,
    speeds: Speeds | None,
) -> Service:
    """Start the thread that steps an engine; whoever closes the engine closes the service's `loop` first.

    Args:
        replay_bytes: for answers whose tokens are kept until their conversation continues.
        recorder: has the choices of recent tokens; None: nothing is recorded.
        speeds: predictions of its speed; None: there are none.
    """

    def compare(steps: DecodeSteps) -> Verification:
        assert speeds is not None
        return compare_decode(speeds, engine.plan, steps)

    recent_cache = None
    if recorder is not None and not engine.plan.slots.is_packed:
        num_experts, num_slots = engine.config.num_experts, engine.plan.slots_in_decode()
        recent_cache = LiveCache(recorder, num_experts=num_experts, num_slots=num_slots)
    reranking = None
    if common.rerank is not None:
        form, context_tokens = RERANK_FORMS[common.rerank], engine.plan.context_tokens
        reranking = Reranking(form, engine.tokenizer, context_tokens=context_tokens)
    if common.ring is not None:
        engine.forget_others(["", *common.ring.ids])  # drops tenants whose keys were revoked meanwhile
    return Service(
        EngineLoop(engine, report=lambda error: log.error("engine: %s", where_it_failed(error))),
        engine.prompts.remembering(ReplayMemory(max_bytes=replay_bytes)),
        engine.tokenizer,
        facts,
        common,
        ears=engine.ears,
        reranking=reranking,
        recent_cache=recent_cache,
        compare=None if speeds is None else compare,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A model that a server may open.

    key: equal as long as its files are unchanged.
    make: reads its tokenizer and plans it in a budget, or in that of the server's start; raises DoesNotFit,
        CheckpointError and related errors.
    is_ready: `make` gives what is there from start to end.
    """

    facts: ModelFacts
    key: object
    make: Callable[[int | None], tuple[Ready, Speeds | None]]
    is_ready: bool = False

    @classmethod
    def of(cls, ready: Ready, speeds: Speeds | None = None) -> Self:
        """A model that is ready; `speeds` are predictions of its speed."""
        return cls(facts=_facts_of_ready(ready), key=ready, make=lambda _: (ready, speeds), is_ready=True)


class EngineSource:
    """An `entry.Source`: opens engines of a model. It is made ready for each time that it is opened, if it is not yet.

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
        record: Callable[[], Recording] | None,
        note_use: Callable[[str], None] | None = None,
    ) -> None:
        self.key, self.facts = offer.key, offer.facts
        self._offer, self._common = offer, common
        self._record, self._note_use = record, note_use
        self._made: tuple[Ready, Speeds | None] | None = None
        self._abilities: Abilities | None = None
        if offer.is_ready:
            self._made = self._make()

    def _make(self, budget_bytes: int | None = None) -> tuple[Ready, Speeds | None]:
        made = ready, _ = self._offer.make(budget_bytes)
        self._abilities = Abilities.of(
            ready.tokenizer, tools=ready.tools, thinking=switch_of(ready.variables),
            can_infill=ready.can_infill,
        )  # fmt: skip
        self.facts = replace(_facts_of_ready(ready), created=self.facts.created)
        return made

    def abilities(self, *, may_read: bool = False) -> Abilities:
        """See `entry.Source`."""
        if self._abilities is None and may_read:
            with self._reading:
                if self._abilities is None:
                    self._make()
        return self._abilities or Abilities()

    def prepare(self, budget_bytes: int) -> None:
        """See `entry.Source`."""
        with self._reading:
            if self._made is None:
                self._made = self._make(budget_bytes)

    def release(self) -> None:
        """See `entry.Source`."""
        if not self._offer.is_ready:
            self._made = None

    @property
    def _ready(self) -> Ready:
        assert self._made is not None
        return self._made[0]

    @property
    def floor_bytes(self) -> int:
        return self._ready.floor_bytes

    @property
    def most_bytes(self) -> int:
        return self._ready.most_bytes

    def open(self, share_bytes: int, progress: Progress) -> OpenedModel:
        """See `entry.Source`."""
        assert self._made is not None
        ready, speeds = self._made
        opened = OpenedModel(
            ready, self.facts, self._common, share_bytes, progress=_told(ready.name, progress),
            recording=None if self._record is None else self._record(), speeds=speeds,
        )  # fmt: skip
        if self._note_use is not None:
            self._note_use(ready.name)
        return opened

    def forget(self, tenant: str) -> None:
        """See `entry.Source`; a library's models keep nothing in files."""
        if self._offer.is_ready:
            self._ready.forget(tenant)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Offers:
    """The models of a library; `others` and `faults` as in `models.Shelved`."""

    offers: Sequence[Offer]
    others: Mapping[str, str]
    faults: Mapping[str, str]


class LibraryShelf:
    """A `models.Shelf` over what a library offers."""

    def __init__(self, look: Callable[[], Offers], to_source: Callable[[Offer], EngineSource]) -> None:
        self._look, self._to_source = look, to_source
        self._sources: dict[str, EngineSource] = {}

    def look(self) -> Shelved:
        """See `models.Shelf`."""
        found, before = self._look(), self._sources
        self._sources = {}
        for offer in found.offers:
            source = before.get(offer.facts.id)
            if source is None or source.key != offer.key:
                source = self._to_source(offer)
            self._sources[offer.facts.id] = source
        return Shelved(sources=self._sources, others=found.others, faults=found.faults)


def _facts_of_ready(ready: Ready) -> ModelFacts:
    return facts_of(
        ready.name, ready.model, ready.plan, num_parameters=ready.num_parameters, media_kinds=ready.media_kinds,
        hears=ready.hears, fingerprint=ready.fingerprint, sampling=ready.sampling,
    )  # fmt: skip


def facts_of(
    name: str,
    model: ModelConfig,
    plan: MemoryPlan,
    *,
    num_parameters: int,
    media_kinds: tuple[Kind, ...],
    hears: Hearing,
    fingerprint: str,
    sampling: SamplingDefaults,
) -> ModelFacts:
    """The facts about a model that clients may know."""
    return ModelFacts(
        id=name,
        family=model.family,
        context_tokens=plan.context_tokens,
        num_layers=len(model.layers),
        num_experts=model.num_experts,
        experts_per_token=model.experts_per_token,
        vocab_size=model.vocab_size,
        num_parameters=num_parameters,
        weight_bytes=plan.dense_bytes + plan.resident_bytes,
        media_kinds=media_kinds,
        hears=hears,
        hidden_size=model.hidden_size,
        fingerprint=fingerprint,
        sampling=sampling,
    )
