"""How fast is prefill with the whole model in memory, compared with llama.cpp and the processor's int8 peak?

    python benchmarks/prefill.py [--geometries mid] [--formats Q4_0,Q8_0] [--threads 1,2] [--tokens 512] [--short]
    python benchmarks/prefill.py --ends 4096 [--repeats 2] [--threads 2]

Each sample is a fresh process that loads the file, reads one document to warm up and then three others of `--tokens`,
A B A B. Operations are those of the weights' matrix products, two per multiply-add, without attention. With q8 weights,
activations have 16 bits and each product runs twice, for the high and the low byte (docs/decisions/0006): the processor
does the *executed* operations, and half of them are *useful*. Both are printed over the peak, which is measured right
before each sample; for weights of 4 to 6 bits they are equal.

`--ends` is another question: what do layers save that run only for the ends of prompts (`argosy/kept/tails.py`)? A
model of DeepSeek-V4.1's layers, a quarter of whose experts fit, reads one prompt with all layers and as it is. Answers
and log-probabilities must be the same.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

from argosy import Engine, SamplingParams
from argosy.config import EngineConfig
from argosy.model.families import open_model
from argosy.open import engine as engine_module
from common import Report, alternate, drop_page_cache, probe_int8, run_inside
from engines import (
    ARGOSY,
    LLAMA_CPP,
    MODELS,
    Case,
    Job,
    engines,
    parse_cases,
    prompts,
    require_documents,
    run,
    token_operations,
)
from giants import Giant, Model
from random_weights import document
from tests.models.tiny_deepseek_v41 import deepseek_v41

DOCUMENTS = 4  # one of them for the warm-up
EVERY, ENDS = "all layers for every token", "the last layers for its end"
SHORT_ENDS = 512  # tokens of the prompt


def model_of_ends(*, short: bool) -> Giant:
    """DeepSeek-V4.1's 40 layers: those from 21 on have no cache but a window of 128. The short one has 12."""
    layers, last = (12, 5) if short else (40, 20)
    sources = [layer for layer in (2, 8, 14, 20) if layer < last] + [last]
    sizes = {
        "vocab_size": 8192,
        "hidden_size": 512 if short else 1024,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "head_dim": 128,
        "q_lora_rank": 256,
        "qk_rope_head_dim": 64,
        "o_groups": 4,
        "o_lora_rank": 128,
        "moe_intermediate_size": 256 if short else 512,
        "n_routed_experts": 16 if short else 64,
        "num_experts_per_tok": 6,
        "sliding_window": 16 if short else 128,
        "compress_ratios": [0, 0, *[2] * (last - 2), *[1] * (layers - last)],
        "kv_source_layer_ids": sources,
        "index_source_layer_ids": [*sources, *range(last + 4, layers, 4)],
        "candidate_source_layer_id": last,
        "candidate_topk_blocks": 64,
        "candidate_block_size": 8,
        "index_head_dim": 64,
        "index_topk": 128,
        "max_position_embeddings": 65_536,
        "engram_layer_ids": [],
    }
    model = Model(deepseek_v41(**sizes), "q4", "q8", "n_routed_experts", {})
    config = model.config()
    directory = MODELS / ("prompt_ends_short" if short else "prompt_ends")
    return Giant(directory, model, config, len(config.moe_layers) * config.num_experts)


def read_inside(options: argparse.Namespace) -> None:
    """Read the prompt in this process, and print the cost as JSON."""
    giant = model_of_ends(short=options.short)
    engine_module.open_files = lambda path, mmproj=None: giant.files()  # type: ignore[misc]
    if options.inside == EVERY:
        EngineConfig.leaves_out_tokens = property(lambda self: False)  # type: ignore[assignment]
    num_new = 8
    with Engine.open(
        giant.directory,
        memory="2GiB",
        expert_slots=giant.num_records // 4,
        threads=options.threads,
        context=options.ends + 2 * num_new,
        chunk_tokens=128 if options.short else 512,
        max_sequences=1,
        prefix_reuse=False,
    ) as engine:
        prompt = document(0, options.ends, vocab=giant.config.vocab_size)
        params = SamplingParams(max_tokens=num_new, temperature=0, ignore_eos=True, logprobs=5)
        sequence = engine.submit(prompt, params)
        start = time.perf_counter()
        while not sequence.new_ids:
            engine.step()
        seconds, ledger = time.perf_counter() - start, engine.ledger
        while sequence.result is None:
            engine.step()
        print(
            json.dumps(
                {
                    "seconds": seconds,
                    "experts": ledger.lookups - ledger.hits,
                    "GB": ledger.bytes_read / 1e9,
                    "slots": engine.plan.slots.own,
                    "answer": repr((sequence.result.token_ids, sequence.result.logprobs)),
                }
            )
        )


