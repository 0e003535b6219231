"""What an engine tells those who watch it: numbers, and nothing that anyone said."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from argosy.engine.ledger import Ledger

WINDOW_TOKENS = 256  # which experts a few tokens chose would reveal them


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """An engine between two steps; counters are totals since it started."""

    num_running: int
    num_waiting: int
    num_put_back: int  # how often a sequence had to give up its KV blocks, to be computed again
    kv_blocks: int  # the three below, together
    kv_blocks_held: int  # by sequences that run
    kv_blocks_kept: int  # by nobody, with beginnings that may be found
    kv_blocks_free: int
    states_held: int
    states_free: int
    snapshots: int  # of the recurrent state
    num_experts: int  # routed experts of all layers
    expert_slots: int  # of them, so many can be in memory
    num_resident: int  # of them, so many are in memory now
    file_bytes: int  # of prompts that outlive the process
    tokens_run: int  # of prompts and answers
    totals: Ledger
    memory: tuple[tuple[str, int, str], ...]  # what, bytes, note: the memory plan
    budget_bytes: int
    expert_uses: (
        NDArray[np.int64] | None
    )  # [layers, experts]: how often each was chosen in the last whole window
    expert_use_tokens: int  # of that window


class _CountsUses(Protocol):
    def take_uses(self) -> NDArray[np.int64]: ...


class ExpertUses:
    """How often each expert was chosen, only ever told for WINDOW_TOKENS tokens or more at once."""

    def __init__(self, decoder: _CountsUses) -> None:
        self._decoder = decoder
        self._num_tokens = 0
        self.num_tokens_run = 0
        self.last_window: NDArray[np.int64] | None = None
        self.last_window_tokens = 0

    def count(self, num_tokens: int) -> None:
        """Say that so many tokens more ran."""
        self._num_tokens += num_tokens
        self.num_tokens_run += num_tokens
        if self._num_tokens >= WINDOW_TOKENS:
            self.last_window, self.last_window_tokens = self._decoder.take_uses(), self._num_tokens
            self._num_tokens = 0


class Pace:
    """How often a sequence ends, to say when there may be room for another."""

    def __init__(self) -> None:
        self._ends: deque[float] = deque(maxlen=16)

    def count(self, now: float) -> None:
        self._ends.append(now)

    def seconds_to_next(self) -> int:
        """Whole seconds, from 1 to 60."""
        ends = self._ends
        mean = (ends[-1] - ends[0]) / (len(ends) - 1) if len(ends) > 1 else 1.0
        return min(60, max(1, math.ceil(mean)))
