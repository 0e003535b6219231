"""Does a model of a trillion parameters and more decode in 16 GiB, and how close is that to the drive's limit?

    python benchmarks/trillion.py [--models kimi_k2,kimi_k3,deepseek_v41] [--directory DIR] [--memory 16GiB]
                                  [--experts-gib 30] [--prompt 8] [--new 16] [--short] [--only-make]

    kimi_k2        1026 B parameters, 61 layers, 8 of 384 experts in int4; q8 weights that every token needs: 12 GiB
    kimi_k3        2779 B parameters, 93 layers, 16 of 896 experts in MXFP4; only in iq1_s do those weights fit
    deepseek_v41   749 B parameters, 40 layers, 6 of 384 experts in MXFP4; 197 B of them in two tables on the drive

Checkpoints have the released geometry, whose experts share bytes (`giants.py`); one of several is removed before the
next is written. A run is a fresh process in a memory cgroup limited to the budget, with swap forbidden and page cache
charged to it. It is compared with the planner's equations: per layer, the misses of an LRU cache by Denning's
working-set function of the same routing, and max(their reads, arithmetic) after attention and router.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from argosy import Engine, SamplingParams
from argosy.checkpoint.geometry import count_parameters
from argosy.config import MIB, format_bytes, parse_size
from argosy.model.clock import PARTS
from argosy.open import engine as engine_module
from cgroup import NoMemoryCap, run_capped
from common import (
    Report,
    Sample,
    drop_page_cache,
    look_at_drive,
    print_parts,
    print_plan,
    probe_new_memory,
    run_inside,
)
from engines import MODELS
from giants import EXPERTS_FILE, GIANTS, TABLE_TOKENS, Giant
from random_weights import DOCUMENT_TOKENS, RandomWeights, document, num_continued
from routing import overlap

PROMPT_TOKENS = 8
WAITING = "waiting_for_reads"
SHORT_REST_BYTES = 120 * MIB  # of experts and the process
IN_TIME = 0.95  # of a token's rows should be there when their layer needs them
SLOWER = 1.25  # a token may take this times max(compute, reads)


@dataclass(frozen=True)
class Tokens:
    """The tokens of a size, and what bounds them."""

    each: Sequence[Mapping[str, Any]]
    record_bytes: int
    drive: float  # GB/s

    def seconds_in(self, *parts: str) -> float:
        """Seconds a token that the ledger counts for `parts`."""
        return float(statistics.median(sum(token["parts"][part] for part in parts) for token in self.each))

    @property
    def computing_s(self) -> float:
        return self.seconds_in(*(part for part in PARTS if part != WAITING))

    def over_limits(self, compute_s: float) -> float:
        """The median of a token's seconds over max(compute, reads)."""
        limits = [max(compute_s, token["bytes_read"] / 1e9 / self.drive) for token in self.each]
        return float(
            statistics.median(
                token["seconds"] / limit for token, limit in zip(self.each, limits, strict=True)
            )
        )

    def by_reads(self) -> dict[int, list[float]]:
        """The seconds of tokens, by the number of experts that they read."""
        found: dict[int, list[float]] = {}
        for token in self.each:
            found.setdefault(round(token["bytes_read"] / self.record_bytes), []).append(token["seconds"])
        return found


def inside(giant: Giant, options: argparse.Namespace) -> None:
    """Run in the cgroup: decode two documents, and print the cost as JSON."""
    engine_module.open_files = lambda path, mmproj=None: giant.files()  # type: ignore[misc]
    answers, tokens = [], []
    first_s, first_bytes, start = 0.0, 0, time.perf_counter()
    with Engine.open(
        giant.directory,
        memory=options.memory,
        threads=options.threads,
        context=options.prompt + options.new + 16,
        max_sequences=1,
        kv_dtype="f16",
        prefix_reuse=False,  # no document begins as another
    ) as engine:
        open_s = time.perf_counter() - start
        for number in (0, 1):
            start = time.perf_counter()
            sequence = engine.submit(
                document(number, options.prompt, vocab=giant.config.vocab_size),
                SamplingParams(max_tokens=options.new + 1, ignore_eos=True),
            )
            while not engine.step():
                pass
            if number == 0:
                first_s, first_bytes = time.perf_counter() - start, engine.ledger.bytes_read
            while sequence.result is None:
                before, rows_before = engine.ledger, engine._started.model.table_counts.bytes_read
                engine.step()
                after, rows_after = engine.ledger, engine._started.model.table_counts.bytes_read
                if number == 0:
                    continue  # only fills the cache
                tokens.append(
                    {
                        "seconds": after.wall_s - before.wall_s,
                        "bytes_read": after.bytes_read - before.bytes_read,
                        "hits": after.hits - before.hits,
                        "lookups": after.lookups - before.lookups,
                        "rows": after.rows - before.rows,
                        "rows_late": after.rows_late - before.rows_late,
                        "row_bytes": rows_after - rows_before,
                        "parts": {part: total - before.parts[part] for part, total in after.parts.items()},
                    }
                )
            answers.append(sequence.result.token_ids)
        print(
            json.dumps(
                {
                    "answers": answers,
                    "tokens": tokens,
                    "open_s": open_s,
                    "first_s": first_s,  # with an empty cache
                    "first_bytes": first_bytes,
                    "plan": engine.plan.lines(),
                    "budget_bytes": engine.plan.budget_bytes,
                    "slots": engine.plan.slots.own,
                    "kv_bytes_per_token": engine.plan.kv_bytes // engine.plan.context_tokens,
                }
            )
        )


