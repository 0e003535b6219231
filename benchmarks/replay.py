"""Which expert should be evicted? Replays recorded routing through the expert cache and its rivals.

    python benchmarks/replay.py [TRACES] [--residency 5,12,25,50] [--short]
    python benchmarks/replay.py --synthetic             # routing that no policy was tuned on
    python benchmarks/replay.py --look-ahead            # how much would guessing the next layer's experts save?

A trace is a CSV of BigMoeOnEdge (`turn,phase,step,layer,slot,expert,...`; phase 0 is the prompt, 1 the answer): a file,
or a directory of `*.route.csv`, by default `routing` in `ARGOSY_BENCH_DATA`. The prompt runs as one chunk, as in the
engine, and then the answer token by token; the hit rate is that of the answer, including its first use of every expert.

    argosy      `experts.policy.CachePolicy`, through the engine's leases
    lru         one least-recently-used order over all layers
    per layer   the same, with an equal share of the slots for each layer
    optimum     evicts the expert used farthest in the future (Belady 1966): the best possible

Recorded answers are short, so these rates flatter all policies alike: compare columns with each other.
"""

from __future__ import annotations

import argparse
import csv
import heapq
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from random import Random
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1]))

from argosy.checkpoint.files import ExpertMatrix, ExpertRecord
from argosy.checkpoint.landing import Piece
from argosy.experts.cache import ExpertCache
from argosy.experts.files import Key
from argosy.experts.policy import CachePolicy
from common import DATA, Report
from tests.experts.fake_store import FakeFiles

RECORDED = DATA / "routing"
Asked = tuple[int, list[int], bool]  # layer, experts, is_scan


@dataclass(frozen=True, slots=True)
class Trace:
    """A name, and the experts of each step: prompt [layer], answer [token][layer]."""

    name: str
    num_experts: int
    experts_per_token: int
    prompt: list[list[int]]
    answer: list[list[list[int]]]

    @property
    def num_layers(self) -> int:
        return len(self.prompt)

    def asked(self) -> list[Asked]:
        """Every lease of the prompt and the answer, in order."""
        prompt: list[Asked] = [(layer, experts, True) for layer, experts in enumerate(self.prompt)]
        return prompt + [(layer, experts, False) for t in self.answer for layer, experts in enumerate(t)]


