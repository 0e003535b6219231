"""What readers of processors share: the values of a picture's 8-bit levels, the tokens of a square of pixels, and the
least cap on tokens.

Elsewhere: `pictures.py`, `tiles.py`, `windows.py` and `videos.py` read the other settings.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from argosy.errors import CheckpointError, UnsupportedModel, UsageError
from argosy.media.settings import Settings

_LEAST_STD = 1e-9  # quotients by less overflow float32
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def read_levels(
    settings: Settings,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    *,
    is_normalized: bool,
    may_pad: bool = False,
    filter: int = 3,
    is_rounded: bool = False,
) -> NDArray[np.float32]:
    """Return float32 [3, 256]: each 8-bit level, scaled in float64 and normalised in float32, as the reference does.

    Args:
        filter: Pillow's number of the filter: 3 is bicubic, 2 bilinear.
        is_rounded: every result is rounded to bfloat16.
    """
    settings.fixed("do_convert_rgb", True)
    settings.fixed("do_rescale", True)
    settings.fixed("do_center_crop", False)
    settings.fixed("do_pad", False, may_pad)
    settings.fixed("resample", filter)
    scale = settings.number("rescale_factor", 1 / 255)
    means, stds = settings.colour("image_mean", mean), settings.colour("image_std", std)
    scaled = (np.arange(256) * scale).astype(np.float32)
    if not settings.flag("do_normalize", is_normalized):
        return np.tile(scaled, (3, 1))
    if min(map(abs, stds)) < _LEAST_STD:
        raise CheckpointError(
            f"image_std of a processor is {', '.join(map(str, stds))}; expected numbers of at least {_LEAST_STD}",
            key="image_std",
            value=list(stds),
        )
    shift, spread = (np.array(values, np.float32)[:, None] for values in (means, stds))
    if not is_rounded:
        return (scaled - shift) / spread
    scaled = _rounded(np.arange(256, dtype=np.float32) * np.float32(scale))
    return _rounded(_rounded(scaled - _rounded(shift)) / _rounded(spread))


def _rounded(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Round to bfloat16, halves to the even neighbour."""
    bits = values.view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
    return (rounded & np.uint32(0xFFFF0000)).view(np.float32)


def tokens_of_tile(side: int, of_token: int) -> int:
    """Return the tokens of a square of pixels; refuses one that is not made of whole tokens."""
    if side % of_token:
        raise UnsupportedModel(
            f"tiles have {side} pixels on a side; supported: a multiple of {of_token}, those of a token",
            key="size",
            value=side,
        )
    return (side // of_token) ** 2


def require_cap(most_tokens: int, least: int) -> None:
    """Refuse a cap on a picture's tokens below the fewest that a processor makes."""
    if most_tokens < least:
        raise UsageError(
            f"the cap on a picture's tokens must be at least {least} for this model, found {most_tokens}"
        )
