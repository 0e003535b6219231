"""The configs of InternVL3.5 with experts, as OpenGVLab publishes them and in the layout of transformers (-HF)."""

from __future__ import annotations

from typing import Any

RawConfig = dict[str, Any]

INTERN_VIT: RawConfig = {
    "attention_bias": True,
    "attention_dropout": 0.0,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "hidden_size": 1024,
    "image_size": [448, 448],
    "initializer_range": 0.02,
    "intermediate_size": 4096,
    "layer_norm_eps": 1e-06,
    "layer_scale_init_value": 0.1,
    "model_type": "internvl_vision",
    "norm_type": "layer_norm",
    "num_attention_heads": 16,
    "num_channels": 3,
    "num_hidden_layers": 24,
    "patch_size": [14, 14],
    "projection_dropout": 0.0,
    "use_absolute_position_embeddings": True,
    "use_mask_token": False,
    "use_mean_pooling": True,
    "use_qk_norm": False,
}
# InternViT-6B in the spelling of OpenGVLab.
INTERN_VIT_6B: RawConfig = {
    "attention_dropout": 0.0,
    "drop_path_rate": 0.0,
    "dropout": 0.0,
    "hidden_act": "gelu",
    "hidden_size": 3200,
    "image_size": 448,
    "initializer_factor": 0.1,
    "initializer_range": 1e-10,
    "intermediate_size": 12800,
    "layer_norm_eps": 1e-06,
    "model_type": "intern_vit_6b",
    "norm_type": "rms_norm",
    "num_attention_heads": 25,
    "num_channels": 3,
    "num_hidden_layers": 45,
    "patch_size": 14,
    "qk_normalization": True,
    "qkv_bias": False,
    "use_bfloat16": True,
    "use_flash_attn": True,
}


def internvl_chat(text: RawConfig, **vision: Any) -> RawConfig:
    """OpenGVLab's config around this text model; `vision` are keys of the tower that differ from InternViT-300M's."""
    return {
        "architectures": ["InternVLChatModel"],
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": 448,
        "hidden_size": text["hidden_size"],
        "image_fold": None,
        "llm_config": text | {"architectures": ["Qwen3MoeForCausalLM"], "rms_norm_eps": 1e-06},
        "max_dynamic_patch": 12,
        "min_dynamic_patch": 1,
        "model_type": "internvl_chat",
        "pad2square": False,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internvl2_5",
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "use_thumbnail": True,
        "vision_config": {"architectures": ["InternVisionModel"], "model_type": "intern_vit_6b"} | vision,
    }


def internvl(text: RawConfig, **vision: Any) -> RawConfig:
    """The same in the layout of transformers."""
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "downsample_ratio": 0.5,
        "image_seq_length": 256,
        "image_token_id": 151_671,
        "model_type": "internvl",
        "projector_hidden_act": "gelu",
        "text_config": text | {"architectures": ["Qwen3MoeForCausalLM"]},
        "vision_config": {"architectures": ["InternVLVisionModel"], "model_type": "internvl_vision"} | vision,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
    }


# InternViT-6B in the spelling of transformers.
INTERN_VIT_6B_HF: RawConfig = INTERN_VIT | {
    "attention_bias": False,
    "hidden_size": 3200,
    "intermediate_size": 12_800,
    "norm_type": "rms_norm",
    "num_attention_heads": 25,
    "num_hidden_layers": 45,
    "use_qk_norm": True,
}
