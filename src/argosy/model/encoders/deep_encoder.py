"""DeepEncoder, the vision tower of DeepSeek-OCR and DeepSeek-OCR-2: SAM (`sam_vision.py`), then a second encoder.

    patches of a tile or of the whole picture -> SAM -> 16 times fewer rows -> second encoder -> product

A picture larger than a tile is cut into tiles; the whole of it follows, scaled to a larger square. Tiles and the whole
see only themselves. The last row of a span is learned and ends the picture.

DeepSeek-OCR: the second encoder is CLIP-L, and the product takes its rows beside those of SAM. Rows of tiles lie side
by side as in the picture; a learned row ends each line of tokens, of the tiles and of the whole.
DeepSeek-OCR-2: it is a Qwen2 whose first positions, SAM's rows, see each other, and whose further positions are learned
queries that see those and the queries before them. Their results are the rows. There is a set of queries for tiles and
one for the whole, so that both have a fixed size.

The files of DeepSeek's own form say little about their towers; what is constant in its code is constant here.
So it is for files of llama.cpp's converter. For DeepSeek-OCR it writes the sizes of pictures and patches that CLIP was
made for, and four times CLIP's heads as the width of its MLP. llama.cpp computes SAM's gelu by tanh; here it is exact,
as in DeepSeek's code.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from argosy.model.encoders import EncoderTensor, with_bias
from argosy.model.encoders.blocks import (
    FLOAT_BYTES,
    OVERHEAD_BYTES,
    Rows,
    Steps,
    Tower,
    attention_floats,
    attention_flop,
    block_floats,
    columns,
    gelu_mlp_floats,
    in_blocks,
)
from argosy.model.encoders.deep_encoder_config import (
    QUERIES,
    DeepEncoderConfig,
    SecondConfig,
    read_config,
    read_hub_config,
)
from argosy.model.encoders.encoder import Encoder
from argosy.model.encoders.grid import Grid, PositionTable, patch_places, smooth_taps
from argosy.model.encoders.projector import Projector, read_colours, read_patch_size
from argosy.model.encoders.sam_vision import (
    encode_square,
    sam_floats,
    sam_flop,
    sam_side,
    sam_tensors,
)
from argosy.model.reading.config_reader import MOST_LAYERS
from argosy.model.reading.gguf_config import GgufConfigReader
from argosy.prompt.media_span import Making, SpanRows


class Tiles(NamedTuple):
    """The arrangement of a picture's tiles; no rows if there are none."""

    rows: int
    columns: int


