"""A gated delta net in numpy and float64, token by token: the formula of arXiv:2412.06464 as Qwen3-Next uses it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tests.models.safetensors_file import Array
from tests.models.tiny_delta import RawConfig


def delta_net(config: RawConfig, tensors: Mapping[str, Array], prefix: str, x: Array) -> Array:
    """Return what the layer adds for the normed input x [tokens, hidden]; its tensors' names start with `prefix`."""
    key_heads, value_heads = config["linear_num_key_heads"], config["linear_num_value_heads"]
    key_dim, value_dim = config["linear_key_head_dim"], config["linear_value_head_dim"]
    num_tokens, shared_by = len(x), value_heads // key_heads

    def project(name: str) -> Array:
        return x @ tensors[f"{prefix}in_proj_{name}.weight"].T

    if prefix + "in_proj_qkvz.weight" in tensors:
        grouped = project("qkvz").reshape(num_tokens, key_heads, -1)
        ends = np.cumsum([key_dim, key_dim, shared_by * value_dim])
        q, k, v, z = (part.reshape(num_tokens, -1) for part in np.split(grouped, ends, axis=2))
        b, a = (
            part.reshape(num_tokens, -1)
            for part in np.split(project("ba").reshape(num_tokens, key_heads, -1), 2, axis=2)
        )
        mixed = np.concatenate([q, k, v], axis=1)
    else:
        mixed, z, b, a = (project(name) for name in ("qkv", "z", "b", "a"))

    filters = tensors[prefix + "conv1d.weight"][:, 0]
    width = filters.shape[1]
    padded = np.vstack([np.zeros((width - 1, mixed.shape[1])), mixed])
    mixed = silu(np.stack([(filters.T * padded[t : t + width]).sum(axis=0) for t in range(num_tokens)]))
    q, k, v = np.split(mixed, np.cumsum([key_heads * key_dim] * 2), axis=1)
    q, k = (unit(part.reshape(num_tokens, key_heads, key_dim)) for part in (q, k))
    q = q / np.sqrt(key_dim)
    v, z = (part.reshape(num_tokens, value_heads, value_dim) for part in (v, z))
    decay = np.exp(-np.exp(tensors[prefix + "A_log"]) * np.logaddexp(0, a + tensors[prefix + "dt_bias"]))
    beta = 1 / (1 + np.exp(-b))

    out = np.empty_like(v)
    for head in range(value_heads):
        state = np.zeros((key_dim, value_dim))
        for t in range(num_tokens):
            key = k[t, head // shared_by]
            state = decay[t, head] * state
            state = state + np.outer(key, beta[t, head] * (v[t, head] - key @ state))
            out[t, head] = q[t, head // shared_by] @ state
    out = out / np.sqrt((out**2).mean(axis=-1, keepdims=True) + config["rms_norm_eps"])
    gate = silu(z) if config.get("output_gate_type", "silu") == "silu" else 1 / (1 + np.exp(-z))
    out = tensors[prefix + "norm.weight"] * out * gate
    return out.reshape(num_tokens, -1) @ tensors[prefix + "out_proj.weight"].T


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def unit(x: Array) -> Array:
    return x / np.sqrt((x**2).sum(axis=-1, keepdims=True) + 1e-6)
