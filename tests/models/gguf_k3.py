"""GGUF files of Kimi-K3, with the metadata and names of llama.cpp's `conversion/kimi_k3.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np
from gguf import GGUFWriter

from tests.models.safetensors_file import Array
from tests.models.tiny_k3 import RawConfig

_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_conv1d.weight": "ssm_conv1d_q.weight",
    "self_attn.k_conv1d.weight": "ssm_conv1d_k.weight",
    "self_attn.v_conv1d.weight": "ssm_conv1d_v.weight",
    "self_attn.A_log": "ssm_a",
    "self_attn.dt_bias": "ssm_dt.bias",
    "self_attn.b_proj.weight": "ssm_beta.weight",
    "self_attn.o_norm.weight": "ssm_norm.weight",
    "self_attn.f_a_proj.weight": "ssm_f_a.weight",
    "self_attn.f_b_proj.weight": "ssm_f_b.weight",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "block_sparse_moe.gate.weight": "ffn_gate_inp.weight",
    "block_sparse_moe.gate.e_score_correction_bias": "exp_probs_b.bias",
    "block_sparse_moe.routed_expert_down_proj.weight": "ffn_routed_down.weight",
    "block_sparse_moe.routed_expert_up_proj.weight": "ffn_routed_up.weight",
    "block_sparse_moe.routed_expert_norm.weight": "ffn_routed_norm.weight",
    "block_sparse_moe.shared_experts.gate_proj.weight": "ffn_gate_shexp.weight",
    "block_sparse_moe.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "block_sparse_moe.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
}
_SCORES = (("self_attention_res", "attn_res_score"), ("mlp_res", "ffn_res_score"))
_EXPERTS = (("w1", "gate"), ("w3", "up"), ("w2", "down"))


def write_k3_gguf(
    path: Path, raw: RawConfig, tensors: Mapping[str, Array], tokens: Sequence[str] = ()
) -> None:
    """Write a file of float32 tensors of the hub's names and float32 values."""
    writer, config = GGUFWriter(path, "kimi-k3"), raw["text_config"]
    _add_metadata(writer, config)
    if tokens:
        writer.add_token_list(tokens)
    left = {name.removeprefix("language_model."): np.float32(value) for name, value in tensors.items()}

    def add(name: str, value: Array) -> None:
        writer.add_tensor(name, np.ascontiguousarray(value))

    def add_score(prefix: str, name: str) -> None:
        add(name, left.pop(prefix + "_norm.weight") * left.pop(prefix + "_proj.weight")[0])

    add("token_embd.weight", left.pop("model.embed_tokens.weight"))
    add("output_norm.weight", left.pop("model.norm.weight"))
    add("output.weight", left.pop("lm_head.weight"))
    add_score("model.output_attn_res", "output_res_score.weight")
    for layer in range(config["num_hidden_layers"]):
        prefix, block = f"model.layers.{layer}.", f"blk.{layer}."
        for part, name in _SCORES:
            add_score(prefix + part, f"{block}{name}.weight")
        if layer >= config["first_k_dense_replace"]:
            of_experts = prefix + "block_sparse_moe.experts."
            for part, name in _EXPERTS:
                each = [left.pop(f"{of_experts}{i}.{part}.weight") for i in range(config["num_experts"])]
                add(f"{block}ffn_{name}_exps.weight", np.stack(each))
        is_delta = layer + 1 in config["linear_attn_config"]["kda_layers"]
        if (gate := left.pop(prefix + "self_attn.g_proj.weight", None)) is not None:
            add(f"{block}{'ssm_g' if is_delta else 'attn_gate'}.weight", gate)
        if not is_delta:
            heads, nope = config["num_attention_heads"], config["qk_nope_head_dim"]
            both = left.pop(prefix + "self_attn.kv_b_proj.weight").reshape(heads, -1, config["kv_lora_rank"])
            add(block + "attn_k_b.weight", both[:, :nope].transpose(0, 2, 1))
            add(block + "attn_v_b.weight", both[:, nope:])
        for name in [name for name in left if name.startswith(prefix)]:
            value = left.pop(name)
            if name.endswith("A_log"):
                value = -np.exp(value[: config["linear_attn_config"]["num_heads"]])
            if "_conv1d" in name:
                value = value.reshape(1, value.shape[0], 1, -1)
            add(block + _NAMES[name.removeprefix(prefix)], value)
    assert not left
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_metadata(writer: GGUFWriter, config: RawConfig) -> None:
    linear, num_layers = config["linear_attn_config"], config["num_hidden_layers"]
    writer.add_vocab_size(config["vocab_size"])
    writer.add_block_count(num_layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv([int(i + 1 in linear["full_attn_layers"]) for i in range(num_layers)])
    writer.add_rope_freq_base(float(config["rope_theta"]))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_token"])
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_shared_count(config["num_shared_experts"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_weights_norm(config["moe_renormalize"])
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_ssm_conv_kernel(linear["short_conv_kernel_size"])
    writer.add_kda_head_dim(linear["head_dim"])
    writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_kv_lora_rank(config["kv_lora_rank"])
    writer.add_rope_dimension_count(config["qk_rope_head_dim"])
    writer.add_key_length(config["kv_lora_rank"] + config["qk_rope_head_dim"])
    writer.add_value_length(config["kv_lora_rank"])
    writer.add_key_length_mla(config["qk_nope_head_dim"] + config["qk_rope_head_dim"])
    writer.add_value_length_mla(config["v_head_dim"])
    # Keys that the released package `gguf` does not know.
    writer.add_float32("kimi-k3.kda.gate_lower_bound", linear["gate_lower_bound"])
    writer.add_uint32("kimi-k3.expert_latent_length", config["routed_expert_hidden_size"])
    writer.add_float32("kimi-k3.activation.situ_beta", config["activation_situ_beta"])
    writer.add_float32("kimi-k3.activation.situ_linear_beta", config["activation_situ_linear_beta"])
    writer.add_uint32("kimi-k3.attn_res.block_size", config["attn_res_block_size"])
    writer.add_tokenizer_model("none")
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
