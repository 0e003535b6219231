"""Compare measurements with the forecast, part by part.

    `argosy plan --verify`: a prompt and an answer after a warm-up  ─┐
    a server: its recent decode steps (`engine/loop.py`)            ─┴─>  Verification: predicted, measured

Predictions of parts use the measured hit rate, so that a wrong hit rate shows only as such.

Elsewhere: `forecast.py` predicts; `engine/ledger.py` records where time went.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from argosy.budget.memory_plan import MemoryPlan
from argosy.checkpoint.files import ModelFiles
from argosy.config import SamplingParams
from argosy.engine.ledger import DecodeSteps
from argosy.experts.recording import OpenRecorder
from argosy.forecast.forecast import Forecaster, Speeds
from argosy.forecast.speed import Range
from argosy.machine import resources
from argosy.open.engine import Engine

PROMPT_TOKENS, WARM_TOKENS, ANSWER_TOKENS = 256, 32, 64
# Part of a ledger -> the part of a decode step that predicts it.
_PARTS = {
    "attention_and_dense": ("dense weights", "keys and values"),
    "expert_compute": ("experts in memory",),
    "waiting_for_reads": ("waiting for the drive",),
}


@dataclass(frozen=True, slots=True)
class Row:
    """One quantity: `predicted` and `measured` in `unit`."""

    name: str
    unit: str
    predicted: Range
    measured: float

    @property
    def error(self) -> float:
        """Predicted / measured - 1."""
        return self.predicted.likely / self.measured - 1.0 if self.measured else 0.0

    @property
    def is_within(self) -> bool:
        return self.predicted.low <= self.measured <= self.predicted.high


@dataclass(frozen=True, slots=True)
class Verification:
    """Compared quantities, and the milliseconds of a decode step by part: (predicted, measured)."""

    rows: tuple[Row, ...]
    parts_ms: Mapping[str, tuple[float, float]]

    @property
    def off(self) -> str:
        """The part that explains most of decode's error."""
        return max(self.parts_ms, key=lambda name: abs(self.parts_ms[name][0] - self.parts_ms[name][1]))

    def lines(self) -> list[str]:
        lines = [f"verified  {'':<26}{'predicted':>24}{'measured':>12}{'error':>9}"]
        for row in map(_readable, self.rows):
            low, likely, high = map(_shown, row.predicted)
            spread = f"{likely} ({low} to {high})"
            within = "" if row.is_within else "  outside its range"
            found = _shown(row.measured)
            lines.append(
                f"  {f'{row.name}, {row.unit}':<34}{spread:>24}{found:>12}{row.error:>+9.0%}{within}"
            )
        lines.append("  milliseconds of a decode step, at the measured hit rate:")
        for name, (predicted, measured) in self.parts_ms.items():
            lines.append(f"    {name:<32}{predicted:>24.3g}{measured:>12.3g}")
        lines.append(f"  most of the difference is in: {self.off}")
        return lines

    def as_dict(self) -> dict[str, Any]:
        return {
            "verified": [
                {
                    "name": row.name, "unit": row.unit, "predicted": row.predicted._asdict(),
                    "measured": row.measured, "error": row.error, "is_within": row.is_within,
                }
                for row in self.rows
            ],
            "parts_ms": {name: list(pair) for name, pair in self.parts_ms.items()},
            "off": self.off,
        }  # fmt: skip


