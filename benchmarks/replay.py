"""Which expert should leave? Replays recorded routing through the expert cache and its rivals.

    python benchmarks/replay.py ../shared/data/routing [--residency 5,12,25,50] [--short]

A trace is the CSV of BigMoeOnEdge (`turn,phase,step,layer,slot,expert,...`; phase 0 is the prompt, 1 the answer): a
file, or a directory of `*.route.csv`. The prompt runs as one chunk, as the engine runs it, and then the answer token
by token; the hit rate is that of the answer, its first use of every expert included.

    argosy      `experts.policy.CachePolicy`, through the leases of the engine
    lru         one least-recently-used order over all layers
    per layer   the same, with an equal share of the slots for each layer
    optimum     evicts what is used farthest in the future (Belady 1966): the best that can be done

Recorded answers are short, so these rates flatter every policy alike: compare columns with each other.
"""

from __future__ import annotations

import argparse
import csv
import heapq
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from argosy.experts.cache import CachedSource
from argosy.experts.source import Key
from common import REPOSITORY, Report

DEFAULT_TRACES = REPOSITORY.parent / "shared" / "data" / "routing"
Asked = tuple[int, list[int], bool]  # layer, experts, is_scan


@dataclass(frozen=True, slots=True)
class Trace:
    """name, and the experts of each step: prompt [layer], answer [token][layer]."""

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
    answer = []
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


# ── policies ────────────────────────────────────────────────────────────────────────────────────────────────────────


class Policy(Protocol):
    """What a replay needs: ask for experts, get the number of hits."""

    def ask(self, layer: int, experts: Sequence[int], *, is_scan: bool) -> int: ...


class _InstantStore:
    """Stands in for the store: reads have landed when they are waited for, in the order they were issued."""

    def wait_any(self, tickets: list[int]) -> list[tuple[int, None, None]]:
        return [(tickets[0], None, None)]


class _NoFiles:
    """Stands in for `ExpertFiles`: an expert is one byte."""

    format = "f32"
    slot_bytes = 1

    def __init__(self) -> None:
        self._ticket = 0

    def fetch(self, arena: Any, slot: int, key: Key) -> int:
        self._ticket += 1
        return self._ticket

    def expert_bytes(self, key: Key) -> int:
        return 1

    def offsets(self, slot: int, key: Key) -> tuple[int, int, int]:
        return slot, slot, slot


class Argosy:
    """The engine's own source, with reads that take no time."""

    def __init__(self, num_slots: int, trace: Trace) -> None:
        self._source = CachedSource(
            _InstantStore(),  # type: ignore[arg-type]
            _NoFiles(),  # type: ignore[arg-type]
            num_slots=num_slots,
            num_layers=trace.num_layers,
            experts_per_token=trace.experts_per_token,
        )

    def ask(self, layer: int, experts: Sequence[int], *, is_scan: bool) -> int:
        before = self._source.stats.hits
        with self._source.lease(layer, experts, experts if is_scan else ()) as lease:
            for _ in lease:
                pass
        return self._source.stats.hits - before

    def resident(self) -> set[Key]:
        return self._source.policy.resident()


class Lru:
    """Least recently used first, over all layers."""

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
    """Knows the future: replays exactly the requests it was made with."""

    def __init__(self, num_slots: int, trace: Trace) -> None:
        self._num_slots = num_slots
        never = 1 << 60
        following: dict[Key, int] = {}
        self._next: list[list[int]] = []  # of each request, when each of its experts is asked for again
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
        # What runs now has to be there, as far as it fits at all.
        kept = set(keys) if len(keys) <= self._num_slots else set()
        aside = []
        while len(self._resident) > self._num_slots:
            entry = heapq.heappop(self._farthest)
            if self._resident.get(entry[1]) != -entry[0]:
                continue  # it has been used, or has left, since
            if entry[1] in kept:
                aside.append(entry)
            else:
                del self._resident[entry[1]]
        for entry in aside:
            heapq.heappush(self._farthest, entry)
        return hits


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
        the share of the resident experts that the sweep left, and the hit rate of the next 8 tokens.
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
    parser.add_argument("traces", type=Path, nargs="?", default=DEFAULT_TRACES)
    parser.add_argument("--residency", default="3,5,6,9,12,19,25,37,50,75", help="percent of all experts")
    parser.add_argument("--short", action="store_true", help="three residencies")
    options = parser.parse_args()
    percents = [int(p) for p in ("6,12,25" if options.short else options.residency).split(",")]
    paths = sorted(options.traces.glob("*.route.csv")) if options.traces.is_dir() else [options.traces]
    if not paths or not paths[0].exists():
        print(f"skipped: no recorded routing at {options.traces}", file=sys.stderr)
        return 0
    traces = [read_trace(path) for path in paths]
    report = Report("replay", state="no reads and no arithmetic: only which expert is resident")
    report.correct(check(traces))
    report.opening()
    for trace in traces:
        print(
            f"\n{trace.name}: {trace.num_layers} layers, {trace.experts_per_token} of {trace.num_experts} experts, "
            f"prompt and {len(trace.answer)} tokens\nhit rate of the answer\n"
            + f"{'residency':>10}"
            + "".join(f"{name:>11}" for name in POLICIES)
        )
        for percent in percents:
            num_slots = trace.num_layers * trace.num_experts * percent // 100
            rates = {name: hit_rate(make(num_slots, trace), trace) for name, make in POLICIES.items()}
            print(f"{percent:>8} % " + "".join(f"{rate:>11.3f}" for rate in rates.values()))
            for name, rate in rates.items():
                report.record(f"{trace.name} {percent} % {name}", "hit rate", [rate], [])
        swept = {name: make for name, make in POLICIES.items() if make is not Optimum}
        print("after a sweep over all experts: share of the warm cache left, hit rate of the next 8 tokens")
        print(f"{'residency':>10}" + "".join(f"{name:>16}" for name in swept))
        for percent in [p for p in percents if p in (6, 12, 25, 50)]:
            num_slots = trace.num_layers * trace.num_experts * percent // 100
            pairs = {name: survived_sweep(make, num_slots, trace) for name, make in swept.items()}
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
            rate = hit_rate(make(trace.num_layers * trace.num_experts, trace), trace)
            if abs(rate - (1 - first_uses / lookups)) > 1e-12:
                raise SystemExit(f"{trace.name}: {name} hits {rate} with room for all")
    return f"{len(traces)} traces: with room for all, every policy misses exactly the first uses"


if __name__ == "__main__":
    sys.exit(main())
