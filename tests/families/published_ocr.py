"""The released configs of DeepSeek-OCR."""

from __future__ import annotations

from typing import Any

RawConfig = dict[str, Any]

_TEXT: RawConfig = {
    "bos_token_id": 0, "eos_token_id": 1, "first_k_dense_replace": 1, "hidden_size": 1280, "intermediate_size": 6848,
    "kv_lora_rank": None, "lm_head": True, "max_position_embeddings": 8192, "moe_intermediate_size": 896, "n_group": 1,
    "n_routed_experts": 64, "n_shared_experts": 2, "num_attention_heads": 10, "num_experts_per_tok": 6,
    "num_hidden_layers": 12, "num_key_value_heads": 10, "q_lora_rank": None, "qk_nope_head_dim": 0,
    "qk_rope_head_dim": 0, "rm_head": False, "topk_group": 1, "topk_method": "greedy", "torch_dtype": "bfloat16",
    "use_mla": False, "v_head_dim": 0, "vocab_size": 129_280,
}  # fmt: skip
_SAM: RawConfig = {
    "downsample_channels": [512, 1024], "global_attn_indexes": [2, 5, 8, 11], "heads": 12, "layers": 12, "width": 768,
}  # fmt: skip


def _ocr(architecture: str, input_dim: int, encoder: RawConfig) -> RawConfig:
    return {
        "architectures": [architecture],
        "candidate_resolutions": [[1024, 1024]],
        "global_view_pos": "head",
        "language_config": {"architectures": ["DeepseekV2ForCausalLM"], **_TEXT},
        "model_type": "deepseek_vl_v2",
        "projector_config": {
            "input_dim": input_dim, "model_type": "mlp_projector", "n_embed": 1280, "projector_type": "linear",
        },
        "tile_tag": "2D",
        "transformers_version": "4.46.3",
        "vision_config": {
            "image_size": 1024, "mlp_ratio": 3.7362, "model_name": "deeplip_b_l", "model_type": "vision",
            "width": {**encoder, "sam_vit_b": _SAM},
        },
        **_TEXT,
    }  # fmt: skip


DEEPSEEK_OCR = _ocr(
    "DeepseekOCRForCausalLM",
    2048,
    {"clip-l-14-224": {"heads": 16, "image_size": 224, "layers": 24, "patch_size": 14, "width": 1024}},
)
# Its files say that the last convolution has 1024 channels, but it has 896.
DEEPSEEK_OCR_2 = _ocr("DeepseekOCR2ForCausalLM", 896, {"qwen2-0-5b": {"dim": 896}})
