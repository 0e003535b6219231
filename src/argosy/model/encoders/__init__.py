"""Encoders turn a picture, a video or a sound into the rows of a media span; one file for each kind of tower.

    patches of a picture, mel features of a sound  ->  tower.encode  ->  SpanRows  ->  decoder

A tower's file defines its config (`read_config`), the tensors that it needs (`tensors`), the positions that it fills
(`num_positions`, `angles`), the memory that it takes (`peak_bytes`), and the tower itself. `encode` is a generator: it
yields after at most about 3 GFLOP (`blocks.py`), so that decoding continues meanwhile, and returns the rows. The rows
are the same with any number of threads.

Elsewhere: `media/` makes patches and features; `prompt/media_span.py` defines spans; `model/weights.py` reads weights.
`blocks.py` and `grid.py` hold the code that towers share.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from argosy.checkpoint.landing import AS_STORED, Landing, TapsFirst


@dataclass(frozen=True, slots=True)
class EncoderTensor:
    """A tensor of a tower: its name in the checkpoint below the tower's prefix, and its shape there.

    The first `row_axes` axes of a matrix are its rows and the others its columns, as in the weight of a convolution,
    [out, in, height, width]. A tensor with one axis is a vector.

    If `taps` is set, the tensor is the weight of a convolution, stored in memory as [out, height, width, in].
    """

    name: str
    shape: tuple[int, ...]
    row_axes: int = 1
    taps: int = 0

    @property
    def rows(self) -> int:
        """Rows of the matrix; 1 for a vector."""
        return math.prod(self.shape[: self.row_axes]) if len(self.shape) > 1 else 1

    @property
    def cols(self) -> int:
        return math.prod(self.shape) // self.rows

    @property
    def landing(self) -> Landing:
        """How its values are converted for memory."""
        return TapsFirst(self.taps) if self.taps else AS_STORED


def with_bias(
    canonical: str, name: str, shape: tuple[int, ...], *, has_bias: bool = True, taps: int = 0
) -> dict[str, EncoderTensor]:
    """Return the weight `{name}.weight` of this shape, and the bias of its rows if there is one."""
    tensors = {canonical: EncoderTensor(f"{name}.weight", shape, taps=taps)}
    if has_bias:
        tensors[f"{canonical}_bias"] = EncoderTensor(f"{name}.bias", shape[:1])
    return tensors
