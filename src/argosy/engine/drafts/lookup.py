"""Propose the tokens that followed the same words last time: n-grams of the prompt and of the answer itself.

Edits, quotations and tables repeat text of the prompt. In other text no n-gram matches, and nothing is proposed
(prompt lookup, Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding).

Elsewhere: `governor.py` decides whether proposals pay; `drafter.py` is the interface.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from argosy.engine.sequence import Sequence

SHORTEST = 3  # tokens that must match; two match by chance too often
_LONGEST = 16  # most tokens compared: a longer match proposes the same
_MOST_CANDIDATES = 256  # places compared further, the latest first
_FIRST_ROOM = 256  # tokens


class LookupDrafter:
    """Proposes the tokens after the longest earlier match of the last tokens; of equal matches, the latest.

    It reads only the sequence's own tokens.
    """

    def __init__(self) -> None:
        self._known: dict[Sequence, _Tokens] = {}

    def propose(self, sequence: Sequence, most: int) -> list[int]:
        """Propose at most `most` tokens; none if the last `SHORTEST` tokens occur nowhere else."""
        if (known := self._known.get(sequence)) is None:
            known = self._known[sequence] = _Tokens()
        ids = known.up_to_date(sequence)
        if (end := find_match(ids)) is None:
            return []
        # A match that overlaps the last tokens repeats with that period, and so does the proposal.
        period = len(ids) - end
        return [int(ids[end + at % period]) for at in range(most)]

    def forget(self, sequence: Sequence) -> None:
        self._known.pop(sequence, None)


class _Tokens:
    """The tokens of a sequence as an array that grows with it."""

    def __init__(self) -> None:
        self._room: NDArray[np.int32] = np.empty(0, np.int32)
        self._count = 0

    def up_to_date(self, sequence: Sequence) -> NDArray[np.int32]:
        """Return all tokens: int32 [prompt and answer]."""
        num_tokens, before = sequence.num_tokens, self._count
        if num_tokens > len(self._room):
            room = np.empty(max(_FIRST_ROOM, num_tokens + num_tokens // 2), np.int32)
            room[:before] = self._room[:before]
            self._room = room
        self._room[before:num_tokens] = sequence.tokens_from(before, num_tokens - before)
        self._count = num_tokens
        return self._room[:num_tokens]


def find_match(ids: NDArray[np.int32]) -> int | None:
    """Return the index after the longest earlier match of the last tokens, or None if not even `SHORTEST` tokens match.

    Args:
        ids: int32 [tokens].
    """
    last = len(ids) - 1
    if last < SHORTEST:
        return None
    # The index of the last token of each candidate; the very last candidate is the tokens themselves.
    matches = ids[SHORTEST - 1 : last] == ids[last]
    for back in range(1, SHORTEST):
        matches &= ids[SHORTEST - 1 - back : last - back] == ids[last - back]
    places = np.flatnonzero(matches)[-_MOST_CANDIDATES:] + SHORTEST - 1
    if not places.size:
        return None
    for back in range(SHORTEST, min(_LONGEST, last)):
        longer = places[places >= back]
        longer = longer[ids[longer - back] == ids[last - back]]
        if not longer.size:
            break
        places = longer
    return int(places[-1]) + 1
