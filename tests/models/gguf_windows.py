"""The metadata of GGUF files of `tiny_windows.FAMILIES`, for `gguf_models.py`."""

from __future__ import annotations

from gguf import ExpertGatingFuncType, GGUFWriter, RopeScalingType

from tests.models.tiny_windows import FULL, SLIDING, RawConfig, windows


def add_metadata(writer: GGUFWriter, config: RawConfig) -> None:
    """Write the metadata that llama.cpp's conversion script writes for such a model, except those of every model."""
    if config["model_type"] == "afmoe":
        writer.add_rope_freq_base(config["rope_theta"])
        writer.add_sliding_window(config["sliding_window"])
        writer.add_leading_dense_block_count(config["num_dense_layers"])
        writer.add_expert_shared_count(config["num_shared_experts"])
        writer.add_expert_weights_scale(config["route_scale"])
        writer.add_expert_weights_norm(config["route_norm"])
        return
    full = config["rope_parameters"].get(FULL, config["rope_parameters"])
    writer.add_rope_freq_base(full["rope_theta"])
    if full["rope_type"] == "yarn":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(full["factor"])
        writer.add_rope_scaling_orig_ctx_len(full["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_attn_factor(full["attention_factor"])
        writer.add_rope_scaling_yarn_beta_fast(full["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(full["beta_slow"])
    writer.add_sliding_window(config["sliding_window"])
    if config["model_type"] == "laguna":
        writer.add_head_count(config["num_attention_heads_per_layer"])
        writer.add_rope_dimension_count(int(config["head_dim"] * full["partial_rotary_factor"]))
        sliding = config["rope_parameters"][SLIDING]
        writer.add_rope_freq_base_swa(sliding["rope_theta"])
        writer.add_rope_dimension_count_swa(int(config["head_dim"] * sliding["partial_rotary_factor"]))
        writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
        writer.add_expert_weights_norm(True)
        writer.add_expert_weights_scale(config["moe_routed_scaling_factor"])
        writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)
        writer.add_leading_dense_block_count(config["mlp_layer_types"].index("sparse"))
    if config["model_type"] == "mellum":
        writer.add_rope_freq_base_swa(config["rope_parameters"][SLIDING]["rope_theta"])
        writer.add_sliding_window_pattern([window > 0 for window in windows(config)])
