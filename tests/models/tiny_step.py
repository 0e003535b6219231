"""Tiny configs of Step-3.5 and 3.7, their tensors, and the same models under the names of GLM-4.5."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from tests.models.rows import Loading, Row
from tests.models.safetensors_file import Array
from tests.models.tiny import text_of

RawConfig = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]

FAMILIES = ("step3p5", "step3p7")
FULL, SLIDING = "full_attention", "sliding_attention"


def step3p5(**changes: Any) -> RawConfig:
    """A config.json with the keys of Step-3.5-Flash's; lists have an entry for a layer of multi-token prediction."""
    return {
        "architectures": ["Step3p5ForCausalLM"],
        "att_impl_type": "GQA",
        "attention_other_setting": {
            "attention_type": SLIDING,
            "head_dim": changes.get("head_dim", 8),
            "num_attention_groups": 2,
            "num_attention_heads": 6,
            "true_head_dim": changes.get("head_dim", 8),
        },
        "bos_token_id": 0,
        "eos_token_id": [1, 2],
        "head_dim": 8,
        "hidden_size": 24,
        "intermediate_size": 17,
        "layer_types": [FULL, SLIDING, SLIDING, FULL, SLIDING],
        "max_position_embeddings": 128,
        "max_seq_len": 128,
        "model_type": "step3p5",
        "moe_every_n_layer": 1,
        "moe_intermediate_size": 7,
        "moe_layer_offset": 0,
        "moe_layers_enum": "1,2,3",
        "moe_num_experts": 5,
        "moe_router_activation": "sigmoid",
        "moe_router_scaling_factor": 3.0,
        "moe_top_k": 2,
        "need_fp32_gate": True,
        "norm_expert_weight": True,
        "num_attention_groups": 2,
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "num_nextn_predict_layers": 1,
        "partial_rotary_factors": [0.5, 1.0, 1.0, 0.5, 1.0],
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 2.0,
            "high_freq_factor": 32.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 64,
            "rope_type": "llama3",
        },
        "rope_theta": [5000000.0, 10000.0, 10000.0, 5000000.0, 10000.0],
        "share_expert_dim": 9,
        "sink": False,
        "sliding_window": 7,
        "swiglu_limits": [0.0, 0.0, 0.0, 0.06, 0.0],
        "swiglu_limits_shared": [0.05, 0.0, 0.0, 0.1, 0.0],
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_head_wise_attn_gate": True,
        "use_moe": True,
        "use_moe_router_bias": True,
        "use_qk_norm": True,
        "use_rope_layers": [],
        "vocab_size": 54,
        "yarn_only_types": [FULL],
        "zero_centered": True,
    } | changes


def step3p7(**changes: Any) -> RawConfig:
    """A config.json with the keys of Step-3.7-Flash's; `changes` apply to its text part."""
    return {
        "architectures": ["Step3p7ForConditionalGeneration"],
        "image_token_id": 51,
        "image_token_len": 4,
        "model_type": "step3p7",
        "patch_token_len": 1,
        "projector_bias": False,
        "text_config": step3p5(**changes),
        "understand_projector_stride": 2,
        "vision_config": {
            "heads": 2,
            "image_size": 8,
            "layers": 1,
            "model_type": "perception_encoder",
            "patch_size": 2,
            "width": 8,
        },
    }


