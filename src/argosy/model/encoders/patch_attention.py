"""The attention of vision towers: patches see the patches of their segment, and are rotated on two axes.

norm -> query, key and value in one product -> rotation -> attention -> product, added to the hidden state
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from argosy.model.encoders.blocks import Operations, Rows, Steps, attention_flop, block_floats, in_blocks
from argosy.model.encoders.grid import Rotation


def patch_attention(
    operations: Operations,
    layer: str,
    hidden: Rows,
    norm: Callable[[Rows], Rows],
    rotation: Rotation,
    segments: Sequence[range],
    num_heads: int,
) -> Steps:
    """Add the attention of a layer, with the matrices `{layer}.qkv` and `{layer}.o`, to `hidden` [patches, width]."""
    width = hidden.shape[1]
    head_dim = width // num_heads
    query_key = np.empty((len(hidden), 2 * width), np.float32)
    value = np.empty_like(hidden)

    def project(rows: slice) -> None:
        qkv = operations.linear(f"{layer}.qkv", norm(hidden[rows]))
        query_key[rows], value[rows] = qkv[:, : 2 * width], qkv[:, 2 * width :]
        rotation.apply(operations, query_key[rows].reshape(len(qkv), -1, head_dim), rows)

    def add(rows: slice, result: Rows) -> None:
        hidden[rows] += result

    yield from in_blocks(project, range(len(hidden)), operations.flop_per_row(f"{layer}.qkv"))
    yield from operations.attend(
        query_key[:, :width],
        query_key[:, width:],
        value,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        segments=segments,
        output=f"{layer}.o",
        finish=add,
    )


def patch_attention_floats(num_patches: int, segment: int, width: int, num_heads: int) -> int:
    """Most float32 values that `patch_attention` allocates, for segments of this many patches."""
    project = block_floats(num_patches, 6 * width**2, 4 * width + width // num_heads + 4)
    attend = block_floats(segment, attention_flop(segment, width) + 2 * width**2, 2 * width)
    return 3 * num_patches * width + max(project, attend)
