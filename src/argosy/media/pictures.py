"""Prepare a decoded picture for a vision tower, as the reference processors do.

    uint8 [height, width, 3]  ->  resize  ->  pad  ->  scale and normalise  ->  patches float32 [patches, values], grid

Height and width alone decide a picture's new size, and so its number of tokens; `grid` and `num_tokens` need no
pixels. The families differ in how they choose the size, and in how they order patches and the values of a patch:

    Qwen2-VL to Qwen3.5   multiples of patch * merge, a number of pixels between two limits
    MiniMax-M3            the same, with other limits
    GLM-4.1V to GLM-4.6V  the same, counted over the frames of a patch; a side below one token is enlarged to one first
    GLM-5.3               never enlarged but to the least number of tokens, then padded with black to whole tokens
    Kimi-VL, K2.5         never enlarged, limited patches, then padded with black; resized by Pillow as the
                          model's own code does, while transformers uses torchvision here, which differs by a level
    Kimi-K3               the same; its code draws a chessboard where a picture is transparent, this one white as always
    Gemma-4               as large as the number of tokens allows
    Llama-4, InternVL     cut into tiles (`tiles.py`), and so for DeepSeek-OCR
    Step-3.7              cut into windows beside a view of the whole (`windows.py`)
    DeepSeek-V4, V4.1     as many tokens as a block may have, marks included, then padded with grey (`blocks.py`)
    Pixtral               never enlarged but to whole tokens; limited longer side; a token after each row of tokens

Elsewhere: `decoder.py` decodes files; `model/encoders/` runs the towers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

from argosy.errors import BadMedia, UnsupportedModel, UsageError
from argosy.installed import members
from argosy.media.levels import CLIP_MEAN, CLIP_STD, read_levels, require_cap
from argosy.media.parts import Kind
from argosy.media.patches import PictureProcessor, Size
from argosy.media.settings import SOUND_KEYS, Settings

_LONGEST_RATIO = 200  # the sides of a picture or frame, for Qwen and GLM
GEMMA_TOKENS = (70, 140, 280, 560, 1120)
_FILES = ("tiles", "windows", "blocks")  # each with `READERS`, by image_processor_type
_FEWEST_TOKENS = 16  # a cap below this would distort pictures


def require_ratio(height: int, width: int, kind: Kind) -> None:
    """Refuse a picture or video that Qwen's and GLM's processors refuse.

    Raises:
        BadMedia: one side is more than 200 times the other.
    """
    if max(height, width) > _LONGEST_RATIO * min(height, width):
        raise BadMedia(
            f"a side of a {kind} may be at most {_LONGEST_RATIO} times as long as the other for this model, "
            f"found {width:,} x {height:,} pixels",
            kind=kind,
            needed=_LONGEST_RATIO,
            found=max(height, width) / min(height, width),
        )


@dataclass(frozen=True, slots=True)
class QwenFit:
    """Chooses multiples of `factor` whose product lies between two limits, with nearly the same aspect ratio.

    frames: the number of frames over which pixels are counted: 1 for Qwen.
    is_raised: GLM raises the shorter side to `factor` first.
    is_capped: `most_pixels` is a cap of ours, kept even where the reference would exceed it.
    """

    factor: int
    least_pixels: int
    most_pixels: int
    frames: int = 1
    is_raised: bool = False
    is_capped: bool = False

    def size(self, height: int, width: int) -> Size:
        factor = self.factor
        if self.is_raised and min(height, width) < factor:
            scale = max(factor / height, factor / width)
            height, width = int(height * scale), int(width * scale)
        require_ratio(height, width, "picture")
        # Python's round: halves go to the even neighbour.
        rows, columns = round(height / factor) * factor, round(width / factor) * factor
        if self.frames * rows * columns > self.most_pixels:
            rows, columns = self._shrunk(height, width)
        elif self.frames * rows * columns < self.least_pixels:
            scale = math.sqrt(self.least_pixels / (self.frames * height * width))
            rows, columns = (math.ceil(side * scale / factor) * factor for side in (height, width))
            # A cap on tokens may be near the lower limit of pixels.
            if self.is_capped and self.frames * rows * columns > self.most_pixels:
                rows, columns = self._shrunk(height, width)
        return Size(rows, columns, rows, columns)

    def _shrunk(self, height: int, width: int) -> tuple[int, int]:
        factor, scale = self.factor, math.sqrt((self.frames * height * width) / self.most_pixels)
        rows, columns = (max(factor, math.floor(side / scale / factor) * factor) for side in (height, width))
        return rows, columns


def _capped(
    sized: Callable[[int], Size], limit: int, num_tokens: Callable[[Size], int], most_tokens: int | None
) -> Size:
    """Return the size within `limit`, which is lowered until the size has at most `most_tokens`."""
    size = sized(limit)
    while most_tokens is not None and num_tokens(size) > most_tokens and limit > 1:
        limit = limit * 63 // 64
        size = sized(limit)
    return size


@dataclass(frozen=True, slots=True)
class KimiFit:
    """Keeps a picture's size, or shrinks it to the most patches in all and on a side; then pads to whole tokens."""

    patch_size: int
    merge_size: int
    most_patches: int
    most_on_a_side: int
    most_tokens: int | None = None

    def size(self, height: int, width: int) -> Size:
        # Padding adds tokens, so only trying shows how many patches respect a cap on tokens.
        sized = partial(self._size, height, width)
        return _capped(sized, self.most_patches, self._num_tokens, self.most_tokens)

    def _size(self, height: int, width: int, most_patches: int) -> Size:
        side = self.most_on_a_side * self.patch_size
        num_patches = max(1, height // self.patch_size) * max(1, width // self.patch_size)
        scale = min(1.0, math.sqrt(most_patches / num_patches), side / height, side / width)
        rows, columns = (min(max(1, int(length * scale)), side) for length in (height, width))
        factor = self.merge_size * self.patch_size
        return Size(rows, columns, -(-rows // factor) * factor, -(-columns // factor) * factor)

    def _num_tokens(self, size: Size) -> int:
        return size.padded_height * size.padded_width // (self.merge_size * self.patch_size) ** 2


@dataclass(frozen=True, slots=True)
class Glm5Fit:
    """Pads a picture to whole tokens, after enlarging or shrinking it so that their number lies between two limits."""

    factor: int
    least_tokens: int
    most_tokens: int

    def size(self, height: int, width: int) -> Size:
        area = self.factor**2
        rows, columns = self._padded(height), self._padded(width)
        if rows * columns < self.least_tokens * area:
            scale = math.sqrt(self.least_tokens * area / (height * width))
            rows, columns = (self._padded(max(1, math.ceil(side * scale))) for side in (height, width))
        if rows * columns > self.most_tokens * area:
            rows, columns = self._shrunk(height, width)
        scale = min(rows / height, columns / width)
        if height * width >= self.least_tokens * area:
            scale = min(1.0, scale)
        return Size(
            max(1, min(rows, math.floor(height * scale))),
            max(1, min(columns, math.floor(width * scale))),
            rows,
            columns,
        )

    def _shrunk(self, height: int, width: int) -> tuple[int, int]:
        """Return the padded sides of the highest copy that fits, as a bisection of heights finds it."""
        low, high, found = 1, height, (self.factor, self.factor)
        while low <= high:
            middle = (low + high) // 2
            rows, columns = self._padded(middle), self._padded(max(1, math.floor(width * middle / height)))
            if rows * columns <= self.most_tokens * self.factor**2:
                low, found = middle + 1, (rows, columns)
            else:
                high = middle - 1
        return found

    def _padded(self, side: int) -> int:
        return math.ceil(side / self.factor) * self.factor


@dataclass(frozen=True, slots=True)
class GemmaFit:
    """Chooses the largest multiples of `factor` that take at most `most_tokens`, with nearly the same aspect ratio."""

    factor: int
    most_tokens: int

    def size(self, height: int, width: int) -> Size:
        factor, most_pixels = self.factor, self.most_tokens * self.factor**2
        scale = math.sqrt(most_pixels / (height * width))
        rows, columns = (math.floor(scale * side / factor) * factor for side in (height, width))
        # A picture narrower than one token becomes one token wide.
        if not rows:
            rows, columns = factor, min(width // height, self.most_tokens) * factor
        elif not columns:
            rows, columns = min(height // width, self.most_tokens) * factor, factor
        return Size(rows, columns, rows, columns)


@dataclass(frozen=True, slots=True)
class PixtralFit:
    """Keeps a picture's size, or shrinks it to the longest side; then enlarges it to whole tokens."""

    factor: int
    longest: int
    most_tokens: int | None = None

    def size(self, height: int, width: int) -> Size:
        # Whole tokens, and those after rows, exceed the area, so only trying shows which side respects a cap on tokens.
        return _capped(partial(self._size, height, width), self.longest, self._num_tokens, self.most_tokens)

    def _size(self, height: int, width: int, longest: int) -> Size:
        ratio = max(1.0, height / longest, width / longest)
        # The reference makes nothing of a picture that is narrower than a pixel then; Mistral's own code keeps a pixel.
        rows, columns = (
            -(-max(1, int(side / ratio)) // self.factor) * self.factor for side in (height, width)
        )
        return Size(rows, columns, rows, columns)

    def _num_tokens(self, size: Size) -> int:
        return size.height // self.factor * (size.width // self.factor + 1)


def read_picture_processor(
    raw: Mapping[str, object],
    implied: Mapping[str, object] = MappingProxyType({}),
    *,
    most_tokens: int | None = None,
    where: str = "preprocessor_config.json",
) -> PictureProcessor:
    """Make the processor that a checkpoint's settings describe.

    Args:
        raw: the object in `preprocessor_config.json`, or in `processor_config.json`, where it is `image_processor`.
        implied: settings that the tower's config implies, for those that are absent.
        most_tokens: cap on the tokens of a picture; the cap lowers the model's own limit and never raises it.
        where: the name of the file, for errors.

    Raises:
        UnsupportedModel: the processor is none of the above, or has an unknown setting.
        CheckpointError: a setting is malformed.
        UsageError: the cap is too low.
    """
    inner = raw.get("image_processor")
    if isinstance(inner, dict):
        raw, where = inner, f"{where}: image_processor"
    raw = {**implied, **{key: value for key, value in raw.items() if value is not None}}
    name = raw.get("image_processor_type")
    if "media_proc_cfg" in raw:
        name = "Kimi_K25ImageProcessor"
    elif "in_token_limit" in raw:
        name = "KimiVLImageProcessor"
    read = _READERS.get(name.removesuffix("Fast")) if isinstance(name, str) else None
    if read is None:
        raise UnsupportedModel(
            f"{where} asks for image_processor_type {name!r:.80}; supported: {', '.join(_READERS)}",
            key="image_processor_type",
            value=name,
            supported=list(_READERS),
        )
    if most_tokens is not None and most_tokens < _FEWEST_TOKENS:
        raise UsageError(
            f"the cap on a picture's tokens must be at least {_FEWEST_TOKENS}, found {most_tokens}"
        )
    settings = Settings(raw, where)
    processor = read(settings, most_tokens)
    settings.finish(SOUND_KEYS)
    return processor


def _read_qwen(settings: Settings, most_tokens: int | None) -> PictureProcessor:
    return _read_qwen_or_glm(settings, most_tokens, (56 * 56, 28 * 28 * 1280), is_glm=False)


def _read_minimax(settings: Settings, most_tokens: int | None) -> PictureProcessor:
    return _read_qwen_or_glm(settings, most_tokens, (56 * 56, 672 * 672), is_glm=False)


def _read_glm(settings: Settings, most_tokens: int | None) -> PictureProcessor:
    return _read_qwen_or_glm(settings, most_tokens, (112 * 112, 28 * 28 * 15000), is_glm=True)


def _read_glm5(settings: Settings, most_tokens: int | None) -> PictureProcessor:
    patch_size = settings.integer("patch_size", 14, most=256)
    merge_size = settings.integer("merge_size", 2, most=16)
    frames = settings.integer("temporal_patch_size", 2, most=16)
    expansion = settings.integer("patch_expand_factor", 1, most=16)
    least, most = settings.integer("min_image_tokens", 16), settings.integer("max_image_tokens", 8000)
    settings.fixed("do_resize", True)
    settings.passed("size")  # the reference does not read it
    if most_tokens is not None:
        most = min(most, most_tokens // expansion**2)
        require_cap(most_tokens, expansion**2)
    fit = Glm5Fit(patch_size * merge_size * expansion, least, most)
    levels = read_levels(settings, CLIP_MEAN, CLIP_STD, is_normalized=True)
    return PictureProcessor(patch_size, merge_size, frames, fit, "merged", levels, most_tokens)


def _read_qwen_or_glm(
    settings: Settings, most_tokens: int | None, limits: tuple[int, int], *, is_glm: bool
) -> PictureProcessor:
    patch_size = settings.integer("patch_size", 14, most=256)
    merge_size = settings.integer("merge_size", 2, most=16)
    frames = settings.integer("temporal_patch_size", 2, most=16)
    settings.fixed("do_resize", True)
    least, most = _pixel_limits(settings, limits, is_glm=is_glm)
    factor, counted = patch_size * merge_size, frames if is_glm else 1
    if most_tokens is not None:
        most = min(most, most_tokens * factor**2 * counted)
    fit = QwenFit(factor, least, most, counted, is_raised=is_glm, is_capped=most_tokens is not None)
    levels = read_levels(settings, CLIP_MEAN, CLIP_STD, is_normalized=True)
    return PictureProcessor(patch_size, merge_size, frames, fit, "merged", levels, most_tokens)


def _pixel_limits(settings: Settings, limits: tuple[int, int], *, is_glm: bool) -> tuple[int, int]:
    least, most = limits
    # MiniMax's files give a square that their processor does not read.
    is_square = settings.holds("size", [672, 672], {"height": 672, "width": 672})
    size = None if is_square else settings.nested("size")
    # The older names come first.
    if not is_glm and settings.has("min_pixels") and settings.has("max_pixels"):
        return settings.integer("min_pixels", None), settings.integer("max_pixels", None)
    if size is not None:
        least, most = size.integer("shortest_edge", None), size.integer("longest_edge", None)
        size.finish()
    if not is_glm:
        least, most = settings.integer("min_pixels", least), settings.integer("max_pixels", most)
    return least, most


def _read_kimi(settings: Settings, most_tokens: int | None) -> PictureProcessor:
    own = settings.nested("media_proc_cfg")  # the version in the checkpoint's own code, with other names
    if own is not None:
        patch_size, merge_size = (
            own.integer("patch_size", None, most=256),
            own.integer("merge_kernel_size", None, most=16),
        )
        most_patches, most_on_a_side = (
            own.integer("in_patch_limit", None),
            own.integer("patch_limit_on_one_side", None),
        )
        own.fixed("fixed_output_tokens", None)
        own.passed(
            "config_type", "in_patch_limit_each_frame", "in_patch_limit_video", "max_num_frames_each_video"
        )
        own.passed("sample_fps", "temporal_merge_kernel_size", "timestamp_mode")  # settings of videos
        own.passed("transparent_bg_config", "transparent_bg_fill_stage")  # transparent parts are white here
    else:
        patch_size, merge_size = (
            settings.integer("patch_size", 14, most=256),
            settings.integer("merge_size", 2, most=16),
        )
        most_patches, most_on_a_side = settings.integer("max_patches", 16_384), 512
        size = settings.nested("size")
        if size is not None:
            most_on_a_side = size.integer("max_height", None)
            size.fixed("max_width", most_on_a_side)
            size.finish()
        settings.fixed("do_resize", True)
    levels = read_levels(own or settings, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), is_normalized=True)
    if own is not None:
        own.finish()
    fit = KimiFit(patch_size, merge_size, most_patches, most_on_a_side, most_tokens)
    return PictureProcessor(patch_size, merge_size, 1, fit, "planes", levels, most_tokens)


def _read_kimi_vl(settings: Settings, most_tokens: int | None) -> PictureProcessor:
    """As `KimiVLImageProcessor` in the checkpoint, which refuses a picture of 512 patches on a side."""
    patch_size = settings.integer("patch_size", 14, most=256)
    merge_size = 2
    settings.fixed("merge_kernel_size", [merge_size, merge_size])
    settings.fixed("pad_input", True)
    settings.passed("num_pooled_tokens")
    levels = read_levels(settings, CLIP_MEAN, CLIP_STD, is_normalized=True)
    fit = KimiFit(patch_size, merge_size, settings.integer("in_token_limit", 4096), 511, most_tokens)
    return PictureProcessor(patch_size, merge_size, 1, fit, "planes", levels, most_tokens)


def _read_gemma(settings: Settings, most_tokens: int | None) -> PictureProcessor:
    patch_size = settings.integer("patch_size", 16, most=256)
    merge_size = settings.integer("pooling_kernel_size", 3, most=16)
    settings.fixed("max_soft_tokens", 280, *GEMMA_TOKENS)
    tokens = settings.integer("max_soft_tokens", 280)
    settings.fixed("do_resize", True)
    settings.passed("image_seq_length", "size")  # the reference does not read it either
    if most_tokens is not None:
        require_cap(most_tokens, GEMMA_TOKENS[0])
        tokens = max(count for count in GEMMA_TOKENS if count <= min(tokens, most_tokens))
    levels = read_levels(settings, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), is_normalized=False)
    fit = GemmaFit(patch_size * merge_size, tokens)
    return PictureProcessor(patch_size, merge_size, 1, fit, "pixels", levels, tokens)


def _read_pixtral(settings: Settings, most_tokens: int | None) -> PictureProcessor:
    patch_size = settings.side("patch_size", 16, most=256)
    merge_size = settings.integer("spatial_merge_size", 1, most=16)
    longest = 1024
    if (size := settings.nested("size")) is not None:
        longest = size.integer("longest_edge", None)
        size.finish()
    settings.fixed("do_resize", True)
    levels = read_levels(
        settings, CLIP_MEAN, CLIP_STD, is_normalized=True, may_pad=True
    )  # to other pictures' size
    fit = PixtralFit(patch_size * merge_size, longest, most_tokens)
    return PictureProcessor(patch_size, merge_size, 1, fit, "merged", levels, most_tokens, tokens_per_row=1)


_READERS: dict[str, Callable[[Settings, int | None], PictureProcessor]] = {
    "Qwen2VLImageProcessor": _read_qwen,
    "MiniMaxM3VLImageProcessor": _read_minimax,
    "Glm4vImageProcessor": _read_glm,
    "Glm46VImageProcessor": _read_glm,
    "Glm5NextImageProcessor": _read_glm5,
    "Kimi_K25ImageProcessor": _read_kimi,
    "KimiVLImageProcessor": _read_kimi_vl,
    "Gemma4ImageProcessor": _read_gemma,
    "PixtralImageProcessor": _read_pixtral,
    **{name: read for file in members("argosy.media", _FILES) for name, read in file.READERS.items()},
}
