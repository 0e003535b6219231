"""The engine's state for the page, `argosy top`, Prometheus and the log: only numbers, no content of requests.

The experts that ran can reveal a text. The heat map therefore covers at least 256 tokens and needs the scope
`admin`, and `/metrics` has no label for an expert. It reports predictions next to the times of recent decode steps,
as `argosy plan --verify` does.

Elsewhere: the numbers come from `engine/facts.py` and `engine/loop.py`.
"""

from __future__ import annotations

import asyncio
import logging
import platform
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from itertools import islice

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from argosy.engine.energy import co2_grams
from argosy.engine.facts import WINDOW_TOKENS, EngineFacts
from argosy.engine.ledger import Ledger
from argosy.engine.loop import LoopFacts
from argosy.engine.progress import RequestProgress, RequestWait, prompt_line, wait_line
from argosy.engine.sequence import WaitReason
from argosy.serve.admin.answer_metrics import AnswerMetrics
from argosy.serve.admin.cluster import Workers, WorkerState, worker_metrics
from argosy.serve.answer.facts import ModelFacts
from argosy.serve.answer.service import Service
from argosy.serve.http.closed import Closed
from argosy.serve.models.entry import Standing, State
from argosy.serve.models.models import Models

log = logging.getLogger("argosy.serve")

PROMPT_SAID_S = 10.0  # how often the log reports a prompt or a wait that takes longer
_MOST_WAITS_SAID = 8  # waits logged each time; the state lists more


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


class SharingState(Closed):
    """A model of the server.

    memory_bytes: its part of a budget that models share; 0 if the server has one model.
    unloads_in_s: seconds until it is unloaded if no request uses it; null: no time is set.
    """

    id: str
    state: State
    memory_bytes: int
    unloads_in_s: float | None
    expert_slots: int
    experts_resident: int
    experts: int
    running: int
    waiting: int
    decode_tok_per_s: float


class RunningState(Closed):
    """A running prompt, with its answers.

    id: of its request, as in `x-request-id` and the log.
    prompt_done: tokens of the prompt that have been computed or came from the prefix cache.
    answer_tokens: over all of its answers.
    tok_per_s: its own mean, over the prompt until the first token and over its answers after that; null if not
        known yet.
    seconds: since it first ran.
    seconds_left: estimated time to its first token; null if not known yet, or if the prompt is done.
    """

    id: str
    model: str
    prompt_tokens: int
    prompt_done: int
    answer_tokens: int
    tok_per_s: float | None
    seconds: float
    seconds_left: float | None


class WaitingState(Closed):
    """A request that has not run yet.

    why: "turn": the limit of running requests is reached; "memory": no room for its keys and values; "prompt":
        another request is computing the same prefix; "model": its model is being loaded; "room": other models have
        the memory for its own.
    ahead: earlier requests for the same model that are also waiting.
    seconds: how long it has waited.
    share_done: the fraction of its model that is loaded; null if unknown.
    """

    id: str
    model: str
    why: WaitReason
    ahead: int
    seconds: float
    share_done: float | None


class EngineState(Closed):
    """The state of a server. If it has several models, `model` is the one used last, with its numbers.

    running: the running prompts of all models, in order of arrival.
    waiting: requests that have not run yet, likewise; the first hundred of each model. `queue` counts all.
    workers: machines that run experts; empty if the server runs alone.
    """

    models: list[SharingState]
    model: ModelState
    memory: MemoryState
    speed: SpeedState
    experts: ExpertState
    recent: RecentState | None
    time: TimeState
    queue: QueueState
    running: list[RunningState]
    waiting: list[WaitingState]
    kv: KvState
    heat: Heat | None
    workers: list[WorkerState]
    privacy: Privacy


# A library may be empty.
_NO_MODEL = ModelFacts(
    id="", family="", context_tokens=0, num_layers=0, num_experts=0, experts_per_token=0, vocab_size=0
)


def memory_of(models: Models) -> MemoryState:
    """The memory budget of the server and its uses."""
    shown = models.shown()
    engine = _nothing().engine if shown is None else shown.loop.snapshot().engine
    memory = engine.memory
    if not models.has_one:
        memory = tuple(_memory_lines(models.process_bytes, models.facts()))
    return {
        "budget_bytes": models.budget_bytes, "peak_bytes": engine.totals.peak_bytes,
        "lines": [{"name": name, "bytes": count, "note": note} for name, count, note in memory],
    }  # fmt: skip


