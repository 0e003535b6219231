"""Run a model briefly, and put what was measured beside what was forecast, part by part.

    forecast  ->  a prompt and an answer after a warm-up  ->  Verification: predicted, measured, which part is off

Predictions of parts take the hit rate that was measured, so that a wrong hit rate shows as such and in no other part.

Elsewhere: `forecast.py` predicts; `ledger.py` says where time went.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from argosy.checkpoint.files import ModelFiles
from argosy.config import SamplingParams
from argosy.engine.engine import Engine
from argosy.engine.forecast import Forecaster
from argosy.engine.ledger import Ledger
from argosy.engine.memory_plan import MemoryPlan
from argosy.plan import machine
from argosy.plan.speed import Range

PROMPT_TOKENS, WARM_TOKENS, ANSWER_TOKENS = 256, 32, 64
# Parts of a ledger -> the part of a decode step that predicts them.
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
        """Predicted over measured, less one."""
        return self.predicted.likely / self.measured - 1.0 if self.measured else 0.0

    @property
    def is_within(self) -> bool:
        return self.predicted.low <= self.measured <= self.predicted.high


@dataclass(frozen=True, slots=True)
class Verification:
    """Quantities, and milliseconds of a decode step by part: (predicted, measured)."""

    rows: tuple[Row, ...]
    parts_ms: Mapping[str, tuple[float, float]]

    @property
    def off(self) -> str:
        """The part that explains most of the difference in decode."""
        return max(self.parts_ms, key=lambda name: abs(self.parts_ms[name][0] - self.parts_ms[name][1]))

    def lines(self) -> list[str]:
        lines = [f"verified  {'':<26}{'predicted':>24}{'measured':>12}{'error':>9}"]
        for row in self.rows:
            low, likely, high = row.predicted
            spread = f"{likely:.3g} ({low:.3g} to {high:.3g})"
            within = "" if row.is_within else "  outside its range"
            lines.append(
                f"  {f'{row.name}, {row.unit}':<34}{spread:>24}{row.measured:>12.3g}{row.error:>+9.0%}{within}"
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


def verify(
    model: str, files: ModelFiles, forecaster: Forecaster, plan: MemoryPlan, options: dict[str, Any]
) -> Verification:
    """Run a prompt of random tokens and its answer.

    Args:
        plan: what was forecast; the engine gets its budget and its context.
        options: others of `Engine.open`.

    Raises:
        The errors of `Engine.open`.
    """
    random = np.random.default_rng(0)
    room = plan.context_tokens - WARM_TOKENS - ANSWER_TOKENS - 1
    num_tokens = max(1, min(PROMPT_TOKENS, room))
    prompt = random.integers(0, files.config.vocab_size, num_tokens).tolist()
    options = options | {"memory": plan.budget_bytes, "context": plan.context_tokens, "prefix_reuse": False}
    with Engine.open(model, **options) as engine:
        # The first prompt pays for memory that the machine has still to give.
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
        warm, began = engine.ledger, time.perf_counter()
        steps = 0
        while sequence.result is None:
            engine.step()
            steps += 1
        seconds, after = time.perf_counter() - began, engine.ledger
        peak = machine.peak_bytes()
        planned = engine.plan
    swept = prefilled.bytes_read - before.bytes_read
    return _compare(
        forecaster, planned, num_tokens=num_tokens, first_s=first_s, prefill_bytes=swept, steps=steps,
        seconds=seconds, warm=warm, after=after, peak=peak,
    )  # fmt: skip


def _compare(
    forecaster: Forecaster, plan: MemoryPlan, *, num_tokens: int, first_s: float, prefill_bytes: int, steps: int,
    seconds: float, warm: Ledger, after: Ledger, peak: int | None,
) -> Verification:  # fmt: skip
    context = num_tokens + WARM_TOKENS + steps // 2
    decode, prompt = forecaster.decode(plan, 1, context=context), forecaster.prompt(plan, num_tokens)
    lookups = after.lookups - warm.lookups
    hit_rate = (after.hits - warm.hits) / lookups if lookups else 1.0
    rows = [
        Row("decode", "tok/s", decode.tokens_per_s, steps / seconds),
        Row(f"first token of {num_tokens}", "s", prompt.seconds, first_s),
    ]
    if not plan.is_resident:
        read = (after.bytes_read - warm.bytes_read) / steps
        rows += [
            Row("hit rate", "share", decode.hit_rate, hit_rate),
            Row("drive, decode", "MB/token", decode.drive_bytes_per_token.times(1e-6), read / 1e6),
            Row("drive, prompt", "MB", Range(*[prompt.drive_bytes / 1e6] * 3), prefill_bytes / 1e6),
        ]
    if peak is not None:
        # Of what is planned, experts and buffers are touched only as far as they are used.
        rows.append(
            Row(
                "memory, peak",
                "MiB",
                Range(0.0, plan.total_bytes / 2**20, plan.budget_bytes / 2**20),
                peak / 2**20,
            )
        )
    predicted = forecaster.decode(plan, 1, context=context, hit_rate=hit_rate).parts
    spent = {name: after.parts[name] - warm.parts[name] for name in after.parts}
    parts: dict[str, tuple[float, float]] = {}
    for part, names in _PARTS.items():
        measured = spent.pop(part)
        parts[part.replace("_", " ")] = 1e3 * sum(predicted[name] for name in names), 1e3 * measured / steps
    parts["overhead"] = 1e3 * predicted["overhead"], 1e3 * sum(spent.values()) / steps
    return Verification(tuple(rows), parts)
