"""Towers of tiny checkpoints, without the engine's readers: tensors become matrices one by one."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from argosy import _native
from argosy.model.encoders import EncoderTensor, gemma_vision, glm_vision, moon_vit, omni_audio, qwen_vision
from argosy.model.families.config_reader import ConfigReader
from argosy.model.weights import DenseWeights, is_vector
from argosy.prompt.media_span import SpanRows
from tests.models.safetensors_file import Array
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


def reader(raw: RawConfig, *path: str) -> ConfigReader:
    for key in path:
        raw = raw[key]
    return ConfigReader(raw, "this family", Path("config.json"), within=path[-1])


def _grids(config: Any) -> list[Shape]:
    return [(frames, rows * config.merge, cols * config.merge) for frames, rows, cols in GRIDS]


def _stills(grids: Callable[[Any], list[Shape]]) -> Callable[[Any], list[Shape]]:
    """The same grids with one frame."""
    return lambda config: [(1, *grid[1:]) for grid in grids(config)]


def _large_grids(config: Any) -> list[Shape]:
    return [(frames, rows * config.merge, cols * config.merge) for frames, rows, cols in LARGE_GRIDS]


def _patches(config: Any, grid: Shape, seed: int) -> Array:
    return random_input((math.prod(grid), config.patch_values), seed)


def _vision(
    family: str, module: Any, tower: Any, path: tuple[str, ...] = ("vision_config",), **changes: Any
) -> Part:
    """A part whose file has the usual functions; `changes` are the fields in which it differs."""
    usual = {
        "prefix": "model.visual.",
        "kind": "picture",
        "modules": ("model.visual.",),
        "read": lambda raw: module.read_config(reader(raw, *path)),
        "tensors": module.tensors,
        "num_positions": module.num_positions,
        "peak_bytes": module.peak_bytes,
        "angles": lambda config, grid: module.span_angles(grid, config.merge),
        "shapes": _grids,
        "large_shapes": _large_grids,
        "make_input": _patches,
    }
    return Part(**{"family": family, "tower": tower} | usual | changes)


def _read_qwen3_5(raw: RawConfig) -> Any:
    return qwen_vision.read_config(reader(raw, "vision_config"), has_deepstack=False)


def _omni_angles(config: Any, grid: Any) -> tuple[Array, float]:
    return qwen_vision.omni_angles(
        config, grid, seconds_per_frame=SECONDS_PER_FRAME, angles_per_second=ANGLES_PER_SECOND
    )


def _read_gemma(raw: RawConfig) -> Any:
    text = raw["text_config"]
    return gemma_vision.read_config(reader(raw, "vision_config"), hidden_size=text["hidden_size"])


def _read_kimi(raw: RawConfig) -> Any:
    text = raw["text_config"]
    return moon_vit.read_config(
        reader(raw, "vision_config"), ConfigReader(raw, "this family"), hidden_size=text["hidden_size"]
    )


PARTS = {
    "qwen3_vl_moe": _vision("qwen3_vl_moe", qwen_vision, qwen_vision.QwenVisionTower),
    "qwen3_5_moe": _vision("qwen3_5_moe", qwen_vision, qwen_vision.QwenVisionTower, read=_read_qwen3_5),
    "qwen3_omni_moe": _vision(
        "qwen3_omni_moe",
        qwen_vision,
        qwen_vision.QwenVisionTower,
        ("thinker_config", "vision_config"),
        prefix="thinker.visual.",
        tensors=partial(qwen_vision.tensors, is_omni=True),
        angles=_omni_angles,
    ),
    "qwen3_omni_moe_audio": Part(
        family="qwen3_omni_moe",
        prefix="thinker.audio_tower.",
        kind="sound",
        modules=("model.audio_tower.",),
        read=lambda raw: omni_audio.read_config(reader(raw, "thinker_config", "audio_config")),
        tensors=omni_audio.tensors,
        tower=omni_audio.OmniAudioTower,
        num_positions=lambda config, shape: omni_audio.num_positions(config, *shape),
        peak_bytes=lambda config, shape: omni_audio.peak_bytes(config, *shape),
        angles=None,
        shapes=lambda config: [(length,) for length in LENGTHS],
        large_shapes=lambda config: [(length,) for length in LARGE_LENGTHS],
        make_input=lambda config, shape, seed: random_input((config.num_mels, *shape), seed),
    ),
    "glm4v_moe": _vision("glm4v_moe", glm_vision, glm_vision.GlmVisionTower),
    "kimi_k25": _vision(
        "kimi_k25",
        moon_vit,
        moon_vit.MoonViT,
        prefix="",
        modules=("model.vision_tower.", "model.mm_projector."),
        read=_read_kimi,
        angles=None,
    ),
    "gemma4": _vision(
        "gemma4",
        gemma_vision,
        gemma_vision.GemmaVisionTower,
        prefix="model.",
        modules=("model.vision_tower.", "model.embed_vision."),
        read=_read_gemma,
        angles=None,
        shapes=_stills(_grids),
        large_shapes=_stills(_large_grids),
    ),
}


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
