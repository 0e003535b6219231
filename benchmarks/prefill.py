"""How fast is prefill with the whole model in memory, compared with llama.cpp and the processor's int8 peak?

    python benchmarks/prefill.py [--geometries mid] [--formats Q4_0,Q8_0] [--threads 1,2] [--tokens 512] [--short]

Each sample is a fresh process that loads the file, reads one document to warm up and then three others of `--tokens`,
A B A B. Operations are those of the weights' matrix products, two per multiply-add, without attention. With q8 weights,
activations have 16 bits and each product runs twice, for the high and the low byte (docs/decisions/0006): the processor
does the *executed* operations, and half of them are *useful*. Both are printed over the peak, which is measured right
before each sample; for weights of 4 to 6 bits they are equal.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from argosy.model.families import open_model
from common import Report, alternate, probe_int8
from engines import (
    ARGOSY,
    LLAMA_CPP,
    Case,
    Job,
    engines,
    parse_cases,
    prompts,
    require_documents,
    run,
    token_operations,
)

DOCUMENTS = 4  # one of them for the warm-up


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


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=512)
    options, cases = parse_cases(parser)
    report = Report("prefill", state="weights in memory, KV cache empty, warmed by one prompt")
    for number, case in enumerate(cases):
        measure(report, case, options, is_first=number == 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
