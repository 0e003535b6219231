"""What does a new user see? The demo model from the command line: start, first word, speed, memory.

    python benchmarks/demo.py [--repeats 5] [--short]

`argosy run` with the default budget (a quarter of the routed experts) and with everything resident, A B A B. The time
to the first word is from the start of the process to its first byte on stdout. The model is made first if it is
missing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from argosy.config import format_bytes
from argosy.demo.locate import locate
from argosy.model.families import open_model
from common import Report, alternate

QUESTION = "What is the capital of France?"
EXPECTED = "Paris"
LONG_QUESTION = "Explain in a few sentences why the sky is blue."
COMMAND = Path(sys.executable).with_name("argosy")


def argosy(*arguments: object) -> list[str]:
    start: Sequence[object] = [COMMAND] if COMMAND.exists() else [sys.executable, "-m", "argosy"]
    return [str(part) for part in (*start, "run", *arguments)]


def answer(*arguments: object) -> dict[str, Any]:
    """The facts that `argosy run --json` prints."""
    done = subprocess.run(
        argosy("--json", *arguments), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"argosy run failed ({done.returncode}):\n{done.stderr}")
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


def seconds_to_first_byte(*arguments: object) -> float:
    started = time.perf_counter()
    with subprocess.Popen(
        argosy("--quiet", *arguments),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        assert process.stdout is not None
        os.read(process.stdout.fileno(), 1)
        seconds = time.perf_counter() - started
        process.stdout.read()
    if process.returncode:
        raise SystemExit(f"argosy run ended with {process.returncode}")
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--new", type=int, default=96, help="tokens of the timed answer")
    parser.add_argument("--short", action="store_true", help="two repeats, 32 tokens")
    options = parser.parse_args()
    if options.short:
        options.repeats, options.new = 2, 32
    made_at = time.perf_counter()
    directory = locate()
    made_s = time.perf_counter() - made_at
    files = open_model(directory)
    model_bytes = files.dense_bytes + files.expert_bytes
    resident = f"{(4 * model_bytes + (1 << 30)) >> 20}MiB"
    variants: dict[str, tuple[str, ...]] = {"quarter": (), "resident": ("--memory", resident)}

    report = Report("demo", state="a fresh process each time; files in the page cache or not, as they are")
    answers = {name: answer(*flags, "--temperature", 0, QUESTION) for name, flags in variants.items()}
    tokens = [found["token_ids"] for found in answers.values()]
    text = answers["quarter"]["text"].strip()
    if tokens[0] != tokens[1] or EXPECTED not in text:
        raise SystemExit(f"wrong answer: {text!r}, tokens {tokens}")
    report.correct(f"{len(tokens[0])}/{len(tokens[0])} tokens equal between budgets: {text!r}")
    report.opening()
    report.line("model", f"{format_bytes(model_bytes)} in {directory.name}, found or made in {made_s:.1f} s")
    for name, found in answers.items():
        plan = found["plan"]
        report.line(
            name,
            f"process {format_bytes(plan['process_bytes'])}, dense {format_bytes(plan['dense_bytes'])}, "
            f"KV {format_bytes(plan['kv_bytes'])}, working {format_bytes(plan['working_bytes'])}, "
            f"experts {format_bytes(plan['expert_cache_bytes'])} "
            f"({plan['expert_slots']} of {plan['experts']}): {format_bytes(plan['total_bytes'])}",
        )

    def sample(flags: tuple[str, ...]) -> dict[str, float]:
        first_byte_s = seconds_to_first_byte(*flags, "--temperature", 0, QUESTION)
        limits = ("--temperature", 0, "--max-tokens", options.new, "--ignore-eos")
        ledger = answer(*flags, *limits, LONG_QUESTION)["ledger"]
        return {
            "first_byte": first_byte_s,
            "prefill": ledger["prefill_tok_per_s"],
            "decode": ledger["decode_tok_per_s"],
            "hit": ledger["hit_rate"],
            "peak": ledger["peak_bytes"] / 2**20,
        }

    samples = alternate(
        {name: lambda f=flags: sample(f) for name, flags in variants.items()}, options.repeats
    )
    medians: dict[str, dict[str, float]] = {}
    for name, found_samples in samples.items():
        medians[name] = {}
        for key, unit, shown in (
            ("first_byte", "s", "process start to first word"),
            ("prefill", "tok/s", "prefill"),
            ("decode", "tok/s", "decode"),
            ("hit", "", "hit rate"),
            ("peak", "MiB", "peak of the process"),
        ):
            medians[name][key] = report.figure(f"{name}: {shown}", unit, found_samples, key)
    report.ratio("quarter over resident: decode", medians["quarter"]["decode"], medians["resident"]["decode"])
    report.neighbours([one for found_samples in samples.values() for one in found_samples])
    return 0


if __name__ == "__main__":
    sys.exit(main())
