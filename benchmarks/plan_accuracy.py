"""Does `argosy plan` predict memory, hit rate and speed? Predictions are on the drive before each run.

    python benchmarks/plan_accuracy.py [--short] [--cells 3] [--geometries small,mid] [--prompts] [--calibrate]

A cell is a model, a format, a budget (percent of what all experts in memory would take, above the smallest budget), a
number of streams and a context. For each model, the working set is recorded first, on documents that are not run. Then,
cell by cell: the prediction is appended to `results/plan_predictions.jsonl` and flushed to the drive, a fresh process
runs the cell, and what it measured is put beside it. The rates are those that `argosy plan --calibrate` keeps for this
machine; without them they are guesses, and the table says so. A virtual machine shares its memory and its cores with
neighbours, so each prediction is for the rates of memory and of int8 arithmetic in the seconds before it. A cell during
which either changes by more than a tenth is predicted and run again, and the table says so. If they change each time,
the means of all predictions and of all runs count: such changes go either way.

Targets: memory within 3 % and never above the plan; decode within 10 % (median) and 20 % (90th percentile); prompts
of 256 tokens and more within 15 %; hit rate within 3 points; the range holds in 90 % of all cells.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from argosy import Engine, SamplingParams, _native
from argosy.config import MIB
from argosy.experts.hit_rate import ReuseGaps, WorkingSet
from argosy.forecast import calibration
from argosy.forecast.planning import HERE, find_place, forecaster, open_subject
from argosy.machine import kept_rates, resources
from common import RESULTS, Report, drop_page_cache
from engines import FIRST_DOCUMENT, MODELS
from make_checkpoint import named_model
from random_weights import document, num_continued

PREDICTIONS = RESULTS / "plan_predictions.jsonl"
# The length of an answer, timed from its first token: experts change with the document, in the recording too.
ANSWER_TOKENS = 112
RECORDED_DOCUMENTS = 6
MEASURED_PROMPT = 256  # tokens; shorter ones take too little time to be judged
SAME_RATES, MOST_RUNS = 0.1, 3
MOMENT_S = 4.0


class Cell(NamedTuple):
    geometry: str
    format: str
    percent: int
    streams: int
    context: int

    def __str__(self) -> str:
        where = f"{self.geometry} {self.format} {self.percent} %"
        return f"{where}, {self.streams} at once, context {self.context}"


CELLS = (
    *(Cell("mid", "Q4_0", percent, 1, 0) for percent in (12, 25, 37, 50, 75, 100)),
    *(Cell("mid", "Q4_0", percent, streams, 0) for streams in (4, 8) for percent in (25, 100)),
    *(Cell("mid", "Q4_0", percent, 1, context) for context in (1024, 3072) for percent in (25, 100)),
    *(Cell("small", "Q8_0", percent, 1, 0) for percent in (25, 50, 100)),
    *(Cell("small", "q4", percent, 1, 512) for percent in (25, 100)),
    Cell("small", "bf16", 50, 4, 0),
)
SHORT = (Cell("tiny", "Q4_0", 50, 1, 0), Cell("tiny", "Q4_0", 100, 1, 256))


class Moment(NamedTuple):
    """Rates of this machine in a few seconds."""

    memory_bytes_per_s: float
    int8_operations: float

    def __str__(self) -> str:
        return f"{self.memory_bytes_per_s / 1e9:.0f} GB/s, {self.int8_operations / 1e9:.0f} Gop/s"

    def is_like(self, other: Moment) -> bool:
        return all(abs(one / another - 1.0) <= SAME_RATES for one, another in zip(self, other, strict=True))


def moment() -> Moment:
    """The rates of the next seconds: harmonic means, as a step takes the sum of its parts' times."""
    cores = resources.usable_cores()
    memory, arithmetic = [], []
    end = time.perf_counter() + MOMENT_S
    while time.perf_counter() < end:
        arithmetic += [_native.int8_probe(cores) for _ in range(4)]
        memory.append(_native.memory_probe(cores, 256 * MIB))
    return Moment(statistics.harmonic_mean(memory), statistics.harmonic_mean(arithmetic))