def respelt(config: RawConfig) -> RawConfig:
    """The text config as transformers writes it."""
    num_layers = config["num_hidden_layers"]
    sparse = config["moe_layers_enum"].split(",")
    kinds = config["layer_types"][:num_layers]
    first = {kind: kinds.index(kind) for kind in dict.fromkeys(kinds)}
    ropes = {
        kind: {
            "partial_rotary_factor": config["partial_rotary_factors"][at],
            "rope_theta": config["rope_theta"][at],
            "rope_type": "default",
            **((config["rope_scaling"] or {}) if kind == FULL else {}),
        }
        for kind, at in first.items()
    }
    heads = config["attention_other_setting"]["num_attention_heads"]
    names = {
        "moe_num_experts": "n_routed_experts",
        "moe_top_k": "num_experts_per_tok",
        "num_attention_groups": "num_key_value_heads",
    }
    kept = (
        "attention_bias", "bos_token_id", "eos_token_id", "head_dim", "hidden_size", "intermediate_size",
        "max_position_embeddings", "model_type", "moe_intermediate_size", "moe_router_scaling_factor",
        "num_attention_heads", "num_hidden_layers", "num_nextn_predict_layers", "rms_norm_eps", "share_expert_dim",
        "sliding_window", "tie_word_embeddings", "vocab_size", *names,
    )  # fmt: skip
    limits = {
        name: config[name] and config[name][:num_layers] for name in ("swiglu_limits", "swiglu_limits_shared")
    }
    return {
        **{names.get(key, key): config[key] for key in kept if key in config},
        **limits,
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "layer_types": kinds,
        "mlp_layer_types": ["sparse" if str(i) in sparse else "dense" for i in range(num_layers)],
        "num_sliding_attention_heads": heads,
        "per_layer_config": {
            str(i): {"num_attention_heads": heads} for i, kind in enumerate(kinds) if kind == SLIDING
        },
        "query_pre_attn_scalar": config["head_dim"],
        "rope_parameters": ropes,
    }


def moe_layers(config: RawConfig) -> list[int]:
    if "mlp_layer_types" in config:
        return [layer for layer, kind in enumerate(config["mlp_layer_types"]) if kind == "sparse"]
    return [int(layer) for layer in config["moe_layers_enum"].split(",")]


def windows(config: RawConfig) -> list[int]:
    """Return each layer's window; 0 is full attention."""
    kinds = config["layer_types"][: config["num_hidden_layers"]]
    return [config["sliding_window"] if kind == SLIDING else 0 for kind in kinds]


def frequencies(config: RawConfig, layer: int) -> Array:
    kind = config["layer_types"][layer]
    if "rope_parameters" in config:
        rope = config["rope_parameters"][kind]
        scaling: RawConfig | None = rope if rope["rope_type"] == "llama3" else None
        base, part = rope["rope_theta"], rope["partial_rotary_factor"]
    else:
        scaling = config["rope_scaling"] if kind == FULL else None
        bases = config["rope_theta"]
        base = bases[layer] if isinstance(bases, list) else bases
        part = config["partial_rotary_factors"][layer]
    dim = int(config["head_dim"] * part)
    frequency: Array = base ** -(np.arange(0, dim, 2) / dim)
    if scaling:
        turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        kept = np.clip((turns - low) / (high - low), 0, 1)
        frequency = frequency * (kept + (1 - kept) / scaling["factor"])
    return frequency


def head_counts(config: RawConfig, layer: int) -> tuple[int, int]:
    """Return the query heads of a layer, and its key heads."""
    heads, groups = (
        config["num_attention_heads"],
        config.get("num_attention_groups") or config["num_key_value_heads"],
    )
    if config["layer_types"][layer] == FULL:
        return heads, groups
    other = config.get("attention_other_setting") or {
        "num_attention_heads": config.get("num_sliding_attention_heads")
    }
    return other["num_attention_heads"], other.get("num_attention_groups", groups)


