"""Configurations of DeepSeek-OCR-2's text part."""

from __future__ import annotations

from tests.models.configuration import Configuration
from tests.models.tiny_ocr import deepseek_ocr2

CONFIGURATIONS = (
    Configuration(name="deepseek_ocr2_plain", config=deepseek_ocr2()),
    Configuration(
        name="deepseek_ocr2_scaled_tied_f16",
        config=deepseek_ocr2(
            dtype="float16",
            moe_intermediate_size=9,
            head_dim=8,
            hidden_size=32,
            mlp_layer_types=["sparse"] * 2,
            n_group=None,
            n_routed_experts=7,
            n_shared_experts=1,
            num_attention_heads=4,
            num_experts_per_tok=3,
            num_hidden_layers=2,
            num_key_value_heads=2,
            rope_parameters={"rope_theta": 500.0, "rope_type": "linear", "factor": 2.0},
            routed_scaling_factor=1.5,
            tie_word_embeddings=True,
            topk_group=None,
        ),
        dtype="F16",
    ),
)
