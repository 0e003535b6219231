"""Tiny configs and tensors of DeepSeek-V4.1, with the released checkpoint's keys and names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.families.published_sparse import DEEPSEEK_V4_1_FLASH
from tests.models.hub_schemes import as_stored, fp4, fp8
from tests.models.numpy_deepseek_v41 import engram_rows
from tests.models.rows import Row
from tests.models.safetensors_file import Array, write_safetensors

RawConfig = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]
_FP8 = fp8((32, 32), "F8_E8M0", "scale")
_FP4 = fp4(32, "F8_E8M0", "weight", scale_name="scale", codes_dtype="I8")
_CODED = {
    "engram.embed.": fp8((1, 32), "F8_E8M0", "scale"),
    ".shared_experts.": _FP8,
    ".engram.wkv.": _FP8,
    ".indexer.wq_b.": _FP8,
    **{f".attn.{name}.": _FP8 for name in ("wq_a", "wq_b", "wkv", "wo_a", "wo_b")},
}


def text_config(**changes: Any) -> RawConfig:
    """Return a `text_config`: two groups of layers that share a cache, and two tables of n-grams."""
    config = {
        "model_type": "deepseek_v41_text",
        "vocab_size": 99,
        "hidden_size": 40,
        "num_hidden_layers": 6,
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
        "scoring_func": "sqrtsoftplus",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.5,
        "swiglu_limit": 10.0,
        "rms_norm_eps": 1e-20,
        "sliding_window": 5,
        "compress_ratios": [0, 2, 2, 1, 1, 1],
        "kv_source_layer_ids": [1, 3],
        "index_source_layer_ids": [1, 3, 4],
        "candidate_source_layer_id": 3,
        "candidate_topk_blocks": 4,
        "candidate_block_size": 2,
        "index_n_heads": 8,
        "index_head_dim": 12,
        "index_topk": 6,
        "rope_theta": 10000.0,
        "compress_rope_theta": 160000.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 16,
            "beta_fast": 32,
            "beta_slow": 1,
            "original_max_position_embeddings": 64,
        },
        "max_position_embeddings": 1024,
        "hc_mult": 4,
        "hc_sinkhorn_iters": 20,
        "hc_eps": 1e-6,
        "engram_layer_ids": [1, 4],
        "engram_max_ngram_size": 4,
        "engram_vocab_size": 97,
        "engram_n_heads": 2,
        "engram_head_dim": 8,
        "engram_pad_token_id": 2,
        "engram_compressed_vocab_size": 64,
        "num_nextn_predict_layers": 0,
        "tie_word_embeddings": False,
    }
    return config | changes


def shapes(config: RawConfig, table_rows: dict[int, int]) -> Shapes:
    """Return the shape of every tensor; `table_rows` are the rows of each layer's table."""
    hidden, dim, width = config["hidden_size"], config["head_dim"], config["moe_intermediate_size"]
    rank, low = config["q_lora_rank"], config["o_groups"] * config["o_lora_rank"]
    heads, streams = config["num_attention_heads"], config["hc_mult"]
    index_heads, index_dim = config["index_n_heads"], config["index_head_dim"]
    found: Shapes = {
        "embed.weight": (config["vocab_size"], hidden),
        "head.weight": (config["vocab_size"], hidden),
        "norm.weight": (hidden,),
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
            "ffn.gate.weight": (config["n_routed_experts"], hidden),
            "ffn.gate.bias": (config["n_routed_experts"],),
        }
        for part in ("attn", "ffn"):
            mixes = (2 + streams) * streams
            of_layer |= {
                f"hc_{part}_fn": (mixes, streams * hidden),
                f"hc_{part}_base": (mixes,),
                f"hc_{part}_scale": (3,),
            }
        if is_source := layer in config["kv_source_layer_ids"]:
            of_layer |= {"attn.compressor.wkv.weight": (dim, hidden), "attn.compressor.norm.weight": (dim,)}
            if config["compress_ratios"][layer] > 1:
                of_layer["attn.compressor.wgate.weight"] = (dim, hidden)
        if layer in config["index_source_layer_ids"]:
            of_layer |= {
                "attn.indexer.wq_b.weight": (index_heads * index_dim, rank),
                "attn.indexer.weights_proj.weight": (index_heads, hidden),
            }
            if is_source:
                of_layer |= {
                    "attn.indexer.wk.weight": (index_dim, dim),
                    "attn.indexer.k_norm.weight": (index_dim,),
                }
        networks = [f"ffn.experts.{expert}." for expert in range(config["n_routed_experts"])]
        for name in (*networks, "ffn.shared_experts."):
            of_layer |= {
                f"{name}w1.weight": (width, hidden),
                f"{name}w2.weight": (hidden, width),
                f"{name}w3.weight": (width, hidden),
            }
        if layer in table_rows:
            read = (
                (config["engram_max_ngram_size"] - 1) * config["engram_n_heads"] * config["engram_head_dim"]
            )
            of_layer |= {
                "engram.embed.weight": (table_rows[layer], config["engram_head_dim"]),
                "engram.wkv.weight": ((streams + 1) * hidden, read),
                "engram.q_weight": (streams, hidden),
                "engram.k_weight": (streams, hidden),
            }
        found |= {f"layers.{layer}.{name}": shape for name, shape in of_layer.items()}
    return found


