"""How much faster is decode if idle memory of prompts and the KV cache holds experts meanwhile?

    python benchmarks/idle_memory.py [--geometry mid] [--format Q4_0] [--percent 25] [--context 3072] [--new 128]
                                     [--repeats 2] [--short]

The model runs in a memory cgroup of `--percent` of its file, which is also its budget, without swap. Each run is a
process of its own that answers the same prompts, one after another: with the memory lent, without, and again. The
first answer warms the expert cache. Without means that nothing is lent and taken back; the plan is the same.

Targets: hit rate of decode 0.10 higher, 1.2 times the tokens per second, peak within the budget, equal tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from argosy import Engine, SamplingParams
from argosy.config import format_bytes
from argosy.engine import start
from cgroup import NoMemoryCap, run_capped
from common import Report, Sample, alternate, drop_page_cache, file_bytes, print_plan, tidy_up_when_terminated
from engines import MODELS, prompts
from make_checkpoint import named_model

LENT, KEPT = "lent", "kept"
NUM_PROMPTS, PROMPT_TOKENS = 4, 200


class Keeping:
    """Stands in for `IdleMemory`, and lends nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def before_step(self, num_tokens: int, *, has_prompts: bool) -> None:
        pass

    def close(self) -> None:
        pass


def child(job: dict[str, Any]) -> None:
    """Answer the prompts; print what was counted."""
    if not job["lends"]:
        start.IdleMemory = Keeping  # type: ignore[assignment, misc]
    params = SamplingParams(max_tokens=job["new"], temperature=0, ignore_eos=True)
    with Engine.open(
        job["model"], memory=job["budget"], context=job["context"], threads=2, prefix_reuse=False
    ) as engine:
        ids, rates, seconds, prefill, slots = [], [], 0.0, 0.0, []
        hits = lookups = read = tokens = 0
        for number, prompt in enumerate(prompts(NUM_PROMPTS, PROMPT_TOKENS)):
            begun = time.perf_counter()
            sequence = engine.submit(prompt, params)
            while not sequence.new_ids:
                engine.step()
            first, before = time.perf_counter(), engine.ledger
            while sequence.result is None:
                engine.step()
            after = engine.ledger
            ids.append(list(sequence.new_ids))
            slots.append(engine.facts().expert_slots)
            if not number:
                continue
            prefill += first - begun
            seconds += time.perf_counter() - first
            tokens += len(sequence.new_ids) - 1
            hits += after.hits - before.hits
            lookups += after.lookups - before.lookups
            read += after.bytes_read - before.bytes_read
            rates.append((after.hits - before.hits) / (after.lookups - before.lookups))
        found = {
            "tok_per_s": tokens / seconds, "hit_rate": hits / lookups, "read_mb": read / tokens / 1e6,
            "prefill_s": prefill / (NUM_PROMPTS - 1), "slots": slots, "ids": ids, "hit_rates": rates,
            "plan": [list(line) for line in engine.plan.lines()],
        }  # fmt: skip
    print(json.dumps(found))


def measure(report: Report, model: Path, options: argparse.Namespace) -> int:
    budget = file_bytes(model) * options.percent // 100
    runs: dict[str, list[dict[str, Any]]] = {LENT: [], KEPT: []}

    def run(name: str) -> dict[str, float]:
        job = {
            "model": str(model), "budget": budget, "context": options.context, "new": options.new,
            "lends": name == LENT,
        }  # fmt: skip
        drop_page_cache(model)
        command = [sys.executable, __file__, "--child", json.dumps(job)]
        capped = run_capped(command, limit_bytes=budget, timeout_s=3600)
        if capped.returncode or capped.num_oom_kills:
            raise SystemExit(f"{name}: {capped.num_oom_kills} kills\n{capped.stderr[-2000:]}")
        found = json.loads(capped.stdout) | {"peak": capped.peak_bytes / budget}
        runs[name].append(found)
        return {key: found[key] for key in ("tok_per_s", "hit_rate", "read_mb", "prefill_s", "peak")}

    samples = alternate({name: lambda name=name: run(name) for name in runs}, options.repeats)  # type: ignore[misc]
    every = [one for many in runs.values() for one in many]
    if any(one["ids"] != every[0]["ids"] for one in every):
        raise SystemExit("the answers differ")
    report.correct(f"{len(every)} runs with the same {NUM_PROMPTS} answers of {options.new} tokens")
    report.opening()
    report.line("model", f"{model.name}: {format_bytes(file_bytes(model))}; budget {format_bytes(budget)}")
    print_plan(report, every[0]["plan"], budget)
    for name, many in runs.items():
        report.line("slots", f"{name}: {many[0]['slots'][-1]} after an answer")
    medians = {}
    for key, unit in (
        ("tok_per_s", "tok/s"),
        ("hit_rate", ""),
        ("read_mb", "MB/token"),
        ("prefill_s", "s"),
        ("peak", "of the budget"),
    ):
        for name in runs:
            medians[name, key] = report.figure(f"{key}, {name}", unit, samples[name], key)
    report.ratio(
        "tok/s, lent over kept", medians[LENT, "tok_per_s"], medians[KEPT, "tok_per_s"], target=">= 1.2"
    )
    report.shares(
        "hit rate, lent less kept", [medians[LENT, "hit_rate"] - medians[KEPT, "hit_rate"]], target=">= 0.1"
    )
    report.shares("peak over budget", [max(one["peak"] for one in every)], target="<= 1")
    report.ratio(
        "seconds of a prompt, lent over kept",
        statistics.median(one["prefill_s"] for one in runs[LENT]),
        statistics.median(one["prefill_s"] for one in runs[KEPT]),
    )
    together: list[Sample] = [sample for many in samples.values() for sample in many]
    report.neighbours(together)
    return 0


def main() -> int:
    tidy_up_when_terminated()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--geometry", default="mid")
    parser.add_argument("--format", default="Q4_0")
    parser.add_argument("--percent", type=int, default=25)
    parser.add_argument("--context", type=int, default=3072)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--models", type=Path, default=MODELS, help="where model files are kept")
    parser.add_argument("--short", action="store_true", help="the tiny model, once")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        child(json.loads(options.child))
        return 0
    if options.short:
        options.geometry, options.percent, options.new, options.repeats = "tiny", 190, 24, 1
    model = named_model(options.models, options.geometry, options.format)
    report = Report(
        "idle_memory", state="page cache of the model dropped, swap forbidden, a process for each run"
    )
    try:
        return measure(report, model, options)
    except NoMemoryCap as reason:
        print(f"skipped: {reason}", file=sys.stderr)
        return 0


if __name__ == "__main__":
    sys.exit(main())
