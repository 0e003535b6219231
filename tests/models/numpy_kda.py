"""Kimi Delta Attention in numpy and float64, token by token: the formula of arXiv:2510.26692, with Ling-3's gates."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from tests.models.numpy_delta import silu, unit
from tests.models.safetensors_file import Array
from tests.models.tiny_kda import RawConfig, delta_heads


def kimi_delta_attention(config: RawConfig, tensors: Mapping[str, Array], prefix: str, x: Array) -> Array:
    """Return what the layer adds for the normed input x [tokens, hidden]; its tensors' names start with `prefix`."""
    (heads, dim), num_tokens = delta_heads(config), len(x)

    def project(name: str) -> Array:
        if f"{prefix}{name}_a_proj.weight" in tensors:
            y = x @ tensors[f"{prefix}{name}_a_proj.weight"].T @ tensors[f"{prefix}{name}_b_proj.weight"].T
        else:
            y = x @ tensors[f"{prefix}{name}_proj.weight"].T
        return y.reshape(num_tokens, heads, -1)

    def convolve(name: str) -> Array:
        filters = tensors[f"{prefix}{name}_conv1d.weight"][:, 0]
        y = project(name).reshape(num_tokens, -1)
        padded = np.vstack([np.zeros((filters.shape[1] - 1, y.shape[1])), y])
        mixed = [(filters.T * padded[t : t + filters.shape[1]]).sum(axis=0) for t in range(num_tokens)]
        return silu(np.stack(mixed)).reshape(num_tokens, heads, dim)

    q, k, v = unit(convolve("q")) / np.sqrt(dim), unit(convolve("k")), convolve("v")
    forget = project("f") + tensors[prefix + "dt_bias"].reshape(heads, dim)
    rate = np.exp(tensors[prefix + "A_log"]).reshape(heads, 1)
    if config.get("kda_safe_gate"):
        decay = np.exp(config["kda_lower_bound"] / (1 + np.exp(-rate * forget)))
    else:
        decay = np.exp(-rate * np.logaddexp(0, forget))
    beta = 1 / (1 + np.exp(-project("b")))

    out = np.empty_like(v)
    for head in range(heads):
        state = np.zeros((dim, dim))
        for t in range(num_tokens):
            state = decay[t, head][:, None] * state
            state = state + np.outer(k[t, head], beta[t, head] * (v[t, head] - k[t, head] @ state))
            out[t, head] = q[t, head] @ state
    out = out / np.sqrt((out**2).mean(axis=-1, keepdims=True) + config["rms_norm_eps"])
    out = tensors[prefix + "o_norm.weight"] * out / (1 + np.exp(-project("g")))
    return out.reshape(num_tokens, -1) @ tensors[prefix + "o_proj.weight"].T


def as_deepseek(config: RawConfig, tensors: Mapping[str, Array]) -> tuple[RawConfig, dict[str, Array]]:
    """Return a config and tensors under DeepSeek-V3's names, which the rest of the model has."""
    keys = {
        "model_max_length": "max_position_embeddings",
        "num_expert_group": "n_group",
        "num_experts_per_token": "num_experts_per_tok",
        "moe_renormalize": "norm_topk_prob",
    }
    names = (
        (r"\.word_embeddings\.", ".embed_tokens."),
        (r"\.attention\.", ".self_attn."),
        (r"\.dense\.weight", ".o_proj.weight"),
        (r"\.expert_bias", ".e_score_correction_bias"),
        (r"\.block_sparse_moe\.", ".mlp."),
        (r"\.w1\.", ".gate_proj."),
        (r"\.w3\.", ".up_proj."),
        (r"\.w2\.", ".down_proj."),
    )
    renamed = {}
    for in_file, tensor in tensors.items():
        name = in_file
        for pattern, by in names:
            name = re.sub(pattern, by, name)
        renamed[name] = tensor
    return {keys.get(key, key): value for key, value in config.items()}, renamed
