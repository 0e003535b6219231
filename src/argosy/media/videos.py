"""Choose, scale and label the frames of a video for a vision tower, as the reference processors do.

    frames in the file, rate  ->  sample  ->  indices  ->  resize  ->  groups of frames  ->  patches, grid
                                     └──────────────────────────────────────────────────>  times  ->  texts of groups

A tower takes a group of frames at once: two for Qwen and GLM, four for Kimi, one for Gemma. In most families text with
the time surrounds each group, so a video becomes many short spans. The number of frames, the rate, the height and the
width decide how many tokens a video takes; `num_tokens` needs no pixels.

    Qwen3-VL, Qwen3.5     2 frames a second, 4 to 768 of them; pixels counted over all frames; <1.2 seconds>
    Qwen3-Omni            the same rate; pixels counted in each frame; no text: time is in the rotary positions
    GLM-4.1V to GLM-4.5V  2 frames a second of the first 300 seconds, then fewer; whole seconds after each group
    GLM-4.6V              3 to 0.5 groups a second, by length; seconds with a decimal after each group
    Kimi-K2.5             2 frames a second; each frame as a picture, four in a group; hours:minutes:seconds before it
    Gemma-4               32 frames of the whole video, each as a picture of 70 tokens; minutes:seconds before it

Elsewhere: `frames.py` finds the frames in a file; `resize.py` scales them; `pictures.py` prepares pictures.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from argosy.errors import BadMedia, UnsupportedModel
from argosy.media.levels import CLIP_MEAN, CLIP_STD, read_levels
from argosy.media.parts import RequestMedia
from argosy.media.patches import Grid, Size, patch_values
from argosy.media.pictures import GEMMA_TOKENS, GemmaFit, KimiFit, QwenFit, require_ratio
from argosy.media.resize import Resizer
from argosy.media.settings import SOUND_KEYS, Settings

Indices = NDArray[np.int64]
Frames = NDArray[np.uint8]  # [frames, height, width, 3]


class Texts(NamedTuple):
    """The texts before and after the tokens of a group."""

    before: str = ""
    after: str = ""


class VideoFit(Protocol):
    """Chooses the size of all frames.

    most_pixels: our cap on the pixels of all frames together; None: only the model's own limit applies.
    """

    def size(self, num_frames: int, height: int, width: int, most_pixels: int | None) -> Size: ...


@dataclass(frozen=True, slots=True)
class VideoProcessor:
    """Makes patches from the frames of a video.

    patch_size: side of a patch.
    merge_size: side of the square of patches that becomes one token.
    group_frames: frames of a group.
    are_joined: a patch covers all frames of a group; otherwise each frame has its own patches.
    fit: chooses the size.
    sample: chooses the indices of frames, in order, from the number of frames and their rate; some may repeat.
    label: makes the texts of a group from the times of its first and its last frame.
    surroundings: the text that the chat template writes around a video's placeholder, replaced by the texts of groups.
    levels: float32 [3, 256], what each 8-bit value becomes in each channel.
    order: order of values in a patch: "planes": channels, frames, then pixels; "pixels": each pixel with its channels.
    between: precedes the texts of all groups but the first.
    most_tokens, most_group_tokens: caps on the tokens of a video and of a group, below the model's own limits.
    """

    patch_size: int
    merge_size: int
    group_frames: int
    are_joined: bool
    fit: VideoFit
    sample: Callable[[int, float], Indices]
    label: Callable[[float, float], Texts]
    surroundings: Texts
    levels: NDArray[np.float32] = field(repr=False, compare=False)
    order: Literal["planes", "pixels"] = "planes"
    between: str = ""
    most_tokens: int | None = None
    most_group_tokens: int | None = None

    def num_groups(self, num_frames: int) -> int:
        """Return the number of groups of `num_frames` sampled frames; the last group may be smaller."""
        return -(-num_frames // self.group_frames)

    def groups(self, num_frames: int) -> list[range]:
        """Return the frames of each group, among the sampled frames."""
        size = self.group_frames
        return [range(start, min(start + size, num_frames)) for start in range(0, num_frames, size)]

    def num_tokens(self, num_frames: int, height: int, width: int) -> int:
        """Return the tokens of a video with `num_frames` sampled frames.

        Raises:
            BadMedia: the video is too narrow for this model, or its frames cannot shrink to the allowed tokens.
        """
        return self._num_tokens(num_frames, self.size(num_frames, height, width))

    def size(self, num_frames: int, height: int, width: int) -> Size:
        """Return the size of all frames after resizing. Raises what `num_tokens` raises."""
        size = self.fit.size(num_frames, height, width, None)
        most = self._most_tokens(num_frames)
        if most is None or self._num_tokens(num_frames, size) <= most:
            return size
        # Sizes are rounded to whole tokens, so only trying shows how many pixels respect the cap.
        most_pixels = most * (self.patch_size * self.merge_size) ** 2 * self.group_frames
        while most_pixels:
            size = self.fit.size(num_frames, height, width, most_pixels)
            if self._num_tokens(num_frames, size) <= most:
                return size
            most_pixels = most_pixels * 63 // 64
        needed = self._num_tokens(num_frames, size)
        raise BadMedia(
            f"a video of this length may take at most {most} tokens, and {num_frames} frames of {width:,} x {height:,} "
            f"need at least {needed}",
            hint="cut the video into pieces, or allow more tokens (`--video-tokens`, `--image-tokens`)",
            kind="video",
            needed=most,
            found=needed,
        )

    def resize(self, frames: Iterable[Frames], count: int, request: RequestMedia | None = None) -> Frames:
        """Scale and pad frames [height, width, 3], which arrive one by one.

        Args:
            request: refuses a video with too many tokens after its first frame, and counts the time of scaling.

        Returns:
            uint8 [frames, padded height, padded width, 3]; fewer than `count` frames if no more arrive.

        Raises:
            BadMedia: as `num_tokens`; or the frames differ in size.
            PromptTooLong, UsageError: the media of the request have too many tokens or take too long.
        """
        resizer, size, shape, made = None, None, None, 0
        canvases = np.zeros((0, 0, 0, 3), np.uint8)
        for frame in frames:
            if resizer is None or size is None:
                shape = frame.shape
                size = self.size(count, shape[0], shape[1])
                if request is not None:
                    request.require_room(self._num_tokens(count, size))
                resizer = Resizer(shape[0], shape[1], size.height, size.width)
                canvases = np.zeros((count, size.padded_height, size.padded_width, 3), np.uint8)
            if frame.shape != shape:
                raise BadMedia("the frames of a video must all have the same size", kind="video")
            with nullcontext() if request is None else request.work():
                canvases[made, : size.height, : size.width] = resizer.resize(frame)
            made += 1
            del frame  # frees the frame before the next one arrives
        return canvases[:made]

    def texts(self, times: Sequence[float]) -> list[Texts]:
        """Return the texts of each group, from the times of the sampled frames, in seconds."""
        first, *others = (self.label(times[group[0]], times[group[-1]]) for group in self.groups(len(times)))
        return [first, *(Texts(self.between + before, after) for before, after in others)]

    def patches(self, canvases: Frames) -> tuple[NDArray[np.float32], Grid]:
        """Make the patches of one group.

        Args:
            canvases: the group's part of the result of `resize`.

        Returns:
            float32 [patches, values], and the grid (frames, rows, columns).
        """
        rows, columns = canvases.shape[1] // self.patch_size, canvases.shape[2] // self.patch_size
        if not self.are_joined:
            values = [patch_values(one[None], self.patch_size, 1, self.levels, 1) for one in canvases]
            made = np.concatenate(values)
            if self.order == "pixels":
                made = made.transpose(0, 2, 3, 1)
            return made.reshape(len(canvases) * rows * columns, -1), self.grid(canvases)
        missing = self.group_frames - len(canvases)
        if missing:  # the last frame is repeated
            canvases = np.concatenate([canvases, np.repeat(canvases[-1:], missing, axis=0)])
        made = patch_values(canvases, self.patch_size, self.merge_size, self.levels, self.group_frames)
        return made.reshape(rows * columns, -1), self.grid(canvases)

    def grid(self, canvases: Frames) -> Grid:
        """Return the grid of one group."""
        rows, columns = canvases.shape[1] // self.patch_size, canvases.shape[2] // self.patch_size
        return 1 if self.are_joined else len(canvases), rows, columns

    def _most_tokens(self, num_frames: int) -> int | None:
        most = [] if self.most_tokens is None else [self.most_tokens]
        if self.most_group_tokens is not None:
            most.append(self.most_group_tokens * self.num_groups(num_frames))
        return min(most, default=None)

    def _num_tokens(self, num_frames: int, size: Size) -> int:
        cells = size.padded_height * size.padded_width // (self.patch_size * self.merge_size) ** 2
        return cells * self.num_groups(num_frames)


@dataclass(frozen=True, slots=True)
class ClipFit:
    """Qwen3-VL and GLM: keeps the pixels of all frames together between two limits.

    most_frame_tokens: cap on the tokens of a frame, from the processor's own settings.
    """

    factor: int
    frames: int
    least_pixels: int
    most_pixels: int
    most_frame_tokens: int | None = None

    def size(self, num_frames: int, height: int, width: int, most_pixels: int | None) -> Size:
        factor = self.factor
        num_frames = max(num_frames, self.frames)
        most = self.most_pixels
        if self.most_frame_tokens is not None:
            per_frame = min(self.most_frame_tokens * factor**2, most // num_frames)
            most = max(per_frame, int(self.least_pixels * 1.05)) * num_frames
        most = most if most_pixels is None else min(most, most_pixels)
        if min(height, width) < factor:
            scale = max(factor / height, factor / width)
            height, width = int(height * scale), int(width * scale)
        require_ratio(height, width, "video")
        rows, columns = round(height / factor) * factor, round(width / factor) * factor
        counted = round(num_frames / self.frames) * self.frames
        if counted * rows * columns < self.least_pixels:
            scale = math.sqrt(self.least_pixels / (num_frames * height * width))
            rows, columns = (math.ceil(side * scale / factor) * factor for side in (height, width))
            if most_pixels is None or counted * rows * columns <= most_pixels:
                return Size(rows, columns, rows, columns)
        if counted * rows * columns > most:
            scale = math.sqrt((num_frames * height * width) / most)
            rows, columns = (
                max(factor, math.floor(side / scale / factor) * factor) for side in (height, width)
            )
        return Size(rows, columns, rows, columns)


@dataclass(frozen=True, slots=True)
class FrameFit:
    """Qwen3-Omni: each frame as a picture."""

    picture: QwenFit

    def size(self, num_frames: int, height: int, width: int, most_pixels: int | None) -> Size:
        own = self.picture
        if most_pixels is None:
            return own.size(height, width)
        most = max(1, min(own.most_pixels, most_pixels // num_frames))
        return QwenFit(own.factor, min(own.least_pixels, most), most, is_capped=True).size(height, width)


@dataclass(frozen=True, slots=True)
class KimiClipFit:
    """Kimi: each frame as a picture, with fewer patches."""

    picture: KimiFit

    def size(self, num_frames: int, height: int, width: int, most_pixels: int | None) -> Size:
        own = self.picture
        most = own.most_patches
        if most_pixels is not None:
            most = max(1, min(most, most_pixels // (num_frames * own.patch_size**2)))
        return KimiFit(own.patch_size, own.merge_size, most, own.most_on_a_side).size(height, width)


@dataclass(frozen=True, slots=True)
class GemmaClipFit:
    """Gemma: each frame as a picture."""

    picture: GemmaFit

    def size(self, num_frames: int, height: int, width: int, most_pixels: int | None) -> Size:
        own = self.picture
        most = own.most_tokens
        if most_pixels is not None:
            most = max(1, min(most, most_pixels // (num_frames * own.factor**2)))
        return GemmaFit(own.factor, most).size(height, width)


# ── which frames ────────────────────────────────────────────────────────────────────────────────────────────────────


def _sample_evenly(num_frames: int, rate: float, *, per_second: float, fewest: int, most: int) -> Indices:
    """Qwen3-VL: from the first frame to the last, at equal distances."""
    count = min(max(int(num_frames / rate * per_second), fewest), most, num_frames)
    return np.linspace(0, num_frames - 1, count).round().astype(np.int64)


def _sample_starts(
    num_frames: int, rate: float, *, per_second: float, fewest: int, most: int, multiple: int
) -> Indices:
    """Qwen3-Omni: the first frame of equal parts, whose number is a multiple of a group's frames."""
    most = min(most, num_frames) // multiple * multiple
    count = (
        math.floor(min(max(num_frames / rate * per_second, fewest), most, num_frames) / multiple) * multiple
    )
    if not count:  # fewer frames than a group needs
        return np.arange(num_frames)
    return (np.arange(count) * (num_frames / count)).astype(np.float32).astype(np.int64)


