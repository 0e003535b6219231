"""The layers of `tiny_flags.FAMILIES` in numpy and float64, for `numpy_model.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tests.models.safetensors_file import Array
from tests.models.tiny_flags import experts_per_token, is_moe

if TYPE_CHECKING:
    from tests.models.numpy_model import NumpyModel, Places


def run_layer(model: NumpyModel, layer: int, hidden: Array, places: Places) -> Array:
    """Return the hidden state after a layer."""
    prefix = f"model.layers.{layer}."
    scale = model.config.get("residual_multiplier", 1.0)
    if model.config["model_type"] == "flex_olmo":  # norms only after the blocks
        mixed = model.attention(layer, hidden, places)
        hidden = hidden + model.norm(prefix + "post_attention_layernorm", mixed)
        added = feed_forward(model, layer, hidden)
        return hidden + model.norm(prefix + "post_feedforward_layernorm", added)
    mixed = model.attention(layer, model.norm(prefix + "input_layernorm", hidden), places)
    hidden = hidden + scale * mixed
    added = feed_forward(model, layer, model.norm(prefix + "post_attention_layernorm", hidden))
    return hidden + scale * added


def feed_forward(model: NumpyModel, layer: int, x: Array) -> Array:
    config, tensors, prefix = model.config, model.tensors, f"model.layers.{layer}."
    if not is_moe(config, layer):
        return model.swiglu(prefix + "mlp.", x)
    if config.get("num_local_experts") == 0:
        return _joined(
            x, *(tensors[f"{prefix}shared_mlp.{name}_linear.weight"] for name in ("input", "output"))
        )
    is_granite = config["model_type"].startswith("granite")
    block = prefix + ("block_sparse_moe." if is_granite else "mlp.")
    logits = x @ tensors[block + ("router.layer.weight" if is_granite else "gate.weight")].T
    scores = np.exp(logits - logits.max(axis=1, keepdims=True))
    scores /= scores.sum(axis=1, keepdims=True)
    bias = tensors.get(block + "moe_statics.e_score_correction_bias")
    worth = scores if bias is None else scores + bias[0]
    k = experts_per_token(config)
    order = np.argsort(-worth, axis=1, kind="stable")
    model.note_margin(np.take_along_axis(worth, order, axis=1), k)
    out = np.zeros_like(x)
    for token, chosen in enumerate(order[:, :k]):
        weights = scores[token, chosen]
        if is_granite or bias is not None or config.get("norm_topk_prob"):
            weights = weights / max(weights.sum(), config.get("moe_norm_min", 0.0))
        for expert, weight in zip(chosen, weights, strict=True):
            if is_granite:
                names = (block + "input_linear.weight", block + "output_linear.weight")
                out[token] += weight * _joined(x[token], *(tensors[name][expert] for name in names))
            else:
                out[token] += weight * model.swiglu(f"{block}experts.{expert}.", x[token])
    if block + "shared_experts.up_proj.weight" in tensors:
        out += model.swiglu(block + "shared_experts.", x)
    if prefix + "shared_mlp.input_linear.weight" in tensors:
        shared = (tensors[f"{prefix}shared_mlp.{name}_linear.weight"] for name in ("input", "output"))
        out += _joined(x, *shared)
    return out


def _joined(x: Array, gate_up: Array, down: Array) -> Array:
    """SwiGLU whose gate and up are one matrix."""
    gate, up = np.split(x @ gate_up.T, 2, axis=-1)
    result: Array = (gate / (1 + np.exp(-gate)) * up) @ down.T
    return result
