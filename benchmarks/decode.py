"""How fast are decode and prefill with every expert resident, with half of them, with a quarter?

    python benchmarks/decode.py [--format q4] [--model DIR] [--compare budget|threads|instruction-set] [--short]

A random checkpoint (or `--model`) answers random prompts, a new one each time round, sampled at temperature 1; the
tokens must be the same in every variant that runs the same instructions. Variants run A B A B. Random routing is close
to uniform, the worst case for a cache, so these are lower bounds of what a trained model reaches at the same residency.

    weights read      bytes of weights that one token needs, times tok/s, over what numpy reads on as many threads
    overlap           max(resident time, missed bytes / drive) over the time of a streamed token: 1 is perfect overlap
    8 at once         tokens of eight sequences together over those of one, and over what the union of their experts
                      allows: the bytes of eight single steps over those of one step together
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from argosy import Engine, SamplingParams, _native
from argosy.checkpoint.files import ModelFiles
from argosy.config import format_bytes
from argosy.model.families import open_model
from common import Report, Sample, alternate
from make_checkpoint import make_model, raw_config

SHARES = {"resident": 1.0, "50 %": 0.5, "25 %": 0.25}  # of the routed experts
BATCH = 8
BATCH_PROMPT_TOKENS = 16


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--format", choices=["bf16", "pack-bf16", "q8", "q4"], default="q4")
    parser.add_argument("--model", type=Path, help="a checkpoint or pack instead of a random one")
    parser.add_argument("--layers", type=int, default=24, help="of the random model; 24 are 2.6 GiB in bf16")
    parser.add_argument("--models", type=Path, help="keep the random checkpoint here for the next run")
    parser.add_argument("--compare", choices=["budget", "threads", "instruction-set"], default="budget")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--short", action="store_true", help="a small model, 64 + 16 tokens, two repeats")
    options = parser.parse_args()
    if options.short:
        options.layers, options.prompt, options.new, options.repeats = 6, 64, 16, 2
    with tempfile.TemporaryDirectory() as scratch:
        model = options.model
        if model is None:
            config = raw_config(hidden=1024, width=768, experts=24, layers=options.layers)
            name = f"decode-{options.layers}-{options.format}"
            model = make_model((options.models or Path(scratch)) / name, config, format=options.format)
        with ExitStack() as stack:
            return measure(options, model, stack)


class Variant:
    """One way to run the model: an engine, and the instruction set it is measured with."""

    def __init__(self, model: Path, files: ModelFiles, options: argparse.Namespace, **setting: Any) -> None:
        self.threads = setting.get("threads", options.threads)
        self.instruction_set = setting.get("instruction_set", _native.instruction_sets()[-1])
        num_slots = round(len(files.experts) * setting.get("share", 1.0))
        self.engine = Engine(
            model,
            memory=4 * (files.dense_bytes + files.expert_bytes) + (2 << 30),
            threads=self.threads,
            context=(options.prompt + options.new) * BATCH,
            expert_slots=max(files.config.experts_per_token, num_slots),
            max_sequences=BATCH,
        )
        vocab = self.engine.config.vocab_size
        self.prompts = [
            np.random.default_rng(seed).integers(0, vocab, options.prompt).tolist() for seed in range(BATCH)
        ]
        # Not greedy: a random model soon repeats itself, and then needs the same few experts.
        self.params = SamplingParams(max_tokens=options.new, temperature=1, seed=1, ignore_eos=True)
        self.token_ids: list[int] = []
        self.num_runs = 0

    def run(self) -> dict[str, float]:
        """One answer: prefill, then decode, each with its own counters."""
        _native.use_instruction_set(self.instruction_set)
        prompt = self.prompts[self.num_runs % BATCH]
        self.num_runs += 1
        self.token_ids = []
        before = at_first = self.engine.ledger
        started = first_at = time.perf_counter()
        for event in self.engine.stream(prompt, self.params):
            if not self.token_ids:
                first_at, at_first = time.perf_counter(), self.engine.ledger
            self.token_ids.append(event.token_id)
        decode_s, num_decoded = time.perf_counter() - first_at, len(self.token_ids) - 1
        after = self.engine.ledger
        lookups = after.lookups - at_first.lookups
        return {
            "prefill": len(prompt) / (first_at - started),
            "decode": num_decoded / decode_s,
            "hit": (after.hits - at_first.hits) / lookups if lookups else 1.0,
            "read_mb": (after.bytes_read - at_first.bytes_read) / 1e6 / num_decoded,
            "prefill_read_mb": (at_first.bytes_read - before.bytes_read) / 1e6,
        }

    def run_batch(self) -> dict[str, float]:
        """Eight answers at once, all of them decoding in every step; and how many experts a layer then needs."""
        _native.use_instruction_set(self.instruction_set)
        # Short prompts are prefilled in one step, so the answers start and end together.
        sequences = [self.engine.submit(prompt[:BATCH_PROMPT_TOKENS], self.params) for prompt in self.prompts]
        self.engine.step()
        started, before = time.perf_counter(), self.engine.ledger
        num_steps = 0
        while not all(sequence.result for sequence in sequences):
            self.engine.step()
            num_steps += 1
        seconds = time.perf_counter() - started
        after, num_layers = self.engine.ledger, len(self.engine.config.moe_layers)
        return {
            "decode": (after.new_tokens - before.new_tokens) / seconds,
            "experts": (after.lookups - before.lookups) / num_steps / num_layers,
        }


def variants(options: argparse.Namespace, model: Path, files: ModelFiles) -> dict[str, Variant]:
    def make(**setting: Any) -> Variant:
        return Variant(model, files, options, **setting)

    if options.compare == "threads":
        return {f"{count} thread{'s' * (count > 1)}": make(threads=count) for count in (1, 2)}
    if options.compare == "instruction-set":
        return {name: make(instruction_set=name) for name in _native.instruction_sets()}
    return {name: make(share=share) for name, share in SHARES.items()}


def measure(options: argparse.Namespace, model: Path, stack: ExitStack) -> int:
    files = open_model(model)
    made = variants(options, model, files)
    for variant in made.values():
        stack.enter_context(variant.engine)
    report = Report(
        "decode", state="expert cache warmed by another answer; weights read with O_DIRECT where it works"
    )
    for variant in made.values():  # also the warm-up
        variant.run()
    report.correct(check(made))
    report.opening()
    record_bytes = files.expert_bytes // len(files.experts)
    report.line(
        "model",
        f"{format_bytes(files.dense_bytes + files.expert_bytes)}, experts {files.expert_format}, "
        f"{len(files.experts)} of {format_bytes(record_bytes)}, {files.config.experts_per_token} a token and layer",
    )
    facts = {"model": str(model.name), "compare": options.compare, "threads": options.threads}
    runs: dict[str, Callable[[], dict[str, float]]] = {name: variant.run for name, variant in made.items()}
    samples = alternate(runs, options.repeats)
    medians: dict[str, dict[str, float]] = {}
    figures = (("prefill", "tok/s"), ("decode", "tok/s"), ("hit", "hit rate"), ("read_mb", "MB/token"))
    for name, found in samples.items():
        medians[name] = {
            key: report.figure(f"{name}: {label(key)}", unit, found, key, **facts)
            for key, unit in figures
            if options.compare == "budget" or unit == "tok/s"
        }
    first, *others = medians
    for name in others:
        for key in ("prefill", "decode"):
            report.ratio(f"{name} over {first}: {key}", medians[name][key], medians[first][key])
    if options.compare == "budget":
        compare_with_hardware(report, options, files, medians, made)
    report.neighbours([sample for found in samples.values() for sample in found])
    return 0


def label(key: str) -> str:
    return {"hit": "hit rate of decode", "read_mb": "read while decoding"}.get(key, key)


def check(made: dict[str, Variant]) -> str:
    """Variants with the same instruction set give the same tokens."""
    expected: dict[str, list[int]] = {}
    for name, variant in made.items():
        if variant.token_ids != expected.setdefault(variant.instruction_set, variant.token_ids):
            raise SystemExit(f"{name} gives other tokens: {variant.token_ids[:8]}...")
    num_tokens = len(next(iter(made.values())).token_ids)
    return f"{num_tokens}/{num_tokens} tokens equal between {', '.join(made)} (within one instruction set)"


def compare_with_hardware(
    report: Report,
    options: argparse.Namespace,
    files: ModelFiles,
    medians: dict[str, dict[str, float]],
    made: dict[str, Variant],
) -> None:
    token_bytes = weight_bytes_per_token(files)
    memory = Sample(values={"rate": memory_bytes_per_s(options.threads) / 1e9})
    record_bytes = files.expert_bytes // len(files.experts)
    path = next(iter(files.experts.values())).pieces[0].path
    num_records = max(64, min(512, (1 << 30) // record_bytes))
    drive = Sample(values={"rate": _native.drive_probe(str(path), record_bytes, num_records, 4, True) / 1e9})
    report.line("a token", f"needs {token_bytes / 1e6:.1f} MB of weights")
    memory_rate = report.figure(f"numpy reads, {options.threads} threads", "GB/s", [memory], "rate")
    drive_rate = report.figure(f"drive, {format_bytes(record_bytes)} records", "GB/s", [drive], "rate")
    resident = medians["resident"]["decode"]
    report.ratio("resident: weights read", resident * token_bytes / 1e9, memory_rate, target=">= 0.85")
    for name in ("50 %", "25 %"):
        reading_s = medians[name]["read_mb"] / 1e3 / drive_rate
        report.ratio(
            f"{name}: overlap", max(1 / resident, reading_s) * medians[name]["decode"], 1, target=">= 0.85"
        )
    (batches,) = alternate({f"{BATCH} at once": made["resident"].run_batch}, options.repeats).values()
    together = report.figure(f"resident, {BATCH} at once: decode", "tok/s", batches, "decode")
    num_experts = report.figure(f"{BATCH} at once: experts of a layer", "", batches, "experts")
    chosen_bytes = files.expert_bytes // files.config.num_experts
    step_bytes = token_bytes + chosen_bytes * (num_experts - files.config.experts_per_token)
    report.ratio(f"{BATCH} at once over one", together, resident)
    allowed = BATCH * token_bytes / step_bytes
    report.ratio(f"{BATCH} at once over what its bytes allow", together / resident, allowed, target=">= 0.80")


def weight_bytes_per_token(files: ModelFiles) -> int:
    """Dense weights without the embedding table (one row), and the chosen experts of every layer."""
    config = files.config
    dense = files.dense_bytes
    if not config.is_embedding_tied:
        dense -= files.dense["embed"].nbytes
    chosen = files.expert_bytes // config.num_experts * config.experts_per_token
    return dense + chosen


def memory_bytes_per_s(threads: int) -> float:
    """What `max` and `dot` of numpy reach over 512 MiB, the best of a few runs: a floor of the machine's bandwidth."""
    parts = [np.ones((512 << 20) // 4 // threads, np.float32) for _ in range(threads)]
    best = 0.0
    for read in (np.max, lambda values: np.dot(values, values)):
        for _ in range(4):
            workers = [threading.Thread(target=read, args=(part,)) for part in parts]
            started = time.perf_counter()
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
            seconds = time.perf_counter() - started
            best = max(best, sum(part.nbytes for part in parts) / seconds)
    return best


if __name__ == "__main__":
    sys.exit(main())
