"""The rules that choose Whisper's next token: the format it was trained to write, and the timestamps in it.

    <|previous|> text of before   <|start|> <|de|> <|transcribe|>   <|0.00|> Guten Tag. <|2.40|><|2.40|> ... <|end|>
    └─ optional ────────────────┘ └─ the task ────────────────────┘ └─ chosen token by token ────────────────────┘

Timestamps come in pairs around text, and never go back. If timestamps together are more likely than any one token of
text, a timestamp is next.

Elsewhere: `transcription.py` asks for one token after another.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from argosy.model.whisper.files import SpecialTokens

LogProbabilities = NDArray[np.float32]


class TokenRules:
    """The rules of one checkpoint.

    Args:
        has_timestamps: timestamps are wanted.
    """

    def __init__(self, special: SpecialTokens, vocab_size: int, *, has_timestamps: bool) -> None:
        self._special = special
        self._has_timestamps = has_timestamps
        self._never = np.zeros(vocab_size, bool)
        self._never[list(special.suppressed)] = True
        if has_timestamps:
            self._never[special.no_timestamps] = True
        self._never_first = self._never.copy()
        self._never_first[list(special.suppressed_first)] = True

    def log_probabilities(self, logits: NDArray[np.float32], chosen: Sequence[int]) -> LogProbabilities:
        """Log probabilities of the next token [vocab_size]; -inf for a token that may not come.

        Args:
            logits: [vocab_size].
            chosen: tokens of this window so far.
        """
        allowed = np.where(self._never if chosen else self._never_first, np.float32(-np.inf), logits)
        if self._has_timestamps:
            self._pair_timestamps(allowed, chosen)
            first = self._special.timestamps
            scores = log_softmax(allowed)
            if np.logaddexp.reduce(scores[first:]) > scores[:first].max():
                allowed[:first] = -np.inf
        return log_softmax(allowed)

    def _pair_timestamps(self, allowed: NDArray[np.float32], chosen: Sequence[int]) -> None:
        """Rule out, in place, what would break the order of timestamps."""
        first = self._special.timestamps
        if not chosen:
            allowed[:first] = -np.inf
            if (most := self._special.most_initial_positions) is not None:
                allowed[first + most + 1 :] = -np.inf
            return
        is_after_time = chosen[-1] >= first
        is_after_pair = is_after_time and (len(chosen) < 2 or chosen[-2] >= first)
        if is_after_pair:
            allowed[first:] = -np.inf
        elif is_after_time:
            allowed[: self._special.end] = -np.inf
        times = [token for token in chosen if token >= first]
        if times:
            is_open = is_after_time and not is_after_pair
            allowed[first : times[-1] + (0 if is_open else 1)] = -np.inf


def log_softmax(logits: NDArray[np.float32]) -> LogProbabilities:
    largest = logits.max()
    if np.isneginf(largest):  # nothing is allowed
        return logits
    shifted = logits - largest
    return np.asarray(shifted - np.log(np.exp(shifted).sum()), np.float32)


def sample(scores: LogProbabilities, temperature: float, generator: np.random.Generator) -> int:
    """Choose a token: the likeliest at temperature 0, on a tie the one with the lower id."""
    if temperature == 0:
        return int(scores.argmax())
    weights = np.exp((scores.astype(np.float64) - scores.max()) / temperature)
    cumulated = np.cumsum(weights)
    return int(np.searchsorted(cumulated, generator.random() * cumulated[-1], side="right"))
