"""How much sooner does the first token come if this process or another one has computed the prompt before?

    python benchmarks/prefix.py [--geometries small] [--prompt 2040] [--share 100] [--repeats 3] [--short]

Each repeat has its own prompt: computed, requested again, and requested again from a new engine that finds it in
`kv_dir`, with its files not in the page cache. `--share` is the percentage of experts in memory.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from argosy import Engine, SamplingParams
from argosy.model.families import open_model
from common import Report, alternate, drop_page_cache, file_bytes
from engines import Case, parse_cases
from random_weights import document

NEW_TOKENS = 8


def first_token(engine: Engine, number: int, num_tokens: int) -> tuple[float, int]:
    """Seconds to the first token of a document's answer, and the number of reused tokens.

    Raises:
        SystemExit: the answer does not continue the document.
    """
    text = document(number, num_tokens + NEW_TOKENS)
    sequence = engine.submit(text[:num_tokens], SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True))
    begin = time.perf_counter()
    while sequence.first_token_at is None:
        engine.step()
    seconds = time.perf_counter() - begin
    while sequence.result is None:
        engine.step()
    if sequence.result.token_ids != text[num_tokens:]:
        raise SystemExit(f"the answer does not continue document {number}")
    return seconds, sequence.result.usage["cached_tokens"]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--prompt", type=int, default=2040
    )  # 127 KV blocks and the 8 tokens that are left on average
    parser.add_argument("--share", type=int, default=100)
    options, cases = parse_cases(parser, geometries="small", formats="Q4_0", threads="2")
    num_tokens = 248 if options.short else options.prompt
    report = Report("prefix", state=f"{options.share} % of the experts in memory")
    for number, case in enumerate(cases):
        measure(report, case, num_tokens, options, is_first=number == 0)
    return 0


def measure(
    report: Report, case: Case, num_tokens: int, options: argparse.Namespace, *, is_first: bool
) -> None:
    slots = len(open_model(case.model).experts) * options.share // 100

    def open_engine(kv_dir: Path) -> Engine:
        return Engine.open(
            case.model,
            memory=2 * file_bytes(case.model) + (4 << 30),
            threads=case.threads,
            context=2 * (num_tokens + NEW_TOKENS),
            expert_slots=None if options.share == 100 else slots,
            max_sequences=1,
            kv_dir=kv_dir,
        )

    documents = iter(range(1, 1000))

    def run() -> dict[str, float]:
        with tempfile.TemporaryDirectory(dir=options.models) as scratch:
            kv_dir, chosen = Path(scratch) / "kv", next(documents)
            with open_engine(kv_dir) as engine:
                first_token(engine, 0, 32)  # warms the expert cache with a document
                first, _ = first_token(engine, chosen, num_tokens)
                again, found = first_token(engine, chosen, num_tokens)
            for directory in kv_dir.iterdir():
                if directory.is_dir():
                    drop_page_cache(directory)
            with open_engine(kv_dir) as engine:
                first_token(engine, 0, 32)
                restarted, found_in_files = first_token(engine, chosen, num_tokens)
            if found < num_tokens - 16 or found_in_files != found:
                raise SystemExit(f"{found} and {found_in_files} of {num_tokens} tokens were found")
        return {"first s": first, "again s": again, "restarted s": restarted}

    report.correct(f"every answer continues its document, {num_tokens} tokens; all but the last block found")
    if is_first:
        report.opening()
    samples = alternate({"prompt": run}, options.repeats)["prompt"]
    facts = {**case.facts, "prompt": num_tokens, "share": options.share}
    first = report.figure(f"{case.name}: computed", "s", samples, "first s", **facts)
    again = report.figure(f"{case.name}: found in memory", "s", samples, "again s", **facts)
    restarted = report.figure(f"{case.name}: found in files", "s", samples, "restarted s", **facts)
    target = ">= 20" if not options.short else ""
    report.ratio(f"{case.name}: first over found in memory", first, again, target=target, row=15, **facts)
    report.ratio(f"{case.name}: first over found in files", first, restarted, target=target, row=15, **facts)
    report.neighbours(samples)


if __name__ == "__main__":
    sys.exit(main())
