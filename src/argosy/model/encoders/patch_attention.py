"""The attention of vision towers: patches see the patches of their segment, and are rotated on two axes.

norm -> query, key and value in one product -> rotation -> attention -> product, added to the hidden state
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from argosy.model.encoders.blocks import Operations, Rows, Steps, attention_floats, block_floats, in_blocks
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
    qkv = np.empty((len(hidden), 3 * width), np.float32)
    query, key, value = qkv[:, :width], qkv[:, width : 2 * width], qkv[:, 2 * width :]

    def project(rows: slice) -> None:
        operations.linear(f"{layer}.qkv", norm(hidden[rows]), qkv[rows])
        query_key = qkv[rows, : 2 * width]
        rotation.apply(operations, query_key.reshape(len(query_key), -1, head_dim), rows)

    def add(rows: slice, heads: Rows) -> None:
        operations.linear(f"{layer}.o", heads, hidden[rows], finish="add")

    yield from in_blocks(project, range(len(hidden)), operations.flop_per_row(f"{layer}.qkv"))
    yield from operations.attend(
        query,
        key,
        value,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        segments=segments,
        output=f"{layer}.o",
        project=add,
    )


def patch_attention_floats(num_patches: int, segment: int, width: int, num_heads: int) -> int:
    """Most float32 values that `patch_attention` allocates, for segments of this many patches."""
    project = block_floats(num_patches, 6 * width**2, width + width // num_heads + 4)
    attend = attention_floats(segment, width, width, 2 * width**2)
    return 3 * num_patches * width + max(project, attend)
