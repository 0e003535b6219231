"""Towers of tiny checkpoints, without the engine's readers: tensors become matrices one by one."""

from __future__ import annotations

import gc
import math
import tracemalloc
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal, TypeVar

import numpy as np

from argosy import _native
from argosy.model.encoders import EncoderTensor, deep_encoder, qwen_vision
from argosy.model.encoders.deep_encoder_config import DeepEncoderConfig, SecondConfig
from argosy.model.encoders.encoder import Encoder
from argosy.model.encoders.sam_vision import SamConfig
from argosy.model.encoders.table import ENCODERS
from argosy.model.reading.config_reader import ConfigReader
from argosy.model.weights import DenseWeights, is_vector
from argosy.prompt.media_span import SpanRows
from tests.models.safetensors_file import Array
from tests.models.tiny import text_of
from tests.models.tiny_encoders import (
    ANGLES_PER_SECOND,
    GRIDS,
    LARGE_GRIDS,
    LARGE_LENGTHS,
    LENGTHS,
    SECONDS_PER_FRAME,
    RawConfig,
    random_input,
)

ALIGNMENT = _native.MATRIX_ALIGNMENT


Shape = tuple[int, ...]  # a grid of patches, or the number of mel frames


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One tower of a family: where its tensors are, and the functions of its file.

    kind: what it encodes.   modules: prefixes of its modules in transformers.
    shapes, large_shapes: shapes of inputs, for references and to measure memory.   make_input: an input of a shape.
    """

    family: str
    prefix: str
    kind: Literal["picture", "sound"]
    modules: tuple[str, ...]
    read: Callable[[RawConfig], Any]
    tensors: Callable[[Any], dict[str, EncoderTensor]]
    tower: Callable[..., Any]
    num_positions: Callable[[Any, Any], int]
    peak_bytes: Callable[[Any, Any], int]
    angles: Callable[[Any, Any], tuple[Array, float]] | None
    shapes: Callable[[Any], list[Shape]]
    large_shapes: Callable[[Any], list[Shape]]
    make_input: Callable[[Any, Shape, int], Array]

    def encode(self, tower: Any, value: Array, shape: Shape) -> Generator[None, None, SpanRows]:
        steps: Generator[None, None, SpanRows] = (
            tower.encode(value, shape) if self.kind == "picture" else tower.encode(value)
        )
        return steps


def _grids(config: Any) -> list[Shape]:
    return [(frames, rows * config.merge, cols * config.merge) for frames, rows, cols in GRIDS]


def _stills(grids: Callable[[Any], list[Shape]]) -> Callable[[Any], list[Shape]]:
    """The same grids with one frame."""
    return lambda config: [(1, *grid[1:]) for grid in grids(config)]


def _large_grids(config: Any) -> list[Shape]:
    return [(frames, rows * config.merge, cols * config.merge) for frames, rows, cols in LARGE_GRIDS]


def _patches(config: Any, grid: Shape, seed: int) -> Array:
    return random_input((math.prod(grid), config.patch_values), seed)


def _part(family: str, encoder: Encoder, modules: tuple[str, ...], **changes: Any) -> Part:
    """A part whose functions are those of the engine's table; `changes` are the fields in which it differs."""

    def read(raw: RawConfig) -> Any:
        around, model = (
            raw,
            SimpleNamespace(
                hidden_size=text_of(raw).get("hidden_size"), norm_eps=text_of(raw).get("rms_norm_eps")
            ),
        )
        for key in encoder.path[:-1]:
            around = around[key]
        last = encoder.path[-1]
        outer = ConfigReader(around, "this family")
        inner = outer.beginning_with(last[:-1]) if last.endswith("*") else around[last]
        own = ConfigReader(inner, "this family", within=last)
        return encoder.read(own, ConfigReader(around, "this family"), model)  # type: ignore[arg-type]

    usual = {
        "family": family,
        "prefix": encoder.prefix,
        "kind": encoder.kind,
        "modules": modules,
        "read": read,
        "tensors": encoder.tensors,
        "tower": encoder.open,
        "num_positions": encoder.num_positions,
        "peak_bytes": encoder.peak_bytes,
        "angles": encoder.angles,
        "shapes": _grids,
        "large_shapes": _large_grids,
        "make_input": _patches,
    }
    return Part(**usual | changes)


def _omni_angles(config: Any, grid: Any) -> tuple[Array, float]:
    """Those of a video."""
    return qwen_vision.omni_angles(
        config, grid, seconds_per_frame=SECONDS_PER_FRAME, angles_per_second=ANGLES_PER_SECOND
    )