def _sample_parts(num_frames: int, rate: float, *, per_second: float) -> Indices:
    """Kimi: the first frame of equal parts."""
    count = min(max(1, int(num_frames / rate * per_second)), num_frames)
    return np.arange(count) * num_frames // count


def _sample_number(num_frames: int, rate: float, *, count: int) -> Indices:
    """Gemma: the first frame of each of `number` equal parts."""
    count = min(count, num_frames)
    return np.arange(count) * num_frames // count


def _sample_seconds(num_frames: int, rate: float, *, per_second: float, most_seconds: int) -> Indices:
    """GLM-4.5V: the first frame at or after each fraction of a second; an even number of frames."""
    last, seconds = num_frames - 1, num_frames / rate
    if seconds <= most_seconds:
        count = max(math.floor(seconds * per_second), 1)
        wanted = [min(last, math.ceil(i * rate / per_second)) for i in range(count)]
    elif (count := int(most_seconds * per_second)) >= num_frames:
        wanted = list(range(num_frames))
    else:
        wanted = [min(last, math.ceil(at * rate)) for at in np.linspace(0, seconds, count)]
    return _even(wanted)


_GLM_RATES = ((30, 3.0), (300, 1.0), (2400, 0.5))  # (most seconds, groups per second)
_GLM_MOST_FRAMES = 640
_GEMMA_MOST_FRAMES = 1024


