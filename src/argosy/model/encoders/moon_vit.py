"""MoonViT and its projector, the vision tower of Kimi-VL, K2.5, K2.6 and K3: pictures, and for the K2s short pieces of
video.

    patches -> product + learned positions (+ time) -> layers -> LayerNorm -> mean over frames -> projector

A layer is LayerNorm, attention with 2-D RoPE over all patches of all frames, LayerNorm, MLP. The projector joins cells
of 2 x 2 patches. A piece of video has at most as many frames as the table of times, and fills as many positions as one
picture. Positions in the decoder are those of text. K3's second version has RMSNorm, and after the projector instead of
before it; heads that are together wider than the hidden state; positions mixed linearly; and no biases.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from argosy.errors import UsageError
from argosy.model.encoders import EncoderTensor, with_bias
from argosy.model.encoders.blocks import Rows, Steps, block_floats, gelu_mlp_floats, in_blocks, sinusoids
from argosy.model.encoders.encoder import Encoder, VideoForm
from argosy.model.encoders.grid import (
    Grid,
    PairOrder,
    Places,
    PositionTable,
    Taps,
    centre_taps,
    frame_patches,
    patch_places,
    read_theta,
)
from argosy.model.encoders.patch_tower import PatchConfig, PatchTower, layer_tensors, tower_bytes
from argosy.model.encoders.projector import Projector, read_colours, read_patch_size
from argosy.model.reading.config_reader import MOST_LAYERS, ConfigReader
from argosy.model.reading.gguf_config import GgufConfigReader
from argosy.prompt.media_span import Making


@dataclass(frozen=True, slots=True, kw_only=True)
class MoonViTConfig(PatchConfig):
    """Sizes of the tower and its projector."""

    mlp_width: int
    most_frames: int
    projector_eps: float
    pair_order: PairOrder = "alternating"
    is_second: bool = False  # K3's version


def read_config(
    reader: ConfigReader, wrapper: ConfigReader, *, hidden_size: int, is_second: bool = False
) -> MoonViTConfig:
    """Read `vision_config`, in the spelling of the hub or of transformers 5.24.

    Args:
        wrapper: the config around it, where transformers keeps the keys of the projector; it is not finished here.
        hidden_size: the text model's.
        is_second: the config is K3's.

    Raises:
        UnsupportedModel: a key or value that is not supported.   CheckpointError: a key is malformed.
    """
    gelu = "activation_func" if is_second else "hidden_act"
    reader.one_of(gelu, "gelu_pytorch_tanh", ("gelu_pytorch_tanh",))
    reader.neutral("mm_projector_type", "patchmergerv2" if is_second else "patchmerger")
    if is_second:
        for key, value in (
            ("norm_type", "rmsnorm"), ("mlp_type", "mlp2"), ("pos_emb_interpolation_mode", "bilinear"),
            ("attn_bias", False), ("linear_bias", False), ("patch_embed_proj_bias", False),
        ):  # fmt: skip
            reader.neutral(key, value)
    reader.neutral("projector_hidden_act", "gelu")
    reader.neutral("pos_emb_type", "divided_fixed")
    reader.neutral("video_attn_type", "spatial_temporal")
    reader.neutral("merge_type", "sd2_tpool")
    reader.neutral("text_hidden_size", hidden_size)
    eps = wrapper.number("projection_layer_norm_eps", 1e-5)
    config = MoonViTConfig(
        num_layers=reader.integer("vt_num_hidden_layers", "num_hidden_layers", default=27, most=MOST_LAYERS),
        hidden_size=reader.integer("vt_hidden_size", "hidden_size", default=1152),
        mlp_width=reader.integer("vt_intermediate_size", "intermediate_size", default=4304),
        num_heads=reader.integer("vt_num_attention_heads", "num_attention_heads", default=16),
        attention_size=(reader.optional_integer("qkv_hidden_size") or 0) if is_second else 0,
        patch_size=reader.integer("patch_size", default=14),
        merge=(reader.integers("merge_kernel_size", least=1, most=64) or (2, 2))[0],
        out_size=hidden_size,
        position_side=reader.integer("init_pos_emb_height", "pos_emb_height", default=64),
        most_frames=reader.integer("init_pos_emb_time", "pos_emb_time", default=4),
        theta=read_theta(reader),
        projector_eps=reader.number("projector_ln_eps", eps),
        is_second=is_second,
    )
    reader.neutral("merge_kernel_size", [config.merge, config.merge])
    table = ("init_pos_emb_width", "pos_emb_width")
    if reader.integer(*table, default=64) != config.position_side:
        raise reader.unsupported(_given(reader, *table), f"the height of the table, {config.position_side}")
    config.require_heads(reader, _given(reader, "qkv_hidden_size", "vt_hidden_size", "hidden_size"))
    reader.neutral("mm_hidden_size", config.hidden_size)
    if wrapper.integer("projection_hidden_size", default=config.hidden_size) != config.hidden_size:
        raise wrapper.unsupported("projection_hidden_size", f"the size of the tower, {config.hidden_size}")
    reader.finish()
    return config


def _given(reader: ConfigReader, *names: str) -> str:
    """The spelling that the file uses."""
    return next((name for name in names if reader.has(name)), names[0])


def tensors(
    config: MoonViTConfig, projector: str = "mm_projector", products: tuple[str, str] = ("proj.0", "proj.2")
) -> dict[str, EncoderTensor]:
    """The tensors of tower and projector by canonical name; their names in files have no prefix."""
    hidden, cell, side = config.hidden_size, config.cell_size, config.position_side
    tower, has_bias = "vision_tower", not config.is_second
    kernel = hidden, 3, config.patch_size, config.patch_size
    found = with_bias("patch", f"{tower}.patch_embed.proj", kernel, has_bias=has_bias)
    found["position"] = EncoderTensor(f"{tower}.patch_embed.pos_emb.weight", (side, side, hidden), row_axes=2)
    names = ("norm0", "wqkv", "wo", "norm1", "mlp.fc0", "mlp.fc1")
    found |= layer_tensors(config, config.mlp_width, f"{tower}.encoder.blocks", names, has_bias=has_bias)
    norm, width = ("post_norm", config.out_size) if config.is_second else ("pre_norm", hidden)
    found |= with_bias("final_norm", f"{tower}.encoder.final_layernorm", (hidden,), has_bias=has_bias)
    found |= with_bias("projector.norm", f"{projector}.{norm}", (width,), has_bias=has_bias)
    found |= with_bias("projector.up", f"{projector}.{products[0]}", (cell, cell), has_bias=has_bias)
    down = config.out_size, cell
    return found | with_bias("projector.down", f"{projector}.{products[1]}", down, has_bias=has_bias)


def _tensors_of_kimi_vl(config: MoonViTConfig) -> dict[str, EncoderTensor]:
    return tensors(config, "multi_modal_projector", ("linear_1", "linear_2"))


def num_positions(config: MoonViTConfig, grid: Grid) -> int:
    """Positions that a picture or piece of video of `grid` patches fills: one for each cell, in all frames together."""
    return frame_patches(grid) // config.merge**2


def peak_bytes(config: MoonViTConfig, grid: Grid) -> int:
    """Most bytes that `encode` allocates, its result included; native scratch memory is not counted."""
    hidden, cell = config.hidden_size, config.cell_size
    positions = num_positions(config, grid)
    patches = grid[0] * frame_patches(grid)
    stages = (
        block_floats(patches, 2 * hidden * config.patch_values, 5 * hidden + 32),
        gelu_mlp_floats(patches, hidden, config.mlp_width),
        positions * config.out_size
        + block_floats(
            positions,
            2 * cell * (cell + config.out_size),
            (2 * grid[0] + 4) * cell + (2 * config.out_size if config.is_second else 0),
        ),
    )
    return tower_bytes(config, grid, patches, 0, stages)


class MoonViT(PatchTower[MoonViTConfig]):
    """The tower with its projector and weights."""

    _norm_eps = 1e-5

    def encode(self, patches: Rows, grid: Grid) -> Making:
        """As `PatchTower.encode`, for a piece of video; patches lie row by row.

        Raises:
            UsageError: more frames than the tower knows times.
        """
        if grid[0] > self._config.most_frames:
            raise UsageError(
                f"a piece of video has {grid[0]} frames, and the vision tower takes at most "
                f"{self._config.most_frames}",
                hint="split the video into shorter pieces",
            )
        return (yield from super().encode(patches, grid))

    def _places(self, grid: Grid) -> Places:
        return patch_places(grid, 1)

    def _segments(self, grid: Grid) -> Sequence[range]:
        return [range(grid[0] * frame_patches(grid))]

    def _embed(self, patches: Rows, grid: Grid, places: Places, hidden: Rows) -> Steps:
        ops, side = self._operations, self._config.position_side
        positions = PositionTable("position", side, places, *(self._taps(size, side) for size in grid[1:]))
        times = sinusoids(
            np.arange(grid[0]), 10_000.0 ** -(np.arange(0, hidden.shape[1], 2) / hidden.shape[1])
        )

        def work(rows: slice) -> None:
            ops.linear("patch", patches[rows], hidden[rows])
            positions.add(ops, hidden[rows], rows)
            if grid[0] > 1:  # a picture has no time
                hidden[rows] += times[np.arange(rows.start, rows.stop) // frame_patches(grid)]

        return in_blocks(work, range(len(hidden)), ops.flop_per_row("patch"))

    def _merge(self, hidden: Rows, grid: Grid) -> Generator[None, None, Rows]:
        """The mean over frames, and the projector."""
        ops, config = self._operations, self._config
        embeddings = np.empty((num_positions(config, grid), config.out_size), np.float32)
        num_frames, height, width = grid
        merge = config.merge
        # [frames, cell rows, rows in a cell, cell columns, columns in a cell, hidden], the cells before what is in them
        cells = hidden.reshape(num_frames, height // merge, merge, width // merge, merge, -1).swapaxes(2, 3)
        columns = width // merge

        def work(rows: slice) -> None:
            index = np.arange(rows.start, rows.stop)
            patches = cells[:, index // columns, index % columns]  # [frames, rows, merge, merge, hidden]
            normed = self._norm("final_norm", patches.reshape(-1, config.hidden_size))
            mean = normed.reshape(num_frames, -1, config.hidden_size).mean(axis=0)
            x = self._norm_cells(mean).reshape(-1, config.cell_size)
            x = ops.linear("projector.up", x, finish="gelu_erf")
            self._project(x, embeddings[rows])

        yield from in_blocks(work, range(len(embeddings)), ops.flop_per_row("projector.up", "projector.down"))
        return embeddings

    def _norm_cells(self, patches: Rows) -> Rows:
        return self._operations.layer_norm("projector.norm", patches, self._config.projector_eps)

    def _project(self, wide: Rows, out: Rows) -> None:
        self._operations.linear("projector.down", wide, out)


class SecondMoonViT(MoonViT):
    """K3's version."""

    _norm_eps = 2.0**-23  # that of PyTorch where none is given, in the published code

    def _norm(self, name: str, x: Rows) -> Rows:
        return self._operations.rms_norm(name, x, self._norm_eps)

    def _taps(self, size: int, side: int) -> Taps:
        return centre_taps(size, side)

    def _feed_forward(self, layer: str, hidden: Rows) -> Steps:
        ops = self._operations

        def work(rows: slice) -> None:
            wide = ops.linear(
                f"{layer}.up", self._norm(f"{layer}.mlp_norm", hidden[rows]), finish="gelu_tanh"
            )
            ops.linear(f"{layer}.down", wide, hidden[rows], finish="add")

        return in_blocks(work, range(len(hidden)), ops.flop_per_row(f"{layer}.up", f"{layer}.down"))

    def _norm_cells(self, patches: Rows) -> Rows:
        return patches

    def _project(self, wide: Rows, out: Rows) -> None:
        projected = self._operations.linear("projector.down", wide)
        out[:] = self._operations.rms_norm("projector.norm", projected, self._config.projector_eps)


