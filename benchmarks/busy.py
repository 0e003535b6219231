"""How fast is decode when another process keeps one core busy?

    python benchmarks/busy.py [--geometries small] [--formats Q4_0] [--threads 2] [--repeats 3] [--short]

Quiet and busy runs alternate; the neighbour is an endless loop on the first core that this process may use. llama.cpp
runs with its defaults, and again with `OMP_WAIT_POLICY=passive`, which lets its threads sleep at barriers.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping

from common import Report, alternate, tidy_up_when_terminated
from engines import ARGOSY, LLAMA_CPP, PASSIVE, Job, engines, parse_cases, prompts, require_documents, run

TIMEOUT_S = 120.0


@contextlib.contextmanager
def neighbour(*, is_there: bool) -> Iterator[None]:
    if not is_there:
        yield
        return
    core = min(os.sched_getaffinity(0))
    code = f"import os\nos.sched_setaffinity(0, {{{core}}})\nwhile True: pass"
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def sample(
    engine: str, job: Job, environment: Mapping[str, str], told: list[str], *, is_busy: bool
) -> Callable[[], dict[str, float]]:
    def one() -> dict[str, float]:
        with neighbour(is_there=is_busy):
            done = run(engine, job, environment=environment, timeout_s=TIMEOUT_S)
        if done.ended and not done.ended.startswith("stopped"):
            done.require()
        require_documents(done, told)
        return {"decode": done.decode_tok_per_s}

    return one


def main() -> int:
    tidy_up_when_terminated()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--new", type=int, default=64)
    options, cases = parse_cases(parser, geometries="small", formats="Q4_0", threads="2")
    report = Report("busy", state="weights in memory, warmed by one answer")
    for number, case in enumerate(cases):
        job = Job(
            model=case.model,
            prompts=prompts(2, 16),
            num_new=8 if options.short else options.new,
            threads=case.threads,
        )
        told: list[str] = []

        ways: dict[str, tuple[str, Mapping[str, str]]] = {ARGOSY: (ARGOSY, {})}
        if LLAMA_CPP in engines(quiet=number > 0):
            ways |= {LLAMA_CPP: (LLAMA_CPP, {}), f"{LLAMA_CPP}, passive": (LLAMA_CPP, PASSIVE)}
        variants = {
            f"{name}{', busy' if is_busy else ''}": sample(engine, job, environment, told, is_busy=is_busy)
            for name, (engine, environment) in ways.items()
            for is_busy in (False, True)
        }
        samples = alternate(variants, options.repeats)
        report.correct("; ".join(told))
        if number == 0:
            report.opening()
        for name in ways:
            quiet = report.figure(f"{case.name}: {name}", "tok/s", samples[name], "decode", **case.facts)
            busy = report.figure(
                f"{case.name}: {name}, busy", "tok/s", samples[f"{name}, busy"], "decode", **case.facts
            )
            report.ratio(
                f"{case.name}: {name}, busy over quiet",
                busy,
                quiet,
                target=">= 0.4" if name == ARGOSY else "",
                row=13,
                **case.facts,
            )
        report.neighbours([one for name in ways for one in samples[name]])
    return 0


if __name__ == "__main__":
    sys.exit(main())
