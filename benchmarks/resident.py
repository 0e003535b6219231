"""How fast does decode run with the whole model in memory, beside llama.cpp and beside the memory itself?

    python benchmarks/resident.py [--geometries mid] [--formats Q4_0,Q8_0] [--threads 1,2] [--repeats 3] [--short]

Each sample is a fresh process that loads the file, warms up on one document and then decodes others, greedily, A B A B.
The read bandwidth of the memory is measured right before each sample; the wall is that over the weights of one token.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from argosy.model.families import open_model
from common import Report, alternate, probe_machine
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
    token_bytes,
)

PROMPT_TOKENS = 32
DOCUMENTS = 2  # one to warm up, one to measure


def sample(engine: str, job: Job, told: list[str]) -> Callable[[], dict[str, float]]:
    def one() -> dict[str, float]:
        before = probe_machine(job.threads)
        done = run(engine, job).require()
        sentence = require_documents(done, 1)
        if sentence not in told:
            told.append(sentence)
        values = {"decode": done.decode_tok_per_s, "load": done.load_s}
        return values | {key: value for key, value in before.items() if key.startswith("memory")}

    return one


def measure(report: Report, case: Case, options: argparse.Namespace, *, is_first: bool) -> None:
    num_new = 16 if options.short else options.new
    job = Job(
        model=case.model,
        prompts=prompts(DOCUMENTS, PROMPT_TOKENS),
        num_new=num_new,
        threads=case.threads,
    )
    told: list[str] = []
    samples = alternate({engine: sample(engine, job, told) for engine in engines()}, options.repeats)
    report.correct("; ".join(told))
    if is_first:
        report.opening()
    nbytes = token_bytes(open_model(case.model))
    every = [one for found in samples.values() for one in found]
    memory = report.figure(f"{case.name}: memory", "GB/s", every, "memory GB/s", **case.facts)
    wall = memory * 1e9 / nbytes
    ours = report.figure(f"{case.name}: {ARGOSY}", "tok/s", samples[ARGOSY], "decode", **case.facts)
    reached = [one.values["decode"] * nbytes / 1e9 / one.values["memory GB/s"] for one in samples[ARGOSY]]
    is_asked = case.geometry == "mid" and case.format in ("Q4_0", "Q8_0")
    report.ratio(
        f"{case.name}: weight bytes/s over memory's",
        sorted(reached)[len(reached) // 2],
        1.0,
        target=">= 0.85" if is_asked else "",
        row=1 if is_asked else None,
        token_bytes=nbytes,
        wall_tok_per_s=wall,
        **case.facts,
    )
    if LLAMA_CPP in samples:
        theirs = report.figure(
            f"{case.name}: {LLAMA_CPP}", "tok/s", samples[LLAMA_CPP], "decode", **case.facts
        )
        target = min(1.5, 0.9 * wall / theirs)
        report.ratio(
            f"{case.name}: over {LLAMA_CPP}", ours, theirs, target=f">= {target:.2f}", row=2, **case.facts
        )
    report.neighbours(every)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--new", type=int, default=64, help="tokens of each answer")
    options, cases = parse_cases(parser)
    report = Report(
        "resident", state="file in the page cache or not, weights in memory, warmed by one answer"
    )
    for number, case in enumerate(cases):
        measure(report, case, options, is_first=number == 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
