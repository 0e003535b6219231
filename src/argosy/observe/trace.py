"""Keep every choice, in order, while `argosy routes` reads texts; `recorder.py` counts while a model serves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from argosy.config import ModelConfig
from argosy.experts.recording import StepRoutes
from argosy.observe.recorder import Choices


class Taken(NamedTuple):
    """Tokens in the order they ran.

    lookups, hits: for the experts that decode requested since the last trace was taken.
    """

    choices: Choices
    is_decode: NDArray[np.bool_]
    lookups: int
    hits: int


class TraceRecorder:
    """A `RoutingRecorder` that keeps the choices of at most `num_tokens` tokens until they are taken.

    Args:
        working_bytes: memory for copies of them, also counted by the memory plan.
    """

    def __init__(self, model: ModelConfig, num_tokens: int, *, working_bytes: int = 0) -> None:
        self._working_bytes = working_bytes
        self._choices: Choices = np.zeros(
            (num_tokens, len(model.moe_layers), model.experts_per_token), np.uint16
        )
        self._is_decode: NDArray[np.bool_] = np.zeros(num_tokens, bool)
        self._num_held = 0
        self._is_stopped = False
        self._counters = self._taken_counters = (0, 0)

    @property
    def nbytes(self) -> int:
        return 2 * (self._choices.nbytes + self._is_decode.nbytes) + self._working_bytes

    def record(self, steps: Sequence[StepRoutes], lookups: int, hits: int) -> None:
        for step in [] if self._is_stopped else steps:
            end = self._num_held + len(step.is_decode)
            assert end <= len(self._choices), "more tokens than the trace was made for"
            self._choices[self._num_held : end] = step.choices.transpose(1, 0, 2)
            self._is_decode[self._num_held : end] = step.is_decode
            self._num_held = end
        self._counters = lookups, hits

    def stop(self) -> None:
        """Stop keeping tokens."""
        self._is_stopped = True

    def take(self) -> Taken:
        """Return everything since the last call."""
        held, before = self._num_held, self._taken_counters
        lookups, hits = (now - then for now, then in zip(self._counters, before, strict=True))
        self._num_held, self._taken_counters = 0, self._counters
        return Taken(self._choices[:held].copy(), self._is_decode[:held].copy(), lookups, hits)
