"""Write tiny random checkpoints in the hub's layout, without torch.

    a config.json as on the hub  ->  names and shapes of its tensors  ->  seeded random values  ->  files

Nothing is left at zero or one: norms, biases and routers are random too, so that no flag hides behind a neutral
value. Values are exact in the format they are stored in.

Elsewhere: a family's names and shapes are in the file with its row (`rows.py`); the configurations with committed
references are `configurations.py`; their references come from `make_models.py` (transformers), and `numpy_model.py` is
the second implementation.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.models.rows import Row, Shapes, row_of
from tests.models.safetensors_file import Array, decode, encode, write_checkpoint

RawConfig = dict[str, Any]

NEW_TOKENS = 16

# Names of the router bias that affects only the choice of experts, by family.
CHOICE_BIASES = {
    "glm4_moe": "gate.e_score_correction_bias",
    "lfm2_moe": "expert_bias",
    "mimo_v2_flash": "gate.e_score_correction_bias",
    "minimax_m2": "e_score_correction_bias",
}

SWIGLU_NAMES = ("gate_proj", "up_proj", "down_proj")


def mixtral(**changes: Any) -> RawConfig:
    """A config.json with the keys of Mixtral-8x7B's."""
    return {
        "architectures": ["MixtralForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 40,
        "initializer_range": 0.02,
        "intermediate_size": 20,
        "max_position_embeddings": 128,
        "model_type": "mixtral",
        "num_attention_heads": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "num_local_experts": 6,
        "output_router_logits": False,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.36.0.dev0",
        "use_cache": True,
        "vocab_size": 112,
    } | changes


def qwen2_moe(**changes: Any) -> RawConfig:
    """A config.json with the keys of Qwen1.5-MoE-A2.7B's."""
    return {
        "architectures": ["Qwen2MoeForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "decoder_sparse_step": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 40,
        "initializer_range": 0.02,
        "intermediate_size": 48,
        "max_position_embeddings": 128,
        "max_window_layers": 3,
        "model_type": "qwen2_moe",
        "moe_intermediate_size": 20,
        "norm_topk_prob": False,
        "num_attention_heads": 4,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "output_router_logits": False,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": 40,
        "sliding_window": 32768,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.39.0.dev0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 112,
    } | changes


def qwen3_moe(**changes: Any) -> RawConfig:
    """A config.json with the keys of Qwen3-30B-A3B's."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "decoder_sparse_step": 1,
        "eos_token_id": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "hidden_size": 32,
        "initializer_range": 0.02,
        "intermediate_size": 48,
        "max_position_embeddings": 128,
        "max_window_layers": 3,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
        "num_attention_heads": 4,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "output_router_logits": False,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 112,
    } | changes


def gpt_oss(**changes: Any) -> RawConfig:
    """A config.json with the keys of gpt-oss-20b's, except `quantization_config`."""
    num_layers = changes.get("num_hidden_layers", 3)
    return {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": 2,
        "head_dim": 12,
        "hidden_act": "silu",
        "hidden_size": 28,
        "initial_context_length": 16,
        "initializer_range": 0.02,
        "intermediate_size": 18,
        "layer_types": [("sliding_attention", "full_attention")[i % 2] for i in range(num_layers)],
        "max_position_embeddings": 128,
        "model_type": "gpt_oss",
        "num_attention_heads": 4,
        "num_experts_per_tok": 2,
        "experts_per_token": changes.get("num_experts_per_tok", 2),
        "num_hidden_layers": num_layers,
        "num_key_value_heads": 2,
        "num_local_experts": 5,
        "output_router_logits": False,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 8.0,
            "original_max_position_embeddings": 16,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": 150000,
        "router_aux_loss_coef": 0.9,
        "sliding_window": 8,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.55.0.dev0",
        "use_cache": True,
        "vocab_size": 112,
    } | changes


def glm4_moe(**changes: Any) -> RawConfig:
    """A config.json with the keys of GLM-4.5-Air's."""
    return {
        "architectures": ["Glm4MoeForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": [2, 5],
        "first_k_dense_replace": 1,
        "head_dim": 12,
        "hidden_act": "silu",
        "hidden_size": 36,
        "initializer_range": 0.02,
        "intermediate_size": 20,
        "max_position_embeddings": 128,
        "model_type": "glm4_moe",
        "moe_intermediate_size": 12,
        "n_group": 1,
        "n_routed_experts": 6,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "num_nextn_predict_layers": 1,
        "pad_token_id": 0,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "routed_scaling_factor": 1.0,
        "tie_word_embeddings": False,
        "topk_group": 1,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.54.0",
        "use_cache": True,
        "use_qk_norm": False,
        "vocab_size": 68,
    } | changes


def olmoe(**changes: Any) -> RawConfig:
    """A config.json with the keys of OLMoE-1B-7B-0924's."""
    return {
        "architectures": ["OlmoeForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "clip_qkv": None,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 40,
        "initializer_range": 0.02,
        "intermediate_size": 12,
        "max_position_embeddings": 128,
        "model_type": "olmoe",
        "norm_topk_prob": False,
        "num_attention_heads": 4,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "output_router_logits": False,
        "pad_token_id": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "router_aux_loss_coef": 0.01,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.43.0.dev0",
        "use_cache": True,
        "vocab_size": 68,
    } | changes


def minimax_m2(**changes: Any) -> RawConfig:
    """A config.json with the keys of MiniMax-M2's, except `quantization_config`."""
    return {
        "architectures": ["MiniMaxM2ForCausalLM"],
        "attention_dropout": 0.0,
        "attn_type_list": [1] * min(changes.get("num_hidden_layers", 3), 100),
        "bos_token_id": None,
        "eos_token_id": 2,
        "head_dim": 12,
        "hidden_act": "silu",
        "hidden_size": 36,
        "initializer_range": 0.02,
        "intermediate_size": 12,
        "layernorm_full_attention_beta": 1.0,
        "layernorm_linear_attention_beta": 1.0,
        "layernorm_mlp_beta": 1.0,
        "max_position_embeddings": 128,
        "mlp_intermediate_size": 64,
        "model_type": "minimax_m2",
        "mtp_transformer_layers": 1,
        "num_attention_heads": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "num_local_experts": 6,
        "num_mtp_modules": 3,
        "output_router_logits": False,
        "qk_norm_type": "per_layer",
        "rms_norm_eps": 1e-06,
        "rope_theta": 5000000,
        "rotary_dim": 6,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
        "scoring_func": "sigmoid",
        "shared_intermediate_size": 0,
        "shared_moe_mode": "sigmoid",
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.46.1",
        "use_cache": True,
        "use_mtp": True,
        "use_qk_norm": True,
        "use_routing_bias": True,
        "vocab_size": 68,
    } | changes


def respelt(config: RawConfig, *, theta: float, **scaling: Any) -> RawConfig:
    """Return the config as transformers 5 writes it: `rope_parameters` and `dtype` in place of the older keys."""
    kept = {
        key: value
        for key, value in config.items()
        if key not in ("rope_theta", "rope_scaling", "torch_dtype", *scaling)
    }
    rope = {"rope_theta": theta, "rope_type": "default"} | scaling
    return kept | {
        "dtype": config["torch_dtype"],
        "pad_token_id": None,
        "rope_parameters": rope,
        "transformers_version": "5.24.0",
    }


def text_of(config: RawConfig) -> RawConfig:
    """Return the part of a config that describes the text model."""
    config = config.get("thinker_config", config)
    return config.get("text_config") or config.get("language_config", config)


def head_dim(config: RawConfig) -> int:
    config = text_of(config)
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def num_experts(config: RawConfig) -> int:
    text = text_of(config)
    return next(
        (
            text[name]
            for name in ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
            if name in text
        ),
        0,
    )


def tensor_shapes(config: RawConfig) -> Shapes:
    """Return names and shapes of every tensor in the hub's checkpoint of this config."""
    shapes = row_of(config).shapes
    assert shapes is not None, config["model_type"]
    return shapes(config)


def moe_layers(config: RawConfig) -> list[int]:
    """Return the layers whose tensors include routed experts, without those for multi-token prediction."""
    num_layers = text_of(config)["num_hidden_layers"]
    found = {
        int(match[1])
        for name in tensor_shapes(config)
        if not name.startswith("mtp.")
        and (match := re.search(r"\blayers\.(\d+)\.(?:.*\.)?(?:experts|block_sparse_moe|moe)\.", name))
    }
    return sorted(layer for layer in found if layer < num_layers)


def plain_moe_layers(config: RawConfig) -> list[int]:
    """Return the layers with experts of a text config: all after the dense ones, or every n-th except those listed."""
    if "first_k_dense_replace" in config:
        return list(range(config["first_k_dense_replace"], config["num_hidden_layers"]))
    step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    return [i for i in range(config["num_hidden_layers"]) if i not in dense and (i + 1) % step == 0]


def plain_shapes(
    config: RawConfig,
    attention_shapes: Callable[[RawConfig, int], Shapes] | None = None,
    moe_layers: Callable[[RawConfig], list[int]] = plain_moe_layers,
) -> Shapes:
    """Return names and shapes of the tensors of the families here; others may have attention of their own."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    q_rows = config["num_attention_heads"] * head_dim(config)
    kv_rows = config["num_key_value_heads"] * head_dim(config)
    family = config["model_type"]
    has_qkv_bias = {"mixtral": False, "minimax_m2": False, "qwen2_moe": config.get("qkv_bias", True)}.get(
        family, config.get("attention_bias", family == "gpt_oss")
    )
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        attention = layer + "self_attn."
        shapes[layer + "input_layernorm.weight"] = (hidden,)
        if attention_shapes is not None:
            shapes |= attention_shapes(config, i)
        else:
            for name, rows in (("q", q_rows), ("k", kv_rows), ("v", kv_rows)):
                shapes[f"{attention}{name}_proj.weight"] = (rows, hidden)
                if has_qkv_bias:
                    shapes[f"{attention}{name}_proj.bias"] = (rows,)
            shapes[attention + "o_proj.weight"] = (hidden, q_rows)
        if family in ("qwen3_moe", "gpt_oss", "olmoe") and has_qkv_bias:
            shapes[attention + "o_proj.bias"] = (hidden,)
        if family == "gpt_oss":
            shapes[attention + "sinks"] = (config["num_attention_heads"],)
        if family == "qwen3_moe" or (family == "glm4_moe" and config["use_qk_norm"]):
            shapes[attention + "q_norm.weight"] = shapes[attention + "k_norm.weight"] = (head_dim(config),)
        if family in ("olmoe", "minimax_m2"):
            shapes[attention + "q_norm.weight"], shapes[attention + "k_norm.weight"] = (q_rows,), (kv_rows,)
        shapes[layer + "post_attention_layernorm.weight"] = (hidden,)
        if i in moe_layers(config):
            shapes |= moe_shapes(config, layer)
        else:
            shapes |= swiglu_shapes(
                layer + "mlp.", ("gate_proj", "up_proj", "down_proj"), hidden, config["intermediate_size"]
            )
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def moe_shapes(config: RawConfig, layer: str) -> Shapes:
    hidden = config["hidden_size"]
    if config["model_type"] == "gpt_oss":
        return transposed_moe_shapes(layer + "mlp.", num_experts(config), hidden, config["intermediate_size"])
    width = config.get("moe_intermediate_size", config["intermediate_size"])
    block, names = expert_names(config, layer)
    shapes: Shapes = {block + "gate.weight": (num_experts(config), hidden)}
    if config["model_type"] in CHOICE_BIASES:
        shapes[block + CHOICE_BIASES[config["model_type"]]] = (num_experts(config),)
    for expert in range(num_experts(config)):
        shapes |= swiglu_shapes(f"{block}experts.{expert}.", names, hidden, width)
    if config["model_type"] == "qwen2_moe":
        shared = config["shared_expert_intermediate_size"]
        shapes |= swiglu_shapes(block + "shared_expert.", names, hidden, shared)
        shapes[block + "shared_expert_gate.weight"] = (1, hidden)
    if config["model_type"] == "glm4_moe":
        shapes |= swiglu_shapes(block + "shared_experts.", names, hidden, config["n_shared_experts"] * width)
    return shapes


def expert_names(config: RawConfig, layer: str) -> tuple[str, tuple[str, str, str]]:
    """Return the prefix of a layer's experts, and the names of their gate, up and down."""
    if config["model_type"] in ("mixtral", "minimax_m2", "minimax"):
        return layer + "block_sparse_moe.", ("w1", "w3", "w2")
    return layer + "mlp.", ("gate_proj", "up_proj", "down_proj")


def transposed_moe_shapes(block: str, num_experts: int, hidden: int, width: int) -> Shapes:
    """Return shapes of experts in one tensor, with alternating columns of gate and up."""
    return {
        block + "router.weight": (num_experts, hidden),
        block + "router.bias": (num_experts,),
        block + "experts.gate_up_proj": (num_experts, hidden, 2 * width),
        block + "experts.gate_up_proj_bias": (num_experts, 2 * width),
        block + "experts.down_proj": (num_experts, width, hidden),
        block + "experts.down_proj_bias": (num_experts, hidden),
    }


def swiglu_shapes(prefix: str, names: tuple[str, str, str], hidden: int, width: int) -> Shapes:
    gate, up, down = names
    return {
        f"{prefix}{gate}.weight": (width, hidden),
        f"{prefix}{up}.weight": (width, hidden),
        f"{prefix}{down}.weight": (hidden, width),
    }


def random_tensors(config: RawConfig, seed: int, dtype: str) -> dict[str, Array]:
    """Return seeded values, exact in `dtype`, of a size that keeps activations near one and routing decided."""
    rng = np.random.default_rng(seed)
    tensors = {}
    shapes = tensor_shapes(config)
    has_zero_centred_norms = row_of(config).has_zero_centred_norms
    is_tied = not any(name.endswith("lm_head.weight") for name in shapes)
    for name, shape in shapes.items():
        if name.endswith("tid2eid"):  # the experts of each token
            each = np.tile(np.arange(num_experts(config)), (shape[0], 1))
            tensors[name] = rng.permuted(each, axis=1)[:, : shape[1]]
            continue
        noise = rng.standard_normal(shape, np.float32)
        if "norm" in name:
            is_zero_centred = has_zero_centred_norms and "linear_attn" not in name
            values = (0 if is_zero_centred else 1) + 0.2 * noise
        elif name.endswith(("A_log", ".D")):
            values = noise
        elif name.endswith(("layer_scalar", "router.scale", "per_expert_scale")):
            values = 1 + 0.2 * noise
        elif name.endswith("router.proj.weight"):  # its input has the length one
            values = 1.5 * noise
        elif name.endswith(
            ("e_score_correction_bias", "moe.router_bias", "feed_forward.expert_bias", "gate.expert_bias")
        ):
            values = 0.1 * noise
        elif name.endswith((".bias", "_bias", ".bias_vl", "_base", "_scale")):
            values = 0.3 * noise
        elif name.endswith(("sinks", "attn_sink", "softmax_offset", "learnable_sink_param")):
            values = noise
        elif any(part in name for part in ("embed_tokens", "word_embeddings", "backbone.embeddings")):
            # A tied table is also the head: at unit size a token would only ever predict itself.
            values = noise * (0.5 * shape[1] ** -0.5 if is_tied else 1.0)
        elif name.endswith(
            (
                "mlp.gate.weight",
                "block_sparse_moe.gate.weight",
                "router.weight",
                "router.layer.weight",
                "mixer.gate.weight",
                "forward.gate.weight",
                "moe.gate.weight",
            )
        ):
            values = noise * (1.5 * shape[1] ** -0.5)
        else:
            values = noise * (1.2 * shape[1] ** -0.5)  # [rows, inputs], or [experts, inputs, columns]
        tensors[name] = decode(dtype, encode(dtype, values)).reshape(shape)
    return tensors


def write_model(
    directory: Path, config: RawConfig, *, seed: int, dtype: str = "BF16", num_shards: int = 1
) -> Path:
    """Write config.json and the weights; return `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = random_tensors(config, seed, dtype)
    stored = {name: ("I64" if t.dtype == np.int64 else dtype, t) for name, t in tensors.items()}
    write_checkpoint(directory, stored, num_shards=num_shards)
    return directory


def prompt_ids(config: RawConfig, seed: int, num_tokens: int | None = None) -> list[int]:
    num_tokens = num_tokens or row_of(config).prompt_tokens
    return [
        int(i)
        for i in np.random.default_rng([seed, 1]).integers(3, text_of(config)["vocab_size"], num_tokens)
    ]


ROWS = {
    "mixtral": Row(shapes=plain_shapes, gguf="llama", chats=("mistral",)),
    "qwen2_moe": Row(shapes=plain_shapes, gguf="qwen2moe", chats=("chatml",)),
    "qwen3_moe": Row(shapes=plain_shapes, gguf="qwen3moe", chats=("qwen3", "qwen3_coder")),
    "gpt_oss": Row(shapes=plain_shapes, has_own_experts=True, gguf="gpt-oss", chats=("harmony",)),
    "glm4_moe": Row(shapes=plain_shapes, gguf="glm4moe", chats=("glm", "glm47")),
    "olmoe": Row(shapes=plain_shapes, gguf="olmoe"),
    "minimax_m2": Row(shapes=plain_shapes, gguf="minimax-m2", chats=("minimax_m2",)),
}
