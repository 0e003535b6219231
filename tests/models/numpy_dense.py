"""What Gemma 3 computes differently, in numpy and float64, for `numpy_model.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tests.models.safetensors_file import Array
from tests.models.tiny import RawConfig, head_dim

if TYPE_CHECKING:
    from tests.models.numpy_model import NumpyModel, Places


def run_layer(model: NumpyModel, layer: int, hidden: Array, places: Places) -> Array:
    """Return the hidden state after a layer, which norms each block before and after."""
    prefix = f"model.layers.{layer}."
    mixed = model.attention(layer, model.norm(prefix + "input_layernorm", hidden), places)
    hidden = hidden + model.norm(prefix + "post_attention_layernorm", mixed)
    x = model.norm(prefix + "pre_feedforward_layernorm", hidden)
    gate, up = (x @ model.tensors[f"{prefix}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
    gelu = gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    added = (gelu * up) @ model.tensors[prefix + "mlp.down_proj.weight"].T
    return hidden + model.norm(prefix + "post_feedforward_layernorm", added)


def frequencies(config: RawConfig, window: int) -> Array:
    """Return the angle per position of each pair of a head in a layer with or without a window, in either spelling."""
    if config.get("rope_parameters"):
        rope = config["rope_parameters"]["sliding_attention" if window else "full_attention"]
    elif window:
        rope = {"rope_theta": config.get("rope_local_base_freq", 1e4)}
    else:
        rope = {"rope_theta": config.get("rope_theta", 1e6)} | (config.get("rope_scaling") or {})
    dim = head_dim(config)
    result: Array = rope["rope_theta"] ** -(np.arange(0, dim, 2) / dim) / rope.get("factor", 1.0)
    return result
