"""Does a working set predict the hit rate of the engine's expert cache, at every budget?

    python benchmarks/hit_rate.py [TRACES]

Each recorded answer (see `replay.py`) is counted as a recorder would, and replayed through the cache with slots for
several shares of the experts. Rates are those after the first 32 tokens. `lru` is the classical estimate, beside a
cache that evicts the least recently used expert of all layers.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from argosy.experts.hit_rate import RECORDED_ERROR, ReuseGaps, WorkingSet
from common import Report
from replay import RECORDED, Argosy, Lru, Trace, read_trace

PERCENTS = (2, 4, 6, 9, 12, 19, 25, 37, 50)
_WARM_TOKENS = 32


def working_set(trace: Trace) -> WorkingSet:
    gaps = ReuseGaps(trace.num_layers, trace.num_experts)
    gaps.count(np.array(trace.answer))
    return WorkingSet.of(
        [gaps],
        layers=range(trace.num_layers),
        num_experts=trace.num_experts,
        experts_per_token=trace.experts_per_token,
    )


def replayed(make: type[Argosy | Lru], num_slots: int, trace: Trace) -> float:
    """Hit rate of a cache on the answer, after its first tokens."""
    cache, hits, lookups = make(num_slots, trace), 0, 0
    for number, token in enumerate(trace.answer):
        for layer, experts in enumerate(token):
            found = cache.ask(layer, experts, is_scan=False)
            if number >= _WARM_TOKENS:
                hits += found
                lookups += len(experts)
    return hits / lookups


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("traces", type=Path, nargs="?", default=RECORDED)
    parser.add_argument("--short", action="store_true", help="has no effect: it takes seconds")
    options = parser.parse_args()
    paths = sorted(options.traces.glob("*.route.csv"))
    if not paths:
        print(f"skipped: no recorded routing at {options.traces}", file=sys.stderr)
        return 0
    report = Report("hit_rate", state="no reads and no arithmetic: only which expert is resident")
    report.opening()
    worst = 0.0
    for trace in map(read_trace, paths):
        found = working_set(trace)
        print(
            f"\n{trace.name}: {trace.num_layers} layers, {trace.experts_per_token} of {trace.num_experts} experts"
        )
        print(f"{'residency':>10}{'predicted':>11}{'cache':>8}{'error':>8}{'predicted lru':>16}{'lru':>8}")
        for percent in PERCENTS:
            num_slots = trace.num_layers * trace.num_experts * percent // 100
            predicted, cache = found.hit_rate(num_slots), replayed(Argosy, num_slots, trace)
            lru_predicted, lru = found.lru_hit_rate(num_slots), replayed(Lru, num_slots, trace)
            worst = max(worst, abs(predicted - cache))
            ours = f"{predicted:>11.3f}{cache:>8.3f}{predicted - cache:>+8.3f}"
            print(f"{percent:>8} %{ours}{lru_predicted:>16.3f}{lru:>8.3f}")
            report.record(f"{trace.name} {percent} %", "predicted - cache", [predicted - cache], [])
    print(f"\nlargest error {worst:.3f}, bound {RECORDED_ERROR}")
    return 0 if worst <= RECORDED_ERROR else 1


if __name__ == "__main__":
    sys.exit(main())