def state_of(
    models: Models,
    *,
    block_tokens: int,
    max_sequences: int,
    with_heat: bool,
    keeps_contents: bool = False,
    workers: Workers | None = None,
) -> EngineState:
    """The state of the server as JSON.

    Args:
        keeps_contents: whether the audit keeps prompts and answers.
    """
    shown = models.shown()
    if shown is None:
        known = models.facts()
        model, facts, recent = known[0].facts if known else _NO_MODEL, _nothing(), None
    else:
        model, facts = shown.model, shown.loop.snapshot()
        recent = None if shown.recent_cache is None else shown.recent_cache()
    engine, totals = facts.engine, facts.engine.totals
    heat: Heat | None = None
    if with_heat and engine.expert_uses is not None and engine.expert_use_tokens >= WINDOW_TOKENS:
        heat = {"tokens": engine.expert_use_tokens, "layers": engine.expert_uses.tolist()}
    return {
        "models": [_sharing(one) for one in models.facts()],
        "model": {
            "id": model.id, "family": model.family, "context_tokens": model.context_tokens,
            "num_layers": model.num_layers, "num_experts": model.num_experts,
            "experts_per_token": model.experts_per_token,
        },
        "memory": memory_of(models),
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
        "running": [_running(one, name) for name, one in _requests(models)],
        "waiting": [_waiting(one, name) for name, one in _waits(models)],
        "kv": {
            "blocks_total": engine.kv_blocks, "blocks_used": engine.kv_blocks_held,
            "blocks_cached": engine.kv_blocks_kept, "block_tokens": block_tokens,
        },
        "heat": heat,
        "workers": [] if workers is None else list(workers.status()),
        "privacy": {"logging": keeps_contents, "traces": False},
    }  # fmt: skip


def _requests(models: Models) -> Iterator[tuple[str, RequestProgress]]:
    """The running requests, each with the id of its model."""
    for service in models.services():
        for one in service.loop.snapshot().requests:
            yield service.model.id, one


def _waits(models: Models) -> Iterator[tuple[str, RequestWait]]:
    """The requests that have not run yet, each with the id of its model."""
    yield from models.waits()
    for service in models.services():
        for one in service.loop.snapshot().waiting:
            yield service.model.id, one


def _waiting(one: RequestWait, model: str) -> WaitingState:
    return {
        "id": one.name, "model": model, "why": one.why, "ahead": one.ahead, "seconds": one.seconds,
        "share_done": one.share_done,
    }  # fmt: skip


def _running(one: RequestProgress, model: str) -> RunningState:
    return {
        "id": one.name, "model": model, "prompt_tokens": one.prompt_tokens, "prompt_done": one.prompt_done,
        "answer_tokens": one.answer_tokens, "tok_per_s": one.tok_per_s, "seconds": one.seconds,
        "seconds_left": one.seconds_left,
    }  # fmt: skip


async def watch_prompts(models: Models) -> None:
    """Log the progress of long prompts and what requests wait for, until cancelled."""
    while True:
        await asyncio.sleep(PROMPT_SAID_S)
        log_prompts(models)


def log_prompts(models: Models) -> None:
    """Log the progress of prompts and waits that have taken PROMPT_SAID_S or more."""
    for model, one in _requests(models):
        if one.is_reading and one.seconds >= PROMPT_SAID_S:
            line = prompt_line(one.prompt_done, one.prompt_tokens, one.seconds_left)
            facts = {
                "event": "prompt_progress", "request_id": one.name, "model": model,
                "prompt_tokens": one.prompt_tokens, "prompt_done": one.prompt_done,
                "seconds_left": None if one.seconds_left is None else round(one.seconds_left),
            }  # fmt: skip
            log.info("%s %s", one.name, line, extra={"facts": facts})
    long_waits = ((model, wait) for model, wait in _waits(models) if wait.seconds >= PROMPT_SAID_S)
    for model, wait in islice(long_waits, _MOST_WAITS_SAID):
        line = wait_line(wait.why, wait.ahead, wait.share_done)
        facts = {
            "event": "request_waits", "request_id": wait.name, "model": model, "why": wait.why, "ahead": wait.ahead,
        }  # fmt: skip
        log.info("%s %s", wait.name, line, extra={"facts": facts})


def _sharing(one: Standing) -> SharingState:
    facts = _nothing() if one.service is None else one.service.loop.snapshot()
    engine = facts.engine
    return {
        "id": one.facts.id, "state": one.state, "memory_bytes": one.memory_bytes, "unloads_in_s": one.unloads_in_s,
        "expert_slots": engine.expert_slots, "experts_resident": engine.num_resident, "experts": engine.num_experts,
        "running": engine.num_running, "waiting": engine.num_waiting, "decode_tok_per_s": facts.new_tok_per_s,
    }  # fmt: skip


