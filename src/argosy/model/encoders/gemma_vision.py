"""The vision tower of Gemma 4 and its projection: pictures.

    patches -> product + learned positions -> layers -> mean of 3 x 3 patches -> scale -> RMSNorm, product

A layer is attention over the whole picture and a GELU-gated MLP, each between two RMSNorms. Heads of queries, keys and
values are normalised; the first half of a head turns with a patch's column, the second half with its row. Positions in
the decoder are those of text, and the positions of a picture see one another in its sliding layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from argosy.errors import UsageError
from argosy.model.encoders import EncoderTensor, with_bias
from argosy.model.encoders.blocks import (
    FLOAT_BYTES,
    OVERHEAD_BYTES,
    Operations,
    Rows,
    Steps,
    Tower,
    attention_floats,
    block_floats,
    in_blocks,
)
from argosy.model.encoders.encoder import Encoder, VideoForm
from argosy.model.encoders.grid import Grid, frame_patches, read_theta
from argosy.model.encoders.projector import Projector, read_colours, read_patch_size
from argosy.model.reading.config_reader import MOST_LAYERS, ConfigReader
from argosy.model.reading.gguf_config import GgufConfigReader
from argosy.prompt.media_span import Making, SpanRows


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmaVisionConfig:
    """Sizes of the tower and of the projection, which makes rows of `out_size` values."""

    num_layers: int
    hidden_size: int
    mlp_width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    patch_size: int
    merge: int
    most_patches_a_side: int
    out_size: int
    norm_eps: float
    theta: float
    is_standardized: bool
    has_colours_first: bool = (
        False  # in the file, the kernel of patches is [hidden_size, 3, patch_size, patch_size]
    )

    @property
    def patch_values(self) -> int:
        return 3 * self.patch_size**2

    @property
    def query_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def key_size(self) -> int:
        return self.num_kv_heads * self.head_dim


def read_config(reader: ConfigReader, *, hidden_size: int) -> GemmaVisionConfig:
    """Read `vision_config`, as `Gemma4VisionConfig` in transformers 5.24 does.

    Args:
        hidden_size: the text model's.

    Raises:
        UnsupportedModel: a key or value that is not supported.   CheckpointError: a key is malformed.
    """
    reader.one_of("hidden_activation", "gelu_pytorch_tanh", ("gelu_pytorch_tanh",))
    reader.neutral("use_clipped_linears", False)
    reader.neutral("attention_bias", False, None)
    # The processor or the family's other towers use these keys.
    reader.passed("max_position_embeddings", "default_output_length", "global_head_dim")
    config = GemmaVisionConfig(
        num_layers=reader.integer("num_hidden_layers", default=16, most=MOST_LAYERS),
        hidden_size=reader.integer("hidden_size", default=768),
        mlp_width=reader.integer("intermediate_size", default=3072),
        num_heads=reader.integer("num_attention_heads", default=12),
        num_kv_heads=reader.integer("num_key_value_heads", default=12),
        head_dim=reader.integer("head_dim", default=64),
        patch_size=reader.integer("patch_size", default=16),
        merge=reader.integer("pooling_kernel_size", default=3),
        most_patches_a_side=reader.integer("position_embedding_size", default=10_240),
        out_size=hidden_size,
        norm_eps=reader.number("rms_norm_eps", 1e-6),
        theta=read_theta(reader, 100.0),
        is_standardized=reader.flag("standardize", False),
    )
    if config.num_heads % config.num_kv_heads:
        raise reader.unsupported(
            "num_key_value_heads", f"a divisor of the number of heads, {config.num_heads}"
        )
    if config.head_dim % 4:
        raise reader.unsupported("head_dim", "a multiple of 4")
    reader.finish()
    return config


def tensors(config: GemmaVisionConfig) -> dict[str, EncoderTensor]:
    """The tensors of tower and projection by canonical name; the prefix is `model.`."""
    hidden, wide = config.hidden_size, config.mlp_width

    def plain(canonical: str, name: str, shape: tuple[int, ...]) -> dict[str, EncoderTensor]:
        return with_bias(canonical, name, shape, has_bias=False)

    patch = "vision_tower.patch_embedder.input_proj"
    if config.has_colours_first:
        side = config.patch_size
        found = with_bias("patch", patch, (hidden, 3, side, side), has_bias=False, taps=side**2)
    else:
        found = plain("patch", patch, (hidden, config.patch_values))
    found["position"] = EncoderTensor(
        "vision_tower.patch_embedder.position_embedding_table",
        (2, config.most_patches_a_side, hidden),
        row_axes=2,
    )
    for layer in range(config.num_layers):
        ours, theirs = f"layers.{layer}", f"vision_tower.encoder.layers.{layer}"
        for name, rows, cols in (
            ("q", config.query_size, hidden),
            ("k", config.key_size, hidden),
            ("v", config.key_size, hidden),
            ("o", hidden, config.query_size),
        ):
            found |= plain(f"{ours}.{name}", f"{theirs}.self_attn.{name}_proj.linear", (rows, cols))
        for name in ("q_norm", "k_norm"):
            found |= plain(f"{ours}.{name}", f"{theirs}.self_attn.{name}", (config.head_dim,))
        for name, rows, cols in (("gate", wide, hidden), ("up", wide, hidden), ("down", hidden, wide)):
            found |= plain(f"{ours}.{name}", f"{theirs}.mlp.{name}_proj.linear", (rows, cols))
        for canonical, name in (
            ("attn_norm", "input_layernorm"),
            ("attn_out_norm", "post_attention_layernorm"),
            ("mlp_norm", "pre_feedforward_layernorm"),
            ("mlp_out_norm", "post_feedforward_layernorm"),
        ):
            found |= plain(f"{ours}.{canonical}", f"{theirs}.{name}", (hidden,))
    if config.is_standardized:
        found["standard_bias"] = EncoderTensor("vision_tower.std_bias", (hidden,))
        found["standard_norm"] = EncoderTensor("vision_tower.std_scale", (hidden,))
    return found | plain("projection", "embed_vision.embedding_projection", (config.out_size, hidden))


def num_positions(config: GemmaVisionConfig, grid: Grid) -> int:
    """Positions that a picture of `grid` patches fills: one for each cell."""
    return frame_patches(grid) // config.merge**2


def peak_bytes(config: GemmaVisionConfig, grid: Grid) -> int:
    """Most bytes that `encode` allocates, its result included; native scratch memory is not counted."""
    hidden, wide, query, key = config.hidden_size, config.mlp_width, config.query_size, config.key_size
    patches, positions = frame_patches(grid), num_positions(config, grid)
    floats = patches * hidden + max(
        block_floats(patches, 2 * hidden * config.patch_values, 2 * config.patch_values + 2 * hidden + 16),
        patches * (query + 2 * key)
        + max(
            block_floats(patches, 2 * hidden * (query + 2 * key), hidden + 2 * query + config.head_dim + 8),
            attention_floats(patches, query, key, 2 * hidden * query, 2 * hidden),
        ),
        block_floats(patches, 6 * hidden * wide, 3 * hidden + 2 * wide),
        positions * config.out_size
        + block_floats(positions, 2 * hidden * config.out_size, (config.merge**2 + 3) * hidden + 8),
    )
    tables = 4 * 8 * (grid[1] + grid[2]) * config.head_dim
    return FLOAT_BYTES * floats + tables + OVERHEAD_BYTES


class GemmaVisionTower(Tower[GemmaVisionConfig]):
    """The tower with its projection and weights; `encode` may be run for several pictures at the same time."""

    def encode(self, patches: Rows, grid: Grid) -> Making:
        """Make the rows of a picture.

        Args:
            patches: values from 0 to 1, [patches, 3 * patch_size^2], row by row.
            grid: 1 frame, rows and columns of patches; rows and columns are multiples of `merge`.

        Raises:
            UsageError: a side is longer than the tower's table of positions.
        """
        config = self._config
        assert grid[0] == 1, "each frame is encoded on its own"
        assert len(patches) == frame_patches(grid), (len(patches), grid)
        if max(grid) > config.most_patches_a_side:
            raise UsageError(
                f"a picture has {max(grid)} patches on one side, and the vision tower takes at most "
                f"{config.most_patches_a_side}",
                hint="make the picture smaller",
            )
        hidden = np.empty((len(patches), config.hidden_size), np.float32)
        yield from self._embed(patches, grid, hidden)
        rotation = _Rotation(grid, config)
        for layer in range(config.num_layers):
            yield layer / config.num_layers
            yield from self._attention(f"layers.{layer}", hidden, rotation)
            yield from self._feed_forward(f"layers.{layer}", hidden)
        embeddings = np.empty((num_positions(config, grid), config.out_size), np.float32)
        yield from self._project(hidden, grid, embeddings)
        return SpanRows(embeddings)

    def _embed(self, patches: Rows, grid: Grid, hidden: Rows) -> Steps:
        ops, config = self._operations, self._config

        def work(rows: slice) -> None:
            ops.linear("patch", 2 * (patches[rows] - 0.5), hidden[rows])
            at_rows, at_cols = np.divmod(np.arange(rows.start, rows.stop, dtype=np.int32), np.int32(grid[2]))
            hidden[rows] += ops.rows_of("position", at_cols)
            hidden[rows] += ops.rows_of("position", at_rows + np.int32(config.most_patches_a_side))

        return in_blocks(work, range(len(hidden)), ops.flop_per_row("patch"))

    def _attention(self, layer: str, hidden: Rows, rotation: _Rotation) -> Steps:
        ops, config = self._operations, self._config
        head_dim, eps = config.head_dim, config.norm_eps
        query = np.empty((len(hidden), config.query_size), np.float32)
        key, value = (np.empty((len(hidden), config.key_size), np.float32) for _ in range(2))

        def project(rows: slice) -> None:
            normed = ops.rms_norm(f"{layer}.attn_norm", hidden[rows], eps)
            for name, out in (("q", query), ("k", key)):
                heads = ops.linear(f"{layer}.{name}", normed).reshape(-1, head_dim)
                out[rows] = ops.rms_norm(f"{layer}.{name}_norm", heads, eps).reshape(len(normed), -1)
                rotation.apply(ops, out[rows].reshape(len(normed), -1, 2, head_dim // 2), rows)
            heads = ops.linear(f"{layer}.v", normed).reshape(-1, head_dim)
            value[rows] = ops.rms_norm(None, heads, eps).reshape(len(normed), -1)

        def add(rows: slice, heads: Rows) -> None:
            hidden[rows] += ops.rms_norm(f"{layer}.attn_out_norm", ops.linear(f"{layer}.o", heads), eps)

        flop = ops.flop_per_row(*(f"{layer}.{name}" for name in ("q", "k", "v")))
        yield from in_blocks(project, range(len(hidden)), flop)
        segments = [range(len(hidden))]
        yield from ops.attend(
            query,
            key,
            value,
            head_dim=head_dim,
            scale=1.0,
            segments=segments,
            output=f"{layer}.o",
            project=add,
        )

    def _feed_forward(self, layer: str, hidden: Rows) -> Steps:
        ops, eps = self._operations, self._config.norm_eps

        def work(rows: slice) -> None:
            normed = ops.rms_norm(f"{layer}.mlp_norm", hidden[rows], eps)
            result = ops.gated_mlp(layer, normed, activation="gelu_tanh")
            hidden[rows] += ops.rms_norm(f"{layer}.mlp_out_norm", result, eps)

        flop = ops.flop_per_row(*(f"{layer}.{name}" for name in ("gate", "up", "down")))
        return in_blocks(work, range(len(hidden)), flop)

    def _project(self, hidden: Rows, grid: Grid, embeddings: Rows) -> Steps:
        ops, config = self._operations, self._config
        merge, columns = config.merge, grid[2] // config.merge
        cells = hidden.reshape(-1, merge, columns, merge, config.hidden_size).swapaxes(1, 2)

        def work(rows: slice) -> None:
            at = np.divmod(np.arange(rows.start, rows.stop), columns)
            x = cells[at].mean(axis=(1, 2))
            x *= np.float32(config.hidden_size**0.5)
            if config.is_standardized:
                x -= ops.vector("standard_bias")
                x *= ops.vector("standard_norm")
            ops.linear("projection", ops.rms_norm(None, x, config.norm_eps), embeddings[rows])

        return in_blocks(work, range(len(embeddings)), ops.flop_per_row("projection"))


class _Rotation:
    """Rotary position embedding of each half of a head on its own: with the column, with the row."""

    def __init__(self, grid: Grid, config: GemmaVisionConfig) -> None:
        _, height, self._width = grid
        half = config.head_dim // 2
        frequency = config.theta ** -(np.arange(0, half, 2) / half)
        angles = [np.arange(size)[:, None] * frequency for size in (self._width, height)]
        self._tables = [
            (np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)) for angle in angles
        ]

    def apply(self, operations: Operations, heads: Rows, rows: slice) -> None:
        """Rotate heads [rows, heads, 2, head_dim / 2] in place."""
        at_rows, at_cols = np.divmod(np.arange(rows.start, rows.stop), self._width)
        for half, (at, (cosine, sine)) in enumerate(zip((at_cols, at_rows), self._tables, strict=True)):
            x = heads[:, :, half].copy()
            operations.rotate(x, cosine[at], sine[at], is_interleaved=False)
            heads[:, :, half] = x


TOWERS: Mapping[str, Encoder] = {
    "gemma4": Encoder(
        kind="picture",
        path=("vision_config",),
        placeholders=("image_token_id",),
        prefix="model.",
        read=lambda own, around, model: read_config(own, hidden_size=model.hidden_size),
        tensors=tensors,
        open=GemmaVisionTower,
        num_positions=num_positions,
        peak_bytes=peak_bytes,
        sees_both_ways=True,
        marks=("boi_token_id", "eoi_token_id"),
        video=VideoForm(),
    ),
}


def _read_gemma(reader: GgufConfigReader) -> dict[str, object]:
    """Read the config. The heads' sizes are those of the tensors, and the file has no rotary base, as in llama.cpp."""

    def size(name: str, axis: int) -> int:
        ref = reader.file.tensors.get(name)
        return ref.shape[axis] if ref is not None and len(ref.shape) > axis else 1

    num_heads = reader.integer("vision.attention.head_count")
    head_dim = max(1, size("v.blk.0.attn_q.weight", 0) // num_heads)
    reader.integer("vision.image_size")  # nothing depends on it
    return {
        "head_dim": head_dim,
        "hidden_size": reader.integer("vision.embedding_length"),
        "intermediate_size": reader.integer("vision.feed_forward_length"),
        "num_attention_heads": num_heads,
        "num_hidden_layers": reader.integer("vision.block_count", most=MOST_LAYERS),
        "num_key_value_heads": max(1, size("v.blk.0.attn_k.weight", 0) // head_dim),
        "patch_size": read_patch_size(reader),
        "pooling_kernel_size": _pooled(reader),
        "position_embedding_size": size("v.position_embd.weight", 1),
        "rms_norm_eps": reader.number("vision.attention.layer_norm_epsilon"),
        "standardize": "v.std_bias" in reader.file.tensors,
    }


def _pooled(reader: GgufConfigReader) -> int:
    return reader.integer("vision.projector.scale_factor", 3, most=16)


def _gemma_settings(reader: GgufConfigReader) -> dict[str, object]:
    """Return settings as in Gemma-4: 280 tokens, and colours from 0 to 1."""
    return read_colours(reader) | {
        "do_normalize": True,
        "image_processor_type": "Gemma4ImageProcessor",
        "patch_size": read_patch_size(reader),
        "pooling_kernel_size": _pooled(reader),
    }


PROJECTORS: Mapping[str, Projector] = {
    "gemma4v": Projector(
        families={"gemma4": "gemma4"},
        placeholder="<|image|>",
        marks=("<|image>", "<image|>"),
        read_config=_read_gemma,
        read_settings=_gemma_settings,
        names={"patch": "v.patch_embd", "position": "v.position_embd", "projection": "mm.input_projection"},
        whole_names={"standard_bias": "v.std_bias", "standard_norm": "v.std_scale"},
        stored={"has_colours_first": True},
    ),
}
