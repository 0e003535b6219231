"""Cut pictures into windows beside a view of the whole, as Step-3.7's processor does.

    uint8 [height, width, 3]  ->  windows of the scaled picture, row by row, each scaled to one size
                              ->  the view: the whole picture, scaled to a square

A picture that fits the view has windows only if it is elongated; of others, only the very elongated have small windows.
Sizes and scaling are those of transformers, which uses torchvision's bilinear filter. But a window that lies partly
beyond the picture is filled with black, as in the makers' code and in llama.cpp; transformers stretches what it shows.
A narrow picture becomes a square, filled with black; here one that is longer than the limit is shrunk before that, so
that the square is bounded.

Elsewhere: `tiles.py` cuts pictures for Llama-4 and InternVL.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from argosy.errors import UnsupportedModel
from argosy.media.levels import CLIP_MEAN, CLIP_STD, read_levels, require_cap, tokens_of_tile
from argosy.media.patches import Grid, PictureProcessor, Size
from argosy.media.resize import Resizer, scaled_linearly
from argosy.media.settings import Settings

_NARROW, _ELONGATED, _LONG = 32, 1.5, 4  # pixels of the shorter side; ratios of the sides


class Plan(NamedTuple):
    """What becomes of a picture: the side of the square that it is filled up to (0: none), the size that the view is
    scaled from, the size that is cut, and the windows' side in it, rows and columns.
    """

    square: int
    whole: tuple[int, int]
    cut: tuple[int, int]
    side: int = 0
    rows: int = 0
    columns: int = 0


@dataclass(frozen=True, slots=True)
class StepFit:
    """Chooses the windows of a picture.

    side, window: of the view and of a window, in pixels.
    longest: the longest side of a picture.
    most_windows: None: no limit; otherwise a picture with more is shrunk, or seen without windows.
    """

    side: int
    window: int
    longest: int
    most_windows: int | None = None

    def size(self, height: int, width: int) -> Size:
        """Return the size of all views: windows in their places, and below several rows, or beside one, the view."""
        rows, columns = self.plan(height, width)[-2:]
        height, width = max(self.side, rows * self.window), max(self.side, columns * self.window)
        if rows > 1:
            height = self.side + rows * self.window
        elif rows:
            width = self.side + columns * self.window
        return Size(height, width, height, width)

    def arrangement(self, height: int, width: int) -> tuple[int, int]:
        """Return rows and columns of windows in a canvas of this `size`."""
        if height <= max(self.side, self.window):
            columns = (width - self.side) // self.window
            return int(columns > 0), columns
        return (height - self.side) // self.window, width // self.window

    def plan(self, height: int, width: int) -> Plan:
        longest = self.longest
        plan = self._plan(height, width, longest)
        while self.most_windows is not None and plan.rows * plan.columns > self.most_windows:
            if longest <= self.side:
                return Plan(plan.square, plan.whole, plan.whole)
            longest = longest * 63 // 64
            plan = self._plan(height, width, longest)
        return plan

    def _plan(self, height: int, width: int, longest: int) -> Plan:
        square = 0
        if min(height, width) < _NARROW and max(height, width) > _LONG * min(height, width):
            square = height = width = min(max(height, width), longest)
        if max(height, width) > longest:
            scale = longest / max(height, width)
            height, width = max(1, int(height * scale)), max(1, int(width * scale))
        short, long = sorted((height, width))
        if long <= self.side:
            side = short if long > _ELONGATED * short else 0
        else:
            side = min(short, self.window) if long > _LONG * short else self.window
        if not side:
            return Plan(square, (height, width), (height, width))
        cut = tuple(
            side * (length // side + (length % side > 0.2 * side)) if length >= side else length
            for length in (height, width)
        )
        rows, columns = (max(1, length // side) for length in cut)
        return Plan(square, (height, width), (cut[0], cut[1]), side, rows, columns)


@dataclass(frozen=True, slots=True)
class WindowProcessor(PictureProcessor):
    """Makes the patches of windows, then those of the view, row by row in each. The grid is that of `StepFit.size`."""

    fit: StepFit

    @property
    def sides(self) -> Mapping[str, int]:
        return {"size": self.fit.side, "size of windows": self.fit.window}

    def resize(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        plan, side, window = self.fit.plan(*pixels.shape[:2]), self.fit.side, self.fit.window
        size = self.fit.size(*pixels.shape[:2])
        if plan.square:
            scale = plan.square / max(pixels.shape[:2])
            height, width = (max(1, int(length * scale)) for length in pixels.shape[:2])
            filled = np.zeros((plan.square, plan.square, 3), np.uint8)
            filled[:height, :width] = scaled_linearly(pixels, height, width)
            pixels = filled
        canvas = np.zeros((size.height, size.width, 3), np.uint8)
        self._view_in(canvas)[:] = scaled_linearly(scaled_linearly(pixels, *plan.whole), side, side)
        if not plan.side:
            return canvas
        cut = np.zeros((plan.rows * plan.side, plan.columns * plan.side, 3), np.uint8)
        cut[: plan.cut[0], : plan.cut[1]] = scaled_linearly(pixels, *plan.cut)
        scaler = Resizer(plan.side, plan.side, window, window, is_linear=True)
        for row in range(plan.rows):
            for column in range(plan.columns):
                one = cut[row * plan.side :, column * plan.side :][: plan.side, : plan.side]
                canvas[row * window :, column * window :][:window, :window] = scaler.resize(one)
        return canvas

    def patches(self, canvas: NDArray[np.uint8]) -> tuple[NDArray[np.float32], Grid]:
        window = self.fit.window
        rows, columns = self.fit.arrangement(*canvas.shape[:2])
        views = [
            canvas[row * window :, column * window :][:window, :window]
            for row in range(rows)
            for column in range(columns)
        ]
        views.append(self._view_in(canvas))
        return self.patches_of(views), (
            1,
            canvas.shape[0] // self.patch_size,
            canvas.shape[1] // self.patch_size,
        )

    def largest_grid(self) -> Grid:
        assert self.fit.most_windows is not None
        side, window = self.fit.side, self.fit.window
        height, width = side + self.fit.most_windows * window, side
        if self.fit.most_windows == 1:
            height, width = max(side, window), height
        return 1, height // self.patch_size, width // self.patch_size

    def _num_tokens(self, rows: int, columns: int) -> int:
        arrangement = self.fit.arrangement(rows * self.patch_size, columns * self.patch_size)
        return window_tokens(*arrangement, self.fit, self.patch_size * self.merge_size)

    def _view_in(self, canvas: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return the part of a canvas that is the view."""
        side = self.fit.side
        return canvas[-side:, :side] if len(canvas) > max(side, self.fit.window) else canvas[:side, -side:]


