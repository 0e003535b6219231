"""The vision tower of Qwen3-VL, Qwen3.5, Qwen3.8 and Qwen3-Omni: pictures, and frames of video.

    patches -> product + learned positions -> layers -> merger -> embeddings
                                                |
                                                +-> deepstack mergers -> additions after the decoder's first layers

A patch covers two frames; a picture is its own second frame. A layer is LayerNorm, attention within a frame with 2-D
RoPE, LayerNorm, MLP. A merger joins cells of `merge` x `merge` patches. Qwen3.5 and Qwen3.8 have no deepstack
mergers.

A prompt contains a video as groups of two frames, each a separate span: in Qwen3-VL and Qwen3.5 with times between
them, in Qwen3-Omni with rotary positions that encode time (`omni_angles`).
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from math import isqrt

import numpy as np

from argosy.model.encoders import EncoderTensor, with_bias
from argosy.model.encoders.blocks import Rows, Steps, block_floats, gelu_mlp_floats, in_blocks
from argosy.model.encoders.encoder import Encoder, VideoForm
from argosy.model.encoders.grid import Grid, Taps, frame_patches, linear_taps, read_theta, span_angles
from argosy.model.encoders.patch_tower import (
    PatchConfig,
    PatchTower,
    layer_tensors,
    num_positions,
    tower_bytes,
)
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
    "TOWERS", "QwenVisionConfig", "QwenVisionTower", "num_positions", "omni_angles", "peak_bytes", "read_config",
    "span_angles", "tensors",
]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class QwenVisionConfig(PatchConfig):
    """Sizes of the tower; `deepstack_layers` are the layers whose outputs are merged for the decoder, ascending."""

    mlp_width: int
    deepstack_layers: tuple[int, ...]


def read_config(reader: ConfigReader, *, has_deepstack: bool = True) -> QwenVisionConfig:
    """Read `vision_config`, as the classes of transformers 5.24 do.

    Args:
        has_deepstack: whether the family has deepstack mergers; Qwen3.5 has none.

    Raises:
        UnsupportedModel: a key or value that is not supported.   CheckpointError: a key is malformed.
    """
    reader.one_of("hidden_act", "gelu_pytorch_tanh", ("gelu_pytorch_tanh",))
    # Qwen3-Omni's files have more keys, which repeat others or belong to the processor.
    reader.neutral("apply_vit_abs_pos_embed", True)
    reader.passed(
        "image_size", "in_chans", "spatial_patch_size", "tokens_per_second", "bos_token_id", "eos_token_id"
    )
    num_layers = reader.integer("depth", "num_hidden_layers", default=27, most=MOST_LAYERS)
    num_entries = reader.integer("num_position_embeddings", default=2304)
    deepstack_layers: tuple[int, ...] = (8, 16, 24) if has_deepstack else ()
    if not has_deepstack:
        reader.neutral("deepstack_visual_indexes", [], None)
    elif reader.has("deepstack_visual_indexes"):
        deepstack_layers = reader.integers("deepstack_visual_indexes", least=0, most=num_layers - 1)
    config = QwenVisionConfig(
        num_layers=num_layers,
        hidden_size=reader.integer("hidden_size", default=1152),
        mlp_width=reader.integer("intermediate_size", default=4304),
        num_heads=reader.integer("num_heads", "num_attention_heads", default=16),
        channels=reader.integer("in_channels", default=3),
        patch_size=reader.integer("patch_size", default=16),
        patch_frames=reader.integer("temporal_patch_size", default=2),
        merge=reader.integer("spatial_merge_size", default=2),
        out_size=reader.integer("out_hidden_size", default=3584),
        position_side=isqrt(num_entries),
        theta=read_theta(reader),
        deepstack_layers=deepstack_layers,
    )
    if config.position_side**2 != num_entries:
        raise reader.unsupported("num_position_embeddings", "the square of a whole number")
    config.require_heads(reader)
    if any(first >= second for first, second in pairwise(deepstack_layers)):
        raise reader.unsupported("deepstack_visual_indexes", "layers in ascending order")
    reader.finish()
    return config


def tensors(config: QwenVisionConfig, *, is_omni: bool = False) -> dict[str, EncoderTensor]:
    """Return the tower's tensors by canonical name; Qwen3-Omni names the tensors of mergers differently.

    The prefix is `model.visual.`, in Qwen3-Omni `thinker.visual.`.
    """
    hidden, cell = config.hidden_size, config.cell_size
    found = config.patch_kernel.tensors("patch_embed.proj")
    found["position"] = EncoderTensor("pos_embed.weight", (config.position_side**2, hidden))
    names = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.linear_fc1", "mlp.linear_fc2")
    found |= layer_tensors(config, config.mlp_width, "blocks", names)
    norm, up, down = ("ln_q", "mlp.0", "mlp.2") if is_omni else ("norm", "linear_fc1", "linear_fc2")
    deepstack = "merger_list" if is_omni else "deepstack_merger_list"
    mergers = {"merger": ("merger", hidden)}
    mergers |= {f"deepstack.{i}": (f"{deepstack}.{i}", cell) for i in range(len(config.deepstack_layers))}
    for ours, (theirs, norm_size) in mergers.items():
        found |= with_bias(f"{ours}.norm", f"{theirs}.{norm}", (norm_size,))
        found |= with_bias(f"{ours}.up", f"{theirs}.{up}", (cell, cell))
        found |= with_bias(f"{ours}.down", f"{theirs}.{down}", (config.out_size, cell))
    return found


def omni_angles(
    config: QwenVisionConfig, grid: Grid, *, seconds_per_frame: float, angles_per_second: int
) -> tuple[Rows, float]:
    """Return the rotary positions of a span in Qwen3-Omni, like `span_angles`; the time of a frame is in seconds.

    Args:
        seconds_per_frame: from one frame of the grid to the next; irrelevant for a picture.
        angles_per_second: `position_id_per_seconds` of the config.
    """
    angles, _ = span_angles(grid, config.merge)
    angles[0] = angles[0] * np.float32(seconds_per_frame) * np.float32(angles_per_second)
    return angles, float(angles.max() + 1)


def peak_bytes(config: QwenVisionConfig, grid: Grid) -> int:
    """Most bytes that `encode` allocates, its result included; native scratch memory is not counted."""
    hidden, cell = config.hidden_size, config.cell_size
    positions = num_positions(config, grid)
    patches = grid[0] * frame_patches(grid)
    stages = (
        block_floats(
            patches, 2 * hidden * config.patch_values, 3 * hidden + config.patch_kernel.floats_per_row + 32
        ),
        gelu_mlp_floats(patches, hidden, config.mlp_width),
        block_floats(positions, 2 * cell * (cell + config.out_size), 3 * cell),
    )
    results = positions * config.out_size * (1 + len(config.deepstack_layers))
    return tower_bytes(config, grid, frame_patches(grid), results, stages)


class QwenVisionTower(PatchTower[QwenVisionConfig]):
    """The tower with its weights."""

    _norm_eps = 1e-6

    def _taps(self, size: int, side: int) -> Taps:
        return linear_taps(size, side)

    def _add(self, layer: int, hidden: Rows, additions: dict[int, Rows]) -> Steps:
        if layer in self._config.deepstack_layers:
            addition = self._config.deepstack_layers.index(layer)
            additions[addition] = yield from self._merge_by(f"deepstack.{addition}", hidden)

    def _merge(self, hidden: Rows, grid: Grid) -> Generator[None, None, Rows]:
        return self._merge_by("merger", hidden)

    def _merge_by(self, name: str, hidden: Rows) -> Generator[None, None, Rows]:
        """Join the patches of each cell; deepstack mergers normalise the cell, the last one each patch."""
        ops = self._operations
        cells = hidden.reshape(-1, self._config.cell_size)
        merged = np.empty((len(cells), self._config.out_size), np.float32)

        def work(rows: slice) -> None:
            x = cells[rows] if name != "merger" else cells[rows].reshape(-1, self._config.hidden_size)
            normed = self._norm(f"{name}.norm", x).reshape(-1, self._config.cell_size)
            ops.linear(f"{name}.down", ops.linear(f"{name}.up", normed, finish="gelu_erf"), merged[rows])

        yield from in_blocks(work, range(len(cells)), ops.flop_per_row(f"{name}.up", f"{name}.down"))
        return merged


_OMNI_VIDEO = VideoForm(
    time_key="position_id_per_seconds",
    angles=lambda config, grid, seconds, per_second: omni_angles(
        config, grid, seconds_per_frame=seconds, angles_per_second=per_second
    ),
    sound=("<|audio_start|>", "<|audio_end|>"),
)


def _encoder(
    *path: str, prefix: str = "model.visual.", has_deepstack: bool = True, is_omni: bool = False
) -> Encoder:
    return Encoder(
        kind="picture",
        path=path,
        placeholders=("image_token_id",),
        prefix=prefix,
        read=lambda own, around, model: read_config(own, has_deepstack=has_deepstack),
        tensors=partial(tensors, is_omni=is_omni),
        open=QwenVisionTower,
        num_positions=num_positions,
        peak_bytes=peak_bytes,
        angles=lambda config, grid: span_angles(grid, config.merge),
        video=_OMNI_VIDEO if is_omni else VideoForm(),
    )


TOWERS: Mapping[str, Encoder] = {
    "qwen3_vl_moe": _encoder("vision_config"),
    "qwen3_5_moe": _encoder("vision_config", has_deepstack=False),
    "qwen4_exp": _encoder("vision_config", has_deepstack=False),
    "qwen3_omni_moe": _encoder("thinker_config", "vision_config", prefix="thinker.visual.", is_omni=True),
    # The demo model's eye; no model of transformers combines the two.
    "qwen2_moe": replace(_encoder("vision_config", prefix="visual."), angles=None, video=None),
}


def _read_qwen(reader: GgufConfigReader) -> dict[str, object]:
    raw = read_sizes(reader)
    reader.neutral("use_gelu", True)
    # The converter writes the text model's; the tower's is always 1e-6.
    reader.number("vision.attention.layer_norm_epsilon", 1e-6)
    patches_a_side = reader.integer("vision.image_size") // read_patch_size(reader)
    num_layers = reader.integer("vision.block_count", most=MOST_LAYERS)
    deepstack = reader.flags("vision.is_deepstack_layers", num_layers) or ()
    return raw | {
        "deepstack_visual_indexes": [layer for layer, is_merged in enumerate(deepstack) if is_merged],
        "num_position_embeddings": patches_a_side**2,
        "temporal_patch_size": 2,
    }


def _qwen_settings(reader: GgufConfigReader) -> dict[str, object]:
    """Return settings as in Qwen3-VL and Qwen3.6, or as in Qwen3-Omni, whose file also contains a tower for sound.

    They have 65,536 to 16,777,216 pixels, and 3,136 to 12,845,056; a token has 32 x 32.
    """
    limits = (3136, 12_845_056) if reader.file.flag("clip.has_audio_encoder", False) else (65_536, 16_777_216)
    return read_colours(reader) | {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": read_patch_size(reader),
        "merge_size": read_merge_size(reader),
        "size": read_pixels(reader, *limits, token=32),
        "temporal_patch_size": 2,
    }


PROJECTORS: Mapping[str, Projector] = {
    "qwen3vl_merger": Projector(
        families={
            "qwen3_vl_moe": "qwen3_vl_moe",
            "qwen3_5_moe_text": "qwen3_5_moe",
            "qwen4_exp_text": "qwen4_exp",
        },
        placeholder="<|image_pad|>",
        read_config=_read_qwen,
        read_settings=_qwen_settings,
        names={
            "patch": "v.patch_embd",
            "position": "v.position_embd",
            "merger.norm": "v.post_ln",
            "merger.up": "mm.0",
            "merger.down": "mm.2",
        },
        stored={"are_frames_apart": True},
    ),
}
