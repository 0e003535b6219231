"""The vision tower of GLM-4.5V and GLM-4.6V: pictures, and frames of video.

    patches -> product -> RMSNorm -> + learned positions -> layers -> RMSNorm -> 2 x 2 patches in one -> merger

A patch covers two frames; a picture is its own second frame. A layer is RMSNorm, attention within a frame with 2-D
RoPE, RMSNorm, SwiGLU. A prompt has a video as separate frames with times between them, so each frame is a span.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from argosy.model.encoders import EncoderTensor, with_bias
from argosy.model.encoders.blocks import (
    FLOAT_BYTES,
    OVERHEAD_BYTES,
    Rows,
    Steps,
    Tower,
    block_floats,
    in_blocks,
)
from argosy.model.encoders.grid import (
    Grid,
    PatchKernel,
    Places,
    PositionTable,
    Rotation,
    cubic_taps,
    frame_patches,
    frames,
    patch_places,
    read_theta,
    rotation_bytes,
    span_angles,
)
from argosy.model.encoders.patch_attention import patch_attention, patch_attention_floats
from argosy.model.reading.config_reader import MOST_LAYERS, ConfigReader
from argosy.prompt.media_span import Making, SpanRows

__all__ = [
    "GlmVisionConfig", "GlmVisionTower", "num_positions", "peak_bytes", "read_config", "span_angles", "tensors",
]  # fmt: skip

_MERGER_NORM_EPS = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class GlmVisionConfig:
    """Sizes of the tower. The SwiGLU of a layer is as wide as a row that leaves the tower."""

    num_layers: int
    hidden_size: int
    num_heads: int
    has_qkv_bias: bool
    channels: int
    patch_size: int
    patch_frames: int
    are_frames_apart: bool = False  # each frame of a patch has a matrix of its own
    merge: int
    out_size: int
    merger_width: int
    position_side: int
    norm_eps: float
    theta: float

    @property
    def patch_values(self) -> int:
        return self.channels * self.patch_frames * self.patch_size**2

    @property
    def patch_kernel(self) -> PatchKernel:
        return PatchKernel(
            self.hidden_size, self.channels, self.patch_frames, self.patch_size, self.are_frames_apart
        )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def cell_size(self) -> int:
        """The size of the patches of a cell together."""
        return self.hidden_size * self.merge**2


def read_config(reader: ConfigReader) -> GlmVisionConfig:
    """Read `vision_config`, as `Glm4vMoeVisionConfig` in transformers 5.24 does.

    Raises:
        UnsupportedModel: a key or value that is not supported.   CheckpointError: a key is malformed.
    """
    reader.one_of("hidden_act", "silu", ("silu",))
    reader.passed("hidden_dropout_prob")
    image_size = reader.integer("image_size", default=336)
    patch_size = reader.integer("patch_size", default=14)
    config = GlmVisionConfig(
        num_layers=reader.integer("depth", "num_hidden_layers", default=24, most=MOST_LAYERS),
        hidden_size=reader.integer("hidden_size", default=1536),
        num_heads=reader.integer("num_heads", "num_attention_heads", default=12),
        has_qkv_bias=reader.flag("attention_bias", False),
        channels=reader.integer("in_channels", default=3),
        patch_size=patch_size,
        patch_frames=reader.integer("temporal_patch_size", default=2),
        merge=reader.integer("spatial_merge_size", default=2),
        out_size=reader.integer("out_hidden_size", default=4096),
        merger_width=reader.integer("intermediate_size", default=13_696),
        position_side=image_size // patch_size,
        norm_eps=reader.number("rms_norm_eps", 1e-5),
        theta=read_theta(reader),
    )
    if not config.position_side:
        raise reader.unsupported("image_size", f"{patch_size} or more, the size of a patch")
    if config.hidden_size % (4 * config.num_heads):
        raise reader.unsupported(
            "hidden_size", f"a multiple of {4 * config.num_heads}, 4 times the number of heads"
        )
    reader.finish()
    return config


def tensors(config: GlmVisionConfig) -> dict[str, EncoderTensor]:
    """The tower's tensors by canonical name; the prefix is `model.visual.`."""
    hidden, out, wide = config.hidden_size, config.out_size, config.merger_width
    no_bias = partial(with_bias, has_bias=False)
    found = config.patch_kernel.tensors("patch_embed.proj")
    found |= no_bias("patch_norm", "post_conv_layernorm", (hidden,))
    found |= no_bias("position", "embeddings.position_embedding", (config.position_side**2, hidden))
    for layer in range(config.num_layers):
        ours, theirs = f"layers.{layer}", f"blocks.{layer}"
        found |= no_bias(f"{ours}.attn_norm", f"{theirs}.norm1", (hidden,))
        found |= with_bias(
            f"{ours}.qkv", f"{theirs}.attn.qkv", (3 * hidden, hidden), has_bias=config.has_qkv_bias
        )
        found |= no_bias(f"{ours}.o", f"{theirs}.attn.proj", (hidden, hidden))
        found |= no_bias(f"{ours}.mlp_norm", f"{theirs}.norm2", (hidden,))
        found |= no_bias(f"{ours}.gate", f"{theirs}.mlp.gate_proj", (out, hidden))
        found |= no_bias(f"{ours}.up", f"{theirs}.mlp.up_proj", (out, hidden))
        found |= no_bias(f"{ours}.down", f"{theirs}.mlp.down_proj", (hidden, out))
    found |= no_bias("final_norm", "post_layernorm", (hidden,))
    found |= with_bias("join", "downsample", (out, hidden, config.merge, config.merge))
    found |= no_bias("merger.in", "merger.proj", (out, out))
    found |= with_bias("merger.norm", "merger.post_projection_norm", (out,))
    found |= no_bias("merger.gate", "merger.gate_proj", (wide, out))
    found |= no_bias("merger.up", "merger.up_proj", (wide, out))
    found |= no_bias("merger.down", "merger.down_proj", (out, wide))
    return found


