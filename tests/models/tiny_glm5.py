"""Tiny configs of GLM-5.3-Flash, the tensors of their checkpoints, and its streams in numpy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.models.numpy_deepseek_v41 import mixes
from tests.models.numpy_kda import kimi_delta_attention
from tests.models.rows import WHOLE, Row
from tests.models.safetensors_file import Array

if TYPE_CHECKING:
    from tests.models.numpy_model import NumpyModel, Places

RawConfig = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]

FAMILIES = ("glm5_next", "glm5_next_text")
PREFIX = "model.language_model."


def glm5_next(**changes: Any) -> RawConfig:
    """A config.json with the keys of GLM-5.3-Flash's; `changes` are those of `text_config`."""
    text = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": [2, 3],
        "first_k_dense_replace": 1,
        "hc_eps": 1e-6,
        "hc_mult": 4,
        "hc_sinkhorn_iters": 20,
        "hidden_act": "silu",
        "hidden_size": 28,
        "index_head_dim": 8,
        "index_kpool": 16,
        "index_kpool_always_select_tail": True,
        "index_n_heads": 2,
        "index_topk": 64,
        "initializer_range": 0.02,
        "intermediate_size": 26,
        "kv_lora_rank": 18,
        "layer_types": ["linear_attention", "indexed_attention", "linear_attention"],
        "linear_conv_kernel_dim": 4,
        "linear_head_dim": 10,
        "linear_lower_bound": -5.0,
        "linear_num_heads": 3,
        "max_position_embeddings": 128,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "model_type": "glm5_next_text",
        "moe_intermediate_size": 9,
        "n_group": 1,
        "n_routed_experts": 5,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 3,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 3,
        "num_key_value_heads": 3,
        "pad_token_id": 0,
        "q_lora_rank": 15,
        "qk_nope_head_dim": 10,
        "qk_rope_head_dim": 0,
        "rms_norm_eps": 1e-05,
        "routed_scaling_factor": 2.5,
        "swiglu_limit": 10.0,
        "tie_word_embeddings": False,
        "topk_group": 1,
        "v_head_dim": 12,
        "vocab_size": 80,
    } | changes
    return {
        "architectures": ["Glm5NextForConditionalGeneration"],
        "image_end_token_id": 73,
        "image_start_token_id": 72,
        "image_token_id": 70,
        "model_type": "glm5_next",
        "text_config": text,
        "tie_word_embeddings": text["tie_word_embeddings"],
        "transformers_version": "5.24.0",
        "video_end_token_id": 75,
        "video_start_token_id": 74,
        "video_token_id": 71,
        "vision_config": {
            "depth": 1, "hidden_size": 8, "intermediate_size": 8, "model_type": "glm5_next_vision", "num_heads": 1,
            "out_hidden_size": text["hidden_size"], "patch_size": 2, "projection_intermediate_size": 4,
        },
    }  # fmt: skip


