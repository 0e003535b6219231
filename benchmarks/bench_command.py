"""Does `argosy bench` print what the benchmarks measure?

    python benchmarks/bench_command.py [--geometries small] [--formats Q4_0] [--shares 100,40] [--repeats 24] [--short]

What `argosy bench` does at one budget and `ours.py`, each in a fresh process, A B A B, with the same model, budget,
context and prompts. A share is of what all experts in memory would take, above the smallest budget. A ratio is the
geometric mean of those of neighbouring runs, with its 95 % interval: the virtual cores of some machines run at half
their rate whenever a neighbour uses the other thread of a core, so that one pair says little.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from argosy.forecast.bench import (
    ANSWER_TOKENS,
    CONTEXT_TOKENS,
    LONG_TOKENS,
    SHORT_TOKENS,
    measure_alone,
    prompts,
)
from argosy.forecast.planning import HERE, find_place, forecaster, open_subject
from argosy.model.families import open_model
from argosy.prompt.tokenizer import Tokenizer
from common import Report, alternate
from engines import ARGOSY, Case, Job, parse_cases, run

COMMAND, SCRIPT = "argosy bench", "ours.py"
MOST = 0.03  # difference
FIGURES = {"decode": "tok/s", "prefill": "tok/s", "first token": "s", "hit rate": ""}


@dataclass(frozen=True, kw_only=True)
class SameContext(Job):
    """A job with the context of `argosy bench`, on which the number of experts in memory depends."""

    @property
    def context(self) -> int:
        return CONTEXT_TOKENS


def by_command(case: Case, memory: int) -> Callable[[], dict[str, float]]:
    options = {"memory": memory, "context": CONTEXT_TOKENS, "threads": case.threads, "media": False}

    def one() -> dict[str, float]:
        found = measure_alone(str(case.model), options)
        if found["prefill_prompt_tokens"] != LONG_TOKENS:
            raise SystemExit(f"this machine is too slow: prefill of {found['prefill_prompt_tokens']} tokens")
        return {
            "decode": found["decode_tok_per_s"],
            "first token": found["first_token_s"],
            "prefill": found["prefill_tok_per_s"],
            "hit rate": found["hit_rate"],
            "tokens": found["num_decoded"],
        }

    return one


def by_script(case: Case, memory: int) -> Callable[[], dict[str, float]]:
    files = open_model(case.model)
    tokenizer = Tokenizer.open(files.path, files.header)

    def job(num_tokens: int, num_new: int) -> Job:
        return SameContext(
            model=case.model,
            prompts=prompts(tokenizer, files.config.vocab_size, num_tokens),
            num_new=num_new,
            threads=case.threads,
            memory=memory,
        )

    def one() -> dict[str, float]:
        answers = run(ARGOSY, job(SHORT_TOKENS, ANSWER_TOKENS)).require()
        prefills = run(ARGOSY, job(LONG_TOKENS, 0)).require()
        lookups = answers.total("token", "lookups")
        return {
            "decode": answers.decode_tok_per_s,
            "first token": SHORT_TOKENS / answers.prefill_tok_per_s,
            "prefill": prefills.prefill_tok_per_s,
            "hit rate": answers.total("token", "hits") / lookups if lookups else 1.0,
            "tokens": len(answers.decode_s),
        }

    return one


def budget_bytes(case: Case, share: int) -> int:
    with open_subject(str(case.model)) as subject:
        place = find_place(HERE, case.model, threads=case.threads)
        found, _ = forecaster(subject, place, memory="1GiB", context=CONTEXT_TOKENS)
        ends = found.forecast(1, with_curve=False)
    return ends.smallest_bytes + (ends.resident_bytes - ends.smallest_bytes) * share // 100 + (8 << 20)


def compare(report: Report, case: Case, share: int, repeats: int) -> None:
    memory = budget_bytes(case, share)
    ways = {COMMAND: by_command(case, memory), SCRIPT: by_script(case, memory)}
    samples = alternate(ways, repeats)
    if len({sample.values["tokens"] for sample in samples[COMMAND] + samples[SCRIPT]}) != 1:
        raise SystemExit("the two did not decode the same number of tokens")
    for key, unit in FIGURES.items():
        facts: dict[str, Any] = {"share": share, **case.facts}
        name = f"{case.name} {share} %: {key}"
        for way, of_way in samples.items():
            report.figure(f"{name}, {way}", unit, of_way, key, **facts)
        ratio, low, high = over(
            [sample.values[key] for sample in samples[COMMAND]],
            [sample.values[key] for sample in samples[SCRIPT]],
        )
        report.line("", f"{name}: {ratio:.3f} of {SCRIPT}'s, 95 % interval {low:.3f} to {high:.3f}")
        report.ratio(
            f"{name}: either over the other", math.exp(abs(math.log(ratio))), 1.0,
            target=f"<= {1 + MOST}", interval=[low, high], **facts,
        )  # fmt: skip
    report.neighbours(samples[COMMAND] + samples[SCRIPT])


def over(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """The geometric mean of the ratios of pairs, and the ends of its 95 % interval."""
    logs = [math.log(one / other) for one, other in zip(ours, theirs, strict=True)]
    mean = statistics.fmean(logs)
    spread = 1.96 * statistics.stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else math.inf
    return math.exp(mean), math.exp(mean - spread), math.exp(mean + spread)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shares", default="100,40", help="of the experts in memory, in percent")
    options, cases = parse_cases(parser, geometries="small", formats="Q4_0", threads="2", repeats=24)
    report = Report("bench_command", state="each in a fresh process; prompts and budgets are the same")
    report.correct("both decode the same number of tokens; hit rates are compared below")
    report.opening()
    for case in cases:
        for share in map(int, options.shares.split(",")):
            compare(report, case, share, options.repeats)
    return 0


if __name__ == "__main__":
    sys.exit(main())
