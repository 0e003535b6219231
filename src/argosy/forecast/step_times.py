"""The time of a step by its contents: tables that a simulation can look up a million times.

    predict_decode, predict_chunk, at a few points  ->  tabulate  ->  StepTimes: slow, likely, fast

A step contains one token of each decoding sequence, and chunks of prompts. Seconds between table points are
interpolated. A mixed step takes as long as a chunk of all its rows, plus the attention over the positions that they
see: its rows share one read of the weights, so this is less than the sum of two steps.

Elsewhere: `speed.py` predicts each point; `simulation.py` runs requests through such steps;
`forecast/step_probe.py` measures the error of the predictions.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from argosy.experts.hit_rate import WorkingSet
from argosy.forecast.speed import Range, predict_chunk, predict_decode
from argosy.machine.rates import Rates
from argosy.model.work import Work

_CONTEXT_STEP = 64  # positions over which decode steps are taken as equally long


@dataclass(frozen=True, slots=True)
class Table:
    """Values at `xs` and `ys`, interpolated linearly and constant beyond."""

    xs: tuple[float, ...]
    ys: tuple[float, ...]
    values: tuple[tuple[float, ...], ...]  # [xs][ys]

    def __call__(self, x: float, y: float) -> float:
        row, over = _place(self.xs, x)
        column, along = _place(self.ys, y)
        value = _between(self.values[row], column, along)
        return value if not over else value + over * (_between(self.values[row + 1], column, along) - value)

    def times(self, factors: Table) -> Table:
        """A table with the values multiplied by factors at the same points."""
        return Table(
            self.xs,
            self.ys,
            tuple(
                tuple(value * factors(x, y) for y, value in zip(self.ys, row, strict=True))
                for x, row in zip(self.xs, self.values, strict=True)
            ),
        )


def _place(points: Sequence[float], value: float) -> tuple[int, float]:
    """The last point not beyond a value, and the value's position between it and the next, from 0 to 1."""
    at = max(0, bisect_right(points, value) - 1)
    if at == len(points) - 1 or value <= points[at]:
        return at, 0.0
    return at, (value - points[at]) / (points[at + 1] - points[at])


def _between(values: Sequence[float], at: int, along: float) -> float:
    return values[at] if not along else values[at] + along * (values[at + 1] - values[at])


class StepTimes:
    """Seconds of steps.

    Args:
        decode: by sequences, and positions seen by each.
        chunk: by tokens, and positions seen by each.
        both: the factor by which a mixed step exceeds the tables.
    """

    def __init__(self, decode: Table, chunk: Table, *, both: float = 1.0) -> None:
        self._decode = decode
        self._chunk = chunk
        self._both = both
        self._known: dict[tuple[int, int], float] = {}

    def decode_s(self, streams: int, context: float) -> float:
        """A step of `streams` decoding sequences with `context` positions each."""
        key = streams, int(context) // _CONTEXT_STEP
        if (found := self._known.get(key)) is None:
            found = self._known[key] = self._decode(streams, (key[1] + 0.5) * _CONTEXT_STEP)
        return found

    def steps_alike(self, context: float) -> int:
        """How many decode steps from `context` on are taken as equally long."""
        return _CONTEXT_STEP - int(context) % _CONTEXT_STEP

    def mixed_s(self, streams: int, context: float, tokens: int, seen: float) -> float:
        """A step with `tokens` of prompts, which see `seen` positions each, alongside `streams` decoding sequences."""
        seconds = self._chunk(tokens + streams, 0.0) + self._chunk(tokens, seen) - self._chunk(tokens, 0.0)
        if not streams:
            return seconds
        return self._both * (seconds + self._decode(streams, context) - self._decode(streams, 0.0))

    def corrected(self, decode: Table, chunk: Table, *, both: float = 1.0) -> StepTimes:
        """These times multiplied by factors."""
        return StepTimes(self._decode.times(decode), self._chunk.times(chunk), both=self._both * both)

    def scaled(self, factor: float) -> StepTimes:
        alike = Table((0.0,), (0.0,), ((factor,),))
        return self.corrected(alike, alike)


def tabulate(
    work: Work, rates: Rates, working_set: WorkingSet, *, num_slots: int, most_streams: int, chunk_tokens: int,
    context_tokens: int,
) -> tuple[StepTimes, StepTimes, StepTimes]:  # fmt: skip
    """Tabulate the fast, likely and slow times of all steps that a plan allows."""
    contexts = _points(context_tokens, first=128)
    streams = _points(most_streams, first=1)[1:]
    tokens = _points(chunk_tokens + most_streams, first=1)[1:]
    decode = [
        [
            predict_decode(
                work, rates, working_set, num_slots=num_slots, context=int(context), streams=int(count)
            ).step_s
            for context in contexts
        ]
        for count in streams
    ]
    chunk = [
        [
            predict_chunk(work, rates, working_set, num_slots=num_slots, num_tokens=int(count), seen=context)
            for context in contexts
        ]
        for count in tokens
    ]

    def table(counts: tuple[float, ...], found: Sequence[Sequence[Range]], end: int) -> Table:
        return Table(counts, contexts, tuple(tuple(seconds[end] for seconds in row) for row in found))

    fast, likely, slow = (
        StepTimes(table(streams, decode, end), table(tokens, chunk, end)) for end in range(3)
    )
    return fast, likely, slow


def _points(most: int, *, first: int) -> tuple[float, ...]:
    """0, then two points for each doubling from `first` to `most`."""
    points, at = {0.0, float(most)}, first
    while at < most:
        points |= {float(at), float(min(most, at + at // 2))}
        at *= 2
    return tuple(sorted(points))
