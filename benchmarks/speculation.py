"""Does speculation make answers faster where it should, never slower elsewhere, and never different?

    python benchmarks/speculation.py                 # lookup on edits and prose, mtp at two acceptances, all A B A B
    python benchmarks/speculation.py --exact         # 200 prompts x lookup, mtp x two budgets x greedy, sampled
    python benchmarks/speculation.py --short         # a minute: smaller models, fewer answers

*Lookup.* Texts decide what a lookup finds, and a model with random weights writes none. So each answer is given: the
real sampler runs, and then the next token of the text is taken instead of its choice. An edit is a HumanEval solution
in which the function and one argument have other names, behind a prompt with the original; prose is an article of
wikitext-2 behind its beginning. A token is a word, a run of spaces or a mark. Its number is the next one of a document
of the model (`random_weights.py`) where it first occurs in the text. So tokens of a text share experts as recorded, but
neighbours where words return share less than neighbours in a trained model.

*mtp.* The checkpoint is random (`random_weights.py`). Each draft of its draft layer is computed, and then replaced by
the token that the model will choose, or by a wrong one, with the probability that gives the acceptance. Documents are
the model's own, with the overlap of experts that was recorded.

Each comparison prints tok/s without and with speculation; the ratio of neighbouring runs, by the clock and by processor
time, which other processes disturb less; proposed and confirmed tokens; and what steps took with each number of drafts.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from argosy import Engine, SamplingParams
from argosy.engine.ledger import Ledger
from argosy.engine.sampler import Sampled
from argosy.engine.sequence import Sequence as EngineSequence
from common import DATA, Report, alternate
from engines import MODELS, prompts
from make_checkpoint import named_model
from random_weights import DOCUMENT_TOKENS, document

Text = tuple[list[int], list[int]]  # prompt, answer

VOCAB = 32_000
MEMORY, SHORT_MEMORY = "8GiB", "5GiB"  # of a process with two engines
EDIT_TARGET, PROSE_TARGET = ">= 1.4", ">= 0.98"
MTP_TARGETS = {0.6: ">= 1.2", 0.85: ">= 1.4"}
PARAMS: dict[str, Any] = {"ignore_eos": True}


# ── texts ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Words:
    """Words, runs of spaces and marks of one text, numbered as they occur."""

    def __init__(self, text_number: int) -> None:
        self._ids: dict[str, int] = {}
        self._document = document(text_number % (VOCAB // DOCUMENT_TOKENS))

    def encode(self, text: str) -> list[int]:
        words = re.findall(r"\n *|\w+|[^\w\n]", text)
        return [self._ids.setdefault(word, self._document[len(self._ids)]) for word in words]


def edits() -> list[Text]:
    """Solutions of HumanEval with two names changed; those of middle length first."""
    with gzip.open(DATA / "HumanEval.jsonl.gz", "rt", encoding="utf-8") as file:
        problems = [json.loads(line) for line in file]
    texts = []
    for number, problem in enumerate(problems):
        words = Words(number)
        source = problem["prompt"] + problem["canonical_solution"]
        argument = re.search(r"def \w+\((\w+)", problem["prompt"])
        edited = re.sub(rf"\b{problem['entry_point']}\b", "solve", source)
        if argument is not None:
            edited = re.sub(rf"\b{argument[1]}\b", "given", edited)
        ask = f"Rename the function to solve and its first argument to given:\n{source}\nEdited:\n"
        texts.append((words.encode(ask), words.encode(edited)))
    middle = median(len(answer) for _, answer in texts)
    return sorted(texts, key=lambda text: abs(len(text[1]) - middle))


def prose() -> list[Text]:
    """Beginnings of articles, and what follows."""
    articles = re.split(r"\n = [^=]+ = \n", (DATA / "wiki_test.txt").read_text(encoding="utf-8"))
    long = [article[:4000] for article in articles if len(article) > 6000]
    ids = [Words(number).encode(article)[:556] for number, article in enumerate(long)]
    return [(one[:300], one[300:]) for one in ids]


# ── engines ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def answer(engine: Engine, text: Text, given: bool) -> tuple[float, float, float]:
    """Decode one answer; tokens after the first, and their seconds by the clock and of the processor."""
    prompt, wanted = text
    params = SamplingParams(max_tokens=len(wanted), **PARAMS)
    if given:
        _give(engine, wanted)
    sequence = engine.submit(prompt, params)
    while sequence.first_token_at is None:
        engine.step()
    before, began, began_cpu = len(sequence.new_ids), time.perf_counter(), time.process_time()
    while sequence.result is None:
        engine.step()
    seconds, cpu_s = time.perf_counter() - began, time.process_time() - began_cpu
    if sequence.new_ids != wanted:
        raise SystemExit("an answer is not the text that it should be")
    return len(wanted) - before, seconds, cpu_s


def _give(engine: Engine, wanted: Sequence[int]) -> None:
    """Let the sampler work, and take the next token of a text."""
    plain = type(engine._answers.sampler).sample

    def sample(logits: Any, params: Any, state: Any, constraint: Any = None) -> Sampled:
        step = state.step
        plain(engine._answers.sampler, logits, params, state, constraint)
        return Sampled(wanted[step])

    engine._answers.sampler.sample = sample  # type: ignore[method-assign]


def rates(engine: Engine, texts: Sequence[Text], *, given: bool) -> dict[str, float]:
    before = engine.ledger
    found = [answer(engine, text, given) for text in texts]
    after = engine.ledger
    return {
        "tok_per_s": sum(tokens for tokens, _, _ in found) / sum(seconds for _, seconds, _ in found),
        "tok_per_cpu_s": sum(tokens for tokens, _, _ in found) / sum(cpu_s for _, _, cpu_s in found),
        "proposed": after.proposed_tokens - before.proposed_tokens,
        "confirmed": after.confirmed_tokens - before.confirmed_tokens,
        "won_s": (after.won_s or 0.0) - (before.won_s or 0.0),
    }


def compare(
    report: Report,
    name: str,
    off: Engine,
    on: Engine,
    texts: Sequence[Text],
    repeats: int,
    *,
    target: str,
    given: bool,
) -> None:
    """Answer the same texts without and with speculation, in turns."""
    for engine in (off, on):
        if not engine.plan.slots.is_resident:
            raise SystemExit("the experts must be in memory; give two engines more with --memory")
        rates(engine, texts[:1], given=given)
    samples = alternate(
        {
            "off": lambda: rates(off, texts, given=given),
            "on": lambda: rates(on, texts, given=given),
        },
        repeats,
    )
    for variant, label in (("off", "without"), ("on", "with")):
        report.figure(f"{name}, {label}", "tok/s", samples[variant], "tok_per_s")
    pairs = list(zip(samples["on"], samples["off"], strict=True))
    for key, label, wanted in (
        ("tok_per_s", "with / without", target),
        ("tok_per_cpu_s", "the same by processor time", ""),
    ):
        ratios = [with_.values[key] / without.values[key] for with_, without in pairs]
        report.shares(f"{name}, {label}", ratios, target=wanted)
    last = samples["on"][-1].values
    share = last["confirmed"] / last["proposed"] if last["proposed"] else 0.0
    report.line(
        "", f"  {last['proposed']:.0f} proposed, {share:.2f} confirmed, {last['won_s']:.2f} s won (estimate)"
    )
    assert on._drafts.governor is not None
    costs = ", ".join(
        f"{median(cost.last):.2f} with {width}"
        for (_, width), cost in sorted(on._drafts.governor._costs.items())
    )
    report.line("", f"  a step without drafts takes 1, {costs}")
    report.neighbours([*samples["off"], *samples["on"]])


class Accepted:
    """The cost of another drafter's drafts, of which a share is right."""

    def __init__(self, drafter: Any, texts: Sequence[Text], right_share: float) -> None:
        self._drafter, self._right_share = drafter, right_share
        self._answers = {tuple(prompt): wanted for prompt, wanted in texts}
        self._random = random.Random(1)

    def propose(self, sequence: EngineSequence, most: int) -> list[int]:
        proposed = self._drafter.propose(sequence, most)
        coming = self._answers[tuple(sequence.prompt_ids)][len(sequence.new_ids) :]
        return [
            right if self._random.random() < self._right_share else (right + 7) % VOCAB
            for right, _ in zip(coming, proposed, strict=False)
        ]

    def forget(self, sequence: EngineSequence) -> None:
        self._drafter.forget(sequence)


