"""Choose the next token of one sequence from its logits.

    logits -> mask -> bias -> penalties -> temperature -> top_k -> top_p -> min_p -> draw -> token id

    0. Tokens that a grammar does not allow now are excluded. Before `min_tokens`, so are tokens that would end the
       answer: stop tokens, and end tokens unless they are ignored. They stay if a grammar allows nothing else.
    1. `logit_bias` is added.
    2. `repetition_penalty` divides the positive logits and multiplies the negative logits of all prompt and answer
       tokens.
    3. `presence_penalty` is subtracted once from each token in the answer, `frequency_penalty` once per occurrence.
    4. Temperature 0 ends here: the largest logit wins, the lowest id on a tie.
    5. Logits are divided by `temperature`.
    6. `top_k` keeps the k largest; on a tie the lower ids.
    7. `top_p` keeps the most likely tokens until their probabilities, among those still kept, sum to p.
    8. `min_p` keeps the tokens at least p times as likely as the most likely one.
    9. One uniform number picks one of the remaining tokens, ordered from most to least likely.

With a watermark, the likeliest of the remaining tokens are reweighed before step 9, unless a grammar restricts the
choice.

Steps 1 to 3 and 5 to 8 and the watermark follow the order of transformers. llama.cpp uses the same order, except that
it applies the temperature last. Log-probabilities are the model's own, from the logits before step 0.

The number in step 9 depends only on the seed and the length of the answer so far: not on the batch, the budget or the
machine (Philox, Salmon et al., SC 2011).

Elsewhere: `grammar/constraint.py` decides what a grammar allows; `watermark.py` reweighs; the engine decides when an
answer ends; logits come from `model/decoder.py`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from argosy.config import SamplingParams
from argosy.errors import ArgosyError, GrammarError, UsageError

if TYPE_CHECKING:
    from argosy.engine.grammar.constraint import Constraint
    from argosy.engine.watermark import MarkedAnswer

Logits = npt.NDArray[np.float32]

Ids = npt.NDArray[np.int64]

_SORTED_AT_ONCE = 2048  # sorting this many scores costs as much as one pass over a vocabulary
# Share of the best token's weight. Lighter tokens rarely decide where a cut or a draw falls.
_NEAR_THE_BEST = 0.002
_SMALLEST_TEMPERATURE = 1e-37  # a normal float32
# Two sums of the same weights differ by less than this share; a token near the best weighs more than that.
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Sampled:
    """One chosen token, with `logprob` and `top_logprobs` (best first) if requested."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


def derived_seed(seed: int, number: int) -> int:
    """Derive the seed of another answer to the same request."""
    bits: int = np.random.Philox(key=seed, counter=[0, 0, 0, number]).random_raw()
    return bits >> 1


