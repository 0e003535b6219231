"""How long does it take from starting a process to the first token of a resident model?

    python benchmarks/start.py [--geometries small] [--formats Q4_0] [--repeats 5] [--short]

The file is read once first, so that it is in the page cache: llama.cpp maps it, Argosy copies from there. Both packages
have compiled bytecode, as after installation. Timing starts before the process is created and ends at the first token
after a 16-token prompt. llama.cpp is started through Python here, unlike its own program: the verdict subtracts that
import time from its figure, and nothing from ours.
"""

from __future__ import annotations

import argparse
import compileall
import sys
from collections.abc import Callable
from pathlib import Path

import argosy
from common import Report, alternate
from engines import ARGOSY, LLAMA_CPP, Job, engines, median, parse_cases, prompts, require_documents, run


def sample(engine: str, job: Job, told: list[str]) -> Callable[[], dict[str, float]]:
    def one() -> dict[str, float]:
        done = run(engine, job).require()
        require_documents(done, told)
        (started,) = [event for event in done.events if event["event"] == "started"]
        (token,) = [event for event in done.events if event["event"] == "prefill"]
        first = float(token["at"] - done.started_at)
        return {
            "first": first,
            "less import": first - started["import_s"],
            "import": started["import_s"],
            "load": done.load_s,
        }

    return one


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options, cases = parse_cases(parser, geometries="small", formats="Q4_0", threads="2", repeats=5)
    # With PYTHONDONTWRITEBYTECODE a source tree compiles all modules at every start: 0.1 s that no installation needs.
    compileall.compile_dir(Path(argosy.__file__).parent, quiet=1)
    report = Report("start", state="file in the page cache, a fresh process each time")
    for number, case in enumerate(cases):
        with case.model.open("rb") as file:
            while file.read(16 << 20):
                pass
        job = Job(model=case.model, prompts=prompts(1, 16), num_new=0, threads=case.threads, warm_up=0)
        told: list[str] = []

        samples = alternate({engine: sample(engine, job, told) for engine in engines()}, options.repeats)
        report.correct("; ".join(told))
        if number == 0:
            report.opening()
        first = {}
        for engine, found in samples.items():
            first[engine] = report.figure(
                f"{case.name}: {engine}, first token", "s", found, "first", **case.facts
            )
            report.figure(f"{case.name}: {engine}, of which import", "s", found, "import", **case.facts)
            report.figure(f"{case.name}: {engine}, of which load", "s", found, "load", **case.facts)
        report.ratio(f"{case.name}: seconds", first[ARGOSY], 1.0, target="<= 1.5", row=11, **case.facts)
        if LLAMA_CPP in samples:
            theirs = median([one.values["less import"] for one in samples[LLAMA_CPP]])
            report.ratio(
                f"{case.name}: over {LLAMA_CPP} less its import",
                first[ARGOSY],
                theirs,
                target="<= 1",
                row=11,
                **case.facts,
            )
        report.neighbours([one for found in samples.values() for one in found])
    return 0


if __name__ == "__main__":
    sys.exit(main())
