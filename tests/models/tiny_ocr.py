"""Tiny configs of DeepSeek-OCR and DeepSeek-OCR-2, and the tensors of their text part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tests.models.rows import WHOLE, Row

RawConfig = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]

FAMILY = "deepseek_ocr2"
FAMILIES = (FAMILY, "deepseek_vl_v2")


def deepseek_ocr2(**changes: Any) -> RawConfig:
    """A config.json as transformers writes it; `changes` apply to its text part."""
    num_layers = changes.get("num_hidden_layers", 3)
    text = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "dtype": "bfloat16",
        "eos_token_id": 1,
        "head_dim": 8,
        "hidden_act": "silu",
        "hidden_size": 24,
        "initializer_range": 0.02,
        "intermediate_size": 17,
        "max_position_embeddings": 128,
        "mlp_bias": False,
        "mlp_layer_types": ["dense"] + ["sparse"] * (num_layers - 1),
        "model_type": "deepseek_ocr2_text",
        "moe_intermediate_size": 11,
        "n_group": 1,
        "n_routed_experts": 6,
        "n_shared_experts": 2,
        "num_attention_heads": 3,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 3,
        "num_key_value_heads": 3,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "routed_scaling_factor": 1.0,
        "tie_word_embeddings": False,
        "topk_group": 1,
        "topk_method": "greedy",
        "use_cache": True,
        "vocab_size": 64,
    } | changes
    return {
        "architectures": ["DeepseekOcr2ForConditionalGeneration"],
        "image_token_id": 50,
        "model_type": FAMILY,
        "text_config": text,
        "tie_word_embeddings": text["tie_word_embeddings"],
        "transformers_version": "5.24.0",
        "vision_config": {
            "encoder_config": {
                "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1,
                "num_key_value_heads": 1,
            },
            "model_type": "deepseek_ocr2_vision",
            "sam_config": {
                "downsample_channels": [4, 8], "hidden_size": 8, "mlp_dim": 8, "num_attention_heads": 1,
                "num_hidden_layers": 1, "output_channels": 4,
            },
        },
    }  # fmt: skip


_TEXT_KEYS = (
    "bos_token_id", "eos_token_id", "first_k_dense_replace", "hidden_size", "intermediate_size", "kv_lora_rank",
    "lm_head", "max_position_embeddings", "moe_intermediate_size", "n_group", "n_routed_experts", "n_shared_experts",
    "num_attention_heads", "num_experts_per_tok", "num_hidden_layers", "num_key_value_heads", "q_lora_rank",
    "qk_nope_head_dim", "qk_rope_head_dim", "rm_head", "topk_group", "topk_method", "torch_dtype", "use_mla",
    "v_head_dim", "vocab_size",
)  # fmt: skip


def deepseek_vl_v2(**changes: Any) -> RawConfig:
    """A config.json with the keys of DeepSeek-OCR's; `changes` apply to its text part."""
    text = {
        "architectures": ["DeepseekV2ForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_deepseekv2.DeepseekV2Config"},
        "bos_token_id": 0,
        "eos_token_id": 1,
        "first_k_dense_replace": 1,
        "hidden_size": 24,
        "intermediate_size": 17,
        "kv_lora_rank": None,
        "lm_head": True,
        "max_position_embeddings": 128,
        "moe_intermediate_size": 11,
        "n_group": 1,
        "n_routed_experts": 6,
        "n_shared_experts": 2,
        "num_attention_heads": 3,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 3,
        "num_key_value_heads": 3,
        "q_lora_rank": None,
        "qk_nope_head_dim": 0,
        "qk_rope_head_dim": 0,
        "rm_head": False,
        "topk_group": 1,
        "topk_method": "greedy",
        "torch_dtype": "bfloat16",
        "use_mla": False,
        "v_head_dim": 0,
        "vocab_size": 64,
    } | changes
    return {
        "_name_or_path": "deepseek-ai/DeepSeek-OCR",
        "candidate_resolutions": [[1024, 1024]],
        "global_view_pos": "head",
        "architectures": ["DeepseekOCRForCausalLM"],
        "auto_map": {"AutoModel": "modeling_deepseekocr.DeepseekOCRForCausalLM"},
        "language_config": text,
        "model_type": "deepseek_vl_v2",
        "projector_config": {
            "input_dim": 2048, "model_type": "mlp_projector", "n_embed": text["hidden_size"],
            "projector_type": "linear",
        },
        "tile_tag": "2D",
        "transformers_version": "4.46.3",
        "vision_config": {
            "image_size": 1024,
            "mlp_ratio": 3.7362,
            "model_name": "deeplip_b_l",
            "model_type": "vision",
            "width": {
                "clip-l-14-224": {"heads": 16, "image_size": 224, "layers": 24, "patch_size": 14, "width": 1024},
                "sam_vit_b": {
                    "downsample_channels": [512, 1024],
                    "global_attn_indexes": [2, 5, 8, 11],
                    "heads": 12,
                    "layers": 12,
                    "width": 768,
                },
            },
        },
    } | {key: text[key] for key in _TEXT_KEYS if key in text}  # fmt: skip


