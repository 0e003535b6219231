"""Llama-4's vision tower and its projector: pictures in tiles, which do not see one another.

    patches of a tile + class -> product + learned positions -> LayerNorm -> layers -> LayerNorm -> 2 x 2 patches in one
                                                                -> two products, GELU after each -> product

A layer is LayerNorm, attention with 2-D RoPE over the tile, LayerNorm, MLP with GELU. The class vector is a tile's last
row; it does not turn, and is dropped after the layers. The processor cuts a picture into tiles and adds the whole
picture as one more (`media/tiles.py`); tokens separate them.

GELU is exact as in transformers; llama.cpp approximates it by tanh.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass

import numpy as np

from argosy.config import ModelConfig
from argosy.model.encoders import EncoderTensor, with_bias
from argosy.model.encoders.blocks import Rows, Steps, block_floats, gelu_mlp_floats, in_blocks
from argosy.model.encoders.encoder import Encoder
from argosy.model.encoders.grid import Grid, PairOrder, Places, frame_patches, patch_places, read_theta
from argosy.model.encoders.patch_tower import PatchConfig, PatchTower, tower_bytes
from argosy.model.encoders.projector import Projector, read_colours, read_patch_size
from argosy.model.reading.config_reader import MOST_LAYERS, ConfigReader
from argosy.model.reading.gguf_config import GgufConfigReader
from argosy.prompt.media_span import Making, SpanRows

_START, _WHOLE, _END = "<|image_start|>", "<|image|>", "<|image_end|>"
_BETWEEN_COLUMNS, _AFTER_ROW = "<|tile_x_separator|>", "<|tile_y_separator|>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama4VisionConfig(PatchConfig):
    """Sizes of the tower and its projector; `position_side` is the side of a tile in patches."""

    mlp_width: int
    projector_width: int
    pair_order: PairOrder = "columns first"
    are_qkv_apart: bool = True

    @property
    def tile_rows(self) -> int:
        """The patches of a tile, and its class."""
        return self.position_side**2 + 1

    @property
    def tile_cells(self) -> int:
        return (self.position_side // self.merge) ** 2

    def arrangement(self, grid: Grid) -> tuple[int, int]:
        """Return rows and columns of tiles of a picture; its grid has one more row of tiles if there are several."""
        rows, columns = (side // self.position_side for side in grid[1:])
        return max(rows - 1, 1), max(columns, 1)

    def num_tiles(self, grid: Grid) -> int:
        """Tiles of a picture, with that of the whole picture."""
        rows, columns = self.arrangement(grid)
        return rows * columns + (rows * columns > 1)


def read_config(reader: ConfigReader, model: ModelConfig) -> Llama4VisionConfig:
    """Read `vision_config`, as `Llama4VisionConfig` in transformers 5.24 does.

    Raises:
        UnsupportedModel: a key or value that is not supported.   CheckpointError: a key is malformed.
    """
    reader.one_of("hidden_act", "gelu", ("gelu",))
    for key, value in (
        ("num_channels", 3), ("multi_modal_projector_bias", False), ("vision_feature_layer", -1),
        ("vision_feature_select_strategy", "default"), ("norm_eps", 1e-5),
    ):  # fmt: skip
        reader.neutral(key, value)
    reader.passed("projector_dropout")
    hidden_size, patch_size = (
        reader.integer("hidden_size", default=768),
        reader.integer("patch_size", default=14),
    )
    image_size = reader.integer("image_size", default=448)
    width = reader.integer("projector_input_dim", default=4096)
    config = Llama4VisionConfig(
        num_layers=reader.integer("num_hidden_layers", default=34, most=MOST_LAYERS),
        hidden_size=hidden_size,
        mlp_width=reader.integer("intermediate_size", default=5632),
        num_heads=reader.integer("num_attention_heads", default=16),
        patch_size=patch_size,
        merge=round(1 / reader.number("pixel_shuffle_ratio", 0.5)),
        out_size=model.hidden_size,
        position_side=image_size // patch_size,
        theta=read_theta(reader, reader.number("rope_theta", 10_000.0)),
        projector_width=width,
    )
    config.require_heads(reader)
    if not config.merge or image_size % (patch_size * config.merge):
        raise reader.unsupported(
            "image_size", f"a multiple of {patch_size * max(config.merge, 1)}, whole cells"
        )
    # transformers makes the projector's matrices with these sizes, and can run it only if they are equal.
    for key, default, needed in (
        ("pixel_shuffle_ratio", 0.5, 1 / config.merge),
        ("intermediate_size", 5632, config.cell_size),
        ("projector_output_dim", 4096, width),
        ("vision_output_dim", 7680, width),
    ):
        if reader.number(key, default) != needed:
            raise reader.unsupported(key, f"{needed}, so that the projector's products fit each other")
    reader.finish()
    return config


def tensors(config: Llama4VisionConfig) -> dict[str, EncoderTensor]:
    """The tensors of tower and projector by canonical name; their names in files have no prefix."""
    hidden, wide, side, tower = config.hidden_size, config.mlp_width, config.patch_size, "vision_model"
    found = {
        "patch": EncoderTensor(f"{tower}.patch_embedding.linear.weight", (hidden, 3 * side**2)),
        "class_bias": EncoderTensor(f"{tower}.class_embedding", (hidden,)),
        "position": EncoderTensor(f"{tower}.positional_embedding_vlm", (config.tile_rows, hidden)),
    }
    for ours, theirs in (("first_norm", "layernorm_pre"), ("final_norm", "layernorm_post")):
        found |= with_bias(ours, f"{tower}.{theirs}", (hidden,))
    for layer in range(config.num_layers):
        ours, theirs = f"layers.{layer}", f"{tower}.model.layers.{layer}"
        found |= with_bias(f"{ours}.attn_norm", f"{theirs}.input_layernorm", (hidden,))
        for name in ("q", "k", "v", "o"):
            found |= with_bias(f"{ours}.{name}", f"{theirs}.self_attn.{name}_proj", (hidden, hidden))
        found |= with_bias(f"{ours}.mlp_norm", f"{theirs}.post_attention_layernorm", (hidden,))
        found |= with_bias(f"{ours}.up", f"{theirs}.mlp.fc1", (wide, hidden))
        found |= with_bias(f"{ours}.down", f"{theirs}.mlp.fc2", (hidden, wide))
    adapter, width = f"{tower}.vision_adapter.mlp", config.projector_width
    found["merger.up"] = EncoderTensor(f"{adapter}.fc1.weight", (width, config.cell_size))
    found["merger.down"] = EncoderTensor(f"{adapter}.fc2.weight", (width, width))
    found["merger.out"] = EncoderTensor("multi_modal_projector.linear_1.weight", (config.out_size, width))
    return found


def written(config: Llama4VisionConfig, grid: Grid) -> dict[int, str]:
    """The tokens around and between the tiles: those of each row, then the whole picture."""
    rows, columns = config.arrangement(grid)
    found, at = {0: _START}, 1
    if rows * columns > 1:
        for tile in range(1, rows * columns + 1):
            at += config.tile_cells
            found[at] = _BETWEEN_COLUMNS if tile % columns else _AFTER_ROW
            at += 1
    found[at] = _WHOLE
    return found | {at + 1 + config.tile_cells: _END}


def num_positions(config: Llama4VisionConfig, grid: Grid) -> int:
    """Positions that a picture fills: one for each cell of each tile, and one for each token of `written`."""
    return config.num_tiles(grid) * config.tile_cells + len(written(config, grid))


def extent(config: Llama4VisionConfig, grid: Grid) -> tuple[int, int]:
    """Patches of all tiles, which see their tile, and the pairs; classes count as patches."""
    rows = config.num_tiles(grid) * config.tile_rows
    return rows, rows * config.tile_rows


def settings(config: Llama4VisionConfig) -> dict[str, object]:
    """The sizes of patches and cells, which the processor's own settings do not give."""
    return {"patch_size": config.patch_size, "merge_size": config.merge}


