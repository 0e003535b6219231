"""Tiny checkpoints of MiniMax-M3 as on the hub, its blocks in numpy, and the same model under names of GLM-4.5."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.models.rows import WHOLE, Row
from tests.models.safetensors_file import Array

if TYPE_CHECKING:
    from tests.models.numpy_model import NumpyModel, Places

RawConfig = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]


def minimax_m3(**changes: Any) -> RawConfig:
    """A config.json with the keys of MiniMax-M3's, and the model type that transformers adds to the text part.

    Two blocks of sixteen positions are chosen, and the prompts are longer.
    """
    sparse_layers = changes.pop("sparse_layers", [0, 1, 1])
    index = changes.pop("index", {})
    text = {
        "architectures": ["MiniMaxM3SparseForCausalLM"],
        "attention_output_gate": False,
        "bos_token_id": 1,
        "dense_intermediate_size": 19,
        "eos_token_id": 2,
        "head_dim": 10,
        "hidden_act": "swigluoai",
        "hidden_size": 28,
        "intermediate_size": 9,
        "max_position_embeddings": 128,
        "model_type": "minimax_m3_vl_text",
        "moe_layer_freq": sparse_layers,
        "n_shared_experts": 1,
        "num_attention_heads": 6,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "num_local_experts": 5,
        "num_mtp_modules": 7,
        "num_nextn_predict_layers": 1,
        "partial_rotary_factor": 0.6,
        "qk_norm_type": "per_head",
        "rms_norm_eps": 1e-06,
        "rope_theta": 5000000,
        "rotary_dim": 6,
        "routed_scaling_factor": 2.0,
        "scoring_func": "sigmoid",
        "shared_intermediate_size": 9,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "use_gemma_norm": True,
        "use_qk_norm": True,
        "use_routing_bias": True,
        "vocab_size": 61,
    } | changes
    text["sparse_attention_config"] = {
        "sparse_attention_freq": sparse_layers,
        "sparse_block_size": 16,
        "sparse_disable_index_value": sparse_layers,
        "sparse_index_dim": 14,
        "sparse_init_block": 0,
        "sparse_local_block": 1,
        "sparse_num_index_heads": text["num_key_value_heads"],
        "sparse_score_type": "max",
        "sparse_topk_blocks": 2,
        "use_sparse_attention": True,
    } | index
    return {
        "architectures": ["MiniMaxM3SparseForConditionalGeneration"],
        "image_token_index": 51,
        "model_type": "minimax_m3_vl",
        "text_config": text,
        "tie_word_embeddings": text["tie_word_embeddings"],
        "torch_dtype": "bfloat16",
        "transformers_version": "4.52.4",
        "video_token_index": 52,
        "vision_config": {
            "hidden_size": 16, "image_size": 28, "intermediate_size": 8, "num_attention_heads": 2,
            "num_channels": 3, "num_hidden_layers": 1, "patch_size": 14,
        },
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    }  # fmt: skip


def minimax_m3_shapes(config: RawConfig) -> Shapes:
    """Return names and shapes of every tensor in the hub's checkpoint of this config."""
    text = config["text_config"]
    hidden, vocab, dim = text["hidden_size"], text["vocab_size"], text["head_dim"]
    rows, kv_heads = text["num_attention_heads"] * dim, text["num_key_value_heads"]
    sparse = text["sparse_attention_config"]
    index_dim = sparse["sparse_index_dim"]
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    for i in range(text["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        attention, block = layer + "self_attn.", layer + "block_sparse_moe."
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}{name}.weight"] = (hidden,)
        for name, count in (("q", rows), ("k", kv_heads * dim), ("v", kv_heads * dim)):
            shapes[f"{attention}{name}_proj.weight"] = (count, hidden)
        shapes[attention + "o_proj.weight"] = (hidden, rows)
        shapes[attention + "q_norm.weight"] = shapes[attention + "k_norm.weight"] = (dim,)
        if sparse["sparse_attention_freq"][i]:
            shapes[attention + "index_q_proj.weight"] = (kv_heads * index_dim, hidden)
            shapes[attention + "index_k_proj.weight"] = (index_dim, hidden)
            shapes[attention + "index_q_norm.weight"] = (index_dim,)
            shapes[attention + "index_k_norm.weight"] = (index_dim,)
        if not text["moe_layer_freq"][i]:
            shapes |= _swiglu(layer + "mlp.", hidden, text["dense_intermediate_size"])
            continue
        shapes[block + "gate.weight"] = (text["num_local_experts"], hidden)
        shapes[block + "e_score_correction_bias"] = (text["num_local_experts"],)
        shapes |= _swiglu(block + "shared_experts.", hidden, text["shared_intermediate_size"])
        for expert in range(text["num_local_experts"]):
            for name, shape in (("w1", (9, 28)), ("w3", (9, 28)), ("w2", (28, 9))):
                sizes = {28: hidden, 9: text["intermediate_size"]}
                shapes[f"{block}experts.{expert}.{name}.weight"] = tuple(sizes[size] for size in shape)
    if not text["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    return {f"language_model.{name}": shape for name, shape in shapes.items()} | {
        "vision_tower.vision_model.pre_layrnorm.bias": (16,),
        "patch_merge_mlp.linear_2.bias": (hidden,),
    }


def _swiglu(prefix: str, hidden: int, width: int) -> Shapes:
    return {
        f"{prefix}gate_proj.weight": (width, hidden),
        f"{prefix}up_proj.weight": (width, hidden),
        f"{prefix}down_proj.weight": (hidden, width),
    }


def as_glm(config: RawConfig, tensors: Mapping[str, Array]) -> tuple[RawConfig, dict[str, Array]]:
    """The same model under the names of a GLM-4.5 with whole norms; its activation and blocks are not a GLM's."""
    parts = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    renamed: dict[str, Array] = {}
    for name, values in tensors.items():
        new = re.sub(r"(experts\.\d+\.)(w\d)", lambda found: found[1] + parts[found[2]], name)
        new = new.replace(".e_score_correction_bias", ".gate.e_score_correction_bias")
        new = new.replace(".block_sparse_moe.", ".mlp.")
        renamed[new] = values + 1 if name.endswith("norm.weight") else values
    glm = {"model_type": "glm4_moe", "norm_topk_prob": True, "is_clamped": True}
    return config | glm, renamed


def sees_blocks(model: NumpyModel, prefix: str, x: Array, places: Places) -> Array:
    """Return bool [KV heads, tokens, positions]: whether a head sees a position, by the blocks that it chooses."""
    from tests.models.numpy_model import rotate

    sparse = model.config["sparse_attention_config"]
    size, count, local = (sparse[f"sparse_{name}"] for name in ("block_size", "topk_blocks", "local_block"))
    q, k = (
        rotate(
            model.norm(
                f"{prefix}index_{name}_norm",
                model.linear(f"{prefix}index_{name}_proj", x).reshape(len(x), -1, sparse["sparse_index_dim"]),
            ),
            places,
        )
        for name in "qk"
    )
    block = np.arange(len(x)) // size
    scores = np.where(places.is_seen(), np.einsum("thd,sd->hts", q, k[:, 0]), -np.inf)
    of_blocks = np.stack([scores[:, :, block == b].max(axis=2) for b in range(block[-1] + 1)], axis=2)
    back = block[:, None] - np.arange(block[-1] + 1)
    of_blocks[:, (back >= 0) & (back < local)] = np.inf
    order = np.argsort(-of_blocks, axis=2, kind="stable")
    is_chosen = np.zeros(of_blocks.shape, bool)
    np.put_along_axis(is_chosen, order[:, :, :count], True, axis=2)
    return is_chosen[:, :, block] & places.is_seen()


ROWS = {
    "minimax_m3_vl": Row(
        shapes=minimax_m3_shapes,
        loading=WHOLE,
        has_own_modules=True,
        has_own_experts=True,
        has_zero_centred_norms=True,
        as_known=as_glm,
        prompt_tokens=60,
        has_own_spelling=True,
        gguf="minimax-m3",
        chats=("minimax_m3",),
        without_mlx="MLX's checkpoints of it are refused",
    )
}
