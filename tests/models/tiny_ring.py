"""Tiny checkpoints of Ring-linear 2.0: Ling's, with lightning attention in most layers; and that in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.models.rows import NO_CONVERTER, Row
from tests.models.safetensors_file import Array
from tests.models.tiny_grouped import Shapes, bailing_moe, grouped_shapes

RawConfig = dict[str, Any]

FAMILY = "bailing_moe_linear"


def ring_linear(**changes: Any) -> RawConfig:
    """A config.json with the keys of Ring-mini-linear-2.0's."""
    absent = (
        "max_window_layers",
        "mtp_loss_scaling_factor",
        "norm_head",
        "norm_softmax",
        "use_sliding_window",
    )
    return {
        **{key: value for key, value in bailing_moe().items() if key not in absent},
        "architectures": ["BailingMoeLinearV2ForCausalLM"],
        "group_norm_size": 2,
        "layer_group_size": 2,
        "linear_silu": False,
        "model_type": FAMILY,
        "num_hidden_layers": 4,
        **changes,
    }


def is_linear(config: RawConfig, layer: int) -> bool:
    size = config["layer_group_size"]
    return (layer + 1) % size > 0 and layer < config["num_hidden_layers"] // size * size


def ring_shapes(config: RawConfig) -> Shapes:
    """Return names and shapes of every tensor in the hub's checkpoint of this config."""
    shapes = grouped_shapes(config | {"model_type": "bailing_moe"})
    rows, hidden = config["num_attention_heads"] * config["head_dim"], config["hidden_size"]
    for layer in range(config["num_hidden_layers"]):
        if is_linear(config, layer):
            attention = f"model.layers.{layer}.attention."
            shapes[attention + "query_key_value.weight"] = (3 * rows, hidden)
            shapes[attention + "g_proj.weight"] = (rows, hidden)
            shapes[attention + "g_norm.weight"] = (rows,)
    return shapes


def lightning_attention(config: RawConfig, tensors: dict[str, Array], layer: int, x: Array) -> Array:
    """Return what a layer with lightning attention adds for its normed input x [tokens, hidden], in float64.

    A sum over all earlier positions instead of a state: the formula of mlx-lm's `bailing_moe_linear.py`, with the
    makers' slopes in layer 0.
    """
    heads, dim, prefix = config["num_attention_heads"], config["head_dim"], f"model.layers.{layer}.attention."
    eps, num_tokens = config["rms_norm_eps"], len(x)

    def rms(y: Array) -> Array:
        return y / np.sqrt((y * y).mean(axis=-1, keepdims=True) + eps)

    def sigmoid(y: Array) -> Array:
        return 1 / (1 + np.exp(-y))

    y = x @ tensors[prefix + "query_key_value.weight"].T
    if config["linear_silu"]:
        y = y * sigmoid(y)
    q, k, v = y.reshape(num_tokens, 3, heads, dim).swapaxes(0, 1)
    if config["use_qk_norm"]:
        q = rms(q) * tensors[prefix + "query_layernorm.weight"]
        k = rms(k) * tensors[prefix + "key_layernorm.weight"]
    pairs = int(dim * config["partial_rotary_factor"]) // 2
    angle = np.arange(num_tokens)[:, None] * config["rope_theta"] ** -(np.arange(pairs) / pairs)
    turn = np.exp(1j * angle)[:, None]

    def turned(y: Array) -> Array:
        z = (y[..., :pairs] + 1j * y[..., pairs : 2 * pairs]) * turn
        return np.concatenate([z.real, z.imag, y[..., 2 * pairs :]], axis=-1)

    q, k = turned(q), turned(k)
    distance = np.subtract.outer(np.arange(num_tokens), np.arange(num_tokens))
    out = np.empty_like(v)
    for head in range(heads):
        slope = 2.0 ** (-8 * (head + 1) / heads)
        slope *= 1 - (layer - 1) / (config["num_hidden_layers"] - 1) + 1e-5
        weights = np.where(distance < 0, 0.0, np.exp(-slope * np.maximum(distance, 0)))
        out[:, head] = (q[:, head] @ k[:, head].T / np.sqrt(dim) * weights) @ v[:, head]
    normed = rms(out.reshape(num_tokens, config["group_norm_size"], -1)).reshape(num_tokens, -1)
    gate = sigmoid(x @ tensors[prefix + "g_proj.weight"].T)
    result: Array = (gate * normed * tensors[prefix + "g_norm.weight"]) @ tensors[prefix + "dense.weight"].T
    return result


ROWS = {
    FAMILY: Row(
        shapes=ring_shapes,
        without_references="transformers has no class; `test_mlx.py` compares with mlx-lm",
        without_record=NO_CONVERTER,
    )
}
