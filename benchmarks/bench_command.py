"""Does `argosy bench` print what the benchmarks measure?

    python benchmarks/bench_command.py [--geometries small] [--formats Q4_0] [--shares 100,40] [--repeats 3] [--short]

`argosy bench --json` and `ours.py`, each in a fresh process, A B A B, with the same model, budget, context and prompts.
A share is of what all experts in memory would take, above the smallest budget. The ratio is the larger median over the
smaller one. The memory of some virtual machines changes its rate by three quarters every few seconds, so each sample
waits until memory has the rate that it had for the first, and is taken again if the rate changed meanwhile.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from argosy.engine.bench import ANSWER_TOKENS, CONTEXT_TOKENS, LONG_TOKENS, SHORT_TOKENS, prompts
from argosy.engine.planning import HERE, find_place, forecaster, open_subject
from argosy.model.families import open_model
from argosy.plan.probes import memory_rate
from argosy.prompt.tokenizer import Tokenizer
from common import Report, Sample, alternate
from engines import ARGOSY, Case, Job, median, parse_cases, run

COMMAND, SCRIPT = "argosy bench", "ours.py"
MOST = "<= 1.03"
SAME_MEMORY, MOST_TRIES, PAUSE_S = 0.08, 40, 1.0


@dataclass(frozen=True, kw_only=True)
class SameContext(Job):
    """A job with the context of `argosy bench`, on which the number of experts in memory depends."""

    @property
    def context(self) -> int:
        return CONTEXT_TOKENS


def by_command(case: Case, memory: int) -> Callable[[], dict[str, float]]:
    command = [sys.executable, "-m", "argosy", "bench", str(case.model), "--json"]
    command += ["--memory", str(memory), "--context", str(CONTEXT_TOKENS), "--threads", str(case.threads)]

    def one() -> dict[str, float]:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"argosy bench failed ({done.returncode}):\n{done.stderr}")
        found: dict[str, Any] = json.loads(done.stdout)["budgets"][0]
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


class SameMemory:
    """Takes samples while memory has one rate, that of the first sample."""

    def __init__(self, threads: int) -> None:
        self._threads, self._rate = threads, memory_rate(threads)

    def _is_same(self) -> bool:
        return abs(memory_rate(self._threads) / self._rate - 1.0) <= SAME_MEMORY

    def of(self, one: Callable[[], dict[str, float]]) -> Callable[[], dict[str, float]]:
        def sample() -> dict[str, float]:
            for _ in range(MOST_TRIES):
                if self._is_same():
                    found = one()
                    if self._is_same():
                        return found
                else:
                    time.sleep(PAUSE_S)
            raise SystemExit(
                f"memory did not keep its rate of {self._rate / 1e9:.0f} GB/s: run it again later"
            )

        return sample


def budget_bytes(case: Case, share: int) -> int:
    with open_subject(str(case.model)) as subject:
        place = find_place(HERE, case.model, threads=case.threads)
        found, _ = forecaster(subject, place, memory="1GiB", context=CONTEXT_TOKENS)
        ends = found.forecast(1, with_curve=False)
    return ends.smallest_bytes + (ends.resident_bytes - ends.smallest_bytes) * share // 100 + (8 << 20)


def compare(report: Report, case: Case, share: int, repeats: int) -> None:
    memory = budget_bytes(case, share)
    same = SameMemory(case.threads)
    ways = {COMMAND: same.of(by_command(case, memory)), SCRIPT: same.of(by_script(case, memory))}
    samples = alternate(ways, repeats)
    if len({sample.values["tokens"] for sample in samples[COMMAND] + samples[SCRIPT]}) != 1:
        raise SystemExit("the two did not decode the same number of tokens")
    for key, unit in (("decode", "tok/s"), ("prefill", "tok/s"), ("first token", "s"), ("hit rate", "")):
        medians = [figure(report, case, share, way, key, unit, samples[way]) for way in (COMMAND, SCRIPT)]
        low, high = sorted(medians)
        report.ratio(f"{case.name} {share} %: {key}, one over the other", high, low, target=MOST, share=share)
    report.neighbours(samples[COMMAND] + samples[SCRIPT])


def figure(
    report: Report, case: Case, share: int, way: str, key: str, unit: str, samples: list[Sample]
) -> float:
    report.figure(f"{case.name} {share} %: {key}, {way}", unit, samples, key, share=share, **case.facts)
    return median([sample.values[key] for sample in samples])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shares", default="100,40", help="of the experts in memory, in percent")
    options, cases = parse_cases(parser, geometries="small", formats="Q4_0", threads="2")
    report = Report("bench_command", state="each in a fresh process; prompts and budgets are the same")
    report.correct("both decode the same number of tokens; hit rates are compared below")
    report.opening()
    for case in cases:
        for share in map(int, options.shares.split(",")):
            compare(report, case, share, options.repeats)
    return 0


if __name__ == "__main__":
    sys.exit(main())
