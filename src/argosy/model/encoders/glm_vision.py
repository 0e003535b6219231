"""The vision towers of GLM-4.5V and GLM-4.6V, for pictures and frames of video, and of GLM-5.3, for pictures.

    patches -> product -> RMSNorm -> + learned positions -> layers -> RMSNorm -> 2 x 2 patches in one -> merger

A patch covers two frames; a picture is its own second frame. A layer is RMSNorm, attention within a frame with 2-D
RoPE, RMSNorm, SwiGLU. A prompt contains a video as separate frames with times between them, so each frame is a span.

GLM-5.3 has neither the first norm nor learned positions; it has biases, norms of queries and keys, and limits before
every SwiGLU's activation.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from argosy.model.encoders import EncoderTensor, with_bias
from argosy.model.encoders.blocks import Rows, Steps, block_floats, in_blocks
from argosy.model.encoders.encoder import Encoder, VideoForm
from argosy.model.encoders.grid import Grid, frame_patches, read_theta, span_angles
from argosy.model.encoders.patch_tower import PatchConfig, PatchTower, num_positions, tower_bytes
from argosy.model.encoders.projector import (
    Projector,
    read_colours,
    read_merge_size,
    read_patch_size,
    read_pixels,
    read_sizes,
)
from argosy.model.reading.config_reader import MOST_LAYERS, ConfigReader
from argosy.model.reading.gguf_config import GgufConfigReader

__all__ = [
    "TOWERS", "GlmVisionConfig", "GlmVisionTower", "num_positions", "peak_bytes", "read_config", "span_angles",
    "tensors",
]  # fmt: skip

_MERGER_NORM_EPS = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class GlmVisionConfig(PatchConfig):
    """Sizes of the tower.

    mlp_width: of the SwiGLU of a layer.
    has_bias: the output and the SwiGLU of a layer have biases.
    limit: SwiGLU's gates are at most so large, and its other factors between -limit and limit; 0: no limit.
    """

    has_qkv_bias: bool
    has_bias: bool = False
    limit: float = 0.0
    mlp_width: int
    merger_width: int
    norm_eps: float


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
        out_size=(out_size := reader.integer("out_hidden_size", default=4096)),
        mlp_width=out_size,
        merger_width=reader.integer("intermediate_size", default=13_696),
        position_side=image_size // patch_size,
        norm_eps=reader.number("rms_norm_eps", 1e-5),
        theta=read_theta(reader),
    )
    if not config.position_side:
        raise reader.unsupported("image_size", f"{patch_size} or more, the size of a patch")
    config.require_heads(reader)
    reader.finish()
    return config


def read_glm5_config(reader: ConfigReader) -> GlmVisionConfig:
    """Read `vision_config`, as `Glm5NextVisionConfig` in transformers 5.24 does.

    Raises:
        UnsupportedModel: a key or value that is not supported.   CheckpointError: a key is malformed.
    """
    reader.one_of("hidden_act", "silu", ("silu",))
    reader.passed("attention_dropout", "image_size")
    has_bias = reader.flag("attention_bias", True)
    config = GlmVisionConfig(
        num_layers=reader.integer("depth", "num_hidden_layers", default=24, most=MOST_LAYERS),
        hidden_size=reader.integer("hidden_size", default=1024),
        num_heads=reader.integer("num_heads", "num_attention_heads", default=16),
        has_qkv_bias=has_bias,
        has_bias=has_bias,
        has_qk_norm=True,
        limit=reader.number("swiglu_limit", 10.0),
        channels=reader.integer("in_channels", default=3),
        patch_size=reader.integer("patch_size", default=14),
        patch_frames=reader.integer("temporal_patch_size", default=2),
        merge=reader.integer("spatial_merge_size", default=2),
        out_size=reader.integer("out_hidden_size", default=1536),
        mlp_width=reader.integer("intermediate_size", default=4096),
        merger_width=reader.integer("projection_intermediate_size", default=10_240),
        position_side=0,
        norm_eps=reader.number("rms_norm_eps", 1e-5),
        theta=read_theta(reader),
    )
    config.require_heads(reader)
    reader.finish()
    return config


def tensors(config: GlmVisionConfig) -> dict[str, EncoderTensor]:
    """The tower's tensors by canonical name; the prefix is `model.visual.`."""
    hidden, out, wide, merger = config.hidden_size, config.out_size, config.mlp_width, config.merger_width
    no_bias, own_bias = partial(with_bias, has_bias=False), partial(with_bias, has_bias=config.has_bias)
    found = config.patch_kernel.tensors("patch_embed.proj")
    if config.position_side:
        found |= no_bias("patch_norm", "post_conv_layernorm", (hidden,))
        found |= no_bias("position", "embeddings.position_embedding", (config.position_side**2, hidden))
    for layer in range(config.num_layers):
        ours, theirs = f"layers.{layer}", f"blocks.{layer}"
        found |= no_bias(f"{ours}.attn_norm", f"{theirs}.norm1", (hidden,))
        found |= with_bias(
            f"{ours}.qkv", f"{theirs}.attn.qkv", (3 * hidden, hidden), has_bias=config.has_qkv_bias
        )
        for name in ("q_norm", "k_norm") if config.has_qk_norm else ():
            found |= no_bias(f"{ours}.{name}", f"{theirs}.attn.{name}", (config.head_dim,))
        found |= own_bias(f"{ours}.o", f"{theirs}.attn.proj", (hidden, hidden))
        found |= no_bias(f"{ours}.mlp_norm", f"{theirs}.norm2", (hidden,))
        found |= own_bias(f"{ours}.gate", f"{theirs}.mlp.gate_proj", (wide, hidden))
        found |= own_bias(f"{ours}.up", f"{theirs}.mlp.up_proj", (wide, hidden))
        found |= own_bias(f"{ours}.down", f"{theirs}.mlp.down_proj", (hidden, wide))
    found |= no_bias("final_norm", "post_layernorm", (hidden,))
    found |= with_bias("join", "downsample", (out, hidden, config.merge, config.merge))
    found |= no_bias("merger.in", "merger.proj", (out, out))
    found |= with_bias("merger.norm", "merger.post_projection_norm", (out,))
    found |= no_bias("merger.gate", "merger.gate_proj", (merger, out))
    found |= no_bias("merger.up", "merger.up_proj", (merger, out))
    found |= no_bias("merger.down", "merger.down_proj", (out, merger))
    return found


