"""Ling-3 (tiny 7.9B-A1.3B, flash 124B-A5.1B): Kimi Delta Attention, and latent attention in the last layer of a group.

Decays have a floor, and each head's result of latent attention is multiplied by a gate. The rest is DeepSeek-V3's under
other names, and so is the layer for multi-token prediction, which only drafts. Limits of activations (flash, last
layers) are those of the makers' vLLM and of llama.cpp; transformers 5.24 ignores them. Ling-2.5 has the same
`model_type` and other layers: `bailing_lightning.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.gguf import GgufFile
from argosy.config import KimiDeltaConfig, LatentConfig, ModelConfig
from argosy.model.families.latent.deepseek import LAYER_NAMES, Defaults, read_latent_model
from argosy.model.families.recurrent.bailing_lightning import ARCHITECTURES, read_ling_2_5
from argosy.model.families.recurrent.kimi_delta import DELTA_NAMES, open_delta_gguf, with_delta_layers
from argosy.model.families.recurrent.lightning import JOINED_LIGHTNING, LIGHTNING_NAMES
from argosy.model.families.recurrent.mamba import MOST_OF_ONE
from argosy.model.reading.config_reader import ConfigReader
from argosy.model.reading.experts_config import layers_by_type, read_sigmoid_router, with_limits
from argosy.model.reading.layout import separate_and_fused

__all__ = ["GGUF_ARCHITECTURE", "LAYOUTS", "MODEL_TYPE", "open_gguf", "parse_config"]

MODEL_TYPE = "bailing_hybrid"
GGUF_ARCHITECTURE = "bailingmoe3"

LAYOUTS = tuple(
    replace(layout, embed_name="word_embeddings.weight", joined=JOINED_LIGHTNING)
    for layout in separate_and_fused(
        {
            **{name: in_file.replace("self_attn.", "attention.") for name, in_file in LAYER_NAMES.items()},
            **{name: "attention." + in_file for name, in_file in DELTA_NAMES.items()},
            "kda_decay": "attention.f_proj.weight",
            "kda_gate": "attention.g_proj.weight",
            "attn_gate": "attention.g_proj.weight",
            "o": "attention.dense.weight",
            "choice_bias": "mlp.gate.expert_bias",
            "draft_final_norm": "final_layernorm.weight",
            **LIGHTNING_NAMES,
        }
    )
)

_ALIASES = {
    "model_max_length": "max_position_embeddings", "moe_renormalize": "norm_topk_prob", "num_expert_group": "n_group",
    "num_shared_experts": "n_shared_experts",
}  # fmt: skip

_DEFAULTS = Defaults(
    vocab_size=157_184, hidden_size=2560, num_layers=42, num_heads=32, num_kv_heads=32, dense_width=6144,
    expert_width=768, num_experts=512, experts_per_token=8, num_shared_experts=1, first_dense_layers=2,
    context_tokens=262_144, query_rank=None, nope_dim=128, value_dim=128, rope_theta=6_000_000.0,
    num_mtp_layers=1, eos_id=156_895, bos_id=None,
)  # fmt: skip

# Keys with the only value that the released files have, or that changes nothing.
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "no_kda_lora": (True,), "use_kda_lora": (False,), "linear_silu": (True,), "use_qk_norm": (True,),
    "gated_attention_proj_granularity_type": ("head_wise",), "router_dtype": ("fp32",), "score_function": ("sigmoid",),
    "moe_router_enable_expert_bias": (True,), "scale_router_input": (False,), "use_bias": (False,),
    "use_qkv_bias": (False,), "use_mla_nope": (False,), "use_nGPT": (False,), "up_proj_norm": (False,),
    "value_norm": (False,), "group_norm_size": (1,), "mtp_use_kda": (False,), "kda_safe_gate": (True,),
    "routing_group_score_top_k": (2,),
}  # fmt: skip


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read a `config.json`; an absent key gets the default of `BailingHybridConfig` in transformers 5.24.

    Raises:
        UnsupportedModel: a key or value asks for something that is not supported.
        CheckpointError: a key is missing, malformed, or contradicts another.
    """
    if raw.get("architectures") == ARCHITECTURES:
        return read_ling_2_5(raw, MODEL_TYPE)
    delta_dim = ConfigReader(raw, MODEL_TYPE).integer("head_dim", default=128, most=MOST_OF_ONE)
    reader = ConfigReader({k: v for k, v in raw.items() if k != "head_dim"}, MODEL_TYPE, aliases=_ALIASES)
    for name, accepted in _NEUTRAL.items():
        reader.neutral(name, *accepted)
    config = read_latent_model(
        reader,
        family=MODEL_TYPE,
        defaults=_DEFAULTS,
        read_router=read_sigmoid_router(scale=2.5, num_groups=8, kept_groups=4),
        read_moe_layers=layers_by_type(_DEFAULTS.first_dense_layers),
    )
    latent = config.latent
    assert latent is not None
    reader.neutral("moe_shared_expert_intermediate_size", config.expert_width)
    reader.neutral("rotary_dim", latent.rope_dim)
    reader.neutral("num_kv_heads_for_linear_attn", 0, None, latent.num_heads)
    names = ("expert_swiglu_limit_list", "share_expert_swiglu_limit_list")
    limits = [reader.numbers_of_layers(name, config.num_layers, config.num_mtp_layers) for name in names]
    reader.passed("mtp_loss_scaling_factor", "embedding_dropout", "output_dropout", "partial_rotary_factor")
    delta = KimiDeltaConfig(
        num_heads=latent.num_heads,
        head_dim=delta_dim,
        conv_width=reader.integer("short_conv_kernel_size", default=4, most=64),
        floor=reader.negative_number("kda_lower_bound", -5.0),
    )
    group = reader.integer("layer_group_size", default=6)
    kinds = reader.layer_types(config.num_layers, ("linear_attention", "full_attention"))
    if kinds is None and config.num_layers % group:
        raise reader.unsupported("layer_group_size", f"a divisor of num_hidden_layers, {config.num_layers}")
    is_delta = [
        (i + 1) % group > 0 if kinds is None else kinds[i] == "linear_attention"
        for i in range(config.num_layers)
    ]
    reader.finish()
    config = replace(config.with_mixers(LatentConfig, output_gate="heads"), draft_form="ling")
    return with_delta_layers(with_limits(config, *limits), delta, is_delta)


def open_gguf(file: GgufFile) -> ModelFiles:
    """The model in a GGUF file of architecture `bailingmoe3`; raises what `open_delta_gguf` raises."""
    return open_delta_gguf(file, GGUF_ARCHITECTURE, MODEL_TYPE)
