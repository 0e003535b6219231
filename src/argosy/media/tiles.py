"""Cut pictures into tiles, as the processors of Llama-4, InternVL and DeepSeek-OCR do.

    uint8 [height, width, 3]  ->  scaled, padded with black to whole tiles  ->  tiles row by row, and if there are
                                                                                several, the whole picture as one more

Llama-4: the arrangement of tiles enlarges a picture least, or shrinks it least; of several, the one with the smallest
area. Numbers are those of the reference, which compares in float32, scales by torchvision's bilinear filter and
normalises in bfloat16. InternVL: the arrangement has the nearest aspect ratio, which the picture gets. DeepSeek-OCR:
the same, and the whole picture keeps its ratio in the middle of a larger square. If that is half a pixel off, the
picture moves up or left, as in transformers; in DeepSeek's own code, every second time the other way.

Elsewhere: `pictures.py` prepares pictures that stay whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from argosy.errors import UnsupportedModel
from argosy.media.levels import CLIP_MEAN, CLIP_STD, read_levels, require_cap, tokens_of_tile
from argosy.media.patches import Grid, PictureProcessor, Size
from argosy.media.resize import scaled_linearly
from argosy.media.settings import Settings

Arrangement = tuple[int, int]  # rows and columns of tiles
_GREY = 127


@dataclass(frozen=True, slots=True)
class Llama4Fit:
    """Chooses an arrangement of at most `most_tiles` tiles with the side `side`.

    is_largest: enlarges a picture to the whole of the largest arrangement.
    """

    side: int
    most_tiles: int
    is_largest: bool = False

    def tiles(self, height: int, width: int) -> Arrangement:
        """Return the arrangement for a picture of this size."""
        arrangements = np.array(_arrangements(self.most_tiles))
        high, wide = (
            (arrangements[:, axis] * self.side).astype(np.float32) / np.float32(length)
            for axis, length in enumerate((height, width))
        )
        scales = np.minimum(high, wide)
        larger = scales[scales >= 1]
        shrinks = not len(larger)
        chosen = scales.max() if shrinks or self.is_largest else larger.min()
        fitting = arrangements[scales == chosen]
        rows, columns = fitting[fitting.prod(axis=1).argmin()]
        return int(rows), int(columns)

    def scaled(self, height: int, width: int) -> tuple[int, int]:
        """Return the size of the picture within its tiles: not enlarged beyond one tile, unless `is_largest`."""
        wanted = []
        for length, tiles in zip((height, width), self.tiles(height, width), strict=True):
            most = tiles * self.side
            is_exact = max(length, self.side) <= most and not self.is_largest
            # The reference divides whole numbers of Python in float64, and those of tensors in float32.
            wanted.append(np.float64(max(length, self.side)) if is_exact else np.float32(most))
        ratios = [goal / type(goal)(length) for goal, length in zip(wanted, (height, width), strict=True)]
        other = int(ratios[1] < ratios[0])  # the axis that limits
        found = [int(goal) for goal in wanted]
        length = (height, width)[1 - other]
        found[1 - other] = min(math.floor(type(ratios[other])(length) * ratios[other]), found[1 - other])
        return max(found[0], 1), max(found[1], 1)

    def size(self, height: int, width: int) -> Size:
        """Return the size in the tiles, and that of all tiles, with a further row for the whole picture."""
        rows, columns = self.tiles(height, width)
        band = self.side if rows * columns > 1 else 0
        return Size(*self.scaled(height, width), rows * self.side + band, columns * self.side)


def _arrangements(most_tiles: int) -> list[Arrangement]:
    """Arrangements in the reference's order: by their ratios, from the most tiles down."""
    by_ratio: dict[float, list[Arrangement]] = {}
    for count in range(most_tiles, 0, -1):
        for rows in range(1, count + 1):
            if count % rows == 0:
                by_ratio.setdefault(rows / (count // rows), []).append((rows, count // rows))
    return [one for group in by_ratio.values() for one in group]


@dataclass(frozen=True, slots=True)
class TileProcessor(PictureProcessor):
    """Makes the patches of tiles: tile by tile, "merged" within each. The grid is that of `Llama4Fit.size`."""

    fit: Llama4Fit

    @property
    def sides(self) -> Mapping[str, int]:
        return {"size": self.fit.side}

    def resize(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        height, width = pixels.shape[:2]
        size, side = self.fit.size(height, width), self.fit.side
        canvas = np.zeros((size.padded_height, size.padded_width, 3), np.uint8)
        canvas[: size.height, : size.width] = scaled_linearly(pixels, size.height, size.width)
        if canvas.shape[0] > side:
            canvas[-side:, :side] = scaled_linearly(pixels, side, side)
        return canvas

    def patches(self, canvas: NDArray[np.uint8]) -> tuple[NDArray[np.float32], Grid]:
        side = self.fit.side
        rows, columns = (length // side for length in canvas.shape[:2])
        tiles = _in_tiles(canvas, side)
        num_tiles = (rows - 1) * columns + 1 if rows > 1 else 1
        grid = (1, rows * side // self.patch_size, columns * side // self.patch_size)
        return self.patches_of(tiles[:num_tiles]), grid

    def largest_grid(self) -> Grid:
        side, columns = self.fit.side // self.patch_size, self.fit.most_tiles
        return 1, side * (2 if columns > 1 else 1), side * columns

    def _num_tokens(self, rows: int, columns: int) -> int:
        side = self.fit.side // self.patch_size
        rows, columns = rows // side, columns // side
        return tile_tokens((rows - 1) * columns if rows > 1 else 1, (side // self.merge_size) ** 2)


def tile_tokens(num_tiles: int, of_tile: int) -> int:
    """Return a picture's tokens: tiles with a separator after each, the whole picture as a tile, and three marks."""
    return of_tile + 3 + (num_tiles * (of_tile + 1) if num_tiles > 1 else 0)


def _in_tiles(canvas: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Return the tiles of a picture, row by row: uint8 [tiles, side, side, 3]."""
    rows, columns = (length // side for length in canvas.shape[:2])
    return canvas.reshape(rows, side, columns, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)


@dataclass(frozen=True, slots=True)
class InternVLFit:
    """Chooses an arrangement of tiles, which then lie one below the other.

    side: of a tile, in pixels.
    least, most: tiles of a picture.
    has_copy: a picture of several tiles is followed by a small copy of the whole, as a further tile.
    """

    side: int
    least: int
    most: int
    has_copy: bool

    def size(self, height: int, width: int) -> Size:
        height = self.side * self.with_copy(math.prod(self.tiles(height, width)))
        return Size(height, self.side, height, self.side)

    def with_copy(self, num_tiles: int) -> int:
        return num_tiles + (self.has_copy and num_tiles > 1)

    def tiles(self, height: int, width: int) -> Arrangement:
        """Return the arrangement with the nearest aspect ratio; of several, the largest that the picture half fills."""
        ratio, least_difference, best = width / height, math.inf, (1, 1)
        sides = range(1, self.most + 1)
        found = [(rows, cols) for cols in sides for rows in sides if self.least <= rows * cols <= self.most]
        for rows, cols in sorted(found, key=math.prod):
            difference = abs(ratio - cols / rows)
            is_filled = width * height > 0.5 * self.side * self.side * cols * rows
            if difference < least_difference or (difference == least_difference and is_filled):
                least_difference, best = difference, (rows, cols)
        return best


@dataclass(frozen=True, slots=True)
class InternVLProcessor(PictureProcessor):
    """Makes the patches of tiles, row by row of tiles."""

    fit: InternVLFit

    @property
    def sides(self) -> Mapping[str, int]:
        return {"size": self.fit.side}

    def resize(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        rows, columns = self.fit.tiles(*pixels.shape[:2])
        picture, side = Image.fromarray(pixels), self.fit.side
        scaled = np.asarray(picture.resize((columns * side, rows * side), Image.Resampling.BICUBIC))
        tiles = _in_tiles(scaled, side).reshape(-1, side, 3)
        if self.fit.with_copy(rows * columns) == rows * columns:
            return tiles
        return np.concatenate([tiles, np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC))])


@dataclass(frozen=True, slots=True)
class OcrFit:
    """Arranges the tiles of a picture that is larger than one tile; the whole picture lies below them.

    side: of a tile, in pixels.   whole: of the square for the whole picture, less than that of two tiles.
    least, most: tiles of a picture.
    """

    side: int
    whole: int
    least: int
    most: int

    def tiles(self, height: int, width: int) -> Arrangement:
        """Return the arrangement, chosen as in InternVL; (0, 0) if there are no tiles."""
        if not self.most or max(height, width) <= self.side:
            return 0, 0
        return InternVLFit(self.side, self.least, self.most, has_copy=False).tiles(height, width)

    def tiles_above(self, height: int, width: int) -> Arrangement:
        """Return the arrangement in a canvas of this size."""
        rows = (height - self.whole) // self.side
        return rows, width // self.side if rows else 0

    def size(self, height: int, width: int) -> Size:
        rows, columns = self.tiles(height, width)
        return Size(
            *self.scaled(height, width), rows * self.side + self.whole, max(columns * self.side, self.whole)
        )

    def scaled(self, height: int, width: int) -> tuple[int, int]:
        """Return the size of the picture within its square."""
        scale = self.whole / max(height, width)
        return max(1, round(height * scale)), max(1, round(width * scale))


@dataclass(frozen=True, slots=True)
class OcrProcessor(PictureProcessor):
    """Makes the patches of the tiles, row by row, then those of the whole picture, padded with grey."""

    fit: OcrFit

    @property
    def sides(self) -> Mapping[str, int]:
        return {"tile_size": self.fit.side, "size": self.fit.whole}

    def resize(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        height, width = pixels.shape[:2]
        fit, picture, size = self.fit, Image.fromarray(pixels), self.fit.size(height, width)
        canvas = np.full((size.padded_height, size.padded_width, 3), _GREY, np.uint8)
        rows, columns = fit.tiles(height, width)
        if rows:
            tiled = picture.resize((columns * fit.side, rows * fit.side), Image.Resampling.BICUBIC)
            canvas[: rows * fit.side, : columns * fit.side] = np.asarray(tiled)
        top, left = rows * fit.side + (fit.whole - size.height) // 2, (fit.whole - size.width) // 2
        scaled = picture.resize((size.width, size.height), Image.Resampling.BICUBIC)
        canvas[top : top + size.height, left : left + size.width] = np.asarray(scaled)
        return canvas

    def patches(self, canvas: NDArray[np.uint8]) -> tuple[NDArray[np.float32], Grid]:
        height, width = canvas.shape[:2]
        (rows, columns), side = self.fit.tiles_above(height, width), self.fit.side
        tiles = _in_tiles(canvas[: rows * side, : columns * side], side) if rows else ()
        patches = self.patches_of([*tiles, canvas[rows * side :, : self.fit.whole]])
        return patches, (1, height // self.patch_size, width // self.patch_size)

    def largest_grid(self) -> Grid:
        height = self.fit.most * self.fit.side + self.fit.whole
        return 1, height // self.patch_size, self.fit.whole // self.patch_size

    def _num_tokens(self, rows: int, columns: int) -> int:
        tiles = self.fit.tiles_above(rows * self.patch_size, columns * self.patch_size)
        return self.tokens_of(*tiles)

    def tokens_of(self, rows: int, columns: int) -> int:
        """Return the number of a picture's tokens: those of the tiles, those of the whole picture, and a separator."""
        tile, whole = (
            side // (self.patch_size * self.merge_size) for side in (self.fit.side, self.fit.whole)
        )
        lines = rows * tile * (columns * tile + self.tokens_per_row) if rows else 0
        return lines + whole * (whole + self.tokens_per_row) + 1


def _read_llama4(settings: Settings, most_tokens: int | None) -> TileProcessor:
    """Read the settings of `Llama4ImageProcessor`; the tower gives the sizes of patches and cells."""
    patch_size, merge_size = (
        settings.integer("patch_size", 14, most=256),
        settings.integer("merge_size", 2, most=16),
    )
    side = settings.square("size", 336)
    of_tile = tokens_of_tile(side, patch_size * merge_size)
    settings.fixed("do_resize", True)
    settings.fixed("do_normalize", True)
    most_tiles = settings.integer("max_patches", 16, most=256)
    if most_tokens is not None:
        require_cap(most_tokens, tile_tokens(1, of_tile))
        while tile_tokens(most_tiles, of_tile) > most_tokens:
            most_tiles -= 1
    levels = read_levels(
        settings, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), is_normalized=True, filter=2, is_rounded=True
    )
    fit = Llama4Fit(side, most_tiles, settings.flag("resize_to_max_canvas", False))
    return TileProcessor(patch_size, merge_size, 1, fit, "merged", levels, tile_tokens(most_tiles, of_tile))


def _read_internvl(settings: Settings, most_tokens: int | None) -> InternVLProcessor:
    patch_size = settings.integer("patch_size", None, most=256)
    merge_size = settings.integer("merge_size", None, most=16)
    side = settings.integer("tile_size", None, most=65_536)
    if (size := settings.nested("size")) is not None:
        size.fixed("height", side)
        size.fixed("width", side)
        size.finish()
    settings.passed("crop_to_patches")  # the processor around it always asks for this
    settings.fixed("do_resize", True)
    most = settings.integer("max_patches", 12, most=64)
    least = settings.integer("min_patches", 1, most=most)
    levels = read_levels(settings, CLIP_MEAN, CLIP_STD, is_normalized=True)
    fit = InternVLFit(side, least, most, settings.flag("use_thumbnail", True))
    of_tile = tokens_of_tile(side, patch_size * merge_size)
    if most_tokens is not None:
        require_cap(most_tokens, of_tile)
        most = min(most, max(1, most_tokens // of_tile - fit.has_copy))
        fit = replace(fit, least=min(least, most), most=most)
    return InternVLProcessor(patch_size, merge_size, 1, fit, "merged", levels, of_tile * fit.with_copy(most))


def _read_ocr(settings: Settings, most_tokens: int | None) -> OcrProcessor:
    """Read the settings of `DeepseekOcr2ImageProcessor` with tiles."""
    return _read_tiles_and_whole(settings, most_tokens, 0, 6)


def _read_clip_ocr(settings: Settings, most_tokens: int | None) -> OcrProcessor:
    """Read the settings of `UnlimitedOcrImageProcessor` with tiles; one more token ends each row of tokens."""
    settings.passed("maximum_pad_value")
    return _read_tiles_and_whole(settings, most_tokens, 1, 32)


def _read_tiles_and_whole(
    settings: Settings, most_tokens: int | None, tokens_per_row: int, most_tiles: int
) -> OcrProcessor:
    patch_size = settings.integer("patch_size", None, most=256)
    merge_size = settings.integer("merge_size", None, most=16)
    side = settings.integer("tile_size", None, most=4096)
    whole = settings.square("size", 0, most=4096)
    for length in (side, whole):
        tokens_of_tile(length, patch_size * merge_size)
    if not side <= whole < 2 * side:
        raise UnsupportedModel(
            f"the whole picture has {whole} pixels on a side; supported: at least those of a tile, {side}, and less "
            "than twice as many",
            key="size",
            value=whole,
        )
    settings.fixed("crop_to_patches", True)
    settings.fixed("do_resize", True)
    settings.fixed("background_color", [127, 127, 127])
    most = settings.integer("max_patches", most_tiles, most=64)
    least = settings.integer("min_patches", 2, most=most)
    half = (0.5, 0.5, 0.5)
    levels = read_levels(settings, half, half, is_normalized=True)
    fit = OcrFit(side, whole, least, most)
    made = OcrProcessor(patch_size, merge_size, 1, fit, "planes", levels, None, tokens_per_row)
    if most_tokens is not None:
        require_cap(most_tokens, made.tokens_of(0, 0))
        while most and made.tokens_of(most, 1) > most_tokens:
            most -= 1
        most = 0 if most < least else most
    return replace(made, fit=replace(fit, most=most), most_tokens=made.tokens_of(most, 1))


READERS = {
    "DeepseekOcr2ImageProcessor": _read_ocr,
    "GotOcr2ImageProcessor": _read_internvl,
    "Llama4ImageProcessor": _read_llama4,
    "UnlimitedOcrImageProcessor": _read_clip_ocr,
}
