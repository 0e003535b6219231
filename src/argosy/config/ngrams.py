"""N-gram tables: a layer adds rows of a table too large for memory, chosen by the last few tokens."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class NgramConfig:
    """The n-gram sublayer before a layer's mixer (Engram, arXiv:2601.07372; Qwen3.8's per-layer embedding).

    Each head turns the last tokens into a row: (token * multiplier, xor the same of those before it) mod its prime.
    The rows of all heads, side by side, give a value, and a key for each residual stream whose product with the stream
    gates the value.
    """

    # Rows that each head chooses from: the heads of bigrams, then of trigrams, and so on, as many for each length.
    primes: tuple[int, ...]
    multipliers: tuple[int, ...]  # of a token, of the token before it, and so on
    row_dim: int  # values of a row
    # The token that stands for those before the start, and for those before a border.
    blank_id: int
    # A token that n-grams do not reach across; with `folded_ids`, one of a media span, which has no rows itself.
    border_id: int | None = None
    # How many ids are left when tokens are folded (`model/ngrams.py`); 0: n-grams are of the tokens themselves.
    folded_ids: int = 0
    # Positions that a causal convolution of the gated values sees, `conv_dilation` apart; 0: there is none.
    conv_width: int = 0
    conv_dilation: int = 1

    @property
    def num_earlier(self) -> int:
        """The tokens before a token that its rows depend on."""
        return len(self.multipliers) - 1

    @property
    def num_heads(self) -> int:
        return len(self.primes)

    @property
    def width(self) -> int:
        """The values of all rows of a token."""
        return self.num_heads * self.row_dim

    @property
    def num_rows(self) -> int:
        """The rows that heads can choose; the table may have more."""
        return sum(self.primes)

    @property
    def conv_span(self) -> int:
        """The positions from the first to the last that the convolution sees; 0: there is none."""
        return (self.conv_width - 1) * self.conv_dilation + 1 if self.conv_width else 0
