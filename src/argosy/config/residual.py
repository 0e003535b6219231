"""Residual streams: several hidden states for each token, which mixers and networks read and write with weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class SinkhornResidual:
    """Manifold-constrained hyper-connections (arXiv:2512.24880). A stack has the formulas in native/ops/residual.h."""

    num_streams: int
    iterations: int  # of the normalisation of the streams' weights; 0: streams are not mixed (Hy4)
    eps: float
    magnitude: float = 2.0  # of what a mixer or a network writes to a stream, times a sigmoid
    # The weights of what a mixer or a network reads are for the next one; the first reads the first stream.
    is_lagged: bool = False
    # What the final norm reads: a sum of the streams with its own weights, `head_mix`, or those of the last network.
    head: Literal["own", "mean", "carried"] = "own"

    @property
    def num_parts(self) -> int:
        """The kinds of weights of a mix: the input's, the output's, and the streams'."""
        return 3 if self.iterations else 2

    @property
    def num_weights(self) -> int:
        """The weights of a mix."""
        return self.num_streams * (2 + self.num_streams if self.iterations else 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedResidual:
    """Streams that are normed, and gated by a product of low rank (Qwen3.8); the final norm's input, too."""

    num_streams: int
    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BankResidual:
    """A bank of earlier hidden states, which mixers, networks and the final norm read with the current one (Kimi-K3,
    arXiv:2607.24653). Every `block` layers, the hidden state goes to the bank and starts again.
    """

    block: int
    num_blocks: int
    has_norms: bool = True  # weights of the scores are products of `scale` and `norm`, not `scale` alone

    @property
    def num_streams(self) -> int:
        """The most hidden states that a token has."""
        return 1 + self.num_blocks


Residual = SinkhornResidual | GatedResidual | BankResidual
