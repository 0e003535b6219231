"""Kimi-Linear (48B-A3B, arXiv:2510.26692): three layers of Kimi Delta Attention, then one of latent attention.

Latent attention has no rotary embedding: dimensions for one exist and do not rotate. `linear_attn_config` numbers
layers from 1. q and k get their unit length with the epsilon 1e-6 of transformers; llama.cpp takes `rms_norm_eps`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.gguf import GgufFile
from argosy.config import KimiDeltaConfig, LatentConfig, ModelConfig
from argosy.errors import CheckpointError
from argosy.model.families.latent.deepseek import LAYER_NAMES, Defaults, read_latent_model
from argosy.model.families.recurrent.kimi_delta import DELTA_NAMES, open_delta_gguf, with_delta_layers
from argosy.model.reading.config_reader import ConfigReader
from argosy.model.reading.experts_config import layers_by_type, read_sigmoid_router
from argosy.model.reading.layout import Layout

__all__ = [
    "ALIASES",
    "DEFAULTS",
    "GGUF_ARCHITECTURE",
    "LAYOUTS",
    "MODEL_TYPE",
    "open_gguf",
    "parse_config",
    "read_delta",
]

MODEL_TYPE = "kimi_linear"
GGUF_ARCHITECTURE = "kimi-linear"

_EXPERTS = {"router", "choice_bias", "shared_gate", "shared_up", "shared_down"}

LAYOUTS = (
    Layout(
        layer_names={
            **{
                name: in_file.replace("mlp.", "block_sparse_moe.") if name in _EXPERTS else in_file
                for name, in_file in LAYER_NAMES.items()
            },
            **{name: "self_attn." + in_file for name, in_file in DELTA_NAMES.items()},
            "kda_decay_down": "self_attn.f_a_proj.weight",
            "kda_decay": "self_attn.f_b_proj.weight",
            "kda_gate_down": "self_attn.g_a_proj.weight",
            "kda_gate": "self_attn.g_b_proj.weight",
        },
        expert_names=tuple(f"block_sparse_moe.experts.{{expert}}.w{i}.weight" for i in (1, 3, 2)),
    ),
)

ALIASES = {
    "model_max_length": "max_position_embeddings",
    "moe_renormalize": "norm_topk_prob",
    "moe_router_activation_func": "scoring_func",
    "num_expert_group": "n_group",
    "num_shared_experts": "n_shared_experts",
}

DEFAULTS = Defaults(
    vocab_size=163_840, hidden_size=2304, num_layers=27, num_heads=32, num_kv_heads=32, dense_width=9216, norm_eps=1e-5,
    expert_width=1024, num_experts=256, experts_per_token=8, num_shared_experts=1, first_dense_layers=1, nope_dim=128,
    value_dim=128, query_rank=None, context_tokens=1_048_576, eos_id=163_586, bos_id=163_584,
)  # fmt: skip
_SIZES = (  # their two names, and their defaults
    ("num_heads", "linear_num_heads", 32), ("head_dim", "linear_head_dim", 128),
    ("short_conv_kernel_size", "linear_conv_kernel_dim", 4),
)  # fmt: skip


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read a `config.json`; an absent key gets the default of `KimiLinearConfig` in transformers 5.24.

    Raises:
        UnsupportedModel: a key or value asks for something that is not supported.
        CheckpointError: a key is missing, malformed, or contradicts another.
    """
    # The files' head_dim, the hidden size over the heads, is no layer's.
    reader = ConfigReader({k: v for k, v in raw.items() if k != "head_dim"}, MODEL_TYPE, aliases=ALIASES)
    config = read_latent_model(
        reader,
        family=MODEL_TYPE,
        defaults=DEFAULTS,
        read_router=read_sigmoid_router(scale=2.446, num_groups=1, kept_groups=1),
        read_moe_layers=layers_by_type(DEFAULTS.first_dense_layers),
    )
    reader.neutral("mla_use_nope", True)
    reader.neutral("use_grouped_topk", True)
    delta, is_delta = read_delta(reader, config.num_layers)
    reader.finish()
    return with_delta_layers(config.with_mixers(LatentConfig, rope=None, scale=0.0), delta, is_delta)


def read_delta(
    reader: ConfigReader, num_layers: int, *, is_k3: bool = False
) -> tuple[KimiDeltaConfig, Sequence[bool]]:
    """Read the sizes of Kimi Delta Attention, and whether each layer has it; transformers writes them again.

    Args:
        is_k3: read Kimi-K3's keys of a floor, and of a gate with one factor.
    """
    linear = reader.nested("linear_attn_config", MODEL_TYPE) if reader.has("linear_attn_config") else None
    sizes = []
    for name, again, default in _SIZES:
        size = reader.integer(again, default=default)
        if linear is not None and linear.has(name):
            size = linear.integer(name, default=default)
            reader.neutral(again, size)
        sizes.append(size)
    heads, dim, width = sizes
    is_full = is_k3 and linear is not None and linear.flag("use_full_rank_gate", False)
    if is_k3 and not is_full:
        raise (linear or reader).unsupported("use_full_rank_gate", "true")
    delta = KimiDeltaConfig(
        num_heads=heads,
        head_dim=dim,
        conv_width=width,
        decay_rank=dim,
        gate_rank=0 if is_full else dim,
        floor=_read_floor(linear) if is_k3 else 0.0,
    )
    kinds = reader.layer_types(num_layers, ("linear_attention", "full_attention"))
    is_delta = [layer % 4 > 0 or layer == 0 for layer in range(num_layers)]
    if kinds is not None:
        is_delta = [kind == "linear_attention" for kind in kinds]
    if linear is not None:
        names = ("kda_layers", "full_attn_layers")
        numbered, others = (linear.integers(name, least=1, most=num_layers) for name in names)
        listed = [layer + 1 in numbered for layer in range(num_layers)]
        if sorted(numbered + others) != list(range(1, num_layers + 1)) or (kinds and is_delta != listed):
            raise CheckpointError(
                f"config.json: kda_layers and full_attn_layers have {len(numbered)} and {len(others)} numbers, "
                f"expected each from 1 to {num_layers} in one of them, as in layer_types",
                key="linear_attn_config",
            )
        is_delta = listed
        linear.finish()
    return delta, is_delta


def _read_floor(linear: ConfigReader | None) -> float:
    if linear is None or not linear.has("gate_lower_bound"):
        return 0.0
    return linear.negative_number("gate_lower_bound", -5.0)


def open_gguf(file: GgufFile) -> ModelFiles:
    """The model in a GGUF file of architecture `kimi-linear`; raises what `open_delta_gguf` raises."""
    return open_delta_gguf(file, GGUF_ARCHITECTURE, MODEL_TYPE)
