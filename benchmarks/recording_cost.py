"""What does counting the routing cost, as a share of decode?

    python benchmarks/recording_cost.py [--model demo] [--memory 1GiB] [--tokens 512] [--repeats 5] [--short]

Two engines answer the same prompts in turns: one with the recorder of `argosy serve`, which keeps the last choices,
too, and one without. In the first, the processor time inside `Engine._note_routes` is added up: all that recording does
in Python. What native code does is copy a few numbers a layer. The figure is the share of this time in a step whose
processor time is spread evenly over the compute threads, so other work on the machine hardly changes it. The ratio of
the two engines' rates is printed beside it; that one varies by more than the figure.

The answers of both must be equal.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

from argosy import Engine, SamplingParams
from argosy.checkpoint.files import ModelFiles
from argosy.config import EngineConfig
from argosy.observe.recorder import Recorder
from common import Report

TARGET = 0.01
PROMPTS = (
    "Write a short story about a ship that comes home.",
    "Write a Python function that adds two numbers.",
    "I have 5 apples and buy 7 more. How many apples do I have?",
)


def decode(engine: Engine, prompt: str, num_new: int) -> tuple[float, float, list[int]]:
    """Seconds of the steps after the first token, and the answer: seconds on the clock, of the processor a thread."""
    sequence = engine.submit(prompt, SamplingParams(max_tokens=num_new + 1, ignore_eos=True))
    while sequence.first_token_at is None:
        engine.step()
    started, started_cpu = time.perf_counter(), time.process_time()
    while sequence.result is None:
        engine.step()
    cpu_s = (time.process_time() - started_cpu) / engine.settings.threads
    return time.perf_counter() - started, cpu_s, sequence.new_ids


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--memory", default="1GiB")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--short", action="store_true")
    options = parser.parse_args()
    num_new, repeats = (128, 2) if options.short else (options.tokens, options.repeats)
    report = Report("recording_cost", state=f"{options.model} in {options.memory}, decode")

    def open_recorder(files: ModelFiles, config: EngineConfig) -> Recorder:
        return Recorder(files.config, config, keeps_recent=True)

    spent = 0.0
    # A recorder takes memory, so the contexts could differ, and with them where an answer ends.
    same: dict[str, Any] = {
        "memory": options.memory, "context": num_new + 128, "media": False, "prefix_reuse": False,
    }  # fmt: skip
    with (
        Engine.open(options.model, **same) as off,
        Engine.open(options.model, **same, recorder=open_recorder) as on,
    ):
        plain: Any = on._note_routes

        def timed(*arguments: Any) -> None:
            nonlocal spent
            started = time.thread_time()
            plain(*arguments)
            spent += time.thread_time() - started

        on._note_routes = timed  # type: ignore[method-assign]
        for engine in (off, on):
            decode(engine, PROMPTS[0], 16)
        shares, ratios, rates = [], [], []
        num_equal = num_answers = 0
        for _ in range(repeats):
            for prompt in PROMPTS:
                without_s, _, expected = decode(off, prompt, num_new)
                spent = 0.0
                with_s, cpu_s, found = decode(on, prompt, num_new)
                num_answers += 1
                num_equal += found == expected
                shares.append(spent / cpu_s)
                ratios.append(without_s / with_s)
                rates.append(num_new / with_s)
    report.correct(f"{num_equal}/{num_answers} answers equal those without recording")
    report.opening()
    share, ratio = statistics.median(shares), statistics.median(ratios)
    print(f"decode        {statistics.median(rates):.1f} tok/s while recording")
    print(f"recording     {100 * share:.2f} % of decode ({100 * min(shares):.2f} to {100 * max(shares):.2f})")
    print(f"rate          {ratio:.3f} of that without recording ({min(ratios):.3f} to {max(ratios):.3f})")
    report.record(f"{options.model} recording", "share of decode", shares, [])
    report.record(f"{options.model} rate with over without", "ratio", ratios, [])
    return 0 if share < TARGET and num_equal == num_answers else 1


if __name__ == "__main__":
    sys.exit(main())
