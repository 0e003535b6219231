"""A drafter that proposes right and wrong tokens at random, to show that drafts never change an answer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from argosy.engine.sequence import Sequence as EngineSequence


class RandomDrafter:
    """Proposes tokens that depend only on the seed and the sequence, not on earlier calls.

    Args:
        vocab_size: random tokens are drawn from the whole vocabulary, so a few of them are right by chance.
        answers: known sequences, each a prompt with its right continuation. A sequence that is not a prefix of any
            of them gets random tokens only.
        right_share: probability that a token comes from the known continuation, 0 to 1.
    """

    def __init__(
        self, seed: int, vocab_size: int, answers: Sequence[Sequence[int]] = (), *, right_share: float = 0.8
    ) -> None:
        self.seed, self.vocab_size, self.right_share = seed, vocab_size, right_share
        self.answers = [list(answer) for answer in answers]
        self.num_proposed = 0

    def propose(self, sequence: EngineSequence, most: int) -> list[int]:
        """Propose up to `most` tokens, possibly none, that may follow those of `sequence`."""
        known = [*sequence.prompt_ids, *sequence.new_ids]
        length = len(known)
        right = next((answer[length:] for answer in self.answers if answer[:length] == known), [])
        rng = np.random.default_rng([self.seed, *known])
        proposed = rng.integers(self.vocab_size, size=rng.integers(most + 1)).tolist()
        is_right = rng.random(len(proposed)) < self.right_share
        self.num_proposed += len(proposed)
        return [right[i] if i < len(right) and is_right[i] else wrong for i, wrong in enumerate(proposed)]

    def forget(self, sequence: EngineSequence) -> None:
        pass