def predicted_hit_rate(choices: NDArray[np.int64], slots: int) -> float:
    """Hit rate of one LRU order over all layers, from the routing's working-set function (Denning, 1968).

    W(T) = distinct experts of T tokens, summed over layers; with W(T) = slots, 1 - (W(T + 1) - W(T)) / (layers * k).
    """
    layers, num_tokens, k = choices.shape

    def working_set(window: int) -> float:
        starts = range(0, num_tokens - window + 1)
        return sum(
            statistics.fmean(len(np.unique(layer[start : start + window])) for start in starts)
            for layer in choices
        )

    smaller, window = 0.0, 0
    for window in range(1, num_tokens):
        larger = working_set(window)
        if larger >= slots:
            # The curve is taken as straight between two whole windows.
            return 0.0 if window == 1 else 1 - (larger - smaller) / (layers * k)
        smaller = larger
    return float(1 - (working_set(num_tokens) - smaller) / (layers * k))


def report_run(report: Report, giant: Giant, found: Mapping[str, Any], sample: Sample, drive: float) -> None:
    """Report the measured figures beside the predicted ones."""
    config, count = giant.config, len(found["tokens"])
    tokens = Tokens(found["tokens"], giant.record_bytes, drive)
    parts = {part: sum(token["parts"][part] for token in tokens.each) for part in PARTS}
    token_s = statistics.median(token["seconds"] for token in tokens.each)
    read_bytes = statistics.fmean(token["bytes_read"] for token in tokens.each)
    hit = sum(token["hits"] for token in tokens.each) / sum(token["lookups"] for token in tokens.each)
    before_s = (parts["router"] + parts["attention_and_dense"]) / count
    reading_s = read_bytes / 1e9 / drive
    plan = {name: nbytes for name, nbytes, _ in found["plan"]}
    facts = {"model": config.family, "slots": found["slots"], "record_bytes": giant.record_bytes}
    sample.values |= {
        "tok/s": 1 / token_s, "GB": read_bytes / 1e9, "hit": hit, "drive": drive, "open": found["open_s"],
        "first": found["first_s"], "first read": found["first_bytes"] / 1e9,
        "records": plan["expert records"] / MIB,
    }  # fmt: skip
    report.figure("decode", "tok/s", [sample], "tok/s", **facts)
    report.figure("reads", "GB/token", [sample], "GB", **facts)
    report.figure("hit rate", "", [sample], "hit", **facts)
    report.figure("drive", "GB/s", [sample], "drive", **facts)
    report.figure("records of experts", "MiB", [sample], "records", **facts)
    report.figure("time to open", "s", [sample], "open", **facts)
    report.figure("first token, no expert in memory", "s", [sample], "first", **facts)
    report.figure("its reads", "GB", [sample], "first read", **facts)
    report.figure("memory used for the first time", "s/GiB", [sample], "new memory", **facts)
    report.line(
        "roofline",
        f"a token takes {token_s:.2f} s; its reads {reading_s:.2f} s at {drive:.2f} GB/s; attention, router and"
        f" what every token needs {before_s:.2f} s, its experts {parts['expert_compute'] / count:.2f} s",
    )
    if config.ngram_layers:
        rows, late = (sum(token[name] for token in tokens.each) for name in ("rows", "rows_late"))
        sample.values["KB"] = statistics.fmean(token["row_bytes"] for token in tokens.each) / 1e3
        report.figure("reads of rows of tables", "KB/token", [sample], "KB", rows=rows / count, **facts)
        report.ratio("share of rows before their layer", rows - late, rows, target=f">= {IN_TIME:g}", **facts)
    over = tokens.over_limits(tokens.computing_s)
    report.ratio("seconds a token over max(compute, reads)", over, 1.0, target=f"<= {SLOWER:g}", **facts)
    choices = RandomWeights(config, routing="recorded").chosen(
        np.array(document(0, 2 * DOCUMENT_TOKENS // 8, vocab=config.vocab_size))
    )
    guess = predicted_hit_rate(choices, found["slots"])
    missed = (1 - guess) * config.experts_per_token * len(config.moe_layers) * giant.record_bytes
    expert_s = parts["expert_compute"] / count
    guess_s = before_s + max(expert_s, missed / 1e9 / drive)
    report.line(
        "predicted",
        f"hit rate {guess:.2f}, {missed / 1e9:.2f} GB a token, {1 / guess_s:.3f} tok/s (LRU of {found['slots']} slots;"
        f" next-token overlap of this routing {overlap(choices, 1):.2f})",
    )
    print_parts({part: seconds / count for part, seconds in parts.items()}, sum(parts.values()) / count)


def giant_of(options: argparse.Namespace, name: str) -> Giant:
    model = GIANTS[name]
    directory = options.directory / (f"{name}-short" if options.short else name)
    giant = Giant(directory, model, model.config(short=options.short), 1)
    if giant.tables and options.prompt + options.new > TABLE_TOKENS:
        raise SystemExit(f"tables of {name} have rows for {TABLE_TOKENS} tokens; lower --prompt and --new")
    return replace(giant, num_records=int(options.experts_gib * 2**30) // giant.record_bytes)


def report_model(report: Report, giant: Giant) -> None:
    everything, active = count_parameters(giant.config)
    num_experts = len(giant.config.moe_layers) * giant.config.num_experts
    report.line(
        "model",
        f"{giant.config.family}: {everything / 1e9:.1f} B parameters, {active / 1e9:.1f} B for a token; {num_experts}"
        f" experts of {format_bytes(giant.record_bytes)}, {format_bytes(num_experts * giant.record_bytes)} in all",
    )
    report.line(
        "bytes",
        f"{giant.num_records} expert records exist, and {num_experts / giant.num_records:.1f} logical experts"
        " share each; the cache keys on the logical expert and reads pass the page cache: nothing is won",
    )
    every = format_bytes(giant.dense_bytes)
    report.line("dense", f"{every} of weights that every token needs, most of them {giant.model.dense}")


def run(report: Report, giant: Giant, options: argparse.Namespace, name: str) -> None:
    """Make the model, run it in its cgroup, check its answers and report.

    Raises:
        NoMemoryCap: no memory cgroup can be made here.
    """
    # With --short, half of the experts and more fit.
    short = giant.dense_bytes + SHORT_REST_BYTES
    memory = parse_size(options.memory or (f"{short}B" if options.short else "16GiB"))
    giant.make()
    for path in giant.directory.iterdir():
        drop_page_cache(path)
    command = ["--inside", name, "--directory", options.directory, "--new", options.new]
    command += ["--memory", f"{memory}B", "--threads", options.threads, "--prompt", options.prompt]
    command += ["--experts-gib", options.experts_gib, *(["--short"] if options.short else [])]
    experts = giant.directory / EXPERTS_FILE
    looks, new_memory = look_at_drive(experts), probe_new_memory()
    with Sample() as sample:
        done = run_capped(run_inside("trillion.py", command), limit_bytes=memory, timeout_s=1800)
    if done.returncode:
        raise SystemExit(
            f"the run in {format_bytes(memory)} ended with {done.returncode}, {done.num_oom_kills} killed for memory:\n"
            f"{done.stderr[-2000:]}"
        )
    looks += look_at_drive(experts)
    found = json.loads(done.stdout)
    right = asked = 0
    for number, answer in enumerate(found["answers"]):
        right += num_continued(number, options.prompt, answer, vocab=giant.config.vocab_size)
        asked += len(answer)
    if right != asked:
        raise SystemExit(f"{right} of {asked} tokens continue their documents")
    report.correct(f"{right} of {asked} tokens continue their documents")
    print_plan(report, found["plan"], found["budget_bytes"])
    report.line("KV cache", f"{found['kv_bytes_per_token'] / 1000:.1f} KB a token")
    sample.values["new memory"] = new_memory
    report_run(report, giant, found, sample, statistics.median(looks))
    report.ratio("peak over budget", done.peak_bytes, memory, target="<= 1.0", model=name)
    report.neighbours([sample])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default=",".join(GIANTS))
    parser.add_argument("--directory", type=Path, default=MODELS / "trillion")
    parser.add_argument("--memory", default=None)
    parser.add_argument("--experts-gib", type=float, default=None)
    parser.add_argument("--prompt", type=int, default=PROMPT_TOKENS, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=16, help="tokens of an answer")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--short", action="store_true", help="small models of the same families")
    parser.add_argument("--only-make", action="store_true", help="write the files, for a later run")
    parser.add_argument("--inside", choices=GIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.experts_gib = options.experts_gib or (0.06 if options.short else 30.0)
    if options.inside:
        inside(giant_of(options, options.inside), options)
        return 0
    names = options.models.split(",")
    if unknown := set(names) - set(GIANTS):
        parser.error(f"unknown models: {', '.join(sorted(unknown))}; known: {', '.join(GIANTS)}")
    report = Report("trillion", state="page cache dropped; experts cached by one answer")
    report.opening()
    for name in names:
        giant = giant_of(options, name)
        report_model(report, giant)
        if options.only_make:
            giant.make()
            continue
        try:
            run(report, giant, options, name)
        except NoMemoryCap as reason:
            print(f"skipped: {reason}", file=sys.stderr)
            return 0
        finally:
            if len(names) > 1:  # the drive has room for one
                shutil.rmtree(giant.directory, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