# ── in a process of its own ─────────────────────────────────────────────────────────────────────────────────────────


def record(model: str) -> dict[str, object]:
    """The working set of decoding documents that no cell runs."""
    chosen: dict[int, list[Any]] = {}

    def observe(layer: int, experts: Any) -> None:
        if len(experts) == 1:  # a token of an answer
            chosen.setdefault(layer, []).append(np.array(experts[0]))

    with Engine.open(model, memory="90%", context=4096, max_sequences=1, observe_routes=observe) as engine:
        config, answer = engine.config, SamplingParams(max_tokens=ANSWER_TOKENS, ignore_eos=True)
        for number in range(RECORDED_DOCUMENTS):
            engine.generate(document(FIRST_DOCUMENT + 1000 + number, 8), answer)
    gaps = ReuseGaps(len(chosen), config.num_experts)
    gaps.count(np.stack([np.stack(chosen[layer]) for layer in sorted(chosen)], axis=1))
    return WorkingSet.of(
        [gaps],
        layers=sorted(chosen),
        num_experts=config.num_experts,
        experts_per_token=config.experts_per_token,
    ).as_dict()


def run_cell(job: dict[str, Any]) -> dict[str, Any]:
    """Answer a document to warm the cache, then others that are timed: two after each other, or `streams` at once."""
    streams, length = job["streams"], max(8, job["context"])
    rounds = 2 if streams == 1 and length <= 512 else 1
    answer = SamplingParams(max_tokens=ANSWER_TOKENS, ignore_eos=True)
    first_s, seconds, tokens, steps, right, asked = 0.0, 0.0, 0, 0, 0, 0
    decoded = np.zeros(3)  # lookups, hits, bytes read
    parts: dict[str, float] = defaultdict(float)
    with Engine.open(
        job["model"],
        memory=job["budget_bytes"],
        context=job["context_tokens"],
        max_sequences=max(8, streams),
        prefix_reuse=False,
    ) as engine:
        engine.generate(document(FIRST_DOCUMENT + 500, 8), answer)
        for number in range(0, rounds * streams, streams):
            documents = range(FIRST_DOCUMENT + number, FIRST_DOCUMENT + number + streams)
            begin = time.perf_counter()
            sequences = [engine.submit(document(one, length), answer) for one in documents]
            while not all(one.new_ids for one in sequences):
                engine.step()
            first_s += (time.perf_counter() - begin) / rounds
            warm, begin = engine.ledger, time.perf_counter()
            while all(one.result is None for one in sequences):
                tokens += len(engine.step())
                steps += 1
            seconds, after = seconds + time.perf_counter() - begin, engine.ledger
            decoded += [
                after.lookups - warm.lookups,
                after.hits - warm.hits,
                after.bytes_read - warm.bytes_read,
            ]
            for part, value in after.parts.items():
                parts[part] += value - warm.parts[part]
            for one, sequence in zip(documents, sequences, strict=True):
                right += num_continued(one, length, sequence.new_ids)
                asked += len(sequence.new_ids)
        planned = engine.plan
        peak_bytes = resources.peak_bytes()
    lookups, hits, bytes_read = map(float, decoded)
    return {
        "tokens_per_s": tokens / seconds,
        "first_s": first_s,
        "hit_rate": hits / lookups if lookups else 1.0,
        "bytes_per_token": bytes_read / tokens,
        "parts": {part: value / steps for part, value in parts.items()},
        "peak_bytes": peak_bytes,
        "planned_bytes": planned.total_bytes,
        "continued": [right, asked],
    }


