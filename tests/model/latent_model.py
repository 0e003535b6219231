"""A model of dense layers with multi-head latent attention, made without a checkpoint, and its logits in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from argosy import _native
from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.formats import matrix_bytes
from argosy.checkpoint.geometry import dense_shapes
from argosy.checkpoint.landing import MatrixRef
from argosy.config import (
    Format,
    IndexConfig,
    LatentConfig,
    LayerConfig,
    ModelConfig,
    RopeConfig,
    RouterConfig,
)
from argosy.model.rope import inverse_frequency
from argosy.model.weights import is_vector

Array = NDArray[np.float64]

QUERY_RANK = LatentConfig(
    num_heads=5, query_rank=28, kv_rank=36, nope_dim=12, rope_dim=10, value_dim=14, norm_eps=1e-5,
    rope=RopeConfig(theta=1e4, rotary_dim=10, is_interleaved=True),
)  # fmt: skip
PLAIN_QUERY = LatentConfig(
    num_heads=5, query_rank=0, kv_rank=48, nope_dim=16, rope_dim=8, value_dim=16, norm_eps=1e-6,
    rope=RopeConfig(theta=1e4, rotary_dim=8, is_interleaved=True),
)  # fmt: skip


# Layers that choose positions in the other pairing of dimensions, share a choice, and choose again.
INDEX = IndexConfig(num_chosen=17, num_heads=3, head_dim=14, is_interleaved=False, norm_eps=1e-6)


def indexed_config(
    index: IndexConfig = INDEX, *, kinds: Sequence[str] = ("own", "shared", "own")
) -> ModelConfig:
    layers = (replace(QUERY_RANK, index=replace(index, kind=kind)) for kind in kinds)
    config = latent_config(QUERY_RANK)
    return replace(
        config,
        context_tokens=32_768,
        layers=tuple(LayerConfig(mixer=layer, is_moe=False) for layer in layers),
    )


def latent_config(latent: LatentConfig, *, is_interleaved: bool = True, num_heads: int = 5) -> ModelConfig:
    rope = replace(latent.rope, is_interleaved=is_interleaved)
    mixer = replace(latent, num_heads=num_heads, rope=rope)
    return ModelConfig(
        family="deepseek_v3",
        vocab_size=61,
        hidden_size=40,
        layers=(LayerConfig(mixer=mixer, is_moe=False),) * 2,
        norm_eps=1e-5,
        context_tokens=512,
        num_experts=0,
        experts_per_token=0,
        expert_width=0,
        router=RouterConfig(),
        dense_width=56,
    )


# As in GLM-5.3: positions are chosen in groups by keys that are pooled, and nothing rotates.
GROUPS = replace(INDEX, num_chosen=16, group_size=4)


def grouped_config(index: IndexConfig = GROUPS) -> ModelConfig:
    return indexed_config(index).with_mixers(LatentConfig, rope=None)


class LatentModel:
    """Random weights of a config in one file; matrices in `format`."""

    def __init__(self, directory: Path, config: ModelConfig, format: Format = "f32") -> None:
        self.config = config
        self.values: dict[str, Array] = {}
        path, content = directory / "dense.bin", bytearray()
        refs: dict[str, MatrixRef] = {}
        for seed, (name, shape) in enumerate(dense_shapes(config)):
            values = np.random.default_rng(seed).standard_normal(shape, np.float32)
            values = 1 + values / 8 if is_vector(name) else values / np.float32(shape[-1] ** 0.5)
            rows, cols = (1, *shape)[-2:]
            kind: Format = "f32" if is_vector(name) else format
            data = np.empty(matrix_bytes(kind, rows, cols), np.uint8)
            _native.quantize(kind, values.reshape(rows, cols), data)
            self.values[name] = _native.dequantize(kind, data, rows, cols).reshape(shape).astype(np.float64)
            checksum = _native.crc32c_wide(data.tobytes())
            refs[name] = MatrixRef(name, path, len(content), data.nbytes, kind, rows, cols, checksum)
            content += data.tobytes() + b"\xff" * (-data.nbytes % 64)
        path.write_bytes(content)
        self.files = ModelFiles(directory, config, refs, {})

    def logits(self, token_ids: list[int]) -> Array:
        """Return a sequence's logits in float64, with attention in its plain form: keys and values for every head."""
        hidden = self.values["embed"][token_ids]
        for layer in range(self.config.num_layers):
            part = {
                name.removeprefix(f"layers.{layer}."): value
                for name, value in self.values.items()
                if name.startswith(f"layers.{layer}.")
            }
            mixer = self.config.layers[layer].mixer
            assert isinstance(mixer, LatentConfig)
            normed = norm(hidden, part["attn_norm"], self.config.norm_eps)
            hidden = hidden + self._attention(mixer, part, normed)
            normed = norm(hidden, part["mlp_norm"], self.config.norm_eps)
            gate, up = normed @ part["gate"].T, normed @ part["up"].T
            hidden = hidden + (gate / (1 + np.exp(-gate)) * up) @ part["down"].T
        return norm(hidden, self.values["final_norm"], self.config.norm_eps) @ self.values["head"].T

    def _attention(self, latent: LatentConfig, part: dict[str, Array], x: Array) -> Array:
        tokens, heads = len(x), latent.num_heads
        if latent.query_rank:
            query_latent = norm(x @ part["q_down"].T, part["q_down_norm"], latent.norm_eps)
            query = query_latent @ part["q_up"].T
        else:
            query = x @ part["q"].T
        is_seen = np.tril(np.ones((tokens, tokens), bool))
        if latent.own_index is not None:
            self._chosen = self._choose(latent.own_index, part, x, query_latent, is_seen)
        if latent.index is not None:
            is_seen = is_seen & self._chosen
        query = query.reshape(tokens, heads, -1)
        down = x @ part["kv_down"].T
        compressed = norm(down[:, : latent.kv_rank], part["kv_norm"], latent.norm_eps)
        keys_values = (compressed @ part["kv_up"].T).reshape(
            tokens, heads, latent.nope_dim + latent.value_dim
        )
        shared_key = self._turn(down[:, None, latent.kv_rank :]).repeat(heads, axis=1)
        key = np.concatenate([keys_values[:, :, : latent.nope_dim], shared_key], axis=2)
        query = np.concatenate(
            [query[:, :, : latent.nope_dim], self._turn(query[:, :, latent.nope_dim :])], axis=2
        )
        scores = (
            np.einsum("qhd,khd->hqk", query, key, optimize=True) * (latent.nope_dim + latent.rope_dim) ** -0.5
        )
        scores[:, ~is_seen] = -np.inf
        weights = np.exp(scores - scores.max(axis=2, keepdims=True))
        weights /= weights.sum(axis=2, keepdims=True)
        out = np.einsum("hqk,khv->qhv", weights, keys_values[:, :, latent.nope_dim :], optimize=True)
        return out.reshape(tokens, -1) @ part["o"].T

    def _choose(
        self,
        index: IndexConfig,
        part: dict[str, Array],
        x: Array,
        query_latent: Array,
        is_seen: NDArray[np.bool_],
    ) -> NDArray[np.bool_]:
        """Return [token, position], whether the token sees the position."""
        rotary_dim = max((rope.rotary_dim for rope in self.config.ropes), default=0)
        query = (query_latent @ part["index_q"].T).reshape(len(x), index.num_heads, -1)
        key = x @ part["index_k"].T
        key = key - key.mean(axis=1, keepdims=True)
        key = norm(key, part["index_k_norm"], index.norm_eps) + part["index_k_norm_bias"]
        query, key = (
            np.concatenate(
                [self._turn(y[..., :rotary_dim], index.is_interleaved), y[..., rotary_dim:]],
                axis=2,
            )
            for y in (query, key[:, None])
        )
        size = index.group_size
        if size > 1:
            whole = len(x) // size * size
            gate = (x @ part["index_gate"].T)[:whole].reshape(-1, size, index.head_dim) + part[
                "index_gate_bias"
            ]
            shares = np.exp(gate) / np.exp(gate).sum(axis=1, keepdims=True)
            key = (shares * key[:whole].reshape(gate.shape)).sum(axis=1)[:, None]
        scores = np.zeros((len(x), len(key)))
        for head, weights in enumerate((x @ part["index_weights"].T).T):
            scores += weights[:, None] * np.maximum(query[:, head] @ key[:, 0].T, 0)
        is_whole = is_seen[:, size - 1 :: size]  # a group is seen with its last position
        order = np.argsort(-np.where(is_whole, scores, -np.inf), axis=1, kind="stable")
        is_chosen = np.zeros_like(is_whole)
        np.put_along_axis(is_chosen, order[:, : index.num_chosen // size], True, axis=1)
        positions = np.arange(len(x))
        is_unfinished = positions >= (positions[:, None] + 1) // size * size
        groups = np.minimum(positions // size, len(key) - 1)
        return (is_chosen[:, groups] & (positions // size < len(key))) | is_unfinished

    def _turn(self, x: Array, is_interleaved: bool | None = None) -> Array:
        if not self.config.ropes:
            return x
        (rope,) = self.config.ropes
        is_interleaved = rope.is_interleaved if is_interleaved is None else is_interleaved
        angle = np.arange(len(x))[:, None, None] * inverse_frequency(rope)
        out = x.copy()
        half = x.shape[-1] // 2
        first, second = (
            (slice(0, None, 2), slice(1, None, 2)) if is_interleaved else (slice(0, half), slice(half, None))
        )
        a, b = x[:, :, first], x[:, :, second]
        out[:, :, first] = a * np.cos(angle) - b * np.sin(angle)
        out[:, :, second] = b * np.cos(angle) + a * np.sin(angle)
        return out


def norm(x: Array, weight: Array, eps: float) -> Array:
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight
