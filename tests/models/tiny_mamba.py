"""Tiny configs of families with Mamba-2 mixers, and the tensors of their checkpoints: Granite-4 hybrids, Nemotron-3.

Elsewhere: values and files are `tiny.py`; `numpy_mamba.py` computes them.
"""

from __future__ import annotations

from typing import Any

from tests.models.rows import Loading, Row

RawConfig = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]

FAMILIES = ("granitemoehybrid", "nemotron_h", "nemotron_h_puzzle")
_KINDS = {
    "mamba": "M",
    "linear_attention": "M",
    "attention": "*",
    "full_attention": "*",
    "moe": "E",
    "mlp": "-",
}


def granitemoehybrid(**changes: Any) -> RawConfig:
    """A config.json with the keys of granite-4.0-h-tiny's."""
    return {
        "architectures": ["GraniteMoeHybridForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attention_multiplier": 0.3,
        "bos_token_id": 1,
        "embedding_multiplier": 1.7,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 28,
        "initializer_range": 0.1,
        "intermediate_size": 7,
        "layer_types": ["mamba", "attention", "mamba"],
        "logits_scaling": 1.5,
        "mamba_chunk_size": 8,
        "mamba_conv_bias": True,
        "mamba_d_conv": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 12,
        "mamba_expand": 2,
        "mamba_n_groups": 1,
        "mamba_n_heads": 7,
        "mamba_proj_bias": False,
        "max_position_embeddings": 128,
        "model_type": "granitemoehybrid",
        "normalization_function": "rmsnorm",
        "num_attention_heads": 2,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "num_local_experts": 4,
        "output_router_logits": False,
        "pad_token_id": 0,
        "position_embedding_type": "nope",
        "residual_multiplier": 0.7,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000,
        "router_aux_loss_coef": 0.0,
        "shared_intermediate_size": 11,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 70,
    } | changes


def nemotron_h(**changes: Any) -> RawConfig:
    """A config.json with the keys of Nemotron-3-Nano's. transformers clamps dt in prompts, so `time_step_min` is 0."""
    return {
        "architectures": ["NemotronHForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "chunk_size": 8,
        "conv_kernel": 4,
        "eos_token_id": 2,
        "expand": 2,
        "head_dim": 10,
        "hidden_dropout": 0.0,
        "hidden_size": 28,
        "hybrid_override_pattern": "MEM*E",
        "initializer_range": 0.02,
        "intermediate_size": 18,
        "layer_norm_epsilon": 1e-05,
        "mamba_head_dim": 6,
        "mamba_hidden_act": "silu",
        "mamba_num_heads": 6,
        "mamba_proj_bias": False,
        "mamba_ssm_cache_dtype": "float32",
        "max_position_embeddings": 128,
        "mlp_bias": False,
        "mlp_hidden_act": "relu2",
        "model_type": "nemotron_h",
        "moe_intermediate_size": 14,
        "moe_shared_expert_intermediate_size": 19,
        "n_group": 1,
        "n_groups": 2,
        "n_routed_experts": 6,
        "n_shared_experts": 1,
        "norm_eps": 1e-05,
        "norm_topk_prob": True,
        "num_attention_heads": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 5,
        "num_key_value_heads": 2,
        "num_logits_to_keep": 1,
        "pad_token_id": 0,
        "partial_rotary_factor": 1.0,
        "rescale_prenorm_residual": True,
        "residual_in_fp32": False,
        "rope_theta": 10000,
        "routed_scaling_factor": 2.5,
        "sliding_window": None,
        "ssm_state_size": 12,
        "tie_word_embeddings": False,
        "time_step_floor": 0.0001,
        "time_step_max": 0.1,
        "time_step_min": 0.0,
        "topk_group": 1,
        "torch_dtype": "bfloat16",
        "use_bias": False,
        "use_cache": True,
        "use_conv_bias": True,
        "use_mamba_kernels": True,
        "vocab_size": 70,
    } | changes


def nemotron_h_puzzle(
    letters: str = "MEM*E", experts: tuple[tuple[int, int], ...] = ((3, 10), (1, 17)), **changes: Any
) -> RawConfig:
    """A config.json with the keys of Nemotron-Labs-3-Puzzle's; `experts` has those of a token, and their width, for
    each E of the pattern.
    """
    config = nemotron_h(
        model_type="nemotron_h_puzzle", architectures=["NemotronHPuzzleForCausalLM"], moe_latent_size=12,
        num_hidden_layers=None, mtp_block_configs=[],
    ) | changes  # fmt: skip
    for key in ("hybrid_override_pattern", "moe_intermediate_size", "num_experts_per_tok"):
        del config[key]
    kinds, left = {letter: kind for kind, letter in reversed(_KINDS.items())}, list(experts)
    blocks: list[RawConfig] = [{"block_type": kinds[letter]} for letter in letters]
    for block in blocks:
        if block["block_type"] == "moe":
            block["num_experts_per_tok"], block["moe_intermediate_size"] = left.pop(0)
            block["n_routed_experts"] = config["n_routed_experts"]
    assert not left
    return config | {"block_configs": blocks, "layers_block_type": [kinds[letter] for letter in letters]}


def uniform(config: RawConfig) -> RawConfig:
    """Return the config of a Nemotron-3 with Puzzle's layers, all with the experts of the last."""
    own = of_layer(config, max(moe_layers(config)))
    left_out = ("block_configs", "mtp_block_configs", "block_type", "model_type", "num_hidden_layers")
    return {key: value for key, value in own.items() if key not in left_out}


def of_layer(config: RawConfig, layer: int) -> RawConfig:
    """Return the config with the keys of a layer of Puzzle's."""
    return config | config["block_configs"][layer] if "block_configs" in config else config


def without_experts(config: RawConfig) -> RawConfig:
    """Return the config of a Nemotron before Nemotron-3, which has no keys of experts."""
    ours = ("moe_", "n_group", "n_routed", "n_shared", "norm_topk", "num_experts", "routed_", "topk_")
    return {key: value for key, value in config.items() if key == "n_groups" or not key.startswith(ours)}


def pattern(config: RawConfig) -> str:
    """Return the kind of each layer's first block: M Mamba-2, * attention, E experts, - a dense network."""
    if "block_configs" in config:
        return "".join(_KINDS[block["block_type"]] for block in config["block_configs"])
    kinds = config.get("layer_types") or config.get("layers_block_type")
    return "".join(_KINDS[kind] for kind in kinds) if kinds else config["hybrid_override_pattern"]


def moe_layers(config: RawConfig) -> list[int]:
    is_granite = config["model_type"] == "granitemoehybrid"
    is_moe = is_granite and config["num_local_experts"] > 0
    return [i for i, kind in enumerate(pattern(config)) if is_moe or kind == "E"]


def mamba_sizes(config: RawConfig) -> tuple[int, int, int, int, int]:
    """Return heads, dimensions of a head and of its state, groups, and taps of the convolution."""
    if config["model_type"] == "granitemoehybrid":
        heads = config["mamba_n_heads"]
        dim = config["mamba_expand"] * config["hidden_size"] // heads
        return heads, dim, config["mamba_d_state"], config["mamba_n_groups"], config["mamba_d_conv"]
    return (
        config["mamba_num_heads"],
        config["mamba_head_dim"],
        config["ssm_state_size"],
        config["n_groups"],
        config["conv_kernel"],
    )


def mamba_shapes(config: RawConfig) -> Shapes:
    """Return names and shapes of a mixer's tensors, below its own name."""
    heads, dim, state, groups, taps = mamba_sizes(config)
    hidden, channels = config["hidden_size"], heads * dim
    mixed = channels + 2 * groups * state
    shapes: Shapes = {
        "in_proj.weight": (channels + mixed + heads, hidden),
        "conv1d.weight": (mixed, 1, taps),
        "A_log": (heads,),
        "dt_bias": (heads,),
        "D": (heads,),
        "norm.weight": (channels,),
        "out_proj.weight": (hidden, channels),
    }
    if config.get("mamba_conv_bias", config.get("use_conv_bias")):
        shapes["conv1d.bias"] = (mixed,)
    if config.get("use_bias", config["mamba_proj_bias"]):
        shapes |= {f"{name}.bias": (shapes[f"{name}.weight"][0],) for name in ("in_proj", "out_proj")}
    return shapes


def mamba_model_shapes(config: RawConfig) -> Shapes:
    """Return names and shapes of every tensor in the hub's checkpoint of this config."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    is_granite = config["model_type"] == "granitemoehybrid"
    prefix = "model." if is_granite else "backbone."
    shapes: Shapes = {
        prefix + ("embed_tokens.weight" if is_granite else "embeddings.weight"): (vocab, hidden)
    }
    for i, kind in enumerate(pattern(config)):
        layer = f"{prefix}layers.{i}."
        own = of_layer(config, i)
        parts = _granite_layer(own, kind) if is_granite else _nemotron_layer(own, kind)
        shapes |= {layer + name: shape for name, shape in parts.items()}
    shapes[prefix + ("norm.weight" if is_granite else "norm_f.weight")] = (hidden,)
    if config.get("num_nextn_predict_layers"):
        joined = {
            "enorm.weight": (hidden,),
            "hnorm.weight": (hidden,),
            "eh_proj.weight": (hidden, 2 * hidden),
        }
        attention, experts = (_nemotron_layer(config, kind) for kind in "*E")
        of_layers = (joined | attention, experts | {"final_layernorm.weight": (hidden,)})
        for i, parts in enumerate(of_layers):
            shapes |= {f"mtp.layers.{i}.{name}": shape for name, shape in parts.items()}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def _attention_shapes(config: RawConfig) -> Shapes:
    hidden, heads, kv_heads = (
        config[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads")
    )
    dim = config.get("head_dim") or hidden // heads
    shapes: Shapes = {"o_proj.weight": (hidden, heads * dim)}
    for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
        shapes[f"{name}_proj.weight"] = (count * dim, hidden)
    if config["attention_bias"]:
        shapes |= {f"{name}_proj.bias": (shapes[f"{name}_proj.weight"][0],) for name in "qkvo"}
    return shapes


def _granite_layer(config: RawConfig, kind: str) -> Shapes:
    hidden, experts = config["hidden_size"], config["num_local_experts"]
    width, shared = config["intermediate_size"], config["shared_intermediate_size"]
    name, mixer = ("mamba.", mamba_shapes) if kind == "M" else ("self_attn.", _attention_shapes)
    routed = {
        "block_sparse_moe.router.layer.weight": (experts, hidden),
        "block_sparse_moe.input_linear.weight": (experts, 2 * width, hidden),
        "block_sparse_moe.output_linear.weight": (experts, hidden, width),
    }
    return {
        "input_layernorm.weight": (hidden,),
        **{name + part: shape for part, shape in mixer(config).items()},
        "post_attention_layernorm.weight": (hidden,),
        **(routed if experts else {}),
        "shared_mlp.input_linear.weight": (2 * shared, hidden),
        "shared_mlp.output_linear.weight": (hidden, shared),
    }


def _nemotron_layer(config: RawConfig, kind: str) -> Shapes:
    hidden = config["hidden_size"]
    match kind:
        case "M":
            mixer = mamba_shapes(config)
        case "*":
            mixer = _attention_shapes(config)
        case "-":
            mixer = _network("", hidden, config["intermediate_size"])
        case _:
            mixer = _expert_shapes(config)
    return {"norm.weight": (hidden,), **{f"mixer.{name}": shape for name, shape in mixer.items()}}


def _expert_shapes(config: RawConfig) -> Shapes:
    hidden, experts, latent = (
        config["hidden_size"],
        config["n_routed_experts"],
        config.get("moe_latent_size"),
    )
    shapes: Shapes = {"gate.weight": (experts, hidden), "gate.e_score_correction_bias": (experts,)}
    shapes |= _network("shared_experts.", hidden, config["moe_shared_expert_intermediate_size"])
    if latent:
        shapes |= {"fc1_latent_proj.weight": (latent, hidden), "fc2_latent_proj.weight": (hidden, latent)}
    for expert in range(experts):
        shapes |= _network(f"experts.{expert}.", latent or hidden, config["moe_intermediate_size"])
    return shapes


def _network(prefix: str, hidden: int, width: int) -> Shapes:
    return {prefix + "up_proj.weight": (width, hidden), prefix + "down_proj.weight": (hidden, width)}


ROWS = {
    "granitemoehybrid": Row(
        shapes=mamba_model_shapes,
        has_own_modules=True,
        has_own_experts=True,
        gguf="granitehybrid",
        chats=("granite4",),
    ),
    "nemotron_h": Row(
        shapes=mamba_model_shapes,
        has_own_modules=True,
        has_own_experts=True,
        gguf="nemotron_h_moe",
        chats=("nemotron3",),
    ),
    "nemotron_h_puzzle": Row(
        shapes=mamba_model_shapes,
        loading=Loading(config=lambda raw: ("NemotronHConfig", uniform(raw))),
        has_own_modules=True,
        has_own_experts=True,
        gguf="nemotron_h_moe",
        chats=("nemotron3",),
        without_record="only the sizes of its hub's config are known here",
        without_mlx="MLX's checkpoints of it are refused",
    ),
}
