"""The patches of a prepared picture, in the order in which a tower takes them.

    uint8 [height, width, 3]  ->  PictureProcessor.resize, with the size that its `Fit` chooses  ->  patches, grid

Elsewhere: `pictures.py` and `tiles.py` choose sizes; `model/encoders/` runs the towers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from argosy.errors import BadMedia

Grid = tuple[int, int, int]


class Size(NamedTuple):
    """Height and width after resizing, and after padding."""

    height: int
    width: int
    padded_height: int
    padded_width: int


class Fit(Protocol):
    """Chooses the size of a picture."""

    def size(self, height: int, width: int) -> Size: ...


@dataclass(frozen=True, slots=True)
class PictureProcessor:
    """Makes patches from pictures.

    patch_size: side of a patch.
    merge_size: side of the square of patches that becomes one token.
    frames: how many times a patch repeats the picture, because the tower takes several frames at once.
    fit: chooses the size.
    order: how patches, and the values in a patch, are ordered:
        "merged": patches of a token together; values as [channels, frames, patch, patch];
        "planes": patches row by row; values as [channels, patch, patch];
        "pixels": patches row by row; values as [patch, patch, channels].
    levels: float32 [3, 256]: the value of each 8-bit level in each channel.
    most_tokens: the most tokens of a picture, if a cap lowers the model's own limit or all pictures are scaled to one
        number of tokens.
    tokens_per_row: control tokens after each row of tokens.
    """

    patch_size: int
    merge_size: int
    frames: int
    fit: Fit
    order: Literal["merged", "planes", "pixels"]
    levels: NDArray[np.float32] = field(repr=False, compare=False)
    most_tokens: int | None = None
    tokens_per_row: int = 0

    @property
    def sides(self) -> Mapping[str, int]:
        """Return the sides, in pixels, of the parts of a picture by name; the tower's must be equal."""
        return {}

    def grid(self, height: int, width: int) -> Grid:
        """Return (1, rows, columns) of patches for a picture of this size.

        Raises:
            BadMedia: the picture is too narrow for this model, or cannot shrink to the allowed tokens.
        """
        return self._grid(self.fit.size(height, width))

    def num_tokens(self, height: int, width: int) -> int:
        """Return the number of tokens that a picture of this size takes; raises what `grid` raises."""
        _, rows, columns = self.grid(height, width)
        return self._num_tokens(rows, columns)

    def prepare(self, pixels: NDArray[np.uint8]) -> tuple[NDArray[np.float32], Grid]:
        """Make patches.

        Args:
            pixels: uint8 [height, width, 3].

        Returns:
            float32 [rows * columns, values], and the grid (1, rows, columns).

        Raises:
            BadMedia: as `grid`.
        """
        return self.patches(self.resize(pixels))

    def resize(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Run the first half of `prepare`: return uint8 [height, width, 3], resized and padded to whole patches."""
        size = self.fit.size(*pixels.shape[:2])
        self._grid(size)
        resized = Image.fromarray(pixels).resize((size.width, size.height), Image.Resampling.BICUBIC)
        canvas = np.zeros((size.padded_height, size.padded_width, 3), np.uint8)
        canvas[: size.height, : size.width] = np.asarray(resized)
        return canvas

    def patches(self, canvas: NDArray[np.uint8]) -> tuple[NDArray[np.float32], Grid]:
        """Run the second half of `prepare`, on the result of `resize`."""
        rows, columns = canvas.shape[0] // self.patch_size, canvas.shape[1] // self.patch_size
        side, merge = self.patch_size, self.merge_size if self.order == "merged" else 1
        values = patch_values(canvas[None], side, merge, self.levels, self.frames)
        if self.order == "pixels":
            values = values.transpose(0, 2, 3, 1)
        return values.reshape(rows * columns, -1), (1, rows, columns)

    def patches_of(self, parts: Iterable[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """Return the patches of parts of a picture, uint8 [height, width, 3], one after the other."""
        side, merge = self.patch_size, self.merge_size if self.order == "merged" else 1
        values = [patch_values(part[None], side, merge, self.levels, self.frames) for part in parts]
        return np.concatenate([one.reshape(len(one), -1) for one in values])

    def largest_grid(self) -> Grid:
        """Return a grid of the most patches."""
        assert self.most_tokens is not None
        return 1, self.merge_size, self.merge_size * self.most_tokens

    def _grid(self, size: Size) -> Grid:
        rows, columns = size.padded_height // self.patch_size, size.padded_width // self.patch_size
        num_tokens = self._num_tokens(rows, columns)
        if self.most_tokens is not None and num_tokens > self.most_tokens:
            raise BadMedia(
                f"a picture may take at most {self.most_tokens} tokens, and this one is so narrow that it needs "
                f"{num_tokens}",
                kind="picture",
                needed=self.most_tokens,
                found=num_tokens,
            )
        return 1, rows, columns

    def _num_tokens(self, rows: int, columns: int) -> int:
        return rows // self.merge_size * (columns // self.merge_size + self.tokens_per_row)


def patch_values(
    canvases: NDArray[np.uint8], side: int, merge: int, levels: NDArray[np.float32], num_frames: int
) -> NDArray[np.float32]:
    """Return the values of patches that cover `num_frames` frames: float32 [patches, channels, num_frames, side *
    side].

    Args:
        canvases: uint8 [num_frames, height, width, 3], or one frame, which is repeated.
        merge: patches of a square with this side lie together.
        levels: see `PictureProcessor`.
    """
    given, rows, columns = len(canvases), canvases.shape[1] // side, canvases.shape[2] // side
    blocks = canvases.reshape(given, rows // merge, merge, side, columns // merge, merge, side, 3)
    # [rows, columns, merge, merge, channels, frames, side, side]
    blocks = blocks.transpose(1, 4, 2, 5, 7, 0, 3, 6)
    pixels_of = blocks.reshape(rows * columns, 3, given, side * side)
    values = np.empty((rows * columns, 3, num_frames, side * side), np.float32)
    for channel in range(3):
        values[:, channel] = levels[channel][pixels_of[:, channel]]
    return values
