"""Code shared by families with lightning attention (arXiv:2401.04658): how fast each head forgets."""

from __future__ import annotations

from math import floor, log2


def slopes_of_heads(num_heads: int, factor: float) -> tuple[float, ...]:
    """Return the slopes of a layer's heads, those of ALiBi (arXiv:2108.12409) times `factor`.

    If the number of heads is a power of two, they are 2^(-8 (head + 1) / heads). Otherwise the heads beyond the last
    power of two get every other slope of a model with twice that many heads.
    """
    whole = 2 ** floor(log2(num_heads))
    slopes = [2.0 ** (-8 * (head + 1) / whole) for head in range(whole)]
    slopes += [2.0 ** (-4 * (2 * head + 1) / whole) for head in range(num_heads - whole)]
    return tuple(slope * factor for slope in slopes)