def window_tokens(rows: int, columns: int, fit: StepFit, of_token: int) -> int:
    """Return the number of a picture's tokens: each window and the view have two marks around them, and each row of
    windows except the last has a token after it.
    """
    of_window, of_view = ((side // of_token) ** 2 + 2 for side in (fit.window, fit.side))
    return of_view + rows * columns * of_window + max(0, rows - 1)


def _read_step(settings: Settings, most_tokens: int | None) -> WindowProcessor:
    """Read the settings of `Step3p7ImageProcessor`, whose `patch_size` is the side of a window."""
    patch_size = settings.integer("vision_patch_size", 14, most=256)
    merge_size = settings.integer("downsampler_stride", 4, most=16)
    side = settings.square("size", 728, most=65_536)
    window = settings.integer("patch_size", 504, most=65_536)
    for length in (side, window):
        tokens_of_tile(length, patch_size * merge_size)
    if side >= 2 * window:
        raise UnsupportedModel(
            f"windows have {window} pixels on a side, and the view {side}; supported: more than half of it",
            key="patch_size",
            value=window,
        )
    settings.fixed("do_resize", True)
    fit = StepFit(side, window, settings.integer("max_image_size", 3024))
    levels = read_levels(settings, CLIP_MEAN, CLIP_STD, is_normalized=True, filter=2)
    if most_tokens is not None:
        of_token = patch_size * merge_size
        require_cap(most_tokens, least := window_tokens(0, 0, fit, of_token))
        of_window = (window // of_token) ** 2 + 2
        # All in one column, whose windows but the last have a token after them.
        fit = replace(fit, most_windows=(most_tokens - least + 1) // (of_window + 1))
    return WindowProcessor(patch_size, merge_size, 1, fit, "planes", levels, most_tokens)


READERS = {"Step3p7ImageProcessor": _read_step}