def as_transformers(config: RawConfig) -> RawConfig:
    """The config in transformers' form, beside which DeepSeek's own has the same names of tensors."""
    text = config["language_config"]
    kinds = ["sparse" if is_moe(text, layer) else "dense" for layer in range(text["num_hidden_layers"])]
    own = {key: text[key] for key in deepseek_ocr2()["text_config"] if key in text}
    return deepseek_ocr2(
        **own | {"mlp_layer_types": kinds, "head_dim": text["hidden_size"] // text["num_attention_heads"]}
    )


def is_moe(text: RawConfig, layer: int) -> bool:
    kinds = text.get("mlp_layer_types")
    return kinds[layer] == "sparse" if kinds else layer >= text["first_k_dense_replace"]


def ocr_shapes(config: RawConfig) -> Shapes:
    """Return names and shapes of the tensors of the text part, and of two of the tower."""
    text = config.get("text_config") or config["language_config"]
    hidden = text["hidden_size"]
    kv_rows = hidden // text["num_attention_heads"] * text["num_key_value_heads"]
    shapes: Shapes = {
        "model.embed_tokens.weight": (text["vocab_size"], hidden),
        "model.sam_model.neck.1.bias": (4,),
        "model.projector.layers.bias": (hidden,),
    }
    for i in range(text["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}{name}.weight"] = (hidden,)
        for name, rows in (("q", hidden), ("k", kv_rows), ("v", kv_rows), ("o", hidden)):
            shapes[f"{layer}self_attn.{name}_proj.weight"] = (rows, hidden)
        if not is_moe(text, i):
            shapes |= _swiglu(f"{layer}mlp.", hidden, text["intermediate_size"])
            continue
        width = text["moe_intermediate_size"]
        shapes[f"{layer}mlp.gate.weight"] = (text["n_routed_experts"], hidden)
        shapes |= _swiglu(f"{layer}mlp.shared_experts.", hidden, text["n_shared_experts"] * width)
        for expert in range(text["n_routed_experts"]):
            shapes |= _swiglu(f"{layer}mlp.experts.{expert}.", hidden, width)
    shapes["model.norm.weight"] = (hidden,)
    if not text.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (text["vocab_size"], hidden)
    return shapes


def as_qwen(config: RawConfig, tensors: Mapping[str, Any]) -> tuple[RawConfig, dict[str, Any]]:
    """The same model as a Qwen3-MoE without norms of heads, with shared experts and dense layers."""
    return config | {"model_type": "qwen3_moe", "norm_topk_prob": False}, dict(tensors)


def _swiglu(prefix: str, hidden: int, width: int) -> Shapes:
    shapes: Shapes = {f"{prefix}{name}_proj.weight": (width, hidden) for name in ("gate", "up")}
    return shapes | {f"{prefix}down_proj.weight": (hidden, width)}


ROWS = {
    "deepseek_ocr2": Row(
        shapes=ocr_shapes,
        loading=WHOLE,
        has_own_modules=True,
        has_own_experts=True,
        as_known=as_qwen,
        gguf="deepseek2-ocr",
        without_mlx="MLX's checkpoints have other names",
    ),
    "deepseek_vl_v2": Row(
        shapes=ocr_shapes,
        loading=replace(WHOLE, config=lambda raw: ("DeepseekOcr2Config", as_transformers(raw))),
        has_own_experts=True,
        gguf="deepseek2-ocr",
        without_references="transformers reads it as deepseek_ocr2",
    ),
}
