"""SAM's vision encoder (ViT-B) and two further convolutions: the first stage of DeepSeek-OCR's towers.

    patches of a square -> product, + learned positions -> layers -> 1 x 1 and 3 x 3 convolutions with LayerNorm
    -> two convolutions at every second pixel: a sixteenth of the patches

Most layers attend within windows, which patches of zeros fill up beyond the edges; some layers attend to the whole
square. To a score, each layer adds the product of the query with a learned vector for the distance of rows, and one
for that of columns (arXiv:2112.01526). These are further columns here: query [q, q . Rh, q . Rw], key [k, one at its
row, one at its column], so that the score is one product. The values are filled up with zeros.

Learned positions and distances are resampled for squares of another size.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from argosy.model.encoders import EncoderTensor, with_bias
from argosy.model.encoders.blocks import (
    Operations,
    Rows,
    Steps,
    attention_floats,
    attention_flop,
    block_floats,
    gelu_mlp_floats,
    in_blocks,
)
from argosy.model.encoders.grid import PositionTable, centre_taps, patch_places, smooth_taps
from argosy.model.encoders.halving import halve, halved, halving_floats, halving_tensors

_NECK_EPS = 1e-6
_STRIDES = 2, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class SamConfig:
    """Sizes of the encoder.

    position_side: patches on a side of the square whose positions and distances were learned.
    window: patches on a side of a window.   global_layers: the layers without windows.
    neck_width, channels: channels after the first two convolutions, and after each of the last two.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    mlp_width: int
    patch_size: int
    position_side: int
    window: int
    global_layers: frozenset[int]
    neck_width: int
    channels: tuple[int, int]
    has_qkv_bias: bool
    norm_eps: float

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patch_values(self) -> int:
        return 3 * self.patch_size**2


def sam_tensors(config: SamConfig) -> dict[str, EncoderTensor]:
    """The tensors by canonical name; their names in files have no prefix."""
    hidden, neck, side, tower = config.hidden_size, config.neck_width, config.position_side, "sam_model"
    found = with_bias("patch", f"{tower}.patch_embed.proj", (hidden, 3, config.patch_size, config.patch_size))
    found["position"] = EncoderTensor(f"{tower}.pos_embed", (1, side, side, hidden), row_axes=3)
    for layer in range(config.num_layers):
        ours, theirs = f"layers.{layer}", f"{tower}.blocks.{layer}"
        distances = 2 * (side if layer in config.global_layers else config.window) - 1
        for name, norm in (("attn_norm", "norm1"), ("mlp_norm", "norm2")):
            found |= with_bias(f"{ours}.{name}", f"{theirs}.{norm}", (hidden,))
        found |= with_bias(
            f"{ours}.qkv", f"{theirs}.attn.qkv", (3 * hidden, hidden), has_bias=config.has_qkv_bias
        )
        found |= with_bias(f"{ours}.o", f"{theirs}.attn.proj", (hidden, hidden))
        for name, axis in (("distance_rows", "h"), ("distance_columns", "w")):
            found[f"{ours}.{name}"] = EncoderTensor(
                f"{theirs}.attn.rel_pos_{axis}", (distances, config.head_dim)
            )
        found |= with_bias(f"{ours}.up", f"{theirs}.mlp.lin1", (config.mlp_width, hidden))
        found |= with_bias(f"{ours}.down", f"{theirs}.mlp.lin2", (hidden, config.mlp_width))
    found |= with_bias("neck.0", f"{tower}.neck.0", (neck, hidden, 1, 1), has_bias=False)
    found |= with_bias("neck.0_norm", f"{tower}.neck.1", (neck,))
    found |= _three_by_three("neck.1", f"{tower}.neck.2", neck, neck)
    found |= with_bias("neck.1_norm", f"{tower}.neck.3", (neck,))
    for at, (taken, made) in enumerate(zip((neck, config.channels[0]), config.channels, strict=True)):
        found |= _three_by_three(f"neck.{2 + at}", f"{tower}.net_{2 + at}", made, taken)
    return found


def _three_by_three(ours: str, theirs: str, made: int, taken: int) -> dict[str, EncoderTensor]:
    """A convolution without a bias."""
    return {ours: halving_tensors(ours, theirs, made, taken)[ours]}


def sam_side(side: int) -> int:
    """Pixels on a side of the result, for a square with `side` patches on a side."""
    for stride in _STRIDES:
        side = halved(side, stride)
    return side