PARTS = {
    **{
        family: _part(family, *ENCODERS[family], ("model.visual.",))  # type: ignore[call-arg]
        for family in ("qwen3_vl_moe", "qwen3_5_moe", "glm4v_moe")
    },
    "qwen3_omni_moe": _part(
        "qwen3_omni_moe", ENCODERS["qwen3_omni_moe"][0], ("model.visual.",), angles=_omni_angles
    ),
    "qwen3_omni_moe_audio": _part(
        "qwen3_omni_moe",
        ENCODERS["qwen3_omni_moe"][1],
        ("model.audio_tower.",),
        shapes=lambda config: [(length,) for length in LENGTHS],
        large_shapes=lambda config: [(length,) for length in LARGE_LENGTHS],
        make_input=lambda config, shape, seed: random_input((config.num_mels, *shape), seed),
    ),
    "qwen2_moe": _part(
        "qwen2_moe", ENCODERS["qwen2_moe"][0], (), shapes=_stills(_grids), large_shapes=_stills(_large_grids)
    ),
    "qwen2_moe_audio": _part(
        "qwen2_moe",
        ENCODERS["qwen2_moe"][1],
        ("model.audio_tower.", "model.multi_modal_projector."),
        shapes=lambda config: [(length,) for length in LENGTHS],
        large_shapes=lambda config: [(length,) for length in LARGE_LENGTHS],
        make_input=lambda config, shape, seed: random_input((config.num_mels, *shape), seed),
    ),
    "kimi_k25": _part("kimi_k25", *ENCODERS["kimi_k25"], ("model.vision_tower.", "model.mm_projector.")),  # type: ignore[call-arg]
    "gemma4": _part(  # type: ignore[call-arg]
        "gemma4",
        *ENCODERS["gemma4"],
        ("model.vision_tower.", "model.embed_vision."),
        shapes=_stills(_grids),
        large_shapes=_stills(_large_grids),
    ),
}


PARTS["glm5_next"] = _part(  # type: ignore[call-arg]
    "glm5_next",
    *ENCODERS["glm5_next"],
    ("model.visual.",),
    shapes=_stills(_grids),
    large_shapes=_stills(_large_grids),
)
PARTS["kimi_k3"] = _part(  # type: ignore[call-arg]
    "kimi_k3", *ENCODERS["kimi_k3"], (), shapes=_stills(_grids), large_shapes=_stills(_large_grids)
)
PARTS |= {
    family: _part(  # type: ignore[call-arg]
        family,
        *ENCODERS[family],
        (),
        # Patches are no whole squares.
        shapes=lambda config: [(1, rows, columns) for rows, columns in ((1, 1), (3, 5), (2, 9), (7, 4))],
        large_shapes=lambda config: [(1, 71, 40), (1, 2, 480), (1, 61, 47)],
    )
    for family in ("deepseek_v4", "deepseek_v41")
}
PARTS["minimax_m3_vl"] = _part(  # type: ignore[call-arg]
    "minimax_m3_vl",
    *ENCODERS["minimax_m3_vl"],
    ("model.vision_tower.", "model.multi_modal_projector."),
    shapes=_stills(_grids),
    large_shapes=_stills(_large_grids),
)
PARTS["mistral3"] = _part(  # type: ignore[call-arg]
    "mistral3",
    *ENCODERS["mistral3"],
    ("model.vision_tower.", "model.multi_modal_projector."),
    shapes=_stills(_grids),
    large_shapes=_stills(_large_grids),
)


def _tiles(*arrangements: tuple[int, int]) -> Callable[[Any], list[Shape]]:
    """Shapes of pictures in rows and columns of tiles; several have one more row, for the whole picture."""
    return lambda config: [
        (1, (rows + (rows * columns > 1)) * config.position_side, columns * config.position_side)
        for rows, columns in arrangements
    ]


PARTS["llama4"] = _part(  # type: ignore[call-arg]
    "llama4",
    *ENCODERS["llama4"],
    ("vision_model.", "multi_modal_projector."),
    shapes=_tiles((1, 1), (1, 2), (2, 1), (2, 2)),
    large_shapes=_tiles((4, 4), (1, 16)),
    make_input=lambda config, shape, seed: random_input(
        (config.num_tiles(shape) * config.position_side**2, config.patch_values), seed
    ),
)


def _copied_tiles(*counts: int) -> Callable[[Any], list[Shape]]:
    return lambda config: [(1, count * config.position_side, config.position_side) for count in counts]


PARTS["internvl"] = _part(  # type: ignore[call-arg]
    "internvl",
    *ENCODERS["internvl"],
    ("model.vision_tower.", "model.multi_modal_projector."),
    shapes=_copied_tiles(1, 2, 3, 1),
    large_shapes=_copied_tiles(40, 7, 13),
)


def _windows(*arrangements: tuple[int, int]) -> Callable[[Any], list[Shape]]:
    """Shapes of pictures in rows and columns of windows of 8 patches; below them, or beside one row, a view of 12."""
    shapes: list[Shape] = [
        (1, 12 + 8 * rows, max(12, 8 * columns)) if rows > 1 else (1, 12, 12 + 8 * columns)
        for rows, columns in arrangements
    ]
    return lambda config: shapes


