"""Tiny configs of families whose layers have two kinds of grouped-query attention, and the tensors of one layer."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.models.rows import Row, Shapes
from tests.models.safetensors_file import Array
from tests.models.tiny import plain_shapes

RawConfig = dict[str, Any]

FAMILIES = ("mimo_v2_flash",)
FULL, SLIDING = "full_attention", "sliding_attention"


def mimo_v2_flash(**changes: Any) -> RawConfig:
    """A config.json with the keys of MiMo-V2-Flash's, except `quantization_config`."""
    return {
        "add_full_attention_sink_bias": False,
        "add_swa_attention_sink_bias": True,
        "architectures": ["MiMoV2FlashForCausalLM"],
        "attention_bias": False,
        "attention_chunk_size": 7,
        "attention_dropout": 0.0,
        "attention_value_scale": 0.707,
        "eos_token_id": 2,
        "head_dim": 18,
        "hidden_act": "silu",
        "hidden_size": 24,
        "hybrid_block_size": None,
        "hybrid_layer_pattern": [0, 1, 1],
        "initializer_range": 0.02,
        "intermediate_size": 18,
        "layernorm_epsilon": 1e-05,
        "max_position_embeddings": 128,
        "model_type": "mimo_v2_flash",
        "moe_intermediate_size": 8,
        "moe_layer_freq": [0, 1, 1],
        "n_group": 1,
        "n_routed_experts": 6,
        "n_shared_experts": None,
        "norm_topk_prob": True,
        "num_attention_heads": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "partial_rotary_factor": 0.334,
        "rope_theta": 5000000,
        "routed_scaling_factor": None,
        "scoring_func": "sigmoid",
        "sliding_window": 7,
        "sliding_window_size": 7,
        "swa_head_dim": changes.get("head_dim", 18),
        "swa_num_attention_heads": changes.get("num_attention_heads", 4),
        "swa_num_key_value_heads": 2 * changes.get("num_key_value_heads", 1),
        "swa_rope_theta": 10000,
        "swa_v_head_dim": changes.get("v_head_dim", 10),
        "tie_word_embeddings": False,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.40.1",
        "use_cache": True,
        "v_head_dim": 10,
        "vocab_size": 68,
    } | changes


def kinds(config: RawConfig) -> list[str]:
    """Return the kind of each layer's attention."""
    return config.get("layer_types") or [(FULL, SLIDING)[number] for number in config["hybrid_layer_pattern"]]


def moe_layers(config: RawConfig) -> list[int]:
    numbers = config.get("mlp_layer_types") or config["moe_layer_freq"]
    return [layer for layer, number in enumerate(numbers) if number in (1, "sparse")]


def kv_heads(config: RawConfig, layer: int) -> int:
    return config["swa_num_key_value_heads" if kinds(config)[layer] == SLIDING else "num_key_value_heads"]


def windows(config: RawConfig) -> list[int]:
    """Return each layer's window; 0 is full attention."""
    before = config.get("sliding_window_size")
    window = config["sliding_window"] if before is None else before + 1
    return [window if kind == SLIDING else 0 for kind in kinds(config)]


def frequencies(config: RawConfig, layer: int) -> Array:
    kind = kinds(config)[layer]
    theta = config["swa_rope_theta" if kind == SLIDING else "rope_theta"]
    rope = (config.get("rope_parameters") or {}).get(kind, {"rope_theta": theta})
    share = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 0.334))
    dim = int(config["head_dim"] * share)
    frequency: Array = rope["rope_theta"] ** -(np.arange(0, dim, 2) / dim)
    return frequency


def attention_shapes(config: RawConfig, layer: int) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of a layer's attention in the hub's checkpoint."""
    hidden, heads, prefix = (
        config["hidden_size"],
        config["num_attention_heads"],
        f"model.layers.{layer}.self_attn.",
    )
    rows = {
        "q": heads * config["head_dim"],
        "k": kv_heads(config, layer) * config["head_dim"],
        "v": kv_heads(config, layer) * config["v_head_dim"],
    }
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}{n}_proj.weight": (rows[n], hidden) for n in rows}
    if config["attention_bias"]:
        shapes |= {f"{prefix}{n}_proj.bias": (rows[n],) for n in rows}
    shapes[prefix + "o_proj.weight"] = (hidden, heads * config["v_head_dim"])
    if kinds(config)[layer] == SLIDING:
        shapes[prefix + "attention_sink_bias"] = (heads,)
    return shapes


def mimo_shapes(config: RawConfig) -> Shapes:
    """Return names and shapes of every tensor in the hub's checkpoint of this config."""
    return plain_shapes(config, attention_shapes, moe_layers)


ROWS = {
    "mimo_v2_flash": Row(
        shapes=mimo_shapes,
        has_own_modules=True,
        gguf="mimo2",
        has_own_spelling=True,
    ),
    "mimo_v2": Row(
        shapes=None,
        without_references="transformers has no class; `test_mimo_v2.py` joins tensors of mimo_v2_flash",
        has_own_spelling=True,
        without_mlx="MLX's checkpoints of it are refused",
    ),
}