# ── runs ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def settings(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings of the engine that speculates, and of both."""
    return {"draft_tokens": options.draft_tokens}, {
        "memory": options.memory, "threads": options.threads, "max_sequences": 1, "context": 2048,
        "media": False, "prefix_reuse": False,
    }  # fmt: skip


def speed_of_lookup(options: argparse.Namespace, report: Report) -> None:
    short = options.short
    model = options.model or named_model(MODELS, "tiny" if short else "small", "Q4_0")
    print(f"model      {model.name}")
    drafts, same = settings(options)
    with Engine.open(model, **same) as off, Engine.open(model, speculate="lookup", **drafts, **same) as on:
        for name, texts, target in (("edits", edits(), EDIT_TARGET), ("prose", prose(), PROSE_TARGET)):
            some, repeats = (texts[:2], 2) if short else (texts[:12], options.repeats)
            compare(report, f"lookup, {name}", off, on, some, repeats, target=target, given=True)


def speed_of_mtp(options: argparse.Namespace, report: Report) -> None:
    short = options.short
    model = named_model(options.drafting, "drafting-tiny" if short else "drafting", "bf16")
    print(f"model      {model.name}")
    drafts, same = settings(options)
    num_new, repeats = (64, 2) if short else (192, options.repeats)
    with Engine.open(model, **same) as off, Engine.open(model, speculate="mtp", **drafts, **same) as on:
        params = SamplingParams(max_tokens=num_new, ignore_eos=True)
        texts = [
            (prompt, off.generate(prompt, params).token_ids) for prompt in prompts(2 if short else 4, 48)
        ]
        for right_share, target in (*MTP_TARGETS.items(), (0.0, "")):
            on._scheduler._drafter = Accepted(on._drafts.mtp, texts, right_share)
            name = f"mtp, {right_share} accepted"
            compare(report, name, off, on, texts, repeats, target=target, given=False)


