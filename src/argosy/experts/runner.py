"""The seam between layers and experts is a verb: run these experts on these rows.

    router  ->  dispatch  ->  expert runner  ─ groups of outputs, as they are done ─>  combine

A layer's tokens choose experts; a runner computes their outputs, wherever the weights are. A runner receives and
returns rows, never weights, so it may also be another process or another machine. Each assignment (a token and one of
its experts) has its own row of outputs, and the combine adds them in the router's order: it never matters which expert
finished first.

`resident.ResidentRunner` keeps every expert in memory; `cache.CachedRunner` keeps those that fit the budget. Tests can
use any other object with these methods.

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

    A miss whose read had started before the layer needed it counts in `reads_ahead`; a read-ahead that was not needed
    counts in `idle_reads`. `bytes_read` includes both. `compute_s` is the time in which this process computed experts,
    without those that the native stack ran itself. `decode_hits / decode_lookups` leaves out experts that only prompts
    chose.
    """

    lookups: int = 0
    hits: int = 0
    bytes_read: int = 0
    reads_ahead: int = 0
    idle_reads: int = 0
    compute_s: float = 0.0
    decode_lookups: int = 0
    decode_hits: int = 0


class AdapterParts(Protocol):
    """The low-rank pairs that an adapter adds to routed experts, a part for each expert (`adapters/parts.py`).

    name: for people.   adapter: where parts lie, for a table.   most: the parts of all experts.
    """

    name: str
    adapter: _native.ExpertAdapter
    most: int

    def load_all(self) -> None: ...

    def write(self) -> None: ...

    def stream(self, num_slots: int) -> _native.PartCache: ...

    def resize(self, num_slots: int) -> None: ...

    def close(self) -> None: ...


def replace_parts(held: dict[int, AdapterParts], number: int, parts: AdapterParts | None) -> None:
    """Hold an adapter's parts, and free those that it had."""
    if (earlier := held.pop(number, None)) is not None:
        earlier.close()
    if parts is not None:
        held[number] = parts


class ExpertRunner(Protocol):
    """Runs routed experts of a model; one run at a time."""

    @property
    def resident(self) -> _native.ExpertTable | None:
        """Return the table of all experts if every one is in memory now; native code then runs the next step without
        Python.
        """
        ...

    @property
    def elsewhere(self) -> _native.LayerExperts | None:
        """Runs the next step's experts without Python at each layer: in other processes, or as they are read.

        None: the stack stops at each layer. Otherwise it stops only at a layer that fails or takes long, and `run`
        continues the work that was begun.
        """
        ...

    @property
    def stats(self) -> RunnerStats: ...

    @property
    def num_resident(self) -> int:
        """Return how many experts are in memory or being read."""
        ...

    def run(
        self, layer: int, dispatch: _native.Dispatch, rows: Rows, out: Rows
    ) -> AbstractContextManager[Iterable[Sequence[int]]]:
        """Run the experts of a dispatch.

        Entering starts the work (reads, messages) and does not wait for it. Iterating yields groups of experts whose
        outputs have just been written, until every expert of the dispatch was named once. Leaving, even early, ends
        the work: no read is in flight any more, and nothing more is written.

        Args:
            rows: the input of the experts, float32 [tokens, hidden].
            out: float32 [tokens * experts per token, hidden]; row token * experts per token + rank is for that token
                and its expert of that rank. Written only while the caller requests the next group.

        Raises:
            ReadFailed, CheckpointError, RunnerFailed: an expert could not be run; facts: `layer`, and `expert` if only
                one is affected. The caller may retry the run.
        """
        ...

    def wants_guess(self, *, is_sweep: bool) -> bool:
        """Whether a guess would help in this step."""
        ...

    def guess(self, layer: int, by_rank: Sequence[Sequence[int]], *, is_sweep: bool) -> None:
        """Announce, during the current run, which experts the next run may need, so that their reads can begin.

        Never waits. A guess for decode is read while the drive has little else to do. A prompt needs most of a layer,
        so a guess in a sweep is read right after the experts needed now, and passes through the cache as a scan does.

        Args:
            by_rank: the experts that routers rank first, then those ranked second but not first, and so on.
        """
        ...

    def close(self) -> None: ...


class ExpertGroup(Protocol):
    """Other processes that run some of a model's experts; an engine receives the group as an argument."""

    @property
    def runs_here(self) -> bool:
        """Whether the engine's own process also runs experts."""
        ...

    @property
    def most_rows(self) -> int:
        """Return the most tokens that the other processes take in one step."""
        ...

    def nbytes(self, files: ModelFiles) -> int:
        """Return the most bytes that the group takes in the engine's process."""
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
        """Open the runner of all processes together, for one engine.

        Args:
            local: runs experts in this process.
            instruction_set: the instruction set of the engine's runtime; sums depend on it.
            cache_bytes: memory for experts in `local`.
            step_tokens: the most tokens of a step.
        """
        ...
