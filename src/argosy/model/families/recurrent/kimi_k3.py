"""Kimi-K3 (2.8T-A104B, arXiv:2607.24653): Kimi Delta Attention and gated latent attention, whose sublayers read a bank
of earlier hidden states.

The text model is a Kimi-Linear under `language_model.` with full-rank gates, decays that have a floor, latent experts
with a norm, and SiTU in all networks. `linear_attn_config` numbers layers from 1. Files pad the rates of decay to
multiples of 128 heads. llama.cpp has one vector for the two of a bank's scores, and takes `rms_norm_eps` for compressed
vectors and for q and k of unit length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.gguf import GgufFile
from argosy.checkpoint.landing import MatrixRef
from argosy.config import (
    ActivationConfig,
    BankResidual,
    KimiDeltaConfig,
    LatentConfig,
    LayerConfig,
    ModelConfig,
)
from argosy.errors import CheckpointError
from argosy.model.families.latent.deepseek import read_latent_model
from argosy.model.families.latent.deepseek_gguf import read_latent
from argosy.model.families.recurrent import kimi_linear
from argosy.model.families.recurrent.kimi_delta import GGUF_NAMES, read_floor, read_router, with_delta_layers
from argosy.model.reading.coded_weights import WeightAccounts
from argosy.model.reading.common_config import VISION_KEYS, in_wrapper
from argosy.model.reading.config_reader import ConfigReader
from argosy.model.reading.experts_config import (
    layers_by_type,
    read_dense_layers,
    read_sigmoid_router,
    require_groups,
)
from argosy.model.reading.gguf_config import GgufConfigReader
from argosy.model.reading.gguf_layout import read_gguf_layout

__all__ = ["GGUF_ARCHITECTURE", "LAYOUTS", "MODEL_TYPE", "open_gguf", "parse_config"]

MODEL_TYPE = "kimi_k3"
GGUF_ARCHITECTURE = "kimi-k3"

_MOST_BLOCKS = 15  # native/ops/residual.cpp
_HEADS_TOGETHER = 128  # files pad the rates of decay to a multiple of it


def _take_rate(accounts: WeightAccounts, config: ModelConfig, layer: int, name: str) -> MatrixRef | None:
    """Take the rates of decay, which files pad with zeros behind those of the heads."""
    if name != "kda_rate":
        return None
    mixer = config.layers[layer].mixer
    assert isinstance(mixer, KimiDeltaConfig)
    heads = mixer.num_heads
    padded = -(-heads // _HEADS_TOGETHER) * _HEADS_TOGETHER
    ref, format = accounts.take(LAYOUTS[0].dense_name(f"layers.{layer}.kda_rate"), (heads,), (padded,))
    return MatrixRef.of(ref.rows(0, heads) if ref.shape == (padded,) else ref, format, 1, heads)


LAYOUTS = tuple(
    replace(
        layout,
        layer_names={
            **{name: where for name, where in layout.layer_names.items() if name != "kda_gate_down"},
            "kda_gate": "self_attn.g_proj.weight",
            "attn_gate": "self_attn.g_proj.weight",
            "latent_down": "block_sparse_moe.routed_expert_down_proj.weight",
            "latent_up": "block_sparse_moe.routed_expert_up_proj.weight",
            "latent_norm": "block_sparse_moe.routed_expert_norm.weight",
            "attn_mix_norm": "self_attention_res_norm.weight",
            "attn_mix_scale": "self_attention_res_proj.weight",
            "mlp_mix_norm": "mlp_res_norm.weight",
            "mlp_mix_scale": "mlp_res_proj.weight",
            "head_mix_norm": "output_attn_res_norm.weight",
            "head_mix_scale": "output_attn_res_proj.weight",
        },
        prefix="language_model.model.",
        head_name="language_model.lm_head.weight",
        passed_over=r"(vision_tower|mm_projector)\..*",
        take_own=_take_rate,
    )
    for layout in kimi_linear.LAYOUTS
)

_DEFAULTS = replace(
    kimi_linear.DEFAULTS, hidden_size=7168, num_layers=93, num_heads=96, num_kv_heads=96, dense_width=33_792,
    expert_width=3072, num_experts=896, experts_per_token=16, num_shared_experts=2, query_rank=1536,
)  # fmt: skip
_OF_GGUF = {
    **GGUF_NAMES,
    "kda_decay_down": "ssm_f_a.weight",
    "kda_decay": "ssm_f_b.weight",
    "kda_gate": "ssm_g.weight",
    "latent_down": "ffn_routed_down.weight",
    "latent_up": "ffn_routed_up.weight",
    "latent_norm": "ffn_routed_norm.weight",
    "attn_mix_scale": "attn_res_score.weight",
    "mlp_mix_scale": "ffn_res_score.weight",
    "head_mix_scale": "output_res_score.weight",
}


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read the text part of a `config.json`; an absent key gets the value of the released model, if it has a default.

    Raises:
        UnsupportedModel: a key or value asks for something that is not supported.
        CheckpointError: a key is missing, malformed, or contradicts another.
    """
    wrapper = ConfigReader(raw, MODEL_TYPE)
    wrapper.nested("text_config", "kimi_linear").one_of("hidden_act", "situ", ("situ",))
    # The files' head_dim, the hidden size over the heads, is no layer's.
    left_out = ("hidden_act", "head_dim", "model_type")
    inner = {k: v for k, v in (wrapper.mapping("text_config") or {}).items() if k not in left_out}
    text = ConfigReader(inner, MODEL_TYPE, within="text_config", aliases=kimi_linear.ALIASES)
    config = _read_text(text)
    text.finish()
    config = in_wrapper(config, wrapper)
    wrapper.passed(*VISION_KEYS, "media_placeholder_token_id", "image_placeholder", "ignore_index")
    wrapper.finish()
    return config


