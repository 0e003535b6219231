"""Mamba-2 mixers, and the layers of Granite-4 hybrids and Nemotron-3, in numpy and float64, for `numpy_model.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from tests.models import numpy_flags
from tests.models.numpy_recurrent import convolve
from tests.models.safetensors_file import Array
from tests.models.tiny_mamba import RawConfig, mamba_sizes, of_layer, pattern

if TYPE_CHECKING:
    from tests.models.numpy_model import NumpyModel, Places

_RESPELT = {
    "backbone.": "model.",
    "model.embeddings.": "model.embed_tokens.",
    "model.norm_f.": "model.norm.",
}


def respelt(name: str) -> str:
    """Return the name that most families give to this tensor of Nemotron-3."""
    for part, replacement in _RESPELT.items():
        name = name.replace(part, replacement)
    return name


def with_common_keys(config: RawConfig) -> RawConfig:
    """Return the config with keys of other families added, and its layers counted."""
    eps = config.get("rms_norm_eps", config.get("layer_norm_epsilon"))
    return config | {"rms_norm_eps": eps, "num_hidden_layers": len(pattern(config))}


def run_layer(model: NumpyModel, layer: int, hidden: Array, places: Places) -> Array:
    """Return the hidden state after a layer."""
    config, prefix, kind = model.config, f"model.layers.{layer}.", pattern(model.config)[layer]
    if config["model_type"] != "granitemoehybrid":
        x = model.norm(prefix + "norm", hidden)
        match kind:
            case "M":
                return hidden + mamba(config, model.tensors, prefix + "mixer.", x)
            case "*":
                return hidden + _attention(model, prefix + "mixer.", x)
            case "-":
                return hidden + _network(model.tensors, prefix + "mixer.", x)
        return hidden + _experts(model, of_layer(config, layer), prefix + "mixer.", x)
    x, scale = model.norm(prefix + "input_layernorm", hidden), config["residual_multiplier"]
    if kind == "M":
        mixed = mamba(config, model.tensors, prefix + "mamba.", x)
    elif config["position_embedding_type"] == "rope":
        mixed = model.attention(layer, x, places)
    else:
        mixed = _attention(model, prefix + "self_attn.", x)
    hidden = hidden + scale * mixed
    x = model.norm(prefix + "post_attention_layernorm", hidden)
    return hidden + scale * numpy_flags.feed_forward(model, layer, x)


def mamba(config: RawConfig, tensors: Mapping[str, Array], prefix: str, x: Array) -> Array:
    """Return what a mixer adds for the normed input x [tokens, hidden]; its tensors' names start with `prefix`."""
    heads, dim, state, groups, _ = mamba_sizes(config)

    def linear(name: str, x: Array) -> Array:
        return x @ tensors[f"{prefix}{name}.weight"].T + tensors.get(f"{prefix}{name}.bias", 0)

    channels, shared = heads * dim, groups * state
    z, mixed, dt = np.split(linear("in_proj", x), [channels, 2 * channels + 2 * shared], axis=1)
    mixed = convolve(mixed, tensors[prefix + "conv1d.weight"][:, 0]) + tensors.get(prefix + "conv1d.bias", 0)
    inputs, b, c = np.split(_silu(mixed), [channels, channels + shared], axis=1)
    dt = np.log1p(np.exp(dt + tensors[prefix + "dt_bias"]))
    decay = np.exp(-np.exp(tensors[prefix + "A_log"]) * dt)
    group_of_head = np.arange(heads) // (heads // groups)
    memory, outputs = np.zeros((heads, dim, state)), []
    for token in range(len(x)):
        at, key, query = (
            inputs[token].reshape(heads, dim),
            b[token].reshape(groups, state)[group_of_head],
            c[token].reshape(groups, state)[group_of_head],
        )
        added = dt[token, :, None, None] * at[:, :, None] * key[:, None, :]
        memory = decay[token, :, None, None] * memory + added
        outputs.append((memory @ query[:, :, None])[:, :, 0] + tensors[prefix + "D"][:, None] * at)
    gated = np.stack(outputs).reshape(len(x), groups, -1) * _silu(z).reshape(len(x), groups, -1)
    eps = config["rms_norm_eps"]
    normed = gated / np.sqrt((gated * gated).mean(axis=2, keepdims=True) + eps)
    return linear("out_proj", normed.reshape(len(x), -1) * tensors[prefix + "norm.weight"])


def _attention(model: NumpyModel, prefix: str, x: Array) -> Array:
    """Attention in which nothing rotates."""
    config, tokens = model.config, len(x)
    dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    q, k, v = (model.linear(f"{prefix}{name}_proj", x).reshape(tokens, -1, dim) for name in "qkv")
    sharing = q.shape[1] // k.shape[1]
    scale = config.get("attention_multiplier", dim**-0.5)
    is_seen = np.tril(np.ones((tokens, tokens), bool))
    out = np.empty_like(q)
    for head in range(q.shape[1]):
        scores = np.where(is_seen, q[:, head] @ k[:, head // sharing].T * scale, -np.inf)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[:, head] = weights / weights.sum(axis=1, keepdims=True) @ v[:, head // sharing]
    return model.linear(prefix + "o_proj", out.reshape(tokens, -1))


def _experts(model: NumpyModel, config: RawConfig, prefix: str, x: Array) -> Array:
    tensors = model.tensors
    scores = 1 / (1 + np.exp(-x @ tensors[prefix + "gate.weight"].T))
    worth = scores + tensors[prefix + "gate.e_score_correction_bias"]
    grouped = worth.reshape(len(x), config["n_group"], -1)
    sums = np.sort(grouped, axis=2)[:, :, -2:].sum(axis=2)
    groups = np.argsort(-sums, axis=1, kind="stable")
    model.note_margin(np.take_along_axis(sums, groups, axis=1), config["topk_group"])
    is_kept = np.zeros(sums.shape, bool)
    np.put_along_axis(is_kept, groups[:, : config["topk_group"]], True, axis=1)
    worth = np.where(is_kept[:, :, None], grouped, -np.inf).reshape(worth.shape)
    k = config["num_experts_per_tok"]
    order = np.argsort(-worth, axis=1, kind="stable")
    model.note_margin(np.take_along_axis(worth, order, axis=1), k)
    is_latent = prefix + "fc1_latent_proj.weight" in tensors
    read = model.linear(prefix + "fc1_latent_proj", x) if is_latent else x
    out = np.zeros_like(read)
    for token, chosen in enumerate(order[:, :k]):
        weights = scores[token, chosen]
        if config["norm_topk_prob"]:
            weights = weights / weights.sum()
        for expert, weight in zip(chosen, weights * config["routed_scaling_factor"], strict=True):
            out[token] += weight * _network(tensors, f"{prefix}experts.{expert}.", read[token])
    routed = model.linear(prefix + "fc2_latent_proj", out) if is_latent else out
    return routed + _network(tensors, prefix + "shared_experts.", x)


def _network(tensors: Mapping[str, Array], prefix: str, x: Array) -> Array:
    inner = np.maximum(x @ tensors[prefix + "up_proj.weight"].T, 0) ** 2
    result: Array = inner @ tensors[prefix + "down_proj.weight"].T
    return result


def _silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))