def in_child(function: str, argument: Any) -> Any:
    command = [sys.executable, __file__, "--child", function, json.dumps(argument)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{function} {argument}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# ── predictions ─────────────────────────────────────────────────────────────────────────────────────────────────────


class Predicted(NamedTuple):
    job: dict[str, Any]
    facts: dict[str, Any]


def predict(cell: Cell, model: Path, working_set: WorkingSet, now: Moment) -> Predicted:
    """Predict a cell, and describe the job that will measure it."""
    length = max(8, cell.context)
    needed = cell.streams * (length + ANSWER_TOKENS)
    context = max(512, -(-needed // 16) * 16)
    with open_subject(str(model)) as subject:
        place = find_place(HERE, model)
        place = replace(place, rates=place.rates.at(*now))
        found, _ = forecaster(
            subject, place, memory="1GiB", streams=[cell.streams], working_set=working_set,
            context=context,
        )  # fmt: skip
        ends = found.forecast(1, with_curve=False)
        span = ends.resident_bytes - ends.smallest_bytes
        budget_bytes = ends.smallest_bytes + span * cell.percent // 100 + (4 << 20)
        plan = found.plan(budget_bytes)
        decode = found.decode(plan, cell.streams, context=length + ANSWER_TOKENS // 2)
        prompt = found.prompt(plan, length * cell.streams)
        rates = found.forecast(budget_bytes, with_curve=False).rates
    job = {
        "model": str(model), "budget_bytes": budget_bytes, "context_tokens": context, "streams": cell.streams,
        "context": cell.context,
    }  # fmt: skip
    return Predicted(
        job,
        {
            "cell": str(cell), "job": job, "rates": rates.source, "is_measured": rates.is_measured,
            "tokens_per_s": decode.tokens_per_s._asdict(), "hit_rate": decode.hit_rate._asdict(),
            "first_s": prompt.seconds._asdict(), "planned_bytes": plan.total_bytes, "bound": decode.bound,
            "moment": now._asdict(),
            "parts": dict(decode.parts), "bytes_per_token": decode.drive_bytes_per_token._asdict(),
        },
    )  # fmt: skip


def write_down(facts: dict[str, Any]) -> None:
    """Append a prediction, or what was measured, and return when it is on the drive."""
    RESULTS.mkdir(exist_ok=True)
    with PREDICTIONS.open("a") as file:
        file.write(json.dumps({"time": time.time(), **facts}) + "\n")
        file.flush()
        os.fsync(file.fileno())


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--short", action="store_true", help="two cells of a tiny model")
    parser.add_argument("--cells", type=int, help="only so many cells")
    parser.add_argument("--geometries", help="only cells of these, such as small,mid")
    parser.add_argument(
        "--prompts", action="store_true", help="only cells with prompts of 256 tokens and more"
    )
    parser.add_argument("--calibrate", action="store_true", help="measure this machine first")
    parser.add_argument("--models", type=Path, default=MODELS, help="where model files are kept")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        function, argument = options.child[0], json.loads(options.child[1])
        print(json.dumps(record(argument) if function == "record" else run_cell(argument)))
        return 0
    cells: Sequence[Cell] = SHORT if options.short else CELLS
    if options.geometries:
        cells = [cell for cell in cells if cell.geometry in options.geometries.split(",")]
    if options.prompts:
        cells = [cell for cell in cells if cell.context >= MEASURED_PROMPT]
    cells = cells[: options.cells]
    report = Report("plan_accuracy", state="each cell in a fresh process, page cache dropped")
    results = list(measured(cells, options, report))
    if not results:
        return 0
    return summary(results, report)


def measured(
    cells: Sequence[Cell], options: argparse.Namespace, report: Report
) -> Iterator[tuple[Cell, dict[str, Any], dict[str, Any]]]:
    recorded: dict[Path, WorkingSet] = {}
    for number, cell in enumerate(cells):
        model = named_model(options.models, cell.geometry, cell.format)
        if model not in recorded:
            found = in_child("record", str(model))
            recorded[model] = WorkingSet.from_json(json.dumps(found).encode())
            if options.calibrate:
                with open_subject(str(model)) as subject:
                    kept_rates.save(calibration.calibrate(subject.weights), model)
        runs: list[tuple[dict[str, Any], dict[str, Any]]] = []
        while len(runs) < MOST_RUNS:
            before = moment()
            predicted = predict(cell, model, recorded[model], before)
            write_down(predicted.facts)
            drop_page_cache(model)
            found = in_child("run", predicted.job)
            after = moment()
            write_down({"cell": str(cell), "measured": found, "moment": after._asdict()})
            runs.append((predicted.facts, found))
            if after.is_like(before):
                runs = runs[-1:]
                break
            print(f"{cell!s:<44}{before} before, {after} after", flush=True)
        if number == 0:
            report.correct(f"{found['continued'][0]}/{found['continued'][1]} tokens continue their documents")
            report.opening()
            report.line("rates", predicted.facts["rates"])
            print(f"{'':<44}{'tok/s':>18}{'first token, s':>20}{'hit rate':>16}{'memory, MiB':>18}")
        facts, figures = mean_of(runs)
        show(cell, facts, figures)
        yield cell, facts, figures


def mean_of(
    runs: Sequence[tuple[dict[str, Any], dict[str, Any]]],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The last prediction and run, with the means of all in place of what depends on the machine's rates."""
    facts, figures = dict(runs[-1][0]), dict(runs[-1][1])
    for name in ("tokens_per_s", "first_s"):
        facts[name] = {end: statistics.mean(one[name][end] for one, _ in runs) for end in facts[name]}
        figures[name] = statistics.mean(one[name] for _, one in runs)
    figures["peak_bytes"] = max(one["peak_bytes"] for _, one in runs)
    return facts, figures


def show(cell: Cell, predicted: dict[str, Any], found: dict[str, Any]) -> None:
    def pair(name: str, digits: int) -> str:
        return f"{predicted[name]['likely']:.{digits}f} / {found[name]:.{digits}f}"

    memory = f"{predicted['planned_bytes'] >> 20} / {found['peak_bytes'] >> 20}"
    print(
        f"{cell!s:<44}{pair('tokens_per_s', 1):>18}{pair('first_s', 2):>20}{pair('hit_rate', 3):>16}{memory:>18}",
        flush=True,
    )


def summary(results: Sequence[tuple[Cell, dict[str, Any], dict[str, Any]]], report: Report) -> int:
    """Errors of all cells against the targets; 1 if a run took more memory than its plan."""

    def error(name: str, predicted: dict[str, Any], found: dict[str, Any]) -> float:
        return float(abs(predicted[name]["likely"] / found[name] - 1.0))

    speed = [error("tokens_per_s", p, f) for _, p, f in results]
    prompts = [error("first_s", p, f) for cell, p, f in results if cell.context >= MEASURED_PROMPT]
    hits = [abs(p["hit_rate"]["likely"] - f["hit_rate"]) for _, p, f in results]
    memory = [f["peak_bytes"] / p["planned_bytes"] for _, p, f in results]
    within = [
        p["tokens_per_s"]["low"] <= f["tokens_per_s"] <= p["tokens_per_s"]["high"] for _, p, f in results
    ]
    ninth = sorted(speed)[int(0.9 * (len(speed) - 1))]
    targets = [
        ("decode, median error", statistics.median(speed), 0.10),
        ("decode, 90th percentile", ninth, 0.20),
        ("prompts, largest error", max(prompts, default=0.0), 0.15),
        ("hit rate, largest error", max(hits), 0.03),
        ("memory, largest peak over plan", max(memory), 1.0),
        ("ranges that do not hold", 1.0 - sum(within) / len(within), 0.10),
    ]
    print()
    for name, value, target in targets:
        report.shares(name, [value], target=f"<= {target}", cells=len(results))
    return int(max(memory) > 1.0)


if __name__ == "__main__":
    sys.exit(main())