def peak_bytes(config: GlmVisionConfig, grid: Grid) -> int:
    """Most bytes that `encode` allocates, its result included; native scratch memory is not counted."""
    hidden, out, cell, wide = config.hidden_size, config.out_size, config.cell_size, config.mlp_width
    positions = num_positions(config, grid)
    parts = 3 if config.limit else 1  # rows of a SwiGLU at a time
    patches = grid[0] * frame_patches(grid)
    stages = (
        block_floats(
            patches, 2 * hidden * config.patch_values, 4 * hidden + config.patch_kernel.floats_per_row + 32
        ),
        block_floats(patches, 6 * hidden * wide, 2 * hidden + (parts + 1) * wide),
        block_floats(
            positions,
            2 * out * (cell + out + 3 * config.merger_width),
            2 * cell + 3 * out + (parts + 1) * config.merger_width,
        ),
    )
    return tower_bytes(config, grid, frame_patches(grid), positions * out, stages)


class GlmVisionTower(PatchTower[GlmVisionConfig]):
    """The tower with its weights."""

    def _norm(self, name: str, x: Rows) -> Rows:
        return self._operations.rms_norm(name, x, self._config.norm_eps)

    def _embed_patches(self, patches: Rows, hidden: Rows) -> None:
        super()._embed_patches(patches, hidden)
        if self._config.position_side:
            hidden[:] = self._norm("patch_norm", hidden)

    def _norm_heads(self, layer: str, query: Rows, key: Rows) -> None:
        for name, rows in (("q_norm", query), ("k_norm", key)) if self._config.has_qk_norm else ():
            heads = np.ascontiguousarray(rows).reshape(-1, self._config.head_dim)
            rows[:] = self._norm(f"{layer}.{name}", heads).reshape(rows.shape)

    def _feed_forward(self, layer: str, hidden: Rows) -> Steps:
        ops = self._operations

        def work(rows: slice) -> None:
            normed = self._norm(f"{layer}.mlp_norm", hidden[rows])
            ops.gated_mlp(layer, normed, hidden[rows], finish="add", limit=self._config.limit)

        flop = ops.flop_per_row(*(f"{layer}.{name}" for name in ("gate", "up", "down")))
        return in_blocks(work, range(len(hidden)), flop)

    def _merge(self, hidden: Rows, grid: Grid) -> Generator[None, None, Rows]:
        """Join the patches of each cell: a convolution over the cell, then the merger."""
        ops, config = self._operations, self._config
        embeddings = np.empty((num_positions(config, grid), config.out_size), np.float32)

        def work(rows: slice) -> None:
            patches = slice(rows.start * config.merge**2, rows.stop * config.merge**2)
            normed = self._norm("final_norm", hidden[patches])
            # The weight of the convolution has the channel first, then the place in the cell.
            cells = (
                normed.reshape(-1, config.merge**2, config.hidden_size)
                .swapaxes(1, 2)
                .reshape(-1, config.cell_size)
            )
            joined = ops.linear("merger.in", ops.linear("join", cells))
            merged = ops.gelu(ops.layer_norm("merger.norm", joined, _MERGER_NORM_EPS), "erf")
            ops.gated_mlp("merger", merged, embeddings[rows], limit=config.limit)

        names = ("join", *(f"merger.{name}" for name in ("in", "gate", "up", "down")))
        yield from in_blocks(work, range(len(embeddings)), ops.flop_per_row(*names))
        return embeddings


