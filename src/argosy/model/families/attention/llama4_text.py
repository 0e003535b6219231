"""Llama-4: layers that rotate see their chunk of 8192 positions, every fourth layer sees all and does not rotate.

Queries without rotary are multiplied by a factor that grows with the position. In Scout, q and k are normed without a
weight after rotary. A token has one expert, whose input is multiplied by the sigmoid of its logit, and a shared expert;
in Maverick every second layer is dense, in Llama-Guard-4 all are. The hub stores the experts of a layer transposed,
[experts, hidden, 2 * width] with gate before up: `argosy pack` reads them, and the pack runs. In files of
llm-compressor, such as Maverick's in FP8, each expert has its own tensors, which run in place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from argosy.config import AttentionConfig, LayerConfig, ModelConfig, QueryScale
from argosy.errors import CheckpointError
from argosy.model.families.attention.llama4_gguf import GGUF_ARCHITECTURE, ROUTER, open_gguf, variant
from argosy.model.reading.common_config import CommonDefaults, read_common
from argosy.model.reading.config_reader import MOST_LAYERS, ConfigReader
from argosy.model.reading.layout import ATTENTION_NAMES, Layout

__all__ = ["GGUF_ARCHITECTURE", "LAYOUTS", "MODEL_TYPE", "open_gguf", "parse_config"]

MODEL_TYPE = "llama4_text"

_PARTS = ("gate", "up", "down")
_TRANSPOSED = Layout(
    layer_names={
        **ATTENTION_NAMES,
        "router": "feed_forward.router.weight",
        **{part: f"feed_forward.{part}_proj.weight" for part in _PARTS},
        **{f"shared_{part}": f"feed_forward.shared_expert.{part}_proj.weight" for part in _PARTS},
    },
    transposed_names=("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"),
)
_EXPERT_NAMES = tuple(f"feed_forward.experts.{{expert}}.{part}_proj.weight" for part in _PARTS)
LAYOUTS = (_TRANSPOSED, replace(_TRANSPOSED, transposed_names=None, expert_names=_EXPERT_NAMES))

_FULL, _CHUNKED = "full_attention", "chunked_attention"
_DEFAULTS = CommonDefaults(
    vocab_size=202_048, hidden_size=5120, num_heads=40, num_kv_heads=8, head_dim=128, rope_theta=500_000.0,
    norm_eps=1e-5, context_tokens=131_072, num_experts=16, experts_per_token=1, eos_id=2, bos_id=1,
)  # fmt: skip


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read a `config.json`; an absent key gets the default of `Llama4TextConfig` in transformers 5.24.

    Raises:
        UnsupportedModel: a key or value asks for something that is not supported.
        CheckpointError: a key is missing, malformed, or contradicts another.
    """
    reader = ConfigReader(raw, MODEL_TYPE)
    config = read_text(reader, MODEL_TYPE)
    reader.finish()
    return config


def read_text(reader: ConfigReader, family: str) -> ModelConfig:
    """Read the text model; the caller calls `finish()`."""
    num_layers = reader.integer("num_hidden_layers", default=48, most=MOST_LAYERS)
    moe = _read_moe(reader, num_layers)
    if not any(moe):
        reader.passed("num_local_experts", "num_experts_per_tok")  # 0 in released files
    common = read_common(reader, _DEFAULTS if any(moe) else replace(_DEFAULTS, num_experts=0))
    if any(moe) and common.model["experts_per_token"] != 1:
        raise reader.unsupported("num_experts_per_tok", "1, the expert whose input is weighted")
    reader.passed("cache_implementation", "for_llm_compressor")  # how transformers runs it
    width = reader.integer("intermediate_size", default=8192)
    mixers = _read_attentions(reader, common.attention, num_layers)
    return ModelConfig(
        family=family,
        layers=tuple(LayerConfig(mixer=m, is_moe=is_moe) for m, is_moe in zip(mixers, moe, strict=True)),
        expert_width=width if any(moe) else 0,
        shared_width=width if any(moe) else 0,
        dense_width=reader.integer("intermediate_size_mlp", default=16_384),
        router=ROUTER,
        **common.model,
    )


def _read_attentions(
    reader: ConfigReader, heads: Mapping[str, Any], num_layers: int
) -> Iterator[AttentionConfig]:
    has_bias, has_norm = reader.flag("attention_bias", False), reader.flag("use_qk_norm", True)
    beta, period = reader.number("attn_scale", 0.1), reader.integer("floor_scale", default=8192)
    # transformers 4.51 wrote 4 for true.
    is_scaled = reader.flag("attn_temperature_tuning", True, also_true=4)
    chunk = reader.optional_integer("attention_chunk_size", 8192) or 0
    interval = reader.integer("no_rope_layer_interval", default=4)
    rotates = reader.integers("no_rope_layers", least=0, most=1)  # 1 says that the layer does rotate
    rotates = rotates or tuple(int(number % interval > 0) for number in range(1, num_layers + 1))
    kinds = reader.layer_types(num_layers, (_FULL, _CHUNKED))
    kinds = kinds or tuple(_CHUNKED if turns and chunk else _FULL for turns in rotates)
    if len(rotates) != num_layers or (_CHUNKED in kinds and not chunk):
        raise CheckpointError(
            f"config.json: no_rope_layers has {len(rotates)} entries and attention_chunk_size is {chunk or 'null'}, "
            f"expected an entry for each of {num_layers} layers, and a size if layer_types names {_CHUNKED}",
            key="no_rope_layers",
        )
    full = AttentionConfig(**heads, has_qkv_bias=has_bias, has_o_bias=has_bias)
    scale = QueryScale(beta=beta, period=period, offset=1) if is_scaled else None
    for turns, kind in zip(rotates, kinds, strict=True):
        yield variant(
            full, rotates=turns == 1, chunk=chunk if kind == _CHUNKED else 0, has_norm=has_norm, scale=scale
        )


def _read_moe(reader: ConfigReader, num_layers: int) -> Sequence[bool]:
    """Read which layers have experts: those in `moe_layers`, where an empty list is none, or every so many."""
    step = reader.integer("interleave_moe_layer_step", default=1, least=0)
    listed = reader.integers("moe_layers", least=0, most=num_layers - 1)
    if reader.is_list("moe_layers"):
        return [layer in listed for layer in range(num_layers)]
    if not 1 <= step <= num_layers:
        raise reader.unsupported(
            "interleave_moe_layer_step", f"1 to {num_layers}, so that a layer has experts"
        )
    return [number % step == 0 for number in range(1, num_layers + 1)]