_KIMI_K25 = Encoder(
    kind="picture",
    path=("vision_config",),
    placeholders=("media_placeholder_token_id", "image_token_id"),
    prefix="",
    read=lambda own, around, model: read_config(own, around, hidden_size=model.hidden_size),
    tensors=tensors,
    open=MoonViT,
    num_positions=num_positions,
    peak_bytes=peak_bytes,
    video=VideoForm(most_frames=lambda config: int(config.most_frames)),
)
TOWERS: Mapping[str, Encoder] = {
    "kimi_k25": _KIMI_K25,
    "kimi_vl": replace(_KIMI_K25, tensors=_tensors_of_kimi_vl, video=None),
    "kimi_k3": replace(
        _KIMI_K25,
        read=lambda own, around, model: read_config(
            own, around, hidden_size=model.hidden_size, is_second=True
        ),
        open=SecondMoonViT,
        label=lambda height, width: (
            f"<|media_begin|>image {width}x{height}<|media_content|>",
            "<|media_end|>",
        ),
        video=None,  # the processor of the published code refuses it
    ),
}


def _read_kimi(reader: GgufConfigReader) -> dict[str, object]:
    reader.neutral("use_gelu", True)
    merge = reader.integer("vision.projector.scale_factor", most=16)
    metadata = reader.file  # these keys lack the prefix of the others
    reader.integer("vision.image_size")  # the position table has its own keys
    reader.integer("vision.image_min_pixels", least=0)  # the reference processor enlarges no picture
    return {
        "hidden_size": reader.integer("vision.embedding_length"),
        "intermediate_size": reader.integer("vision.feed_forward_length"),
        "merge_kernel_size": [merge, merge],
        "num_attention_heads": reader.integer("vision.attention.head_count"),
        "num_hidden_layers": reader.integer("vision.block_count", most=MOST_LAYERS),
        "patch_size": read_patch_size(reader),
        "pos_emb_height": metadata.integer("vision.pos_emb_height", least=1),
        "pos_emb_time": metadata.integer("vision.pos_emb_time", least=1),
        "pos_emb_width": metadata.integer("vision.pos_emb_width", least=1),
        "projector_ln_eps": reader.number("vision.attention.layer_norm_epsilon"),
    }


