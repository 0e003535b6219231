"""Detect that an answer repeats itself: its last tokens are the same piece of text, again and again.

    token  ->  Repeats.accept  ->  cycle: the next tokens if the answer keeps repeating

Elsewhere: `constraint.py` closes an array whose items repeat.
"""

from __future__ import annotations

import numpy as np

_LONGEST = 256  # tokens of a piece
_COPIES = 4


class Repeats:
    """The last tokens of an answer, which may repeat."""

    def __init__(self) -> None:
        self._last = np.full(_LONGEST, -1, np.int64)  # latest first
        self._runs = np.zeros(_LONGEST, np.int64)  # tokens equal to the one i + 1 before, up to the latest
        self._needed = (_COPIES - 1) * np.arange(1, _LONGEST + 1)

    def accept(self, token_id: int) -> None:
        self._runs = np.where(self._last == token_id, self._runs + 1, 0)
        self._last = np.roll(self._last, 1)
        self._last[0] = token_id

    def cycle(self, num_tokens: int) -> list[int]:
        """Return the shortest piece that makes up the last `num_tokens` or more, from the next token on; empty if
        none.
        """
        found = np.flatnonzero(self._runs >= np.maximum(self._needed, num_tokens))
        return self._last[: found[0] + 1][::-1].tolist() if len(found) else []