def sam_flop(config: SamConfig, side: int) -> int:
    """Floating-point operations of the products and of the attention for a square."""
    hidden, patches, dim = config.hidden_size, side**2, config.head_dim
    found = 2 * hidden * config.patch_values * patches
    for layer in range(config.num_layers):
        is_global = layer in config.global_layers
        size, learned = (side, config.position_side) if is_global else (config.window, config.window)
        rows = config.num_heads * (-(-side // size) * size) ** 2
        found += 6 * hidden**2 * (patches + 1) + (2 * hidden + 4 * config.mlp_width) * hidden * patches
        found += rows * (4 * (2 * learned - 1) * dim + attention_flop(size**2, dim + 2 * size))
    found += 2 * hidden * config.neck_width * patches
    taken = config.neck_width
    for made, stride in zip((taken, *config.channels), (1, *_STRIDES), strict=True):
        side = halved(side, stride)
        found += 2 * 9 * taken * made * side**2
        taken = made
    return found


def sam_floats(config: SamConfig, side: int) -> int:
    """Return the most float32 values that `encode_square` allocates, its result included."""
    hidden, patches, neck = config.hidden_size, side**2, config.neck_width
    attention = patches * 4 * hidden + max(
        block_floats(patches, 6 * hidden**2, hidden),
        _window_floats(config, side, 1, config.position_side),
        _window_floats(config, config.window, config.num_heads, config.window),
        block_floats(patches, 2 * hidden**2, hidden),
    )
    embedding = block_floats(patches, 2 * hidden * config.patch_values, 4 * hidden)
    stages = [
        embedding,
        attention + 4 * hidden,
        gelu_mlp_floats(patches, hidden, config.mlp_width),
        patches * neck + block_floats(patches, 2 * hidden * neck, 2 * neck),
    ]
    taken = neck
    for made, stride in zip((neck, *config.channels), (1, *_STRIDES), strict=True):
        stages.append(side**2 * taken + halving_floats(side, side, made, taken, stride))
        side, taken = halved(side, stride), made
    return patches * hidden + max(stages)


def _window_floats(config: SamConfig, side: int, num_heads: int, table_side: int) -> int:
    """Values while one window is attended to, with so many heads at once; index arrays count twice."""
    rows, width = side**2, config.head_dim + 2 * side
    products = rows * num_heads * (2 * table_side - 1 + 3 * side) + 8 * rows * side
    inputs = 3 * rows * num_heads * width + rows * num_heads * config.head_dim
    attended = attention_floats(rows, num_heads * width, num_heads * width, 2 * config.hidden_size**2)
    return inputs + rows * 2 * side + 2 * rows + max(products, attended)


def encode_square(config: SamConfig, ops: Operations, patches: Rows) -> Generator[None, None, Rows]:
    """Encode the patches of a square, row by row: [side^2, patch values] -> [sam_side(side)^2, channels]."""
    side = round(len(patches) ** 0.5)
    hidden = np.empty((len(patches), config.hidden_size), np.float32)
    taps = smooth_taps(side, config.position_side)
    positions = PositionTable("position", config.position_side, patch_places((1, side, side), 1), taps, taps)

    def embed(rows: slice) -> None:
        ops.linear("patch", patches[rows], hidden[rows])
        positions.add(ops, hidden[rows], rows)

    yield from in_blocks(embed, range(len(hidden)), ops.flop_per_row("patch"))
    for layer in range(config.num_layers):
        is_global = layer in config.global_layers
        yield from _attend(config, ops, f"layers.{layer}", hidden, side if is_global else config.window)
        yield from ops.gelu_mlp(f"layers.{layer}", hidden, config.norm_eps, "gelu_erf")
    return (yield from _narrow(config, ops, hidden, side))


def _attend(config: SamConfig, ops: Operations, layer: str, hidden: Rows, size: int) -> Steps:
    """Add attention within squares of `size` patches on a side."""
    width, num_patches = config.hidden_size, len(hidden)
    side = round(num_patches**0.5)
    # The last row is that of a patch beyond the edge: zeros after the norm.
    qkv = np.empty((num_patches + 1, 3 * width), np.float32)
    seen = np.empty((num_patches + 1, width), np.float32)

    def project(rows: slice) -> None:
        ops.linear(
            f"{layer}.qkv", ops.layer_norm(f"{layer}.attn_norm", hidden[rows], config.norm_eps), qkv[rows]
        )

    yield from in_blocks(project, range(num_patches), ops.flop_per_row(f"{layer}.qkv"))
    ops.linear(f"{layer}.qkv", np.zeros((1, width), np.float32), qkv[num_patches:])
    yield
    step = 1 if size == side else config.num_heads
    for places in _windows(side, size):
        for head in range(0, config.num_heads, step):
            yield from _attend_window(config, ops, layer, qkv, seen, places, slice(head, head + step))

    def add(rows: slice) -> None:
        ops.linear(f"{layer}.o", seen[rows], hidden[rows], finish="add")

    yield from in_blocks(add, range(num_patches), ops.flop_per_row(f"{layer}.o"))


def _windows(side: int, size: int) -> Iterator[NDArray[np.int64]]:
    """The patches of each window, row by row; side^2 stands for one beyond the edge."""
    count = -(-side // size)
    padded = np.full((count * size, count * size), side * side)
    padded[:side, :side] = np.arange(side * side).reshape(side, side)
    yield from padded.reshape(count, size, count, size).swapaxes(1, 2).reshape(-1, size * size)


def _attend_window(
    config: SamConfig,
    ops: Operations,
    layer: str,
    qkv: Rows,
    seen: Rows,
    places: NDArray[np.int64],
    heads: slice,
) -> Steps:
    """Write the attention of some heads within a window to `seen`."""
    dim, num_rows = config.head_dim, len(places)
    size = round(num_rows**0.5)
    parts = qkv.reshape(len(qkv), 3, config.num_heads, dim)
    at = np.divmod(np.arange(num_rows), size)  # the row and the column of each patch
    wide = np.zeros((3, num_rows, heads.stop - heads.start, dim + 2 * size), np.float32)
    for to, part in zip(wide, range(3), strict=True):
        to[..., :dim] = parts[places, part, heads]
    query, key = wide[:2]
    for axis, name in enumerate(("rows", "columns")):
        columns = slice(dim + axis * size, dim + (axis + 1) * size)
        key[np.arange(num_rows), :, columns.start + at[axis]] = 1
        products = yield from _products(ops, f"{layer}.distance_{name}", query[..., :dim])
        _take_distances(products, at[axis], query[..., columns])
    query[..., :dim] *= dim**-0.5

    def keep(rows: slice, found: Rows) -> None:
        of_heads = found.reshape(len(found), -1, dim + 2 * size)[..., :dim]
        seen[places[rows], heads.start * dim : heads.stop * dim] = of_heads.reshape(len(found), -1)

    yield from ops.attend(
        *(x.reshape(num_rows, -1) for x in wide),
        head_dim=dim + 2 * size,
        scale=1.0,
        segments=[range(num_rows)],
        output=f"{layer}.o",
        project=keep,
    )


def _products(ops: Operations, name: str, query: Rows) -> Generator[None, None, Rows]:
    """Products of queries [rows, heads, head_dim] with a table: [rows, heads, rows of the table]."""
    flat = np.ascontiguousarray(query).reshape(-1, query.shape[2])
    out = np.empty((len(flat), ops.num_rows(name)), np.float32)

    def work(rows: slice) -> None:
        ops.linear(name, flat[rows], out[rows])

    yield from in_blocks(work, range(len(flat)), ops.flop_per_row(name))
    return out.reshape(*query.shape[:2], -1)


def _take_distances(products: Rows, at: NDArray[np.int64], out: Rows) -> None:
    """Choose, for each query and each place of a key on an axis, the product with the vector of their distance.

    Args:
        products: [queries, heads, distances of the table].   at: the places of queries on the axis.
        out: [queries, heads, places of keys].
    """
    size, num_distances = out.shape[2], products.shape[2]
    taps = centre_taps(2 * size - 1, num_distances)
    distance = at[:, None] - np.arange(size) + size - 1
    for tap in range(1 if num_distances == 2 * size - 1 else 2):
        chosen = np.take_along_axis(products, taps.indices[distance, tap][:, None], axis=2)
        if num_distances == 2 * size - 1:
            out[:] = chosen
            continue
        chosen *= taps.weights[distance, tap][:, None].astype(np.float32)
        if tap:
            out += chosen
        else:
            out[:] = chosen


def _narrow(config: SamConfig, ops: Operations, hidden: Rows, side: int) -> Generator[None, None, Rows]:
    """The convolutions after the layers."""
    pixels = np.empty((side * side, config.neck_width), np.float32)

    def first(rows: slice) -> None:
        pixels[rows] = ops.layer_norm("neck.0_norm", ops.linear("neck.0", hidden[rows]), _NECK_EPS)

    yield from in_blocks(first, range(len(hidden)), ops.flop_per_row("neck.0"))
    image = yield from halve(ops, "neck.1", pixels.reshape(side, side, -1), config.neck_width, stride=1)
    image = ops.layer_norm("neck.1_norm", image.reshape(side * side, -1), _NECK_EPS).reshape(image.shape)
    for at, channels in enumerate(config.channels):
        image = yield from halve(ops, f"neck.{2 + at}", image, channels)
    return image.reshape(-1, config.channels[1])
