"""Tiny configurations and tensors of families with grouped-query attention and the router of DeepSeek-V3.

Elsewhere: values and files are `tiny.py`, which also has the older families.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tests.models.rows import Loading, Row

RawConfig = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]

_COMMON: RawConfig = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 28,
    "initializer_range": 0.02,
    "intermediate_size": 14,
    "max_position_embeddings": 128,
    "moe_intermediate_size": 9,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 52,
}


def solar_open(**changes: Any) -> RawConfig:
    """A config.json with the keys of Solar-Open-100B's."""
    return {
        **_COMMON,
        "architectures": ["SolarOpenForCausalLM"],
        "first_k_dense_replace": 0,
        "head_dim": 12,
        "model_type": "solar_open",
        "n_routed_experts": 5,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "pad_token_id": 0,
        "partial_rotary_factor": 1.0,
        "rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64},
        "rope_theta": 1000000,
        "routed_scaling_factor": 1.0,
        "transformers_version": "4.57.1",
    } | changes


def dots1(**changes: Any) -> RawConfig:
    """A config.json with the keys of dots.llm1.base's."""
    return {
        **_COMMON,
        "architectures": ["Dots1ForCausalLM"],
        "first_k_dense_replace": 1,
        "hidden_size": 24,
        "model_type": "dots1",
        "moe_layer_freq": 1,
        "n_routed_experts": 5,
        "n_shared_experts": 2,
        "norm_topk_prob": True,
        "pretraining_tp": 1,
        "rope_scaling": None,
        "rope_theta": 10000000,
        "routed_scaling_factor": 2.5,
        "scoring_func": "noaux_tc",
        "sliding_window": None,
        "transformers_version": "4.46.3",
        "use_sliding_window": False,
    } | changes


def hy_v3(**changes: Any) -> RawConfig:
    """A config.json with the keys that transformers writes, and those of Tencent's own code."""
    num_layers = changes.get("num_hidden_layers", 3)
    return {
        **_COMMON,
        "architectures": ["HYV3ForCausalLM"],
        "enable_moe_fp32_combine": True,
        "first_k_dense_replace": 1,
        "head_dim": 14,
        "mlp_bias": False,
        "mlp_layer_types": ["dense"] + ["sparse"] * (num_layers - 1),
        "model_type": "hy_v3",
        "moe_router_enable_expert_bias": True,
        "num_experts": 5,
        "num_nextn_predict_layers": 0,
        "num_shared_experts": 1,
        "qk_norm": True,
        "rope_parameters": {"rope_theta": 11158840.0, "rope_type": "default"},
        "route_norm": True,
        "router_scaling_factor": 2.826,
        "transformers_version": "5.6.0.dev0",
    } | changes


def bailing_moe(**changes: Any) -> RawConfig:
    """A config.json with the keys of Ling-mini-2.0's."""
    common = {key: value for key, value in _COMMON.items() if key not in ("attention_bias", "bos_token_id")}
    return {
        **common,
        "architectures": ["BailingMoeV2ForCausalLM"],
        "embedding_dropout": 0.0,
        "first_k_dense_replace": 1,
        "head_dim": 12,
        "max_window_layers": 20,
        "model_type": "bailing_moe",
        "moe_router_enable_expert_bias": True,
        "moe_shared_expert_intermediate_size": 9,
        "mtp_loss_scaling_factor": 0,
        "n_group": 2,
        "norm_head": False,
        "norm_softmax": False,
        "norm_topk_prob": True,
        "num_experts": 6,
        "num_nextn_predict_layers": 0,
        "num_shared_experts": 1,
        "output_dropout": 0.0,
        "output_router_logits": False,
        "pad_token_id": 0,
        "partial_rotary_factor": 0.5,
        "pretraining_tp": 1,
        "rope_scaling": None,
        "rope_theta": 600000,
        "routed_scaling_factor": 2.5,
        "router_dtype": "fp32",
        "score_function": "sigmoid",
        "topk_group": 1,
        "transformers_version": "4.52.3",
        "use_bias": False,
        "use_qk_norm": True,
        "use_qkv_bias": False,
        "use_rmsnorm": True,
        "use_sliding_window": False,
    } | changes


