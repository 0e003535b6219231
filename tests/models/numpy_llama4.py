"""The layers of Llama-4 in numpy and float64, for `numpy_model.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tests.models import tiny_llama4
from tests.models.safetensors_file import Array

if TYPE_CHECKING:
    from tests.models.numpy_model import NumpyModel, Places


def run_layer(model: NumpyModel, layer: int, hidden: Array, places: Places) -> Array:
    """Return the hidden state after a layer."""
    prefix = f"model.layers.{layer}."
    hidden = hidden + attention(model, layer, model.norm(prefix + "input_layernorm", hidden), places)
    return hidden + feed_forward(model, layer, model.norm(prefix + "post_attention_layernorm", hidden))


def attention(model: NumpyModel, layer: int, x: Array, places: Places) -> Array:
    config, prefix = model.config, f"model.layers.{layer}.self_attn."
    dim, index = config["head_dim"], np.arange(len(x))
    q, k, v = (model.linear(f"{prefix}{name}_proj", x).reshape(len(x), -1, dim) for name in "qkv")
    if tiny_llama4.rotates(config)[layer]:
        turn = (
            places.scale * np.exp(1j * places.angle)[:, None]
        )  # dimensions 2 i and 2 i + 1 are a complex number
        q, k = (
            np.stack([z.real, z.imag], axis=-1).reshape(y.shape)
            for y in (q, k)
            for z in [turn * (y[..., 0::2] + 1j * y[..., 1::2])]
        )
        if config["use_qk_norm"]:
            q, k = model.norm("", q), model.norm("", k)
    elif config["attn_temperature_tuning"]:
        growth = 1 + config["attn_scale"] * np.log1p((index + 1) // config["floor_scale"])
        q = q * growth[:, None, None]
    is_seen = places.is_seen()
    if chunk := tiny_llama4.chunks(config)[layer]:
        is_seen = is_seen & (index[:, None] // chunk == index[None] // chunk)
    out = np.empty_like(q)
    for head in range(q.shape[1]):
        of_head = head * k.shape[1] // q.shape[1]
        scores = np.where(is_seen, q[:, head] @ k[:, of_head].T * dim**-0.5, -np.inf)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[:, head] = weights / weights.sum(axis=1, keepdims=True) @ v[:, of_head]
    return model.linear(prefix + "o_proj", out.reshape(len(x), -1))


def feed_forward(model: NumpyModel, layer: int, x: Array) -> Array:
    tensors, prefix = model.tensors, f"model.layers.{layer}.feed_forward."
    if layer not in tiny_llama4.moe_layers(model.config):
        return model.swiglu(prefix, x)
    logits = x @ tensors[prefix + "router.weight"].T
    order = np.argsort(-logits, axis=1, kind="stable")
    model.note_margin(np.take_along_axis(logits, order, axis=1), 1)
    out = model.swiglu(prefix + "shared_expert.", x)
    gate_up, down = (tensors[f"{prefix}experts.{name}_proj"] for name in ("gate_up", "down"))
    for token, expert in enumerate(order[:, 0]):
        weighted = x[token] / (1 + np.exp(-logits[token, expert]))
        gate, up = np.split(weighted @ gate_up[expert], 2)
        out[token] += (gate / (1 + np.exp(-gate)) * up) @ down[expert]
    return out
