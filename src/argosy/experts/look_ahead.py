"""How far a guess of the next layer's experts is to be trusted: as far as it was right before.

    next layer's router, on this layer's hidden state  ->  guess, best first  ->  what is worth a read

Attention changes the hidden state before the next layer's router sees it, so the guess is right most of the time and
not always; the expert it puts first is nearly certain, the last is not. A guess is read only while the drive has little
else to do, so a right one saves up to a whole read, and a wrong one delays what is needed by a few parts of a read and
wears the drive. What is right in less than half of the cases is not read.

Only experts that were missing when they were guessed are counted: those are often less certain than the others, and
they are the ones to be read. Nothing has to be read to count them, so this switches itself on and off.

Elsewhere: the guess is `Stack.look_ahead` (native/ops/stack.cpp); the reads are `cache.py`. `docs/experiments.md` has
what look-ahead gains by how often it is right.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

LEAST_RIGHT = 0.5
# Guesses that are remembered, about: a subject lasts for hundreds of tokens, and a token guesses in every layer.
_REMEMBERED = 256.0
# Before anything is known: not trusted, and a dozen right guesses change that.
_PRIOR_GUESSES, _PRIOR_RIGHT = 12.0, 0.0
# Where no rank is trusted, one step in so many still guesses, to see whether that has changed.
_STEPS_BETWEEN_TRIALS = 16


class LookAhead:
    """Counts, for each rank of a guess, how often an expert that was missing was then asked for."""

    def __init__(self, num_ranks: int, *, least_right: float = LEAST_RIGHT) -> None:
        self._least_right = least_right
        self._guesses = [_PRIOR_GUESSES] * num_ranks
        self._right = [_PRIOR_RIGHT] * num_ranks
        self._trusted = [self.share_right(rank) >= least_right for rank in range(num_ranks)]
        self._pending: dict[int, Mapping[int, int]] = {}  # layer -> missing expert -> rank
        self._layer = -1  # that learnt last
        self._steps = 0

    @property
    def wants_guess(self) -> bool:
        return self._steps % _STEPS_BETWEEN_TRIALS == 0 or True in self._trusted

    def share_right(self, rank: int) -> float:
        return self._right[rank] / self._guesses[rank]

    def is_trusted(self, rank: int) -> bool:
        return self._trusted[rank]

    def trusted(self, by_rank: Sequence[Sequence[int]]) -> list[int]:
        """The experts of a guess that may be relied on, best first."""
        trusted = self._trusted
        return [expert for rank, experts in enumerate(by_rank) if trusted[rank] for expert in experts]

    def remember(self, layer: int, missing: Mapping[int, int]) -> None:
        """Note which experts of a guess were missing, and their rank."""
        self._pending[layer] = missing

    def learn(self, layer: int, asked: Collection[int]) -> None:
        """The layer has come, and these experts were asked for."""
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