def exaone_moe(**changes: Any) -> RawConfig:
    """A config.json with the keys of K-EXAONE's; without `layer_types` if it is None."""
    num_layers = changes.get("num_hidden_layers", 3)
    common = {key: value for key, value in _COMMON.items() if key != "attention_bias"}
    config = {
        **common,
        "architectures": ["ExaoneMoEForCausalLM"],
        "bos_token_id": 1,
        "first_k_dense_replace": 1,
        "head_dim": 10,
        "layer_types": [
            "full_attention" if layer % 4 == 1 else "sliding_attention" for layer in range(num_layers)
        ],
        "model_type": "exaone_moe",
        "n_group": 1,
        "norm_topk_prob": True,
        "num_experts": 5,
        "num_nextn_predict_layers": 0,
        "num_shared_experts": 1,
        "pad_token_id": 0,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "sliding_window": 7,
        "sliding_window_pattern": "LLLG",
        "tokenizer_class": "GPT2Tokenizer",
        "topk_group": 1,
        "topk_method": "noaux_tc",
    } | changes
    return {key: value for key, value in config.items() if key != "layer_types" or value}


def exaone_kinds(config: RawConfig) -> list[str]:
    every = config["sliding_window_pattern"]
    kinds = [
        "full_attention" if i % 4 == 3 else "sliding_attention" for i in range(config["num_hidden_layers"])
    ]
    if isinstance(every, int):
        kinds = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(len(kinds))]
    return config.get("layer_types") or kinds


# The names of the router, its bias for the choice, and shared experts, below `mlp.`.
_NAMES = {
    "solar_open": ("gate.weight", "gate.e_score_correction_bias", "shared_experts."),
    "dots1": ("gate.weight", "gate.e_score_correction_bias", "shared_experts."),
    "hy_v3": ("router.gate.weight", "expert_bias", "shared_mlp."),
    "bailing_moe": ("gate.weight", "gate.expert_bias", "shared_experts."),
    "exaone_moe": ("gate.weight", "e_score_correction_bias", "shared_experts."),
}
FAMILIES = tuple(_NAMES)


def num_dense_layers(config: RawConfig) -> int:
    return int(config.get("first_k_dense_replace", 1 if config["model_type"] == "hy_v3" else 0))


