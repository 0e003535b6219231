"""Decide which guesses of the next layer's experts to trust, by how often past guesses were right.

    next layer's router, on this layer's hidden state  ->  guess, best first  ->  experts worth a read

Attention changes the hidden state before the next layer's router sees it, so the guess is usually but not always right:
its first expert is nearly certain, its last is not. Guessed experts are read only while the drive has little else to
do, so a right guess saves up to a whole read, and a wrong one delays needed reads by a few parts of a read and wears
the drive. A rank that is right less than half of the time is not read.

Only experts that were missing when they were guessed are counted: they are often less certain than the others, and
they are the ones that would be read. Counting them needs no reads, so look-ahead switches itself on and off.

Elsewhere: `Stack.look_ahead` (native/ops/stack.cpp) guesses; `cache.py` reads. `docs/experiments.md` shows the gain of
look-ahead by how often it is right.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

LEAST_RIGHT = 0.5
# Roughly the number of guesses remembered: a subject lasts for hundreds of tokens, and a token guesses in every layer.
_REMEMBERED = 256.0
# A rank starts untrusted; a dozen right guesses change that.
_PRIOR_GUESSES, _PRIOR_RIGHT = 12.0, 0.0
# While no rank is trusted, one step in this many still guesses, to see whether that has changed.
_STEPS_BETWEEN_TRIALS = 16


class LookAhead:
    """For each rank of a guess, counts how often a guessed expert that was missing was then asked for."""

    def __init__(self, num_ranks: int, *, least_right: float = LEAST_RIGHT) -> None:
        self._least_right = least_right
        self._guesses = [_PRIOR_GUESSES] * num_ranks
        self._right = [_PRIOR_RIGHT] * num_ranks
        self._trusted = [self.share_right(rank) >= least_right for rank in range(num_ranks)]
        self._pending: dict[int, Mapping[int, int]] = {}  # layer -> missing expert -> rank
        self._layer = -1  # the last layer that learnt
        self._steps = 0

    @property
    def wants_guess(self) -> bool:
        return self._steps % _STEPS_BETWEEN_TRIALS == 0 or True in self._trusted

    def share_right(self, rank: int) -> float:
        return self._right[rank] / self._guesses[rank]

    def is_trusted(self, rank: int) -> bool:
        return self._trusted[rank]

    def trusted(self, by_rank: Sequence[Sequence[int]]) -> list[int]:
        """The experts of a guess at trusted ranks, best first."""
        trusted = self._trusted
        return [expert for rank, experts in enumerate(by_rank) if trusted[rank] for expert in experts]

    def remember(self, layer: int, missing: Mapping[int, int]) -> None:
        """Record the missing experts of a guess, with their ranks."""
        self._pending[layer] = missing

    def learn(self, layer: int, asked: Collection[int]) -> None:
        """Compare the guess for a layer with the experts that it asked for."""
        self._steps += layer <= self._layer
        self._layer = layer
        missing = self._pending.pop(layer, None)
        if not missing:
            return
        keep = 1.0 - 1.0 / _REMEMBERED
        for expert, rank in missing.items():
            self._guesses[rank] = self._guesses[rank] * keep + 1.0
            self._right[rank] = self._right[rank] * keep + (expert in asked)
            self._trusted[rank] = self.share_right(rank) >= self._least_right