def exact(options: argparse.Namespace) -> int:
    """Count the answers that are the same with speculation, prompt by prompt."""
    count = 8 if options.short else 200
    model = named_model(options.drafting, "drafting-tiny", "bf16")
    chosen = random.Random(2)
    asked = []
    for number in range(count):
        prompt = document(chosen.randrange(40), chosen.randrange(60, 200))
        # Every other prompt begins again, so that its answer stands in it.
        asked.append([*prompt, *prompt[: len(prompt) // 2]] if number % 2 else prompt)
    same: dict[str, Any] = {
        "memory": options.memory, "threads": options.threads, "max_sequences": 2, "context": 2048, "media": False,
    }  # fmt: skip

    def answers(**more: Any) -> tuple[list[list[int]], Ledger]:
        found = []
        with Engine.open(model, **same, **more) as engine:
            for temperature in (0.0, 1.0):
                for number, prompt in enumerate(asked):
                    params = SamplingParams(
                        max_tokens=32, temperature=temperature, seed=number, ignore_eos=True
                    )
                    found.append(engine.generate(prompt, params).token_ids)
            return found, engine.ledger

    expected, _ = answers()
    wrong = 0
    for speculate in ("lookup", "mtp"):
        for name, more in (("resident", {}), ("a fifth of the experts", {"expert_slots": 52})):
            found, total = answers(speculate=speculate, **more)
            equal = sum(a == b for a, b in zip(found, expected, strict=True))
            wrong += len(expected) - equal
            print(
                f"{speculate:<7}{name:<24}{equal}/{len(expected)} answers equal, greedy and at temperature 1; "
                f"{total.proposed_tokens} tokens proposed, {total.confirmed_tokens} confirmed"
            )
    return 1 if wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="for lookup; default: small Q4_0")
    parser.add_argument(
        "--drafting", type=Path, default=MODELS, help="directory of the models with a draft layer"
    )
    parser.add_argument(
        "--memory", help=f"of the whole process; default: {MEMORY}, {SHORT_MEMORY} in the short form"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--draft-tokens", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=["lookup", "mtp"], help="compare the speed of this one alone")
    parser.add_argument("--exact", action="store_true")
    parser.add_argument("--short", action="store_true")
    options = parser.parse_args()
    options.memory = options.memory or (SHORT_MEMORY if options.short else MEMORY)
    if options.exact:
        return exact(options)
    report = Report(
        "speculation", state=f"resident, {options.threads} threads, {options.draft_tokens} drafts at most"
    )
    report.correct("every answer must be the text that it should be, or the run ends")
    report.opening()
    if options.only != "mtp":
        speed_of_lookup(options, report)
    if options.only != "lookup":
        speed_of_mtp(options, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
