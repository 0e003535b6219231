"""InternViT and its projector, the vision tower of InternVL3.5: pictures in tiles.

    patches of a tile -> product, before them a class token -> + learned positions -> layers -> patches alone
    -> 2 x 2 patches in one -> LayerNorm -> two products with GELU between them

A picture is cut into square tiles, and a small copy of all of it follows. In the tower, a tile sees only itself. A
layer is a norm, attention, a norm, MLP; what both add is scaled. The large tower (6 G parameters) norms by RMSNorm,
queries and keys as well. A span begins with the token <img> and ends with </img>.

llama.cpp adds the learned position of the class token to the first patch, and so on; here, as in transformers, each
patch has its own.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from argosy.config import ModelConfig
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
from argosy.model.encoders.encoder import Encoder
from argosy.model.encoders.grid import Grid, frame_patches, patch_places
from argosy.model.encoders.projector import Projector, read_colours, read_patch_size
from argosy.model.reading.config_reader import MOST_LAYERS, ConfigReader
from argosy.model.reading.gguf_config import GgufConfigReader
from argosy.prompt.media_span import Making, SpanRows

_PROJECTOR_EPS, _QK_EPS = 1e-5, 1e-6
_NUMPY_BUFFER = 8192  # values that numpy buffers while rows are scaled
_MEAN, _STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@dataclass(frozen=True, slots=True, kw_only=True)
class InternViTConfig:
    """Sizes of the tower and its projector.

    position_side: patches on a side of a tile.
    tiles: the fewest and the most tiles of a picture, its small copy not counted; None: the processor's file says.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    mlp_width: int
    patch_size: int
    position_side: int
    merge: int
    out_size: int
    has_qkv_bias: bool
    has_qk_norm: bool
    has_rms_norm: bool
    norm_eps: float
    are_qkv_apart: bool = True
    tiles: tuple[int, int] | None = None
    has_copy: bool = True

    @property
    def patch_values(self) -> int:
        return 3 * self.patch_size**2

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def cell_size(self) -> int:
        return self.hidden_size * self.merge**2


def read_config(reader: ConfigReader, wrapper: ConfigReader, model: ModelConfig) -> InternViTConfig:
    """Read `vision_config` and the keys around it, as `InternVLConfig` in transformers 5.24 does.

    Raises:
        UnsupportedModel: a key or value that is not supported.   CheckpointError: a key is malformed.
    """
    wrapper.neutral("vision_feature_layer", -1)
    wrapper.neutral("vision_feature_select_strategy", "default")
    wrapper.neutral("projector_hidden_act", "gelu")
    reader.neutral("use_mask_token", False)
    reader.neutral("use_absolute_position_embeddings", True)
    reader.neutral("use_mean_pooling", True)
    reader.passed("projection_dropout", "hidden_dropout_prob", "layer_scale_init_value")
    config = _read(reader, wrapper, model, bias=("attention_bias", False), qk_norm="use_qk_norm")
    reader.finish()
    return config


def read_chat_config(reader: ConfigReader, wrapper: ConfigReader, model: ModelConfig) -> InternViTConfig:
    """Read the config of OpenGVLab's own code (`internvl_chat`), which also says how a picture is cut.

    Raises:
        UnsupportedModel: a key or value that is not supported.   CheckpointError: a key is malformed.
    """
    wrapper.neutral("select_layer", -1)
    wrapper.neutral("ps_version", "v2")
    wrapper.neutral("pad2square", False)
    wrapper.neutral("use_backbone_lora", 0)
    reader.passed("drop_path_rate", "dropout", "initializer_factor", "use_flash_attn")
    config = _read(reader, wrapper, model, bias=("qkv_bias", False), qk_norm="qk_normalization")
    size = config.position_side * config.patch_size
    wrapper.neutral("force_image_size", size, None)
    reader.finish()
    least, most = (
        wrapper.integer(f"{name}_dynamic_patch", default=n, most=64) for name, n in (("min", 1), ("max", 6))
    )
    if not wrapper.flag("dynamic_image_size", False):
        least = most = 1
    if least > most:
        raise wrapper.unsupported("min_dynamic_patch", f"at most max_dynamic_patch, {most}")
    has_copy = wrapper.flag("use_thumbnail", False)
    return replace(config, are_qkv_apart=False, tiles=(least, most), has_copy=has_copy)


