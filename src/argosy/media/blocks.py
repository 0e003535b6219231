"""Prepare pictures for DeepSeek-V4-Vision and V4.1, whose rows of tokens end with a mark.

    uint8 [height, width, 3]  ->  scaled into a size of whole patches whose tokens fit  ->  filled up with grey

A token stands for a square of patches, the last ones for fewer. The number of tokens includes a mark before and after
all rows, and one after each row. V4-Vision's rows lie in pairs, so it also includes a row of fillers if the number of
rows is odd, and two fillers more if half of the tokens in rows is odd. Sizes are those of the makers' code, which draws
the same grey; the width of a very wide picture counts only as a multiple of its height, to which it is squeezed.

Elsewhere: `model/encoders/deepseek_vision.py` puts tokens in their order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from argosy.media.levels import read_levels, require_cap
from argosy.media.patches import Grid, PictureProcessor, Size
from argosy.media.settings import Settings

_GREY = 127
_FEWEST_TOKENS = 16


def num_block_tokens(rows: int, columns: int, together: int) -> int:
    """Return the tokens of a picture of `rows` and `columns` of squares of patches.

    Args:
        together: rows that lie column by column.
    """
    in_rows = (rows + -rows % together) * (columns + 1)
    return in_rows + -in_rows % together**2 + 2


@dataclass(frozen=True, slots=True)
class BlockFit:
    """Chooses the size of a picture.

    rows_together: rows of tokens that lie column by column.
    most_tokens: of a block.
    least_pixels: a picture with fewer is enlarged to so many first.
    most_ratio: width by height; a wider picture is squeezed. 0: no limit.
    """

    patch_size: int
    merge_size: int
    rows_together: int
    most_tokens: int
    least_pixels: int
    most_ratio: int

    def size(self, height: int, width: int) -> Size:
        patch, is_squeezed = self.patch_size, 0 < self.most_ratio * height <= width
        rows, columns = height, width
        if 0 < self.most_ratio * height < width:
            columns = height * self.most_ratio
        if rows * columns < self.least_pixels:
            scale = (self.least_pixels / (rows * columns)) ** 0.5
            rows, columns = int(rows * scale), int(columns * scale)
        full = self._shrunk(rows, columns, -(-rows // patch) * patch, -(-columns // patch) * patch)
        if is_squeezed:
            return Size(*full, *full)
        # As Pillow's `ImageOps.contain`.
        inner = full
        if width / height > full[1] / full[0]:
            inner = max(1, round(height / width * full[1])), full[1]
        elif width / height < full[1] / full[0]:
            inner = full[0], max(1, round(width / height * full[0]))
        return Size(*inner, *full)

    def num_tokens(self, height: int, width: int) -> int:
        """Return the tokens of a size of whole patches."""
        rows, columns = (-(-(side // self.patch_size) // self.merge_size) for side in (height, width))
        return num_block_tokens(rows, columns, self.rows_together)

    def _shrunk(self, height: int, width: int, rows: int, columns: int) -> tuple[int, int]:
        budget = self.most_tokens
        while self.num_tokens(rows, columns) > self.most_tokens:
            rows, columns = self._solved(height, width, budget)
            budget -= 1
        return rows, columns

    def _solved(self, height: int, width: int, most_tokens: int) -> tuple[int, int]:
        """Return the largest size with about `most_tokens`."""
        token, ratio, together = self.patch_size * self.merge_size, height / width, self.rows_together
        most_columns = math.sqrt((most_tokens - 2) / ratio + 0.25) - 0.5
        most_rows = most_columns * ratio
        if most_columns < 1:
            return (most_tokens - 2) // 2 // together * together * token, token
        if most_rows < together:
            return together * token, max(together, (most_tokens - 2) // together - 1) * token
        limits = math.floor(most_rows) // together * together, math.floor(most_columns)
        scale = min(limits[1] * token / width, limits[0] * token / height)
        patch = self.patch_size
        # With one patch to a token, a side may be shorter than a patch.
        rows, columns = (max(1, math.floor(side * scale / patch)) for side in (height, width))
        return rows * patch, columns * patch


@dataclass(frozen=True, slots=True)
class BlockProcessor(PictureProcessor):
    """Makes patches row by row."""

    fit: BlockFit

    def resize(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        size = self.fit.size(*pixels.shape[:2])
        self._grid(size)
        resized = Image.fromarray(pixels).resize((size.width, size.height), Image.Resampling.BICUBIC)
        canvas = np.full((size.padded_height, size.padded_width, 3), _GREY, np.uint8)
        top, left = round((size.padded_height - size.height) / 2), round((size.padded_width - size.width) / 2)
        canvas[top : top + size.height, left : left + size.width] = np.asarray(resized)
        return canvas

    def largest_grid(self) -> Grid:
        """Return a grid of the most patches: with so many tokens in one or two rows of squares, few are marks."""
        rows = self.fit.rows_together
        columns = (self.fit.most_tokens - 2) // rows - 1
        while num_block_tokens(rows, columns, rows) > self.fit.most_tokens:
            columns -= 1
        return 1, rows * self.merge_size, columns * self.merge_size

    def _num_tokens(self, rows: int, columns: int) -> int:
        return self.fit.num_tokens(rows * self.patch_size, columns * self.patch_size)


def _read(settings: Settings, most_tokens: int | None) -> PictureProcessor:
    patch_size = settings.integer("patch_size", 14, most=256)
    merge_size = settings.integer("merge_size", 3, most=16)
    most = settings.integer("max_tokens", 384, least=_FEWEST_TOKENS)
    if most_tokens is not None:
        require_cap(most_tokens, _FEWEST_TOKENS)
        most = min(most, most_tokens)
    together = settings.integer("rows_together", 2, most=2)
    most -= together**2 - 1  # so many fillers may precede a block
    fit = BlockFit(
        patch_size,
        merge_size,
        together,
        most,
        settings.integer("min_pixels", 147_456, least=0),
        settings.integer("max_ratio", 8, least=0),
    )
    levels = read_levels(settings, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), is_normalized=True)
    return BlockProcessor(patch_size, merge_size, 1, fit, "planes", levels, most)


READERS: Mapping[str, object] = {"DeepseekV4ImageProcessor": _read}
