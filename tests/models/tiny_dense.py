"""Tiny configurations and tensors of families without experts, beside some of Gemma 3's vision tower.

Elsewhere: values and files are `tiny.py`; what Gemma 3 computes besides is `numpy_dense.py`.
"""

from __future__ import annotations

from typing import Any

from tests.models.rows import WHOLE, Row

RawConfig = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]

FAMILIES = ("qwen3", "qwen2", "granite", "llama", "mistral", "ministral3", "gemma3_text", "gemma3")
GEMMA = ("gemma3_text", "gemma3")
_TOWER = {
    "vision_tower.vision_model.post_layernorm.weight": (16,),
    "multi_modal_projector.mm_soft_emb_norm.weight": (16,),
}

_COMMON: RawConfig = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 24,
    "initializer_range": 0.02,
    "intermediate_size": 18,
    "max_position_embeddings": 128,
    "num_attention_heads": 6,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 68,
}


def qwen3(**changes: Any) -> RawConfig:
    """A config.json with the keys of Qwen3-8B's."""
    return {
        **_COMMON,
        "architectures": ["Qwen3ForCausalLM"],
        "head_dim": 10,
        "max_window_layers": 3,
        "model_type": "qwen3",
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "transformers_version": "4.51.0",
        "use_sliding_window": False,
    } | changes


def qwen2(**changes: Any) -> RawConfig:
    """A config.json with the keys of Qwen2.5-7B's."""
    common = {key: value for key, value in _COMMON.items() if key != "attention_bias"}
    return {
        **common,
        "architectures": ["Qwen2ForCausalLM"],
        "max_window_layers": 3,
        "model_type": "qwen2",
        "rope_theta": 1000000.0,
        "sliding_window": 64,
        "transformers_version": "4.43.1",
        "use_sliding_window": False,
    } | changes


def granite(**changes: Any) -> RawConfig:
    """A config.json with the keys of granite-3.3-2b's."""
    return {
        **_COMMON,
        "architectures": ["GraniteForCausalLM"],
        "attention_multiplier": 0.3,
        "embedding_multiplier": 1.7,
        "logits_scaling": 1.5,
        "mlp_bias": False,
        "model_type": "granite",
        "residual_multiplier": 0.7,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "transformers_version": "4.49.0",
    } | changes


def llama(**changes: Any) -> RawConfig:
    """A config.json with the keys of Llama-3.1-8B's."""
    return {
        **_COMMON,
        "architectures": ["LlamaForCausalLM"],
        "eos_token_id": [2, 5],
        "mlp_bias": False,
        "model_type": "llama",
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 24,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "transformers_version": "4.43.0.dev0",
    } | changes


def mistral(**changes: Any) -> RawConfig:
    """A config.json with the keys of Mistral-7B-v0.3's."""
    common = {key: value for key, value in _COMMON.items() if key != "attention_bias"}
    return {
        **common,
        "architectures": ["MistralForCausalLM"],
        "head_dim": 8,
        "model_type": "mistral",
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "transformers_version": "4.42.0.dev0",
    } | changes


def gemma3_text(**changes: Any) -> RawConfig:
    """A config.json with the keys of gemma-3-1b-it's; every third layer sees all."""
    common = {key: value for key, value in _COMMON.items() if key != "hidden_act"}
    return {
        **common,
        "architectures": ["Gemma3ForCausalLM"],
        "attn_logit_softcapping": None,
        "bos_token_id": 2,
        "cache_implementation": "hybrid",
        "eos_token_id": [1, 6],
        "final_logit_softcapping": None,
        "head_dim": 12,
        "hidden_activation": "gelu_pytorch_tanh",
        "model_type": "gemma3_text",
        "pad_token_id": 0,
        "query_pre_attn_scalar": 15,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": 9,
        "sliding_window_pattern": 3,
        "tie_word_embeddings": True,
        "transformers_version": "4.50.0.dev0",
    } | changes


def gemma3(**changes: Any) -> RawConfig:
    """A config.json with the keys of gemma-3-4b-it's; `changes` apply to its text part."""
    text = gemma3_text(rope_scaling={"factor": 8.0, "rope_type": "linear"}) | changes
    text.pop("architectures")
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": 1003,
        "eoi_token_index": 1004,
        "eos_token_id": text.pop("eos_token_id"),
        "image_token_index": 1001,
        "initializer_range": 0.02,
        "mm_tokens_per_image": 4,
        "model_type": "gemma3",
        "text_config": text,
        "tie_word_embeddings": text["tie_word_embeddings"],
        "torch_dtype": text["torch_dtype"],
        "transformers_version": "4.50.0.dev0",
        "vision_config": {
            "hidden_size": 16,
            "image_size": 8,
            "intermediate_size": 8,
            "model_type": "siglip_vision_model",
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
            "patch_size": 2,
            "vision_use_head": False,
        },
    }