def _read(
    reader: ConfigReader, wrapper: ConfigReader, model: ModelConfig, *, bias: tuple[str, bool], qk_norm: str
) -> InternViTConfig:
    reader.neutral("num_channels", 3)
    reader.one_of("hidden_act", "gelu", ("gelu",))
    around = reader if reader.has("downsample_ratio") else wrapper  # in GGUF files all is in one place
    ratio = around.number("downsample_ratio", 0.5)
    patch_size, image_size = _side(reader, "patch_size", 14), _side(reader, "image_size", 448)
    config = InternViTConfig(
        num_layers=reader.integer("num_hidden_layers", default=24, most=MOST_LAYERS),
        hidden_size=reader.integer("hidden_size", default=1024),
        num_heads=reader.integer("num_attention_heads", default=16),
        mlp_width=reader.integer("intermediate_size", default=4096),
        patch_size=patch_size,
        position_side=image_size // patch_size,
        merge=max(1, min(16, round(1 / ratio))),
        out_size=model.hidden_size,
        has_qkv_bias=reader.flag(*bias),
        has_qk_norm=reader.flag(qk_norm, False),
        has_rms_norm=reader.one_of("norm_type", "layer_norm", ("layer_norm", "rms_norm")) == "rms_norm",
        norm_eps=reader.number("layer_norm_eps", 1e-6),
    )
    if config.merge * ratio != 1 or not config.position_side or config.position_side % config.merge:
        raise wrapper.unsupported(
            "downsample_ratio",
            f"one divided by a divisor of {config.position_side}, a tile's patches on a side",
        )
    if config.hidden_size % config.num_heads:
        raise reader.unsupported("hidden_size", f"a multiple of the number of heads, {config.num_heads}")
    return config


def _side(reader: ConfigReader, name: str, default: int) -> int:
    """Read a size that may be a list of two equal ones."""
    if not reader.is_list(name):
        return reader.integer(name, default=default)
    sizes = reader.integers(name, least=1, most=65_536)
    if len(sizes) != 2 or sizes[0] != sizes[1]:
        raise reader.unsupported(name, "two equal numbers")
    return sizes[0]


_HUB = {
    "cls": "embeddings.cls_token", "position": "embeddings.position_embeddings",
    "patch": "embeddings.patch_embeddings.projection", "layer": "encoder.layer", "qkv": "", "q": "attention.q_proj",
    "k": "attention.k_proj", "v": "attention.v_proj", "q_norm": "attention.q_norm", "k_norm": "attention.k_norm",
    "o": "attention.projection_layer", "attn_norm": "layernorm_before", "mlp_norm": "layernorm_after",
    "attn_scale": "lambda_1", "mlp_scale": "lambda_2", "tower": "vision_tower",
    "merger": ("multi_modal_projector.layer_norm", "multi_modal_projector.linear_1", "multi_modal_projector.linear_2"),
}  # fmt: skip
_CHAT = _HUB | {
    "cls": "embeddings.class_embedding", "position": "embeddings.position_embedding",
    "patch": "embeddings.patch_embedding", "layer": "encoder.layers", "qkv": "attn.qkv", "q_norm": "attn.q_norm",
    "k_norm": "attn.k_norm", "o": "attn.proj", "attn_norm": "norm1", "mlp_norm": "norm2", "attn_scale": "ls1",
    "mlp_scale": "ls2", "tower": "vision_model", "merger": ("mlp1.0", "mlp1.1", "mlp1.3"),
}  # fmt: skip


