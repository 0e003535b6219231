"""Code shared by Kimi-Linear and Ling-3: layers of Kimi Delta Attention (arXiv:2510.26692) among latent attention.

Layers have DeepSeek-V3's router and shared expert. In their GGUF files, `kimi-linear` and `bailingmoe3`, layers without
keys and values have 0 KV heads, and the decay rate is not a logarithm: it is -e^A_log in one and e^A_log in the other.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.gguf import GgufFile
from argosy.config import KimiDeltaConfig, LayerConfig, ModelConfig, RouterConfig
from argosy.model.families.latent.deepseek_gguf import read_latent
from argosy.model.reading.experts_config import (
    RENORMALIZE_EPS,
    read_dense_layers,
    read_grouped_router,
    require_groups,
    with_limits,
)
from argosy.model.reading.gguf_config import SIGMOID, GgufConfigReader
from argosy.model.reading.gguf_layout import read_gguf_layout

# Names below the attention module, which are the same for all layers of a family.
DELTA_NAMES = {
    "kda_q": "q_proj.weight",
    "kda_k": "k_proj.weight",
    "kda_v": "v_proj.weight",
    "kda_q_conv": "q_conv1d.weight",
    "kda_k_conv": "k_conv1d.weight",
    "kda_v_conv": "v_conv1d.weight",
    "kda_beta": "b_proj.weight",
    "kda_rate": "A_log",
    "kda_dt_bias": "dt_bias",
    "kda_norm": "o_norm.weight",
    "kda_out": "o_proj.weight",
}

GGUF_NAMES = {
    "kda_q": "attn_q.weight",
    "kda_k": "attn_k.weight",
    "kda_v": "attn_v.weight",
    "kda_q_conv": "ssm_conv1d_q.weight",
    "kda_k_conv": "ssm_conv1d_k.weight",
    "kda_v_conv": "ssm_conv1d_v.weight",
    "kda_beta": "ssm_beta.weight",
    "kda_rate": "ssm_a",
    "kda_dt_bias": "ssm_dt.bias",
    "kda_norm": "ssm_norm.weight",
    "kda_out": "attn_output.weight",
}


def with_delta_layers(config: ModelConfig, delta: KimiDeltaConfig, is_delta: Iterable[bool]) -> ModelConfig:
    """Return a model of latent attention with `delta` as the mixer of some layers."""
    layers = zip(config.layers, is_delta, strict=True)
    return replace(config, layers=tuple(replace(one, mixer=delta) if found else one for one, found in layers))


def open_delta_gguf(file: GgufFile, architecture: str, family: str) -> ModelFiles:
    """The model in a GGUF file of either architecture.

    Raises:
        UnsupportedModel: a key, value or tensor type that is not supported.
        CheckpointError: a key or tensor is missing, malformed, or contradicts another.
    """
    reader = GgufConfigReader(file, architecture)
    is_kimi = family == "kimi_linear"
    sizes = reader.sizes()
    num_layers = reader.num_layers()
    kv_heads, has_latent = reader.attention_layers()
    if kv_heads != 1:
        raise reader.unsupported(
            "attention.head_count_kv", kv_heads, "1 in layers with keys, which all heads share"
        )
    num_heads, dim = reader.integer("attention.head_count"), reader.integer("kda.head_dim")
    if not is_kimi and not reader.flag("kda.safe_gate", True):
        raise reader.unsupported("kda.safe_gate", False, "true")
    delta = KimiDeltaConfig(
        num_heads=num_heads,
        head_dim=dim,
        conv_width=reader.integer("ssm.conv_kernel", most=64),
        decay_rank=dim if is_kimi else 0,
        gate_rank=dim if is_kimi else 0,
        floor=0.0 if is_kimi else read_floor(reader),
        is_rate_log=False,
    )
    latent = read_latent(reader, num_heads, sizes["context_tokens"], is_everywhere=False)
    latent = replace(
        latent, rope=None if is_kimi else latent.rope, output_gate="none" if is_kimi else "heads"
    )
    num_dense = read_dense_layers(reader, num_layers)
    expert_width = reader.integer("expert_feed_forward_length")
    num_shared = reader.integer("expert_shared_count", 0, least=0)
    shared_width = reader.integer("expert_shared_feed_forward_length", num_shared * expert_width, least=0)
    config = ModelConfig(
        family=family,
        layers=tuple(
            LayerConfig(mixer=latent if is_latent else delta, is_moe=layer >= num_dense)
            for layer, is_latent in enumerate(has_latent)
        ),
        expert_width=expert_width,
        router=require_groups(read_router(reader, is_kimi), sizes["num_experts"], sizes["experts_per_token"]),
        dense_width=reader.integer("feed_forward_length"),
        shared_width=shared_width,
        draft_form="deepseek" if is_kimi else "ling",
        num_mtp_layers=reader.num_mtp_layers(),
        **sizes,
    )
    config = with_limits(config, reader.limits("swiglu_clamp_exp"), reader.limits("swiglu_clamp_shexp"))
    reader.finish()
    low, full = ("ssm_f_b.weight", "ssm_g_b.weight"), ("ssm_f_a.weight", "ssm_g_a.weight")
    decay, gate = low if is_kimi else full
    names = {"kda_decay_down": full[0], "kda_gate_down": full[1], "kda_decay": decay, "kda_gate": gate}
    return read_gguf_layout(file, config, is_paired=False, has_rope_freqs=False, names=GGUF_NAMES | names)


def read_floor(reader: GgufConfigReader) -> float:
    key = reader.key("kda.gate_lower_bound")
    value = reader.file.metadata.get(key)
    if not isinstance(value, float) or not -1e3 < value < 0:
        raise reader.file.wrong(key, value, "a number below zero")
    return value


def read_router(reader: GgufConfigReader, is_kimi: bool, default: int | None = None) -> RouterConfig:
    if (function := reader.integer("expert_gating_func", default)) != SIGMOID:
        raise reader.unsupported("expert_gating_func", function, "2 (sigmoid)")
    router = read_grouped_router(reader, is_sigmoid=True, has_choice_bias=True)
    # llama.cpp always renormalises in Kimi-Linear.
    return replace(router, renormalize=True, renormalize_eps=RENORMALIZE_EPS) if is_kimi else router
