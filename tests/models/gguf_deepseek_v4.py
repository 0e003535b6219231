"""DeepSeek-V4 as a GGUF file in float32, with the names and metadata of llama.cpp's converter (`DeepseekV4Model`)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np
from gguf import GGUFWriter

from tests.models.safetensors_file import Array
from tests.models.tiny import RawConfig

_NAMES = {
    "embed.weight": "token_embd.weight",
    "head.weight": "output.weight",
    "norm.weight": "output_norm.weight",
    **{f"hc_head_{part}": f"output_hc_{part}.weight" for part in ("fn", "base", "scale")},
}
_LAYER_NAMES = {
    "attn_norm.weight": "attn_norm.weight",
    "ffn_norm.weight": "ffn_norm.weight",
    "attn.attn_sink": "attn_sinks.weight",
    "attn.wq_a.weight": "attn_q_a.weight",
    "attn.q_norm.weight": "attn_q_a_norm.weight",
    "attn.wq_b.weight": "attn_q_b.weight",
    "attn.wkv.weight": "attn_kv.weight",
    "attn.kv_norm.weight": "attn_kv_a_norm.weight",
    "attn.wo_a.weight": "attn_output_a.weight",
    "attn.wo_b.weight": "attn_output_b.weight",
    "ffn.gate.weight": "ffn_gate_inp.weight",
    "ffn.gate.bias": "exp_probs_b.bias",
    "ffn.gate.bias_vl": "exp_probs_b_vl.bias",
    "ffn.gate.tid2eid": "ffn_gate_tid2eid.weight",
    **{
        f"ffn.shared_experts.{theirs}.weight": f"ffn_{ours}_shexp.weight"
        for theirs, ours in (("w1", "gate"), ("w2", "down"), ("w3", "up"))
    },
    **{
        f"hc_{of}_{part}": f"hc_{of}_{part}.weight"
        for of in ("attn", "ffn")
        for part in ("fn", "base", "scale")
    },
    **{
        f"attn.{place}.{theirs}": f"{ours}_{end}.weight"
        for place, ours in (
            ("compressor", "attn_compressor"),
            ("indexer.compressor", "indexer_compressor"),
        )
        for theirs, end in (
            ("wkv.weight", "kv"),
            ("wgate.weight", "gate"),
            ("ape", "ape"),
            ("norm.weight", "norm"),
        )
    },
    "attn.indexer.wq_b.weight": "indexer.attn_q_b.weight",
    "attn.indexer.weights_proj.weight": "indexer.proj.weight",
}


def write_gguf(
    path: Path, config: RawConfig, tensors: Mapping[str, Array], tokens: Sequence[str] = ()
) -> None:
    writer = GGUFWriter(path, "deepseek4")
    if tokens:
        writer.add_token_list(tokens)
    layers = config["num_hidden_layers"]
    writer.add_block_count(layers)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["moe_intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(1)
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config["qk_rope_head_dim"])
    rope = config["rope_scaling"]
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(rope["factor"])
    writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
    writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
    writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_sliding_window(config["sliding_window"])
    writer.add_expert_count(config["n_routed_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_weights_norm(True)
    writer.add_uint32("deepseek4.expert_gating_func", 4)
    writer.add_swiglu_clamp_exp([config["swiglu_limit"]] * layers)
    writer.add_swiglu_clamp_shexp([config["swiglu_limit"]] * layers)
    for name, value in (
        ("attention.indexer.head_count", config["index_n_heads"]),
        ("attention.indexer.key_length", config["index_head_dim"]),
        ("attention.indexer.top_k", config["index_topk"]),
        ("attention.output_group_count", config["o_groups"]),
        ("attention.output_lora_rank", config["o_lora_rank"]),
        ("hyper_connection.count", config["hc_mult"]),
        ("hyper_connection.sinkhorn_iterations", config["hc_sinkhorn_iters"]),
        ("hash_layer_count", config["num_hash_layers"]),
        ("embedding_length_out", config["hidden_size"] * config["hc_mult"]),
    ):
        writer.add_uint32(f"deepseek4.{name}", value)
    writer.add_array("deepseek4.attention.compress_ratios", config["compress_ratios"])
    writer.add_float32("deepseek4.attention.compress_rope_freq_base", config["compress_rope_theta"])
    writer.add_float32("deepseek4.hyper_connection.epsilon", config["hc_eps"])
    writer.add_tokenizer_model("none")
    for name, tensor in tensors.items():
        layer = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
        if layer is None:
            writer.add_tensor(_NAMES[name], tensor)
        elif layer[2] in _LAYER_NAMES:
            stored = tensor.astype(np.int32) if name.endswith("tid2eid") else tensor
            writer.add_tensor(f"blk.{layer[1]}.{_LAYER_NAMES[layer[2]]}", stored)
    for layer_number in range(layers):
        for theirs, ours in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
            prefix = f"layers.{layer_number}.ffn.experts."
            experts = [tensors[f"{prefix}{e}.{theirs}.weight"] for e in range(config["n_routed_experts"])]
            writer.add_tensor(f"blk.{layer_number}.ffn_{ours}_exps.weight", np.stack(experts))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
