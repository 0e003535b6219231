"""Step-3.7's vision tower and its projector: windows of a picture beside a view of the whole.

    patches -> product + learned positions -> LayerNorm -> layers -> two convolutions, each of which halves both axes
                                                                  -> product

A layer is LayerNorm, attention with 2-D RoPE over the window or view, LayerNorm, MLP with the quick GELU; what both add
is scaled. Pairs of dimensions are adjacent in the files, and the first half of them turns with the column. The learned
positions are resampled for windows, linearly, without the filter that llama.cpp has.

A picture's span has the windows row by row, each between <patch_start> and <patch_end>, with <patch_newline> after each
row but the last; then the view, between <im_start> and <im_end>.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from dataclasses import dataclass

import numpy as np

from argosy.config import ModelConfig
from argosy.model.encoders import EncoderTensor, with_bias
from argosy.model.encoders.blocks import Rows, Steps, attention_flop, block_floats, in_blocks
from argosy.model.encoders.encoder import Encoder
from argosy.model.encoders.grid import Grid, PairOrder, Places, Taps, centre_taps, patch_places, read_theta
from argosy.model.encoders.halving import halve, halving_floats, halving_tensors
from argosy.model.encoders.patch_tower import PatchConfig, PatchTower, layer_tensors, tower_bytes
from argosy.model.encoders.projector import Projector, read_colours, read_patch_size
from argosy.model.reading.config_reader import MOST_LAYERS, ConfigReader
from argosy.model.reading.gguf_config import GgufConfigReader
from argosy.prompt.media_span import Making, SpanRows

_START, _END, _WINDOW, _WINDOW_END = "<im_start>", "<im_end>", "<patch_start>", "<patch_end>"
_AFTER_ROW = "<patch_newline>"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepVisionConfig(PatchConfig):
    """Sizes of the tower and its projector; `position_side` is the side of the view in patches."""

    mlp_width: int
    window_side: int
    norm_eps: float
    has_projector_bias: bool
    merge: int = 4
    pair_order: PairOrder = "columns first"
    has_layer_scale: bool = True

    def arrangement(self, grid: Grid) -> tuple[int, int]:
        """Return rows and columns of windows; below several rows, or beside one, the grid has the view."""
        view, window = self.position_side, self.window_side
        if grid[1] <= max(view, window):
            columns = max(0, grid[2] - view) // window
            return int(columns > 0), columns
        return (grid[1] - view) // window, grid[2] // window

    def views(self, grid: Grid) -> list[int]:
        """Return the sides of windows and view, in patches."""
        return [self.window_side] * math.prod(self.arrangement(grid)) + [self.position_side]

    def cells(self, side: int) -> int:
        """Return the rows that a window or view of this side becomes."""
        return (side // self.merge) ** 2


def read_config(reader: ConfigReader, wrapper: ConfigReader, model: ModelConfig) -> StepVisionConfig:
    """Read `vision_config` and the projector's keys around it, as `Step3p7Config` in transformers 5.24 does. The size
    of windows follows from `patch_token_len`.

    Raises:
        UnsupportedModel: a key or value that is not supported.   CheckpointError: a key is malformed.
    """
    reader.one_of("hidden_act", "quick_gelu", ("quick_gelu",))
    for key, value in (
        ("num_channels", 3), ("use_cls_token", False), ("use_ln_pre", True), ("use_ln_post", False),
        ("use_abs_posemb", True), ("use_rope2d", True),
    ):  # fmt: skip
        reader.neutral(key, value)
    reader.passed("ls_init_value", "layer_scale_init_value", "max_position_embeddings", "output_dim")
    hidden = reader.integer("width", "hidden_size", default=1536)
    mlp_width = int(hidden * reader.number("mlp_ratio", 8960 / 1536))
    reader.neutral("intermediate_size", mlp_width)
    around = reader if reader.has("patch_token_len") else wrapper  # in GGUF files all is in one place
    of_window = around.integer("patch_token_len", default=81, most=65_536)
    patch_size = reader.integer("patch_size", default=14, most=256)
    image_size = reader.integer("image_size", default=728, most=65_536)
    config = StepVisionConfig(
        num_layers=reader.integer("layers", "num_hidden_layers", default=47, most=MOST_LAYERS),
        hidden_size=hidden,
        num_heads=reader.integer("heads", "num_attention_heads", default=16),
        mlp_width=mlp_width,
        patch_size=patch_size,
        position_side=image_size // patch_size,
        window_side=4 * math.isqrt(of_window),
        out_size=model.hidden_size,
        theta=read_theta(reader),
        norm_eps=reader.number("layer_norm_eps", 1e-5),
        has_projector_bias=wrapper.flag("projector_bias", False),
    )
    config.require_heads(reader, "width" if reader.has("width") else "hidden_size")
    if image_size % (patch_size * config.merge):
        raise reader.unsupported("image_size", f"a multiple of {patch_size * config.merge}, whole cells")
    if config.cells(config.window_side) != of_window or config.position_side >= 2 * config.window_side:
        raise around.unsupported(
            "patch_token_len", "the square of more than half of the view's cells on a side"
        )
    wrapper.neutral("image_token_len", config.cells(config.position_side))
    wrapper.neutral("understand_projector_stride", 2)
    reader.finish()
    return config


def tensors(config: StepVisionConfig) -> dict[str, EncoderTensor]:
    """The tensors of tower and projector by canonical name; their names in files have no prefix."""
    hidden, wide, tower = config.hidden_size, config.mlp_width, "vision_model"
    patch = hidden, 3, config.patch_size, config.patch_size
    found = with_bias("patch", f"{tower}.conv1", patch, has_bias=False)
    found["position"] = EncoderTensor(f"{tower}.positional_embedding", (config.position_side**2, hidden))
    found |= with_bias("first_norm", f"{tower}.ln_pre", (hidden,))
    layers = f"{tower}.transformer.resblocks"
    found |= layer_tensors(
        config, wide, layers, ("ln_1", "attn.in_proj", "attn.out_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    )
    for layer in range(config.num_layers):
        ours, theirs = f"layers.{layer}", f"{layers}.{layer}"
        for canonical, name, shape in (
            ("qkv", "attn.in_proj_weight", (3 * hidden, hidden)),
            ("qkv_bias", "attn.in_proj_bias", (3 * hidden,)),
            ("attn_scale", "ls_1.gamma", (hidden,)),
            ("mlp_scale", "ls_2.gamma", (hidden,)),
        ):
            found[f"{ours}.{canonical}"] = EncoderTensor(f"{theirs}.{name}", shape)
    for at in range(2):
        inputs = hidden << at
        found |= halving_tensors(f"halving.{at}", f"{tower}.vit_downsampler{at + 1}", 2 * inputs, inputs)
    projector = config.out_size, 4 * hidden
    return found | with_bias("merger", "vit_large_projector", projector, has_bias=config.has_projector_bias)


def written(config: StepVisionConfig, grid: Grid) -> dict[int, str]:
    """The tokens around windows and view, and after rows of windows."""
    rows, columns = config.arrangement(grid)
    found: dict[int, str] = {}
    at, of_window = 0, config.cells(config.window_side)
    for number in range(1, rows * columns + 1):
        found |= {at: _WINDOW, at + 1 + of_window: _WINDOW_END}
        at += of_window + 2
        if number % columns == 0 and number < rows * columns:
            found[at] = _AFTER_ROW
            at += 1
    return found | {at: _START, at + 1 + config.cells(config.position_side): _END}


def num_positions(config: StepVisionConfig, grid: Grid) -> int:
    """Positions that a picture fills: one for each cell, and one for each token of `written`."""
    return sum(map(config.cells, config.views(grid))) + len(written(config, grid))


def extent(config: StepVisionConfig, grid: Grid) -> tuple[int, int]:
    """Return the number of patches, and of pairs that attend: patches attend within their window or view."""
    views = config.views(grid)
    return sum(side**2 for side in views), sum(side**4 for side in views)


def flop(config: StepVisionConfig, grid: Grid) -> int:
    """Floating-point operations of the products and of the attention of a picture."""
    patches, pairs = extent(config, grid)
    hidden, cells = config.hidden_size, sum(map(config.cells, config.views(grid)))
    of_patch = hidden * (config.patch_values + config.num_layers * (4 * hidden + 2 * config.mlp_width))
    # The first convolution makes four pixels of a cell.
    of_cell = 9 * hidden * (4 * 2 * hidden + 2 * 4 * hidden) + 4 * hidden * config.out_size
    return 2 * (patches * of_patch + cells * of_cell) + config.num_layers * attention_flop(pairs, hidden)


def settings(config: StepVisionConfig) -> dict[str, object]:
    """The processor's settings that follow from the tower's config."""
    side = config.position_side * config.patch_size
    return {
        "image_processor_type": "Step3p7ImageProcessor",
        "patch_size": config.window_side * config.patch_size,
        "size": {"height": side, "width": side},
        "vision_patch_size": config.patch_size,
    }


def peak_bytes(config: StepVisionConfig, grid: Grid) -> int:
    """Most bytes that `encode` allocates, its result included; native scratch memory is not counted."""
    hidden, wide, out, side = config.hidden_size, config.mlp_width, config.out_size, config.position_side
    if config.views(grid)[0] > side:
        side = config.window_side
    patches, cells = side**2, config.cells(side)
    stages = (
        block_floats(patches, 2 * hidden * config.patch_values, 4 * hidden + 32),
        block_floats(patches, 4 * hidden * wide, 2 * hidden + wide),
        halving_floats(side, side, 2 * hidden, hidden),
        4 * cells * 2 * hidden + halving_floats(side // 2, side // 2, 4 * hidden, 2 * hidden),
        cells * (4 * hidden + out),
    )
    results = (num_positions(config, grid) + cells) * out  # the last view's until the next one's are made
    return tower_bytes(config, (1, side, side), patches, results, stages)


class StepTower(PatchTower[StepVisionConfig]):
    """The tower with its projector and weights."""

    def encode(self, patches: Rows, grid: Grid) -> Making:
        """Make the rows of a picture; zeros where tokens are.

        Args:
            patches: [patches of windows, then of the view, `patch_values`], row by row in each.
            grid: as `StepVisionConfig.arrangement` takes it.
        """
        config, views = self._config, self._config.views(grid)
        assert len(patches) == sum(side**2 for side in views), (len(patches), grid)
        embeddings = np.zeros((num_positions(config, grid), config.out_size), np.float32)
        is_row = np.ones(len(embeddings), bool)
        is_row[list(written(config, grid))] = False
        places, at, start = np.flatnonzero(is_row), 0, 0
        for number, side in enumerate(views):
            making = super().encode(patches[start : start + side**2], (1, side, side))
            made = yield from _part(making, number, len(views))
            embeddings[places[at : at + len(made.embeddings)]] = made.embeddings
            at, start = at + len(made.embeddings), start + side**2
        return SpanRows(embeddings)

    def _places(self, grid: Grid) -> Places:
        return patch_places(grid, 1)

    def _taps(self, size: int, side: int) -> Taps:
        return centre_taps(size, side)

    def _norm(self, name: str, x: Rows) -> Rows:
        return self._operations.layer_norm(name, x, self._config.norm_eps)

    def _embed(self, patches: Rows, grid: Grid, places: Places, hidden: Rows) -> Steps:
        yield from super()._embed(patches, grid, places, hidden)

        def work(rows: slice) -> None:
            hidden[rows] = self._norm("first_norm", hidden[rows])

        yield from in_blocks(work, range(len(hidden)), 1)

    def _feed_forward(self, layer: str, hidden: Rows) -> Steps:
        eps, factor = self._config.norm_eps, f"{layer}.mlp_scale"
        return self._operations.gelu_mlp(layer, hidden, eps, "gelu_quick", factor)

    def _merge(self, hidden: Rows, grid: Grid) -> Generator[None, None, Rows]:
        """Halve both axes twice, and project."""
        ops, config = self._operations, self._config
        image = hidden.reshape(*grid[1:], config.hidden_size)
        for at in range(2):
            image = yield from halve(ops, f"halving.{at}", image, 2 * image.shape[2])
        cells = image.reshape(-1, image.shape[2])
        embeddings = np.empty((len(cells), config.out_size), np.float32)

        def work(rows: slice) -> None:
            ops.linear("merger", cells[rows], embeddings[rows])

        yield from in_blocks(work, range(len(cells)), ops.flop_per_row("merger"))
        return embeddings


def _part(making: Making, number: int, count: int) -> Making:
    """Make one part; its progress counts as a share of all parts."""
    while True:
        try:
            share = next(making)
        except StopIteration as end:
            made: SpanRows = end.value
            return made
        yield None if share is None else (number + share) / count


TOWERS: Mapping[str, Encoder] = {
    "step3p7": Encoder(
        kind="picture",
        path=("vision_config",),
        placeholders=("image_token_id",),
        prefix="",
        read=read_config,
        tensors=tensors,
        open=StepTower,
        num_positions=num_positions,
        peak_bytes=peak_bytes,
        extent=extent,
        flop=flop,
        written=written,
        settings=settings,
    )
}


def _read_gguf(reader: GgufConfigReader) -> dict[str, object]:
    reader.neutral("use_gelu", False)
    reader.neutral("use_silu", False)
    reader.neutral("vision.projector.scale_factor", 4)
    width, wide = reader.integer("vision.embedding_length"), reader.integer("vision.feed_forward_length")
    size, patch_size = reader.integer("vision.image_size"), read_patch_size(reader)
    return {
        "heads": reader.integer("vision.attention.head_count"),
        "image_size": size,
        "layer_norm_eps": reader.number("vision.attention.layer_norm_epsilon"),
        "layers": reader.integer("vision.block_count", most=MOST_LAYERS),
        "mlp_ratio": (wide + 0.5) / width,
        "patch_size": patch_size,
        # The file lacks the size of windows; the released model has 9 cells on a side, and 13 for the view.
        "patch_token_len": round(9 / 13 * size / (4 * patch_size)) ** 2,
        "width": width,
    }


def _gguf_settings(reader: GgufConfigReader) -> dict[str, object]:
    return read_colours(reader) | {"max_image_size": reader.integer("vision.preproc_image_size", 3024)}


PROJECTORS: Mapping[str, Projector] = {
    "step3vl": Projector(
        families={"step3p5": "step3p7"},
        placeholder="<im_patch>",
        read_config=_read_gguf,
        read_settings=_gguf_settings,
        names={
            "patch": "v.patch_embd",
            "position": "v.position_embd",
            "first_norm": "v.pre_ln",
            "halving.0": "mm.0",
            "halving.1": "mm.1",
            "merger": "mm.model.fc",
        },
    )
}
