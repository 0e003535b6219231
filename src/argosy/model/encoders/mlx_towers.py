"""Towers as mlx-vlm stores them: other names, and convolutions with their channels last.

Sources: `sanitize` of `models/*/` in mlx-vlm 0.7. mlx-lm drops the towers.

Elsewhere: `model/reading/mlx.py` does the same for text.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from argosy.checkpoint.landing import Landing, TapsFirst
from argosy.model.encoders import EncoderTensor

_VISUAL = (("model.visual.", "vision_tower."),)
# By family: parts of names on the hub, and what replaces them.
_CHANGES: Mapping[str, tuple[tuple[str, str], ...]] = {
    "qwen3_vl_moe": _VISUAL,
    "qwen3_5_moe": _VISUAL,
    "glm4v_moe": _VISUAL,
    "gemma4": (("model.", ""),),
    "kimi_k25": (("encoder.", ""), (".wqkv.", ".attn.wqkv."), (".wo.", ".attn.wo.")),
    "mistral3": (("vision_tower.", "vision_tower.vision_model."),),
    "qwen3_omni_moe": (
        ("thinker.visual.", "thinker.vision_tower."),
        ("merger_list.", "deepstack_merger_list."),
        (".ln_q.", ".norm."),
        (".mlp.0.", ".linear_fc1."),
        (".mlp.2.", ".linear_fc2."),
    ),
}


def mlx_name(family: str, name: str) -> str:
    """Return MLX's name of a tower's tensor, or of the prefix of all, given the name on the hub."""
    for old, new in _CHANGES.get(family, ()):
        name = name.replace(old, new)
    return name


def has_tower(family: str, prefix: str, names: Collection[str]) -> bool:
    """Whether the tensors of a tower exist, under their prefix on the hub or in MLX's checkpoints."""
    return any(name.startswith((prefix, mlx_name(family, prefix) or "vision_tower.")) for name in names)


def in_mlx(tensor: EncoderTensor) -> tuple[tuple[int, ...], Landing]:
    """Return the shape of a tensor in MLX's checkpoints, and the landing that gives it its place in memory.

    The weight of a convolution is [out, taps, in]; memory has this order, or [out, in, taps] as on the hub.
    """
    if len(tensor.shape) < 3 or tensor.row_axes != 1:
        return tensor.shape, tensor.landing
    out, channels, *taps = tensor.shape
    # Exchanging taps and channels undoes itself.
    landing = replace(tensor, taps=0).landing if tensor.taps else TapsFirst(channels)
    return (out, *taps, channels), landing
