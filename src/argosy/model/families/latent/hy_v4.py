"""Hy4 (770B-A49B, Tencent): DeepSeek-V3.2 on four residual streams, with sinks, and gates of attention's output.

Streams are read and written with weights, and not mixed. The indexer's last dimensions rotate, and layers may share a
choice. Limits before silu are those of routed experts alone. Pairs of rotary dimensions are interleaved, as in vLLM and
llama.cpp; transformers 5.24 rotates halves, which the released weights do not fit. Norms of compressed vectors have
DeepSeek's epsilon, as in transformers; llama.cpp takes `rms_norm_eps`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.gguf import GgufFile
from argosy.config import IndexConfig, LatentConfig, ModelConfig, SinkhornResidual
from argosy.model.families.latent.deepseek import LAYER_NAMES, Defaults, read_latent_model
from argosy.model.families.latent.deepseek_gguf import read_indexed
from argosy.model.families.latent.deepseek_v32 import read_indexer
from argosy.model.families.latent.glm_moe_dsa import read_index_kinds
from argosy.model.reading.config_reader import ConfigReader
from argosy.model.reading.experts_config import layers_by_type, read_sigmoid_router, with_limits
from argosy.model.reading.gguf_config import GgufConfigReader
from argosy.model.reading.gguf_layout import read_gguf_layout
from argosy.model.reading.layout import separate_and_fused

__all__ = ["GGUF_ARCHITECTURE", "LAYOUTS", "MODEL_TYPE", "open_gguf", "parse_config"]

MODEL_TYPE = "hy_v4"
GGUF_ARCHITECTURE = "hy_v4"

_MIX = {"": "fn", "_bias": "base", "_scale": "scale"}
LAYOUTS = tuple(
    replace(layout, model_names={f"head_mix{ours}": f"model.hc_head.hc_head_{name}" for ours, name in _MIX.items()})
    for layout in separate_and_fused(
        {
            **LAYER_NAMES,
            "attn_gate": "self_attn.linear_gate.weight",
            "sinks": "self_attn.learnable_sink_param",
            **{f"attn_mix{ours}": f"hc_attn_layer.hc_pre.hc_{name}" for ours, name in _MIX.items()},
            **{f"mlp_mix{ours}": f"hc_mlp_layer.hc_pre.hc_{name}" for ours, name in _MIX.items()},
        },
        passed_over=r"model\.mtp_layers\..+",
    )
)  # fmt: skip
_GGUF_NAMES = {
    **{f"attn_mix{ours}": f"hc_attn_{name}.weight" for ours, name in _MIX.items()},
    **{f"mlp_mix{ours}": f"hc_ffn_{name}.weight" for ours, name in _MIX.items()},
    **{f"head_mix{ours}": f"output_hc_{name}.weight" for ours, name in _MIX.items()},
}

_DEFAULTS = Defaults(
    vocab_size=120_832, hidden_size=2816, num_layers=34, num_heads=32, num_kv_heads=32, dense_width=6912,
    norm_eps=1e-5, expert_width=768, num_experts=256, experts_per_token=8, num_shared_experts=1, first_dense_layers=1,
    nope_dim=192, value_dim=256, query_rank=1536, context_tokens=262_144, eos_id=120_025, bos_id=120_000,
)  # fmt: skip


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read a `config.json`; an absent key gets the default of `HYV4Config` in transformers 5.24.

    Raises:
        UnsupportedModel: a key or value asks for something that is not supported.
        CheckpointError: a key is missing, malformed, or contradicts another.
    """
    # Released files have 8 KV heads, which mean nothing in latent attention.
    reader = ConfigReader(
        {key: value for key, value in raw.items() if key != "num_key_value_heads"}, MODEL_TYPE
    )
    for key in ("enable_ihc", "gated_mla", "learnable_sink", "use_dsa", "use_mla"):
        reader.neutral(key, True)
    reader.neutral("gating_type", "elementwise")
    reader.passed("bitwise_backward_align", "enable_lm_head_fp32", "learnable_sink_init", "mtp_loss_factor")
    num_heads = reader.integer("num_attention_heads", default=_DEFAULTS.num_heads)
    config = read_latent_model(
        reader,
        family=MODEL_TYPE,
        defaults=replace(_DEFAULTS, num_kv_heads=num_heads),
        read_router=read_sigmoid_router(scale=2.827, num_groups=1, kept_groups=1),
        read_moe_layers=layers_by_type(_DEFAULTS.first_dense_layers),
        read_indexers=_read_indexers,
    )
    streams = SinkhornResidual(
        num_streams=reader.integer("hc_mult", default=4, least=2, most=16),
        iterations=0,
        eps=reader.number("hc_eps", 1e-6),
        magnitude=reader.number("hc_magnitude", 2.0),
    )
    limit = reader.number("swiglu_limit", 10.0)
    reader.finish()
    return _with_parts(config, streams, [limit] * config.num_layers)


def _read_indexers(reader: ConfigReader, num_layers: int) -> tuple[IndexConfig, ...]:
    rope_dim = reader.integer("qk_rope_head_dim", default=_DEFAULTS.rope_dim)
    index = read_indexer(reader, num_layers, num_heads=16, is_interleaved=True)
    own = _rotated_last(index, rope_dim, reader.number("rms_norm_eps", _DEFAULTS.norm_eps))
    shared = replace(own, kind="shared")
    kinds = read_index_kinds(reader, num_layers, spacing=4)
    return tuple(own if kind == "full" else shared for kind in kinds)


def _rotated_last(index: IndexConfig, rope_dim: int, norm_eps: float) -> IndexConfig:
    return replace(index, rope_begin=index.head_dim - rope_dim, norm_eps=norm_eps)


def _with_parts(config: ModelConfig, streams: SinkhornResidual, limits: Sequence[float]) -> ModelConfig:
    """Return the model of latent attention with what Hy4 adds; `limits` of routed experts, 0 for none."""
    config = config.with_mixers(LatentConfig, has_sinks=True, output_gate="elements")
    config = with_limits(config, limits, [0.0] * config.num_layers, kind="silu_limited")
    return replace(config, residual=streams, draft_form=None)


def open_gguf(file: GgufFile) -> ModelFiles:
    """The model in a GGUF file of architecture `hy_v4`.

    Raises:
        UnsupportedModel: a key, value or tensor type that is not supported.
        CheckpointError: a key or tensor is missing, malformed, or contradicts another.
    """
    reader = GgufConfigReader(file, GGUF_ARCHITECTURE)
    config = read_indexed(
        reader,
        MODEL_TYPE,
        is_interleaved=True,
        adapt=lambda reader, index: _rotated_last(
            index, reader.integer("rope.dimension_count"), reader.number("attention.layer_norm_rms_epsilon")
        ),
    )
    streams = SinkhornResidual(
        num_streams=reader.integer("hyper_connection.count", least=2, most=16),
        iterations=0,
        eps=reader.number("hyper_connection.epsilon"),
        magnitude=reader.number("hyper_connection.magnitude"),
    )
    limits = reader.limits("swiglu_clamp_exp")
    reader.finish()
    config = _with_parts(config, streams, limits)
    return read_gguf_layout(file, config, is_paired=False, has_rope_freqs=False, names=_GGUF_NAMES)
