"""The metadata of GGUF files of Cohere's mixtures."""

from __future__ import annotations

import gguf
from gguf import GGUFWriter

from tests.models.tiny_cohere import SLIDING, RawConfig, is_moe, kinds


def add_cohere_metadata(writer: GGUFWriter, config: RawConfig) -> None:
    """Write the metadata that llama.cpp's conversion script writes for such a model."""
    num_layers, width = config["num_hidden_layers"], config["intermediate_size"]
    writer.add_vocab_size(config["vocab_size"])
    writer.add_block_count(num_layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["prefix_dense_intermediate_size"] or width)
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
    writer.add_rope_freq_base(float(config["rope_theta"]))
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    if config["rms_norm_eps"] is not None:
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_logit_scale(config["logit_scale"])
    writer.add_sliding_window(config["sliding_window"])
    writer.add_sliding_window_pattern([kind == SLIDING for kind in kinds(config)])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(width)
    writer.add_leading_dense_block_count(sum(not is_moe(config, layer) for layer in range(num_layers)))
    writer.add_expert_weights_norm(config["norm_topk_prob"])
    function = "SOFTMAX" if config["expert_selection_fn"] == "softmax" else "SIGMOID"
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType[function])
    if config["num_shared_experts"]:
        writer.add_expert_shared_count(config["num_shared_experts"])
        writer.add_expert_shared_feed_forward_length(config["num_shared_experts"] * width)
    writer.add_tokenizer_model("none")
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