def _sample_by_length(num_frames: int, rate: float, *, group_frames: int) -> Indices:
    """GLM-4.6V: fewer frames a second for a longer video; an even number of frames."""
    seconds = num_frames / rate
    counted = min(seconds, _GLM_RATES[-1][0])
    per_second = next(rate for longest, rate in _GLM_RATES if counted <= longest)
    count = min(int(counted * per_second * group_frames), _GLM_MOST_FRAMES)
    wanted: list[int] = []
    if num_frames < count:
        wanted = np.linspace(0, num_frames - 1, count, dtype=int).tolist()
    else:
        at, step = 0.0, 1 / (group_frames * per_second)
        for index in range(num_frames):
            if index * (1 / rate) >= at:
                at += step
                wanted.append(index)
                if at >= int(seconds):
                    break
    if len(wanted) < count:
        wanted = np.linspace(wanted[0], wanted[-1], count, dtype=int).tolist()
    elif len(wanted) > count > 0:
        wanted = np.linspace(0, num_frames - 1, count, dtype=int).tolist()
    return _even(wanted)


def _even(wanted: Iterable[int]) -> Indices:
    """Remove repetitions, but repeat the last frame if their number is odd."""
    once = list(dict.fromkeys(wanted))
    return np.array(once + once[-1:] * (len(once) % 2), np.int64)