def read_trace(path: Path) -> Trace:
    comments: dict[str, str] = {}
    steps: dict[tuple[int, int], dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    with path.open() as file:
        lines = []
        for line in file:
            if line.startswith("#"):
                comments |= dict(word.split("=", 1) for word in line.split() if "=" in word)
            else:
                lines.append(line)
    for row in csv.DictReader(lines):
        steps[int(row["phase"]), int(row["step"])][int(row["layer"])].append(int(row["expert"]))
    num_layers = int(comments["n_layer"])
    prompt: list[set[int]] = [set() for _ in range(num_layers)]
    answer: list[Any] = []
    for (phase, _), layers in sorted(steps.items()):
        if phase == 0:
            for layer, experts in layers.items():
                prompt[layer] |= set(experts)
        else:
            answer.append([layers[layer] for layer in range(num_layers)])
    return Trace(
        path.name.split(".")[0],
        int(comments["n_expert"]),
        int(comments["n_expert_used"]),
        [sorted(experts) for experts in prompt],
        answer,
    )


def synthetic_traces() -> list[Trace]:
    """Routing that no policy was tuned on; each name says how it is made."""
    return [
        synthetic("as fitted"),
        synthetic("one subject", document=0.6, popular=0.1, drifting=0.2),
        synthetic("popular experts", document=0.2, popular=0.5, drifting=0.1),
        synthetic("drifting", document=0.2, popular=0.05, drifting=0.6, memory=0.9),
        synthetic("six subjects", document=0.5, num_documents=6),
        synthetic("uniform", document=0.0, popular=0.0, drifting=0.0),
        synthetic("8 of 128", num_layers=12, num_experts=128, experts_per_token=8),
        synthetic("four sequences", num_sequences=4, num_tokens=80),
    ]


def synthetic(
    name: str,
    *,
    num_layers: int = 24,
    num_experts: int = 64,
    experts_per_token: int = 6,
    num_tokens: int = 160,
    popular: float = 0.15,
    document: float = 0.4,
    drifting: float = 0.3,
    memory: float = 0.5,
    num_documents: int = 1,
    num_sequences: int = 1,
) -> Trace:
    """Top-k of Gaussian scores: parts of their variance stay for good, for a document, and from token to token.

    `drifting` is the part that moves slowly (autoregressive, by `memory`); the rest is new for every token. The first
    layers have smaller lasting parts than the last. With several sequences a step needs the union of their experts.
    """
    random = np.random.default_rng(sum(name.encode()))
    shape = num_layers, num_experts
    depth = np.linspace(-0.15, 0.15, num_layers)[:, None]
    tilt = 1 + depth / max(popular + document, 0.15)
    for_good, for_document = np.sqrt(popular * tilt), np.sqrt(document * tilt)
    fresh = np.sqrt(np.maximum(0, 1 - (popular + document) * tilt - drifting))
    always = random.normal(size=shape)
    drifts = [random.normal(size=shape) for _ in range(num_sequences)]

    def experts(which: int, subject: NDArray[np.float64]) -> NDArray[np.int64]:
        drifts[which] = memory * drifts[which] + np.sqrt(1 - memory**2) * random.normal(size=shape)
        scores = for_good * always + for_document * subject + np.sqrt(drifting) * drifts[which]
        scores = scores + fresh * random.normal(size=shape)
        return np.argsort(-scores, axis=1)[:, :experts_per_token]

    def step(subjects: list[NDArray[np.float64]]) -> list[list[int]]:
        chosen = np.concatenate([experts(i, subject) for i, subject in enumerate(subjects)], axis=1)
        return [list(dict.fromkeys(row)) for row in chosen.tolist()]

    prompt: list[set[int]] = [set() for _ in range(num_layers)]
    answer: list[Any] = []
    for _ in range(num_documents):
        subjects = [random.normal(size=shape) for _ in range(num_sequences)]
        if not answer:
            for _ in range(60):
                for layer, found in enumerate(step(subjects)):
                    prompt[layer] |= set(found)
        answer += [step(subjects) for _ in range(num_tokens // num_documents)]
    return Trace(name, num_experts, experts_per_token, [sorted(layer) for layer in prompt], answer)


# ── policies ────────────────────────────────────────────────────────────────────────────────────────────────────────


class Policy(Protocol):
    """The interface of a replay: request experts, get the number of hits."""

    def ask(self, layer: int, experts: Sequence[int], *, is_scan: bool) -> int: ...


class _InstantStore:
    """Stands in for the store: reads have landed when they are waited for, in the order of issue."""

    def __init__(self) -> None:
        self._ticket = 0

    def open(self, path: str) -> int:
        return 0

    def info(self, file_id: int) -> tuple[str, int, int, bool, str]:
        return "", 4, 1, True, ""

    def fetch_many(self, arena: Any, records: Sequence[Any], urgency: str) -> list[int]:
        self._ticket += len(records)
        return list(range(self._ticket - len(records), self._ticket))

    def wait_any(self, tickets: list[int]) -> list[tuple[int, None, None]]:
        return [(tickets[0], None, None)]


def _files(store: Any, trace: Trace) -> FakeFiles:
    """Files of experts that are one number each; none is run."""
    matrix = ExpertMatrix(0, 0, "f32", 1, 1)
    record = ExpertRecord((Piece(Path("none"), 0, 4),), matrix, matrix, matrix)
    keys = product(range(trace.num_layers), range(trace.num_experts))
    return FakeFiles(store, dict.fromkeys(keys, record))


class Argosy:
    """The engine's own expert cache, with reads that take no time."""

    def __init__(self, num_slots: int, trace: Trace) -> None:
        self._cache = ExpertCache(
            _files(_InstantStore(), trace),
            num_slots=num_slots,
            experts_per_token=trace.experts_per_token,
        )

    def ask(self, layer: int, experts: Sequence[int], *, is_scan: bool) -> int:
        before = self._cache.stats.hits
        with self._cache.lease(layer, experts, experts if is_scan else ()) as lease:
            for _ in lease:
                pass
        return self._cache.stats.hits - before

    def resident(self) -> set[Key]:
        return self._cache.slots.resident()


class Lru:
    """Evicts the least recently used expert over all layers."""

    def __init__(self, num_slots: int, trace: Trace) -> None:
        self._num_slots = num_slots
        self._order: OrderedDict[Key, None] = OrderedDict()

    def ask(self, layer: int, experts: Sequence[int], *, is_scan: bool) -> int:
        keys = [(layer, expert) for expert in experts]
        hits = sum(key in self._order for key in keys)
        for key in keys:
            self._order.pop(key, None)
            self._order[key] = None
        while len(self._order) > self._num_slots:
            self._order.popitem(last=False)
        return hits

    def resident(self) -> set[Key]:
        return set(self._order)


class PerLayerLru:
    def __init__(self, num_slots: int, trace: Trace) -> None:
        share, rest = divmod(num_slots, trace.num_layers)
        self._layers = [Lru(share + (layer < rest), trace) for layer in range(trace.num_layers)]

    def ask(self, layer: int, experts: Sequence[int], *, is_scan: bool) -> int:
        return self._layers[layer].ask(layer, experts, is_scan=is_scan)

    def resident(self) -> set[Key]:
        return set().union(*(layer.resident() for layer in self._layers))


class Optimum:
    """Knows the future: replays exactly the requests it was created with."""

    def __init__(self, num_slots: int, trace: Trace) -> None:
        self._num_slots = num_slots
        never = 1 << 60
        following: dict[Key, int] = {}
        self._next: list[list[int]] = []  # for each request, when each of its experts is next requested
        for number, (layer, experts, _) in reversed(list(enumerate(trace.asked()))):
            keys = [(layer, expert) for expert in experts]
            self._next.append([following.get(key, never) for key in keys])
            following |= dict.fromkeys(keys, number)
        self._next.reverse()
        self._at = 0
        self._resident: dict[Key, int] = {}
        self._farthest: list[tuple[int, Key]] = []

    def ask(self, layer: int, experts: Sequence[int], *, is_scan: bool) -> int:
        keys = [(layer, expert) for expert in experts]
        hits = sum(key in self._resident for key in keys)
        for key, following in zip(keys, self._next[self._at], strict=True):
            self._resident[key] = following
            heapq.heappush(self._farthest, (-following, key))
        self._at += 1
        # Experts of the current request must be present, if they fit at all.
        kept = set(keys) if len(keys) <= self._num_slots else set()
        aside = []
        while len(self._resident) > self._num_slots:
            entry = heapq.heappop(self._farthest)
            if self._resident.get(entry[1]) != -entry[0]:
                continue  # it was used or evicted since then
            if entry[1] in kept:
                aside.append(entry)
            else:
                del self._resident[entry[1]]
        for entry in aside:
            heapq.heappush(self._farthest, entry)
        return hits


def look_ahead(
    trace: Trace, num_slots: int, *, recall: float | None, read_ms: float, compute_ms: float
) -> tuple[float, float]:
    """Decode with one drive and one processor, guessing each next layer's experts; `recall` None: no guesses.

    A layer waits for its own reads, one after another on the drive. While it computes, and only if the drive is idle by
    then, the missing experts of a guess are read: `experts_per_token` of them, each right with probability
    `recall` and any other expert otherwise. A guessed expert is inserted where a sweep's would be, so it displaces
    little.

    Returns:
        milliseconds and reads per token, without the first 16.
    """
    random = Random(0)
    policy = CachePolicy(
        num_slots=num_slots, layers=range(trace.num_layers), experts_per_token=trace.experts_per_token
    )
    now = drive_free = 0.0
    num_reads = 0
    landing: dict[Key, float] = {}

    def lease(layer: int, experts: Sequence[int], *, is_scan: bool) -> None:
        nonlocal now, drive_free, num_reads
        if not is_scan:
            policy.begin(layer)
        held, missing = policy.find(layer, experts)
        policy.use(layer, held, is_scan=is_scan)
        ready = max([now, *(landing.pop((layer, expert), 0.0) for expert in held)])
        for expert in missing:
            while policy.admit((layer, expert), is_scan=is_scan) is None:
                policy.unpin(layer, held)
                held = []
            held.append(expert)
            if not is_scan:
                ready = drive_free = max(drive_free, now) + read_ms
                num_reads += 1
        policy.unpin(layer, held)
        now = ready

    def guess(layer: int, experts: Sequence[int]) -> None:
        nonlocal drive_free, num_reads
        others = [expert for expert in range(trace.num_experts) if expert not in experts]
        for expert in experts:
            key = layer, expert if random.random() < (recall or 0.0) else random.choice(others)
            if drive_free > now + compute_ms or policy.slot(key) is not None:
                continue
            if policy.admit(key, is_scan=True) is not None:
                drive_free = landing[key] = max(drive_free, now) + read_ms
                num_reads += 1
                policy.unpin(layer, [key[1]])

    for layer, experts in enumerate(trace.prompt):
        lease(layer, experts, is_scan=True)
    asked = [(layer, experts) for token in trace.answer for layer, experts in enumerate(token)]
    skipped = 16 * trace.num_layers
    for number, (layer, experts) in enumerate(asked):
        if number == skipped:
            start = now, num_reads
        lease(layer, experts, is_scan=False)
        if recall is not None and number + 1 < len(asked):
            guess(*asked[number + 1])
        now += compute_ms
    tokens = len(trace.answer) - 16
    return (now - start[0]) / tokens, (num_reads - start[1]) / tokens


def print_look_ahead(trace: Trace) -> None:
    print(
        f"\n{trace.name}: guessing the next layer's experts, change of time (of reads) by share of right guesses"
    )
    recalls = (0.5, 0.65, 0.8, 0.9, 1.0)
    print(f"{'residency':>10}  {'one read':>8}" + "".join(f"{recall:>16}" for recall in recalls))
    for percent in (12, 25, 50):
        num_slots = trace.num_layers * trace.num_experts * percent // 100
        for read_ms in (0.9, 0.3):  # 2.65 MB at 3 and at 9 GB/s; a layer's arithmetic takes 0.36 ms
            times = {"read_ms": read_ms, "compute_ms": 0.36}
            time, reads = look_ahead(trace, num_slots, recall=None, **times)
            row = ""
            for recall in recalls:
                other = look_ahead(trace, num_slots, recall=recall, **times)
                row += f"{other[0] / time - 1:>+8.0%} ({other[1] / reads - 1:>+5.0%})"
            print(f"{percent:>8} %  {read_ms:>5} ms {row}")


POLICIES = {"argosy": Argosy, "lru": Lru, "per layer": PerLayerLru, "optimum": Optimum}


def hit_rate(policy: Policy, trace: Trace) -> float:
    hits = lookups = 0
    for layer, experts, is_scan in trace.asked():
        found = policy.ask(layer, experts, is_scan=is_scan)
        if not is_scan:
            hits += found
            lookups += len(experts)
    return hits / lookups


def survived_sweep(
    make: type[Argosy | Lru | PerLayerLru], num_slots: int, trace: Trace
) -> tuple[float, float]:
    """Warm up on half of the answer, sweep all experts as a 1000-token prompt does, then decode the rest.

    Returns:
        the share of the resident experts that survived the sweep, and the hit rate of the next 8 tokens.
    """
    policy = make(num_slots, trace)
    half = len(trace.answer) // 2
    for token in trace.answer[:half]:
        for layer, experts in enumerate(token):
            policy.ask(layer, experts, is_scan=False)
    before = policy.resident()
    for layer in range(trace.num_layers):
        policy.ask(layer, range(trace.num_experts), is_scan=True)
    left = len(before & policy.resident()) / len(before)
    hits = lookups = 0
    for token in trace.answer[half : half + 8]:
        for layer, experts in enumerate(token):
            hits += policy.ask(layer, experts, is_scan=False)
            lookups += len(experts)
    return left, hits / lookups


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("traces", type=Path, nargs="?", default=RECORDED)
    parser.add_argument("--residency", default="3,5,6,9,12,19,25,37,50,75", help="percent of all experts")
    parser.add_argument("--short", action="store_true", help="three residencies")
    parser.add_argument("--synthetic", action="store_true", help="generated routing instead of recorded")
    parser.add_argument(
        "--look-ahead", action="store_true", help="what guessing the next layer's experts saves"
    )
    options = parser.parse_args()
    percents = [int(p) for p in ("6,12,25" if options.short else options.residency).split(",")]
    traces = synthetic_traces() if options.synthetic else None
    paths = (
        []
        if traces
        else sorted(options.traces.glob("*.route.csv"))
        if options.traces.is_dir()
        else [options.traces]
    )
    if traces is None and (not paths or not paths[0].exists()):
        print(f"skipped: no recorded routing at {options.traces}", file=sys.stderr)
        return 0
    traces = traces or [read_trace(path) for path in paths]
    report = Report("replay", state="no reads and no arithmetic: only which expert is resident")
    report.correct(check(traces))
    report.opening()
    for trace in traces:
        if options.look_ahead:
            print_look_ahead(trace)
            continue
        print(
            f"\n{trace.name}: {trace.num_layers} layers, {trace.experts_per_token} of {trace.num_experts} experts, "
            f"prompt and {len(trace.answer)} tokens\nhit rate of the answer\n"
            + f"{'residency':>10}"
            + "".join(f"{name:>11}" for name in POLICIES)
        )
        for percent in percents:
            num_slots = trace.num_layers * trace.num_experts * percent // 100
            rates = {name: hit_rate(make(num_slots, trace), trace) for name, make in POLICIES.items()}  # type: ignore[arg-type]
            print(f"{percent:>8} % " + "".join(f"{rate:>11.3f}" for rate in rates.values()))
            for name, rate in rates.items():
                report.record(f"{trace.name} {percent} % {name}", "hit rate", [rate], [])
        swept = {name: make for name, make in POLICIES.items() if make is not Optimum}
        print("after a sweep over all experts: share of the warm cache left, hit rate of the next 8 tokens")
        print(f"{'residency':>10}" + "".join(f"{name:>16}" for name in swept))
        for percent in [p for p in percents if p in (6, 12, 25, 50)]:
            num_slots = trace.num_layers * trace.num_experts * percent // 100
            pairs = {name: survived_sweep(make, num_slots, trace) for name, make in swept.items()}  # type: ignore[arg-type]
            print(f"{percent:>8} % " + "".join(f"{left:>9.2f} {rate:>6.2f}" for left, rate in pairs.values()))
            for name, (left, rate) in pairs.items():
                report.record(
                    f"{trace.name} {percent} % {name} left by a sweep", "share", [left], [], rate=rate
                )
    return 0


def check(traces: Sequence[Trace]) -> str:
    """With a slot for every expert, each policy misses exactly the first use of each expert."""
    for trace in traces:
        seen: set[Key] = set()
        first_uses = lookups = 0
        for layer, experts, is_scan in trace.asked():
            keys = {(layer, expert) for expert in experts}
            if not is_scan:
                first_uses += len(keys - seen)
                lookups += len(experts)
            seen |= keys
        for name, make in POLICIES.items():
            rate = hit_rate(make(trace.num_layers * trace.num_experts, trace), trace)  # type: ignore[arg-type]
            if abs(rate - (1 - first_uses / lookups)) > 1e-12:
                raise SystemExit(f"{trace.name}: {name} hits {rate} with room for all")
    return f"{len(traces)} traces: with room for all, every policy misses exactly the first uses"


if __name__ == "__main__":
    sys.exit(main())