def _read_kimi_k3(reader: GgufConfigReader) -> dict[str, object]:
    """Read K3's sizes; for its table of positions there is only the side of a picture that needs no resampling."""
    reader.neutral("use_gelu", True)
    merge, patch_size = reader.integer("vision.projector.scale_factor", most=16), read_patch_size(reader)
    heads, side = (
        reader.integer("vision.attention.head_count"),
        reader.integer("vision.image_size") // patch_size,
    )
    reader.integer("vision.image_min_pixels", least=0)
    return {
        "init_pos_emb_height": side,
        "init_pos_emb_width": side,
        "merge_kernel_size": [merge, merge],
        "patch_size": patch_size,
        "projector_ln_eps": reader.number("vision.attention.layer_norm_epsilon"),
        "qkv_hidden_size": heads * reader.integer("vision.attention.head_dim"),
        "vt_hidden_size": reader.integer("vision.embedding_length"),
        "vt_intermediate_size": reader.integer("vision.feed_forward_length"),
        "vt_num_attention_heads": heads,
        "vt_num_hidden_layers": reader.integer("vision.block_count", most=MOST_LAYERS),
    }


def _kimi_settings(reader: GgufConfigReader) -> dict[str, object]:
    """Return settings as in Kimi-K2.5: at most 512 patches on a side; the file gives their total number, as pixels."""
    patch_size = read_patch_size(reader)
    return read_colours(reader) | {
        "image_processor_type": "Kimi_K25ImageProcessor",
        "max_patches": reader.integer("vision.image_max_pixels", least=patch_size**2) // patch_size**2,
        "merge_size": reader.integer("vision.projector.scale_factor", most=16),
        "patch_size": patch_size,
        "size": {"max_height": 512, "max_width": 512},
    }


_KIMI = Projector(
    families={"deepseek_v3": "kimi_k25"},
    placeholder="<|media_pad|>",
    read_config=_read_kimi,
    read_settings=_kimi_settings,
    names={
        "patch": "v.patch_embd",
        "position": "v.position_embd",
        "final_norm": "v.post_ln",
        "projector.norm": "mm.input_norm",
        "projector.up": "mm.1",
        "projector.down": "mm.2",
    },
    stored={"pair_order": "columns first"},
)
PROJECTORS: Mapping[str, Projector] = {
    "kimik25": _KIMI,
    # Unsloth's converter writes this one.
    "kimik3": replace(
        _KIMI,
        families={"kimi_k3": "kimi_k3"},
        read_config=_read_kimi_k3,
        names={**_KIMI.names, "projector.norm": "mm.post_norm"},
    ),
}