# ── texts ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _qwen_texts(first: float, last: float) -> Texts:
    return Texts(f"<{(first + last) / 2:.1f} seconds><|vision_start|>", "<|vision_end|>")


def _no_texts(first: float, last: float) -> Texts:
    return Texts()


def _glm_texts(first: float, last: float) -> Texts:
    return Texts("<|begin_of_image|>", f"<|end_of_image|>{int(first)}")


def _glm46_texts(first: float, last: float) -> Texts:
    return Texts("<|begin_of_image|>", f"<|end_of_image|>{first:.1f} seconds")


def _kimi_texts(first: float, last: float) -> Texts:
    clock = time.strftime("%H:%M:%S", time.gmtime(first)) + f".{int(first % 1 * 1000):03d}"
    return Texts(f"{clock}<|media_begin|>video<|media_content|>", "<|media_end|>")


def _gemma_texts(first: float, last: float) -> Texts:
    return Texts(f"{int(first // 60):02d}:{int(first % 60):02d} ")


# ── settings ────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_video_processor(
    raw: Mapping[str, object],
    *,
    most_tokens: int | None = None,
    most_group_tokens: int | None = None,
    where: str = "video_preprocessor_config.json",
) -> VideoProcessor:
    """Make the processor that a checkpoint's settings describe.

    Args:
        raw: the object in `video_preprocessor_config.json`; in `processor_config.json`, where it is `video_processor`;
            or in `preprocessor_config.json`, where Qwen3-Omni and Kimi keep the settings of pictures and videos.
        most_tokens, most_group_tokens: caps that lower the model's own limits and never raise them.
        where: the name of the file, for errors.

    Raises:
        UnsupportedModel: the processor is none of the above, or has an unknown setting.
        CheckpointError: a setting is malformed.
    """
    inner = raw.get("video_processor")
    if isinstance(inner, dict):
        raw, where = inner, f"{where}: video_processor"
    name = raw.get("video_processor_type")
    if name is None and "media_proc_cfg" in raw:
        name = "Kimi_K25VideoProcessor"
    if name is None and "feature_extractor_type" in raw:
        name = "Qwen2VLVideoProcessor"
    read = _READERS.get(name) if isinstance(name, str) else None
    if read is None:
        found = (
            "has no video_processor_type" if name is None else f"asks for video_processor_type {name!r:.80}"
        )
        raise UnsupportedModel(
            f"{where} {found}; supported: {', '.join(_READERS)}",
            key="video_processor_type",
            value=name,
            supported=list(_READERS),
        )
    settings = Settings(raw, where)
    # These keys describe pictures and returned objects, or turn off sampling; Argosy always samples frames.
    settings.passed(
        "image_processor_type", "video_processor_type", "do_sample_frames", "return_metadata", "num_frames"
    )
    processor = read(settings, {"most_tokens": most_tokens, "most_group_tokens": most_group_tokens})
    settings.finish(SOUND_KEYS)
    return processor