TOWERS: Mapping[str, Encoder] = {
    "glm4v_moe": Encoder(
        kind="picture",
        path=("vision_config",),
        placeholders=("image_token_id",),
        prefix="model.visual.",
        read=lambda own, around, model: read_config(own),
        tensors=tensors,
        open=GlmVisionTower,
        num_positions=num_positions,
        peak_bytes=peak_bytes,
        angles=lambda config, grid: span_angles(grid, config.merge),
        video=VideoForm(is_shown_as_pictures=True),
    ),
    "glm5_next": Encoder(
        kind="picture",
        path=("vision_config",),
        placeholders=("image_token_id",),
        prefix="model.visual.",
        read=lambda own, around, model: read_glm5_config(own),
        tensors=tensors,
        open=GlmVisionTower,
        num_positions=num_positions,
        peak_bytes=peak_bytes,
    ),
}


def _read_glm(reader: GgufConfigReader) -> dict[str, object]:
    reader.neutral("use_silu", True)
    return read_sizes(reader) | {
        "attention_bias": "v.blk.0.attn_qkv.bias" in reader.file.tensors,
        "image_size": reader.integer("vision.image_size"),
        "rms_norm_eps": reader.number("vision.attention.layer_norm_epsilon"),
        "temporal_patch_size": 2,
    }


def _glm_settings(reader: GgufConfigReader) -> dict[str, object]:
    """Return settings as in GLM-4.5V: 12,544 to 9,633,792 pixels, counted over two frames; a token has 28 x 28."""
    return read_colours(reader) | {
        "image_processor_type": "Glm4vImageProcessor",
        "patch_size": read_patch_size(reader),
        "merge_size": read_merge_size(reader),
        "size": read_pixels(reader, 12_544, 9_633_792, token=28, frames=2),
        "temporal_patch_size": 2,
    }


PROJECTORS: Mapping[str, Projector] = {
    "glm4v": Projector(
        families={"glm4_moe": "glm4v_moe"},
        placeholder="<|image|>",
        read_config=_read_glm,
        read_settings=_glm_settings,
        names={
            "patch": "v.patch_embd",
            "patch_norm": "v.norm_embd",
            "position": "v.position_embd",
            "final_norm": "v.post_ln",
            "join": "mm.patch_merger",
            "merger.in": "mm.model.fc",
            "merger.norm": "mm.post_norm",
            "merger.gate": "mm.gate",
            "merger.up": "mm.up",
            "merger.down": "mm.down",
        },
        stored={"are_frames_apart": True},
    ),
}
