"""The tower and aligner of DeepSeek-V4-Vision and DeepSeek-V4.1: pictures of any size, as blocks of positions.

    patches -> product -> layers -> RMSNorm -> 3 x 3 patches in one -> two products with GELU between them -> block

A layer is RMSNorm, attention with 2-D RoPE over the whole picture, RMSNorm, SwiGLU. Where the last squares reach beyond
the picture, their patches are zero. A block begins and ends with a learned vector, and has one after each row of
squares. V4.1's squares lie in reading order, and its decoder is causal for pictures too.

In V4-Vision the positions of a block see one another, and every two rows lie column by column; learned fillers stand
for the second row of the last one and make half of the rows even. Further fillers before a block let its first square
begin an entry of the decoder's pools, which stand for 4 positions each.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from argosy.config import ModelConfig
from argosy.media.blocks import num_block_tokens
from argosy.model.encoders import EncoderTensor, with_bias
from argosy.model.encoders.blocks import Rows, Steps, attention_flop, block_floats, columns, in_blocks
from argosy.model.encoders.encoder import Encoder
from argosy.model.encoders.grid import Grid, Places, frame_patches, patch_places
from argosy.model.encoders.patch_tower import PatchConfig, PatchTower, tower_bytes
from argosy.model.encoders.projector import Projector, read_colours, read_patch_size
from argosy.model.reading.config_reader import MOST_LAYERS, ConfigReader
from argosy.model.reading.gguf_config import GgufConfigReader

_POOLED = 4  # positions of an entry
_MARKS = ("start", "end", "newline", "pad")


class Released(NamedTuple):
    """The layout of a family's blocks, and the limits of pictures in its released model."""

    rows_together: int
    most_tokens: int
    least_pixels: int
    most_ratio: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepseekVisionConfig(PatchConfig):
    """Sizes of the tower and its aligner, and limits of a picture.

    rows_together: rows of squares that lie column by column (`media/blocks.py`).
    """

    rows_together: int
    mlp_width: int
    norm_eps: float
    most_tokens: int
    least_pixels: int
    most_ratio: int
    is_converted: bool = False  # llama.cpp's converter divides the SwiGLU's first matrix

    @property
    def marks(self) -> tuple[str, ...]:
        return _MARKS if self.rows_together > 1 else _MARKS[:-1]


def read_config(reader: ConfigReader, model: ModelConfig, released: Released) -> DeepseekVisionConfig:
    """Read the keys that begin with `vision_`, or those of `vision_config`; an absent key gets the value of the
    released model.

    Raises:
        UnsupportedModel: a key or value that is not supported.   CheckpointError: a key is malformed.
    """
    config = DeepseekVisionConfig(
        rows_together=released.rows_together,
        num_layers=reader.integer("n_layers", "num_hidden_layers", default=32, most=MOST_LAYERS),
        hidden_size=reader.integer("dim", "hidden_size", default=1024),
        mlp_width=reader.integer("inter_dim", "intermediate_size", default=2816),
        num_heads=reader.integer("n_heads", "num_attention_heads", default=16),
        norm_eps=reader.number("norm_eps", 1e-6),  # whatever the text model's is
        patch_size=reader.integer("patch_size", default=14, most=256),
        merge=reader.integer("downsample_ratio", default=3, most=16),
        out_size=model.hidden_size,
        position_side=0,
        theta=reader.number("rope_theta", 10_000.0),
        most_tokens=reader.integer("max_n_token", "max_image_tokens", default=released.most_tokens, least=16),
        least_pixels=reader.integer("min_pixels", default=released.least_pixels, least=0),
        most_ratio=reader.optional_integer("max_wh_ratio", default=released.most_ratio, least=0) or 0,
    )
    config.require_heads(reader, "dim" if reader.has("dim") else "hidden_size")
    reader.finish()
    return config


