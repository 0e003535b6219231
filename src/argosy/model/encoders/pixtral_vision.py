"""Pixtral's vision tower and its projector, of Mistral-Small-3 and 4, Ministral-3 and Mistral-Large-3: pictures of any
size.

    patches -> product -> RMSNorm -> layers -> RMSNorm -> 2 x 2 patches in one -> two products with GELU between them

A layer is RMSNorm, attention with 2-D RoPE over the whole picture, RMSNorm, SwiGLU. The axes of the rotary embedding
share one series of frequencies: rows take every second one, columns the others. Each row of cells is followed by the
token [IMG_BREAK], the last one by [IMG_END].

Two things are as in transformers: the projector's norm has the text model's epsilon (Mistral's own code has 1e-5,
llama.cpp that of the file), and the filter that shrinks a picture takes all pixels (Mistral's own code does not).
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np

from argosy.config import ModelConfig
from argosy.model.encoders import EncoderTensor, with_bias
from argosy.model.encoders.blocks import Rows, Steps, block_floats, in_blocks
from argosy.model.encoders.encoder import Encoder
from argosy.model.encoders.grid import Grid, frame_patches, read_theta
from argosy.model.encoders.patch_tower import PatchConfig, PatchTower, tower_bytes
from argosy.model.encoders.projector import Projector, read_colours, read_merge_size, read_patch_size
from argosy.model.reading.config_reader import MOST_LAYERS, ConfigReader
from argosy.model.reading.gguf_config import GgufConfigReader

_BREAK, _END = "[IMG_BREAK]", "[IMG_END]"


@dataclass(frozen=True, slots=True, kw_only=True)
class PixtralConfig(PatchConfig):
    """Sizes of the tower and its projector."""

    mlp_width: int
    activation: Literal["silu", "gelu_erf"]
    has_bias: bool
    longest_edge: int
    projector_eps: float


def read_config(reader: ConfigReader, wrapper: ConfigReader, model: ModelConfig) -> PixtralConfig:
    """Read `vision_config` and the projector's keys around it, as `Mistral3Config` in transformers 5.24 does.

    Raises:
        UnsupportedModel: a key or value that is not supported.   CheckpointError: a key is malformed.
    """
    wrapper.neutral("vision_feature_layer", -1)
    wrapper.neutral("projector_hidden_act", "gelu")
    reader.neutral("head_dim", _head_dim(reader))
    reader.passed("vocab_size")
    return _read(
        reader,
        model,
        act="gelu",
        merge=wrapper.integer("spatial_merge_size", default=2, most=16),
        has_bias=wrapper.flag("multimodal_projector_bias", False),
        longest_edge=reader.integer("image_size", default=1024),
    )


def read_own_config(reader: ConfigReader, model: ModelConfig) -> PixtralConfig:
    """Read the `vision_encoder` of a params.json, as vLLM 0.30 does.

    Raises:
        UnsupportedModel: a key or value that is not supported.   CheckpointError: a key is malformed.
    """
    if reader.optional_text("mm_projector_id") != "patch_merge":
        raise reader.unsupported("mm_projector_id", "patch_merge")
    if not reader.flag("add_pre_mm_projector_layer_norm", False):
        raise reader.unsupported("add_pre_mm_projector_layer_norm", "true")
    reader.passed("image_token_id", "image_break_token_id", "image_end_token_id")
    return _read(
        reader,
        model,
        act="silu",
        merge=reader.integer("spatial_merge_size", default=1, most=16),
        has_bias=reader.flag("adapter_bias", True),
        longest_edge=reader.integer("max_image_size", default=reader.integer("image_size", default=1024)),
    )


def _head_dim(reader: ConfigReader) -> int:
    heads = reader.integer("num_attention_heads", default=16)
    return reader.integer("hidden_size", default=1024) // heads


def _read(
    reader: ConfigReader, model: ModelConfig, *, act: str, merge: int, has_bias: bool, longest_edge: int
) -> PixtralConfig:
    reader.neutral("num_channels", 3)
    config = PixtralConfig(
        num_layers=reader.integer("num_hidden_layers", default=24, most=MOST_LAYERS),
        hidden_size=reader.integer("hidden_size", default=1024),
        mlp_width=reader.integer("intermediate_size", default=4096),
        num_heads=reader.integer("num_attention_heads", default=16),
        activation="silu" if reader.one_of("hidden_act", act, ("gelu", "silu")) == "silu" else "gelu_erf",
        patch_size=reader.integer("patch_size", default=16, most=256),
        merge=merge,
        out_size=model.hidden_size,
        position_side=0,
        theta=read_theta(reader, reader.number("rope_theta", 10_000.0)),
        are_axes_staggered=True,
        are_qkv_apart=True,
        has_bias=has_bias,
        longest_edge=longest_edge,
        projector_eps=model.norm_eps,
    )
    config.require_heads(reader)
    reader.finish()
    return config


_HUB = {
    "tower": "vision_tower", "q": "attention.q_proj", "k": "attention.k_proj", "v": "attention.v_proj",
    "o": "attention.o_proj", "gate": "feed_forward.gate_proj", "up": "feed_forward.up_proj",
    "down": "feed_forward.down_proj", "merger.norm": "multi_modal_projector.norm",
    "join": "multi_modal_projector.patch_merger.merging_layer", "merger.up": "multi_modal_projector.linear_1",
    "merger.down": "multi_modal_projector.linear_2",
}  # fmt: skip
_OWN = {
    "tower": "vision_encoder", "q": "attention.wq", "k": "attention.wk", "v": "attention.wv", "o": "attention.wo",
    "gate": "feed_forward.w1", "up": "feed_forward.w3", "down": "feed_forward.w2",
    "merger.norm": "pre_mm_projector_norm", "join": "patch_merger.merging_layer",
    "merger.up": "vision_language_adapter.w_in", "merger.down": "vision_language_adapter.w_out",
}  # fmt: skip


def tensors(config: PixtralConfig, names: Mapping[str, str] = _HUB) -> dict[str, EncoderTensor]:
    """The tensors of tower and projector by canonical name; their names in files have no prefix."""
    hidden, out, wide, side = config.hidden_size, config.out_size, config.mlp_width, config.patch_size
    no_bias, tower = partial(with_bias, has_bias=False), names["tower"]
    found = no_bias("patch", f"{tower}.patch_conv", (hidden, 3, side, side))
    found |= no_bias("patch_norm", f"{tower}.ln_pre", (hidden,))
    for layer in range(config.num_layers):
        ours, theirs = f"layers.{layer}", f"{tower}.transformer.layers.{layer}"
        found |= no_bias(f"{ours}.attn_norm", f"{theirs}.attention_norm", (hidden,))
        found |= no_bias(f"{ours}.mlp_norm", f"{theirs}.ffn_norm", (hidden,))
        for name in ("q", "k", "v", "o"):
            found |= no_bias(f"{ours}.{name}", f"{theirs}.{names[name]}", (hidden, hidden))
        for name, shape in (("gate", (wide, hidden)), ("up", (wide, hidden)), ("down", (hidden, wide))):
            found |= no_bias(f"{ours}.{name}", f"{theirs}.{names[name]}", shape)
    found |= no_bias("merger.norm", names["merger.norm"], (hidden,))
    found |= no_bias("join", names["join"], (hidden, config.cell_size))
    found |= with_bias("merger.up", names["merger.up"], (out, hidden), has_bias=config.has_bias)
    found |= with_bias("merger.down", names["merger.down"], (out, out), has_bias=config.has_bias)
    return found


def num_positions(config: PixtralConfig, grid: Grid) -> int:
    """Positions that a picture of `grid` patches fills: one for each cell, and one after each row of cells."""
    return grid[1] // config.merge * (grid[2] // config.merge + 1)


def written(config: PixtralConfig, grid: Grid) -> dict[int, str]:
    """The tokens after the rows of cells."""
    columns, end = grid[2] // config.merge, num_positions(config, grid)
    return dict.fromkeys(range(columns, end, columns + 1), _BREAK) | {end - 1: _END}


def settings(config: PixtralConfig) -> dict[str, object]:
    """The processor's settings: that of transformers takes the cell's size from the tower, and Mistral's own files have
    no others.
    """
    return {
        "image_processor_type": "PixtralImageProcessor",
        "patch_size": config.patch_size,
        "size": {"longest_edge": config.longest_edge},
        "spatial_merge_size": config.merge,
    }


def peak_bytes(config: PixtralConfig, grid: Grid) -> int:
    """Most bytes that `encode` allocates, its result included; native scratch memory is not counted."""
    hidden, out, cell, wide = config.hidden_size, config.out_size, config.cell_size, config.mlp_width
    patches = frame_patches(grid)
    results = num_positions(config, grid) * out
    cells = patches // config.merge**2
    stages = (
        block_floats(patches, 2 * hidden * config.patch_values, 2 * hidden),
        block_floats(patches, 6 * hidden * wide, hidden + wide),
        results
        + block_floats(cells, 2 * (cell + out) * hidden + 2 * out**2, 2 * cell + hidden + 2 * out + 6),
    )
    return tower_bytes(config, grid, patches, 0, stages)


class PixtralTower(PatchTower[PixtralConfig]):
    """The tower with its projector and weights."""

    def _norm(self, name: str, x: Rows) -> Rows:
        return self._operations.rms_norm(name, x, 1e-5)

    def _embed_patches(self, patches: Rows, hidden: Rows) -> None:
        hidden[:] = self._norm("patch_norm", self._operations.linear("patch", patches))

    def _feed_forward(self, layer: str, hidden: Rows) -> Steps:
        ops = self._operations

        def work(rows: slice) -> None:
            normed = self._norm(f"{layer}.mlp_norm", hidden[rows])
            ops.gated_mlp(layer, normed, hidden[rows], activation=self._config.activation, finish="add")

        flop = ops.flop_per_row(*(f"{layer}.{name}" for name in ("gate", "up", "down")))
        return in_blocks(work, range(len(hidden)), flop)

    def _merge(self, hidden: Rows, grid: Grid) -> Generator[None, None, Rows]:
        """Join the patches of each cell, and leave room for the token after each row of cells."""
        ops, config = self._operations, self._config
        embeddings = np.zeros((num_positions(config, grid), config.out_size), np.float32)
        columns = grid[2] // config.merge

        def work(rows: slice) -> None:
            patches = slice(rows.start * config.merge**2, rows.stop * config.merge**2)
            normed = ops.rms_norm("merger.norm", hidden[patches], config.projector_eps)
            # The matrix has the channel first, then the place in the cell.
            cells = normed.reshape(-1, config.merge**2, config.hidden_size).swapaxes(1, 2)
            x = ops.linear("join", cells.reshape(-1, config.cell_size))
            x = ops.linear("merger.up", x, finish="gelu_erf")
            cell = np.arange(rows.start, rows.stop)
            embeddings[cell + cell // columns] = ops.linear("merger.down", x)

        flop = ops.flop_per_row("join", "merger.up", "merger.down")
        yield from in_blocks(work, range(len(hidden) // config.merge**2), flop)
        return embeddings


_HUB_TOWER = Encoder(
    kind="picture",
    path=("vision_config",),
    placeholders=("image_token_index", "image_token_id"),
    prefix="",
    read=read_config,
    tensors=tensors,
    open=PixtralTower,
    num_positions=num_positions,
    peak_bytes=peak_bytes,
    written=written,
    settings=settings,
)
# In Mistral's own files. Pairs of queries and keys are adjacent there.
_OWN_TOWER = replace(
    _HUB_TOWER,
    read=lambda own, around, model: replace(read_own_config(own, model), pair_order="rows first, adjacent"),
    tensors=lambda config: tensors(config, _OWN),
)
TOWERS: Mapping[str, Encoder] = {
    "mistral3": _HUB_TOWER,
    "mistral4": _OWN_TOWER,
    "ministral3": _OWN_TOWER,
}


def _read_gguf(reader: GgufConfigReader) -> dict[str, object]:
    """Read the config in the spelling of params.json."""
    # The converter of params.json writes the text model's; the tower's is always 1e-5.
    reader.number("vision.attention.layer_norm_epsilon", 1e-5)
    uses_gelu = reader.flag("use_gelu", False)
    reader.neutral("use_silu", not uses_gelu)
    return {
        "adapter_bias": "mm.1.bias" in reader.file.tensors,
        "add_pre_mm_projector_layer_norm": "mm.input_norm.weight" in reader.file.tensors,
        "hidden_act": "gelu" if uses_gelu else "silu",
        "hidden_size": reader.integer("vision.embedding_length"),
        "image_size": reader.integer("vision.image_size"),
        "intermediate_size": reader.integer("vision.feed_forward_length"),
        "mm_projector_id": "patch_merge",
        "num_attention_heads": reader.integer("vision.attention.head_count"),
        "num_hidden_layers": reader.integer("vision.block_count", most=MOST_LAYERS),
        "patch_size": read_patch_size(reader),
        "rope_theta": reader.number("rope.freq_base", 10_000.0),
        "spatial_merge_size": read_merge_size(reader),
    }


PROJECTORS: Mapping[str, Projector] = {
    "pixtral": Projector(
        families=dict.fromkeys(("mistral4", "ministral3", "llama"), "mistral4"),  # older files are a Llama's
        placeholder="[IMG]",
        read_config=_read_gguf,
        read_settings=read_colours,
        names={
            "patch": "v.patch_embd",
            "patch_norm": "v.pre_ln",
            "merger.norm": "mm.input_norm",
            "join": "mm.patch_merger",
            "merger.up": "mm.1",
            "merger.down": "mm.2",
        },
        unused=("v.token_embd.img_break",),  # a row of the text model's table
    ),
}
