"""The patches of a picture: the place, the rotation and the mixed learned positions of each.

    grid (frames, patch rows, patch columns)  ->  places  ->  rotation, taps of a position table, angles for the decoder

The patches of `merge` x `merge` cells that become one position lie one after another: cell by cell, and row by row
within a cell; with a merge of 1 they lie row by row. Every frame has the same places, so tables are made for one frame.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from argosy.model.encoders import EncoderTensor, with_bias
from argosy.model.encoders.blocks import FLOAT_BYTES, Operations, Rows
from argosy.model.reading.config_reader import ConfigReader, is_positive_number

Grid = tuple[int, int, int]  # frames, rows and columns of patches
Weigh = Callable[[NDArray[np.float64]], NDArray[np.float64]]
Places = tuple[NDArray[np.int64], NDArray[np.int64]]  # the row and the column of each patch of a frame
PairOrder = Literal[
    "rows first", "rows first, adjacent", "alternating", "columns first", "thirds", "thirds apart"
]


def frame_patches(grid: Grid) -> int:
    """Patches of one frame."""
    return grid[1] * grid[2]


def frames(grid: Grid) -> list[range]:
    """The patches of each frame."""
    size = frame_patches(grid)
    return [range(start, start + size) for start in range(0, grid[0] * size, size)]


def patch_places(grid: Grid, merge: int) -> Places:
    """The row and the column of each patch of a frame."""
    _, height, width = grid
    places = np.indices((height, width)).reshape(2, height // merge, merge, width // merge, merge)
    rows, cols = places.swapaxes(2, 3).reshape(2, -1)
    return rows, cols


class PatchKernel(NamedTuple):
    """The convolution that makes a hidden state from a patch of several frames.

    are_frames_apart: each frame has its own matrix, as llama.cpp's converter writes them.
    """

    hidden_size: int
    channels: int
    frames: int
    side: int
    are_frames_apart: bool

    @property
    def names(self) -> list[str]:
        """Return the canonical names of the matrices."""
        return [
            "patch",
            *(f"patch.{frame}" for frame in range(1, self.frames if self.are_frames_apart else 1)),
        ]

    def tensors(self, name: str) -> dict[str, EncoderTensor]:
        shape = self.hidden_size, self.channels, self.side, self.side
        if not self.are_frames_apart:
            return with_bias("patch", name, (*shape[:2], self.frames, *shape[2:]))
        more = {each: EncoderTensor(f"{name}.weight.{at}", shape) for at, each in enumerate(self.names) if at}
        return with_bias("patch", name, shape) | more

    def apply(self, operations: Operations, patches: Rows) -> Rows:
        """Return hidden states of patches [rows, channels * frames * side^2]."""
        if not self.are_frames_apart:
            return operations.linear("patch", patches)
        of_frames = patches.reshape(len(patches), self.channels, self.frames, -1)
        hidden = operations.linear("patch", of_frames[:, :, 0].reshape(len(patches), -1))
        for frame in range(1, self.frames):
            hidden += operations.linear(f"patch.{frame}", of_frames[:, :, frame].reshape(len(patches), -1))
        return hidden

    @property
    def floats_per_row(self) -> int:
        """Most float32 values that `apply` allocates for a patch."""
        values = self.channels * self.side**2 if self.are_frames_apart else 0
        return 2 * self.hidden_size + values


class Rotation:
    """Rotary position embedding on two axes (2-D RoPE): half of a head's pairs turn with the row, half with the column.

    Args:
        order: "rows first": the first half of the pairs turns with the row, and dimension i is paired with
            i + head_dim / 2. Otherwise a pair is two adjacent dimensions; "alternating": pairs turn with column and row
            by turns; "columns first": the first half of the pairs turns with the column. "thirds": time, which is 0,
            row and column have a third of the pairs each, paired in halves, and dimensions that are left over do not
            turn; "thirds apart": the same where the dimensions of each axis lie together.
        is_staggered: the second axis turns half a step slower than the first.
    """

    def __init__(
        self,
        places: Places,
        head_dim: int,
        theta: float,
        *,
        order: PairOrder = "rows first",
        is_staggered: bool = False,
    ) -> None:
        has_time = order.startswith("thirds")
        self._is_interleaved = order != "rows first" and not has_time
        self._num_places = len(places[0])
        turning = head_dim // 6 * 2 if has_time else head_dim // 2  # dimensions of an axis
        frequency = theta ** -(np.arange(0, turning, 2) / turning)
        axes = places if order.startswith("rows first") or has_time else places[::-1]
        slower = theta ** (-2 / head_dim) if is_staggered else 1.0

        def at_places(of: Weigh) -> Rows:
            parts = [  # each [places, turning / 2]
                of(np.arange(1.0 + axis.max())[:, None] * (frequency * scale)).astype(np.float32)[axis]
                for axis, scale in zip(axes, (1.0, slower), strict=True)
            ]
            if has_time:
                parts.insert(0, of(np.zeros(parts[0].shape)).astype(np.float32))
            return np.stack(parts, axis=2 if order == "alternating" else 1).reshape(self._num_places, -1)

        self._cosine, self._sine = at_places(np.cos), at_places(np.sin)
        self._order = None
        if order == "thirds apart":  # the two halves of each axis lie together
            halves = np.arange(3 * turning).reshape(3, 2, -1).swapaxes(0, 1).ravel()
            self._order = np.append(halves, np.arange(3 * turning, head_dim))

    def apply(self, operations: Operations, x: Rows, rows: slice) -> None:
        """Rotate x [rows, heads, head_dim], which are these rows of all frames, in place."""
        index = np.arange(rows.start, rows.stop) % self._num_places
        cosine, sine = (table[index] for table in (self._cosine, self._sine))
        if self._order is not None:  # queries and keys alike, so that their products are the same
            x[:] = x[..., self._order]
        operations.rotate(x, cosine, sine, is_interleaved=self._is_interleaved)


def rotation_bytes(num_places: int, head_dim: int) -> int:
    """Most bytes while a `Rotation` is made; it keeps fewer."""
    places_and_tables = 5 * 8 * num_places
    return 2 * FLOAT_BYTES * num_places * head_dim + places_and_tables


class Taps(NamedTuple):
    """For each place on an axis, the entries of a table that are mixed, and their weights: [size, taps]."""

    indices: NDArray[np.int64]
    weights: NDArray[np.float64]


def linear_taps(size: int, table_size: int) -> Taps:
    """Interpolate linearly; the first and the last place are the table's first and last entry."""
    source = np.linspace(0, table_size - 1, size) if size > 1 else np.zeros(1)
    return _taps(source, table_size, (0, 1), lambda distance: np.maximum(0, 1 - distance))


