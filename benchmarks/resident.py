"""How fast does decode run with the whole model in memory, compared with llama.cpp and with memory bandwidth?

    python benchmarks/resident.py [--geometries mid] [--formats Q4_0,Q8_0] [--threads 1,2] [--repeats 3] [--short]

Each sample is a fresh process that loads the file, warms up on one document and decodes another, greedily, A B A B. The
limit for a sample is the memory's read bandwidth, measured right before and right after it, over the weights of one
token. Two threads may read at very different rates from one moment to the next, so every run, llama.cpp's too, is
compared with the memory bandwidth of its own moment.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import get_args

from argosy.config import AskAhead
from argosy.model.families import open_model
from common import Report, Sample, alternate, probe_memory
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
DOCUMENTS = 2  # one for the warm-up, one to measure


def sample(
    engine: str, job: Job, told: list[str], environment: Mapping[str, str] | None = None
) -> Callable[[], dict[str, float]]:
    def one() -> dict[str, float]:
        before = probe_memory(job.threads)
        done = run(engine, job, environment=environment).require()
        after = probe_memory(job.threads)
        require_documents(done, told)
        return {
            "decode": done.decode_tok_per_s,
            "load": done.load_s,
            "memory GB/s": statistics.median([before, after]),
        }

    return one


def shares_of_memory(samples: Sequence[Sample], nbytes: int) -> list[float]:
    """Weight bytes per second of each sample, over the memory bandwidth measured beside it."""
    return [one.values["decode"] * nbytes / 1e9 / one.values["memory GB/s"] for one in samples]


def compare_ask_ahead(report: Report, case: Case, options: argparse.Namespace, *, is_first: bool) -> None:
    """Compare the probe's choice at start with each fixed choice, A B C D A B C D."""
    job = Job(
        model=case.model, prompts=prompts(DOCUMENTS, PROMPT_TOKENS), num_new=options.new, threads=case.threads
    )
    told: list[str] = []
    fixed = {name: sample(ARGOSY, job, told, {"ARGOSY_ASK_AHEAD": name}) for name in get_args(AskAhead)}
    samples = alternate({**fixed, "measured": sample(ARGOSY, job, told)}, options.repeats)
    report.correct("; ".join(told))
    if is_first:
        report.opening()
    nbytes = token_bytes(open_model(case.model))
    speeds = {}
    for name, found in samples.items():
        speeds[name] = report.figure(f"{case.name}: ask ahead {name}", "tok/s", found, "decode", **case.facts)
        shares = shares_of_memory(found, nbytes)
        report.shares(f"{case.name}: {name}, weight bytes/s over memory's", shares, **case.facts)
    best = max(speeds[name] for name in fixed)
    report.ratio(
        f"{case.name}: measured over the best", speeds["measured"], best, target=">= 0.97", **case.facts
    )
    report.neighbours([one for found in samples.values() for one in found])


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
    walls, speeds = {}, {}
    for engine, found in samples.items():
        memory = report.figure(
            f"{case.name}: memory beside {engine}", "GB/s", found, "memory GB/s", **case.facts
        )
        walls[engine] = memory * 1e9 / nbytes
        speeds[engine] = report.figure(f"{case.name}: {engine}", "tok/s", found, "decode", **case.facts)
    is_asked = case.geometry == "mid" and case.format in ("Q4_0", "Q8_0")
    report.shares(
        f"{case.name}: weight bytes/s over memory's",
        shares_of_memory(samples[ARGOSY], nbytes),
        target=">= 0.85" if is_asked else "",
        row=1 if is_asked else None,
        token_bytes=nbytes,
        wall_tok_per_s=walls[ARGOSY],
        **case.facts,
    )
    if LLAMA_CPP in samples:
        report.shares(
            f"{case.name}: {LLAMA_CPP}'s over memory's",
            shares_of_memory(samples[LLAMA_CPP], nbytes),
            wall_tok_per_s=walls[LLAMA_CPP],
            **case.facts,
        )
        # One and a half times llama.cpp's speed (two and a half below four bits, where decoding takes longest),
        # or nine tenths of the limit beside Argosy's own runs if that is less.
        wanted = 2.5 if case.format[:3] in ("IQ1", "IQ2", "IQ3") else 1.5
        target = min(wanted, 0.9 * walls[ARGOSY] / speeds[LLAMA_CPP])
        report.ratio(
            f"{case.name}: over {LLAMA_CPP}",
            speeds[ARGOSY],
            speeds[LLAMA_CPP],
            target=f">= {target:.2f}",
            row=2,
            **case.facts,
        )
    report.neighbours([one for found in samples.values() for one in found])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--new", type=int, default=64, help="tokens of each answer")
    parser.add_argument(
        "--ask-ahead",
        action="store_true",
        help="Argosy alone: each fixed choice of prefetch, and the one measured",
    )
    options, cases = parse_cases(parser)
    report = Report(
        "resident", state="file in the page cache or not, weights in memory, warmed by one answer"
    )
    for number, case in enumerate(cases):
        (compare_ask_ahead if options.ask_ahead else measure)(report, case, options, is_first=number == 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
