"""Tiny configs and tensors of DeepSeek-V4, with the released checkpoint's keys and names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.models.rows import Row
from tests.models.safetensors_file import Array
from tests.models.tiny import random_tensors, write_model

RawConfig = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]


def deepseek_v4(**changes: Any) -> RawConfig:
    """Return a config with every kind of layer: window only, both ratios, experts by token and by choice."""
    config: RawConfig = {
        "model_type": "deepseek_v4",
        "architectures": ["DeepseekV4ForCausalLM"],
        "vocab_size": 99,
        "hidden_size": 40,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 20,
        "q_lora_rank": 24,
        "qk_rope_head_dim": 8,
        "o_groups": 2,
        "o_lora_rank": 12,
        "moe_intermediate_size": 16,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "num_hash_layers": 1,
        "scoring_func": "sqrtsoftplus",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.5,
        "swiglu_limit": 10.0,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "sliding_window": 6,
        "compress_ratios": [0, 4, 128, 4],
        "index_n_heads": 8,
        "index_head_dim": 12,
        "index_topk": 3,
        "rope_theta": 10000.0,
        "compress_rope_theta": 160000.0,
        "rope_scaling": {
            "type": "yarn",
            "factor": 16,
            "beta_fast": 32,
            "beta_slow": 1,
            "original_max_position_embeddings": 64,
        },
        "max_position_embeddings": 1024,
        "hc_mult": 4,
        "hc_sinkhorn_iters": 20,
        "hc_eps": 1e-6,
        "num_nextn_predict_layers": 0,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return config | changes


def shapes(config: RawConfig) -> Shapes:
    """Return the shape of every tensor in the released checkpoint of a config."""
    hidden, dim, width = config["hidden_size"], config["head_dim"], config["moe_intermediate_size"]
    rank, low = config["q_lora_rank"], config["o_groups"] * config["o_lora_rank"]
    heads, streams, experts = (
        config["num_attention_heads"],
        config["hc_mult"],
        config["n_routed_experts"],
    )
    index_heads, index_dim = config["index_n_heads"], config["index_head_dim"]
    found: Shapes = {
        "embed.weight": (config["vocab_size"], hidden),
        "head.weight": (config["vocab_size"], hidden),
        "norm.weight": (hidden,),
        "hc_head_fn": (streams, streams * hidden),
        "hc_head_base": (streams,),
        "hc_head_scale": (1,),
    }
    for layer in range(config["num_hidden_layers"]):
        of_layer: Shapes = {
            "attn_norm.weight": (hidden,),
            "ffn_norm.weight": (hidden,),
            "attn.attn_sink": (heads,),
            "attn.wq_a.weight": (rank, hidden),
            "attn.q_norm.weight": (rank,),
            "attn.wq_b.weight": (heads * dim, rank),
            "attn.wkv.weight": (dim, hidden),
            "attn.kv_norm.weight": (dim,),
            "attn.wo_a.weight": (low, heads * dim // config["o_groups"]),
            "attn.wo_b.weight": (hidden, low),
            "ffn.gate.weight": (experts, hidden),
        }
        if layer < config["num_hash_layers"]:
            of_layer["ffn.gate.tid2eid"] = (config["vocab_size"], config["num_experts_per_tok"])
        else:
            of_layer["ffn.gate.bias"] = (experts,)
        if config.get("vision_n_layers"):
            of_layer["ffn.gate.bias_vl"] = (experts,)
        for part in ("attn", "ffn"):
            mixes = (2 + streams) * streams
            of_layer |= {
                f"hc_{part}_fn": (mixes, streams * hidden),
                f"hc_{part}_base": (mixes,),
                f"hc_{part}_scale": (3,),
            }
        if ratio := config["compress_ratios"][layer]:
            of_layer |= _pool("attn.compressor.", hidden, dim, ratio)
        if ratio == 4:
            of_layer |= _pool("attn.indexer.compressor.", hidden, index_dim, ratio)
            of_layer |= {
                "attn.indexer.wq_b.weight": (index_heads * index_dim, rank),
                "attn.indexer.weights_proj.weight": (index_heads, hidden),
            }
        for name in (*(f"ffn.experts.{expert}." for expert in range(experts)), "ffn.shared_experts."):
            of_layer |= {
                f"{name}w1.weight": (width, hidden),
                f"{name}w2.weight": (hidden, width),
                f"{name}w3.weight": (width, hidden),
            }
        found |= {f"layers.{layer}.{name}": shape for name, shape in of_layer.items()}
    return found


def _pool(prefix: str, hidden: int, dim: int, ratio: int) -> Shapes:
    wide = 2 * dim if ratio == 4 else dim
    return {
        f"{prefix}wkv.weight": (wide, hidden),
        f"{prefix}wgate.weight": (wide, hidden),
        f"{prefix}ape": (ratio, wide),
        f"{prefix}norm.weight": (dim,),
    }


def write_deepseek_v4(directory: Path, config: RawConfig, seed: int) -> dict[str, Array]:
    """Write a checkpoint, with weights in float32; return its tensors."""
    write_model(directory, config, seed=seed, dtype="F32")
    return random_tensors(config, seed, "F32")


ROWS = {
    "deepseek_v4": Row(
        shapes=shapes,
        has_own_experts=True,
        has_own_modules=True,
        prompt_tokens=140,
        without_record="`test_deepseek_v4.py` compares the metadata with the config",
        without_converted="`gguf_deepseek_v4.py` writes the converter's names",
        without_mlx="no checkpoint of MLX has been read",
        chats=("deepseek_v4",),
    )
}
