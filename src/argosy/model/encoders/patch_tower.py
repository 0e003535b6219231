"""The common part of vision towers whose patches turn on two axes: sizes, tensors and memory of layers, and the path
through them.

    patches -> product + learned positions -> layers -> merge -> embeddings

A layer is a norm, attention in which patches see those of their segment and are rotated on two axes, a norm, and an
MLP. Each tower says where it differs: the norms, the MLP, what patches see, and how they are joined.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from argosy.model.encoders import EncoderTensor, with_bias
from argosy.model.encoders.blocks import (
    FLOAT_BYTES,
    OVERHEAD_BYTES,
    Rows,
    Steps,
    Tower,
    attention_floats,
    block_floats,
    columns,
    in_blocks,
)
from argosy.model.encoders.grid import (
    Grid,
    PairOrder,
    PatchKernel,
    Places,
    PositionTable,
    Rotation,
    Taps,
    cubic_taps,
    frame_patches,
    frames,
    patch_places,
    rotation_bytes,
)
from argosy.model.reading.config_reader import ConfigReader
from argosy.prompt.media_span import Making, SpanRows


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchConfig:
    """Sizes of a tower, which makes rows of `out_size` values from cells of `merge` x `merge` patches."""

    num_layers: int
    hidden_size: int
    num_heads: int
    attention_size: int = 0  # of all heads; 0: the hidden size
    channels: int = 3
    patch_size: int
    patch_frames: int = 1
    are_frames_apart: bool = False  # each frame of a patch has its own matrix
    merge: int
    out_size: int
    position_side: int  # 0: no learned positions
    theta: float
    pair_order: PairOrder = "rows first"  # how dimensions of queries and keys lie in their matrices
    are_axes_staggered: bool = False  # the column turns slower than the row
    are_qkv_apart: bool = False  # queries, keys and values have a matrix each
    has_layer_scale: bool = False  # what layers add is multiplied by `attn_scale` and `mlp_scale`
    has_qk_norm: bool = False  # each head of queries and keys has an RMSNorm, before it is rotated

    @property
    def patch_values(self) -> int:
        return self.channels * self.patch_frames * self.patch_size**2

    @property
    def patch_kernel(self) -> PatchKernel:
        return PatchKernel(
            self.hidden_size, self.channels, self.patch_frames, self.patch_size, self.are_frames_apart
        )

    @property
    def query_size(self) -> int:
        return self.attention_size or self.hidden_size

    @property
    def head_dim(self) -> int:
        return self.query_size // self.num_heads

    @property
    def cell_size(self) -> int:
        """The combined size of a cell's patches."""
        return self.hidden_size * self.merge**2

    def require_heads(self, reader: ConfigReader, key: str = "hidden_size") -> None:
        """Refuse heads that cannot be rotated on their axes.

        Raises:
            UnsupportedModel: they are not whole, or have no whole pairs on each axis.
        """
        if self.pair_order.startswith("thirds"):
            if self.query_size % self.num_heads or self.head_dim < 6:
                raise reader.unsupported(key, f"a multiple of {self.num_heads} heads of 6 or more dimensions")
        elif self.query_size % (4 * self.num_heads):
            raise reader.unsupported(key, f"a multiple of {4 * self.num_heads}, 4 times the number of heads")


Sizes = TypeVar("Sizes", bound=PatchConfig)


def layer_tensors(
    config: PatchConfig,
    mlp_width: int,
    prefix: str,
    names: tuple[str, str, str, str, str, str],
    *,
    has_bias: bool = True,
) -> dict[str, EncoderTensor]:
    """The tensors of layers whose MLP has two matrices; `names` are those below `{prefix}.{layer}.`, in their order."""
    hidden, query = config.hidden_size, config.query_size
    shapes: dict[str, tuple[int, ...]] = {
        "attn_norm": (hidden,),
        "qkv": (3 * query, hidden),
        "o": (hidden, query),
        "mlp_norm": (hidden,),
        "up": (mlp_width, hidden),
        "down": (hidden, mlp_width),
    }
    found: dict[str, EncoderTensor] = {}
    for layer in range(config.num_layers):
        for (ours, shape), theirs in zip(shapes.items(), names, strict=True):
            found |= with_bias(
                f"layers.{layer}.{ours}", f"{prefix}.{layer}.{theirs}", shape, has_bias=has_bias
            )
    return found


def num_positions(config: PatchConfig, grid: Grid) -> int:
    """Positions that a picture or video of `grid` patches fills: one for each cell of each frame."""
    return grid[0] * frame_patches(grid) // config.merge**2