PARTS["step3p7"] = _part(  # type: ignore[call-arg]
    "step3p7",
    *ENCODERS["step3p7"],
    ("model.vision_model.", "model.multi_modal_projector."),
    shapes=_windows((0, 0), (1, 2), (2, 1), (2, 3)),
    large_shapes=_windows((4, 4), (1, 16)),
    make_input=lambda config, shape, seed: random_input(
        (sum(side**2 for side in config.views(shape)), config.patch_values), seed
    ),
)


def _clip_config(raw: RawConfig) -> DeepEncoderConfig:
    """The tower of DeepSeek-OCR with the sizes of another, smaller than those that its own form can say."""
    vision = raw["vision_config"]
    sam, second = vision["sam_config"], vision["encoder_config"]
    side = sam["image_size"] // sam["patch_size"]
    return DeepEncoderConfig(
        sam=SamConfig(
            num_layers=sam["num_hidden_layers"],
            hidden_size=sam["hidden_size"],
            num_heads=sam["num_attention_heads"],
            mlp_width=sam["mlp_dim"],
            patch_size=sam["patch_size"],
            position_side=side,
            window=sam["window_size"],
            global_layers=frozenset(sam["global_attn_indexes"]),
            neck_width=sam["output_channels"],
            channels=(sam["downsample_channels"][0], second["hidden_size"]),
            has_qkv_bias=True,
            norm_eps=1e-6,
        ),
        second=SecondConfig(
            kind="clip",
            num_layers=second["num_hidden_layers"],
            hidden_size=second["hidden_size"],
            num_heads=second["num_attention_heads"],
            num_kv_heads=second["num_attention_heads"],
            mlp_width=second["intermediate_size"],
            norm_eps=1e-5,
            position_side=second["image_size"] // second["patch_size"],
        ),
        out_size=raw["text_config"]["hidden_size"],
        tile_side=8,
        whole_side=12,
    )


def _tiles_and_whole(*arrangements: tuple[int, int]) -> Callable[[Any], list[Shape]]:
    """Shapes of pictures in rows and columns of tiles above the whole; without tiles, of the whole alone."""
    return lambda config: [
        (1, rows * config.tile_side + config.whole_side, max(columns * config.tile_side, config.whole_side))
        for rows, columns in arrangements
    ]


PARTS["unlimited_ocr"] = _part(
    "unlimited_ocr",
    ENCODERS["deepseek_vl_v2"][0],
    ("model.vision_tower.", "model.multi_modal_projector.", "model.image_newline", "model.view_separator"),
    read=_clip_config,
    shapes=_tiles_and_whole((0, 0), (1, 2), (2, 1), (2, 2)),
    large_shapes=_tiles_and_whole((0, 0), (9, 1), (2, 3)),
    make_input=lambda config, shape, seed: random_input(
        (deep_encoder.extent(config, shape)[0], config.patch_values), seed
    ),
)


def dense_weights(
    tensors: Mapping[str, EncoderTensor], prefix: str, values: Mapping[str, Array]
) -> DenseWeights:
    """The tensors as the engine's readers give them: matrices in bfloat16, vectors in float32."""
    formats = {name: (tensor.rows, tensor.cols) for name, tensor in tensors.items() if not is_vector(name)}
    starts, end = {}, 0
    for name, shape in formats.items():
        starts[name] = end
        end += -(-_native.matrix_bytes("bf16", *shape) // ALIGNMENT) * ALIGNMENT
    arena = _native.Arena(max(end, 1))
    matrices, vectors = {}, {}
    for name, tensor in tensors.items():
        value = values[prefix + tensor.name]
        assert value.shape == tensor.shape, (name, value.shape, tensor.shape)
        if is_vector(name):
            vectors[name] = value.reshape(-1).astype(np.float32)
            continue
        if tensor.taps:  # [out, in, height, width] -> [out, height, width, in]
            value = np.moveaxis(value, 1, -1)
        shape = formats[name]
        out = arena.array()[starts[name] :][: _native.matrix_bytes("bf16", *shape)]
        _native.quantize("bf16", np.ascontiguousarray(value.reshape(shape)), out)
        matrices[name] = _native.Matrix(arena, starts[name], "bf16", *shape)
    return DenseWeights(matrices, vectors, arena)


Result = TypeVar("Result")


def finish(steps: Generator[None, None, Result]) -> Result:
    """Run an encoder, or the reading of one, to its end."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: Result = end.value
            return result


def peak_of(steps: Generator[Any, None, Any]) -> int:
    """Run an encoder to its end; return the most bytes that it held at once.

    tracemalloc counts what numpy and the interpreter hold. The interpreter keeps up to 2,000 freed tuples of each
    length for reuse: up to 100 KB, depending on what ran before. A collection returns them, so there is one after
    each step; it is fast because everything that existed before is frozen, and stays so: what tests/conftest.py froze
    would make each later collection take half a second.
    """
    gc.collect()
    gc.freeze()
    tracemalloc.start()
    try:
        for _ in steps:
            gc.collect()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