def _shown(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


_LARGER = {"MB": "GB", "MiB": "GiB"}


def _readable(row: Row) -> Row:
    """The same quantity in a larger unit if it has four digits before the point."""
    unit, slash, per = row.unit.partition("/")
    if unit not in _LARGER or max(row.predicted.likely, row.measured) < 1000:
        return row
    factor = 1e-3 if unit == "MB" else 1 / 1024
    return Row(row.name, _LARGER[unit] + slash + per, row.predicted.times(factor), row.measured * factor)


def compare_decode(speeds: Speeds, plan: MemoryPlan, steps: DecodeSteps) -> Verification:
    """Compare the measured times of these decode steps with their prediction."""
    streams = max(1, round(steps.num_tokens / steps.num_steps))
    context = round(steps.context)
    hit_rate = steps.hits / steps.lookups if steps.lookups else 1.0
    expected = speeds.decode(plan, streams, context=context)
    rows = [Row("decode", "tok/s", expected.tokens_per_s, steps.num_tokens / steps.seconds)]
    if not plan.slots.is_resident:
        read = steps.bytes_read / steps.num_tokens
        rows += [
            Row("hit rate", "share", expected.hit_rate, hit_rate),
            Row("drive, decode", "MB/token", expected.drive_bytes_per_token.times(1e-6), read / 1e6),
        ]
    predicted = speeds.decode(plan, streams, context=context, hit_rate=hit_rate).parts
    spent = dict(steps.parts)
    parts: dict[str, tuple[float, float]] = {}
    for part, names in _PARTS.items():
        measured = spent.pop(part)
        parts[part.replace("_", " ")] = (
            1e3 * sum(predicted[name] for name in names),
            1e3 * measured / steps.num_steps,
        )
    parts["overhead"] = 1e3 * predicted["overhead"], 1e3 * sum(spent.values()) / steps.num_steps
    return Verification(tuple(rows), parts)


def verify(
    model: str,
    files: ModelFiles,
    forecaster: Forecaster,
    plan: MemoryPlan,
    options: dict[str, Any],
    *,
    recorder: OpenRecorder | None = None,
) -> Verification:
    """Run a random prompt and its answer, and compare.

    Args:
        plan: the forecast; the engine gets its budget and context.
        options, recorder: as for `Engine.open`.

    Raises:
        The errors of `Engine.open`.
    """
    is_reset = resources.reset_peak()  # calibration or planning may have used more memory than the model will
    random = np.random.default_rng(0)
    room = plan.context_tokens - WARM_TOKENS - ANSWER_TOKENS - 1
    num_tokens = max(1, min(PROMPT_TOKENS, room))
    prompt = random.integers(0, files.config.vocab_size, num_tokens).tolist()
    options = options | forecaster.engine_options(plan) | {"prefix_reuse": False}
    with Engine.open(model, recorder=recorder, **options) as engine:
        # The first prompt pays for memory that the machine has yet to allocate.
        engine.generate(prompt, SamplingParams(max_tokens=WARM_TOKENS, ignore_eos=True))
        before = engine.ledger
        began = time.perf_counter()
        sequence = engine.submit(
            prompt, SamplingParams(max_tokens=WARM_TOKENS + ANSWER_TOKENS, ignore_eos=True)
        )
        while not engine.step():
            pass
        first_s = time.perf_counter() - began
        prefilled = engine.ledger
        for _ in range(WARM_TOKENS - 1):
            engine.step()
        warm, num_steps = engine.ledger, 0
        while sequence.result is None:
            engine.step()
            num_steps += 1
        context = num_tokens + WARM_TOKENS + num_steps // 2
        steps = DecodeSteps.between(warm, engine.ledger, num_steps=num_steps, context=context)
        peak, planned = resources.peak_bytes() if is_reset else None, engine.plan
    compared = compare_decode(forecaster, planned, steps)
    expected = forecaster.prompt(planned, num_tokens)
    rows = [*compared.rows, Row(f"first token of {num_tokens}", "s", expected.seconds, first_s)]
    if not planned.slots.is_resident:
        swept = prefilled.bytes_read - before.bytes_read
        rows.append(Row("drive, prompt", "MB", expected.drive_bytes.times(1e-6), swept / 1e6))
    if peak is not None:
        # The plan counts experts and buffers in full, but memory is touched only as they are used.
        most = Range(0.0, planned.total_bytes / 2**20, planned.budget_bytes / 2**20)
        rows.append(Row("memory, peak", "MiB", most, peak / 2**20))
    return replace(compared, rows=tuple(rows))
