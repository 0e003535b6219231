"""How far do float16 and q8 keys and values move the next-token distribution, and how many bytes do they take?

    python benchmarks/kv_formats.py [--model DIR_OR_FILE ...] [--tokens 4096] [--window 1024] [--short]

KL divergence, in nats, from an engine with float32 keys and values to the same model with the others, at every
position of the text: sum over tokens of p (log p - log q). By default: the demo model on real text (`quantisation.py`
says which), and tiny random models of several kinds of attention from `tests/models/reference` on random ids. Routers
of these are often near a tie, and another expert changes the next token: a few positions make up their mean, so they
have a median, and no target.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from argosy import Engine
from argosy.config import DEMO, KvDtype
from common import DATA, REPOSITORY, Report, Sample
from divergence import divergence
from quantisation import held_out_texts, stdlib_texts

TARGETS: Mapping[KvDtype, float] = {"f16": 1e-5, "q8": 1e-3}  # mean, in nats
RANDOM = ("qwen3_moe_plain", "mixtral_window_top1", "deepseek_v3_plain", "gemma4_plain", "qwen3_5_moe_plain")


def open_engine(model: str | Path, kv_dtype: KvDtype, options: argparse.Namespace) -> Engine:
    return Engine.open(
        model,
        memory="2GiB" if model == DEMO else None,
        threads=options.threads,
        kv_dtype=kv_dtype,
        prefix_reuse=False,
    )


def windows(engine: Engine, options: argparse.Namespace) -> Iterator[list[int]]:
    """Runs of tokens that nothing precedes."""
    window = min(options.window, engine.plan.context_tokens - 1)
    if engine.tokenizer is None:
        random = np.random.default_rng(0)
        for _ in range(max(1, options.tokens // window)):
            yield random.integers(0, engine.config.vocab_size, window).tolist()
        return
    texts = held_out_texts(DATA) or stdlib_texts()
    for text in texts.values():
        share = options.tokens // len(texts)
        token_ids = engine.tokenizer.encode(text[: 16 * share])[:share]
        for start in range(0, len(token_ids), window):
            yield token_ids[start : start + window]


def measure(model: str | Path, options: argparse.Namespace, report: Report) -> tuple[bool, Sample]:
    """Print one model's lines; returns whether every mean meets its target."""
    name = str(model) if model == DEMO else Path(model).name
    is_good = True
    with open_engine(model, "f32", options) as reference, Sample() as sample:
        tokens = list(windows(reference, options))
        expected = [reference.logits(window) for window in tokens]
        in_f32 = reference.plan.kv_bytes / reference.plan.context_tokens
        has_target = reference.tokenizer is not None
    print(f"{name:<40}{in_f32 / 1024:>12.2f} KiB a token in f32")
    for kv_dtype, target in TARGETS.items():
        with open_engine(model, kv_dtype, options) as engine:
            found = [
                divergence(logits, engine.logits(window))
                for logits, window in zip(expected, tokens, strict=True)
            ]
            per_token = engine.plan.kv_bytes / engine.plan.context_tokens
        each: NDArray[np.float64] = np.concatenate([values for values, _ in found])
        same = np.concatenate([agrees for _, agrees in found]).mean()
        if not np.isfinite(each).all() or each.min() < -1e-9 or not each.max() > 0:
            raise SystemExit(f"{name}, {kv_dtype}: a divergence of {each.min()} to {each.max()}")
        verdict = ""
        if has_target:
            is_good &= bool(each.mean() <= target)
            verdict = f"   mean {'<=' if each.mean() <= target else 'ABOVE'} {target:g}"
        print(
            f"{'  ' + kv_dtype:<14}{np.median(each):>12.2e}{each.mean():>12.2e}{np.percentile(each, 99):>12.2e}"
            f"{each.max():>12.2e}{same:>11.4f}{per_token / 1024:>8.2f}{per_token / in_f32:>8.3f}{verdict}"
        )
        facts = {"tokens": len(each), "same_best_token": same, "bytes_per_token": per_token}
        report.record(f"{name} {kv_dtype}", "nats", [each.mean()], [sample], target=target, **facts)
    return is_good, sample


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", nargs="*", help="default: the demo model, and random ones")
    parser.add_argument("--tokens", type=int, default=4096, help="in all, of each model")
    parser.add_argument("--window", type=int, default=1024, help="tokens that see each other")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--short", action="store_true", help="1024 tokens in windows of 512")
    options = parser.parse_args()
    if options.short:
        options.tokens, options.window = 1024, 512
    models: list[str | Path] = list(options.model or [])
    if not models:
        models = [DEMO, *(REPOSITORY / "tests" / "models" / "reference" / name for name in RANDOM)]
    report = Report("kv_formats", state="every expert resident or read; windows with nothing before them")
    report.correct("every divergence is finite, none below zero, and some are above")
    report.opening()
    columns = (
        ("median", 12),
        ("mean", 12),
        ("99 %", 12),
        ("largest", 12),
        ("same best", 11),
        ("KiB", 8),
        ("of f32", 8),
    )
    print(f"{'nats':<14}" + "".join(f"{name:>{width}}" for name, width in columns))
    results = [measure(model, options, report) for model in models]
    report.neighbours([sample for _, sample in results])
    return 0 if all(is_good for is_good, _ in results) else 1


if __name__ == "__main__":
    sys.exit(main())
