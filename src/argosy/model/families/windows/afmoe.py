"""Trinity Nano, Mini and Large (Arcee): a rotary embedding only in layers with a window, and gated attention.

Norms come before and after every block, and a router as DeepSeek-V3's chooses among all experts. The config of the
first releases repeats settings of the router that the model does not have; these must say so.

GGUF files do not say whether embeddings are scaled (`mup_enabled`); llama.cpp always scales them, as every release is.
It rotates three of four layers, whichever have a window; here it is those, as in transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.gguf import GgufFile
from argosy.config import AttentionConfig, ModelConfig, RouterConfig
from argosy.model.families.attention.sigmoid_moe import open_sigmoid_gguf, read_sigmoid_model
from argosy.model.families.latent import deepseek
from argosy.model.families.windows.windowed import (
    kinds_by_turns,
    read_gguf_kinds,
    read_window,
    with_rotating_windows,
)
from argosy.model.reading.common_config import MoeDefaults
from argosy.model.reading.config_reader import ConfigReader
from argosy.model.reading.experts_config import RENORMALIZE_EPS
from argosy.model.reading.gguf_config import GgufConfigReader

MODEL_TYPE = "afmoe"
GGUF_ARCHITECTURE = "afmoe"

LAYOUTS = tuple(
    replace(
        layout,
        layer_names={
            **layout.layer_names,
            "attn_gate": "self_attn.gate_proj.weight",
            "attn_post_norm": "post_attention_layernorm.weight",
            "mlp_norm": "pre_mlp_layernorm.weight",
            "mlp_post_norm": "post_mlp_layernorm.weight",
            "router": "mlp.router.gate.weight",
            "choice_bias": "mlp.expert_bias",
        },
    )
    for layout in deepseek.LAYOUTS
)

_DEFAULTS = MoeDefaults(
    vocab_size=200_192,
    hidden_size=2048,
    num_layers=32,
    num_heads=16,
    num_kv_heads=None,
    head_dim=128,
    rope_theta=10_000.0,
    norm_eps=1e-5,
    context_tokens=16_384,
    dense_width=6144,
    expert_width=1408,
    num_experts=64,
    experts_per_token=6,
    num_shared_experts=2,
)
_ROUTER = RouterConfig(score="sigmoid", has_choice_bias=True, renormalize_eps=RENORMALIZE_EPS)


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read a `config.json`; an absent key gets the default of `AfmoeConfig` in transformers 5.24.

    Raises:
        UnsupportedModel: a key or value asks for something that is not supported.
        CheckpointError: a key is missing, malformed, or contradicts another.
    """
    reader = ConfigReader(raw, MODEL_TYPE)
    has_bias = reader.flag("attention_bias", False)
    for key in ("n_group", "topk_group", "num_expert_groups", "num_limited_groups"):
        reader.neutral(key, 1, None)
    reader.neutral("route_norm", True)
    reader.neutral("score_func", "sigmoid")
    reader.passed("use_grouped_mm", "load_balance_coeff")  # how experts are run, and training
    config = read_sigmoid_model(
        reader,
        MODEL_TYPE,
        _DEFAULTS,
        read_router=lambda reader, *_: replace(_ROUTER, scale=reader.number("route_scale", 1.0)),
        read_moe_layers=_read_moe_layers,
        has_qkv_bias=has_bias,
        has_o_bias=has_bias,
        qk_norm="head",
    )
    every = reader.integer("global_attn_every_n_layers", default=4)
    kinds = reader.layer_types(config.num_layers) or kinds_by_turns(config.num_layers, every)
    scale = config.hidden_size**0.5 if reader.flag("mup_enabled", False) else 1.0
    config = _complete(config, kinds, read_window(reader, kinds, 1024), scale)
    reader.finish()
    return config


def open_gguf(file: GgufFile) -> ModelFiles:
    """Open a GGUF file of architecture `afmoe`. Raises what `open_sigmoid_gguf` raises."""

    def complete(reader: GgufConfigReader, config: ModelConfig) -> ModelConfig:
        reader.neutral("expert_weights_norm", True)
        config = replace(config, router=replace(_ROUTER, scale=config.router.scale))
        window = reader.integer("attention.sliding_window")
        return _complete(config, read_gguf_kinds(reader), window, config.hidden_size**0.5)

    return open_sigmoid_gguf(file, GGUF_ARCHITECTURE, MODEL_TYPE, complete=complete)


def _read_moe_layers(reader: ConfigReader, num_layers: int) -> Sequence[bool]:
    num_dense = reader.integer("num_dense_layers", default=1, least=0, most=num_layers - 1)
    return [layer >= num_dense for layer in range(num_layers)]


def _complete(config: ModelConfig, kinds: Sequence[str], window: int, scale: float) -> ModelConfig:
    config = with_rotating_windows(config, kinds, window).with_mixers(AttentionConfig, output_gate="elements")
    return replace(config, has_post_norms=True, embedding_scale=scale)