def grouped_shapes(config: RawConfig) -> Shapes:
    """Return names and shapes of every tensor in the hub's checkpoint of this config."""
    hidden, vocab, family = config["hidden_size"], config["vocab_size"], config["model_type"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    q_rows, kv_rows = (config[f"num_{name}_heads"] * head_dim for name in ("attention", "key_value"))
    num_experts = config.get("num_experts") or config["n_routed_experts"]
    num_shared = config.get("num_shared_experts") or config["n_shared_experts"]
    router, bias, shared = _NAMES[family]
    has_bias = config.get("attention_bias") or config.get("use_qkv_bias")
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        attention, mlp = layer + "self_attn.", layer + "mlp."
        shapes[layer + "input_layernorm.weight"] = shapes[layer + "post_attention_layernorm.weight"] = (
            hidden,
        )
        for name, rows in (("q", q_rows), ("k", kv_rows), ("v", kv_rows)):
            shapes[f"{attention}{name}_proj.weight"] = (rows, hidden)
            if has_bias:
                shapes[f"{attention}{name}_proj.bias"] = (rows,)
        shapes[attention + "o_proj.weight"] = (hidden, q_rows)
        if has_bias and family not in ("solar_open", "bailing_moe"):
            shapes[attention + "o_proj.bias"] = (hidden,)
        if family != "solar_open":
            shapes[attention + "q_norm.weight"] = shapes[attention + "k_norm.weight"] = (head_dim,)
        if i < num_dense_layers(config):
            shapes |= _swiglu(mlp, hidden, config["intermediate_size"])
            continue
        shapes[mlp + router], shapes[mlp + bias] = (num_experts, hidden), (num_experts,)
        for expert in range(num_experts):
            shapes |= _swiglu(f"{mlp}experts.{expert}.", hidden, config["moe_intermediate_size"])
        shapes |= _swiglu(mlp + shared, hidden, num_shared * config["moe_intermediate_size"])
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    return _as_ling(shapes) if family == "bailing_moe" else shapes


_LING = {
    "model.embed_tokens": "model.word_embeddings",
    "self_attn.o_proj": "attention.dense",
    "self_attn.q_norm": "attention.query_layernorm",
    "self_attn.k_norm": "attention.key_layernorm",
}


def _as_ling(shapes: Shapes) -> Shapes:
    """The tensors under Ling's names: q, k and v are one."""
    found: Shapes = {}
    for name, shape in shapes.items():
        base, _, kind = name.rpartition(".")
        if base.endswith(("q_proj", "k_proj", "v_proj")):
            joined = f"{base.rpartition('self_attn.')[0]}attention.query_key_value.{kind}"
            rows = found[joined][0] if joined in found else 0
            found[joined] = (rows + shape[0], *shape[1:])
        else:
            found[next((name.replace(old, new) for old, new in _LING.items() if old in name), name)] = shape
    return found


def _swiglu(prefix: str, hidden: int, width: int) -> Shapes:
    return {
        f"{prefix}gate_proj.weight": (width, hidden),
        f"{prefix}up_proj.weight": (width, hidden),
        f"{prefix}down_proj.weight": (hidden, width),
    }


def as_glm(config: RawConfig, tensors: Mapping[str, Any]) -> tuple[RawConfig, dict[str, Any]]:
    """The same model as a GLM-4.5, whose mathematics contain those of these families."""
    if config["model_type"] == "bailing_moe":
        tensors = _from_ling(config, tensors)
        config = config | {"use_qk_norm": True, "attention_bias": config["use_qkv_bias"]}
    router, bias, shared = _NAMES[config["model_type"]]
    theirs = {router: "gate.weight", bias: "gate.e_score_correction_bias", shared: "shared_experts."}

    def name_of(name: str) -> str:
        for old, new in theirs.items():
            name = name.replace(f".mlp.{old}", f".mlp.{new}")
        return name

    scale = config.get("router_scaling_factor") or config.get("routed_scaling_factor", 1.0)
    share = config["partial_rotary_factor"] if config["model_type"] == "bailing_moe" else 1.0
    glm = config | {"model_type": "glm4_moe", "partial_rotary_factor": share, "routed_scaling_factor": scale}
    if config["model_type"] == "exaone_moe":
        kinds = exaone_kinds(config)
        glm |= {"use_sliding_window": True, "layer_types": kinds, "rotates_in_windows": True}
        glm |= {"use_qk_norm": True, "attention_bias": False}
    elif config.get("sliding_window"):
        first, num_layers = config["max_window_layers"], config["num_hidden_layers"]
        kinds = ["full_attention"] * first + ["sliding_attention"] * (num_layers - first)
        glm |= {"use_sliding_window": True, "layer_types": kinds}
    return glm, {name_of(name): values for name, values in tensors.items()}


def _from_ling(config: RawConfig, tensors: Mapping[str, Any]) -> dict[str, Any]:
    rows = [config[f"num_{name}_heads"] * config["head_dim"] for name in ("attention", "key_value")]
    found = {}
    for name, values in tensors.items():
        if "attention.query_key_value." in name:
            layer, _, kind = name.partition("attention.query_key_value.")
            for part, split in zip("qkv", np.split(values, [rows[0], sum(rows)]), strict=True):
                found[f"{layer}self_attn.{part}_proj.{kind}"] = split
        else:
            found[next((name.replace(new, old) for old, new in _LING.items() if new in name), name)] = values
    return found


def _as_sarvam(config: RawConfig) -> tuple[str, RawConfig]:
    """transformers has no class for Ling's, but Sarvam's has the same names and mathematics."""
    return "SarvamMoEConfig", config | {"model_type": "sarvam_moe"}


ROWS = {
    "solar_open": Row(
        shapes=grouped_shapes,
        as_known=as_glm,
        gguf="glm4moe",
        chats=("solar",),
    ),
    "dots1": Row(shapes=grouped_shapes, as_known=as_glm, gguf="dots1"),
    "hy_v3": Row(
        shapes=grouped_shapes,
        has_own_modules=True,
        as_known=as_glm,
        gguf="hy_v3",
        chats=("hy3",),
        without_mlx="MLX does not know it",
    ),
    "bailing_moe": Row(
        shapes=grouped_shapes,
        loading=Loading(config=_as_sarvam),
        has_own_modules=True,
        has_own_experts=True,
        as_known=as_glm,
        gguf="bailingmoe2",
        chats=("ling2",),
    ),
    "exaone_moe": Row(
        shapes=grouped_shapes, has_own_modules=True, as_known=as_glm, gguf="exaone-moe", chats=("exaone",)
    ),
}