def measure_ends(report: Report, options: argparse.Namespace) -> None:
    giant = model_of_ends(short=options.short)
    giant.make()
    answers: list[object] = []

    def one(way: str) -> dict[str, float]:
        for path in giant.directory.iterdir():
            drop_page_cache(path)
        command = ["--inside", way, "--ends", options.ends, "--threads", options.threads]
        done = subprocess.run(
            run_inside("prefill.py", [*command, *(["--short"] if options.short else [])]),
            stdout=subprocess.PIPE,
            check=True,
        )
        found = json.loads(done.stdout)
        answers.append(found.pop("answer"))
        return dict(found)

    samples = alternate({way: partial(one, way) for way in (EVERY, ENDS)}, options.repeats)
    if any(answer != answers[0] for answer in answers):
        raise SystemExit("the answers differ")
    report.correct(f"tokens and log-probabilities of {len(answers)} answers are equal")
    report.opening()
    facts = {"tokens": options.ends, "threads": options.threads}
    slots = samples[ENDS][0].values["slots"]
    report.line("experts", f"{slots:.0f} slots for {giant.num_records} of {giant.record_bytes / 1e6:.2f} MB")
    for unit, key in (("s", "seconds"), ("experts", "experts"), ("GB", "GB")):
        every, ends = (
            report.figure(f"{way}: {key}", unit, samples[way], key, **facts) for way in (EVERY, ENDS)
        )
        # Half of the experts, and those that the reach of 2,414 positions leaves in the other half.
        target = "<= 0.7" if key != "seconds" and not options.short else ""
        report.ratio(f"over all layers: {key}", ends, every, target=target, **facts)


def sample(engine: str, job: Job, told: list[str]) -> Callable[[], dict[str, float]]:
    def one() -> dict[str, float]:
        peak = probe_int8(job.threads)
        done = run(engine, job).require()
        require_documents(done, told)
        return {"prefill": done.prefill_tok_per_s, "int8 Gop/s": peak}

    return one


def measure(report: Report, case: Case, options: argparse.Namespace, *, is_first: bool) -> None:
    count, length = (2, 64) if options.short else (DOCUMENTS, options.tokens)
    job = Job(model=case.model, prompts=prompts(count, length), num_new=0, threads=case.threads)
    told: list[str] = []
    samples = alternate({engine: sample(engine, job, told) for engine in engines()}, options.repeats)
    report.correct("; ".join(told))
    if is_first:
        report.opening()
    every = [one for found in samples.values() for one in found]
    operations = token_operations(open_model(case.model))
    report.figure(f"{case.name}: int8 peak", "Gop/s", every, "int8 Gop/s", **case.facts)
    ours = report.figure(f"{case.name}: {ARGOSY}", "tok/s", samples[ARGOSY], "prefill", **case.facts)
    # Multiplied by the operations per token, this gives a share of the peak.
    per_operation = [one.values["prefill"] / 1e9 / one.values["int8 Gop/s"] for one in samples[ARGOSY]]
    is_asked = case.format in ("Q4_0", "Q8_0")
    report.shares(
        f"{case.name}: operations executed over the peak",
        [share * operations.executed for share in per_operation],
        target=">= 0.5" if is_asked else "",
        row=4 if is_asked else None,
        token_operations=operations.executed,
        **case.facts,
    )
    report.shares(
        f"{case.name}: useful operations over the peak",
        [share * operations.useful for share in per_operation],
        token_operations=operations.useful,
        **case.facts,
    )
    if LLAMA_CPP in samples:
        theirs = report.figure(
            f"{case.name}: {LLAMA_CPP}", "tok/s", samples[LLAMA_CPP], "prefill", **case.facts
        )
        report.ratio(f"{case.name}: over {LLAMA_CPP}", ours, theirs, target=">= 2.5", row=3, **case.facts)
    report.neighbours(every)


def main_of_ends(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="What do layers save that run only for the ends of prompts?")
    parser.add_argument("--ends", type=int, required=True, help="tokens of the prompt")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--short", action="store_true", help="a small model")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.inside:
        read_inside(options)
    else:
        measure_ends(Report("prefill", state="no expert in memory, page cache dropped"), options)
    return 0


def main() -> int:
    if "--ends" in sys.argv:
        return main_of_ends(sys.argv[1:])
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=512)
    options, cases = parse_cases(parser)
    report = Report("prefill", state="weights in memory, KV cache empty, warmed by one prompt")
    for number, case in enumerate(cases):
        measure(report, case, options, is_first=number == 0)
    if options.short:
        return main_of_ends(["--ends", str(SHORT_ENDS), "--repeats", "1", "--short"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