def _memory_lines(process_bytes: int, standing: Sequence[Standing]) -> Iterator[tuple[str, int, str]]:
    yield "process", process_bytes, "interpreter, tokenizers, requests"
    for one in standing:
        if one.memory_bytes:
            yield one.facts.id, one.memory_bytes - one.expert_bytes, "without its share of experts"
            yield f"experts of {one.facts.id}", one.expert_bytes, one.state


def _nothing() -> LoopFacts:
    """The facts of a model that is not in memory."""
    engine = EngineFacts(
        num_running=0, num_waiting=0, num_preempted=0, kv_blocks=0, kv_blocks_held=0, kv_blocks_kept=0,
        kv_blocks_free=0, states_held=0, states_free=0, snapshots=0, num_experts=0, expert_slots=0, num_resident=0,
        file_bytes=0, tokens_run=0, totals=Ledger(), memory=(), budget_bytes=0, expert_uses=None, expert_use_tokens=0,
        operations=None,
    )  # fmt: skip
    return LoopFacts(
        engine=engine, num_steps=0, is_stopping=False, has_failed=False, new_tok_per_s=0.0, prompt_tok_per_s=0.0,
        bytes_read_per_s=0.0, silent_s=0.0, recent_parts=Ledger().parts,
    )  # fmt: skip


