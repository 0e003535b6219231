"""Tiny checkpoints of families that differ from others by flags of norms, factors, networks and routers, and the part
of `numpy_model.py` that computes them.
"""

from __future__ import annotations

from typing import Any

from tests.models.rows import NO_CONVERTER, Row

RawConfig = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]

_COMMON: RawConfig = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 12,
    "max_position_embeddings": 128,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 96,
}


def flex_olmo(**changes: Any) -> RawConfig:
    """A config.json with the keys of FlexOlmo-7x7B-1T's."""
    family = {"architectures": ["FlexOlmoForCausalLM"], "model_type": "flex_olmo"}
    return {**_COMMON, **family, "num_experts": 6, "norm_topk_prob": False, **changes}


def granitemoe(**changes: Any) -> RawConfig:
    """A config.json with the keys of granite-3.1-1b-a400m's."""
    return {
        **_COMMON,
        "architectures": ["GraniteMoeForCausalLM"],
        "model_type": "granitemoe",
        "attention_multiplier": 0.3,
        "embedding_multiplier": 1.7,
        "logits_scaling": 1.5,
        "residual_multiplier": 0.7,
        "num_local_experts": 6,
        **changes,
    }


def granitemoeshared(**changes: Any) -> RawConfig:
    """The same with a shared expert."""
    family = {"architectures": ["GraniteMoeSharedForCausalLM"], "model_type": "granitemoeshared"}
    return granitemoe() | family | {"shared_intermediate_size": 20} | changes


def ernie4_5_moe(**changes: Any) -> RawConfig:
    """A config.json with the keys of ERNIE-4.5-21B-A3B's."""
    rest = {
        key: value for key, value in _COMMON.items() if key not in ("attention_bias", "num_experts_per_tok")
    }
    return {
        **rest,
        "architectures": ["Ernie4_5_MoeForCausalLM"],
        "model_type": "ernie4_5_moe",
        "intermediate_size": 24,
        "moe_gate": "topk",
        "moe_intermediate_size": 12,
        "moe_k": 2,
        "moe_layer_end_index": -1,
        "moe_layer_interval": 1,
        "moe_layer_start_index": 1,
        "moe_norm_min": 1e-12,
        "moe_num_experts": 6,
        "moe_num_shared_experts": 2,
        "moe_use_aux_free": True,
        "rope_theta": 500_000.0,
        "tie_word_embeddings": True,
        "use_bias": False,
        **changes,
    }


def num_experts(config: RawConfig) -> int:
    names = ("num_experts", "num_local_experts", "moe_num_experts")
    return next(config[name] for name in names if name in config)


def experts_per_token(config: RawConfig) -> int:
    return config.get("moe_k") or config["num_experts_per_tok"]


def is_moe(config: RawConfig, layer: int) -> bool:
    if config["model_type"] != "ernie4_5_moe":
        return True
    last = config["moe_layer_end_index"]
    end = config["num_hidden_layers"] if last == -1 else last + 1
    is_turn = (layer + 1) % config["moe_layer_interval"] == 0
    return is_turn and config["moe_layer_start_index"] <= layer < end


def flag_shapes(config: RawConfig) -> Shapes:
    """Return names and shapes of every tensor in the hub's checkpoint of this config."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes |= {prefix + name: shape for name, shape in _attention_shapes(config).items()}
        if not is_moe(config, layer):
            shapes |= _swiglu_shapes(prefix + "mlp.", hidden, config["intermediate_size"])
        elif config["model_type"].startswith("granite"):
            shapes |= {prefix + name: shape for name, shape in _granite_shapes(config).items()}
        else:
            shapes |= _moe_shapes(config, prefix + "mlp.")
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def _attention_shapes(config: RawConfig) -> Shapes:
    hidden = config["hidden_size"]
    dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    rows = {"q": config["num_attention_heads"] * dim, "k": config["num_key_value_heads"] * dim}
    rows["v"] = rows["k"]
    shapes: Shapes = {f"self_attn.{name}_proj.weight": (count, hidden) for name, count in rows.items()}
    shapes["self_attn.o_proj.weight"] = (hidden, rows["q"])
    if config.get("attention_bias"):
        shapes |= {f"self_attn.{name}_proj.bias": (count,) for name, count in (rows | {"o": hidden}).items()}
    if config["model_type"] == "flex_olmo":
        shapes |= {f"self_attn.{name}_norm.weight": (rows[name],) for name in "qk"}
        norms = ("post_attention_layernorm", "post_feedforward_layernorm")
    else:
        norms = ("input_layernorm", "post_attention_layernorm")
    return shapes | {name + ".weight": (hidden,) for name in norms}


def _swiglu_shapes(prefix: str, hidden: int, width: int) -> Shapes:
    shapes: Shapes = {f"{prefix}{name}_proj.weight": (width, hidden) for name in ("gate", "up")}
    return shapes | {prefix + "down_proj.weight": (hidden, width)}


def _moe_shapes(config: RawConfig, block: str) -> Shapes:
    hidden, count = config["hidden_size"], num_experts(config)
    width = config.get("moe_intermediate_size") or config["intermediate_size"]
    shapes: Shapes = {block + "gate.weight": (count, hidden)}
    if config["model_type"] == "ernie4_5_moe":
        shapes[block + "moe_statics.e_score_correction_bias"] = (1, count)
        if num_shared := config["moe_num_shared_experts"]:
            shapes |= _swiglu_shapes(block + "shared_experts.", hidden, num_shared * width)
    for expert in range(count):
        shapes |= _swiglu_shapes(f"{block}experts.{expert}.", hidden, width)
    return shapes


def _granite_shapes(config: RawConfig) -> Shapes:
    hidden, count, width = config["hidden_size"], num_experts(config), config["intermediate_size"]
    shapes: Shapes = {
        "block_sparse_moe.router.layer.weight": (count, hidden),
        "block_sparse_moe.input_linear.weight": (count, 2 * width, hidden),
        "block_sparse_moe.output_linear.weight": (count, hidden, width),
    }
    if shared := config.get("shared_intermediate_size"):
        shapes["shared_mlp.input_linear.weight"] = (2 * shared, hidden)
        shapes["shared_mlp.output_linear.weight"] = (hidden, shared)
    return shapes


FAMILIES = ("flex_olmo", "granitemoe", "granitemoeshared", "ernie4_5_moe")


ROWS = {
    "flex_olmo": Row(
        shapes=flag_shapes,
        has_own_modules=True,
        without_record=NO_CONVERTER,
        without_mlx="MLX does not know it",
    ),
    "granitemoe": Row(
        shapes=flag_shapes,
        has_own_modules=True,
        has_own_experts=True,
        chats=("granite",),
    ),
    "granitemoeshared": Row(
        shapes=flag_shapes,
        has_own_modules=True,
        has_own_experts=True,
        chats=("granite",),
        without_record="no released config is here",
        without_mlx="MLX does not know it",
    ),
    "ernie4_5_moe": Row(
        shapes=flag_shapes, chats=("ernie",), without_mlx="MLX leaves out the bias for the choice"
    ),
}
