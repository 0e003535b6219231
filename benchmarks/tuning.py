"""Does the measured choice run as fast as the best fixed one, for each format and number of threads?

    python benchmarks/tuning.py --threads 1 2

Every fixed choice of prefetch (one token), and of prefetch and the tokens from which a tile takes two panels of rows
(2, 4 and 8 tokens), runs in turn with the choice that a probe of this process makes, weights cold. Of the many fixed
choices for few tokens the table has the best one. Rates are the best of many short samples: a neighbour can only slow a
sample down. The probe may take five seconds; its time is printed.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
from collections.abc import Sequence
from typing import get_args

import numpy as np

from argosy import _native
from argosy.config import AskAhead, Format, Tuning
from argosy.machine import tuning
from common import Report, Sample, verdict
from kernels import ARENA_BYTES, COLD_SAMPLE_BYTES, Matrices, best_rate, finite_bits, require_right

FEW_TOKENS = (2, 4, 8)
TARGET = ">= 0.97"


def rates(
    runtimes: Sequence[_native.Runtime], matrices: Matrices, tokens: int, *, rounds: int, seconds: float
) -> list[float]:
    """The best bytes of weights per second of each runtime, which take turns."""
    count = max(1, COLD_SAMPLE_BYTES // matrices.nbytes)
    x = np.random.default_rng(2).standard_normal((tokens, matrices.cols), dtype=np.float32)
    outs = [np.empty((tokens, matrices.rows), np.float32) for _ in range(count)]
    best = [0.0] * len(runtimes)
    for _ in range(rounds):
        for i, runtime in enumerate(runtimes):

            def work(runtime: _native.Runtime = runtime) -> float:
                _native.matmul(runtime, matrices.take(count), x, outs)
                return count * matrices.nbytes

            best[i] = max(best[i], best_rate(work, seconds))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=768)
    parser.add_argument("--cols", type=int, default=2048)
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--formats", nargs="*", choices=tuning.FORMATS, default=tuning.FORMATS)
    sets = _native.instruction_sets()
    parser.add_argument("--instruction-set", choices=sets[1:], default=sets[-1])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=0.05, help="per sample")
    options = parser.parse_args()
    isa = options.instruction_set

    report = Report("tuning", state="weights in no cache")
    memory = _native.Arena(ARENA_BYTES)
    finite_bits(memory)
    formats = [Matrices(memory, format, options.rows, options.cols) for format in options.formats]
    probed: dict[int, tuning.Choices] = {}
    with tempfile.TemporaryDirectory() as own_cache:
        os.environ["ARGOSY_CACHE"] = own_cache
        for threads in options.threads:
            begin = time.perf_counter()
            probed[threads] = tuning.choose(threads, isa)
            report.line("probe", f"{threads} threads: {time.perf_counter() - begin:.2f} s")
    with Sample() as sample:
        lines = []
        for threads in options.threads:
            measured = _native.Runtime(threads, probed[threads].tunings(), isa)
            for matrices in formats:
                require_right(measured, memory, matrices)
            lines += rows(report, measured, formats, threads, isa, options)
    report.correct(f"{len(formats)} formats: the dequantised weights' product, each token its own bits")
    report.opening()
    print(*lines, sep="\n")
    report.line("others", str(sample))


def rows(
    report: Report,
    measured: _native.Runtime,
    formats: Sequence[Matrices],
    threads: int,
    isa: str,
    options: argparse.Namespace,
) -> list[str]:
    """Lines for one number of threads."""
    default = tuning.default_tuning()
    aheads = get_args(AskAhead)
    limits = (*FEW_TOKENS, _native.MOST_FOR_ONE_PANEL + 1) if isa == "avx512" else (default.two_panels_from,)
    ways = [
        default._replace(few_ask_ahead=name, two_panels_from=limit) for name in aheads for limit in limits
    ]

    def fixed(each: Tuning) -> _native.Runtime:
        return _native.Runtime(threads, dict.fromkeys(tuning.FORMATS, each), isa)

    alone = [fixed(default._replace(ask_ahead=name)) for name in aheads]
    few = [fixed(way) for way in ways]
    heads = "".join(f"{name:>14}" for name in (*aheads, "measured")) + f"{'of best':>8}"
    lines = [
        f"{f'{threads} threads':<10}{heads}   {'best for few tokens':<29}{'GB/s':>6}{'measured':>10}{'of best':>9}"
    ]
    for matrices in formats:
        name: Format = matrices.format
        facts = {"format": name, "threads": threads, "instruction_set": isa, "target": TARGET}
        found = rates([*alone, measured], matrices, 1, rounds=options.rounds, seconds=options.seconds)
        share = found[-1] / max(found[:-1])
        report.record("one token, of best", "ratio", [share], [], verdict=verdict(share, TARGET), **facts)
        # Geometric means over the numbers of tokens.
        each = [
            rates([*few, measured], matrices, tokens, rounds=options.rounds, seconds=options.seconds)
            for tokens in FEW_TOKENS
        ]
        means = [math.prod(column) ** (1 / len(each)) for column in zip(*each, strict=True)]
        best, way = max(zip(means[:-1], ways, strict=True))
        few_share = means[-1] / best
        report.record(
            "few tokens, of best", "ratio", [few_share], [], verdict=verdict(few_share, TARGET), **facts
        )
        cells = "".join(f"{rate / 1e9:>14.1f}" for rate in found) + f"{share:>8.2f}"
        said = f"{way.few_ask_ahead}, from {way.two_panels_from}"
        lines.append(
            f"{name:<10}{cells}   {said:<29}{best / 1e9:>6.1f}{means[-1] / 1e9:>10.1f}{few_share:>9.2f}"
            f"  {verdict(min(share, few_share), TARGET)}"
        )
    for runtime in (*alone, *few):
        runtime.close()
    return lines


if __name__ == "__main__":
    main()
