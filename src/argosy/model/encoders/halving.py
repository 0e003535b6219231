"""The 3 x 3 convolutions of vision and audio towers, most of them with stride 2.

image [height, width, channels]  ->  padded by a pixel on each side  ->  image of half the height and width
"""

from __future__ import annotations

from collections.abc import Generator

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from argosy.model.encoders import EncoderTensor, with_bias
from argosy.model.encoders.blocks import Finish, Operations, Rows, block_floats, in_blocks

_KERNEL = 3


def halving_tensors(canonical: str, name: str, channels: int, num_inputs: int) -> dict[str, EncoderTensor]:
    """The weight of the convolution, and its bias."""
    return with_bias(canonical, name, (channels, num_inputs, _KERNEL, _KERNEL), taps=_KERNEL**2)


def halved(size: int, stride: int = 2) -> int:
    """Pixels on a side after the convolution."""
    return -(-size // stride)


def halving_floats(height: int, width: int, channels: int, num_inputs: int, stride: int = 2) -> int:
    """Return the most float32 values that `halve` allocates, its result included."""
    pixels, taps = halved(height, stride) * halved(width, stride), _KERNEL**2 * num_inputs
    result = pixels * channels
    block = block_floats(pixels, 2 * taps * channels, taps + 8)  # with the places of pixels, in int64
    return (height + 2) * (width + 2) * num_inputs + result + block


def halve(
    operations: Operations,
    name: str,
    image: Rows,
    channels: int,
    *,
    finish: Finish = "store",
    stride: int = 2,
) -> Generator[None, None, Rows]:
    """Convolve [height, width, inputs] to [half the height, half the width, channels]; with `stride` 1, not halved."""
    height, width, num_inputs = image.shape
    padded = np.zeros((height + 2, width + 2, num_inputs), np.float32)
    padded[1:-1, 1:-1] = image
    # [height, width, rows of the kernel, its columns and channels]: pixels of a row of the kernel lie side by side.
    lines = sliding_window_view(padded.reshape(len(padded), -1), _KERNEL * num_inputs, axis=1)
    lines = lines[:, :: stride * num_inputs][:, : halved(width, stride)]
    under = sliding_window_view(lines, _KERNEL, axis=0)[::stride].transpose(0, 1, 3, 2)
    out = np.empty((halved(height, stride), halved(width, stride), channels), np.float32)
    pixels = out.reshape(-1, channels)

    def work(rows: slice) -> None:
        at = np.unravel_index(np.arange(rows.start, rows.stop), out.shape[:2])
        operations.linear(
            name, np.ascontiguousarray(under[at]).reshape(len(at[0]), -1), pixels[rows], finish=finish
        )

    yield from in_blocks(work, range(len(pixels)), operations.flop_per_row(name))
    return out
