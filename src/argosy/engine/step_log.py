"""Log steps for observers: how often experts were chosen, and for a recorder each choice and the drive's rate.

    a step that is committed  ─ its routing ─>  RouteLog ─ several steps ─>  RoutingRecorder
                              ─ its tokens ──>  ExpertUses (`facts.py`)

Elsewhere: `experts/recording.py` collects choices; `observe/` implements recorders; `machine/kept_rates.py` keeps
rates.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from argosy import _native
from argosy.engine.facts import ExpertUses
from argosy.engine.steps import Scheduled
from argosy.experts.recording import RouteLog, StepRoutes
from argosy.machine.kept_rates import DriveReads
from argosy.model.model import Model
from argosy.model.step import Step


class StepLog:
    """Notes steps, one after another. Call every method with the engine's lock.

    Args:
        routes: takes the choices of each step; None: nothing is recorded.
    """

    def __init__(self, model: Model, store: _native.Store, routes: RouteLog | None) -> None:
        self._model, self._store, self._routes = model, store, routes
        self._reads = DriveReads()
        self.uses = ExpertUses(model.take_uses)

    @contextmanager
    def during(self, step: Step) -> Iterator[None]:
        """Context in which the layers of a step run."""
        if self._routes is None:
            yield
            return
        before = self._store.stats()
        try:
            yield
        finally:
            self._reads.add(before, self._store.stats(), is_decode=bool(step.is_decode.all()))

    def note(self, scheduled: Scheduled) -> None:
        """Note a committed step; choices of tokens that were rejected, or will run again, are left out."""
        self.uses.count(scheduled.step.num_tokens)
        if self._routes is None:
            return
        step, choices, experts = scheduled.step, self._model.decoder.choices, self._model.experts
        assert choices is not None
        assert experts is not None
        numbers = [sequence.number for sequence in scheduled.sequences]
        is_decode, sequence = step.is_decode, step.sequence
        if scheduled.proposals:
            computed = np.array([one.num_computed for one in scheduled.sequences])
            counts = step.order < computed[sequence]
            choices = self._routes.keep(choices, counts)
            is_decode, sequence = is_decode[counts], sequence[counts]
        self._routes.note(StepRoutes(choices, is_decode, sequence, numbers), experts)

    def flush(self) -> None:
        """Pass the choices noted so far to the recorder, if there is one."""
        if self._routes is not None and self._model.experts is not None:
            self._routes.flush(self._model.experts)

    def close(self, path: Path) -> None:
        """Keep the drive's rate in the user's cache, if a recorder saw the steps of the model at `path`."""
        if self._routes is not None:
            with suppress(OSError):
                self._reads.note(path)