def tensors(config: InternViTConfig, names: Mapping[str, Any] = _HUB) -> dict[str, EncoderTensor]:
    """The tensors of tower and projector by canonical name; their names in files have no prefix."""
    hidden, wide, out, tower = config.hidden_size, config.mlp_width, config.out_size, names["tower"]
    found = with_bias("patch", f"{tower}.{names['patch']}", (hidden, 3, config.patch_size, config.patch_size))
    found["cls"] = EncoderTensor(f"{tower}.{names['cls']}", (1, 1, hidden), row_axes=2)
    found["position"] = EncoderTensor(
        f"{tower}.{names['position']}", (1, config.position_side**2 + 1, hidden), row_axes=2
    )
    attention = dict.fromkeys(("q", "k", "v"), (hidden, hidden))
    for layer in range(config.num_layers):
        ours, theirs = f"layers.{layer}", f"{tower}.{names['layer']}.{layer}"
        for name in ("attn_norm", "mlp_norm"):
            found |= with_bias(
                f"{ours}.{name}", f"{theirs}.{names[name]}", (hidden,), has_bias=not config.has_rms_norm
            )
        for name in ("attn_scale", "mlp_scale"):
            found[f"{ours}.{name}"] = EncoderTensor(f"{theirs}.{names[name]}", (hidden,))
        for name, shape in (attention if config.are_qkv_apart else {"qkv": (3 * hidden, hidden)}).items():
            found |= with_bias(
                f"{ours}.{name}", f"{theirs}.{names[name]}", shape, has_bias=config.has_qkv_bias
            )
        for name in ("q_norm", "k_norm") if config.has_qk_norm else ():
            found |= with_bias(f"{ours}.{name}", f"{theirs}.{names[name]}", (hidden,), has_bias=False)
        found |= with_bias(f"{ours}.o", f"{theirs}.{names['o']}", (hidden, hidden))
        found |= with_bias(f"{ours}.up", f"{theirs}.mlp.fc1", (wide, hidden))
        found |= with_bias(f"{ours}.down", f"{theirs}.mlp.fc2", (hidden, wide))
    norm, up, down = names["merger"]
    found |= with_bias("merger.norm", norm, (config.cell_size,))
    found |= with_bias("merger.up", up, (out, config.cell_size))
    return found | with_bias("merger.down", down, (out, out))


def num_positions(config: InternViTConfig, grid: Grid) -> int:
    """Positions that a picture of `grid` patches fills: one for each cell of each tile, <img> and </img>."""
    return frame_patches(grid) // config.merge**2 + 2


def written(config: InternViTConfig, grid: Grid) -> dict[int, str]:
    return {0: "<img>", num_positions(config, grid) - 1: "</img>"}


def extent(config: InternViTConfig, grid: Grid) -> tuple[int, int]:
    """Patches of all tiles, which see their tile, and the pairs; class tokens count as patches."""
    seen = config.position_side**2 + 1
    rows = frame_patches(grid) // config.position_side**2 * seen
    return rows, rows * seen


def settings(config: InternViTConfig) -> dict[str, object]:
    """The processor's settings that follow from the tower's config."""
    size = config.position_side * config.patch_size
    made: dict[str, object] = {
        "merge_size": config.merge, "patch_size": config.patch_size, "size": {"height": size, "width": size},
        "tile_size": size,
    }  # fmt: skip
    if config.tiles is None:
        return made
    return made | {
        "image_mean": _MEAN, "image_std": _STD, "image_processor_type": "GotOcr2ImageProcessor",
        "max_patches": config.tiles[1], "min_patches": config.tiles[0], "use_thumbnail": config.has_copy,
    }  # fmt: skip


def peak_bytes(config: InternViTConfig, grid: Grid) -> int:
    """Most bytes that `encode` allocates, its result included; native scratch memory is not counted."""
    hidden, wide, out, patches = (
        config.hidden_size,
        config.mlp_width,
        config.out_size,
        config.position_side**2,
    )
    rows = patches + 1
    project = block_floats(rows, 6 * hidden**2, 3 * hidden)
    attend = attention_floats(rows, hidden, hidden, 2 * hidden**2, hidden)
    stages = (
        rows * config.patch_values + block_floats(rows, 2 * hidden * config.patch_values, 2 * hidden + 8),
        3 * rows * hidden + max(project, attend),
        block_floats(rows, 4 * hidden * wide, 2 * hidden + wide),
        block_floats(
            patches // config.merge**2, 2 * out * (config.cell_size + out), config.cell_size + 2 * out
        ),
    )
    floats = (
        rows * hidden + num_positions(config, grid) * out + max(stages) + min(rows * hidden, _NUMPY_BUFFER)
    )
    return FLOAT_BYTES * floats + 8 * 8 * rows + OVERHEAD_BYTES


