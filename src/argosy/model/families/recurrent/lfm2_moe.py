"""LFM2-MoE: gated short convolutions, attention in every third or fourth layer, and dense networks in the first layers.

Experts are chosen by sigmoid score plus a learnt bias and weighted by the score alone. In GGUF, layers with a
convolution have 0 KV heads, and the sum of a token's routing weights is at least 6.1e-5 instead of 1e-6 more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.gguf import GgufFile
from argosy.config import AttentionConfig, LayerConfig, ModelConfig, RouterConfig, ShortConvConfig
from argosy.errors import CheckpointError
from argosy.model.reading.common_config import CommonDefaults, read_common
from argosy.model.reading.config_reader import MOST_LAYERS, ConfigReader
from argosy.model.reading.experts_config import read_dense_layers
from argosy.model.reading.gguf_config import SIGMOID, GgufConfigReader
from argosy.model.reading.gguf_layout import read_gguf_layout
from argosy.model.reading.layout import ATTENTION_NAMES, Layout

MODEL_TYPE = "lfm2_moe"
GGUF_ARCHITECTURE = "lfm2moe"

_HUB = Layout(
    layer_names={
        **ATTENTION_NAMES,
        "attn_norm": "operator_norm.weight",
        "mlp_norm": "ffn_norm.weight",
        "o": "self_attn.out_proj.weight",
        "q_norm": "self_attn.q_layernorm.weight",
        "k_norm": "self_attn.k_layernorm.weight",
        "shortconv_in": "conv.in_proj.weight",
        "shortconv_in_bias": "conv.in_proj.bias",
        "shortconv_conv": "conv.conv.weight",
        "shortconv_conv_bias": "conv.conv.bias",
        "shortconv_out": "conv.out_proj.weight",
        "shortconv_out_bias": "conv.out_proj.bias",
        "router": "feed_forward.gate.weight",
        "choice_bias": "feed_forward.expert_bias",
        **{name: f"feed_forward.w{i}.weight" for name, i in (("gate", 1), ("up", 3), ("down", 2))},
    },
    expert_names=tuple(f"feed_forward.experts.{{expert}}.w{i}.weight" for i in (1, 3, 2)),
    final_norm_name="embedding_norm.weight",
)
_FUSED = ("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj")
LAYOUTS = (_HUB, replace(_HUB, expert_names=None, fused_names=_FUSED))

_DEFAULTS = CommonDefaults(
    vocab_size=65_536, hidden_size=2048, num_heads=32, num_kv_heads=8, rope_theta=1_000_000.0, norm_eps=1e-5,
    context_tokens=128_000, num_experts=32, experts_per_token=4, eos_id=2, bos_id=1, norm_eps_name="norm_eps",
    is_embedding_tied=True,
)  # fmt: skip
_ROUTER = RouterConfig(score="sigmoid", has_choice_bias=True, renormalize=True, renormalize_eps=1e-6)


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read a `config.json`; an absent key gets the default of `Lfm2MoeConfig` in transformers 5.24.

    Raises:
        UnsupportedModel: a key or value asks for something that is not supported.
        CheckpointError: a key is missing, malformed, or contradicts another.
    """
    reader = ConfigReader(raw, MODEL_TYPE)
    common = read_common(reader, _DEFAULTS)
    num_layers = reader.integer("num_hidden_layers", default=32, most=MOST_LAYERS)
    kinds = reader.layer_types(num_layers, ("conv", "full_attention"))
    if kinds is None:
        raise CheckpointError("config.json lacks layer_types, the kind of each layer", key="layer_types")
    width = reader.integer("conv_L_cache", default=3, most=64)
    conv = ShortConvConfig(
        channels=common.model["hidden_size"], conv_width=width, has_bias=reader.flag("conv_bias", False)
    )
    # Liquid's own name of the key goes before the other, as in transformers.
    is_tied = reader.flag("tie_embedding", common.model.pop("is_embedding_tied"))
    router = replace(_ROUTER, has_choice_bias=reader.flag("use_expert_bias", True))
    if not reader.flag("norm_topk_prob", True):
        router = replace(router, renormalize=False, renormalize_eps=0.0)
    attention = AttentionConfig(**common.attention, qk_norm="head")
    num_dense = reader.integer("num_dense_layers", default=2, least=0, most=num_layers - 1)
    config = ModelConfig(
        family=MODEL_TYPE,
        layers=_layers((attention if kind == "full_attention" else conv for kind in kinds), num_dense),
        expert_width=reader.integer("moe_intermediate_size", default=1792),
        dense_width=reader.integer("intermediate_size", default=7168),
        router=replace(router, scale=reader.number("routed_scaling_factor", 1.0)),
        is_embedding_tied=is_tied,
        **common.model,
    )
    reader.finish()
    return config


def open_gguf(file: GgufFile) -> ModelFiles:
    """The model in a GGUF file of architecture `lfm2moe`; the errors are those of `GgufConfigReader`."""
    reader = GgufConfigReader(file, GGUF_ARCHITECTURE)
    num_kv_heads, has_attention = reader.attention_layers()
    common = reader.common(num_kv_heads=num_kv_heads)
    attention = AttentionConfig(**common.attention, qk_norm="head")
    width = reader.integer("shortconv.l_cache", most=64)
    conv = ShortConvConfig(channels=common.model["hidden_size"], conv_width=width)
    reader.neutral("expert_gating_func", SIGMOID)
    num_dense = read_dense_layers(reader, reader.num_layers())
    config = ModelConfig(
        family=MODEL_TYPE,
        layers=_layers((attention if attends else conv for attends in has_attention), num_dense),
        expert_width=reader.integer("expert_feed_forward_length"),
        dense_width=reader.integer("feed_forward_length"),
        router=_ROUTER,
        **common.model,
    )
    reader.finish()
    names = {"final_norm": "token_embd_norm.weight"}
    return read_gguf_layout(file, config, is_paired=False, has_rope_freqs=False, names=names)


def _layers(mixers: Iterable[AttentionConfig | ShortConvConfig], num_dense: int) -> tuple[LayerConfig, ...]:
    return tuple(LayerConfig(mixer=mixer, is_moe=i >= num_dense) for i, mixer in enumerate(mixers))
