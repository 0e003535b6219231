"""Scale frames of video exactly as the reference processors do, which use torchvision.

    uint8 [height, width, 3]  ->  columns, rounded to 8 bits  ->  rows, rounded to 8 bits  ->  uint8

The filter is Keys' cubic (a = -0.5), or linear, widened when a frame shrinks, like Pillow's. But torchvision's weights
are 16-bit integers and Pillow's have 22 bits or more, so some pixels differ by a level. Sums of such products are whole
numbers below 2^53: float64 holds them exactly, in any order.

Elsewhere: pictures that are not cut into tiles are scaled by Pillow itself (`pictures.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# Places computed together: they read nearly the same inputs. A larger product would make BLAS start its threads,
# which then spin: twice the processor time on two cores, many times as much on many cores.
_BLOCK = 8
_ROWS_AT_ONCE = 64  # bounds the memory of float64 copies
_MOST_BITS = 22


class _Block(NamedTuple):
    """Some places of the result, the inputs that they read, and whole-number weights [places, inputs]."""

    places: slice
    inputs: slice
    weights: NDArray[np.float64]


class _Axis(NamedTuple):
    size: int
    blocks: tuple[_Block, ...]
    unit: float  # the sum of weights that counts as 1


class Resizer:
    """Scales frames of one size to another one."""

    def __init__(
        self, height: int, width: int, to_height: int, to_width: int, *, is_linear: bool = False
    ) -> None:
        self._size = to_height, to_width
        self._rows = None if height == to_height else _axis(height, to_height, is_linear)
        self._columns = None if width == to_width else _axis(width, to_width, is_linear)

    def resize(self, frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if self._columns is not None:
            wide = np.empty((len(frame), self._columns.size, 3), np.uint8)
            for start in range(0, len(frame), _ROWS_AT_ONCE):
                rows = slice(start, start + _ROWS_AT_ONCE)
                wide[rows] = _columns_scaled(frame[rows], self._columns)
            frame = wide
        if self._rows is not None:
            tall = np.empty((self._rows.size, *frame.shape[1:]), np.uint8)
            for start in range(0, frame.shape[1], _ROWS_AT_ONCE):
                columns = slice(start, start + _ROWS_AT_ONCE)
                tall[:, columns] = _rows_scaled(frame[:, columns], self._rows)
            frame = tall
        return frame


def scaled_linearly(pixels: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Scale one picture with the linear filter."""
    rows, columns = pixels.shape[:2]
    return Resizer(rows, columns, height, width, is_linear=True).resize(pixels)


def _rows_scaled(lines: NDArray[np.uint8], axis: _Axis) -> NDArray[np.uint8]:
    """Scale the first axis of [size, others, 3]."""
    values = lines.reshape(len(lines), -1).astype(np.float64)
    out = np.empty((axis.size, values.shape[1]), np.float64)
    for places, inputs, weights in axis.blocks:
        np.matmul(weights, values[inputs], out=out[places])
    return _rounded(out, axis.unit).reshape(axis.size, *lines.shape[1:])


def _columns_scaled(lines: NDArray[np.uint8], axis: _Axis) -> NDArray[np.uint8]:
    """Scale the second axis of [others, size, 3], each channel by itself, so that only bytes are transposed."""
    values = lines.transpose(2, 0, 1).astype(np.float64)
    out = np.empty((*values.shape[:2], axis.size), np.float64)
    for places, inputs, weights in axis.blocks:
        np.matmul(values[..., inputs], weights.T, out=out[..., places])
    return _rounded(out, axis.unit).transpose(1, 2, 0)


def _rounded(sums: NDArray[np.float64], unit: float) -> NDArray[np.uint8]:
    """Round sums in units to 8 bits: add half a unit, then divide and round down."""
    np.floor(np.divide(np.add(sums, unit / 2, out=sums), unit, out=sums), out=sums)
    return sums.clip(0, 255).astype(np.uint8)


def _axis(size: int, wanted: int, is_linear: bool) -> _Axis:
    scale = size / wanted
    spread = max(scale, 1.0)
    reach, filtered = (1, _linear) if is_linear else (2, _keys)
    centres = scale * (np.arange(wanted) + 0.5)
    first = np.maximum((centres - reach * spread + 0.5).astype(np.int64), 0)
    last = np.minimum((centres + reach * spread + 0.5).astype(np.int64), size)
    taps = [
        filtered((np.arange(begin, end) - centre + 0.5) / spread)
        for begin, end, centre in zip(first, last, centres, strict=True)
    ]
    taps = [one / one.sum() for one in taps]
    unit = _unit(max(float(one.max()) for one in taps))

    def blocks() -> Iterator[_Block]:
        for start in range(0, wanted, _BLOCK):
            end = min(wanted, start + _BLOCK)
            begin, stop = int(first[start]), int(last[end - 1])
            weights = np.zeros((end - start, stop - begin))
            for place in range(start, end):
                weights[place - start, first[place] - begin : last[place] - begin] = taps[place] * unit
            whole = np.trunc(weights + np.copysign(0.5, weights))
            yield _Block(slice(start, end), slice(begin, stop), whole)

    return _Axis(wanted, tuple(blocks()), unit)


def _unit(largest: float) -> float:
    """Return the largest power of two, up to 2^22, with which the largest weight fits 16 bits."""
    bits = 0
    while bits < _MOST_BITS and int(0.5 + largest * (1 << (bits + 1))) < 1 << 15:
        bits += 1
    return math.ldexp(1.0, bits)


def _linear(distance: NDArray[np.float64]) -> NDArray[np.float64]:
    near: NDArray[np.float64] = np.maximum(1 - np.abs(distance), 0.0)
    return near


def _keys(distance: NDArray[np.float64]) -> NDArray[np.float64]:
    x = np.abs(distance)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))
