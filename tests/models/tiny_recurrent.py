"""Tiny configs of families with short convolutions, and the tensors of their checkpoints: LFM2-MoE.

Elsewhere: values and files are `tiny.py`; gated delta nets are `tiny_delta.py`.
"""

from __future__ import annotations

from typing import Any

from tests.models.rows import Row

RawConfig = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]

FAMILIES = ("lfm2_moe",)


def lfm2_moe(**changes: Any) -> RawConfig:
    """A config.json with the keys of LFM2-8B-A1B's."""
    return {
        "architectures": ["Lfm2MoeForCausalLM"],
        "bos_token_id": 1,
        "conv_L_cache": 3,
        "conv_bias": False,
        "dtype": "bfloat16",
        "eos_token_id": 7,
        "hidden_size": 28,
        "initializer_range": 0.02,
        "intermediate_size": 30,
        "layer_types": ["conv", "full_attention", "conv"],
        "max_position_embeddings": 128,
        "model_type": "lfm2_moe",
        "moe_intermediate_size": 9,
        "norm_eps": 1e-05,
        "norm_topk_prob": True,
        "num_attention_heads": 2,
        "num_dense_layers": 1,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "pad_token_id": 0,
        "rope_theta": 1000000.0,
        "routed_scaling_factor": 1.0,
        "tie_embedding": True,
        "transformers_version": "4.57.0.dev0",
        "use_cache": True,
        "use_expert_bias": True,
        "vocab_size": 76,
    } | changes


def is_tied(config: RawConfig) -> bool:
    return bool(config.get("tie_embedding", config.get("tie_word_embeddings", True)))


def lfm2_shapes(config: RawConfig) -> Shapes:
    """Return names and shapes of every tensor in the hub's checkpoint of this config."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, hidden)}
    for i, kind in enumerate(config["layer_types"]):
        layer = f"model.layers.{i}."
        shapes[layer + "operator_norm.weight"] = (hidden,)
        mixer = _conv_shapes if kind == "conv" else _attention_shapes
        shapes |= {layer + name: shape for name, shape in mixer(config).items()}
        shapes[layer + "ffn_norm.weight"] = (hidden,)
        block = layer + "feed_forward."
        if i < config["num_dense_layers"]:
            shapes |= _swiglu_shapes(block, hidden, config["intermediate_size"])
            continue
        shapes[block + "gate.weight"] = (config["num_experts"], hidden)
        if config["use_expert_bias"]:
            shapes[block + "expert_bias"] = (config["num_experts"],)
        for expert in range(config["num_experts"]):
            shapes |= _swiglu_shapes(f"{block}experts.{expert}.", hidden, config["moe_intermediate_size"])
    shapes["model.embedding_norm.weight"] = (hidden,)
    if not is_tied(config):
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def _attention_shapes(config: RawConfig) -> Shapes:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    dim = hidden // heads
    rows = config["num_key_value_heads"] * dim
    return {
        "self_attn.q_proj.weight": (heads * dim, hidden),
        "self_attn.k_proj.weight": (rows, hidden),
        "self_attn.v_proj.weight": (rows, hidden),
        "self_attn.out_proj.weight": (hidden, heads * dim),
        "self_attn.q_layernorm.weight": (dim,),
        "self_attn.k_layernorm.weight": (dim,),
    }


def _conv_shapes(config: RawConfig) -> Shapes:
    hidden = config["hidden_size"]
    shapes: Shapes = {
        "conv.in_proj.weight": (3 * hidden, hidden),
        "conv.conv.weight": (hidden, 1, config["conv_L_cache"]),
        "conv.out_proj.weight": (hidden, hidden),
    }
    if config["conv_bias"]:
        shapes |= {
            f"conv.{name}.bias": (shapes[f"conv.{name}.weight"][0],)
            for name in ("in_proj", "conv", "out_proj")
        }
    return shapes


def _swiglu_shapes(prefix: str, hidden: int, width: int) -> Shapes:
    return {
        f"{prefix}w1.weight": (width, hidden),
        f"{prefix}w3.weight": (width, hidden),
        f"{prefix}w2.weight": (hidden, width),
    }


ROWS = {
    "lfm2_moe": Row(
        shapes=lfm2_shapes, has_own_modules=True, has_own_experts=True, gguf="lfm2moe", chats=("lfm2",)
    )
}