def windows(config: RawConfig) -> list[int]:
    """Return each layer's window as transformers reads the config; 0 is full attention."""
    layers, window = range(config["num_hidden_layers"]), config.get("sliding_window", 4096) or 0
    if config["model_type"] in ("mistral", "ministral3"):
        return [window for _ in layers]
    if config["model_type"] == "gemma3_text":
        every = config.get("sliding_window_pattern", 6)
        default = ["sliding_attention" if (i + 1) % every else "full_attention" for i in layers]
    elif config["model_type"] in ("qwen2", "qwen3") and config.get("use_sliding_window"):
        first = config.get("max_window_layers", 28)
        default = ["sliding_attention" if i >= first else "full_attention" for i in layers]
    else:
        return [0 for _ in layers]
    return [window if kind == "sliding_attention" else 0 for kind in config.get("layer_types") or default]


def dense_shapes(config: RawConfig) -> Shapes:
    """Return names and shapes of every tensor in the hub's checkpoint of this config."""
    text, family = config.get("text_config", config), config["model_type"]
    start = "language_model." if family == "gemma3" else ""
    hidden, vocab, width = text["hidden_size"], text["vocab_size"], text["intermediate_size"]
    head_dim = text.get("head_dim") or hidden // text["num_attention_heads"]
    q_rows, kv_rows = (text[f"num_{name}_heads"] * head_dim for name in ("attention", "key_value"))
    shapes: Shapes = {start + "model.embed_tokens.weight": (vocab, hidden)}
    for i in range(text["num_hidden_layers"]):
        layer = f"{start}model.layers.{i}."
        attention, mlp = layer + "self_attn.", layer + "mlp."
        norms = ["input", "post_attention"]
        if family in GEMMA:
            norms += ["pre_feedforward", "post_feedforward"]
        shapes |= {f"{layer}{name}_layernorm.weight": (hidden,) for name in norms}
        for name, rows in (("q", q_rows), ("k", kv_rows), ("v", kv_rows)):
            shapes[f"{attention}{name}_proj.weight"] = (rows, hidden)
            if text.get("attention_bias") or family == "qwen2":
                shapes[f"{attention}{name}_proj.bias"] = (rows,)
        shapes[attention + "o_proj.weight"] = (hidden, q_rows)
        if text.get("attention_bias"):
            shapes[attention + "o_proj.bias"] = (hidden,)
        if family in ("qwen3", *GEMMA):
            shapes[attention + "q_norm.weight"] = shapes[attention + "k_norm.weight"] = (head_dim,)
        shapes[mlp + "gate_proj.weight"] = shapes[mlp + "up_proj.weight"] = (width, hidden)
        shapes[mlp + "down_proj.weight"] = (hidden, width)
    shapes[start + "model.norm.weight"] = (hidden,)
    if not text["tie_word_embeddings"]:
        shapes[start + "lm_head.weight"] = (vocab, hidden)
    return shapes | (_TOWER if family == "gemma3" else {})


_IN_MLX = "names and values are those of the hub, so MLX's checkpoints need no change"
ROWS = {
    "qwen3": Row(shapes=dense_shapes, gguf="qwen3", chats=("qwen3",), without_mlx=_IN_MLX),
    "qwen2": Row(shapes=dense_shapes, gguf="qwen2", chats=("qwen2_5",), without_mlx=_IN_MLX),
    "granite": Row(shapes=dense_shapes, gguf="granite", chats=("granite",), without_mlx=_IN_MLX),
    "llama": Row(shapes=dense_shapes, gguf="llama", chats=("llama3",), without_mlx=_IN_MLX),
    "mistral": Row(shapes=dense_shapes, gguf="llama", chats=("mistral",), without_mlx=_IN_MLX),
    "gemma3_text": Row(
        shapes=dense_shapes,
        has_own_modules=True,
        has_zero_centred_norms=True,
        gguf="gemma3",
        without_mlx=_IN_MLX,
    ),
    "gemma3": Row(
        shapes=dense_shapes,
        loading=WHOLE,
        has_own_modules=True,
        has_zero_centred_norms=True,
        gguf="gemma3",
        without_mlx=_IN_MLX,
    ),
}