def tiles_of(config: DeepEncoderConfig, grid: Grid) -> Tiles:
    """The tiles in a grid: they lie above the whole picture, which is at least as wide as one tile, less than two."""
    rows = (grid[1] - config.whole_side) // config.tile_side
    return Tiles(rows, grid[2] // config.tile_side if rows else 0)


def tensors(config: DeepEncoderConfig) -> dict[str, EncoderTensor]:
    """The tensors of tower and projector by canonical name; their names in files have the prefix `model.`."""
    second, hidden, out = config.second, config.second.hidden_size, config.out_size
    found = sam_tensors(config.sam)
    if second.kind == "clip":
        found |= _clip_tensors(second)
        found["newline"] = EncoderTensor("image_newline", (out,))
    else:
        found |= _qwen_tensors(second)
    found["separator"] = EncoderTensor("view_seperator", (out,))
    width = hidden + config.sam.channels[1] if second.kind == "clip" else hidden
    return found | with_bias("projector", "projector.layers", (out, width))


def _clip_tensors(second: SecondConfig) -> dict[str, EncoderTensor]:
    hidden, wide, tower = second.hidden_size, second.mlp_width, "vision_model"
    found = {
        "cls": EncoderTensor(f"{tower}.embeddings.class_embedding", (hidden,)),
        "position.second": EncoderTensor(
            f"{tower}.embeddings.position_embedding.weight", (second.position_side**2 + 1, hidden)
        ),
    }
    found |= with_bias("second.first_norm", f"{tower}.pre_layrnorm", (hidden,))
    for layer in range(second.num_layers):
        ours, theirs = f"second.{layer}", f"{tower}.transformer.layers.{layer}"
        found |= with_bias(f"{ours}.attn_norm", f"{theirs}.layer_norm1", (hidden,))
        found |= with_bias(f"{ours}.qkv", f"{theirs}.self_attn.qkv_proj", (3 * hidden, hidden))
        found |= with_bias(f"{ours}.o", f"{theirs}.self_attn.out_proj", (hidden, hidden))
        found |= with_bias(f"{ours}.mlp_norm", f"{theirs}.layer_norm2", (hidden,))
        found |= with_bias(f"{ours}.up", f"{theirs}.mlp.fc1", (wide, hidden))
        found |= with_bias(f"{ours}.down", f"{theirs}.mlp.fc2", (hidden, wide))
    return found


def _qwen_tensors(second: SecondConfig) -> dict[str, EncoderTensor]:
    hidden, wide, tower = second.hidden_size, second.mlp_width, "qwen2_model.model.model"
    found = {
        f"queries.{name}": EncoderTensor(f"qwen2_model.query_{size}.weight", (QUERIES[name] ** 2, hidden))
        for name, size in (("tile", 768), ("whole", 1024))
    }
    for layer in range(second.num_layers):
        ours, theirs = f"second.{layer}", f"{tower}.layers.{layer}"
        for name, norm in (("attn_norm", "input_layernorm"), ("mlp_norm", "post_attention_layernorm")):
            found |= with_bias(f"{ours}.{name}", f"{theirs}.{norm}", (hidden,), has_bias=False)
        for name in ("q", "k", "v"):
            heads = second.num_heads if name == "q" else second.num_kv_heads
            found |= with_bias(
                f"{ours}.{name}", f"{theirs}.self_attn.{name}_proj", (heads * second.head_dim, hidden)
            )
        found |= with_bias(f"{ours}.o", f"{theirs}.self_attn.o_proj", (hidden, hidden), has_bias=False)
        for name, shape in (("gate", (wide, hidden)), ("up", (wide, hidden)), ("down", (hidden, wide))):
            found |= with_bias(f"{ours}.{name}", f"{theirs}.mlp.{name}_proj", shape, has_bias=False)
    return found | with_bias("second.norm", f"{tower}.norm", (hidden,), has_bias=False)


def num_positions(config: DeepEncoderConfig, grid: Grid) -> int:
    """Positions that a picture of `grid` patches fills."""
    tiles, ends = tiles_of(config, grid), config.row_ends
    tile, whole = config.tile_side // config.merge, config.whole_side // config.merge
    lines = tiles.rows * tile
    return lines * (tiles.columns * tile + ends if lines else 0) + whole * (whole + ends) + 1


def extent(config: DeepEncoderConfig, grid: Grid) -> tuple[int, int]:
    """Return the number of patches of all tiles and of the whole picture; `flop` counts the pairs that attend."""
    tiles = tiles_of(config, grid)
    return tiles.rows * tiles.columns * config.tile_side**2 + config.whole_side**2, 0


def flop(config: DeepEncoderConfig, grid: Grid) -> int:
    """Floating-point operations of the products and of the attention of a picture."""
    tiles = tiles_of(config, grid)
    of_squares = (_square_flop(config, side) for side in (config.tile_side, config.whole_side))
    return sum(count * one for count, one in zip((tiles.rows * tiles.columns, 1), of_squares, strict=True))


def _square_flop(config: DeepEncoderConfig, side: int) -> int:
    second, rows = config.second, sam_side(side) ** 2
    hidden, wide = second.hidden_size, second.mlp_width
    kv = hidden * second.num_kv_heads // second.num_heads
    products, made = hidden * (2 * hidden + 2 * kv), hidden
    if config.row_ends:
        num_rows, pairs = rows + 1, (rows + 1) ** 2
        products, made = products + 2 * hidden * wide, hidden + config.sam.channels[1]
    else:  # queries see all rows, the queries before them, and themselves
        num_rows, pairs = 2 * rows, 2 * rows**2 + rows * (rows + 1) // 2
        products += 3 * hidden * wide
    layers = second.num_layers * (2 * products * num_rows + 4 * hidden * pairs)
    return sam_flop(config.sam, side) + layers + 2 * made * config.out_size * rows


def settings(config: DeepEncoderConfig) -> dict[str, object]:
    """The processor's settings that follow from the tower's config."""
    side = config.whole_side * config.patch_size
    made: dict[str, object] = {
        "merge_size": config.merge, "patch_size": config.patch_size, "size": {"height": side, "width": side},
        "tile_size": config.tile_side * config.patch_size,
    }  # fmt: skip
    return made | {"image_processor_type": "DeepseekOcr2ImageProcessor"} if not config.row_ends else made


def hub_settings(config: DeepEncoderConfig) -> dict[str, object]:
    """The settings that are constant in DeepSeek's code; `UnlimitedOcrImageProcessor` is CLIP's in transformers."""
    name, most = ("UnlimitedOcrImageProcessor", 9) if config.row_ends else ("DeepseekOcr2ImageProcessor", 6)
    return settings(config) | {"image_processor_type": name, "max_patches": most}


def peak_bytes(config: DeepEncoderConfig, grid: Grid) -> int:
    """Most bytes that `encode` allocates, its result included; native scratch memory is not counted."""
    second, tiles = config.second, tiles_of(config, grid)
    sides = [config.whole_side, *([config.tile_side] if tiles.rows else [])]
    hidden, rows = second.hidden_size, sam_side(max(sides)) ** 2
    made = hidden + config.sam.channels[1] if config.row_ends else hidden
    stages = [
        *(sam_floats(config.sam, side) for side in sides),
        rows * config.sam.channels[1] + _second_floats(second, rows),
        rows * (config.sam.channels[1] + made)
        + block_floats(rows, 2 * made * config.out_size, made + config.out_size),
    ]
    floats = num_positions(config, grid) * config.out_size + max(stages)
    return FLOAT_BYTES * floats + 8 * 8 * max(sides) ** 2 + OVERHEAD_BYTES


def _second_floats(second: SecondConfig, rows: int) -> int:
    hidden, wide = second.hidden_size, second.mlp_width
    if second.kind == "clip":
        rows += 1
        attention = 3 * rows * hidden + max(
            block_floats(rows, 6 * hidden**2, hidden), attention_floats(rows, hidden, hidden, 2 * hidden**2)
        )
        return rows * hidden + max(attention, gelu_mlp_floats(rows, hidden, wide), 8 * hidden * rows)
    rows *= 2
    kv = second.num_kv_heads * second.head_dim
    attention = rows * (2 * hidden + 2 * kv) + max(
        block_floats(rows, 2 * hidden * (hidden + 2 * kv), hidden),
        attention_floats(rows, hidden, kv, 2 * hidden**2, 0),
    )
    return (
        rows * hidden
        + 2 * rows * second.head_dim
        + max(attention, block_floats(rows, 6 * hidden * wide, hidden + wide))
    )


class DeepEncoder(Tower[DeepEncoderConfig]):
    """The tower with its projector and weights; `encode` may be run for several pictures at the same time."""

    def encode(self, patches: Rows, grid: Grid) -> Making:
        """Make the rows of a picture.

        Args:
            patches: [patches, 3 * patch_size^2], row by row in a tile, tile by tile, and then those of the whole.
            grid: 1, the rows of patches of tiles and whole, one below the other, and the columns of the wider one.
        """
        config, tiles = self._config, tiles_of(self._config, grid)
        num_tiles, of_tile = tiles.rows * tiles.columns, config.tile_side**2
        assert len(patches) == num_tiles * of_tile + config.whole_side**2, (len(patches), grid)
        embeddings = np.zeros((num_positions(config, grid), config.out_size), np.float32)
        ends = config.row_ends
        if ends:
            embeddings[:] = self._operations.rows_of("newline", np.zeros(1, np.int32))
        for square in range(num_tiles + 1):
            yield square / (num_tiles + 1)
            part = patches[square * of_tile :]
            part = part[:of_tile] if square < num_tiles else part
            seen = yield from encode_square(config.sam, self._operations, part)
            rows = yield from (self._clip(seen) if ends else self._qwen(seen, is_tile=square < num_tiles))
            yield from self._project(seen, rows, embeddings, self._places(tiles, square))
        embeddings[-1:] = self._operations.rows_of("separator", np.zeros(1, np.int32))
        return SpanRows(embeddings)

    def _places(self, tiles: Tiles, square: int) -> NDArray[np.int64]:
        """The positions of a square's rows."""
        config = self._config
        tile, side = (length // config.merge for length in (config.tile_side, config.whole_side))
        start, width, (at_row, at_column) = 0, tiles.columns * tile, divmod(square, max(1, tiles.columns))
        if square < tiles.rows * tiles.columns and not config.row_ends:
            return np.arange(square * tile**2, (square + 1) * tile**2)
        if square < tiles.rows * tiles.columns:
            side, at_row, at_column = tile, at_row * tile, at_column * tile
        else:
            start = tiles.rows * tile * (width + config.row_ends if tiles.rows else 0)
            width, at_row, at_column = side, 0, 0
        lines, places = np.indices((side, side)).reshape(2, -1)
        return start + (at_row + lines) * (width + config.row_ends) + at_column + places

    def _project(self, seen: Rows, rows: Rows, embeddings: Rows, places: NDArray[np.int64]) -> Steps:
        ops = self._operations
        joined = np.concatenate([rows, seen], axis=1) if self._config.row_ends else rows

        def work(part: slice) -> None:
            embeddings[places[part]] = ops.linear("projector", joined[part])

        return in_blocks(work, range(len(joined)), ops.flop_per_row("projector"))

    def _clip(self, seen: Rows) -> Generator[None, None, Rows]:
        """CLIP's layers on the rows of SAM, behind a class token that is left out of the result."""
        ops, second = self._operations, self._config.second
        side = round(len(seen) ** 0.5)
        hidden = np.empty((len(seen) + 1, second.hidden_size), np.float32)
        hidden[:1] = ops.rows_of("cls", np.zeros(1, np.int32))
        hidden[:1] += ops.rows_of("position.second", np.zeros(1, np.int32))
        hidden[1:] = seen
        taps = smooth_taps(side, second.position_side)
        positions = PositionTable(
            "position.second", second.position_side, patch_places((1, side, side), 1), taps, taps, first=1
        )
        positions.add(ops, hidden[1:], slice(0, len(seen)))
        yield
        hidden = ops.layer_norm("second.first_norm", hidden, second.norm_eps)
        for layer in range(second.num_layers):
            yield from self._clip_layer(f"second.{layer}", hidden)
        return hidden[1:]

    def _clip_layer(self, layer: str, hidden: Rows) -> Steps:
        ops, second = self._operations, self._config.second
        qkv = np.empty((len(hidden), 3 * second.hidden_size), np.float32)
        query, key, value = columns(qkv, 3)

        def project(rows: slice) -> None:
            normed = ops.layer_norm(f"{layer}.attn_norm", hidden[rows], second.norm_eps)
            ops.linear(f"{layer}.qkv", normed, qkv[rows])

        yield from in_blocks(project, range(len(hidden)), ops.flop_per_row(f"{layer}.qkv"))
        yield from ops.add_attention(
            layer, hidden, query, key, value, head_dim=second.head_dim, segments=[range(len(hidden))]
        )
        yield from ops.gelu_mlp(layer, hidden, second.norm_eps, "gelu_quick")

    def _qwen(self, seen: Rows, *, is_tile: bool) -> Generator[None, None, Rows]:
        """Qwen2's layers on the rows of SAM and the queries; the result is that of the queries."""
        ops, second = self._operations, self._config.second
        name = "tile" if is_tile else "whole"
        queries = ops.rows_of(f"queries.{name}", np.arange(QUERIES[name] ** 2, dtype=np.int32))
        hidden = np.concatenate([seen, queries])
        del queries
        angles = np.arange(len(hidden))[:, None] * second.theta ** -(
            np.arange(0, second.head_dim, 2) / second.head_dim
        )
        cosine, sine = (of(angles).astype(np.float32) for of in (np.cos, np.sin))
        del angles
        for layer in range(second.num_layers):
            yield from self._qwen_attention(f"second.{layer}", hidden, len(seen), cosine, sine)
            yield from self._qwen_mlp(f"second.{layer}", hidden)
        return ops.rms_norm("second.norm", hidden[len(seen) :], second.norm_eps)

    def _qwen_attention(self, layer: str, hidden: Rows, num_seen: int, cosine: Rows, sine: Rows) -> Steps:
        ops, second = self._operations, self._config.second
        dim = second.head_dim
        query = np.empty_like(hidden)
        key, value = (np.empty((len(hidden), second.num_kv_heads * dim), np.float32) for _ in range(2))

        def project(rows: slice) -> None:
            normed = ops.rms_norm(f"{layer}.attn_norm", hidden[rows], second.norm_eps)
            for name, out in (("q", query), ("k", key), ("v", value)):
                ops.linear(f"{layer}.{name}", normed, out[rows])
            for out in (query, key):
                turned = out[rows].reshape(len(normed), -1, dim)
                ops.rotate(turned, cosine[rows], sine[rows], is_interleaved=False)

        flop = ops.flop_per_row(*(f"{layer}.{name}" for name in ("q", "k", "v")))
        yield from in_blocks(project, range(len(hidden)), flop)
        queries, keys, values = (x.reshape(len(x), -1, dim) for x in (query, key, value))

        def attend(rows: slice) -> None:
            """The rows of SAM see each other; a query sees them, those before it, and itself. In place."""
            first = min(rows.stop, num_seen)
            if rows.start < first:
                part = queries[rows.start : first]
                ops.attend_all(part, keys[:num_seen], values[:num_seen], dim**-0.5, part)
            for row in range(max(rows.start, num_seen), rows.stop):
                part = queries[row : row + 1]
                ops.attend_all(part, keys[: row + 1], values[: row + 1], dim**-0.5, part)
            ops.linear(f"{layer}.o", query[rows], hidden[rows], finish="add")

        flop = attention_flop(len(hidden), second.hidden_size) + ops.flop_per_row(f"{layer}.o")
        yield from in_blocks(attend, range(len(hidden)), flop)

    def _qwen_mlp(self, layer: str, hidden: Rows) -> Steps:
        ops, second = self._operations, self._config.second

        def work(rows: slice) -> None:
            normed = ops.rms_norm(f"{layer}.mlp_norm", hidden[rows], second.norm_eps)
            ops.gated_mlp(layer, normed, hidden[rows], finish="add")

        flop = ops.flop_per_row(*(f"{layer}.{name}" for name in ("gate", "up", "down")))
        return in_blocks(work, range(len(hidden)), flop)


_TOWER = Encoder(
    kind="picture",
    path=("vision_config",),
    placeholders=("image_token_id",),
    prefix="model.",
    read=read_config,
    tensors=tensors,
    open=DeepEncoder,
    num_positions=num_positions,
    peak_bytes=peak_bytes,
    extent=extent,
    flop=flop,
    settings=settings,
)
TOWERS: Mapping[str, Encoder] = {
    "deepseek_ocr2": _TOWER,
    "deepseek_vl_v2": replace(
        _TOWER,
        placeholders=("<image>",),
        read=read_hub_config,
        settings=hub_settings,
        has_processor_file=False,
    ),
}


def _read_gguf_sam(reader: GgufConfigReader) -> dict[str, object]:
    """Return the keys that both forms of a config share, and the constants of both projectors."""
    reader.neutral("use_gelu", True)
    reader.neutral("use_silu", False)
    width = reader.integer("vision.embedding_length")
    return {
        "downsample_channels": [_GGUF_CHANNELS, width],
        "global_attn_indexes": list(_GLOBAL_LAYERS),
        "heads": reader.integer("vision.sam.head_count"),
        "layers": reader.integer("vision.sam.block_count", most=MOST_LAYERS),
        "width": reader.integer("vision.sam.embedding_length"),
    }


def _read_gguf_clip(reader: GgufConfigReader) -> dict[str, object]:
    """Read a config in DeepSeek's own form."""
    reader.neutral("vision.window_size", 14)
    reader.neutral("vision.projector.scale_factor", 1, 4)
    reader.key("vision.feed_forward_length")
    eps = reader.number("vision.attention.layer_norm_epsilon")  # SAM's; the file does not have CLIP's
    if eps != 1e-6:
        raise reader.unsupported("vision.attention.layer_norm_epsilon", eps, "1e-06")
    clip = {
        "heads": reader.integer("vision.attention.head_count"),
        "image_size": reader.integer("vision.image_size", most=1 << 16),
        "layers": reader.integer("vision.block_count", most=MOST_LAYERS),
        "patch_size": read_patch_size(reader),
        "width": reader.integer("vision.embedding_length"),
    }
    return {"width": {"clip-l-14-224": clip, "sam_vit_b": _read_gguf_sam(reader)}}


def _read_gguf_qwen(reader: GgufConfigReader) -> dict[str, object]:
    """Read a config in transformers' form."""
    reader.neutral("vision.projector.scale_factor", 4)
    sam = _read_gguf_sam(reader)
    renamed = {"heads": "num_attention_heads", "layers": "num_hidden_layers", "width": "hidden_size"}
    return {
        "encoder_config": {
            "hidden_size": reader.integer("vision.embedding_length"),
            "intermediate_size": reader.integer("vision.feed_forward_length"),
            "num_attention_heads": reader.integer("vision.attention.head_count"),
            "num_hidden_layers": reader.integer("vision.block_count", most=MOST_LAYERS),
            "num_key_value_heads": reader.integer("vision.attention.head_count_kv"),
            "rms_norm_eps": reader.number("vision.attention.layer_norm_epsilon"),
            "rope_theta": 1e6,
        },
        "sam_config": {renamed.get(name, name): value for name, value in sam.items()}
        | {
            "image_size": reader.integer("vision.image_size", most=1 << 16),
            "patch_size": read_patch_size(reader),
            "window_size": reader.integer("vision.window_size", most=1024),
        },
    }


def _gguf_settings(reader: GgufConfigReader) -> dict[str, object]:
    given = {"min_patches": "vision.preproc_min_tiles", "max_patches": "vision.preproc_max_tiles"}
    tiles = {name: reader.integer(key) for name, key in given.items() if reader.has(key)}
    return read_colours(reader) | tiles


# The files have neither the channels after the first of the last two convolutions nor the layers without windows.
_GGUF_CHANNELS, _GLOBAL_LAYERS = 512, (2, 5, 8, 11)
_SAM_NAMES = {
    "attn_norm": "pre_ln", "distance_columns": "attn.pos_w", "distance_rows": "attn.pos_h", "down": "mlp.lin2",
    "mlp_norm": "post_ln", "o": "attn.out", "qkv": "attn.qkv", "up": "mlp.lin1",
}  # fmt: skip
_CLIP_PROJECTOR = Projector(
    families={"deepseek_vl_v2": "deepseek_vl_v2"},
    placeholder="<image>",
    read_config=_read_gguf_clip,
    read_settings=_gguf_settings,
    names={
        "patch": "v.sam.patch_embd",
        "position": "v.sam.pos_embd",
        "neck.0": "v.sam.neck.0",
        "neck.0_norm": "v.sam.neck.1",
        "neck.1": "v.sam.neck.2",
        "neck.1_norm": "v.sam.neck.3",
        "neck.2": "v.sam.net_2",
        "neck.3": "v.sam.net_3",
        "position.second": "v.position_embd",
        "second.first_norm": "v.pre_ln",
        "queries.tile": "v.resample_query_768",
        "queries.whole": "v.resample_query_1024",
        "second.norm": "v.post_ln",
        "projector": "mm.model.fc",
    },
    whole_names={"cls": "v.class_embd", "newline": "v.image_newline", "separator": "v.view_seperator"},
    layers={"layers": ("v.sam.blk", _SAM_NAMES), "second": ("v.blk", {})},
    unused=("v.patch_embd.weight",),  # CLIP's, which takes the rows of SAM
)
PROJECTORS: Mapping[str, Projector] = {
    "deepseekocr": _CLIP_PROJECTOR,
    "deepseekocr2": replace(
        _CLIP_PROJECTOR,
        families={"deepseek_vl_v2": "deepseek_ocr2"},
        read_config=_read_gguf_qwen,
        unused=(),
    ),
}