def cubic_taps(size: int, table_size: int) -> Taps:
    """Convolve cubically (Keys 1981, a = -0.75) between the centres of pixels; the edge value continues beyond the
    table.
    """
    return _taps(_centres(size, table_size), table_size, (-1, 0, 1, 2), _keys)


def centre_taps(size: int, table_size: int) -> Taps:
    """Interpolate linearly between the centres of pixels; the edge value continues beyond the table."""
    return _taps(_centres(size, table_size), table_size, (0, 1), lambda distance: 1 - distance)


def _centres(size: int, table_size: int) -> NDArray[np.float64]:
    return (np.arange(size) + 0.5) * table_size / size - 0.5


def smooth_taps(size: int, table_size: int) -> Taps:
    """Convolve cubically (a = -0.5) over as many entries as a place covers, within the table, as `interpolate` of
    PyTorch does with `antialias`; a table of the same size is itself.
    """
    scale = max(1.0, table_size / size)
    centres = _centres(size, table_size)
    reach = math.ceil(2 * scale)
    nearest = np.floor(centres).astype(np.int64)[:, None] + np.arange(1 - reach, reach + 1)
    weights = _keys(np.abs(centres[:, None] - nearest) / scale, -0.5)
    weights[(nearest < 0) | (nearest >= table_size)] = 0
    weights /= weights.sum(axis=1, keepdims=True)
    used = weights.any(axis=0)
    return Taps(nearest.clip(0, table_size - 1)[:, used], weights[:, used])


def _taps(source: NDArray[np.float64], table_size: int, offsets: Sequence[int], weigh: Weigh) -> Taps:
    nearest = np.floor(source).astype(np.int64)[:, None] + np.array(offsets)
    return Taps(nearest.clip(0, table_size - 1), weigh(np.abs(source[:, None] - nearest)))


def _keys(distance: NDArray[np.float64], a: float = -0.75) -> NDArray[np.float64]:
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0))


class PositionTable:
    """A learned table of positions, [first + side * side, width], resampled to the patches of a frame."""

    def __init__(
        self, name: str, side: int, places: Places, row_taps: Taps, col_taps: Taps, *, first: int = 0
    ) -> None:
        self._name, self._side, self._places, self._first = name, side, places, first
        self._taps = row_taps, col_taps

    def add(self, operations: Operations, hidden: Rows, rows: slice) -> None:
        """Add each patch's position to `hidden`, which are these rows of all frames."""
        index = np.arange(rows.start, rows.stop) % len(self._places[0])
        (row_indices, row_weights), (col_indices, col_weights) = self._taps
        at_rows, at_cols = (axis[index] for axis in self._places)
        total = np.zeros_like(hidden)
        for down in range(row_indices.shape[1]):
            for right in range(col_indices.shape[1]):
                entries = self._first + row_indices[at_rows, down] * self._side + col_indices[at_cols, right]
                weights = row_weights[at_rows, down] * col_weights[at_cols, right]
                vectors = operations.rows_of(self._name, entries.astype(np.int32))
                vectors *= weights.astype(np.float32)[:, None]
                total += vectors
        hidden += total


def span_angles(grid: Grid, merge: int) -> tuple[Rows, float]:
    """Return the rotary positions of a span on the axes time, height and width, and the advance for the text after it.

    Returns:
        angles: float32 [3, positions], relative to the first.
        num_angles: the number of positions of the longer side.
    """
    num_frames, height, width = grid[0], grid[1] // merge, grid[2] // merge
    angles = np.indices((num_frames, height, width), np.float32).reshape(3, -1)
    return angles, float(max(height, width))


def read_theta(reader: ConfigReader, default: float = 10_000.0) -> float:
    """Read the base of the rotary frequencies from `rope_parameters`; files that use the default omit it.

    Older files say "default" for what transformers now calls "axial".
    """
    parameters = reader.mapping("rope_parameters")
    if parameters is None:
        return default
    theta = parameters.get("rope_theta", default)
    is_known = parameters.keys() <= {"rope_type", "rope_theta"} and parameters.get("rope_type", "axial") in (
        "axial",
        "default",
    )
    if not is_known or not is_positive_number(theta):
        raise reader.unsupported("rope_parameters", "rope_type 'axial' with a rope_theta above zero")
    assert isinstance(theta, int | float)
    return float(theta)
