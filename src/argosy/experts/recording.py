"""The protocol between an engine and a recorder of its routing. Routing can reveal the text: keep it private.

    a step writes its choices into the room of a RouteLog  ─ every LOG_TOKENS tokens ─>  RoutingRecorder.record

Python code that runs once per token finds cold caches, because each step has just read gigabytes. So a step only logs
its choices, and a recorder counts many tokens at once. Without a recorder, choices are not even copied.

Elsewhere: `observe/` implements recorders; the engine knows only the protocol.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from argosy.checkpoint.files import ModelFiles
from argosy.config import EngineConfig
from argosy.experts.runner import ExpertRunner

LOG_TOKENS = 128


class StepRoutes(NamedTuple):
    """The choices of one step, without those of rejected proposals.

    choices: int32 [routed layers, tokens, experts per token], best first, -1 in layers that leave out a token of a
        prompt; valid only during `record`.
    is_decode: bool [tokens]; prompt tokens are False.
    sequence: int32 [tokens], indices into `numbers`.
    numbers: the step's sequences, in order of arrival: a later request has a higher number.
    """

    choices: NDArray[np.int32]
    is_decode: NDArray[np.bool_]
    sequence: NDArray[np.int32]
    numbers: list[int]


class RoutingRecorder(Protocol):
    """Receives every step that ran. `record` must be fast: the next step waits for it."""

    @property
    def nbytes(self) -> int:
        """The most bytes that the recorder will ever hold; the memory plan counts them."""
        ...

    def record(self, steps: Sequence[StepRoutes], lookups: int, hits: int) -> None:
        """Receive steps, in order.

        `lookups` and `hits` count decode since the engine began, up to the last of these steps, rejected proposals
        included.
        """
        ...


OpenRecorder = Callable[[ModelFiles, EngineConfig], RoutingRecorder]


def log_bytes(step_tokens: int, *, num_layers: int, experts_per_token: int) -> int:
    """Return the bytes that a `RouteLog` allocates."""
    return 4 * (LOG_TOKENS + step_tokens) * num_layers * experts_per_token


class RouteLog:
    """Collects the choices of steps until it holds LOG_TOKENS tokens."""

    def __init__(
        self, recorder: RoutingRecorder, step_tokens: int, *, num_layers: int, experts_per_token: int
    ) -> None:
        self._recorder = recorder
        self._shape = num_layers, experts_per_token
        nbytes = log_bytes(step_tokens, num_layers=num_layers, experts_per_token=experts_per_token)
        self._memory: NDArray[np.int32] = np.zeros(nbytes // 4, np.int32)
        self._full_at = LOG_TOKENS * num_layers * experts_per_token
        self._begin = self._end = 0  # where the choices of the last step lie
        self._steps: list[StepRoutes] = []

    def room(self, num_tokens: int) -> NDArray[np.int32]:
        """Return room for the choices of the next step: int32 [routed layers, tokens, experts per token]."""
        num_layers, k = self._shape
        self._end = self._begin + num_layers * num_tokens * k
        return self._memory[self._begin : self._end].reshape(num_layers, num_tokens, k)

    def keep(self, choices: NDArray[np.int32], is_kept: NDArray[np.bool_]) -> NDArray[np.int32]:
        """Drop the choices of some tokens of the step that last requested room; return the others.

        Args:
            choices: the step's choices, from `room`.
            is_kept: bool [tokens].
        """
        left = choices[:, is_kept]
        room = self.room(left.shape[1])
        room[:] = left
        return room

    def note(self, routes: StepRoutes, runner: ExpertRunner) -> None:
        """Note that the step that last requested room has run."""
        self._steps.append(routes)
        self._begin = self._end
        if self._begin >= self._full_at:
            self.flush(runner)

    def flush(self, runner: ExpertRunner) -> None:
        """Pass the logged steps to the recorder; they are lost if it fails."""
        stats, steps = runner.stats, self._steps
        self._steps = []
        self._begin = 0
        self._recorder.record(steps, stats.decode_lookups, stats.decode_hits)
