"""Merge an adapter into a model's weights in memory, as float32: what the same model with the adapter must compute."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from argosy import _native
from argosy.adapters.files import AdapterFiles, LowRank
from argosy.config import LatentConfig, ModelConfig
from argosy.model.weights import DenseWeights
from tests.adapters.random_adapter import as_doubles, delta, embedding_delta


def merge_dense(
    config: ModelConfig, weights: DenseWeights, files: AdapterFiles
) -> tuple[ModelConfig, DenseWeights]:
    """Return the model with all dense pairs added and matrices replaced. Its head is its own, even if it was tied."""
    config = replace(config, is_embedding_tied=False)
    values = {name: _values(matrix) for name, matrix in weights.matrices.items()}
    values.setdefault("head", values["embed"])
    for name, one in files.replaced.items():
        values[name] = as_doubles(one.values, one.format)
    if files.embedding is not None:
        values["embed"] = values["embed"] + embedding_delta(files.embedding)
        if (lengths := files.embedding.magnitude) is not None:
            axis = 0 if len(lengths) == 1 else 1
            values["embed"] *= lengths / np.linalg.norm(values["embed"], axis=axis, keepdims=True)
    for name, pairs in files.dense.items():
        prefix, _, last = name.rpartition(".")
        if last == "k_up":
            mixer = config.layers[int(prefix.split(".")[1])].mixer
            assert isinstance(mixer, LatentConfig)
            rows = mixer.num_heads * mixer.nope_dim
            shape = mixer.num_heads, mixer.kv_rank, mixer.nope_dim
            own = values[name].reshape(shape).transpose(0, 2, 1).reshape(rows, -1)
            own = _merged(own, pairs).reshape(mixer.num_heads, mixer.nope_dim, mixer.kv_rank)
            values[name] = own.transpose(0, 2, 1).reshape(values[name].shape)
        else:
            values[name] = _merged(values[name], pairs)
    return config, replace(weights, matrices={name: _matrix(each) for name, each in values.items()})


def _merged(matrix: NDArray[np.float64], pairs: tuple[LowRank, ...]) -> NDArray[np.float64]:
    merged = matrix + delta(pairs, len(matrix))
    if (lengths := pairs[0].magnitude) is None:
        return merged
    return merged * (lengths / np.linalg.norm(merged, axis=1))[:, None]


def _values(matrix: _native.Matrix) -> NDArray[np.float64]:
    runtime = _native.Runtime(1)
    rows = np.arange(matrix.rows, dtype=np.int32)
    out = np.empty((matrix.rows, matrix.cols), np.float32)
    _native.embed(runtime, matrix, rows, out)
    return out.astype(np.float64)


def _matrix(values: NDArray[np.float64]) -> _native.Matrix:
    content = values.astype(np.float32)
    arena = _native.Arena(max(1, content.nbytes))
    arena.array()[: content.nbytes] = content.reshape(-1).view(np.uint8)
    return _native.Matrix(arena, 0, "f32", *content.shape)
