"""The seam between layers and experts is a verb: run these experts on these rows.

    router  ->  dispatch  ->  expert runner  ─ groups of outputs, as they are done ─>  combine

A layer's tokens choose experts; a runner computes their outputs, wherever the weights are. It takes and gives rows,
never weights, so it may as well be another process or another machine. Each assignment (a token and one of its experts)
has its own row of the outputs, and the combine adds them in the router's order: which expert was done first never
matters.

`resident.ResidentRunner` has every expert in memory, `cache.CachedRunner` as many as the budget allows. Tests can use
any other object with these methods.

Elsewhere: `native/kernels/route.h` chooses experts; `native/ops/experts` groups tokens by expert, and computes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from argosy import _native
from argosy.checkpoint.files import ModelFiles

Rows = NDArray[np.float32]


@dataclass(slots=True)
class RunnerStats:
    """Counters since the runner was created; `hits / lookups` is the hit rate.

    A miss whose read had started before the layer asked counts in `reads_ahead`; a read-ahead that was not needed
    counts in `idle_reads`. `bytes_read` includes both. `compute_s` is the time in which this process computed experts,
    without those that the native stack ran itself. `decode_hits / decode_lookups` leaves out what only prompts ask for.
    """

    lookups: int = 0
    hits: int = 0
    bytes_read: int = 0
    reads_ahead: int = 0
    idle_reads: int = 0
    compute_s: float = 0.0
    decode_lookups: int = 0
    decode_hits: int = 0


class ExpertRunner(Protocol):
    """Runs routed experts of a model; one run at a time."""

    @property
    def resident(self) -> _native.ExpertTable | None:
        """The table of all experts if every one is in memory now: native code runs the next step without Python."""
        ...

    @property
    def elsewhere(self) -> _native.LayerExperts | None:
        """Runs the next step's experts without Python at each layer: elsewhere, or as they are read.

        None: the stack stops at each layer. Otherwise it still stops at one that fails or takes long, and `run` goes on
        with what was begun.
        """
        ...

    @property
    def stats(self) -> RunnerStats: ...

    @property
    def num_resident(self) -> int:
        """How many experts are in memory or being read."""
        ...

    def run(
        self, layer: int, dispatch: _native.Dispatch, rows: Rows, out: Rows
    ) -> AbstractContextManager[Iterable[Sequence[int]]]:
        """Run the experts of a dispatch.

        Entering starts the work (reads, messages) and does not wait for it. Iterating yields groups of experts whose
        outputs have just been written, until every expert of the dispatch was named once. Leaving ends the work, even
        if it is cut short: no read is in flight then, and nothing more is written.

        Args:
            rows: the input of the experts, float32 [tokens, hidden].
            out: float32 [tokens * experts per token, hidden]; row token * experts per token + rank is for that token
                and the expert of that rank. Only written to while the caller asks for the next group.

        Raises:
            ReadFailed, CheckpointError, RunnerFailed: an expert could not be run; facts: `layer`, and `expert` if it
                concerns one. The same run may be tried again.
        """
        ...

    def wants_guess(self, *, is_sweep: bool) -> bool:
        """Whether a guess would be of use in this step."""
        ...

    def guess(self, layer: int, by_rank: Sequence[Sequence[int]], *, is_sweep: bool) -> None:
        """Tell which experts the next run may ask for, inside the current one, so that their reads can begin.

        Never waits. A guess for decode is read while the drive has little else to do. A prompt needs most of a layer,
        so a guess in a sweep is read right after the experts needed now, and passes through the cache as a scan does.

        Args:
            by_rank: the experts that routers rank first, then those that they rank second and not first ...
        """
        ...

    def close(self) -> None: ...


class ExpertGroup(Protocol):
    """Other processes that run experts of a model, too: an engine receives one as an argument (`cluster/group.py`)."""

    @property
    def runs_here(self) -> bool:
        """Whether the engine's own process runs experts, too."""
        ...

    @property
    def most_rows(self) -> int:
        """The most tokens of a step that the others take."""
        ...

    def nbytes(self, files: ModelFiles) -> int:
        """Most bytes that it takes in the engine's process."""
        ...

    def open(
        self,
        files: ModelFiles,
        local: ExpertRunner,
        *,
        instruction_set: str,
        cache_bytes: int,
        step_tokens: int,
    ) -> ExpertRunner:
        """The runner of all of them together, for one engine.

        Args:
            local: runs experts in this process.
            instruction_set: the one that the engine's runtime uses; sums depend on it.
            cache_bytes: memory for experts in `local`.
            step_tokens: the most tokens of a step.
        """
        ...
