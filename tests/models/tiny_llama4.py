"""Tiny checkpoints of Llama-4: its text model alone, and the same with some tensors of its vision tower.

The experts of a layer are stored transposed, gate before up.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.models.rows import Loading, Row
from tests.models.safetensors_file import Array
from tests.models.tiny import text_of

RawConfig = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]

FAMILIES = ("llama4", "llama4_text")
_PREFIX = "language_model."


def llama4_text(**changes: Any) -> RawConfig:
    """The keys of the text part of Llama-4-Scout's config.json."""
    return {
        "attention_bias": False,
        "attention_chunk_size": 7,
        "attention_dropout": 0.0,
        "attn_scale": 0.6,
        "attn_temperature_tuning": True,
        "bos_token_id": 1,
        "eos_token_id": [2, 5, 6],
        "floor_scale": 5,
        "for_llm_compressor": False,
        "head_dim": 6,
        "hidden_act": "silu",
        "hidden_size": 24,
        "initializer_range": 0.02,
        "interleave_moe_layer_step": 1,
        "intermediate_size": 9,
        "intermediate_size_mlp": 17,
        "max_position_embeddings": 256,
        "model_type": "llama4_text",
        "no_rope_layers": [],
        "num_attention_heads": 4,
        "num_experts_per_tok": 1,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 5,
        "output_router_logits": False,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 16.0,
            "high_freq_factor": 1.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8,
            "rope_type": "llama3",
        },
        "rope_theta": 500.0,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_qk_norm": True,
        "vocab_size": 61,
    } | changes


def llama4(**changes: Any) -> RawConfig:
    """A config.json with the keys of Llama-4-Scout-17B-16E-Instruct's; `changes` apply to its text part."""
    return {
        "architectures": ["Llama4ForConditionalGeneration"],
        "boi_token_index": 53,
        "eoi_token_index": 54,
        "image_token_index": 51,
        "model_type": "llama4",
        "text_config": llama4_text(**changes),
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0.dev0",
        "vision_config": {"hidden_size": 16, "model_type": "llama4_vision_model"},
    }


# What differs in Llama-Guard-4-12B, which has no experts.
GUARD: RawConfig = {
    "interleave_moe_layer_step": 0,
    "moe_layers": [],
    "num_experts_per_tok": 0,
    "num_local_experts": 0,
}

# What llama.cpp has in its code.
OF_GGUF = {"attention_chunk_size": 8192, "attn_scale": 0.1, "floor_scale": 8192}


def moe_layers(text: RawConfig) -> list[int]:
    if (listed := text.get("moe_layers")) is not None:
        return listed  # type: ignore[no-any-return]
    step = text["interleave_moe_layer_step"]
    return [i for i in range(text["num_hidden_layers"]) if (i + 1) % step == 0]


def rotates(text: RawConfig) -> list[bool]:
    interval = text.get("no_rope_layer_interval", 4)
    default = [(i + 1) % interval > 0 for i in range(text["num_hidden_layers"])]
    return [bool(flag) for flag in text["no_rope_layers"] or default]


def chunks(text: RawConfig) -> list[int]:
    """Return the positions of a chunk of each layer; 0 is full attention."""
    size = text["attention_chunk_size"] or 0
    kinds = text.get("layer_types")
    is_chunked = rotates(text) if kinds is None else [kind == "chunked_attention" for kind in kinds]
    return [size if flag else 0 for flag in is_chunked]


def llama4_shapes(config: RawConfig) -> Shapes:
    """Return names and shapes of every tensor of a checkpoint."""
    text = config.get("text_config", config)
    hidden, width, experts = text["hidden_size"], text["intermediate_size"], text["num_local_experts"]
    rows = dict.fromkeys("kv", text["num_key_value_heads"] * text["head_dim"])
    rows["q"] = text["num_attention_heads"] * text["head_dim"]
    shapes: Shapes = {"model.embed_tokens.weight": (text["vocab_size"], hidden)}
    for layer in range(text["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        shapes |= {f"{prefix}self_attn.{name}_proj.weight": (rows[name], hidden) for name in "qkv"}
        shapes[prefix + "self_attn.o_proj.weight"] = (hidden, rows["q"])
        if text["attention_bias"]:
            shapes |= {f"{prefix}self_attn.{name}_proj.bias": (rows[name],) for name in "qkv"}
            shapes[prefix + "self_attn.o_proj.bias"] = (hidden,)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        block = prefix + "feed_forward."
        if layer in moe_layers(text):
            shapes[block + "router.weight"] = (experts, hidden)
            shapes[block + "experts.gate_up_proj"] = (experts, hidden, 2 * width)
            shapes[block + "experts.down_proj"] = (experts, width, hidden)
            shapes |= _swiglu(block + "shared_expert.", hidden, width)
        else:
            shapes |= _swiglu(block, hidden, text["intermediate_size_mlp"])
    shapes["model.norm.weight"] = (hidden,)
    if not text["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (text["vocab_size"], hidden)
    if config is text:
        return shapes
    vision = {
        "vision_model.layernorm_post.weight": (16,),
        "multi_modal_projector.linear_1.weight": (hidden, 8),
    }
    return {_PREFIX + name: shape for name, shape in shapes.items()} | vision


def apart(tensors: dict[str, Array]) -> dict[str, Array]:
    """Return a checkpoint's tensors with those of each expert apart, as in files of llm-compressor."""
    found = {}
    for name, values in tensors.items():
        block, _, last = name.rpartition(".experts.")
        if not block:
            found[name] = values
            continue
        parts = ("gate", "up") if last == "gate_up_proj" else ("down",)
        for part, half in zip(parts, np.split(values, len(parts), axis=2), strict=True):
            for expert, matrix in enumerate(half):
                found[f"{block}.experts.{expert}.{part}_proj.weight"] = np.ascontiguousarray(matrix.T)
    return found


def fused(tensors: dict[str, Array]) -> dict[str, Array]:
    """Undo `apart`."""
    found = {name: values for name, values in tensors.items() if ".experts." not in name}
    blocks = {name.partition(".experts.")[0] for name in tensors if ".experts." in name}
    for block in sorted(blocks):
        count = sum(name.startswith(block + ".experts.") for name in tensors) // 3
        gate, up, down = (
            np.stack([tensors[f"{block}.experts.{expert}.{part}_proj.weight"].T for expert in range(count)])
            for part in ("gate", "up", "down")
        )
        found[block + ".experts.gate_up_proj"] = np.concatenate([gate, up], axis=2)
        found[block + ".experts.down_proj"] = down
    return found


def _swiglu(prefix: str, hidden: int, width: int) -> Shapes:
    shapes: Shapes = {f"{prefix}{name}_proj.weight": (width, hidden) for name in ("gate", "up")}
    return shapes | {prefix + "down_proj.weight": (hidden, width)}


def _text_of_llama(config: RawConfig) -> tuple[str, RawConfig]:
    return "Llama4TextConfig", text_of(config)


ROWS = {
    "llama4": Row(
        shapes=llama4_shapes,
        loading=Loading(model="Llama4ForCausalLM", config=_text_of_llama, prefix="language_model."),
        has_own_modules=True,
        has_own_experts=True,
        chats=("llama4",),
    ),
    "llama4_text": Row(
        shapes=llama4_shapes,
        has_own_modules=True,
        has_own_experts=True,
        gguf="llama4",
        without_record="the released configs are llama4's",
        without_mlx="MLX's class of this name is of dense models",
    ),
}
