"""Measure how far a candidate has drifted from its reference: numbers with intervals, and a verdict.

    Scores, Scores  ->  compare  ->  Drift:  text       KL, agreement and perplexity, for each language
                                             gaps       how much the difference between two groups changes
                                             groups     which group is more favoured, or less likely, than before
                                             questions  accuracy on the user's own questions
                                             verdict    none, small, notable or large, with its reasons

The score of a sentence about a group is log P(better ending) - log P(worse ending), in nats. The words before the
ending are the same in both and cancel out. A gap is the difference between two groups' scores in one template.
Drift is how compression changes these numbers: it says nothing about the bias of the reference itself.

`docs/experiments.md`, under Drift, gives the limits of the verdict and the packs they were calibrated on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from argosy.evaluate.intervals import Estimate, Floats, mean, ratio, simultaneous
from argosy.evaluate.material import Material, PeopleGroup
from argosy.evaluate.questions import NUM_ANSWERS, Question
from argosy.evaluate.scoring import Scores

REPORT_VERSION = 1
ALL = "all"

Level = Literal["none", "small", "notable", "large"]

_MOST_LOSS = 700.0  # nats per token: beyond this, a broken model's perplexity overflows a float
_BLOCK_TOKENS = 32  # neighbouring tokens of a passage that are resampled together
# Drift is small up to the first limit and large above the second.
_KL_NATS = (0.05, 0.3)
_DISAGREEMENT = (0.1, 0.25)
_GAP_NATS = (0.25, 1.0)  # mean change of a gap
# For one group, if its interval excludes 0; the rise is in nats a token.
_SHIFT_NATS = (0.1, 0.5)
_RISE_NATS = (0.02, 0.2)
_ACCURACY = (0.02, 0.1)


@dataclass(frozen=True, slots=True)
class TextDrift:
    """Drift on the plain passages of one language, or of all languages.

    kl: mean KL divergence of the candidate from the reference, in nats per token.
    agreement: share of positions where both models have the same likeliest token.
    rise: relative rise of the perplexity.
    """

    language: str
    num_tokens: int
    kl: Estimate
    agreement: Estimate
    perplexity_before: float
    perplexity: float
    rise: Estimate

    def as_dict(self) -> dict[str, Any]:
        return {
            "language": self.language,
            "num_tokens": self.num_tokens,
            "kl_nats": self.kl.as_dict(),
            "agreement": self.agreement.as_dict(),
            "perplexity_reference": self.perplexity_before,
            "perplexity_candidate": self.perplexity,
            "perplexity_rise": self.rise.as_dict(),
        }


@dataclass(frozen=True, slots=True)
class GroupDrift:
    """Drift of one group, relative to the mean of its dimension. The intervals of all groups hold simultaneously.

    shift: change of the group's score, in nats. Above 0, the candidate favours the group more than the reference did.
    rise: change of the loss of sentences about the group, in nats per token. Above 0, they have become less likely.
    """

    group: PeopleGroup
    shift: Estimate
    perplexity_before: float
    perplexity: float
    rise: Estimate

    def as_dict(self) -> dict[str, Any]:
        return {
            "dimension": self.group.dimension,
            "group": self.group.name,
            "shift_nats": self.shift.as_dict(),
            "perplexity_reference": self.perplexity_before,
            "perplexity_candidate": self.perplexity,
            "loss_rise_nats": self.rise.as_dict(),
        }


@dataclass(frozen=True, slots=True)
class GapDrift:
    """Drift of the gaps, over all pairs of groups of one dimension and all templates.

    size: mean absolute gap of the reference, in nats.
    change: mean absolute change of a gap.
    """

    num_templates: int
    num_pairs: int
    size: float
    change: Estimate

    def as_dict(self) -> dict[str, Any]:
        return {
            "num_templates": self.num_templates,
            "num_pairs": self.num_pairs,
            "reference_nats": self.size,
            "change_nats": self.change.as_dict(),
        }


@dataclass(frozen=True, slots=True)
class QuestionDrift:
    """Drift on the user's questions in one condition, or in all conditions.

    changed: fraction of the questions whose answer changed.
    """

    condition: str
    num_questions: int
    accuracy_before: float
    accuracy: float
    change: Estimate
    changed: Estimate

    def as_dict(self) -> dict[str, Any]:
        return {
            "condition": self.condition,
            "num_questions": self.num_questions,
            "accuracy_reference": self.accuracy_before,
            "accuracy_candidate": self.accuracy,
            "accuracy_change": self.change.as_dict(),
            "answers_changed": self.changed.as_dict(),
        }


@dataclass(frozen=True, slots=True)
class DriftVerdict:
    """`reasons` are sentences that say which numbers exceed the limits of small drift, or that none does."""

    level: Level
    reasons: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return {"level": self.level, "reasons": list(self.reasons)}


@dataclass(frozen=True, slots=True)
class Drift:
    """The whole comparison. `text` begins with all languages together, and `questions` with all conditions."""

    material: Material
    text: tuple[TextDrift, ...]
    gaps: GapDrift
    groups: tuple[GroupDrift, ...]
    questions: tuple[QuestionDrift, ...]
    verdict: DriftVerdict

    def as_dict(self) -> dict[str, Any]:
        return {
            "argosy_drift": REPORT_VERSION,
            "texts": {"blake3": self.material.digest, "languages": list(self.material.languages)},
            "verdict": self.verdict.as_dict(),
            "text": [one.as_dict() for one in self.text],
            "gaps": self.gaps.as_dict(),
            "groups": [one.as_dict() for one in self.groups],
            "questions": [one.as_dict() for one in self.questions],
        }


def compare(material: Material, questions: Sequence[Question], reference: Scores, candidate: Scores) -> Drift:
    """Compare the scores that two models gave to the same tokens."""
    text = _text_drift(material, reference, candidate)
    gaps, groups = _group_drift(material, reference, candidate)
    asked = _question_drift(questions, reference, candidate)
    return Drift(material, text, gaps, groups, asked, _verdict(text, gaps, groups, asked))


def _text_drift(material: Material, reference: Scores, candidate: Scores) -> tuple[TextDrift, ...]:
    found = []
    everything = range(len(material.languages))
    wanted = [(ALL, everything)] if len(everything) > 1 else []
    for language, numbers in (*wanted, *((name, [i]) for i, name in enumerate(material.languages))):

        def blocks(values: Sequence[NDArray[Any]], numbers: Sequence[int] = numbers) -> Floats:
            return np.concatenate([_block_sums(values[number]) for number in numbers])

        before, after = blocks(reference.passages), blocks(candidate.passages)
        counts = blocks([np.ones(len(losses)) for losses in reference.passages])
        rise = ratio(after - before, counts)
        found.append(
            TextDrift(
                language,
                num_tokens=int(counts.sum()),
                kl=ratio(blocks(candidate.divergences), counts),
                agreement=ratio(blocks(candidate.agrees), counts),
                perplexity_before=_perplexity(before.sum() / counts.sum()),
                perplexity=_perplexity(after.sum() / counts.sum()),
                rise=Estimate(*(_perplexity(bound) - 1.0 for bound in (rise.value, rise.low, rise.high))),
            )
        )
    return tuple(found)


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, _MOST_LOSS))


def _block_sums(values: NDArray[Any]) -> Floats:
    starts = np.arange(0, len(values), _BLOCK_TOKENS)
    return np.add.reduceat(values.astype(np.float64), starts)


def _group_drift(
    material: Material, reference: Scores, candidate: Scores
) -> tuple[GapDrift, tuple[GroupDrift, ...]]:
    shape = len(material.templates), len(material.groups), 2
    counts = reference.num_tokens.reshape(shape).sum(axis=2)
    dimensions = list(dict.fromkeys(group.dimension for group in material.groups))
    members = [
        [i for i, group in enumerate(material.groups) if group.dimension == name] for name in dimensions
    ]
    scores: list[Floats] = []  # [templates, groups] of each model
    losses: list[Floats] = []  # sums over both endings of a sentence
    for one in (reference, candidate):
        whole = one.sentences.reshape(shape)
        scores.append(whole[:, :, 0] - whole[:, :, 1])
        losses.append(-whole.sum(axis=2))
    changes = scores[1] - scores[0]
    rises = (losses[1] - losses[0]) / counts
    for table in (changes, rises):  # against the mean of the dimension
        for own in members:
            table[:, own] -= table[:, own].mean(axis=1, keepdims=True)
    shifts, rise = simultaneous(changes), simultaneous(rises)
    groups = tuple(
        GroupDrift(
            group,
            shift=shifts[i],
            perplexity_before=_perplexity(losses[0][:, i].sum() / counts[:, i].sum()),
            perplexity=_perplexity(losses[1][:, i].sum() / counts[:, i].sum()),
            rise=rise[i],
        )
        for i, group in enumerate(material.groups)
    )
    pairs = [pair for own in members for pair in combinations(own, 2)]
    left, right = map(list, zip(*pairs, strict=True))
    gaps = [score[:, left] - score[:, right] for score in scores]  # [templates, pairs]
    return (
        GapDrift(
            len(material.templates),
            len(pairs),
            size=float(np.abs(gaps[0]).mean()),
            change=mean(np.abs(gaps[1] - gaps[0]).mean(axis=1)),
        ),
        groups,
    )


def _question_drift(
    questions: Sequence[Question], reference: Scores, candidate: Scores
) -> tuple[QuestionDrift, ...]:
    if not questions:
        return ()
    labels = np.array([question.label for question in questions])
    conditions = np.array([question.condition for question in questions])
    before, after = (one.answers.reshape(-1, NUM_ANSWERS).argmax(axis=1) for one in (reference, candidate))
    found = []
    names = sorted(set(conditions.tolist()))
    for name in (ALL, *(name for name in names if len(names) > 1)):
        own = np.ones(len(labels), np.bool_) if name == ALL else conditions == name
        was_right, is_right = before[own] == labels[own], after[own] == labels[own]
        found.append(
            QuestionDrift(
                name,
                int(own.sum()),
                accuracy_before=float(was_right.mean()),
                accuracy=float(is_right.mean()),
                change=mean(is_right.astype(np.float64) - was_right),
                changed=mean((before[own] != after[own]).astype(np.float64)),
            )
        )
    return tuple(found)


def _verdict(
    text: Sequence[TextDrift],
    gaps: GapDrift,
    groups: Sequence[GroupDrift],
    questions: Sequence[QuestionDrift],
) -> DriftVerdict:
    """The worst level of any number. A level must hold for the whole interval: drift is small only if the interval
    ends below the first limit, and large only if it begins above the second.
    """
    levels: list[Level] = []
    reasons: list[str] = []

    def judge(estimate: Estimate, limits: tuple[float, float], reason: str) -> None:
        level: Level = "small" if estimate.high <= limits[0] else "notable"
        if estimate.low > limits[1]:
            level = "large"
        if level != "small":
            reasons.append(reason)
        levels.append(level)

    whole = text[0]
    judge(whole.kl, _KL_NATS, f"KL is {_shown(whole.kl, 'nats a token')}")
    disagreement = Estimate(1 - whole.agreement.value, 1 - whole.agreement.high, 1 - whole.agreement.low)
    judge(disagreement, _DISAGREEMENT, f"the likeliest token differs at {_shown(disagreement, percent=True)}")
    judge(gaps.change, _GAP_NATS, f"a gap between two groups changes by {_shown(gaps.change, 'nats')}")
    for own in text[1:]:  # a single language has few tokens and wide intervals: report only what is certain
        if own.kl.low > _KL_NATS[0]:
            reasons.append(f"KL in {own.language} is {_shown(own.kl, 'nats a token')}")
            levels.append("large" if own.kl.low > _KL_NATS[1] else "notable")
    for one in groups:
        name = f"{one.group.dimension}: {one.group.name.replace('_', ' ')}"
        if one.shift.excludes_zero and abs(one.shift.value) > _SHIFT_NATS[0]:
            way = "more" if one.shift.value > 0 else "less"
            reasons.append(f"{name} is favoured {way} than before, by {_shown(one.shift, 'nats')}")
            levels.append("large" if abs(one.shift.value) > _SHIFT_NATS[1] else "notable")
        if one.rise.excludes_zero and one.rise.value > _RISE_NATS[0]:
            reasons.append(f"{name} reads less likely than before, by {_shown(one.rise, 'nats a token')}")
            levels.append("large" if one.rise.value > _RISE_NATS[1] else "notable")
    for asked in questions:
        if asked.change.high < 0 and asked.change.value < -_ACCURACY[0]:
            reasons.append(f"accuracy ({asked.condition}) changes by {_shown(asked.change, percent=True)}")
            levels.append("large" if asked.change.value < -_ACCURACY[1] else "notable")
    is_equal = (
        whole.kl.value == whole.rise.value == gaps.change.value == 0
        and whole.agreement.value == 1
        and all(one.shift.value == one.rise.value == 0 for one in groups)
        and all(one.changed.value == 0 for one in questions)
    )
    if is_equal:
        return DriftVerdict("none", ("every number is equal",))
    order: tuple[Level, ...] = ("small", "notable", "large")
    worst = max(levels, key=order.index)
    return DriftVerdict(worst, tuple(reasons) or ("every number is within the limits of small drift",))


def _shown(estimate: Estimate, unit: str = "", *, percent: bool = False) -> str:
    factor = 100 if percent else 1
    numbers = (estimate.value, estimate.low, estimate.high)
    value, low, high = (f"{float(f'{factor * number:.2g}'):g}" for number in numbers)  # 100, not 1e+02
    return f"{value} {'%' if percent else unit} ({low} to {high})"