class InternViT(Tower[InternViTConfig]):
    """The tower with its projector and weights; `encode` may be run for several pictures at the same time."""

    def encode(self, patches: Rows, grid: Grid) -> Making:
        """Make the rows of a picture.

        Args:
            patches: [patches, 3 * patch_size^2], tile by tile, and cell by cell in a tile.
            grid: 1, the rows of patches of all tiles, which are one below the other, and the columns of one.
        """
        config, size = self._config, self._config.position_side**2
        assert len(patches) == frame_patches(grid), (len(patches), grid)
        assert not len(patches) % size, (len(patches), size)
        embeddings = np.zeros((num_positions(config, grid), config.out_size), np.float32)
        cells = size // config.merge**2
        num_tiles = len(patches) // size
        hidden = np.empty((size + 1, config.hidden_size), np.float32)
        for tile in range(num_tiles):
            yield from self._embed(patches[tile * size : (tile + 1) * size], hidden)
            for layer in range(config.num_layers):
                yield (tile + layer / config.num_layers) / num_tiles
                yield from self._attend(f"layers.{layer}", hidden)
                yield from self._feed_forward(f"layers.{layer}", hidden)
            yield from self._merge(hidden, embeddings[1 + tile * cells : 1 + (tile + 1) * cells])
        return SpanRows(embeddings)

    def _norm(self, name: str, x: Rows) -> Rows:
        if self._config.has_rms_norm:
            return self._operations.rms_norm(name, x, self._config.norm_eps)
        return self._operations.layer_norm(name, x, self._config.norm_eps)

    def _embed(self, patches: Rows, hidden: Rows) -> Steps:
        ops, config = self._operations, self._config
        at_rows, at_columns = patch_places((1, config.position_side, config.position_side), config.merge)
        places = np.concatenate([[0], 1 + at_rows * config.position_side + at_columns]).astype(np.int32)
        padded = np.concatenate([np.zeros_like(patches[:1]), patches])  # with a row for the class token

        def work(rows: slice) -> None:
            ops.linear("patch", padded[rows], hidden[rows])
            if not rows.start:
                hidden[:1] = ops.rows_of("cls", places[:1])
            hidden[rows] += ops.rows_of("position", places[rows])

        return in_blocks(work, range(len(hidden)), ops.flop_per_row("patch"))

    def _attend(self, layer: str, hidden: Rows) -> Steps:
        ops, config = self._operations, self._config
        width = config.hidden_size
        qkv = np.empty((len(hidden), 3 * width), np.float32)
        query, key, value = columns(qkv, 3)
        names = [f"{layer}.{name}" for name in (("q", "k", "v") if config.are_qkv_apart else ("qkv",))]

        def project(rows: slice) -> None:
            normed = self._norm(f"{layer}.attn_norm", hidden[rows])
            for name, out in zip(names, columns(qkv[rows], len(names)), strict=True):
                ops.linear(name, normed, out)
            for name, out in (("q", query), ("k", key)) if config.has_qk_norm else ():
                out[rows] = ops.rms_norm(f"{layer}.{name}_norm", np.ascontiguousarray(out[rows]), _QK_EPS)

        yield from in_blocks(project, range(len(hidden)), ops.flop_per_row(*names))
        yield from ops.add_attention(
            layer,
            hidden,
            query,
            key,
            value,
            head_dim=config.head_dim,
            segments=[range(len(hidden))],
            factor=f"{layer}.attn_scale",
        )

    def _feed_forward(self, layer: str, hidden: Rows) -> Steps:
        ops = self._operations

        def work(rows: slice) -> None:
            wide = ops.linear(f"{layer}.up", self._norm(f"{layer}.mlp_norm", hidden[rows]), finish="gelu_erf")
            ops.add_product(f"{layer}.down", wide, hidden[rows], f"{layer}.mlp_scale")

        return in_blocks(work, range(len(hidden)), ops.flop_per_row(f"{layer}.up", f"{layer}.down"))

    def _merge(self, hidden: Rows, embeddings: Rows) -> Generator[None, None, None]:
        """Join the patches of each cell, which lie together."""
        ops = self._operations
        cells = hidden[1:].reshape(-1, self._config.cell_size)

        def work(rows: slice) -> None:
            x = ops.linear(
                "merger.up", ops.layer_norm("merger.norm", cells[rows], _PROJECTOR_EPS), finish="gelu_erf"
            )
            ops.linear("merger.down", x, embeddings[rows])

        return in_blocks(work, range(len(cells)), ops.flop_per_row("merger.up", "merger.down"))


