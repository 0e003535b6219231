"""Read all weights of a model as float32, from whatever formats its files have."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.landing import MatrixRef, Piece, read_landed
from argosy.checkpoint.untrusted_file import open_regular, read_at
from argosy.config import AttentionConfig, LayerConfig, ModelConfig
from argosy.errors import UnsupportedModel

Float32 = NDArray[np.float32]
_SLICE_VALUES = 1 << 20
FAMILIES = ("qwen2_moe",)


@dataclass(frozen=True, slots=True)
class Weights:
    """float32: matrices [rows, columns] and vectors by canonical name.

    gate_up: by layer [experts, 2 * width, hidden_size].   down: by layer [experts, hidden_size, width].
    """

    dense: dict[str, Float32]
    gate_up: dict[int, Float32]
    down: dict[int, Float32]


def require_trainable(config: ModelConfig, name: str) -> None:
    """Check that `mixture.py` has everything that the model has.

    Raises:
        UnsupportedModel: it has something else.
    """
    plain = AttentionConfig(
        num_heads=config.attention.num_heads,
        num_kv_heads=config.attention.num_kv_heads,
        head_dim=config.attention.head_dim,
        rope=config.attention.rope,
        has_qkv_bias=config.attention.has_qkv_bias,
    )
    rope = plain.rope
    if (
        config.family not in FAMILIES
        or set(config.layers) != {LayerConfig(mixer=plain, is_moe=True)}
        or rope is None
        or rope.kind != "default"
        or rope.frequency_factors
    ):
        raise UnsupportedModel(
            f"{name} cannot be trained here: needs the family {' or '.join(FAMILIES)} with full attention and experts "
            f"in every layer; found {config.family}",
            hint="train an adapter for it with PEFT or Unsloth; `--lora` runs it here",
            key="family",
            value=config.family,
        )


def num_values(files: ModelFiles) -> int:
    """Return how many values `read_weights` returns."""
    dense = sum(ref.rows * ref.cols for ref in files.dense.values())
    return dense + sum(
        run.num_experts * sum(matrix.rows * matrix.cols for matrix in run.record.matrices)
        for run in files.records.runs()
    )


def num_pair_values(config: ModelConfig, rank: int) -> int:
    """Return how many values the pairs of `mixture.py` have."""
    attention, hidden, width = config.attention, config.hidden_size, config.expert_width
    query, value = (attention.head_dim * count for count in (attention.num_heads, attention.num_kv_heads))
    dense = 2 * (hidden + query) + 2 * (hidden + value)
    experts = config.num_experts * ((hidden + 2 * width) + (width + hidden))
    return rank * config.num_layers * (dense + experts)


def read_weights(files: ModelFiles, progress: Callable[[str, float], None] | None = None) -> Weights:
    """Read every weight.

    Raises:
        CheckpointError: a file cannot be read, or a weight is refused.
    """
    config = files.config
    with ExitStack() as opened:
        descriptors: dict[Path, int] = {}

        def read(piece: Piece) -> bytes:
            if piece.path not in descriptors:
                descriptors[piece.path] = opened.enter_context(open_regular(piece.path))[0]
            return read_at(descriptors[piece.path], piece.nbytes, piece.offset, piece.path)

        dense = {name: _values(ref, read) for name, ref in files.dense.items()}
        gate_up, down = {}, {}
        for layer in config.moe_layers:
            if progress is not None:
                progress("reading the weights", layer / config.num_layers)
            records = [files.experts[layer, expert] for expert in range(config.num_experts)]
            parts = [
                [_values(one.matrix(name, f"layers.{layer}.{name}"), read) for one in records]
                for name in ("gate", "up", "down")
            ]
            gate_up[layer] = np.concatenate([np.stack(parts[0]), np.stack(parts[1])], axis=1)
            down[layer] = np.stack(parts[2])
    return Weights(dense, gate_up, down)


def _values(ref: MatrixRef, read: Callable[[Piece], bytes]) -> Float32:
    landed = read_landed(ref, read)
    values = np.concatenate([rows for _, rows in ref.landing.values(ref, landed, 0, _SLICE_VALUES)])
    return values.reshape(-1) if ref.rows == 1 else values