def tower_bytes(config: PatchConfig, grid: Grid, segment: int, results: int, stages: Sequence[int]) -> int:
    """Most bytes that `encode` allocates, its result included; native scratch memory is not counted.

    Args:
        segment: patches that see one another.
        results: float32 values that stay from the beginning to the end, except the hidden state.
        stages: most float32 values of each stage except attention.
    """
    hidden, query, patches = config.hidden_size, config.query_size, grid[0] * frame_patches(grid)
    normed = 2 * query if config.has_qk_norm or config.pair_order == "thirds apart" else 0
    project = block_floats(patches, 6 * query * hidden, hidden + normed + config.head_dim + 4)
    output_flop = 2 * query * hidden
    attend = attention_floats(segment, query, query, output_flop, hidden if config.has_layer_scale else 0)
    floats = patches * hidden + results + max(3 * patches * query + max(project, attend), *stages)
    return FLOAT_BYTES * floats + rotation_bytes(frame_patches(grid), config.head_dim) + OVERHEAD_BYTES


class PatchTower(Tower[Sizes]):
    """A tower with its weights; `encode` may be run for several pictures at the same time."""

    _norm_eps: float

    def encode(self, patches: Rows, grid: Grid) -> Making:
        """Make the rows of a picture or video.

        Args:
            patches: [patches of all frames, `patch_values`], in the order of `_places`.
            grid: frames, rows and columns of patches; rows and columns are multiples of `merge`.
        """
        config = self._config
        assert len(patches) == grid[0] * frame_patches(grid), (len(patches), grid)
        places = self._places(grid)
        rotation = Rotation(
            places,
            config.head_dim,
            config.theta,
            order=config.pair_order,
            is_staggered=config.are_axes_staggered,
        )
        hidden = np.empty((len(patches), config.hidden_size), np.float32)
        additions: dict[int, Rows] = {}
        yield from self._embed(patches, grid, places, hidden)
        for layer in range(config.num_layers):
            yield layer / config.num_layers
            yield from self._attend(f"layers.{layer}", hidden, rotation, self._segments(grid))
            yield from self._feed_forward(f"layers.{layer}", hidden)
            yield from self._add(layer, hidden, additions)
        embeddings = yield from self._merge(hidden, grid)
        return SpanRows(embeddings, additions)

    def _places(self, grid: Grid) -> Places:
        return patch_places(grid, self._config.merge)

    def _segments(self, grid: Grid) -> Sequence[range]:
        """The patches that see one another."""
        return frames(grid)

    def _taps(self, size: int, side: int) -> Taps:
        """How the table of positions is resampled."""
        return cubic_taps(size, side)

    def _norm(self, name: str, x: Rows) -> Rows:
        return self._operations.layer_norm(name, x, self._norm_eps)

    def _embed(self, patches: Rows, grid: Grid, places: Places, hidden: Rows) -> Steps:
        ops, side = self._operations, self._config.position_side
        taps = [self._taps(size, side) for size in grid[1:]] if side else []
        positions = PositionTable("position", side, places, *taps) if side else None

        def work(rows: slice) -> None:
            self._embed_patches(patches[rows], hidden[rows])
            if positions is not None:
                positions.add(ops, hidden[rows], rows)

        return in_blocks(work, range(len(hidden)), ops.flop_per_row(*self._config.patch_kernel.names))

    def _embed_patches(self, patches: Rows, hidden: Rows) -> None:
        hidden[:] = self._config.patch_kernel.apply(self._operations, patches)

    def _attend(self, layer: str, hidden: Rows, rotation: Rotation, segments: Sequence[range]) -> Steps:
        """Add the attention of a layer to `hidden`."""
        ops, width, head_dim = self._operations, self._config.query_size, self._config.head_dim
        qkv = np.empty((len(hidden), 3 * width), np.float32)
        query, key, value = columns(qkv, 3)
        names = [f"{layer}.{name}" for name in (("q", "k", "v") if self._config.are_qkv_apart else ("qkv",))]

        def project(rows: slice) -> None:
            normed = self._norm(f"{layer}.attn_norm", hidden[rows])
            for name, out in zip(names, columns(qkv[rows], len(names)), strict=True):
                ops.linear(name, normed, out)
            self._norm_heads(layer, query[rows], key[rows])
            query_key = qkv[rows, : 2 * width]
            rotation.apply(ops, query_key.reshape(len(query_key), -1, head_dim), rows)

        yield from in_blocks(project, range(len(hidden)), ops.flop_per_row(*names))
        yield from ops.add_attention(
            layer,
            hidden,
            query,
            key,
            value,
            head_dim=head_dim,
            segments=segments,
            factor=self._factor(f"{layer}.attn_scale"),
        )

    def _norm_heads(self, layer: str, query: Rows, key: Rows) -> None:
        """Normalise queries and keys [rows, heads * head_dim] in place, before they are rotated."""

    def _factor(self, name: str) -> str | None:
        return name if self._config.has_layer_scale else None

    def _feed_forward(self, layer: str, hidden: Rows) -> Steps:
        return self._operations.gelu_mlp(layer, hidden, self._norm_eps, "gelu_tanh")

    def _add(self, layer: int, hidden: Rows, additions: dict[int, Rows]) -> Steps:
        """Make what the decoder adds after one of its layers from the hidden state after this one."""
        yield from ()

    def _merge(self, hidden: Rows, grid: Grid) -> Generator[None, None, Rows]:
        """Join the patches of each cell."""
        raise NotImplementedError