_HUB_TOWER = Encoder(
    kind="picture",
    path=("vision_config",),
    placeholders=("image_token_id",),
    prefix="",
    read=read_config,
    tensors=tensors,
    open=InternViT,
    num_positions=num_positions,
    peak_bytes=peak_bytes,
    written=written,
    settings=settings,
    extent=extent,
)
TOWERS: Mapping[str, Encoder] = {
    "internvl": _HUB_TOWER,
    "internvl_chat": replace(
        _HUB_TOWER,
        placeholders=("<IMG_CONTEXT>",),
        read=read_chat_config,
        tensors=lambda config: tensors(config, _CHAT),
        has_processor_file=False,
    ),
}


def _read_gguf(reader: GgufConfigReader) -> dict[str, object]:
    """Read the config in the spelling of OpenGVLab. The tensors show which norms there are."""
    reader.neutral("use_gelu", True)
    size, layers = (
        reader.integer("vision.embedding_length"),
        reader.integer("vision.block_count", most=MOST_LAYERS),
    )
    tensors = reader.file.tensors
    return {
        "downsample_ratio": 1 / reader.integer("vision.projector.scale_factor", 2, most=16),
        "hidden_size": size,
        "image_size": reader.integer("vision.image_size"),
        "intermediate_size": reader.integer("vision.feed_forward_length"),
        "layer_norm_eps": reader.number("vision.attention.layer_norm_epsilon"),
        "norm_type": "layer_norm" if "v.blk.0.ln1.bias" in tensors else "rms_norm",
        "num_attention_heads": reader.integer("vision.attention.head_count"),
        "num_hidden_layers": layers,
        "patch_size": read_patch_size(reader),
        "qk_normalization": "v.blk.0.attn_q_norm.weight" in tensors,
        "qkv_bias": "v.blk.0.attn_q.bias" in tensors,
    }


def _gguf_settings(reader: GgufConfigReader) -> dict[str, object]:
    """Return settings as in InternVL3.5: 1 to 12 tiles, and a small copy."""
    return read_colours(reader) | {
        "image_processor_type": "GotOcr2ImageProcessor",
        "max_patches": reader.integer("vision.preproc_max_tiles", 12, most=64),
        "min_patches": reader.integer("vision.preproc_min_tiles", 1, most=64),
        "use_thumbnail": True,
    }


PROJECTORS: Mapping[str, Projector] = {
    "internvl": Projector(
        families={"qwen3_moe": "internvl_chat"},
        placeholder="<IMG_CONTEXT>",
        read_config=_read_gguf,
        read_settings=_gguf_settings,
        names={
            "patch": "v.patch_embd",
            "position": "v.position_embd",
            "merger.norm": "mm.model.mlp.0",
            "merger.up": "mm.model.mlp.1",
            "merger.down": "mm.model.mlp.3",
        },
        whole_names={"cls": "v.class_embd"},
        stored={"are_qkv_apart": True},
    ),
}