def step_shapes(config: RawConfig) -> Shapes:
    """Return names and shapes of every tensor in the hub's checkpoint of this config."""
    text = config.get("text_config", config)
    hidden, vocab, dim = text["hidden_size"], text["vocab_size"], text["head_dim"]
    experts = text.get("moe_num_experts") or text["n_routed_experts"]
    width, shared = text["moe_intermediate_size"], text["share_expert_dim"]
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(text["num_hidden_layers"] + text["num_nextn_predict_layers"]):
        layer, is_mtp = f"model.layers.{i}.", i >= text["num_hidden_layers"]
        attention = layer + "self_attn."
        heads, groups = head_counts(text, i)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}{name}.weight"] = (hidden,)
        for name, rows in (("q", heads * dim), ("k", groups * dim), ("v", groups * dim)):
            shapes[f"{attention}{name}_proj.weight"] = (rows, hidden)
            if text.get("attention_bias"):
                shapes[f"{attention}{name}_proj.bias"] = (rows,)
        shapes[attention + "o_proj.weight"] = (hidden, heads * dim)
        if text.get("attention_bias"):
            shapes[attention + "o_proj.bias"] = (hidden,)
        shapes[attention + "g_proj.weight"] = (heads, hidden)
        shapes[attention + "q_norm.weight"] = shapes[attention + "k_norm.weight"] = (dim,)
        if i in moe_layers(text):
            shapes |= {
                layer + "moe.gate.weight": (experts, hidden),
                layer + "moe.router_bias": (experts,),
                layer + "moe.gate_proj.weight": (experts, width, hidden),
                layer + "moe.up_proj.weight": (experts, width, hidden),
                layer + "moe.down_proj.weight": (experts, hidden, width),
            }
            shapes |= _swiglu(layer + "share_expert.", hidden, shared)
        else:
            shapes |= _swiglu(layer + "mlp.", hidden, text["intermediate_size"])
        if is_mtp:
            shapes |= {
                layer + "eh_proj.weight": (hidden, 2 * hidden),
                layer + "enorm.weight": (hidden,),
                layer + "hnorm.weight": (hidden,),
                layer + "transformer.shared_head.norm.weight": (hidden,),
                layer + "transformer.shared_head.output.weight": (vocab, hidden),
            }
    shapes["model.norm.weight"] = (hidden,)
    if not text["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    if "vision_config" in config:  # some tensors of the other parts
        vision = config["vision_config"]
        patch = vision["patch_size"]
        shapes["vision_model.conv1.weight"] = (vision["width"], 3, patch, patch)
        shapes["vit_large_projector.weight"] = (hidden, 4 * vision["width"])
    return shapes


def _swiglu(prefix: str, hidden: int, width: int) -> Shapes:
    return {
        f"{prefix}gate_proj.weight": (width, hidden),
        f"{prefix}up_proj.weight": (width, hidden),
        f"{prefix}down_proj.weight": (hidden, width),
    }


def as_glm(config: RawConfig, tensors: Mapping[str, Array]) -> tuple[RawConfig, dict[str, Array]]:
    """The same model under the names of a GLM-4.5, with whole norms and the experts apart."""
    renamed: dict[str, Array] = {}
    for name, values in tensors.items():
        if match := re.fullmatch(r"(.*\.)moe\.(gate|up|down)_proj\.weight", name):
            for expert, matrix in enumerate(values):
                renamed[f"{match[1]}mlp.experts.{expert}.{match[2]}_proj.weight"] = matrix
            continue
        new = name.replace(".moe.router_bias", ".mlp.gate.e_score_correction_bias")
        new = new.replace(".moe.", ".mlp.").replace(".share_expert.", ".mlp.shared_experts.")
        renamed[new] = values + 1 if name.endswith("norm.weight") else values
    glm = {
        "model_type": "glm4_moe",
        "num_experts_per_tok": config.get("moe_top_k") or config["num_experts_per_tok"],
        "routed_scaling_factor": config["moe_router_scaling_factor"],
        "norm_topk_prob": True,
        "expert_swiglu_limit_list": config["swiglu_limits"],
        "share_expert_swiglu_limit_list": config["swiglu_limits_shared"],
    }
    return config | glm, renamed


def _as_wrapper(config: RawConfig) -> tuple[str, RawConfig]:
    """transformers knows the text model inside Step-3.7 alone."""
    vision = {"heads": 2, "image_size": 8, "layers": 1, "patch_size": 2, "width": 8}
    return "Step3p7Config", {"text_config": dict(text_of(config)), "vision_config": vision}


_LOADING = Loading(model="Step3p7ForConditionalGeneration", config=_as_wrapper)
ROWS = {
    "step3p5": Row(
        shapes=step_shapes,
        loading=_LOADING,
        has_own_modules=True,
        has_own_experts=True,
        has_zero_centred_norms=True,
        as_known=as_glm,
        gguf="step35",
        has_own_spelling=True,
        chats=("step3",),
    ),
    "step3p7": Row(
        shapes=step_shapes,
        loading=_LOADING,
        has_own_modules=True,
        has_own_experts=True,
        has_zero_centred_norms=True,
        as_known=as_glm,
        has_own_spelling=True,
        chats=("step3",),
        without_mlx="MLX's checkpoints of it are refused",
    ),
}
