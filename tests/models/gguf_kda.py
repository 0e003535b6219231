"""GGUF files of Kimi-Linear and Ling-3, for `gguf_models.py`: names, metadata, and vectors that conversion changes.

llama.cpp's conversion stores the rate of decay as -e^A_log in one and as e^A_log in the other, and convolutions with
four axes.
"""

from __future__ import annotations

import gguf
import numpy as np
from gguf import GGUFWriter

from tests.models.safetensors_file import Array
from tests.models.tiny_kda import FAMILIES, RawConfig, delta_heads, is_delta

_OF_DELTA = {
    "q_conv1d.weight": "ssm_conv1d_q.weight",
    "k_conv1d.weight": "ssm_conv1d_k.weight",
    "v_conv1d.weight": "ssm_conv1d_v.weight",
    "A_log": "ssm_a",
    "dt_bias": "ssm_dt.bias",
    "b_proj.weight": "ssm_beta.weight",
    "o_norm.weight": "ssm_norm.weight",
    "f_a_proj.weight": "ssm_f_a.weight",
    "f_b_proj.weight": "ssm_f_b.weight",
    "g_a_proj.weight": "ssm_g_a.weight",
    "g_b_proj.weight": "ssm_g_b.weight",
    "f_proj.weight": "ssm_f_a.weight",
}


def kda_name(hub_name: str, config: RawConfig) -> str | None:
    """Return the name of a tensor that only these families have or name so; None: it has the name of other families."""
    if config["model_type"] not in FAMILIES or not hub_name.startswith("model.layers."):
        return None
    _, _, layer, part, name = hub_name.split(".", 4)
    if part not in ("self_attn", "attention"):
        return None
    if name == "g_proj.weight":
        return f"blk.{layer}.{'ssm_g_a' if is_delta(config, int(layer)) else 'attn_gate'}.weight"
    return f"blk.{layer}.{_OF_DELTA[name]}" if name in _OF_DELTA else None


def as_stored(name: str, values: Array, config: RawConfig) -> Array:
    """Return a tensor of float32 as conversion stores it."""
    if name.endswith(".ssm_a") and config["model_type"] == "kimi_linear":
        return -np.exp(values)
    if name.endswith(".ssm_a"):
        return np.exp(values)[:, None]
    return values.reshape(1, values.shape[0], 1, -1) if ".ssm_conv1d_" in name else values


def add_kda_metadata(writer: GGUFWriter, config: RawConfig) -> None:
    """Write the metadata that llama.cpp's conversion script writes for such a model."""
    is_kimi, num_layers = config["model_type"] == "kimi_linear", config["num_hidden_layers"]
    writer.add_vocab_size(config["vocab_size"])
    writer.add_block_count(num_layers)
    writer.add_context_length(config["model_max_length" if is_kimi else "max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv([0 if is_delta(config, layer) else 1 for layer in range(num_layers)])
    writer.add_rope_freq_base(float(config["rope_theta"]))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_token" if is_kimi else "num_experts_per_tok"])
    if (groups := config["num_expert_group" if is_kimi else "n_group"]) > 1:
        writer.add_expert_group_count(groups)
        writer.add_expert_group_used_count(config["topk_group"])
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_shared_count(config["num_shared_experts"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_ssm_conv_kernel(
        (config["linear_attn_config"] if is_kimi else config)["short_conv_kernel_size"]
    )
    writer.add_kda_head_dim(delta_heads(config)[1])
    if config["q_lora_rank"] is not None:
        writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_kv_lora_rank(config["kv_lora_rank"])
    writer.add_rope_dimension_count(config["qk_rope_head_dim"])
    writer.add_key_length(config["kv_lora_rank"] + config["qk_rope_head_dim"])
    writer.add_value_length(config["head_dim"])  # which is not a head's
    writer.add_key_length_mla(config["qk_nope_head_dim"] + config["qk_rope_head_dim"])
    writer.add_value_length_mla(config["v_head_dim"])
    if not is_kimi:
        writer.add_expert_shared_feed_forward_length(config["moe_shared_expert_intermediate_size"])
        writer.add_expert_weights_norm(config["norm_topk_prob"])
        writer.add_bool("bailingmoe3.kda.safe_gate", config["kda_safe_gate"])
        writer.add_float32("bailingmoe3.kda.gate_lower_bound", config["kda_lower_bound"])
        writer.add_swiglu_clamp_exp(config["expert_swiglu_limit_list"])
        writer.add_swiglu_clamp_shexp(config["share_expert_swiglu_limit_list"])
    writer.add_tokenizer_model("none")
    if "bos_token_id" in config:
        writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