def _patch_settings(settings: Settings, patch_size: int) -> tuple[int, int, int]:
    settings.fixed("do_resize", True)
    return (
        settings.integer("patch_size", patch_size, most=256),
        settings.integer("merge_size", 2, most=16),
        settings.integer("temporal_patch_size", 2, most=16),
    )


def _limits(settings: Settings, least: int, most: int) -> tuple[int, int]:
    size = settings.nested("size")
    if size is None:
        return least, most
    found = size.integer("shortest_edge", None), size.integer("longest_edge", None)
    size.finish()
    return found


def _read_qwen3_vl(settings: Settings, caps: dict[str, Any]) -> VideoProcessor:
    patch_size, merge_size, frames = _patch_settings(settings, 16)
    least, most = _limits(settings, 128 * 32 * 32, 32 * 32 * 768)
    frame_tokens = settings.integer("max_video_tokens", 768)
    is_capped = settings.flag("cap_pixels_per_frame", False)
    settings.passed("max_duration", "max_image_size")  # not read by the reference either
    sample = partial(
        _sample_evenly,
        per_second=settings.number("fps", 2.0),
        fewest=settings.integer("min_frames", 4),
        most=settings.integer("max_frames", 768),
    )
    fit = ClipFit(patch_size * merge_size, frames, least, most, frame_tokens if is_capped else None)
    levels = read_levels(settings, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), is_normalized=True)
    around = Texts("<|vision_start|>", "<|vision_end|>")
    return VideoProcessor(
        patch_size, merge_size, frames, True, fit, sample, _qwen_texts, around, levels, **caps
    )


def _read_omni(settings: Settings, caps: dict[str, Any]) -> VideoProcessor:
    patch_size, merge_size, frames = _patch_settings(settings, 14)
    # Qwen3-Omni's processor uses its own limits for video, whatever the file says.
    settings.passed("size", "min_pixels", "max_pixels", "use_token_compression", "max_video_tokens")
    settings.fixed("cap_pixels_per_frame", False)
    fit = FrameFit(QwenFit(patch_size * merge_size, 128 * 32 * 32, 768 * 32 * 32))
    sample = partial(
        _sample_starts,
        per_second=settings.number("fps", 2.0),
        fewest=settings.integer("min_frames", 4),
        most=settings.integer("max_frames", 768),
        multiple=frames,
    )
    levels = read_levels(settings, CLIP_MEAN, CLIP_STD, is_normalized=True)
    return VideoProcessor(
        patch_size, merge_size, frames, True, fit, sample, _no_texts, Texts(), levels, **caps
    )