def tensors(config: DeepseekVisionConfig) -> dict[str, EncoderTensor]:
    """The tensors of tower and aligner by canonical name; their names in files have no prefix."""
    hidden, out, wide, side = config.hidden_size, config.out_size, config.mlp_width, config.patch_size
    kernel = (hidden, 3, side, side) if config.is_converted else (hidden, config.patch_values)
    found = with_bias("patch", "vision.patch_embed.proj", kernel)
    for layer in range(config.num_layers):
        ours, theirs = f"layers.{layer}", f"vision.blocks.{layer}"
        found |= with_bias(f"{ours}.attn_norm", f"{theirs}.norm1", (hidden,), has_bias=False)
        found |= with_bias(f"{ours}.qkv", f"{theirs}.attn.wqkv", (3 * hidden, hidden))
        found |= with_bias(f"{ours}.o", f"{theirs}.attn.wo", (hidden, hidden))
        found |= with_bias(f"{ours}.mlp_norm", f"{theirs}.norm2", (hidden,), has_bias=False)
        for name in _wide_names(config):
            shape = (2 * wide // len(_wide_names(config)), hidden)
            found |= with_bias(f"{ours}.{name}", f"{theirs}.mlp.w1", shape, has_bias=False)
        found |= with_bias(f"{ours}.down", f"{theirs}.mlp.w2", (hidden, wide), has_bias=False)
    found |= with_bias("final_norm", "vision.norm", (hidden,), has_bias=False)
    found |= with_bias("merger.up", "aligner.w1", (out, config.cell_size))
    found |= with_bias("merger.down", "aligner.w2", (out, out))
    return found | {mark: EncoderTensor(f"image_{mark}", (out,)) for mark in config.marks}


def _wide_names(config: DeepseekVisionConfig) -> tuple[str, ...]:
    return ("gate", "up") if config.is_converted else ("gate_up",)


def _cells(config: DeepseekVisionConfig, grid: Grid) -> tuple[int, int]:
    """Rows and columns of squares of patches."""
    return -(-grid[1] // config.merge), -(-grid[2] // config.merge)


def num_positions(config: DeepseekVisionConfig, grid: Grid) -> int:
    """Positions of the block of a picture of `grid` patches, without the fillers before it."""
    return num_block_tokens(*_cells(config, grid), config.rows_together)


def block_order(num_rows: int, num_columns: int, together: int) -> NDArray[np.int64]:
    """Return what the positions of a block are: the number of a square of patches, or -1 - the number of a mark."""
    start, end, newline, pad = (-1 - number for number in range(len(_MARKS)))
    rows = np.full((num_rows + -num_rows % together, num_columns + 1), pad)
    rows[:num_rows, -1] = newline
    rows[:num_rows, :-1] = np.arange(num_rows * num_columns).reshape(num_rows, num_columns)
    groups = rows.reshape(-1, together, num_columns + 1).swapaxes(1, 2).ravel()
    return np.concatenate([[start], groups, np.full(-len(groups) % together**2, pad), [end]])


def peak_bytes(config: DeepseekVisionConfig, grid: Grid) -> int:
    """Most bytes that `encode` allocates, its result included; native scratch memory is not counted."""
    hidden, out, cell, wide = config.hidden_size, config.out_size, config.cell_size, config.mlp_width
    patches, (rows, cols) = frame_patches(grid), _cells(config, grid)
    cells = rows * cols
    stages = (
        block_floats(patches, 2 * hidden * config.patch_values, 2 * hidden),
        block_floats(patches, 6 * hidden * wide, hidden + 5 * wide),
        num_positions(config, grid) * out
        + block_floats(cells, 2 * out * (cell + out), 2 * cell + hidden + 2 * out + 8)
        + 6 * num_positions(config, grid),
    )
    return tower_bytes(config, grid, patches, 0, stages)


def flop(config: DeepseekVisionConfig, grid: Grid) -> int:
    """Floating-point operations of a picture."""
    hidden, out, patches, (rows, cols) = (
        config.hidden_size,
        config.out_size,
        frame_patches(grid),
        _cells(config, grid),
    )
    layer = 2 * hidden * (4 * hidden + 3 * config.mlp_width) + attention_flop(patches, hidden)
    aligned = 2 * out * (config.cell_size + out)
    return patches * (2 * hidden * config.patch_values + config.num_layers * layer) + rows * cols * aligned


class DeepseekVisionTower(PatchTower[DeepseekVisionConfig]):
    """The tower with its aligner and weights; patches lie row by row."""

    def fillers(self, count: int) -> Rows:
        """Return so many rows of the vector before a block."""
        return self._operations.rows_of("pad", np.zeros(count, np.int32))

    def _norm(self, name: str, x: Rows) -> Rows:
        return self._operations.rms_norm(name, x, self._config.norm_eps)

    def _places(self, grid: Grid) -> Places:
        return patch_places(grid, 1)

    def _embed_patches(self, patches: Rows, hidden: Rows) -> None:
        self._operations.linear("patch", patches, hidden)

    def _feed_forward(self, layer: str, hidden: Rows) -> Steps:
        ops, names = self._operations, [f"{layer}.{name}" for name in _wide_names(self._config)]

        def work(rows: slice) -> None:
            normed = self._norm(f"{layer}.mlp_norm", hidden[rows])
            both = np.empty((len(normed), 2 * self._config.mlp_width), np.float32)
            for name, out in zip(names, columns(both, len(names)), strict=True):
                ops.linear(name, normed, out)
            gate, up = columns(both, 2)
            with np.errstate(over="ignore"):  # a gate far below zero becomes zero
                gated = np.exp(-gate)
            gated += 1
            np.divide(gate, gated, out=gated)
            gated *= up
            ops.linear(f"{layer}.down", gated, hidden[rows], finish="add")

        return in_blocks(work, range(len(hidden)), ops.flop_per_row(*names, f"{layer}.down"))

    def _merge(self, hidden: Rows, grid: Grid) -> Generator[None, None, Rows]:
        """Join the patches of each square, and put the results and the marks in the order of the block."""
        ops, config, merge = self._operations, self._config, self._config.merge
        rows, cols = _cells(config, grid)
        patches = hidden.reshape(grid[1], grid[2], -1)
        order = block_order(rows, cols, config.rows_together)
        embeddings = np.empty((len(order), config.out_size), np.float32)
        places = np.argsort(order)[-rows * cols :]  # of squares; marks are below zero

        def normalise(part: slice) -> None:
            hidden[part] = self._norm("final_norm", hidden[part])

        def work(part: slice) -> None:
            # The matrix has the channel first, then the place in the square.
            cells = np.zeros((part.stop - part.start, config.hidden_size, merge, merge), np.float32)
            for at, cell in enumerate(range(part.start, part.stop)):
                top, left = cell // cols * merge, cell % cols * merge
                square = patches[top : top + merge, left : left + merge]
                cells[at, :, : square.shape[0], : square.shape[1]] = square.transpose(2, 0, 1)
            x = ops.linear("merger.up", cells.reshape(len(cells), -1), finish="gelu_erf")
            embeddings[places[part]] = ops.linear("merger.down", x)

        yield from in_blocks(normalise, range(len(hidden)), hidden.shape[1])
        yield from in_blocks(work, range(len(places)), ops.flop_per_row("merger.up", "merger.down"))
        for number, mark in enumerate(config.marks):
            embeddings[order == -1 - number] = ops.rows_of(mark, np.zeros(1, np.int32))
        return embeddings


def settings(config: DeepseekVisionConfig) -> dict[str, object]:
    """The processor's settings, which the makers' code takes from the config."""
    return {
        "image_processor_type": "DeepseekV4ImageProcessor",
        "max_ratio": config.most_ratio,
        "max_tokens": config.most_tokens,
        "merge_size": config.merge,
        "min_pixels": config.least_pixels,
        "patch_size": config.patch_size,
        "rows_together": config.rows_together,
    }


def _encoder(released: Released, **form: Any) -> Encoder:
    return Encoder(
        kind="picture",
        prefix="",
        first_prefix="vision.",
        read=lambda own, around, model: read_config(own, model, released),
        tensors=tensors,
        open=DeepseekVisionTower,
        num_positions=num_positions,
        peak_bytes=peak_bytes,
        flop=flop,
        settings=settings,
        has_processor_file=False,
        **form,
    )


TOWERS: Mapping[str, Encoder] = {
    "deepseek_v4": _encoder(
        Released(rows_together=2, most_tokens=384, least_pixels=147_456, most_ratio=8),
        path=("vision_*",),
        placeholders=("<｜deepseek_image｜>",),
        sees_both_ways=True,
        num_fillers=lambda position: _POOLED - 1 - position % _POOLED,
    ),
    "deepseek_v41": _encoder(
        Released(rows_together=1, most_tokens=1024, least_pixels=295_936, most_ratio=None),
        path=("vision_config",),
        placeholders=("image_token_id",),
    ),
}


def _read_gguf(reader: GgufConfigReader) -> dict[str, object]:
    reader.neutral("use_silu", True)
    reader.integer("vision.image_size")  # of no picture
    return {
        "dim": reader.integer("vision.embedding_length"),
        "downsample_ratio": reader.integer("vision.projector.scale_factor", most=16),
        "inter_dim": reader.integer("vision.feed_forward_length"),
        "min_pixels": reader.integer("vision.image_min_pixels", least=0),
        "n_heads": reader.integer("vision.attention.head_count"),
        "n_layers": reader.integer("vision.block_count", most=MOST_LAYERS),
        "norm_eps": reader.number("vision.attention.layer_norm_epsilon"),
        "patch_size": read_patch_size(reader),
    }


PROJECTORS: Mapping[str, Projector] = {
    "deepseek4v": Projector(
        families={"deepseek_v4": "deepseek_v4"},
        placeholder="<｜deepseek_image｜>",
        read_config=_read_gguf,
        read_settings=read_colours,
        names={
            "patch": "v.patch_embd",
            "final_norm": "v.post_ln",
            "merger.up": "mm.1",
            "merger.down": "mm.2",
        },
        whole_names={
            "start": "v.token_embd.img_start",
            "end": "v.token_embd.img_end",
            "newline": "v.image_newline",
            "pad": "v.token_embd.img_pad",
        },
        stored={"is_converted": True},
    )
}
