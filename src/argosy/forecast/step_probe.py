"""Measure the steps of a server's engine for under a minute, and correct their forecast.

    engine  ->  decode steps of 1, 2, 4 ... sequences, chunks of several lengths, steps with both  ->  StepTimes

Each measured kind of step gets the factor by which its forecast was wrong; kinds in between are interpolated. The
mean is used, because a queue also waits for slow steps.

Elsewhere: `forecast.py` predicts steps; `forecast/simulation.py` runs requests through them.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from argosy.budget.memory_plan import MemoryPlan
from argosy.config import SamplingParams
from argosy.engine.sequence import Sequence
from argosy.errors import UsageError
from argosy.experts.resident import Progress
from argosy.forecast.simulation import SimulatedServer
from argosy.forecast.step_times import StepTimes, Table
from argosy.open.engine import Engine

# Seconds per kind of step and round, and the fewest steps. Rounds, because a machine's speed changes from one
# second to the next.
_SAMPLE_S, _FEWEST = 0.4, 3
_ROUNDS = 3
_SHORT, _LONG = 16, 512  # prompt tokens before decode steps
_LEAST_ANSWER = 12
_CHUNKS = (16, 64, 192, 512)
_BESIDE = 4  # sequences that decode alongside a prompt, or after long prompts
_PROMPT_BESIDE = 64
_WARM_TOKENS = 32
_LEAST_CONTEXT = 64
_SPREAD = 1.05  # a server's steps may be longer or shorter by this factor


class _Measured(NamedTuple):
    """The seconds of a step, and the mean number of positions that each decoding sequence sees."""

    seconds: float
    seen: float


def measured_servers(
    model: str,
    plan: MemoryPlan,
    server: SimulatedServer,
    options: dict[str, Any],
    *,
    progress: Progress | None = None,
) -> tuple[SimulatedServer, SimulatedServer, SimulatedServer]:
    """Run a model on random prompts; return fast, likely and slow servers with the measured steps.

    Args:
        plan, server: the forecast.
        options: those for `Engine.open` that lead to that plan (`Forecaster.engine_options`).

    Raises:
        UsageError: the context is too short.   And the errors of `Engine.open`.
    """
    if plan.context_tokens < _LEAST_CONTEXT:
        raise UsageError(
            f"measuring steps needs a context of {_LEAST_CONTEXT} tokens, and it has {plan.context_tokens}"
        )
    options = options | {"max_sequences": server.max_sequences, "prefix_reuse": False}
    with Engine.open(model, progress=progress, **options) as engine:
        probe = _Probe(engine)
        probe.decode(1, _WARM_TOKENS)  # the first steps pay for memory that the machine has yet to allocate
        likely = _corrected(server.step_times, probe, server, progress or (lambda what, share: None))
    ends = likely.scaled(1 / _SPREAD), likely, likely.scaled(_SPREAD)
    fast, same, slow = (replace(server, step_times=times) for times in ends)
    return fast, same, slow


def _corrected(predicted: StepTimes, probe: _Probe, server: SimulatedServer, tell: Progress) -> StepTimes:
    counts = sorted(
        {1 << power for power in range(10) if 1 << power < server.max_sequences} | {server.max_sequences}
    )
    most = min(server.chunk_tokens, server.context_tokens // 2)
    lengths = [length for length in _CHUNKS if length <= most]
    few = min(_BESIDE, server.max_sequences)
    of_decode: dict[int, list[_Measured]] = defaultdict(list)
    of_chunks: dict[int, list[float]] = defaultdict(list)
    of_both: list[_Measured] = []
    for number in range(_ROUNDS):
        for at, count in enumerate(counts):
            tell("measuring steps", (number + 0.6 * at / len(counts)) / (_ROUNDS + 1))
            of_decode[count] += probe.decode(count, _SHORT)
        for length in lengths:
            of_chunks[length].append(probe.chunk(length))
        of_both += probe.beside(few, _PROMPT_BESIDE)
    tell("measuring steps", _ROUNDS / (_ROUNDS + 1))
    far = probe.decode(few, _LONG)

    def factor(count: int, found: list[_Measured]) -> float:
        """The factor by which decode steps take longer than predicted."""
        return fmean(one.seconds for one in found) / fmean(
            predicted.decode_s(count, one.seen) for one in found
        )

    contexts, growth = (0.0, 1.0), 1.0
    if of_decode[few] and far:
        near_to = of_decode[few][0].seen
        contexts = near_to, max(far[0].seen, near_to + 1.0)
        growth = factor(few, far) / factor(few, of_decode[few])
    factors = {float(count): factor(count, found) for count, found in of_decode.items() if found}
    decode = Table(tuple(factors), contexts, tuple((found, found * growth) for found in factors.values()))
    chunk = Table(
        tuple(map(float, lengths)),
        (0.0,),
        tuple((fmean(of_chunks[n]) / predicted.mixed_s(0, 0.0, n, (n + 1) / 2),) for n in lengths),
    )
    if not of_both:
        return predicted.corrected(decode, chunk)
    alone = predicted.corrected(decode, chunk)
    alone_s = fmean(alone.mixed_s(few, one.seen, _PROMPT_BESIDE, (_PROMPT_BESIDE + 1) / 2) for one in of_both)
    return predicted.corrected(decode, chunk, both=fmean(one.seconds for one in of_both) / alone_s)


class _Probe:
    """Times the steps of an otherwise idle engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._random = np.random.default_rng(0)

    def decode(self, streams: int, prompt_tokens: int) -> list[_Measured]:
        """Time decode steps of `streams` sequences with prompts of `prompt_tokens`; empty if they do not fit."""
        found: list[_Measured] = []
        with self._decoding(streams, prompt_tokens) as sequences:
            while sequences and _goes_on(sequences, found):
                seen = sum(one.num_tokens for one in sequences) / streams
                found.append(_Measured(self._step_s(), seen))
        return found

    def chunk(self, tokens: int) -> float:
        """Time a step that computes only a prompt, in seconds."""
        self._submit(tokens, 1)
        return self._step_s()

    def beside(self, streams: int, tokens: int) -> list[_Measured]:
        """Time steps that compute a prompt alongside `streams` decoding sequences; empty if they do not fit."""
        found: list[_Measured] = []
        if (streams + 1) * (tokens + _SHORT) > self._engine.plan.context_tokens // 2:
            return found
        with self._decoding(streams, _SHORT) as sequences:
            while sequences and _goes_on(sequences, found):
                prompt = self._submit(tokens, 1)
                while prompt.result is None:  # it may have to wait its turn
                    seen = sum(one.num_tokens for one in sequences) / streams
                    seconds = self._step_s()
                found.append(_Measured(seconds, seen))
        return found

    @contextmanager
    def _decoding(self, streams: int, prompt_tokens: int) -> Iterator[list[Sequence]]:
        """Start sequences and wait until they decode; yields an empty list if the context has no room for them."""
        # the other half leaves room to start and to grow
        room = self._engine.plan.context_tokens // 2 // streams
        prompt_tokens = min(prompt_tokens, room - _LEAST_ANSWER)
        sequences: list[Sequence] = []
        try:
            if prompt_tokens > 0:
                sequences += [self._submit(prompt_tokens, room - prompt_tokens) for _ in range(streams)]
            while any(len(one.new_ids) < 2 for one in sequences):
                self._engine.step()
            yield sequences
        finally:
            for one in sequences:
                self._engine.cancel(one)

    def _submit(self, tokens: int, most_new: int) -> Sequence:
        prompt = self._random.integers(0, self._engine.config.vocab_size, tokens).tolist()
        return self._engine.submit(prompt, SamplingParams(max_tokens=most_new, ignore_eos=True))

    def _step_s(self) -> float:
        began = time.perf_counter()
        self._engine.step()
        return time.perf_counter() - began


def _goes_on(sequences: list[Sequence], found: list[_Measured]) -> bool:
    """Whether to time another step."""
    is_enough = len(found) >= _FEWEST and sum(one.seconds for one in found) >= _SAMPLE_S
    return not is_enough and all(one.result is None for one in sequences)
