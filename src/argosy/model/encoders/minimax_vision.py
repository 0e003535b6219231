"""MiniMax-M3's vision tower and its two projectors, for pictures.

    patches -> product -> LayerNorm -> layers -> projector of each patch -> projector of 2 x 2 patches

A patch covers two frames; a picture is its own second frame. A layer is CLIP's: LayerNorm, attention over the picture,
LayerNorm, MLP. Its rotary embedding has a third axis, time, which is 0 in a picture. A video would be seen in pieces of
several frames that see one another and lie apart in the prompt; it is not read.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass

import numpy as np

from argosy.config import ModelConfig
from argosy.model.encoders import EncoderTensor, with_bias
from argosy.model.encoders.blocks import Rows, Steps, block_floats, gelu_mlp_floats, in_blocks
from argosy.model.encoders.encoder import Encoder
from argosy.model.encoders.grid import Grid, PairOrder, frame_patches, read_theta
from argosy.model.encoders.patch_tower import PatchConfig, PatchTower, num_positions, tower_bytes
from argosy.model.encoders.projector import (
    Projector,
    read_colours,
    read_merge_size,
    read_patch_size,
    read_pixels,
)
from argosy.model.reading.config_reader import MOST_LAYERS, ConfigReader
from argosy.model.reading.gguf_config import GgufConfigReader

_START, _END = "]<]start of image[>[", "]<]end of image[>["


@dataclass(frozen=True, slots=True, kw_only=True)
class MiniMaxVisionConfig(PatchConfig):
    """Sizes of the tower; `projector_width` is between the products of either projector."""

    mlp_width: int
    projector_width: int
    norm_eps: float
    are_qkv_apart: bool = True
    pair_order: PairOrder = "thirds"


def read_config(reader: ConfigReader, wrapper: ConfigReader, model: ModelConfig) -> MiniMaxVisionConfig:
    """Read `vision_config` and the projectors' keys around it, in the spelling of the hub or of transformers 5.24.

    Raises:
        UnsupportedModel: a key or value that is not supported.   CheckpointError: a key is malformed.
    """
    for around, key, value in (
        (wrapper, "projector_hidden_act", "gelu"), (wrapper, "multimodal_projector_bias", True),
        (wrapper, "vision_feature_layer", -1), (wrapper, "vision_feature_select_strategy", "full"),
        (reader, "hidden_act", "gelu"), (reader, "position_embedding_type", "rope"), (reader, "rope_mode", "3d"),
        (reader, "num_channels", 3), (reader, "projection_dim", model.hidden_size),
    ):  # fmt: skip
        around.neutral(key, value)
    reader.passed("attention_dropout", "image_size", "vision_segment_max_frames")
    joined = ConfigReader(
        reader.mapping("img_token_compression_config") or {},
        "minimax_m3_vl",
        within="img_token_compression_config",
    )
    joined.neutral("image_token_compression_method", "patch_merge")
    merge, frames = (
        joined.integer(key, default=reader.integer(key, default=2, most=16), most=16)
        for key in ("spatial_merge_size", "temporal_patch_size")
    )
    joined.finish()
    width = "projector_hidden_size"  # read from a tensor, it is among the tower's own
    config = MiniMaxVisionConfig(
        num_layers=reader.integer("num_hidden_layers", default=32, most=MOST_LAYERS),
        hidden_size=reader.integer("hidden_size", default=1280),
        mlp_width=reader.integer("intermediate_size", default=5120),
        num_heads=reader.integer("num_attention_heads", default=16),
        patch_size=reader.integer("patch_size", default=14),
        patch_frames=frames,
        merge=merge,
        out_size=model.hidden_size,
        position_side=0,
        theta=read_theta(reader, reader.number("rope_theta", 10_000.0)),
        projector_width=reader.integer(width, default=wrapper.integer(width, default=6144)),
        norm_eps=reader.number("layer_norm_eps", 1e-5),
    )
    config.require_heads(reader)
    reader.finish()
    return config


def tensors(config: MiniMaxVisionConfig) -> dict[str, EncoderTensor]:
    """The tensors of tower and projectors by canonical name; their names in files have no prefix."""
    hidden, wide, out, width = config.hidden_size, config.mlp_width, config.out_size, config.projector_width
    tower = "vision_tower.vision_model"
    found = config.patch_kernel.tensors(f"{tower}.embeddings.patch_embedding")
    del found["patch_bias"]
    found |= with_bias("first_norm", f"{tower}.pre_layrnorm", (hidden,))
    for layer in range(config.num_layers):
        ours, theirs = f"layers.{layer}", f"{tower}.encoder.layers.{layer}"
        found |= with_bias(f"{ours}.attn_norm", f"{theirs}.layer_norm1", (hidden,))
        for name in ("q", "k", "v", "out"):
            canonical = "o" if name == "out" else name
            found |= with_bias(f"{ours}.{canonical}", f"{theirs}.self_attn.{name}_proj", (hidden, hidden))
        found |= with_bias(f"{ours}.mlp_norm", f"{theirs}.layer_norm2", (hidden,))
        found |= with_bias(f"{ours}.up", f"{theirs}.mlp.fc1", (wide, hidden))
        found |= with_bias(f"{ours}.down", f"{theirs}.mlp.fc2", (hidden, wide))
    found |= with_bias("patch_projector.up", "multi_modal_projector.linear_1", (width, hidden))
    found |= with_bias("patch_projector.down", "multi_modal_projector.linear_2", (out, width))
    found |= with_bias("merger.up", "patch_merge_mlp.linear_1", (width, out * config.merge**2))
    return found | with_bias("merger.down", "patch_merge_mlp.linear_2", (out, width))


def peak_bytes(config: MiniMaxVisionConfig, grid: Grid) -> int:
    """Most bytes that `encode` allocates, its result included; native scratch memory is not counted."""
    hidden, out, width, cell = config.hidden_size, config.out_size, config.projector_width, config.merge**2
    patches, positions = grid[0] * frame_patches(grid), num_positions(config, grid)
    flop = 2 * width * (cell * (hidden + out) + cell * out + out)
    stages = (
        block_floats(
            patches, 2 * hidden * config.patch_values, 3 * hidden + config.patch_kernel.floats_per_row
        ),
        gelu_mlp_floats(patches, hidden, config.mlp_width),
        block_floats(positions, flop, cell * (out + width) + width),
    )
    return tower_bytes(config, grid, frame_patches(grid), positions * out, stages)


class MiniMaxVisionTower(PatchTower[MiniMaxVisionConfig]):
    """The tower with its projectors and weights."""

    def _norm(self, name: str, x: Rows) -> Rows:
        return self._operations.layer_norm(name, x, self._config.norm_eps)

    def _embed_patches(self, patches: Rows, hidden: Rows) -> None:
        super()._embed_patches(patches, hidden)
        hidden[:] = self._norm("first_norm", hidden)

    def _feed_forward(self, layer: str, hidden: Rows) -> Steps:
        return self._operations.gelu_mlp(layer, hidden, self._config.norm_eps, "gelu_erf")

    def _merge(self, hidden: Rows, grid: Grid) -> Generator[None, None, Rows]:
        """Project each patch, then the patches of each cell together."""
        ops, config = self._operations, self._config
        cell = config.merge**2
        embeddings = np.empty((num_positions(config, grid), config.out_size), np.float32)

        def work(rows: slice) -> None:
            patches = hidden[rows.start * cell : rows.stop * cell]
            projected = ops.linear(
                "patch_projector.down", ops.linear("patch_projector.up", patches, finish="gelu_erf")
            ).reshape(-1, cell * config.out_size)
            merged = ops.linear("merger.up", projected, finish="gelu_erf")
            ops.linear("merger.down", merged, embeddings[rows])

        flop = cell * ops.flop_per_row("patch_projector.up", "patch_projector.down")
        flop += ops.flop_per_row("merger.up", "merger.down")
        yield from in_blocks(work, range(len(embeddings)), flop)
        return embeddings


TOWERS: Mapping[str, Encoder] = {
    "minimax_m3_vl": Encoder(
        kind="picture",
        path=("vision_config",),
        placeholders=("image_token_index", "image_token_id"),
        prefix="",
        read=read_config,
        tensors=tensors,
        open=MiniMaxVisionTower,
        num_positions=num_positions,
        peak_bytes=peak_bytes,
        marks=(_START, _END),
    ),
}


def _read_minimax(reader: GgufConfigReader) -> dict[str, object]:
    reader.neutral("use_gelu", True)
    reader.integer("vision.image_size")  # the tower takes any
    projector = reader.file.tensors.get("mm.1.weight")
    return {
        "projector_hidden_size": None if projector is None else projector.shape[0],
        "hidden_size": reader.integer("vision.embedding_length"),
        "intermediate_size": reader.integer("vision.feed_forward_length"),
        "layer_norm_eps": reader.number("vision.attention.layer_norm_epsilon"),
        "num_attention_heads": reader.integer("vision.attention.head_count"),
        "num_hidden_layers": reader.integer("vision.block_count", most=MOST_LAYERS),
        "patch_size": read_patch_size(reader),
        "spatial_merge_size": read_merge_size(reader),
        "temporal_patch_size": 2,
    }


def _minimax_settings(reader: GgufConfigReader) -> dict[str, object]:
    """Return settings as in MiniMax-M3: 3,136 to 451,584 pixels; a token has 28 x 28."""
    return read_colours(reader) | {
        "image_processor_type": "MiniMaxM3VLImageProcessor",
        "patch_size": read_patch_size(reader),
        "merge_size": read_merge_size(reader),
        "size": read_pixels(reader, 3136, 451_584, token=28),
        "temporal_patch_size": 2,
    }


PROJECTORS: Mapping[str, Projector] = {
    "minimax_m3": Projector(
        families={"minimax_m3_vl": "minimax_m3_vl"},
        placeholder="]<]image[>[",
        read_config=_read_minimax,
        read_settings=_minimax_settings,
        names={
            "patch": "v.patch_embd",
            "first_norm": "v.pre_ln",
            "patch_projector.up": "mm.1",
            "patch_projector.down": "mm.2",
            "merger.up": "mm.merger.fc1",
            "merger.down": "mm.merger.fc2",
        },
        marks=(_START, _END),
        stored={"are_frames_apart": True, "pair_order": "thirds apart"},
    ),
}