def num_positions(config: GlmVisionConfig, grid: Grid) -> int:
    """Positions that a picture or video of `grid` patches fills: one for each cell of each frame."""
    return grid[0] * frame_patches(grid) // config.merge**2


def peak_bytes(config: GlmVisionConfig, grid: Grid) -> int:
    """Most bytes that `encode` allocates, its result included; native scratch memory is not counted."""
    hidden, out, cell = config.hidden_size, config.out_size, config.cell_size
    in_frame, positions = frame_patches(grid), num_positions(config, grid)
    patches = grid[0] * in_frame
    floats = patches * hidden + positions * out
    floats += max(
        block_floats(
            patches, 2 * hidden * config.patch_values, 4 * hidden + config.patch_kernel.floats_per_row + 32
        ),
        patch_attention_floats(patches, in_frame, hidden, config.num_heads),
        block_floats(patches, 6 * hidden * out, 2 * hidden + 2 * out),
        block_floats(
            positions,
            2 * out * (cell + out + 3 * config.merger_width),
            2 * cell + 3 * out + 2 * config.merger_width,
        ),
    )
    return FLOAT_BYTES * floats + rotation_bytes(in_frame, config.head_dim) + OVERHEAD_BYTES


class GlmVisionTower(Tower[GlmVisionConfig]):
    """The tower with its weights; `encode` may be run for several pictures at the same time."""

    def encode(self, patches: Rows, grid: Grid) -> Making:
        """Make the rows of a picture or video.

        Args:
            patches: [patches of all frames, channels * patch_frames * patch_size^2], in the order of `patch_places`.
            grid: frames, rows and columns of patches; rows and columns are multiples of `merge`.
        """
        config, ops = self._config, self._operations
        assert len(patches) == grid[0] * frame_patches(grid), (len(patches), grid)
        places = patch_places(grid, config.merge)
        rotation = Rotation(places, config.head_dim, config.theta)
        hidden = np.empty((len(patches), config.hidden_size), np.float32)
        yield from self._embed(patches, grid, places, hidden)
        for layer in range(config.num_layers):
            yield layer / config.num_layers
            name = f"layers.{layer}"
            norm = partial(ops.rms_norm, f"{name}.attn_norm", eps=config.norm_eps)
            yield from patch_attention(ops, name, hidden, norm, rotation, frames(grid), config.num_heads)
            yield from self._feed_forward(name, hidden)
        embeddings = np.empty((num_positions(config, grid), config.out_size), np.float32)
        yield from self._merge(hidden, embeddings)
        return SpanRows(embeddings)

    def _embed(self, patches: Rows, grid: Grid, places: Places, hidden: Rows) -> Steps:
        ops, side = self._operations, self._config.position_side
        taps = [cubic_taps(size, side) for size in grid[1:]]
        positions = PositionTable("position", side, places, *taps)
        kernel = self._config.patch_kernel

        def work(rows: slice) -> None:
            embedded = kernel.apply(ops, patches[rows])
            hidden[rows] = ops.rms_norm("patch_norm", embedded, self._config.norm_eps)
            positions.add(ops, hidden[rows], rows)

        return in_blocks(work, range(len(hidden)), ops.flop_per_row(*kernel.names))

    def _feed_forward(self, layer: str, hidden: Rows) -> Steps:
        ops = self._operations

        def work(rows: slice) -> None:
            normed = ops.rms_norm(f"{layer}.mlp_norm", hidden[rows], self._config.norm_eps)
            ops.gated_mlp(layer, normed, hidden[rows], finish="add")

        flop = ops.flop_per_row(*(f"{layer}.{name}" for name in ("gate", "up", "down")))
        return in_blocks(work, range(len(hidden)), flop)

    def _merge(self, hidden: Rows, embeddings: Rows) -> Steps:
        """Join the patches of each cell: a convolution over the cell, then the merger."""
        ops, config = self._operations, self._config

        def work(rows: slice) -> None:
            patches = slice(rows.start * config.merge**2, rows.stop * config.merge**2)
            normed = ops.rms_norm("final_norm", hidden[patches], config.norm_eps)
            # The weight of the convolution has the channel first, then the place in the cell.
            cells = (
                normed.reshape(-1, config.merge**2, config.hidden_size)
                .swapaxes(1, 2)
                .reshape(-1, config.cell_size)
            )
            joined = ops.linear("merger.in", ops.linear("join", cells))
            merged = ops.gelu(ops.layer_norm("merger.norm", joined, _MERGER_NORM_EPS), "erf")
            ops.gated_mlp("merger", merged, embeddings[rows])

        names = ("join", *(f"merger.{name}" for name in ("in", "gate", "up", "down")))
        return in_blocks(work, range(len(embeddings)), ops.flop_per_row(*names))
