"""Facts about an engine for monitoring: numbers only, nothing that anyone said."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from argosy.engine.ledger import Ledger

WINDOW_TOKENS = 256  # the experts chosen by only a few tokens would reveal them


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """An engine between two steps; counters are totals since it started."""

    num_running: int
    num_waiting: int
    num_put_back: int  # how often a sequence was preempted
    kv_blocks: int  # held, kept and free together
    kv_blocks_held: int  # by running sequences
    kv_blocks_kept: int  # held by no sequence, and kept in the prefix cache
    kv_blocks_free: int
    states_held: int
    states_free: int
    snapshots: int  # of the recurrent state
    num_experts: int  # routed experts in all layers
    expert_slots: int  # number of experts that fit in memory
    num_resident: int  # number of experts in memory now
    file_bytes: int  # size of the prefix files
    tokens_run: int  # of prompts and answers
    totals: Ledger
    memory: tuple[tuple[str, int, str], ...]  # the memory plan: label, bytes, note
    budget_bytes: int
    # [layers, experts]: how often each expert was chosen in the last complete window.
    expert_uses: NDArray[np.int64] | None
    expert_use_tokens: int  # tokens of that window


class _CountsUses(Protocol):
    def take_uses(self) -> NDArray[np.int64]: ...


class ExpertUses:
    """How often each expert was chosen, reported only for at least WINDOW_TOKENS tokens at once."""

    def __init__(self, decoder: _CountsUses) -> None:
        self._decoder = decoder
        self._num_tokens = 0
        self.num_tokens_run = 0
        self.last_window: NDArray[np.int64] | None = None
        self.last_window_tokens = 0

    def count(self, num_tokens: int) -> None:
        """Count tokens that ran."""
        self._num_tokens += num_tokens
        self.num_tokens_run += num_tokens
        if self._num_tokens >= WINDOW_TOKENS:
            self.last_window, self.last_window_tokens = self._decoder.take_uses(), self._num_tokens
            self._num_tokens = 0


class Pace:
    """How often sequences end, to estimate when there will be room for another."""

    def __init__(self) -> None:
        self._ends: deque[float] = deque(maxlen=16)

    def count(self, now: float) -> None:
        self._ends.append(now)

    def seconds_to_next(self) -> int:
        """Mean time between ends, in whole seconds from 1 to 60."""
        ends = self._ends
        mean = (ends[-1] - ends[0]) / (len(ends) - 1) if len(ends) > 1 else 1.0
        return min(60, max(1, math.ceil(mean)))
