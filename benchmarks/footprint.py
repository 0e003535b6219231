"""How much memory does a resident model take, relative to its file size?

    python benchmarks/footprint.py [--geometries small,mid] [--formats Q4_0,Q8_0] [--short]

The peak is the kernel's `VmHWM` of the process after a prompt and a few tokens. It includes llama.cpp's mapped pages
and its repacked copy of the weights.
"""

from __future__ import annotations

import argparse
import sys

from common import Report, Sample, file_bytes
from engines import ARGOSY, Job, engines, parse_cases, prompts, require_documents, run


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    _, cases = parse_cases(parser, formats="Q4_0,Q8_0", threads="2", repeats=1)
    report = Report("footprint", state="weights in memory, 32 tokens of prompt, 8 of answer")
    is_good = True
    for number, case in enumerate(cases):
        job = Job(model=case.model, prompts=prompts(1, 32), num_new=8, threads=case.threads, warm_up=0)
        for engine in engines(quiet=number > 0):
            with Sample() as sample:
                done = run(engine, job).require()
            told: list[str] = []
            require_documents(done, told)
            report.correct("; ".join(told))
            if number == 0 and engine == ARGOSY:
                report.opening()
            sample.values["peak"] = done.peak_bytes / 2**20
            peak = report.figure(f"{case.name}: {engine}", "MiB", [sample], "peak", **case.facts)
            target = "<= 1.15" if engine == ARGOSY else ""
            ratio = report.ratio(
                f"{case.name}: {engine} over the file",
                peak,
                file_bytes(case.model) / 2**20,
                target=target if case.geometry != "tiny" else "",
                row=14 if engine == ARGOSY else None,
                **case.facts,
            )
            is_good = is_good and (engine != ARGOSY or case.geometry == "tiny" or ratio <= 1.15)
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
