"""Facts about an engine and its model: only numbers, never text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from argosy import _native
from argosy.budget.memory_plan import MemoryPlan
from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.fingerprint import fingerprint
from argosy.checkpoint.geometry import count_parameters
from argosy.engine.ledger import Ledger
from argosy.engine.scheduler import Scheduler
from argosy.engine.start import Started

WINDOW_TOKENS = 256  # the experts of only a few tokens would reveal those tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """The state of an engine between two steps; counters are totals since it started."""

    num_running: int
    num_waiting: int
    num_preempted: int  # how often a sequence was preempted
    kv_blocks: int  # held, kept and free blocks
    kv_blocks_held: int  # by running sequences
    kv_blocks_kept: int  # held by no sequence, but kept in the prefix cache
    kv_blocks_free: int
    states_held: int
    states_free: int
    snapshots: int  # copies of recurrent states
    num_experts: int  # routed experts in all layers
    expert_slots: int  # number of experts that fit in memory now
    num_resident: int  # number of experts in memory now
    file_bytes: int  # size of the prefix files
    tokens_run: int  # in prompts and answers
    totals: Ledger
    memory: tuple[tuple[str, int, str], ...]  # the memory plan: label, bytes, note
    budget_bytes: int
    # [layers, experts]: how often each expert was chosen up to the last complete window; older windows count less.
    expert_uses: NDArray[np.int64] | None
    expert_use_tokens: int  # tokens behind these counts
    # Operations of products that can run on AMX tiles: on tiles, and in all; None: there are no tiles.
    operations: tuple[int, int] | None

    def with_plan(self, plan: MemoryPlan) -> EngineFacts:
        """Return the same facts with another memory plan."""
        return replace(self, memory=tuple(plan.lines()), budget_bytes=plan.budget_bytes)


class ExpertUses:
    """How often each expert was chosen, reported only for at least WINDOW_TOKENS tokens at once.

    Each window halves the counts of the windows before it.

    Args:
        take_uses: as `Model.take_uses`.
    """

    def __init__(self, take_uses: Callable[[], NDArray[np.int64]]) -> None:
        self._take_uses = take_uses
        self._num_tokens = 0
        self.num_tokens_run = 0
        self.reported: NDArray[np.int64] | None = None
        self.reported_tokens = 0

    def count(self, num_tokens: int) -> None:
        """Count tokens that ran."""
        self._num_tokens += num_tokens
        self.num_tokens_run += num_tokens
        if self._num_tokens >= WINDOW_TOKENS:
            uses = self._take_uses()
            if self.reported is not None:  # a new array: the last one may still be in use
                uses += self.reported // 2
            self.reported = uses
            self.reported_tokens = self._num_tokens + self.reported_tokens // 2
            self._num_tokens = 0


def collect_facts(started: Started, scheduler: Scheduler, totals: Ledger, uses: ExpertUses) -> EngineFacts:
    """Collect the facts of an engine between two steps."""
    plan, model, cache = started.plan, started.model, started.cache
    blocks, states = cache.blocks, cache.states
    return EngineFacts(
        num_running=scheduler.num_running,
        num_waiting=scheduler.num_waiting,
        num_preempted=scheduler.num_preempted,
        kv_blocks=blocks.num_blocks,
        kv_blocks_held=blocks.num_held,
        kv_blocks_kept=blocks.num_kept,
        kv_blocks_free=blocks.num_free,
        states_held=0 if states is None else states.num_sequences - states.num_free,
        states_free=0 if states is None else states.num_free,
        snapshots=0 if states is None else states.num_snapshots,
        num_experts=plan.slots.num_experts,
        expert_slots=plan.slots.own if started.experts is None else started.experts.num_slots,
        num_resident=0 if model.experts is None else model.experts.num_resident,
        file_bytes=cache.file_bytes,
        tokens_run=uses.num_tokens_run,
        totals=totals,
        memory=tuple(plan.lines()),
        budget_bytes=plan.budget_bytes,
        expert_uses=uses.reported,
        expert_use_tokens=uses.reported_tokens,
        operations=started.runtime.operations if _native.amx_formats() else None,
    )


def identity_of(files: ModelFiles) -> tuple[int, str]:
    """The parameters of a model with all of its experts, without encoders; and the digest that identifies it.

    Reads samples of its files (`checkpoint/fingerprint.py`).
    """
    return count_parameters(files.config)[0], fingerprint(files)