def peak_bytes(config: Llama4VisionConfig, grid: Grid) -> int:
    """Most bytes that `encode` allocates, its result included; native scratch memory is not counted."""
    hidden, out, width, cell = config.hidden_size, config.out_size, config.projector_width, config.cell_size
    tiles, positions = config.num_tiles(grid), num_positions(config, grid)
    rows, cells = tiles * config.tile_rows, tiles * config.tile_cells
    stages = (
        block_floats(rows, 2 * hidden * config.patch_values, 4 * hidden + 32),
        gelu_mlp_floats(rows, hidden, config.mlp_width),
        cells * out + block_floats(cells, 2 * width * (cell + width + out), 3 * cell + 2 * width + out),
        cells * out + positions * out - rows * hidden,
    )
    return tower_bytes(
        config, (tiles, config.tile_rows, 1), config.tile_rows, rows * config.patch_values, stages
    )


class Llama4Tower(PatchTower[Llama4VisionConfig]):
    """The tower with its projector and weights."""

    _norm_eps = 1e-5

    def encode(self, patches: Rows, grid: Grid) -> Making:
        """Make the rows of a picture; zeros where tokens are.

        Args:
            patches: [patches of all tiles, `patch_values`], cell by cell within a tile.
            grid: as `Llama4VisionConfig.arrangement` takes it.
        """
        config = self._config
        tiles, rows = config.num_tiles(grid), config.tile_rows
        with_class = np.zeros((tiles, rows, config.patch_values), np.float32)
        with_class[:, :-1] = patches.reshape(tiles, rows - 1, -1)
        # Each tile is a frame of `tile_rows` patches.
        made = yield from super().encode(with_class.reshape(tiles * rows, -1), (tiles, rows, 1))
        embeddings = np.zeros((num_positions(config, grid), config.out_size), np.float32)
        is_row = np.ones(len(embeddings), bool)
        is_row[list(written(config, grid))] = False
        embeddings[is_row] = made.embeddings
        return SpanRows(embeddings, made.additions)

    def _places(self, grid: Grid) -> Places:
        """Places count from 1; the class, which does not turn, is at 0."""
        side = self._config.position_side
        rows, columns = (np.append(axis + 1, 0) for axis in patch_places((1, side, side), self._config.merge))
        return rows, columns

    def _embed(self, patches: Rows, grid: Grid, places: Places, hidden: Rows) -> Steps:
        ops, side = self._operations, self._config.position_side
        entries = (side * (places[0] - 1) + places[1] - 1).astype(np.int32)
        entries[-1] = side**2

        def work(rows: slice) -> None:
            index = np.arange(rows.start, rows.stop) % len(entries)
            embedded = ops.linear("patch", patches[rows])
            embedded[index == side**2] = ops.vector("class_bias")
            embedded += ops.rows_of("position", entries[index])
            hidden[rows] = self._norm("first_norm", embedded)

        return in_blocks(work, range(len(hidden)), ops.flop_per_row("patch"))

    def _feed_forward(self, layer: str, hidden: Rows) -> Steps:
        return self._operations.gelu_mlp(layer, hidden, self._norm_eps, "gelu_erf")

    def _merge(self, hidden: Rows, grid: Grid) -> Generator[None, None, Rows]:
        """Drop the classes, and join the patches of each cell."""
        ops, config = self._operations, self._config
        embeddings = np.empty((grid[0] * config.tile_cells, config.out_size), np.float32)
        of_tiles = hidden.reshape(grid[0], frame_patches(grid), -1)[:, :-1]
        cells = of_tiles.reshape(grid[0], config.tile_cells, config.merge**2, -1)

        def work(rows: slice) -> None:
            index = np.arange(rows.start, rows.stop)
            patches = cells[index // config.tile_cells, index % config.tile_cells]
            x = self._norm("final_norm", patches.reshape(-1, config.hidden_size)).reshape(len(index), -1)
            x = ops.linear("merger.up", x, finish="gelu_erf")
            x = ops.linear("merger.down", x, finish="gelu_erf")
            ops.linear("merger.out", x, embeddings[rows])

        names = ("merger.up", "merger.down", "merger.out")
        yield from in_blocks(work, range(len(embeddings)), ops.flop_per_row(*names))
        return embeddings


TOWERS: Mapping[str, Encoder] = {
    "llama4": Encoder(
        kind="picture",
        path=("vision_config",),
        placeholders=("image_token_index", "image_token_id"),
        placeholder=_WHOLE,
        prefix="",
        read=lambda own, around, model: read_config(own, model),
        tensors=tensors,
        open=Llama4Tower,
        num_positions=num_positions,
        peak_bytes=peak_bytes,
        extent=extent,
        written=written,
        settings=settings,
    )
}


def _read_gguf(reader: GgufConfigReader) -> dict[str, object]:
    reader.neutral("use_gelu", True)
    merge = reader.integer("vision.projector.scale_factor", most=16)
    product = reader.file.tensors.get("mm.model.mlp.1.weight")
    width = 1 if product is None else product.shape[0]
    return {
        "hidden_size": reader.integer("vision.embedding_length"),
        "image_size": reader.integer("vision.image_size"),
        "intermediate_size": reader.integer("vision.feed_forward_length"),
        "norm_eps": round(reader.number("vision.attention.layer_norm_epsilon"), 9),  # stored as a float32
        "num_attention_heads": reader.integer("vision.attention.head_count"),
        "num_hidden_layers": reader.integer("vision.block_count", most=MOST_LAYERS),
        "patch_size": read_patch_size(reader),
        "pixel_shuffle_ratio": 1 / merge,
        "projector_input_dim": width,
        "projector_output_dim": width,
        "vision_output_dim": width,
    }


def _gguf_settings(reader: GgufConfigReader) -> dict[str, object]:
    """Return settings as in the released models; the file gives the size of a tile."""
    side = reader.integer("vision.image_size")
    return read_colours(reader) | {
        "image_processor_type": "Llama4ImageProcessor",
        "resample": 2,
        "size": {"height": side, "width": side},
    }


PROJECTORS: Mapping[str, Projector] = {
    "llama4": Projector(
        families={"llama4_text": "llama4"},
        placeholder="<|patch|>",
        read_config=_read_gguf,
        read_settings=_gguf_settings,
        names={
            "patch": "v.patch_embd",
            "position": "v.position_embd",
            "first_norm": "v.pre_ln",
            "final_norm": "v.post_ln",
            "merger.up": "mm.model.mlp.1",
            "merger.down": "mm.model.mlp.2",
            "merger.out": "mm.model.fc",
        },
        whole_names={"class_bias": "v.class_embd"},
        renamed={".ln2.": ".attn_post_norm."},  # converters since 2026 take it for Gemma-4's
    )
}
