"""Choose the next token of one sequence from its logits.

    logits -> bias -> penalties -> temperature -> top_k -> top_p -> min_p -> draw -> token id

    1. `logit_bias` is added.
    2. `repetition_penalty` divides a positive logit, and multiplies a negative one, of every token of prompt or answer.
    3. `presence_penalty` once, and `frequency_penalty` for each time, are taken off tokens of the answer.
    4. Temperature 0 ends here: the largest logit wins, the lowest id on a tie.
    5. Logits are divided by `temperature`.
    6. `top_k` keeps the k largest; on a tie the lower ids.
    7. `top_p` keeps the most likely tokens until their probabilities, among those kept so far, sum to p.
    8. `min_p` keeps the tokens at least p times as likely as the most likely one.
    9. One uniform number picks a token among those left, most likely first.

Steps 1 to 3 and 5 to 8 are in the order of transformers. llama.cpp has the same, but for the temperature, which it
applies last. Log-probabilities are the model's own: of the logits as they came, before step 1.

The number of step 9 depends on the seed and on how many tokens the answer has: not on the batch, the budget or the
machine (Philox, Salmon et al., SC 2011).

Elsewhere: when an answer ends is the engine's business; logits come from `model/head.py`.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from argosy.config import SamplingParams
from argosy.errors import ArgosyError, UsageError

Logits = npt.NDArray[np.float32]

_FIRST_CANDIDATES = 256  # of a nucleus: most hold fewer, and sorting these is cheap


@dataclass(frozen=True, slots=True)
class Sampled:
    """One chosen token; `logprob` and `top_logprobs` (best first) are there if they were asked for."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


class SamplerState:
    """What the choice of a sequence's next token depends on, beside its logits.

    Attributes:
        seed: of this answer; a fresh one where none was given.
        step: tokens of the answer so far.
    """

    def __init__(self, prompt_ids: Sequence[int], seed: int | None = None) -> None:
        self.seed = secrets.randbits(63) if seed is None else seed
        self.step = 0
        self._prompt_ids = np.unique(np.asarray(prompt_ids, np.int64))
        self._counts: dict[int, int] = {}

    def accept(self, token_id: int) -> None:
        """Count a token of the answer."""
        self._counts[token_id] = self._counts.get(token_id, 0) + 1
        self.step += 1

    def answer_counts(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Ids of the answer's tokens, each once, and how often each is there."""
        ids = np.fromiter(self._counts.keys(), np.int64, len(self._counts))
        return ids, np.fromiter(self._counts.values(), np.float32, len(self._counts))

    def seen_ids(self) -> npt.NDArray[np.int64]:
        """Ids of prompt and answer, each once."""
        return np.union1d(self._prompt_ids, self.answer_counts()[0])

    def uniform(self) -> float:
        """The number from 0 up to, not including, 1 that belongs to this seed and step."""
        bits = np.random.Philox(key=self.seed, counter=self.step)
        return float(np.random.Generator(bits).random())


class Sampler:
    """Chooses tokens. It keeps nothing: what a sequence remembers is in its `SamplerState`."""

    def sample(self, logits: Logits, params: SamplingParams, state: SamplerState) -> Sampled:
        """Choose the next token, and count it in `state`.

        Args:
            logits: float32 [vocab]; -inf excludes a token. Not changed.
            params: how to choose.
            state: of the sequence.

        Raises:
            ArgosyError: a logit is NaN or +inf, or all are -inf: the weights or the arithmetic are broken.
            UsageError: `logit_bias` names a token outside the vocabulary.
        """
        best = logits.max()
        if not np.isfinite(best):
            raise ArgosyError(
                f"the model gave no usable scores for token {state.step + 1} of the answer: "
                f"the largest logit is {best}, and {int(np.isnan(logits).sum())} of {logits.size} are NaN",
                hint="the weights may be damaged: check the files, or try another --instruction-set",
            )
        scores = self._adjust(logits, params, state)
        token_id = int(scores.argmax()) if params.temperature == 0 else self._draw(scores, params, state)
        state.accept(token_id)
        if params.logprobs is None:
            return Sampled(token_id)
        return self._with_logprobs(token_id, logits, params.logprobs)

    def _adjust(self, logits: Logits, params: SamplingParams, state: SamplerState) -> Logits:
        """Bias and penalties; the logits themselves where there are none."""
        repeats = params.repetition_penalty != 1.0
        counts = params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
        if not (params.logit_bias or repeats or counts):
            return logits
        scores = logits.copy()
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
            with np.errstate(over="ignore"):  # a tiny penalty has no larger number to give than the largest
                changed = np.where(
                    now > 0, now.astype(np.float64) / penalty, now.astype(np.float64) * penalty
                )
            scores[seen] = np.minimum(changed, np.finfo(np.float32).max)
        if counts:
            ids, times = state.answer_counts()
            scores[ids] -= np.float32(params.presence_penalty) + np.float32(params.frequency_penalty) * times
        return scores

    def _draw(self, scores: Logits, params: SamplingParams, state: SamplerState) -> int:
        """Temperature, truncation, and one draw.

        Sorting a vocabulary costs more than all the rest, so only as many of the largest scores are sorted as
        settle where truncation cuts and where the draw falls.
        """
        uniform, vocab = state.uniform(), scores.size
        most = min(params.top_k, vocab) if params.top_k else vocab
        total = None if most < vocab else float(_weights(scores, scores.max(), params.temperature).sum())
        count = most if total is None else min(_FIRST_CANDIDATES, vocab)
        while True:
            ids, weights = _largest(scores, count, params.temperature)
            sums = np.cumsum(weights)
            mass = total = float(sums[-1]) if total is None else total
            kept = count
            if params.top_p < 1.0:
                kept = int(np.count_nonzero(sums - weights < params.top_p * total))
            if params.min_p > 0.0:
                kept = min(kept, int(np.count_nonzero(weights >= params.min_p)))
            if kept < count:
                mass = float(sums[kept - 1])
            at = int(np.searchsorted(sums, uniform * mass, side="right"))
            is_cut_known = kept < count or (params.top_p >= 1.0 and params.min_p <= 0.0)
            if count == most or (is_cut_known and at < kept):
                return int(ids[min(at, kept - 1)])
            count = min(8 * count, most)

    def _with_logprobs(self, token_id: int, logits: Logits, count: int) -> Sampled:
        best = logits.max()
        log_total = float(best) + float(np.log(_weights(logits, best, 1.0).sum()))
        top = _largest(logits, min(count, logits.size), 1.0)[0] if count else ()
        pairs = tuple((int(i), float(logits[i]) - log_total) for i in top)
        return Sampled(token_id, float(logits[token_id]) - log_total, pairs)


def _weights(scores: Logits, best: np.float32, temperature: float) -> npt.NDArray[np.float64]:
    with np.errstate(over="ignore"):  # a tiny temperature sends all but the best to -inf, as it should
        result: npt.NDArray[np.float64] = np.exp((scores.astype(np.float64) - float(best)) / temperature)
    return result


def _largest(
    scores: Logits, count: int, temperature: float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Ids and weights of the `count` largest scores, largest first; on a tie the lower id comes first, and stays."""
    if count < scores.size:
        smallest_kept = np.partition(scores, scores.size - count)[scores.size - count]
        ids = np.flatnonzero(scores >= smallest_kept)
    else:
        ids = np.arange(scores.size)
    order = np.argsort(-scores[ids], kind="stable")[:count]
    ids = ids[order]
    return ids, _weights(scores[ids], scores[ids[0]], temperature)
