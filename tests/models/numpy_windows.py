"""The layers of `tiny_windows.FAMILIES` in numpy and float64, for `numpy_model.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tests.models.safetensors_file import Array
from tests.models.tiny_windows import is_moe

if TYPE_CHECKING:
    from tests.models.numpy_model import NumpyModel, Places


def run_layer(model: NumpyModel, layer: int, hidden: Array, places: Places) -> Array:
    """Return the hidden state after a layer."""
    prefix = f"model.layers.{layer}."
    mixed = model.attention(layer, model.norm(prefix + "input_layernorm", hidden), places)
    if model.config["model_type"] != "afmoe":
        hidden = hidden + mixed
        return hidden + _feed_forward(model, layer, model.norm(prefix + "post_attention_layernorm", hidden))
    hidden = hidden + model.norm(prefix + "post_attention_layernorm", mixed)
    added = _feed_forward(model, layer, model.norm(prefix + "pre_mlp_layernorm", hidden))
    return hidden + model.norm(prefix + "post_mlp_layernorm", added)


def gated(model: NumpyModel, prefix: str, x: Array, out: Array) -> Array:
    """Return the outputs of heads [tokens, heads, dim] after their gates, if they have any."""
    if (weight := model.tensors.get(prefix + "gate_proj.weight")) is not None:
        return out * _sigmoid(x @ weight.T).reshape(out.shape)
    if (weight := model.tensors.get(prefix + "g_proj.weight")) is not None:
        return out * np.log1p(np.exp(x @ weight.T)).reshape(*out.shape[:2], -1)
    return out


def _feed_forward(model: NumpyModel, layer: int, x: Array) -> Array:
    config, tensors, mlp = model.config, model.tensors, f"model.layers.{layer}.mlp."
    if not is_moe(config, layer):
        return model.swiglu(mlp, x)
    if config["model_type"] == "mellum":
        logits = x @ tensors[mlp + "gate.weight"].T
        scores = np.exp(logits - logits.max(axis=1, keepdims=True))
        worth, scale = scores, 1.0
        is_normed = config["norm_topk_prob"]
        scores /= scores.sum(axis=1, keepdims=True)
    elif config["model_type"] == "laguna":
        logits, cap = x @ tensors[mlp + "gate.weight"].T, config["moe_router_logit_softcapping"]
        scores = _sigmoid(cap * np.tanh(logits / cap) if cap else logits)
        worth = scores + tensors[mlp + "experts.e_score_correction_bias"]
        scale, is_normed = config["moe_routed_scaling_factor"], True
    else:
        scores = _sigmoid(x @ tensors[mlp + "router.gate.weight"].T)
        worth, scale, is_normed = scores + tensors[mlp + "expert_bias"], config["route_scale"], True
    order, k = np.argsort(-worth, axis=1, kind="stable"), config["num_experts_per_tok"]
    model.note_margin(np.take_along_axis(worth, order, axis=1), k)
    out = np.zeros_like(x)
    for token, chosen in enumerate(order[:, :k]):
        weights = scale * scores[token, chosen]
        if is_normed:
            weights = weights / scores[token, chosen].sum()
        for expert, weight in zip(chosen, weights, strict=True):
            out[token] += weight * model.swiglu(f"{mlp}experts.{expert}.", x[token])
    for shared in ("shared_experts.", "shared_expert."):
        if f"{mlp}{shared}up_proj.weight" in tensors:
            out += model.swiglu(mlp + shared, x)
    return out


def _sigmoid(x: Array) -> Array:
    result: Array = 1 / (1 + np.exp(-x))
    return result
