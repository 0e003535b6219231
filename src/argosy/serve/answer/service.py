"""One model for all dialects: its engine, its prompts, its ears, and what it keeps for its clients.

Elsewhere: `opening.py` turns a request into a prompt in the engine; the engine's thread is `engine/loop.py`; the
models of a server are `serve/models/models.py`.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar

from argosy.config import Preset
from argosy.engine.ledger import DecodeSteps
from argosy.engine.loop import EngineLoop
from argosy.forecast.verification import Verification
from argosy.guard.keys import KeyRing
from argosy.media.parts import Content
from argosy.observe.live import LiveCache
from argosy.prompt.thinking import ThinkingSwitch, switch_of
from argosy.serve.answer.facts import ModelFacts
from argosy.serve.answer.kept_items import KeptItems
from argosy.serve.answer.media_hosts import MediaHosts
from argosy.serve.answer.media_parts import Intake
from argosy.serve.answer.work import Work
from argosy.serve.http.caller import Caller
from argosy.serve.http.failures import Refused
from argosy.serve.http.held import FilesWanted
from argosy.serve.http.work import give_memory_back

if TYPE_CHECKING:
    from starlette.requests import Request

    from argosy.adapters.registry import AdapterFacts
    from argosy.engine.media.ears import Report, Transcriber
    from argosy.media.transcript import Transcript, TranscriptOptions
    from argosy.prompt.builder import PromptBuilder
    from argosy.prompt.reranking import Reranking
    from argosy.prompt.tokenizer import Tokenizer

T = TypeVar("T")

ANY_EARS = "whisper-1"  # the name that OpenAI's clients send
Compare = Callable[[DecodeSteps], Verification]  # compares predictions with recent decode steps


def service_of(request: Request) -> Service:
    """The service of the model that a request's body names, otherwise of the first model.

    If a body needs its model, the model is in memory before the handler runs. A handler without a body calls
    `models.use_model`, or asks `models_of` for the facts of models that may not be in memory.
    """
    service: Service = request.state.service
    return service


@dataclass(frozen=True, slots=True, kw_only=True)
class Common:
    """The parts shared by all models of a server.

    ring: the server's keys; opening a model deletes prefix files of tenants without a key. None: the server has no
        keys.
    kept: items of earlier responses.
    work: threads for the work that precedes the engine.
    rerank: the reranker's prompt form, by its name in `RERANK_FORMS`; None: the models do not rank documents.
    lora_dir: the directory from which an admin may load adapters; None: from nowhere.
    """

    ring: KeyRing | None = None
    kept: KeptItems = field(default_factory=KeptItems)
    work: Work = field(default_factory=Work)
    keep_billing_line: bool = False
    any_model: bool = False
    media_hosts: MediaHosts | None = None
    rerank: str | None = None
    lora_dir: Path | None = None


class Service:
    """One model, for all dialects, or one of its presets.

    Args:
        recent_cache: reports the hit rate of the last minutes; None: nothing is recorded, or every expert is
            resident.
        compare: None if nothing is predicted.
    """

    def __init__(
        self,
        loop: EngineLoop,
        prompts: PromptBuilder,
        tokenizer: Tokenizer | None,
        model: ModelFacts,
        common: Common | None = None,
        *,
        ears: Transcriber | None = None,
        reranking: Reranking | None = None,
        recent_cache: LiveCache | None = None,
        compare: Compare | None = None,
    ) -> None:
        self.loop = loop
        self.recent_cache, self.compare = recent_cache, compare
        common = Common() if common is None else common
        self.kept, self.work, self._media_hosts = common.kept, common.work, common.media_hosts
        self.keep_billing_line, self.any_model = common.keep_billing_line, common.any_model
        self.prompts = prompts
        self.tokenizer = tokenizer
        self.model = model
        self.ears = ears
        self.reranking = reranking
        self.lora_dir = common.lora_dir
        self.adapter: str | None = None  # the name of the adapter with which it answers
        self.digests = _digests(model, tokenizer)

    def under(self, preset: Preset) -> Self:
        """The service for requests that name a preset, which shares everything with this one except its facts."""
        made = copy.copy(self)
        made.model = self.model.under(preset)
        made.digests = {**self.digests, "preset_sha256": preset.digest}
        return made

    def adapted(self, adapter: AdapterFacts) -> Self:
        """The service for requests that name an adapter, which shares everything with this one except its facts."""
        made = copy.copy(self)
        made.adapter, made.model = adapter.name, self.model.adapted(adapter.name)
        made.prompts = self.prompts.remembering(under=adapter.name)
        made.digests = {**self.digests, "adapter_sha256": adapter.sha256}
        return made

    @property
    def has_stopped(self) -> bool:
        """Whether requests wait for a thread in vain."""
        hosts = self._media_hosts
        return self.work.has_stopped or (hosts is not None and hosts.has_stopped)

    def resize(self, budget_bytes: int, *, is_share: bool = False) -> None:
        """Change the engine's memory budget (`Engine.resize`); clients see the context that is left."""
        plan = self.loop.resize(budget_bytes, is_share=is_share)
        self.model = replace(self.model, context_tokens=plan.context_tokens)
        if self.reranking is not None:
            self.reranking.context_tokens = plan.context_tokens
        if self.recent_cache is not None:
            self.recent_cache.num_slots = plan.slots_in_decode()

    @property
    def ears_id(self) -> str:
        """The name under which clients request transcripts."""
        return "" if self.ears is None else self.ears.name

    def require_ears(self, name: str | None = None) -> None:
        """Check that this server transcribes and that a request names its model for that.

        Raises:
            Refused: it does not transcribe, or the request names another model.
        """
        if self.ears is None:
            raise no_ears()
        if name not in (None, self.ears_id, ANY_EARS) and not self.any_model:
            raise Refused(
                404,
                f"the model {json.dumps(name)} does not transcribe; this server has: {self.ears_id}",
                hint=f"{ANY_EARS} also names it; `argosy serve --any-model` accepts every model name",
                param="model",
                code="model_not_found",
            )

    async def transcribe(
        self, caller: Caller, content: Content, options: TranscriptOptions, report: Report
    ) -> Transcript:
        """Transcribe a sound in a thread, alongside the model's steps. Raises what `Transcriber.transcribe` raises.

        Raises:
            TooMany: too many of this caller's sounds are already waiting.
        """
        ears = self.ears
        assert ears is not None
        caller.answered_by(self.ears_id)

        def transcribe() -> Transcript:
            try:
                return caller.work(partial(ears.transcribe, content, options, report=report))
            finally:
                give_memory_back()

        return await self.work.ears.run(caller.tenant, transcribe)

    @property
    def thinking(self) -> ThinkingSwitch:
        """What the model's template lets a caller choose about thinking."""
        return switch_of(self.prompts.variables)

    def intake(self, caller: Caller) -> Intake:
        """Create the intake for the pictures and sounds of a caller's request."""
        files = None if self._media_hosts is None else caller.held.files
        return Intake(self.model.media_kinds, caller.held.share, files=files, faults=self.model.media_faults)

    async def run_reading(self, caller: Caller, call: Callable[[], T]) -> T:
        """Run a call that reads a request. If it needs files from other hosts, fetch them and run the call again.

        Raises what `call` and `MediaHosts.fetch` raise.
        """
        held_before = caller.held.share.num_bytes
        try:
            while True:
                try:
                    return await self.work.run(caller, call)
                except FilesWanted:
                    assert self._media_hosts is not None
                    await self._media_hosts.fetch(caller.held.files, caller.held.share, caller.tenant)
        finally:
            caller.held.files.clear()
            caller.held.share.shrink(held_before)

    def revoke(self, tenant: str) -> None:
        """End all requests of a revoked tenant and delete all of its data."""
        self.loop.revoke(tenant)
        self.prompts.forget(tenant)
        self.kept.forget(tenant)

    def erase(self, tenant: str) -> int:
        """End a tenant's running requests and delete what is kept for it here; it may send more requests.

        Returns:
            The number of answers that were kept for replay. Prefixes are deleted before the engine's next step.
        """
        self.loop.erase(tenant)
        return self.prompts.forget(tenant)


def _digests(model: ModelFacts, tokenizer: Tokenizer | None) -> dict[str, str]:
    """The SHA-256 digests, as far as known, of the files that determine a model's answers."""
    found = {"model_sha256": model.fingerprint} if model.fingerprint else {}
    if tokenizer is not None and tokenizer.chat_template is not None:
        found["template_sha256"] = hashlib.sha256(tokenizer.chat_template.encode()).hexdigest()
    return found


def no_ears() -> Refused:
    """The refusal from a server that cannot transcribe."""
    return Refused(
        404,
        "this server does not transcribe sounds",
        hint="start it with ears: `argosy serve --ears tiny.en`",
    )
