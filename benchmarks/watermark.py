"""How surely is a watermark found, how seldom where there is none, and what does it cost?

    python benchmarks/watermark.py [--model demo] [--memory 1GiB] [--answers 24] [--keys 40] [--short]

    false positives   texts of people (wikitext, GSM8K, HumanEval), in pieces of 200 tokens, each judged with many keys
    true positives    answers of 200 tokens at several temperatures, as they are and with every fifth word replaced
    without the key   the same answers judged with other keys, and unmarked answers judged with the right one
    perplexity        of marked answers over unmarked ones, by the model itself
    speed             tokens per second, marked over unmarked, in turns
    reference         the same with the bits of the reference implementation (tests/helpers/synthid.py)

A text counts as marked if p <= 1e-4. Two marked answers to the same request must be equal, and so must an unmarked one
and that of an engine without a key.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import json
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from argosy import Engine, SamplingParams
from argosy.config import WATERMARK_DEPTH
from argosy.engine.sequence import Result
from argosy.engine.watermark import KEY_BYTES, Watermark, make_key
from argosy.guard.watermark import Evidence, first_ngrams, judge, log10_p_value
from argosy.prompt.prompt import Prompt
from common import DATA, REPOSITORY, Report, Sample, alternate, tidy_up_when_terminated

sys.path.insert(0, str(REPOSITORY))
from tests.helpers.synthid import ReferenceWatermark

PIECE = 200  # tokens
LEVEL = 1e-4
EDITED = 0.2  # share of the words
SETTINGS = {
    "temperature 1.0": SamplingParams(temperature=1.0),
    "temperature 0.7, top_p 0.95": SamplingParams(temperature=0.7, top_p=0.95),
    "temperature 0.5": SamplingParams(temperature=0.5),
    "temperature 0.3": SamplingParams(temperature=0.3),
}
WEIGHTS = np.array([290 - 9 * i for i in range(WATERMARK_DEPTH)], np.int64)
_WRONG_KEYS = 20
_LEAST_RATE = 0.97


def texts_of_people() -> Iterator[tuple[str, str]]:
    """Names and texts of all corpora that are here."""
    for name in ("wiki_test", "wiki_valid"):
        if (path := DATA / f"{name}.txt").is_file():
            yield "wikitext", path.read_text()
    if (path := DATA / "gsm_train.jsonl").is_file():
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        yield "GSM8K", "\n".join(f"{row['question']}\n{row['answer']}" for row in rows)
    if (path := DATA / "HumanEval.jsonl.gz").is_file():
        rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
        yield "HumanEval", "\n".join(f"{row['prompt']}{row['canonical_solution']}" for row in rows)


@functools.cache
def least_total(num_counted: int) -> int:
    """The smallest total whose p-value is at most LEVEL."""
    mean, most = num_counted * int(WEIGHTS.sum()) // 2, num_counted * int(WEIGHTS.sum())
    deviation = math.sqrt(num_counted * int(np.dot(WEIGHTS, WEIGHTS))) / 2
    low, high = mean + int(3.5 * deviation), min(most + 1, mean + int(3.9 * deviation))
    if num_counted < 20:  # far from a normal distribution
        low, high = 0, most + 1
    while low < high:
        middle = (low + high) // 2
        if log10_p_value(num_counted, middle) <= math.log10(LEVEL):
            high = middle
        else:
            low = middle + 1
    return low


def false_positives(pieces: Sequence[Sequence[int]], keys: Sequence[Watermark]) -> tuple[int, int]:
    """How many of the judgements call a piece marked, and how many judgements there were."""
    counted = [first_ngrams(piece) for piece in pieces]
    ngrams, sizes = np.concatenate(counted), np.array([len(one) for one in counted])
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    bounds = np.array([least_total(int(size)) for size in sizes])
    found = 0
    for key in keys:
        words = key.words(ngrams)
        sums = np.zeros(len(words), np.int64)
        for i, weight in enumerate(WEIGHTS):
            sums += weight * (words >> np.uint64(i) & np.uint64(1)).astype(np.int64)
        found += int((np.add.reduceat(sums, starts) >= bounds).sum())
    return found, len(pieces) * len(keys)


def upper_bound(found: int, of: int) -> float:
    """The rate that gives so few or fewer with a probability of 2.5 % (Clopper and Pearson, 1934)."""
    low, high = found / of, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        log_terms = [
            math.lgamma(of + 1) - math.lgamma(k + 1) - math.lgamma(of - k + 1)
            + k * math.log(middle) + (of - k) * math.log1p(-middle)
            for k in range(found + 1)
        ]  # fmt: skip
        low, high = (middle, high) if sum(map(math.exp, log_terms)) > 0.025 else (low, middle)
    return high


def edited(text: str, others: Sequence[str], seed: int) -> str:
    """The text with every fifth word, on average, replaced by a word of other texts."""
    rng = random.Random(seed)
    words = text.split(" ")
    return " ".join(rng.choice(others) if rng.random() < EDITED else word for word in words)


@dataclass(frozen=True, slots=True)
class Answered:
    """The answers to all prompts with one setting."""

    marked: list[Result]
    plain: list[Result]

    @property
    def nats(self) -> tuple[float, float, float]:
        """Mean -log p of tokens of marked and of plain answers, and the standard error of their difference."""
        means = [
            [-statistics.fmean(one.logprob for one in result.logprobs or ()) for result in results]
            for results in (self.marked, self.plain)
        ]
        differences = [marked - plain for marked, plain in zip(*means, strict=True)]
        error = statistics.stdev(differences) / math.sqrt(len(differences))
        return statistics.fmean(means[0]), statistics.fmean(means[1]), error


def answers(
    engine: Engine, prompts: Sequence[Prompt], params: SamplingParams, *, is_marked: bool
) -> list[Result]:
    """An answer of PIECE tokens to each prompt, eight at once."""
    params = replace(params, max_tokens=PIECE, ignore_eos=True, logprobs=0, watermark=is_marked)
    each = [replace(params, seed=number) for number in range(len(prompts))]
    return [
        result.require()
        for at in range(0, len(prompts), 8)
        for result in _batch(engine, prompts[at : at + 8], each[at : at + 8])
    ]


def _batch(engine: Engine, prompts: Sequence[Prompt], params: Sequence[SamplingParams]) -> list[Result]:
    sequences = [engine.submit(prompt, each) for prompt, each in zip(prompts, params, strict=True)]
    while any(one.result is None for one in sequences):
        engine.step()
    return [one.result for one in sequences if one.result is not None]


def speed(engine: Engine, prompts: Sequence[Prompt], num_new: int, *, is_marked: bool) -> Mapping[str, float]:
    params = SamplingParams(temperature=1.0, max_tokens=num_new, ignore_eos=True, seed=1, watermark=is_marked)
    _batch(engine, prompts, [replace(params, max_tokens=1)] * len(prompts))  # prompts are in the prefix cache
    began = time.perf_counter()
    _batch(engine, prompts, [params] * len(prompts))
    return {"tok/s": len(prompts) * num_new / (time.perf_counter() - began)}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--memory", default="1GiB")
    parser.add_argument("--answers", type=int, default=24)
    parser.add_argument("--keys", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--short", action="store_true")
    options = parser.parse_args()
    num_answers, num_keys, repeats = options.answers, options.keys, options.repeats
    settings = dict(SETTINGS)
    if options.short:
        num_answers, num_keys, repeats = 8, 4, 2
        settings = {name: settings[name] for name in ("temperature 1.0", "temperature 0.5")}
    report = Report("watermark", state=f"{options.model} in {options.memory}")
    tidy_up_when_terminated()
    with tempfile.TemporaryDirectory(prefix="argosy-watermark-") as scratch:
        key_file = Path(scratch) / "mark.key"
        make_key(key_file)
        own = Watermark.read(key_file)
        with Engine.open(options.model, memory=options.memory, watermark=key_file) as engine:
            return _measure(engine, own, report, settings, num_answers, num_keys, repeats, options)


def _measure(
    engine: Engine, own: Watermark, report: Report, settings: Mapping[str, SamplingParams], num_answers: int,
    num_keys: int, repeats: int, options: argparse.Namespace,
) -> int:  # fmt: skip
    assert engine.tokenizer is not None
    encode = engine.tokenizer.encode
    corpora: dict[str, list[list[int]]] = {}
    for name, text in texts_of_people():
        ids = encode(text)
        corpora.setdefault(name, []).extend(
            ids[at : at + PIECE] for at in range(0, len(ids) - PIECE + 1, PIECE)
        )
    opening = corpora.get("wikitext", [])[: 10 * num_answers : 10] or [
        encode(f"Chapter {number}: the ship leaves the harbour. " * 8) for number in range(num_answers)
    ]
    prompts = [Prompt(tuple(ids[:48])) for ids in opening]
    found = {
        name: Answered(
            answers(engine, prompts, params, is_marked=True),
            answers(engine, prompts, params, is_marked=False),
        )
        for name, params in settings.items()
    }
    holds = _correct(engine, report, prompts, found, settings, options)
    report.opening()
    with Sample() as sample:
        holds &= _false_positives(report, corpora, num_keys)
        _true_positives(report, own, encode, found)
        _perplexity(report, found)
    report.neighbours([sample])
    holds &= _speed(engine, report, prompts, repeats)
    _reference(engine, report, prompts, corpora, settings, found, num_keys)
    return 0 if holds else 1


def _correct(
    engine: Engine, report: Report, prompts: Sequence[Prompt], found: Mapping[str, Answered],
    settings: Mapping[str, SamplingParams], options: argparse.Namespace,
) -> bool:  # fmt: skip
    name, params = next(iter(settings.items()))
    params = replace(params, max_tokens=PIECE, ignore_eos=True, seed=0, logprobs=0)
    again = engine.generate(prompts[0], params).token_ids == found[name].marked[0].token_ids
    with Engine.open(options.model, memory=options.memory) as other:
        plain = other.generate(prompts[0], params).token_ids == found[name].plain[0].token_ids
    report.correct(
        f"alone and in a batch {'the same' if again else 'DIFFERENT'} marked tokens; without the mark "
        f"{'the same' if plain else 'DIFFERENT'} ones as without a key"
    )
    return again and plain


def _false_positives(report: Report, corpora: Mapping[str, Sequence[Sequence[int]]], num_keys: int) -> bool:
    keys = [Watermark(number.to_bytes(KEY_BYTES)) for number in range(num_keys)]
    print(
        f"\nfalse positives at p <= {LEVEL:g}: texts of people in pieces of {PIECE} tokens, {num_keys} keys"
    )
    total = judged = 0
    for name, pieces in corpora.items():
        found, of = false_positives(pieces, keys)
        total, judged = total + found, judged + of
        print(f"  {name:<28}{found:6d} of {of:9,d}   {found / of:.1e}, below {upper_bound(found, of):.1e}")
        report.record(f"false positives, {name}", "rate", [found / of], [], judged=of)
    if not judged:
        print("  no texts of people here: ARGOSY_BENCH_DATA names their directory")
        return True
    print(
        f"  {'all':<28}{total:6d} of {judged:9,d}   {total / judged:.1e}, below {upper_bound(total, judged):.1e}"
    )
    # As many as 1e-4 of them are expected, and five standard deviations more are not.
    return total <= LEVEL * judged + 5 * math.sqrt(LEVEL * judged) + 1


def _true_positives(report: Report, own: Watermark, encode: object, found: Mapping[str, Answered]) -> None:
    assert callable(encode)

    def judged(text: str, key: Watermark = own) -> Evidence:
        return judge(key.words(first_ngrams(encode(text))))

    others = [Watermark(bytes([number]) * KEY_BYTES) for number in range(_WRONG_KEYS)]
    print(f"\ntrue positives at p <= {LEVEL:g}, of answers of {PIECE} tokens")
    print(
        f"  {'':<28}{'nats/token':>11}{'marked':>8}{'found':>7}{'log10 p':>9}{'edited':>8}{'log10 p':>9}"
        f"{'other key':>11}{'unmarked':>10}"
    )
    for name, answered in found.items():
        words = [word for result in answered.plain for word in result.text.split(" ")]
        whole = [judged(result.text) for result in answered.marked]
        after = [judged(edited(result.text, words, number)) for number, result in enumerate(answered.marked)]
        wrong = [judged(result.text, key).p_value for result in answered.marked for key in others]
        plain = [judged(result.text).p_value for result in answered.plain]
        shares = [sum(one.p_value <= LEVEL for one in each) / len(each) for each in (whole, after)]
        medians = [statistics.median(one.log10_p for one in each) for each in (whole, after)]
        marked = statistics.fmean(result.num_marked / PIECE for result in answered.marked)
        print(
            f"  {name:<28}{answered.nats[1]:11.2f}{marked:8.2f}{shares[0]:7.2f}{medians[0]:9.1f}{shares[1]:8.2f}"
            f"{medians[1]:9.1f}{sum(p <= 0.05 for p in wrong) / len(wrong):11.3f}"
            f"{sum(p <= 0.05 for p in plain) / len(plain):10.3f}"
        )
        report.record(
            f"true positives, {name}", "rate", [shares[0]], [], log10_p=medians[0], edited=shares[1]
        )
    print("  other key, unmarked: the share with p <= 0.05, which chance makes 0.05")


def _perplexity(report: Report, found: Mapping[str, Answered]) -> None:
    print("\nperplexity of marked answers over unmarked ones, by the model")
    for name, answered in found.items():
        marked, plain, error = answered.nats
        ratio, spread = math.exp(marked - plain), 1.96 * error
        low, high = math.exp(marked - plain - spread), math.exp(marked - plain + spread)
        print(f"  {name:<28}{ratio:8.3f}   95 %: {low:.3f} to {high:.3f}")
        report.record(f"perplexity, {name}", "ratio", [ratio], [], low=low, high=high)


def _speed(engine: Engine, report: Report, prompts: Sequence[Prompt], repeats: int) -> bool:
    print()
    holds = True
    for num in (1, 8):
        some = prompts[:num]
        samples = alternate(
            {
                "plain": lambda some=some: speed(engine, some, 64, is_marked=False),  # type: ignore[misc]
                "marked": lambda some=some: speed(engine, some, 64, is_marked=True),  # type: ignore[misc]
            },
            repeats,
        )
        for name in ("plain", "marked"):
            report.figure(f"{name}, {len(some)} at once", "tok/s", samples[name], "tok/s")
        pairs = zip(samples["marked"], samples["plain"], strict=True)
        shares = [one.values["tok/s"] / other.values["tok/s"] for one, other in pairs]
        rate = report.shares(f"marked over plain, {len(some)} at once", shares, target=f">= {_LEAST_RATE}")
        report.neighbours([*samples["marked"], *samples["plain"]])
        holds &= rate >= _LEAST_RATE
    return holds


def _reference(
    engine: Engine, report: Report, prompts: Sequence[Prompt], corpora: Mapping[str, Sequence[Sequence[int]]],
    settings: Mapping[str, SamplingParams], ours: Mapping[str, Answered], num_keys: int,
) -> None:  # fmt: skip
    """The same sampler and score with the reference's hash and table of coins."""
    own = engine.requests._watermark
    assert own is not None
    reference = ReferenceWatermark(b"reference".ljust(KEY_BYTES))
    engine.requests._watermark = reference
    name, params = next(iter(settings.items()))
    try:
        found = answers(engine, prompts, params, is_marked=True)
    finally:
        engine.requests._watermark = own
    means = [
        statistics.fmean(judge(key.words(first_ngrams(one.token_ids))).score or 0.5 for one in results)
        for key, results in ((reference, found), (own, ours[name].marked))
    ]
    print(f"\nbits of the reference implementation, {name}: weighted mean of the tokens as sampled")
    print(f"  {'score':<28}reference {means[0]:.4f}   ours {means[1]:.4f}")
    report.record(f"score, {name}", "mean", [means[1]], [], reference=means[0])
    keys = [ReferenceWatermark(number.to_bytes(KEY_BYTES)) for number in range(num_keys)]
    total = judged = 0
    for pieces in corpora.values():
        positive, of = false_positives(pieces, keys)
        total, judged = total + positive, judged + of
    if judged:
        print(
            f"  its false positives at p <= {LEVEL:g} on the same texts: {total} of {judged:,}, {total / judged:.1e}"
        )


if __name__ == "__main__":
    sys.exit(main())
