"""Tiny configs of Hy4, the tensors of their checkpoints, and its streams in numpy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tests.models.numpy_deepseek_v41 import rms, sigmoid
from tests.models.rows import Row
from tests.models.safetensors_file import Array
from tests.models.tiny_latent import indexer_shapes, layer_shapes

if TYPE_CHECKING:
    from tests.models.numpy_model import NumpyModel, Places

RawConfig = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]

FAMILIES = ("hy_v4",)


def hy_v4(**changes: Any) -> RawConfig:
    """A config.json with the keys of Hy4-preview's."""
    return {
        "architectures": ["HYV4ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "enable_ihc": True,
        "enable_lm_head_fp32": True,
        "eos_token_id": 2,
        "gated_mla": True,
        "gating_type": "elementwise",
        "hc_eps": 1e-6,
        "hc_magnitude": 2.0,
        "hc_mult": 4,
        "head_dim": 6,
        "hidden_act": "silu",
        "hidden_size": 28,
        "index_head_dim": 10,
        "index_n_heads": 5,
        "index_topk": 6,
        "indexer_types": ["full", "full", "shared"],
        "initializer_range": 0.006,
        "intermediate_size": 24,
        "kv_lora_rank": 14,
        "layer_types": ["deepseek_sparse_attention"] * 3,
        "learnable_sink": True,
        "learnable_sink_init": 0.0,
        "max_position_embeddings": 256,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "model_type": "hy_v4",
        "moe_intermediate_size": 9,
        "n_group": 1,
        "n_routed_experts": 7,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 3,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "num_nextn_predict_layers": 1,
        "pad_token_id": 0,
        "q_lora_rank": 12,
        "qk_head_dim": 16,
        "qk_nope_head_dim": 10,
        "qk_rope_head_dim": 6,
        "rms_norm_eps": 1e-05,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "routed_scaling_factor": 2.827,
        "swiglu_limit": 0.6,
        "tie_word_embeddings": False,
        "topk_group": 1,
        "transformers_version": "5.16.2",
        "use_dsa": True,
        "use_mla": True,
        "v_head_dim": 12,
        "vocab_size": 72,
    } | changes


def tensor_shapes(config: RawConfig) -> Shapes:
    """Return names and shapes of every tensor in the hub's checkpoint of this config."""
    hidden, vocab, streams = config["hidden_size"], config["vocab_size"], config["hc_mult"]
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        shapes |= layer_shapes(config, layer, is_moe=config["mlp_layer_types"][i] == "sparse")
        shapes |= indexer_shapes(config, layer) if config["indexer_types"][i] == "full" else {}
        heads = config["num_attention_heads"]
        shapes[f"{layer}self_attn.linear_gate.weight"] = (heads * config["v_head_dim"], hidden)
        shapes[f"{layer}self_attn.learnable_sink_param"] = (heads,)
        for part in ("attn", "mlp"):
            mix = f"{layer}hc_{part}_layer.hc_pre.hc_"
            shapes |= {
                mix + "fn": (2 * streams, streams * hidden),
                mix + "base": (2 * streams,),
                mix + "scale": (2,),
            }
    head = "model.hc_head.hc_head_"
    shapes |= {head + "fn": (streams, streams * hidden), head + "base": (streams,), head + "scale": (1,)}
    if config.get("num_nextn_predict_layers"):
        shapes["model.mtp_layers.0.eh_proj.weight"] = (hidden, 2 * hidden)
    return shapes if config["tie_word_embeddings"] else shapes | {"lm_head.weight": (vocab, hidden)}


def run_layers(model: NumpyModel, hidden: Array, places: list[Places]) -> Array:
    """Return what the final norm reads after all layers."""
    config, tensors = model.config, model.tensors
    count, eps = config["hc_mult"], config["hc_eps"]
    streams = np.repeat(hidden[:, None], count, axis=1)

    def weights(name: str) -> Array:
        raw = rms(streams.reshape(len(streams), -1), config["rms_norm_eps"]) @ tensors[name + "fn"].T
        scale, base = tensors[name + "scale"], tensors[name + "base"]
        gates: Array = sigmoid(raw * np.repeat(scale, count) + base)
        return gates

    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for part, norm in (("attn", "input_layernorm"), ("mlp", "post_attention_layernorm")):
            gates = weights(f"{prefix}hc_{part}_layer.hc_pre.hc_")
            x = model.norm(prefix + norm, ((gates[:, :count, None] + eps) * streams).sum(axis=1))
            out = model.attention(layer, x, places[layer]) if part == "attn" else model.feed_forward(layer, x)
            streams = streams + (config["hc_magnitude"] * gates[:, count:, None] + eps) * out[:, None]
        model.hidden_states.append(streams.mean(axis=1))
    head: Array = ((weights("model.hc_head.hc_head_")[..., None] + eps) * streams).sum(axis=1)
    return head


ROWS = {
    "hy_v4": Row(
        shapes=tensor_shapes,
        has_own_modules=True,
        has_own_experts=True,
        chats=("hy4",),
        without_mlx="MLX has no class for it",
    ),
}
