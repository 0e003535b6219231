"""Tiny configs of Cohere's mixtures, their tensors, and their layers in numpy and float64, for `numpy_model.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tests.models.rows import Row
from tests.models.safetensors_file import Array

if TYPE_CHECKING:
    from tests.models.numpy_model import NumpyModel, Places

RawConfig = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]

FAMILIES = ("cohere2_moe",)
FULL, SLIDING = "full_attention", "sliding_attention"


def cohere2_moe(**changes: Any) -> RawConfig:
    """A config.json with the keys of North-Mini-Code-1.0's, with shared experts as Command-A-plus has them."""
    return {
        "architectures": ["Cohere2MoeForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 5,
        "eos_token_id": 2,
        "expert_selection_fn": "sigmoid",
        "first_k_dense_replace": 1,
        "head_dim": 8,
        "hidden_act": "silu",
        "hidden_size": 22,
        "initializer_range": 0.02,
        "intermediate_size": 8,
        "layer_norm_eps": 1e-05,
        "layer_types": [FULL, SLIDING, FULL, SLIDING],
        "logit_scale": 0.25,
        "max_position_embeddings": 128,
        "model_type": "cohere2_moe",
        "norm_topk_prob": False,
        "num_attention_heads": 6,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "num_shared_experts": 1,
        "pad_token_id": 0,
        "prefix_dense_intermediate_size": 17,
        "prefix_dense_sliding_window_pattern": 1,
        "rms_norm_eps": 1e-06,
        "rope_theta": 50000,
        "shared_expert_combination_strategy": "average",
        "sliding_window": 7,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_gated_activation": True,
        "use_parallel_block": True,
        "use_qk_norm": False,
        "vocab_size": 68,
    } | changes


def kinds(config: RawConfig) -> list[str]:
    """Return the kind of each layer's attention."""
    if config.get("layer_types"):
        return list(config["layer_types"])
    dense, first = (
        config.get("first_k_dense_replace", 0),
        config.get("prefix_dense_sliding_window_pattern", 1),
    )
    period = config.get("sliding_window_pattern", 4)
    prefix = [SLIDING if (i + 1) % first else FULL for i in range(dense)]
    rest = [SLIDING if (i + 1) % period else FULL for i in range(config["num_hidden_layers"] - dense)]
    return prefix + rest


def is_moe(config: RawConfig, layer: int) -> bool:
    if config.get("mlp_layer_types"):
        return bool(config["mlp_layer_types"][layer] == "sparse")
    return layer >= config.get("first_k_dense_replace", 0)


def windows(config: RawConfig) -> list[int]:
    """Return each layer's window; 0 is full attention."""
    return [config["sliding_window"] if kind == SLIDING else 0 for kind in kinds(config)]


def frequencies(config: RawConfig, layer: int) -> Array:
    is_forced = not is_moe(config, layer) and config.get("prefix_dense_sliding_window_pattern", 1) == 1
    dim = config["head_dim"]
    frequency: Array = float(config["rope_theta"]) ** -(np.arange(0, dim, 2) / dim)
    return frequency if is_forced or kinds(config)[layer] == SLIDING else 0 * frequency


def cohere_shapes(config: RawConfig) -> Shapes:
    """Return names and shapes of every tensor in the hub's checkpoint of this config."""
    hidden, vocab, dim = config["hidden_size"], config["vocab_size"], config["head_dim"]
    width = config["intermediate_size"]
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        attention, mlp = layer + "self_attn.", layer + "mlp."
        shapes[layer + "input_layernorm.weight"] = (hidden,)
        rows = dict.fromkeys("kv", config["num_key_value_heads"] * dim)
        for name, count in {"q": config["num_attention_heads"] * dim, **rows}.items():
            shapes[f"{attention}{name}_proj.weight"] = (count, hidden)
            if config["attention_bias"]:
                shapes[f"{attention}{name}_proj.bias"] = (count,)
        shapes[attention + "o_proj.weight"] = (hidden, config["num_attention_heads"] * dim)
        if config["attention_bias"]:
            shapes[attention + "o_proj.bias"] = (hidden,)
        if not is_moe(config, i):
            shapes |= _swiglu(mlp, hidden, config["prefix_dense_intermediate_size"] or width)
            continue
        shapes[mlp + "gate.weight"] = (config["num_experts"], hidden)
        for expert in range(config["num_experts"]):
            shapes |= _swiglu(f"{mlp}experts.{expert}.", hidden, width)
        if config["num_shared_experts"]:
            shapes |= _swiglu(mlp + "shared_experts.", hidden, config["num_shared_experts"] * width)
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def _swiglu(prefix: str, hidden: int, width: int) -> Shapes:
    return {
        f"{prefix}gate_proj.weight": (width, hidden),
        f"{prefix}up_proj.weight": (width, hidden),
        f"{prefix}down_proj.weight": (hidden, width),
    }


def norm(model: NumpyModel, name: str, x: Array) -> Array:
    """Return x after RMSNorm, or after LayerNorm without a bias if the config has no epsilon for the other."""
    eps = model.config["rms_norm_eps"]
    if eps is None:
        x, eps = x - x.mean(axis=-1, keepdims=True), model.config["layer_norm_eps"]
    result: Array = model.tensors[name + ".weight"] * x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)
    return result


def run_layer(model: NumpyModel, layer: int, hidden: Array, places: Places) -> Array:
    """Return the hidden state after a layer."""
    prefix = f"model.layers.{layer}."
    normed = norm(model, prefix + "input_layernorm", hidden)
    mixed = model.attention(layer, normed, places)
    return hidden + mixed + _feed_forward(model, layer, normed)


def _feed_forward(model: NumpyModel, layer: int, x: Array) -> Array:
    config, mlp = model.config, f"model.layers.{layer}.mlp."
    if not is_moe(config, layer):
        return model.swiglu(mlp, x)
    k, logits = config["num_experts_per_tok"], x @ model.tensors[mlp + "gate.weight"].T
    order = np.argsort(-logits, axis=1, kind="stable")
    is_sigmoid = config["expert_selection_fn"] == "sigmoid"
    scores = 1 / (1 + np.exp(-logits)) if is_sigmoid else np.exp(logits - logits.max(axis=1, keepdims=True))
    model.note_margin(np.take_along_axis(scores, order, axis=1), k)
    out = np.zeros_like(x)
    for token, chosen in enumerate(order[:, :k]):
        weights = scores[token, chosen]
        if not is_sigmoid or config["norm_topk_prob"]:
            weights = weights / weights.sum()
        for expert, weight in zip(chosen, weights, strict=True):
            out[token] += weight * model.swiglu(f"{mlp}experts.{expert}.", x[token])
    if config["num_shared_experts"]:
        out = out + model.swiglu(mlp + "shared_experts.", x)
        out = out / 2 if config["shared_expert_combination_strategy"] == "average" else out
    return out


ROWS = {
    "cohere2_moe": Row(
        shapes=cohere_shapes,
        gguf="cohere2moe",
        chats=("cohere2",),
        without_mlx="MLX does not know it",
    )
}
