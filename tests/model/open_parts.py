"""Open the parts that a decoder needs for a checkpoint, and make steps by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from argosy import _native
from argosy.config import ModelConfig
from argosy.experts.cache import CachedRunner, ExpertCache
from argosy.experts.files import ExpertFiles
from argosy.experts.resident import load_resident
from argosy.experts.runner import ExpertRunner
from argosy.model.families import open_model
from argosy.model.layers import describe_experts, kv_shapes, state_shapes
from argosy.model.step import Step
from argosy.model.weights import DenseWeights, load_dense
from tests.experts.process_runner import ProcessRunner
from tests.model.reference_step import ReferenceExperts

BLOCK_TOKENS = 16
BLOCKS_A_SEQUENCE = 6
NUM_SEQUENCES = 4

Residency = Literal["resident", "smallest cache", "guessing cache", "another process", "no experts"]


@dataclass(frozen=True)
class Parts:
    """Weights, experts and threads of one model; each decoder takes its own KV cache and recurrent state."""

    config: ModelConfig
    weights: DenseWeights
    experts: ExpertRunner | None
    runtime: _native.Runtime
    # Makes a second copy of the same experts.
    reference_experts: Callable[[], ReferenceExperts | None] = lambda: None

    def kv(self) -> _native.KvCache:
        num_blocks = NUM_SEQUENCES * BLOCKS_A_SEQUENCE
        return _native.KvCache(kv_shapes(self.config), num_blocks, BLOCK_TOKENS, "f32")

    def recurrent(self) -> _native.RecurrentState | None:
        config = self.config
        shapes = state_shapes(config)
        return _native.RecurrentState(NUM_SEQUENCES, shapes) if shapes else None


@contextmanager
def open_parts(
    directory: Path,
    residency: Residency,
    *,
    threads: int = 1,
    instruction_set: str | None = None,
    file_system: _native.FileSystem | None = None,
) -> Iterator[Parts]:
    files = open_model(directory)
    config = files.config
    store = _native.Store(2) if file_system is None else _native.Store(2, file_system)
    opened: dict[str, int] = {}
    if not files.experts:
        residency = "no experts"

    def open_file(path: str) -> int:
        if path not in opened:
            opened[path] = store.open(path)
        return opened[path]

    experts: ExpertRunner | None = None
    runtime = _native.Runtime(threads, instruction_set=instruction_set)
    try:
        weights = load_dense(store, files.dense, open_file=open_file, norm_offset=files.config.norm_offset)
        if files.experts:
            expert_files = ExpertFiles(store, files.experts, open_file=open_file)
        if residency == "resident":
            experts = load_resident(store, expert_files, runtime, describe_experts(config, weights))
        elif residency == "another process":
            experts = ProcessRunner(
                directory, "smallest cache", num_experts=config.num_experts, instruction_set=instruction_set
            )
        elif residency in ("smallest cache", "guessing cache"):
            is_smallest = residency == "smallest cache"
            cache = ExpertCache(
                expert_files,
                num_slots=config.experts_per_token if is_smallest else 4 * config.experts_per_token,
                experts_per_token=config.experts_per_token,
                arithmetic=describe_experts(config, weights),
            )
            experts = CachedRunner(runtime, cache)
            if not is_smallest:  # read every guess
                cache.core.trust(0.0)

        def reference_experts() -> ReferenceExperts | None:
            return None if experts is None else ReferenceExperts(store, expert_files)

        yield Parts(config, weights, experts, runtime, reference_experts)
    finally:
        if experts is not None:
            experts.close()
        store.close()


@dataclass(frozen=True)
class Run:
    """The next `count` tokens of a sequence: prompt tokens, or one that decodes."""

    sequence: int
    count: int = 1
    is_decode: bool = False


def decode(sequence: int) -> Run:
    return Run(sequence, is_decode=True)


def make_steps(config: ModelConfig, steps: Sequence[Sequence[Run]], *, seed: int = 0) -> Iterator[Step]:
    """Make steps of random tokens. The blocks of different sequences are interleaved, as in the engine."""
    rng = np.random.default_rng(seed)
    places = rng.permutation(NUM_SEQUENCES * BLOCKS_A_SEQUENCE).astype(np.int32)
    table = places.reshape(NUM_SEQUENCES, BLOCKS_A_SEQUENCE)
    length = [0] * NUM_SEQUENCES
    for runs in steps:
        positions, sequences, is_decode = [], [], []
        for run in runs:
            positions += range(length[run.sequence], length[run.sequence] + run.count)
            sequences += [run.sequence] * run.count
            is_decode += [run.is_decode] * run.count
            length[run.sequence] += run.count
        where, rows = np.array(positions, np.int32), np.array(sequences, np.int32)
        yield Step(
            token_ids=rng.integers(0, config.vocab_size, len(where), dtype=np.int32),
            sequence=rows,
            slots=table[rows, where // BLOCK_TOKENS].astype(np.int64) * BLOCK_TOKENS + where % BLOCK_TOKENS,
            block_table=table,
            is_decode=np.array(is_decode),
            order=where,
            wanted=np.arange(len(where), dtype=np.int64),
            state_slots=np.roll(np.arange(NUM_SEQUENCES, dtype=np.int32), 1),
        )