def _read_text(text: ConfigReader) -> ModelConfig:
    config = read_latent_model(
        text,
        family=MODEL_TYPE,
        defaults=_DEFAULTS,
        read_router=read_sigmoid_router(scale=1.0, num_groups=1, kept_groups=1),
        read_moe_layers=layers_by_type(_DEFAULTS.first_dense_layers),
    )
    text.neutral("mla_use_nope", True)
    text.neutral("use_grouped_topk", True)
    has_gates = text.flag("mla_use_output_gate", False)
    latent = text.optional_integer("routed_expert_hidden_size") or 0
    has_latent_norm = text.flag("latent_moe_use_norm", False)
    for name in ("activation_situ_beta", "activation_situ_linear_beta"):
        if not text.has(name):
            raise CheckpointError(f"{text.where} has no {name}, which hidden_act situ needs", key=name)
    delta, is_delta = kimi_linear.read_delta(text, config.num_layers, is_k3=True)
    block = text.optional_integer("attn_res_block_size")
    config = replace(
        config.with_mixers(
            LatentConfig, rope=None, scale=0.0, output_gate="elements" if has_gates else "none"
        ),
        activation=ActivationConfig(
            kind="situ",
            limit=text.number("activation_situ_linear_beta", 25.0),
            alpha=text.number("activation_situ_beta", 4.0),
        ),
        expert_latent=latent,
        has_latent_norm=latent > 0 and has_latent_norm,
        residual=None
        if block is None
        else BankResidual(block=block, num_blocks=-(-config.num_layers // block)),
    )
    if block is not None and config.num_layers > block * _MOST_BLOCKS:
        raise text.unsupported("attn_res_block_size", f"at most {_MOST_BLOCKS} blocks of layers")
    return with_delta_layers(config, delta, is_delta)


def open_gguf(file: GgufFile) -> ModelFiles:
    """The model in a GGUF file of architecture `kimi-k3`.

    Raises:
        UnsupportedModel: a key, value or tensor type that is not supported.
        CheckpointError: a key or tensor is missing, malformed, or contradicts another.
    """
    reader = GgufConfigReader(file, GGUF_ARCHITECTURE)
    sizes = reader.sizes()
    num_layers = reader.num_layers()
    kv_heads, has_latent = reader.attention_layers()
    if kv_heads != 1:
        raise reader.unsupported(
            "attention.head_count_kv", kv_heads, "1 in layers with keys, which all heads share"
        )
    num_heads, dim = reader.integer("attention.head_count"), reader.integer("kda.head_dim")
    delta = KimiDeltaConfig(
        num_heads=num_heads,
        head_dim=dim,
        conv_width=reader.integer("ssm.conv_kernel", most=64),
        decay_rank=dim,
        floor=read_floor(reader) if reader.has("kda.gate_lower_bound") else 0.0,
        is_rate_log=False,
    )
    latent_layers = [layer for layer, is_latent in enumerate(has_latent) if is_latent]
    has_gates = any(f"blk.{layer}.attn_gate.weight" in file.tensors for layer in latent_layers)
    latent = replace(
        read_latent(reader, num_heads, sizes["context_tokens"], is_everywhere=False),
        rope=None,
        scale=0.0,
        output_gate="elements" if has_gates else "none",
    )
    num_dense = read_dense_layers(reader, num_layers)
    expert_width = reader.integer("expert_feed_forward_length")
    expert_latent = reader.integer("expert_latent_length", 0, least=0)
    block = reader.integer("attn_res.block_size", 0, least=0)
    if num_layers > block * _MOST_BLOCKS > 0:
        raise reader.unsupported("attn_res.block_size", block, f"at most {_MOST_BLOCKS} blocks of layers")
    config = ModelConfig(
        family=MODEL_TYPE,
        layers=tuple(
            LayerConfig(mixer=latent if is_latent else delta, is_moe=layer >= num_dense)
            for layer, is_latent in enumerate(has_latent)
        ),
        expert_width=expert_width,
        router=require_groups(
            read_router(reader, is_kimi=True), sizes["num_experts"], sizes["experts_per_token"]
        ),
        activation=ActivationConfig(
            kind="situ",
            limit=reader.number("activation.situ_linear_beta"),
            alpha=reader.number("activation.situ_beta"),
        ),
        dense_width=reader.integer("feed_forward_length"),
        shared_width=reader.integer("expert_shared_count", 0, least=0) * expert_width,
        expert_latent=expert_latent,
        has_latent_norm=expert_latent > 0 and f"blk.{num_dense}.ffn_routed_norm.weight" in file.tensors,
        residual=(
            BankResidual(block=block, num_blocks=-(-num_layers // block), has_norms=False) if block else None
        ),
        **sizes,
    )
    reader.finish()
    return read_gguf_layout(file, config, is_paired=False, has_rope_freqs=False, names=_OF_GGUF)
