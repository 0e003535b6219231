"""The engine's state for the page, `argosy top` and Prometheus: numbers, and no content of requests.

Which experts ran can reveal a text. So the heat map covers at least 256 tokens and needs the scope `admin`, and
`/metrics` has no label for an expert. It has predictions beside what recent decode steps took, as
`argosy plan --verify` prints them.

Elsewhere: the numbers come from `engine/facts.py` and `engine/loop.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from argosy.engine.facts import WINDOW_TOKENS
from argosy.engine.ledger import DecodeSteps
from argosy.engine.loop import LoopFacts
from argosy.engine.verification import Verification
from argosy.observe.live import RecentCache
from argosy.serve.core import ModelFacts
from argosy.serve.fields import Closed


class ModelState(Closed):
    id: str
    family: str
    context_tokens: int
    num_layers: int
    num_experts: int
    experts_per_token: int


class MemoryLine(Closed):
    name: str
    bytes: int
    note: str


class MemoryState(Closed):
    budget_bytes: int
    peak_bytes: int | None
    lines: list[MemoryLine]


class SpeedState(Closed):
    decode_tok_per_s: float
    prefill_tok_per_s: float


class ExpertState(Closed):
    total: int
    slots: int
    resident: int
    hit_rate: float | None
    bytes_read: int
    drive_bytes_per_s: float


class RecentState(Closed):
    tokens: int
    hit_rate: float
    lru: float
    optimum: float


class TimeState(Closed):
    wall_s: float
    parts: dict[str, float]


class QueueState(Closed):
    running: int
    waiting: int
    max_sequences: int


class KvState(Closed):
    blocks_total: int
    blocks_used: int
    blocks_cached: int
    block_tokens: int


class Heat(Closed):
    tokens: int
    layers: list[list[int]]


class Privacy(Closed):
    logging: bool
    traces: bool


class EngineState(Closed):
    model: ModelState
    memory: MemoryState
    speed: SpeedState
    experts: ExpertState
    recent: RecentState | None
    time: TimeState
    queue: QueueState
    kv: KvState
    heat: Heat | None
    privacy: Privacy


def state_of(
    facts: LoopFacts,
    model: ModelFacts,
    *,
    block_tokens: int,
    max_sequences: int,
    with_heat: bool,
    recent: RecentCache | None = None,
) -> EngineState:
    """The state of the engine as JSON.

    Args:
        recent: the hit rate of the last minutes beside others; None: not known.
    """
    engine, totals = facts.engine, facts.engine.totals
    heat: Heat | None = None
    if with_heat and engine.expert_uses is not None and engine.expert_use_tokens >= WINDOW_TOKENS:
        heat = {"tokens": engine.expert_use_tokens, "layers": engine.expert_uses.tolist()}
    return {
        "model": {
            "id": model.id, "family": model.family, "context_tokens": model.context_tokens,
            "num_layers": model.num_layers, "num_experts": model.num_experts,
            "experts_per_token": model.experts_per_token,
        },
        "memory": {
            "budget_bytes": engine.budget_bytes, "peak_bytes": totals.peak_bytes,
            "lines": [{"name": name, "bytes": count, "note": note} for name, count, note in engine.memory],
        },
        "speed": {"decode_tok_per_s": facts.new_tok_per_s, "prefill_tok_per_s": facts.prompt_tok_per_s},
        "experts": {
            "total": engine.num_experts, "slots": engine.expert_slots, "resident": engine.num_resident,
            "hit_rate": totals.hit_rate, "bytes_read": totals.bytes_read, "drive_bytes_per_s": facts.bytes_read_per_s,
        },
        "recent": None if recent is None else {
            "tokens": recent.tokens, "hit_rate": recent.hit_rate, "lru": recent.lru, "optimum": recent.optimum,
        },
        "time": {"wall_s": sum(facts.recent_parts.values()), "parts": dict(facts.recent_parts)},
        "queue": {"running": engine.num_running, "waiting": engine.num_waiting, "max_sequences": max_sequences},
        "kv": {
            "blocks_total": engine.kv_blocks, "blocks_used": engine.kv_blocks_held,
            "blocks_cached": engine.kv_blocks_kept, "block_tokens": block_tokens,
        },
        "heat": heat,
        "privacy": {"logging": False, "traces": False},
    }  # fmt: skip


Compare = Callable[[DecodeSteps], Verification]


class Metrics:
    """Prometheus metrics in their own registry; labels are routes, statuses, and parts of the engine's time.

    Args:
        compare: puts predictions beside decode steps; None: nothing is predicted.
    """

    def __init__(self, snapshot: Any, compare: Compare | None = None) -> None:
        self.registry = CollectorRegistry()
        self._snapshot = snapshot
        self._compare = compare
        self._requests = Counter(
            "argosy_requests", "Answered requests", ["route", "status"], registry=self.registry
        )
        self._seconds = Histogram(
            "argosy_request_seconds", "Time from the first byte in to the last byte out", ["route"],
            buckets=(0.01, 0.1, 0.5, 1, 5, 15, 60, 300, 1800), registry=self.registry,
        )  # fmt: skip
        self.registry.register(self)

    def observe(self, route: str, status: int, seconds: float) -> None:
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def collect(self) -> Iterator[Metric]:
        facts: LoopFacts = self._snapshot()
        engine, totals, decode_rate = facts.engine, facts.engine.totals, facts.new_tok_per_s
        counter, gauge = CounterMetricFamily, GaugeMetricFamily
        for family, name, what, value in (
            (counter, "argosy_prompt_tokens", "Prompt tokens", totals.prompt_tokens),
            (counter, "argosy_new_tokens", "Generated tokens", totals.new_tokens),
            (counter, "argosy_expert_lookups", "Expert lookups", totals.lookups),
            (counter, "argosy_expert_hits", "Expert lookups that found the expert in memory", totals.hits),
            (counter, "argosy_read_bytes", "Bytes read from the drive", totals.bytes_read),
            (counter, "argosy_steps", "Engine steps", facts.num_steps),
            (gauge, "argosy_sequences_running", "Running sequences", engine.num_running),
            (gauge, "argosy_sequences_waiting", "Waiting sequences", engine.num_waiting),
            (gauge, "argosy_kv_blocks_held", "KV blocks of running sequences", engine.kv_blocks_held),
            (gauge, "argosy_kv_blocks_kept", "KV blocks in the prefix cache", engine.kv_blocks_kept),
            (gauge, "argosy_kv_blocks", "All KV blocks", engine.kv_blocks),
            (gauge, "argosy_experts", "Experts in all layers", engine.num_experts),
            (gauge, "argosy_experts_resident", "Experts in memory", engine.num_resident),
            (gauge, "argosy_peak_bytes", "Peak memory of the process", totals.peak_bytes),
            (gauge, "argosy_budget_bytes", "Memory budget", engine.budget_bytes),
            (gauge, "argosy_decode_tokens_per_second", "Recent generated tokens per second", decode_rate),
        ):
            metric = family(name, what)
            if value is not None:
                metric.add_metric([], value)
            yield metric
        seconds = counter(
            "argosy_seconds", "Seconds of the engine by part; `other` includes idle time", labels=["part"]
        )
        for part, spent in totals.parts.items():
            seconds.add_metric([part], spent)
        yield seconds
        if self._compare is not None:
            yield from self._comparison(self._compare, facts.recent_decode)

    @staticmethod
    def _comparison(compare: Compare, steps: DecodeSteps | None) -> Iterator[Metric]:
        """Predicted and measured, of steps of the last minute that had no prompt tokens."""
        quantities = GaugeMetricFamily(
            "argosy_expected", "Recent decode beside its prediction", labels=["quantity", "unit", "value"]
        )
        parts = GaugeMetricFamily(
            "argosy_decode_step_seconds", "Parts of a recent decode step, predicted at the measured hit rate",
            labels=["part", "value"],
        )  # fmt: skip
        if steps is not None:
            found = compare(steps)
            for row in found.rows:
                for value, number in (*row.predicted._asdict().items(), ("measured", row.measured)):
                    quantities.add_metric([row.name, row.unit, value], number)
            for part, pair in found.parts_ms.items():
                for value, milliseconds in zip(("predicted", "measured"), pair, strict=True):
                    parts.add_metric([part, value], milliseconds / 1e3)
        yield from (quantities, parts)