def _read_glm(settings: Settings, caps: dict[str, Any], *, is_46: bool = False) -> VideoProcessor:
    patch_size, merge_size, frames = _patch_settings(settings, 14)
    least, most = _limits(settings, 112 * 112, 28 * 28 * 2 * 30_000)
    settings.passed("max_image_size")  # not read by the reference either
    per_second, most_seconds = settings.number("fps", 2.0), settings.integer("max_duration", 300)
    sample = (
        partial(_sample_by_length, group_frames=frames)
        if is_46
        else partial(_sample_seconds, per_second=per_second, most_seconds=most_seconds)
    )
    fit = ClipFit(patch_size * merge_size, frames, least, most)
    levels = read_levels(settings, CLIP_MEAN, CLIP_STD, is_normalized=True)
    label = _glm46_texts if is_46 else _glm_texts
    return VideoProcessor(patch_size, merge_size, frames, True, fit, sample, label, Texts(), levels, **caps)


def _read_kimi(settings: Settings, caps: dict[str, Any]) -> VideoProcessor:
    own = settings.nested("media_proc_cfg")  # the version in the checkpoint's own code, with other names
    if own is not None:
        patch_size, merge_size = (
            own.integer("patch_size", None, most=256),
            own.integer("merge_kernel_size", None, most=16),
        )
        frames, per_second = (
            own.integer("temporal_merge_kernel_size", 4, most=16),
            own.number("sample_fps", 2.0),
        )
        most_patches = own.integer("in_patch_limit_each_frame", 4096)
        most_on_a_side = own.integer("patch_limit_on_one_side", 512)
        own.fixed("timestamp_mode", "hh:mm:ss.fff")
        own.fixed("in_patch_limit_video", None)
        own.fixed("max_num_frames_each_video", None)
        own.passed("config_type", "in_patch_limit", "fixed_output_tokens")  # settings of pictures
    else:
        settings.fixed("do_resize", True)
        patch_size, merge_size = (
            settings.integer("patch_size", 14, most=256),
            settings.integer("merge_size", 2, most=16),
        )
        frames, per_second = settings.integer("temporal_patch_size", 4, most=16), settings.number("fps", 2.0)
        most_patches, most_on_a_side = settings.integer("max_patches", 4096), 512
        size = settings.nested("size")
        if size is not None:
            most_on_a_side = size.integer("max_height", None)
            size.fixed("max_width", most_on_a_side)
            size.finish()
    levels = read_levels(own or settings, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), is_normalized=True)
    if own is not None:
        own.finish()
    fit = KimiClipFit(KimiFit(patch_size, merge_size, most_patches, most_on_a_side))
    sample = partial(_sample_parts, per_second=per_second)
    return VideoProcessor(
        patch_size, merge_size, frames, False, fit, sample, _kimi_texts, Texts(), levels, **caps
    )


def _read_gemma(settings: Settings, caps: dict[str, Any]) -> VideoProcessor:
    settings.fixed("do_resize", True)
    patch_size = settings.integer("patch_size", 16, most=256)
    merge_size = settings.integer("pooling_kernel_size", 3, most=16)
    settings.fixed("max_soft_tokens", 70, *GEMMA_TOKENS)
    tokens = settings.integer("max_soft_tokens", 70)
    fit = GemmaClipFit(GemmaFit(patch_size * merge_size, tokens))
    if caps["most_group_tokens"] is not None:  # otherwise the memory plan would count only the cap
        caps = {**caps, "most_group_tokens": min(tokens, caps["most_group_tokens"])}
    settings.fixed("fps", None)
    settings.passed("size")  # not read by the reference either
    sample = partial(_sample_number, count=settings.integer("num_frames", 32, most=_GEMMA_MOST_FRAMES))
    levels = read_levels(settings, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), is_normalized=True)
    return VideoProcessor(
        patch_size, merge_size, 1, False, fit, sample, _gemma_texts, Texts(), levels, "pixels", " ", **caps
    )


_READERS: dict[str, Callable[[Settings, dict[str, Any]], VideoProcessor]] = {
    "Qwen3VLVideoProcessor": _read_qwen3_vl,
    "Qwen2VLVideoProcessor": _read_omni,
    "Glm4vVideoProcessor": _read_glm,
    "Glm46VVideoProcessor": partial(_read_glm, is_46=True),
    "Kimi_K25VideoProcessor": _read_kimi,
    "Gemma4VideoProcessor": _read_gemma,
}
