"""A model of dense layers with multi-head latent attention, made without a checkpoint, and its logits in float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from argosy import _native
from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.formats import matrix_bytes
from argosy.checkpoint.geometry import dense_shapes
from argosy.checkpoint.landing import MatrixRef
from argosy.config import Format, LatentConfig, LayerConfig, ModelConfig, RopeConfig, RouterConfig
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
            hidden = hidden + self._attention(part, norm(hidden, part["attn_norm"], self.config.norm_eps))
            normed = norm(hidden, part["mlp_norm"], self.config.norm_eps)
            gate, up = normed @ part["gate"].T, normed @ part["up"].T
            hidden = hidden + (gate / (1 + np.exp(-gate)) * up) @ part["down"].T
        return norm(hidden, self.values["final_norm"], self.config.norm_eps) @ self.values["head"].T

    def _attention(self, part: dict[str, Array], x: Array) -> Array:
        latent, tokens = self.config.latent, len(x)
        assert latent is not None
        heads = latent.num_heads
        if latent.query_rank:
            query = norm(x @ part["q_down"].T, part["q_down_norm"], latent.norm_eps) @ part["q_up"].T
        else:
            query = x @ part["q"].T
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
        scores += np.where(np.tril(np.ones((tokens, tokens))) > 0, 0, -np.inf)
        weights = np.exp(scores - scores.max(axis=2, keepdims=True))
        weights /= weights.sum(axis=2, keepdims=True)
        out = np.einsum("hqk,khv->qhv", weights, keys_values[:, :, latent.nope_dim :], optimize=True)
        return out.reshape(tokens, -1) @ part["o"].T

    def _turn(self, x: Array) -> Array:
        (rope,) = self.config.ropes
        angle = np.arange(len(x))[:, None, None] * inverse_frequency(rope)
        out = x.copy()
        half = x.shape[-1] // 2
        first, second = (
            (slice(0, None, 2), slice(1, None, 2))
            if rope.is_interleaved
            else (slice(0, half), slice(half, None))
        )
        a, b = x[:, :, first], x[:, :, second]
        out[:, :, first] = a * np.cos(angle) - b * np.sin(angle)
        out[:, :, second] = b * np.cos(angle) + a * np.sin(angle)
        return out


def norm(x: Array, weight: Array, eps: float) -> Array:
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight
