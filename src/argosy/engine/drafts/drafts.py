"""The drafter of one engine, and the governor that lets it propose while proposals pay."""

from __future__ import annotations

from collections.abc import Collection
from time import perf_counter
from typing import NamedTuple, Self

from argosy import _native
from argosy.config import KV_BLOCK_TOKENS, EngineConfig
from argosy.engine.drafts.drafter import Drafter
from argosy.engine.drafts.governor import Governor
from argosy.engine.drafts.lookup import LookupDrafter
from argosy.engine.drafts.mtp import MtpDrafter
from argosy.engine.sequence import Sequence
from argosy.engine.steps import Scheduled
from argosy.errors import UsageError
from argosy.model.model import Model


class Drafts(NamedTuple):
    """The drafter of an engine, if it has one.

    most: the most tokens proposed for a sequence in one step.
    governor: None: the drafter proposes whether or not that pays.
    mtp: the drafter, if it is the checkpoint's own layer.
    """

    drafter: Drafter | None = None
    most: int = 0
    governor: Governor | None = None
    mtp: MtpDrafter | None = None

    @staticmethod
    def require_one(config: EngineConfig, given: Drafter | None) -> None:
        """Raise UsageError if the caller passes a drafter and the settings choose another one."""
        if given is not None and config.speculate != "off":
            raise UsageError(f"a drafter is given, and speculate='{config.speculate}' chooses another one")

    @classmethod
    def open(cls, config: EngineConfig, model: Model, store: _native.Store, given: Drafter | None) -> Self:
        """Make the drafter that the settings choose, or use the caller's."""
        if config.speculate == "off":
            return cls(given, config.draft_tokens)
        governor = Governor(config.draft_tokens, lambda: store.stats()["busy_seconds"])
        mtp = MtpDrafter(model, KV_BLOCK_TOKENS) if config.speculate == "mtp" else None
        return cls(mtp or LookupDrafter(), config.draft_tokens, governor, mtp)

    def note(self, scheduled: Scheduled, ended: Collection[Sequence]) -> None:
        """Show the draft layer, if there is one, what a step committed."""
        if self.mtp is None or self.governor is None:
            return
        began = perf_counter()
        self.mtp.note(scheduled, ended)
        self.governor.count_upkeep(scheduled.sequences, perf_counter() - began)


NO_DRAFTS = Drafts()
