"""How much do eight concurrent sequences gain, compared with the limit that the union of their experts sets?

    python benchmarks/batch.py [--geometries mid] [--formats Q4_0] [--sequences 8] [--repeats 3] [--short]

A step of eight tokens reads every shared weight once, plus the experts that any of them chose. It takes at least as
long as reading those bytes, so the most that eight can gain over one is 8 x (bytes of one step) / (bytes of the shared
step). Eight documents are read to the same length and then decode together; one of them alone takes turns with them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from argosy import Engine, SamplingParams
from argosy.model.families import open_model
from common import Report, alternate, file_bytes, probe_memory
from engines import Case, decode_all, parse_cases, prompts, token_bytes
from random_weights import document

PROMPT_TOKENS = 16


def decode_together(
    engine: Engine, texts: Sequence[Sequence[int]], num_new: int
) -> tuple[float, list[list[int]]]:
    """Seconds of the steps in which every sequence decodes, and the answers."""
    params = SamplingParams(max_tokens=num_new + 1, ignore_eos=True)
    sequences = [engine.submit(list(text), params) for text in texts]
    seconds, made = decode_all(engine, sequences)
    return seconds / made, [list(sequence.new_ids) for sequence in sequences]


def experts_of_a_step(case: Case, texts: Sequence[Sequence[int]], num_new: int) -> float:
    """Mean number of distinct experts per layer in a shared step, reported by the engine; not timed."""
    seen: list[int] = []

    def observe(layer: int, expert_ids: NDArray[np.int32]) -> None:
        if len(expert_ids) == len(texts):
            seen.append(len(np.unique(expert_ids)))

    with open_engine(case, texts, num_new, observe=observe) as engine:
        decode_together(engine, texts, num_new)
    return float(np.mean(seen))


def open_engine(case: Case, texts: Sequence[Sequence[int]], num_new: int, observe: object = None) -> Engine:
    return Engine.open(
        case.model,
        memory=2 * file_bytes(case.model) + (2 << 30),
        threads=case.threads,
        context=(PROMPT_TOKENS + num_new + 64) * len(texts),
        max_sequences=len(texts),
        prefix_reuse=False,
        observe_routes=observe,  # type: ignore[arg-type]
    )


def measure(report: Report, case: Case, options: argparse.Namespace, *, is_first: bool) -> None:
    num_new = 8 if options.short else options.new
    texts = prompts(options.sequences, PROMPT_TOKENS)
    num_experts = experts_of_a_step(case, texts, num_new)
    files = open_model(case.model)
    with open_engine(case, texts, num_new) as engine:
        _, answers = decode_together(engine, texts, num_new)  # also the warm-up
        right = sum(
            answer == document(1 + number, PROMPT_TOKENS + len(answer))[PROMPT_TOKENS:]
            for number, answer in enumerate(answers)
        )
        if right != len(texts):
            raise SystemExit(f"{right}/{len(texts)} answers continue their documents")
        report.correct(f"{right}/{len(texts)} answers continue their documents")
        if is_first:
            report.opening()

        def together() -> dict[str, float]:
            memory = probe_memory(case.threads)
            return {"decode": 1 / decode_together(engine, texts, num_new)[0], "memory GB/s": memory}

        def alone() -> dict[str, float]:
            memory = probe_memory(case.threads)
            return {"decode": 1 / decode_together(engine, texts[:1], num_new)[0], "memory GB/s": memory}

        samples = alternate({"one": alone, "together": together}, options.repeats)
    one = report.figure(f"{case.name}: one", "tok/s", samples["one"], "decode", **case.facts)
    many = report.figure(
        f"{case.name}: {options.sequences} at once", "tok/s", samples["together"], "decode", **case.facts
    )
    one_bytes = token_bytes(files)
    extra = num_experts - files.config.experts_per_token
    shared_bytes = one_bytes + files.expert_bytes // files.config.num_experts * extra
    allowed = options.sequences * one_bytes / shared_bytes
    report.line(
        "bytes",
        f"{one_bytes / 1e6:.0f} MB a step of one, {shared_bytes / 1e6:.0f} MB of {options.sequences}"
        f" ({num_experts:.1f} experts a layer): {allowed:.2f} times as many tokens at most",
    )
    report.ratio(f"{case.name}: {options.sequences} over one", many, one, **case.facts)
    report.ratio(
        f"{case.name}: over what the bytes allow",
        many / one,
        allowed,
        target=">= 0.8" if case.geometry != "tiny" else "",
        row=10,
        experts_of_a_step=num_experts,
        **case.facts,
    )
    report.neighbours([sample for found in samples.values() for sample in found])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--new", type=int, default=32)
    options, cases = parse_cases(parser, geometries="mid", formats="Q4_0", threads="2")
    report = Report("batch", state="weights in memory, warmed by one answer of all")
    for number, case in enumerate(cases):
        measure(report, case, options, is_first=number == 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
