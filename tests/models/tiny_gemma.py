"""Tiny configurations of Gemma-4 with experts, and their tensors, beside some of the vision tower's.

Elsewhere: values and files are `tiny.py`.
"""

from __future__ import annotations

from typing import Any

from tests.models.rows import WHOLE, Row

RawConfig = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]

FAMILY = "gemma4"
PREFIX = "model.language_model."

_SLIDING, _FULL = "sliding_attention", "full_attention"


def gemma4(**changes: Any) -> RawConfig:
    """A config.json with the keys of gemma-4-26B-A4B-it's; `changes` apply to its text part.

    Placeholders are outside of the vocabulary: transformers gives them another embedding.
    """
    num_layers = changes.get("num_hidden_layers", 3)
    text = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attention_k_eq_v": True,
        "bos_token_id": 2,
        "dtype": "bfloat16",
        "enable_moe_block": True,
        "eos_token_id": 1,
        "final_logit_softcapping": 30.0,
        "global_head_dim": 20,
        "head_dim": 12,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 36,
        "hidden_size_per_layer_input": 0,
        "initializer_range": 0.02,
        "intermediate_size": 20,
        "layer_types": [_SLIDING] * (num_layers - 1) + [_FULL],
        "max_position_embeddings": 128,
        "model_type": "gemma4_text",
        "moe_intermediate_size": 11,
        "num_attention_heads": 4,
        "num_experts": 6,
        "num_global_key_value_heads": 1,
        "num_hidden_layers": num_layers,
        "num_key_value_heads": 2,
        "num_kv_shared_layers": 0,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {
            _FULL: {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
            _SLIDING: {"rope_theta": 10000.0, "rope_type": "default"},
        },
        "sliding_window": 8,
        "tie_word_embeddings": True,
        "top_k_experts": 2,
        "use_bidirectional_attention": "vision",
        "use_cache": True,
        "use_double_wide_mlp": False,
        "vocab_size": 68,
        "vocab_size_per_layer_input": 68,
    } | changes
    return {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "audio_config": None,
        "audio_token_id": 1007,
        "boa_token_id": 1006,
        "boi_token_id": 1003,
        "dtype": text["dtype"],
        "eoa_token_id": 1005,
        "eoa_token_index": 1005,
        "eoi_token_id": 1004,
        "eos_token_id": [1, 6],
        "image_token_id": 1001,
        "initializer_range": 0.02,
        "model_type": FAMILY,
        "text_config": text,
        "tie_word_embeddings": text["tie_word_embeddings"],
        "transformers_version": "5.5.0.dev0",
        "video_token_id": 1002,
        "vision_config": {
            "head_dim": 8,
            "hidden_size": 16,
            "intermediate_size": 8,
            "model_type": "gemma4_vision",
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
            "num_key_value_heads": 2,
            "patch_size": 2,
            "pooling_kernel_size": 2,
            "position_embedding_size": 4,
        },
        "vision_soft_tokens_per_image": 4,
    }


def layer_kinds(text: RawConfig) -> list[str]:
    """Return the kind of each layer; the last one is always full."""
    kinds = text.get("layer_types") or [
        _FULL if i % 6 == 5 else _SLIDING for i in range(text["num_hidden_layers"])
    ]
    return [*kinds[:-1], _FULL]


def heads(text: RawConfig, layer: int) -> tuple[int, int]:
    """Return a layer's key heads and their dimensions, in either spelling."""
    plain = text["num_key_value_heads"], text["head_dim"]
    if "per_layer_config" in text:
        own = text["per_layer_config"].get(str(layer), {})
        return own.get("num_key_value_heads", plain[0]), own.get("head_dim", plain[1])
    if layer_kinds(text)[layer] == _SLIDING:
        return plain
    own_heads = text["num_global_key_value_heads"] if text["attention_k_eq_v"] else None
    return own_heads or plain[0], text["global_head_dim"]


def gemma4_shapes(config: RawConfig) -> Shapes:
    """Return names and shapes of every tensor of the text part, and of some others."""
    text = config["text_config"]
    hidden, width, experts = text["hidden_size"], text["moe_intermediate_size"], text["num_experts"]
    shapes: Shapes = {PREFIX + "embed_tokens.weight": (text["vocab_size"], hidden)}
    for i, kind in enumerate(layer_kinds(text)):
        layer = f"{PREFIX}layers.{i}."
        kv_heads, dim = heads(text, i)
        shapes |= {
            f"{layer}{name}layernorm{number}.weight": (hidden,)
            for name, number in (
                ("input_", ""), ("post_attention_", ""), ("pre_feedforward_", ""), ("pre_feedforward_", "_2"),
                ("post_feedforward_", ""), ("post_feedforward_", "_1"), ("post_feedforward_", "_2"),
            )
        }  # fmt: skip
        rows = text["num_attention_heads"] * dim
        shapes[layer + "self_attn.q_proj.weight"] = (rows, hidden)
        for name in ("k",) if text["attention_k_eq_v"] and kind == _FULL else ("k", "v"):
            shapes[f"{layer}self_attn.{name}_proj.weight"] = (kv_heads * dim, hidden)
        shapes[layer + "self_attn.o_proj.weight"] = (hidden, rows)
        shapes[layer + "self_attn.q_norm.weight"] = shapes[layer + "self_attn.k_norm.weight"] = (dim,)
        for name in ("gate", "up"):
            shapes[f"{layer}mlp.{name}_proj.weight"] = (text["intermediate_size"], hidden)
        shapes[layer + "mlp.down_proj.weight"] = (hidden, text["intermediate_size"])
        shapes[layer + "router.proj.weight"] = (experts, hidden)
        shapes[layer + "router.scale"] = (hidden,)
        shapes[layer + "router.per_expert_scale"] = (experts,)
        shapes[layer + "experts.gate_up_proj"] = (experts, 2 * width, hidden)
        shapes[layer + "experts.down_proj"] = (experts, hidden, width)
        shapes[layer + "layer_scalar"] = (1,)
    shapes[PREFIX + "norm.weight"] = (hidden,)
    if not text["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (text["vocab_size"], hidden)
    return shapes | {
        "model.vision_tower.patch_embedder.input_proj.weight": (16, 12),
        "model.embed_vision.embedding_projection.weight": (hidden, 16),
    }


ROWS = {
    FAMILY: Row(
        shapes=gemma4_shapes,
        loading=WHOLE,
        has_own_modules=True,
        has_own_experts=True,
        gguf="gemma4",
        chats=("gemma4",),
    )
}
