"""Is this version as fast as another one? Decode and prefill, resident and with a quarter of the file, A B A B.

    python benchmarks/versions.py --other ../argosy-before [--geometries small,mid] [--formats Q4_0] [--threads 2]

The other version is a checkout with its own `.venv`, made by `make demo` there. Each sample is a fresh process that
warms up on one document, and prefills and decodes another. With a quarter of the file as its budget, it also reads
experts; the files' page cache is dropped before each sample. Both versions must give the same tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from common import REPOSITORY, Report, alternate, drop_page_cache, file_bytes
from engines import ARGOSY, Job, parse_cases, prompts, run

SMALLEST_BUDGET = 256 << 20  # a quarter of a small file would not hold the process
DOCUMENTS = 2  # one for the warm-up, one to measure
VERSIONS = ("before", "now")
# `python` is what a token costs outside of native code, sampling included.
FIGURES = (
    ("decode", "tok/s", ">= 0.98"),
    ("prefill", "tok/s", ">= 0.98"),
    ("peak", "MiB", "<= 1.03"),
    ("python", "ms", "<= 1.02"),
)


def sample(checkout: Path, job: Job, answers: set[str]) -> Callable[[], dict[str, float]]:
    def one() -> dict[str, float]:
        drop_page_cache(job.model)
        done = run(ARGOSY, job, checkout=checkout).require()
        answers.add(repr(list(done.answers())))
        if len(answers) > 1:
            raise SystemExit("the two versions gave different tokens")
        return {
            "decode": done.decode_tok_per_s,
            "prefill": done.prefill_tok_per_s,
            "peak": done.peak_bytes / (1 << 20),
            "python": 1e3 * (done.part_s("other") + done.part_s("sampling")),
        }

    return one


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--other", type=Path, required=True, help="a built checkout of the other version")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens of the answer")
    options, cases = parse_cases(parser, formats="Q4_0", threads="2")
    checkouts = {"before": options.other.resolve(), "now": REPOSITORY}
    report = Report("versions.py")
    report.opening()
    for case in cases:
        for budget, memory in (
            ("resident", None),
            ("25 %", max(SMALLEST_BUDGET, file_bytes(case.model) // 4)),
        ):
            job = Job(
                model=case.model,
                prompts=prompts(DOCUMENTS, options.prompt),
                num_new=options.new,
                threads=case.threads,
                memory=memory,
            )
            answers: set[str] = set()
            samples = alternate(
                {name: sample(path, job, answers) for name, path in checkouts.items()}, options.repeats
            )
            for key, unit, target in FIGURES:
                facts = {**case.facts, "budget": budget}
                before, now = (
                    report.figure(f"{case.name} {budget} {key}, {name}", unit, samples[name], key, **facts)
                    for name in VERSIONS
                )
                report.ratio(
                    f"{case.name} {budget} {key}, now over before", now, before, target=target, **facts
                )
            report.neighbours([one for each in samples.values() for one in each])


if __name__ == "__main__":
    main()