def random_tensors(config: RawConfig, table_rows: dict[int, int], seed: int) -> dict[str, Array]:
    """Return float32 values of every tensor, of a size at which every part matters."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, Array] = {}
    for name, shape in shapes(config, table_rows).items():
        drawn = rng.standard_normal(shape).astype(np.float32)
        if "norm." in name or name.endswith(("q_weight", "k_weight")):
            tensors[name] = 1 + 0.1 * drawn
        elif name.endswith("_scale"):
            tensors[name] = 0.5 + 0.1 * drawn
        elif len(shape) == 1:
            tensors[name] = 0.3 * drawn
        else:
            tensors[name] = drawn * np.float32(1.2 / np.sqrt(shape[-1]))
    return tensors


def deepseek_v41(**changes: Any) -> RawConfig:
    """Return a `config.json`; the changes are for its text part."""
    return {
        "model_type": "deepseek_v41",
        "architectures": ["DeepseekV41ForCausalLM"],
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "text_config": text_config(**changes),
    }


def folded(config: RawConfig) -> Array:
    """Return the folded id of each token of a text config."""
    ids = np.arange(config["vocab_size"])
    return np.where(
        ids < config["engram_compressed_vocab_size"], ids, ids - config["engram_compressed_vocab_size"]
    )


def coded(
    tensors: dict[str, Array], experts: str, seed: int
) -> tuple[dict[str, tuple[str, Array]], dict[str, Array]]:
    """Return tensors of the released types, drawn anew where they have codes, and their values."""
    rng = np.random.default_rng(seed)
    stored: dict[str, tuple[str, Array]] = {}
    values: dict[str, Array] = {}
    for name, given in tensors.items():
        quantise = next((one for part, one in _CODED.items() if part in name), None)
        if ".experts." in name:
            quantise = _FP4 if experts == "fp4" else _FP8
        if quantise is None:
            stored[name] = ("BF16" if given.ndim == 2 and "hc_" not in name else "F32"), given
            values[name] = as_stored(stored[name][0], given)
            continue
        parts, values[name] = quantise(rng, given.shape, 1.2 / np.sqrt(given.shape[1]))
        stored |= {name.removesuffix("weight") + last: one for last, one in parts.items()}
    return stored, values


def write_deepseek_v41(
    directory: Path, config: RawConfig, seed: int, *, experts: str | None = None, last: str = ""
) -> dict[str, Array]:
    """Write a checkpoint and its tokenizer; return the values of its tensors.

    Args:
        experts: "fp4": all weights are stored as in the released files; "fp8": also those of experts are FP8; None:
            all weights are float32.
        last: the tensor at the end of the file.
    """
    text = config["text_config"]
    rows = {layer: 64 + int(found.max()) for layer, found in engram_rows(text, range(500)).items()}
    tensors = random_tensors(text, rows, seed)
    if "vision_config" in config:
        rng, num_experts = np.random.default_rng([seed, 1]), text["n_routed_experts"]
        for layer in range(text["num_hidden_layers"]):
            drawn = 0.3 * rng.standard_normal(num_experts)
            tensors[f"layers.{layer}.ffn.gate.bias_vl"] = drawn.astype(np.float32)
    stored = {name: ("F32", one) for name, one in tensors.items()}
    if experts is not None:
        stored, tensors = coded(tensors, experts, seed)
        settings = DEEPSEEK_V4_1_FLASH["quantization_config"] | {"expert_dtype": experts}
        config = config | {"quantization_config": settings}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    write_safetensors(
        directory / "model.safetensors", dict(sorted(stored.items(), key=lambda one: one[0] == last))
    )
    words = [f"w{i}" if i == token else f"W{i}" for token, i in enumerate(folded(text).tolist())]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(directory / "tokenizer.json"))
    return tensors


ROWS = {
    "deepseek_v41": Row(
        shapes=None,
        without_references="`test_deepseek_v41.py` compares with a numpy model, and `tests/oracle` that with mlx-lm",
        without_record="llama.cpp has no converter",
        without_converted="llama.cpp has no converter",
        without_mlx="no checkpoint of MLX has been read",
        chats=("deepseek_v41",),
    )
}
