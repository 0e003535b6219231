"""Tiny configs of families with gated delta nets, and the tensors of their checkpoints: Qwen3-Next, Qwen3.5-MoE.

Elsewhere: values and files are `tiny.py`.
"""

from __future__ import annotations

from typing import Any

from tests.models.rows import Row
from tests.models.tiny import plain_moe_layers, text_of

RawConfig = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]

FAMILIES = ("qwen3_next", "qwen3_5_moe_text", "qwen3_5_moe")


def qwen3_next(**changes: Any) -> RawConfig:
    """A config.json with the keys of Qwen3-Next-80B-A3B's."""
    return {
        "architectures": ["Qwen3NextForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "decoder_sparse_step": 1,
        "eos_token_id": 2,
        "full_attention_interval": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "hidden_size": 28,
        "initializer_range": 0.02,
        "intermediate_size": 48,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 10,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_value_head_dim": 9,
        "max_position_embeddings": 128,
        "mlp_only_layers": [],
        "model_type": "qwen3_next",
        "moe_intermediate_size": 8,
        "norm_topk_prob": True,
        "num_attention_heads": 4,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "output_router_logits": False,
        "partial_rotary_factor": 0.25,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 10000000,
        "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": 12,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.57.0.dev0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 80,
    } | changes


def qwen3_5_moe_text(**changes: Any) -> RawConfig:
    """The `text_config` of a config.json with the keys of Qwen3.5-35B-A3B's, as a separate model."""
    return {
        "architectures": ["Qwen3_5MoeForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_output_gate": True,
        "dtype": "bfloat16",
        "eos_token_id": 2,
        "full_attention_interval": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "hidden_size": 28,
        "initializer_range": 0.02,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 10,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_value_head_dim": 9,
        "mamba_ssm_dtype": "float32",
        "max_position_embeddings": 128,
        "mlp_only_layers": [],
        "model_type": "qwen3_5_moe_text",
        "moe_intermediate_size": 8,
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "num_attention_heads": 4,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [1, 1, 0],
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000000,
            "rope_type": "default",
        },
        "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": 12,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": 80,
    } | changes


def qwen3_5_moe(**changes: Any) -> RawConfig:
    """A whole config.json with the keys of Qwen3.5-35B-A3B's; `changes` apply to its text part."""
    text = qwen3_5_moe_text(**changes)
    del text["architectures"]
    return {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "image_token_id": 51,
        "model_type": "qwen3_5_moe",
        "text_config": text,
        "tie_word_embeddings": text["tie_word_embeddings"],
        "transformers_version": "4.57.0.dev0",
        "video_token_id": 52,
        "vision_config": {
            "deepstack_visual_indexes": [],
            "depth": 1,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 16,
            "in_channels": 3,
            "initializer_range": 0.02,
            "intermediate_size": 8,
            "model_type": "qwen3_5_moe",
            "num_heads": 2,
            "num_position_embeddings": 16,
            "out_hidden_size": text["hidden_size"],
            "patch_size": 2,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        "vision_end_token_id": 54,
        "vision_start_token_id": 53,
    }


def layer_kinds(config: RawConfig) -> list[str]:
    """Return `linear_attention` or `full_attention` for each layer of a text config."""
    interval = config.get("full_attention_interval", 4)
    return config.get("layer_types") or [
        "linear_attention" if (i + 1) % interval else "full_attention"
        for i in range(config["num_hidden_layers"])
    ]


def delta_shapes(config: RawConfig) -> Shapes:
    """Return names and shapes of every tensor in the hub's checkpoint of this config, including some to ignore."""
    text = text_of(config)
    moe_layers, is_fused = plain_moe_layers(text), config["model_type"] != "qwen3_next"
    prefix = "model.language_model." if "text_config" in config else "model."
    hidden, vocab = text["hidden_size"], text["vocab_size"]
    shapes: Shapes = {prefix + "embed_tokens.weight": (vocab, hidden)}
    for i, kind in enumerate(layer_kinds(text)):
        layer = f"{prefix}layers.{i}."
        shapes[layer + "input_layernorm.weight"] = (hidden,)
        mixer = delta_tensors if kind == "linear_attention" else attention_tensors
        shapes |= {layer + name: shape for name, shape in mixer(text).items()}
        shapes[layer + "post_attention_layernorm.weight"] = (hidden,)
        if i in moe_layers:
            shapes |= moe_tensors(text, layer + "mlp.", is_fused)
        else:
            shapes |= _swiglu_shapes(layer + "mlp.", hidden, text["intermediate_size"])
    shapes[prefix + "norm.weight"] = (hidden,)
    if not text["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    shapes |= {"mtp.fc.weight": (hidden, 2 * hidden), "mtp.layers.0.self_attn.q_proj.weight": (4, hidden)}
    if "text_config" in config:
        shapes |= {"model.visual.patch_embed.proj.bias": (16,), "model.visual.pos_embed.weight": (16, 16)}
    return shapes


def attention_tensors(config: RawConfig) -> Shapes:
    hidden, dim = config["hidden_size"], config["head_dim"]
    heads, kv_rows = config["num_attention_heads"], config["num_key_value_heads"] * dim
    rows = {"q": 2 * heads * dim, "k": kv_rows, "v": kv_rows}
    shapes: Shapes = {f"self_attn.{name}_proj.weight": (count, hidden) for name, count in rows.items()}
    shapes["self_attn.o_proj.weight"] = (hidden, heads * dim)
    if config["attention_bias"]:
        shapes |= {f"self_attn.{name}_proj.bias": (count,) for name, count in rows.items()}
        shapes["self_attn.o_proj.bias"] = (hidden,)
    return shapes | {"self_attn.q_norm.weight": (dim,), "self_attn.k_norm.weight": (dim,)}


def delta_tensors(config: RawConfig) -> Shapes:
    hidden, heads = config["hidden_size"], config["linear_num_value_heads"]
    keys = config["linear_num_key_heads"] * config["linear_key_head_dim"]
    values = heads * config["linear_value_head_dim"]
    if config["model_type"] == "qwen3_next":
        projections = {"qkvz": 2 * keys + 2 * values, "ba": 2 * heads}
    else:
        projections = {"qkv": 2 * keys + values, "z": values, "b": heads, "a": heads}
    shapes: Shapes = {
        f"linear_attn.in_proj_{name}.weight": (rows, hidden) for name, rows in projections.items()
    }
    return shapes | {
        "linear_attn.conv1d.weight": (2 * keys + values, 1, config["linear_conv_kernel_dim"]),
        "linear_attn.A_log": (heads,),
        "linear_attn.dt_bias": (heads,),
        "linear_attn.norm.weight": (config["linear_value_head_dim"],),
        "linear_attn.out_proj.weight": (hidden, values),
    }


def moe_tensors(config: RawConfig, block: str, is_fused: bool) -> Shapes:
    hidden, experts, width = config["hidden_size"], config["num_experts"], config["moe_intermediate_size"]
    shapes: Shapes = {block + "gate.weight": (experts, hidden)}
    if is_fused:
        shapes[block + "experts.gate_up_proj"] = (experts, 2 * width, hidden)
        shapes[block + "experts.down_proj"] = (experts, hidden, width)
    else:
        for expert in range(experts):
            shapes |= _swiglu_shapes(f"{block}experts.{expert}.", hidden, width)
    shapes |= _swiglu_shapes(block + "shared_expert.", hidden, config["shared_expert_intermediate_size"])
    return shapes | {block + "shared_expert_gate.weight": (1, hidden)}


def _swiglu_shapes(prefix: str, hidden: int, width: int) -> Shapes:
    shapes: Shapes = {f"{prefix}{name}.weight": (width, hidden) for name in ("gate_proj", "up_proj")}
    return shapes | {f"{prefix}down_proj.weight": (hidden, width)}


ROWS = {
    "qwen3_next": Row(
        shapes=delta_shapes,
        has_own_modules=True,
        has_own_experts=True,
        has_zero_centred_norms=True,
        gguf="qwen3next",
        chats=("qwen3",),
    ),
    "qwen3_5_moe_text": Row(
        shapes=delta_shapes,
        has_own_modules=True,
        has_own_experts=True,
        has_zero_centred_norms=True,
        gguf="qwen35moe",
        chats=("qwen3_coder",),
    ),
    "qwen3_5_moe": Row(
        shapes=delta_shapes,
        has_own_modules=True,
        has_own_experts=True,
        has_zero_centred_norms=True,
        chats=("qwen3_coder",),
    ),
}