class RequestMetrics:
    """The number of answered requests and the time they took."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "argosy_requests", "Answered requests", ["route", "status"], registry=registry
        )
        self._seconds = Histogram(
            "argosy_request_seconds", "Time from the first byte in to the last byte out", ["route"],
            buckets=(0.01, 0.1, 0.5, 1, 5, 15, 60, 300, 1800), registry=registry,
        )  # fmt: skip

    def observe(self, route: str, status: int, seconds: float) -> None:
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)


_Row = tuple[type[CounterMetricFamily | GaugeMetricFamily], str, str, float | None]


class Metrics:
    """Prometheus metrics in their own registry; labels are routes, statuses, and parts of the engine's time.

    If the server has several models, an engine's metrics carry the label `model` while it is in memory. Energy
    appears only where it is measured.

    Args:
        co2_grams_per_kwh: emissions of the electricity used; None: no metric.
    """

    def __init__(
        self, models: Models, workers: Workers | None = None, *, co2_grams_per_kwh: float | None = None
    ) -> None:
        self._co2_grams_per_kwh = co2_grams_per_kwh
        self.registry = CollectorRegistry()
        self._models, self._workers = models, workers
        self.observe = RequestMetrics(self.registry).observe
        self.answers = AnswerMetrics(self.registry)
        ProcessCollector(registry=self.registry)
        self.registry.register(self)

    def collect(self) -> Iterator[Metric]:
        of_model = [] if self._models.has_one else ["model"]
        known = [
            ([one.model.id] if of_model else [], one, one.loop.snapshot()) for one in self._models.services()
        ]
        counter, gauge = CounterMetricFamily, GaugeMetricFamily
        found: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
        for labels, _, facts in known:
            for family, name, what, value in self._of_engine(facts):
                metric = found.setdefault(name, family(name, what, labels=of_model))
                if value is not None:
                    metric.add_metric(labels, value)
        yield from found.values()
        yield from self._energy(of_model, known)
        if not self._models.has_one:
            yield gauge(
                "argosy_models_bytes", "Memory of the process and its models", self._models.held_bytes
            )
        kept_bytes = self._models.kept.nbytes
        yield gauge("argosy_kept_responses_bytes", "Memory of stored responses and their items", kept_bytes)
        seconds = counter(
            "argosy_seconds",
            "Seconds of the engine by part; `other` includes idle time",
            labels=[*of_model, "part"],
        )
        for labels, _, facts in known:
            for part, spent in facts.engine.totals.parts.items():
                seconds.add_metric([*labels, part], spent)
        yield seconds
        build = gauge("argosy_build_info", "Always 1; the version is a label", labels=["version", "python"])
        build.add_metric([version("argosy"), platform.python_version()], 1)
        yield build
        if self._workers is not None:
            yield from worker_metrics(self._workers)
        if any(service.compare is not None for _, service, _ in known):
            yield from self._comparison(of_model, known)

    def _of_engine(self, facts: LoopFacts) -> Sequence[_Row]:
        """The metrics of one engine."""
        engine, totals = facts.engine, facts.engine.totals
        counter, gauge = CounterMetricFamily, GaugeMetricFamily
        on_tiles, products = engine.operations or (None, None)
        budget_bytes = self._models.budget_bytes
        return (
            (counter, "argosy_prompt_tokens", "Prompt tokens", totals.prompt_tokens),
            (counter, "argosy_new_tokens", "Generated tokens", totals.new_tokens),
            (counter, "argosy_proposed_tokens", "Tokens proposed ahead of the model", totals.proposed_tokens),
            (counter, "argosy_confirmed_tokens", "Proposed tokens that the model chose", totals.confirmed_tokens),
            (gauge, "argosy_speculation_won_seconds", "Seconds that proposals saved, estimated", totals.won_s),
            (counter, "argosy_expert_lookups", "Expert lookups", totals.lookups),
            (counter, "argosy_expert_hits", "Expert lookups that found the expert in memory", totals.hits),
            (counter, "argosy_read_bytes", "Bytes read from the drive", totals.bytes_read),
            (counter, "argosy_steps", "Engine steps", facts.num_steps),
            (
                counter, "argosy_product_operations",
                "Operations of products that can run on the tiles of AMX, where there is AMX", products,
            ),
            (counter, "argosy_amx_operations", "Those of them on the tiles of AMX", on_tiles),
            (gauge, "argosy_sequences_running", "Running sequences", engine.num_running),
            (gauge, "argosy_sequences_waiting", "Waiting sequences", engine.num_waiting),
            (gauge, "argosy_kv_blocks_held", "KV blocks of running sequences", engine.kv_blocks_held),
            (gauge, "argosy_kv_blocks_kept", "KV blocks in the prefix cache", engine.kv_blocks_kept),
            (gauge, "argosy_kv_blocks", "All KV blocks", engine.kv_blocks),
            (gauge, "argosy_experts", "Experts in all layers", engine.num_experts),
            (gauge, "argosy_expert_slots", "Experts that have room in memory", engine.expert_slots),
            (gauge, "argosy_experts_resident", "Experts in memory", engine.num_resident),
            (gauge, "argosy_peak_bytes", "Peak memory of the process", totals.peak_bytes),
            (gauge, "argosy_budget_bytes", "Memory budget", budget_bytes),
            (
                gauge, "argosy_decode_tokens_per_second", "Recent generated tokens per second",
                facts.new_tok_per_s,
            ),
        )  # fmt: skip

    def _energy(
        self, of_model: list[str], known: Sequence[tuple[list[str], Service, LoopFacts]]
    ) -> Iterator[Metric]:
        measured = [
            (labels, facts.engine.totals)
            for labels, _, facts in known
            if facts.engine.totals.energy_j is not None
        ]
        if not measured:
            return
        joules = CounterMetricFamily(
            "argosy_energy_joules",
            "Energy of processors and their memory during steps, measured",
            labels=of_model,
        )
        drive = CounterMetricFamily(
            "argosy_drive_energy_joules", "Energy of the drive for the bytes read, estimated",
            labels=[*of_model, "bound"],
        )  # fmt: skip
        co2 = CounterMetricFamily(
            "argosy_co2_grams", "CO2 of both, at the configured factor", labels=[*of_model, "bound"]
        )
        for labels, totals in measured:
            assert totals.energy_j is not None
            joules.add_metric(labels, totals.energy_j)
            for bound, of_drive, total in zip(
                ("low", "high"), totals.drive_energy_j or (), totals.total_energy_j or (), strict=True
            ):
                drive.add_metric([*labels, bound], of_drive)
                if self._co2_grams_per_kwh is not None:
                    co2.add_metric([*labels, bound], co2_grams((total, total), self._co2_grams_per_kwh)[0])
        yield from (joules, drive)
        if self._co2_grams_per_kwh is not None:
            yield co2

    @staticmethod
    def _comparison(
        of_model: list[str], known: Sequence[tuple[list[str], Service, LoopFacts]]
    ) -> Iterator[Metric]:
        """Predicted and measured times of the last minute's steps without prompt tokens."""
        quantities = GaugeMetricFamily(
            "argosy_expected", "Recent decode and its prediction",
            labels=[*of_model, "quantity", "unit", "value"],
        )  # fmt: skip
        parts = GaugeMetricFamily(
            "argosy_decode_step_seconds", "Parts of a recent decode step, predicted at the measured hit rate",
            labels=[*of_model, "part", "value"],
        )  # fmt: skip
        for labels, service, facts in known:
            if service.compare is None or facts.recent_decode is None:
                continue
            found = service.compare(facts.recent_decode)
            for row in found.rows:
                for value, number in (*row.predicted._asdict().items(), ("measured", row.measured)):
                    quantities.add_metric([*labels, row.name, row.unit, value], number)
            for part, pair in found.parts_ms.items():
                for value, milliseconds in zip(("predicted", "measured"), pair, strict=True):
                    parts.add_metric([*labels, part, value], milliseconds / 1e3)
        yield from (quantities, parts)