def tensor_shapes(raw: RawConfig) -> Shapes:
    """Return names and shapes of the text model's tensors in the hub's checkpoint of this config."""
    config = raw["text_config"]
    hidden, heads, dim = config["hidden_size"], config["linear_num_heads"], config["linear_head_dim"]
    shapes: Shapes = {f"{PREFIX}embed_tokens.weight": (config["vocab_size"], hidden)}
    for i in range(config["num_hidden_layers"]):
        layer, of_layer = f"{PREFIX}layers.{i}.", _streams(config)
        of_layer |= {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
        is_delta = config["layer_types"][i] == "linear_attention"
        mixer = _delta_shapes(config, hidden, heads, dim) if is_delta else _latent_shapes(config)
        if "indexer_types" in config and config["indexer_types"][i] == "shared":
            mixer = {name: shape for name, shape in mixer.items() if not name.startswith("indexer.")}
        of_layer |= {f"self_attn.{name}": shape for name, shape in mixer.items()}
        if config["mlp_layer_types"][i] == "dense":
            of_layer |= _network("mlp.", hidden, config["intermediate_size"])
        else:
            width, count = config["moe_intermediate_size"], config["n_routed_experts"]
            of_layer |= {"mlp.gate.weight": (count, hidden), "mlp.gate.e_score_correction_bias": (count,)}
            for expert in range(count):
                of_layer |= _network(f"mlp.experts.{expert}.", hidden, width)
            of_layer |= _network("mlp.shared_experts.", hidden, width * config["n_shared_experts"])
        shapes |= {layer + name: shape for name, shape in of_layer.items()}
    shapes[f"{PREFIX}norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def _streams(config: RawConfig) -> Shapes:
    count, hidden = config["hc_mult"], config["hidden_size"]
    rows = count * (2 + count)
    return {
        f"hc_{part}_{name}": shape
        for part in ("attn", "ffn")
        for name, shape in (("fn", (rows, count * hidden)), ("base", (rows,)), ("scale", (3,)))
    }


def _delta_shapes(config: RawConfig, hidden: int, heads: int, dim: int) -> Shapes:
    rows, width = heads * dim, config["linear_conv_kernel_dim"]
    return {
        **{f"{name}_proj.weight": (rows, hidden) for name in "qkv"},
        **{f"{name}_conv1d.weight": (rows, 1, width) for name in "qkv"},
        **{f"{name}_a_proj.weight": (dim, hidden) for name in "fg"},
        **{f"{name}_b_proj.weight": (rows, dim) for name in "fg"},
        "A_log": (heads,), "dt_bias": (rows,), "b_proj.weight": (heads, hidden), "o_norm.weight": (dim,),
        "o_proj.weight": (hidden, rows),
    }  # fmt: skip


def _latent_shapes(config: RawConfig) -> Shapes:
    hidden, heads, rank = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    nope, value, query = config["qk_nope_head_dim"], config["v_head_dim"], config["q_lora_rank"]
    index, pool = config["index_head_dim"], config["index_kpool"]
    return {
        "q_a_proj.weight": (query, hidden), "q_a_layernorm.weight": (query,),
        "q_b_proj.weight": (heads * nope, query), "kv_a_proj_with_mqa.weight": (rank, hidden),
        "kv_a_layernorm.weight": (rank,), "kv_b_proj.weight": (heads * (nope + value), rank),
        "o_proj.weight": (hidden, heads * value), "indexer.wq_b.weight": (config["index_n_heads"] * index, query),
        "indexer.wk.weight": (index, hidden), "indexer.k_norm.weight": (index,), "indexer.k_norm.bias": (index,),
        "indexer.weights_proj.weight": (config["index_n_heads"], hidden),
        "indexer.index_kpool_compress_ape": (pool, index), "indexer.index_kpool_compress_gate": (index, hidden),
    }  # fmt: skip


def _network(prefix: str, hidden: int, width: int) -> Shapes:
    return {
        f"{prefix}gate_proj.weight": (width, hidden),
        f"{prefix}up_proj.weight": (width, hidden),
        f"{prefix}down_proj.weight": (hidden, width),
    }


def released(raw: RawConfig) -> RawConfig:
    """Return the config as the released files have it: the sizes of Kimi Delta Attention in an object."""
    text = dict(raw["text_config"])
    linear = {
        "gate_lower_bound": text.pop("linear_lower_bound"),
        "head_dim": text.pop("linear_head_dim"),
        "num_heads": text.pop("linear_num_heads"),
        "safe_gate": True,
        "short_conv_kernel_size": text.pop("linear_conv_kernel_dim"),
    }
    return raw | {"text_config": text | {"linear_attn_config": linear, "mhc": True, "mla_use_nope": True}}


def as_known(config: RawConfig, tensors: Mapping[str, Any]) -> tuple[RawConfig, dict[str, Any]]:
    """Add the keys by which `numpy_model.py` knows the parts."""
    known = {
        "head_dim": config["linear_head_dim"], "kda_lower_bound": config["linear_lower_bound"], "kda_safe_gate": True,
        "latent_norm_eps": config["rms_norm_eps"], "mla_use_nope": True,
        "linear_attn_config": {"head_dim": config["linear_head_dim"], "num_heads": config["linear_num_heads"]},
        "rope_theta": 1e4,
    }  # fmt: skip
    return {key: value for key, value in config.items() if key != "layer_types"} | known, dict(tensors)


def run_layers(model: NumpyModel, hidden: Array, places: list[Places]) -> Array:
    """Return the mean of the streams after all layers."""
    config = model.config
    streams = np.repeat(hidden[:, None], config["hc_mult"], axis=1)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."

        def mixer(x: Array, layer: int = layer, prefix: str = prefix) -> Array:
            if prefix + "self_attn.A_log" in model.tensors:
                return kimi_delta_attention(config, model.tensors, prefix + "self_attn.", x)
            return model.attention(layer, x, places[layer])

        def network(x: Array, layer: int = layer) -> Array:
            return model.feed_forward(layer, x)

        for part, norm, run in (
            ("attn", "input_layernorm", mixer),
            ("ffn", "post_attention_layernorm", network),
        ):
            pre, post, mixed = mixes(streams, model.tensors, f"{prefix}hc_{part}", config)
            out = run(model.norm(prefix + norm, (pre[..., None] * streams).sum(axis=1)))
            streams = post[..., None] * out[:, None] + np.einsum("nij,nid->njd", mixed, streams)
        model.hidden_states.append(streams.mean(axis=1))
    mean: Array = streams.mean(axis=1)
    return mean


ROWS = {
    "glm5_next": Row(
        shapes=tensor_shapes,
        loading=WHOLE,
        has_own_modules=True,
        has_own_experts=True,
        as_known=as_known,
        released=released,
        without_mlx="MLX has no class for it",
    ),
}