class SamplerState:
    """Everything except logits on which the choice of a sequence's next token depends.

    Attributes:
        seed: this answer's seed; random if none was given.
        step: number of answer tokens so far.
        mark: reweighs tokens for a watermark; None: no watermark.
    """

    def __init__(
        self, prompt_ids: Sequence[int], seed: int | None = None, mark: MarkedAnswer | None = None
    ) -> None:
        self.seed = int.from_bytes(os.urandom(8)) >> 1 if seed is None else seed
        self.step = 0
        self.mark = mark
        self._prompt_ids = np.array(sorted(set(prompt_ids)), np.int64)
        self._counts: dict[int, int] = {}

    def accept(self, token_id: int) -> None:
        """Count one token of the answer."""
        self._counts[token_id] = self._counts.get(token_id, 0) + 1
        self.step += 1
        if self.mark is not None:
            self.mark.accept(token_id)

    def answer_counts(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Return the distinct ids of the answer's tokens, and how often each occurs."""
        ids = np.fromiter(self._counts.keys(), np.int64, len(self._counts))
        return ids, np.fromiter(self._counts.values(), np.float32, len(self._counts))

    def seen_ids(self) -> npt.NDArray[np.int64]:
        """Return the distinct ids of prompt and answer."""
        return np.union1d(self._prompt_ids, self.answer_counts()[0])

    def uniform(self) -> float:
        """Return the uniform number in [0, 1) for this seed and step."""
        bits: int = np.random.Philox(key=self.seed, counter=self.step).random_raw()
        return (bits >> 11) * 2.0**-53


class Sampler:
    """Chooses tokens. It is stateless: each sequence's state is in its `SamplerState`.

    Args:
        end_ids: tokens that end any answer, unless they are ignored.
    """

    def __init__(self, end_ids: Collection[int] = ()) -> None:
        self._end_ids = frozenset(end_ids)

    def sample(
        self,
        logits: Logits,
        params: SamplingParams,
        state: SamplerState,
        constraint: Constraint | None = None,
    ) -> Sampled:
        """Choose the next token, and count it in `state` and in `constraint`.

        Args:
            logits: float32 [vocab]; -inf excludes a token. Not modified.
            params: how to choose.
            state: the sequence's state.
            constraint: the grammar that the answer must follow.

        Raises:
            ArgosyError: a logit is NaN or +inf, or all are -inf: the weights or the arithmetic are broken.
            GrammarError: no token follows the grammar, or the grammar takes too much work.
            UsageError: `logit_bias` names a token outside the vocabulary.
        """
        best_id = _best(logits, f"token {state.step + 1} of the answer")
        allowed = None if constraint is None else constraint.allowed()
        if state.step < params.min_tokens:
            allowed = self._without_ends(allowed, params, logits.size)
        scores = self._adjust(logits, params, state, allowed, best_id)
        mark = state.mark if constraint is None or constraint.is_waiting else None
        while True:
            if params.temperature > 0:
                token_id = _draw(scores, params, state.uniform(), mark)
            else:
                token_id = best_id if scores is logits else int(scores.argmax())
            if constraint is None:
                break
            if scores[token_id] == -math.inf:
                raise GrammarError("no token of this model follows the grammar here")
            if constraint.accept(token_id):
                break
            scores = logits.copy() if scores is logits else scores
            scores[token_id] = -math.inf
        state.accept(token_id)
        if params.logprobs is None:
            return Sampled(token_id)
        return with_logprobs(token_id, logits, params.logprobs)

    def _without_ends(
        self, allowed: npt.NDArray[np.bool_] | None, params: SamplingParams, vocab_size: int
    ) -> npt.NDArray[np.bool_] | None:
        """Remove tokens that would end the answer from `allowed`, unless nothing else remains."""
        going_on = np.ones(vocab_size, np.bool_) if allowed is None else allowed.copy()
        ends = {*params.stop_token_ids, *(() if params.ignore_eos else self._end_ids)}
        going_on[[token_id for token_id in ends if token_id < vocab_size]] = False
        return going_on if going_on.any() else allowed

    def _adjust(
        self,
        logits: Logits,
        params: SamplingParams,
        state: SamplerState,
        allowed: npt.NDArray[np.bool_] | None,
        best_id: int,
    ) -> Logits:
        """Apply mask, bias and penalties. Return the logits themselves if none would change the choice."""
        repeats = params.repetition_penalty != 1.0
        counts = params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
        if not (params.logit_bias or repeats or counts) and (
            allowed is None or (params.temperature == 0 and allowed[best_id])
        ):
            return logits
        scores = logits.copy()
        if allowed is not None:
            scores[~allowed] = -math.inf
        for token_id, bias in params.logit_bias.items():
            if not 0 <= token_id < scores.size:
                raise UsageError(
                    f"logit_bias names token {token_id}; the vocabulary is 0 to {scores.size - 1}"
                )
            scores[token_id] += bias
        if repeats:
            seen = state.seen_ids()
            now = scores[seen]
            penalty = params.repetition_penalty
            # Dividing by a tiny penalty overflows; the result is capped below.
            with np.errstate(over="ignore"):
                changed = np.where(
                    now > 0, now.astype(np.float64) / penalty, now.astype(np.float64) * penalty
                )
            scores[seen] = np.minimum(changed, np.finfo(np.float32).max)
        if counts:
            ids, times = state.answer_counts()
            scores[ids] -= np.float32(params.presence_penalty) + np.float32(params.frequency_penalty) * times
        return scores


def _best(logits: Logits, what: str) -> int:
    """Return the id of the largest logit, the lowest on a tie.

    Raises:
        ArgosyError: the largest logit is not finite.
    """
    best_id = int(logits.argmax())  # the first NaN, if there is one
    best = float(logits[best_id])
    if not math.isfinite(best):
        raise ArgosyError(
            f"the model gave no usable scores for {what}: "
            f"the largest logit is {best}, and {int(np.isnan(logits).sum())} of {logits.size} are NaN",
            hint="the weights may be damaged: check the files, or try another --instruction-set",
        )
    return best_id


def _draw(scores: Logits, params: SamplingParams, uniform: float, mark: MarkedAnswer | None = None) -> int:
    """Apply temperature, truncation and the watermark, then draw once.

    Truncation keeps a leading part of the order that the draw uses, so the part's weight describes it. Only as much of
    the vocabulary is sorted as the cut and the draw require. If every score is -inf, any token may be drawn.
    """
    ids: Ids | None = None
    if 0 < params.top_k < scores.size:
        ids = _largest(scores, params.top_k)
        scores = scores[ids]
    weights = _weights(scores, params.temperature)
    mass = float(weights.sum(dtype=np.float64))
    if math.isnan(mass):
        return 0 if ids is None else int(ids[0])
    if params.top_p < 1.0:
        _, nucleus = _reach(scores, weights, params.top_p * mass, side="left")
        mass = min(mass, nucleus)
    if params.min_p > 0.0:
        likely = weights[weights >= params.min_p].sum(dtype=np.float64)
        mass = min(mass, float(likely))
    at = None if mark is None else _draw_marked(scores, weights, ids, mass, uniform * mass, mark)
    if at is None:
        at, _ = _reach(scores, weights, uniform * mass, side="right")
    return at if ids is None else int(ids[at])


def _draw_marked(
    scores: Logits, weights: Logits, ids: Ids | None, mass: float, target: float, mark: MarkedAnswer
) -> int | None:
    """Draw as `_reach` does, from reweighed tokens.

    Only the likeliest tokens are reweighed: together they keep their share of the draws, and the tail is too light to
    be worth the time.

    Args:
        ids: the token of each score; None: the place is the token.
        mass: the weight of the leading tokens that truncation keeps.
        target: the point in that weight where the draw falls.

    Returns:
        The place of the token in `scores`, or None if the draw is not marked.
    """
    near = np.flatnonzero(weights >= _NEAR_THE_BEST)
    order = _largest(scores[near], min(near.size, _SORTED_AT_ONCE))
    near = near[order]
    sums = np.cumsum(weights[near], dtype=np.float64)
    near = near[: np.searchsorted(sums, mass * (1.0 + _ROUNDING), side="right")]
    if near.size < 2 or target >= (share := float(sums[near.size - 1])):
        return None
    probabilities = weights[near].astype(np.float64) / share
    reweighed = mark.reweigh(near if ids is None else ids[near], probabilities)
    if reweighed is None:
        return None
    sums = np.cumsum(reweighed)
    return int(near[min(int(np.searchsorted(sums, target / share * sums[-1], side="right")), near.size - 1)])


def _reach(
    scores: Logits, weights: Logits, target: float, *, side: Literal["left", "right"]
) -> tuple[int, float]:
    """Add up weights, largest score first (on a tie the lower id), until they sum to at least `target`.

    With `side` "right" the sum must exceed `target`.

    Returns:
        The id whose weight was added last, and the sum.
    """
    above = 0.0  # the weight of all tokens before the candidates
    is_near = weights >= _NEAR_THE_BEST
    ids = np.flatnonzero(is_near)
    near = float(weights[ids].sum(dtype=np.float64))
    is_enough = near >= target if side == "left" else near > target
    if not is_enough and (further := np.flatnonzero(~is_near & (weights > 0))).size:
        above, ids = near, further
    if ids.size > _SORTED_AT_ONCE:  # a flat distribution: sum buckets of scores, and sort only one of them
        found = scores[ids]
        best = found.max()
        if span := float(best - found.min()):
            bucket = ((best - found) * np.float32(_SORTED_AT_ONCE / span)).astype(np.int64)
            sums = above + np.cumsum(np.bincount(bucket, weights[ids]))
            at = min(int(np.searchsorted(sums, target, side=side)), sums.size - 1)
            above, ids = float(sums[at - 1]) if at else above, ids[bucket == at]
    ids = ids[np.argsort(-scores[ids], kind="stable")]
    sums = above + np.cumsum(weights[ids], dtype=np.float64)
    at = min(int(np.searchsorted(sums, target, side=side)), ids.size - 1)
    return int(ids[at]), float(sums[at])


def _weights(scores: Logits, temperature: float) -> Logits:
    """Return e^(score / temperature), scaled so that the best score has weight 1; NaN if every score is -inf."""
    # A tiny temperature sends all scores but the best to -inf, as intended.
    with np.errstate(over="ignore", invalid="ignore"):
        weights: Logits = scores - scores.max()
        weights /= np.float32(max(temperature, _SMALLEST_TEMPERATURE))
        np.exp(weights, out=weights)
    return weights


def _largest(scores: Logits, count: int) -> Ids:
    """Return the ids of the `count` largest scores, largest first; on a tie the lower id comes first and is kept."""
    if count == scores.size:
        return np.argsort(-scores, kind="stable")
    # Partitioning a vocabulary is slow. Few scores lie far above the mean, so a threshold discards most of them first.
    best, mean = float(scores.max()), float(scores.mean(dtype=np.float64))
    found = scores
    for share in (0.5, 0.25, 0.125):
        threshold = mean + share * (best - mean)
        if np.count_nonzero(is_above := scores >= threshold) >= count:
            found = scores[is_above]
            break
    ids = np.flatnonzero(scores >= np.partition(found, found.size - count)[found.size - count])
    return ids[np.argsort(-scores[ids], kind="stable")[:count]]


def with_logprobs(token_id: int, logits: Logits, count: int) -> Sampled:
    """Return a chosen or given token with its log-probability and those of the `count` best tokens.

    Raises:
        ArgosyError: as in `Sampler.sample`.
    """
    log_total = float(logits[_best(logits, "a token of the prompt")]) + math.log(
        _weights(logits, 1.0).sum(dtype=np.float64)
    )
    top = _largest(logits, min(count, logits.size)) if count else ()
    pairs = tuple((int(i), float(logits[i]) - log_total) for i in top)
    return Sampled(token_id, float(logits[token_id]) - log_total, pairs)
