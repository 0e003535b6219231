"""Qwen3.8-Flash-Next (`qwen4_exp`), text: Qwen3.5-MoE's layers over gated residual streams, and an n-gram table.

Every mixer and every network reads four streams through a gated product of low rank, in place of norms, and the head
does. The output of delta nets is gated by a sigmoid. A layer of `ple_layer_ids` (1-based) first adds rows of a table of
hashed bigrams and trigrams, which stays on the drive: its checkpoint divides it into `split_ngram_parts` tensors.

Layers with attention have an indexer (QSA): a token sees `indexer_budget` positions in whole blocks of
`indexer_compress_ratio`, and its unfinished block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.gguf import GgufFile
from argosy.config import (
    AttentionConfig,
    BlockIndexConfig,
    DeltaConfig,
    GatedResidual,
    LayerConfig,
    ModelConfig,
    NgramConfig,
    RouterConfig,
)
from argosy.errors import CheckpointError
from argosy.model.families.attention.qwen_moe import make_layouts
from argosy.model.families.recurrent.qwen3_5_moe_text import AXES
from argosy.model.families.recurrent.qwen4_exp_gguf import open_qwen4_gguf
from argosy.model.families.recurrent.qwen4_exp_index import make_index
from argosy.model.families.recurrent.qwen_delta import (
    DELTA_NAMES,
    MTP_TENSORS,
    read_delta,
)
from argosy.model.ngrams import primes_from, splitmix_multipliers
from argosy.model.reading.common_config import Common, CommonDefaults, read_common
from argosy.model.reading.config_reader import MOST_LAYERS, ConfigReader
from argosy.model.reading.layout import Layout

__all__ = [
    "GGUF_ARCHITECTURE",
    "LAYOUTS",
    "MODEL_TYPE",
    "TEXT_LAYOUTS",
    "open_gguf",
    "parse_config",
    "read_text",
]

MODEL_TYPE = "qwen4_exp_text"
GGUF_ARCHITECTURE = "qwen4exp"

_DELTA, _INDEXED, _FULL = "linear_attention", "indexed_attention", "full_attention"
_MIX = {
    "norm": "hc_norm.weight",
    "down": "input_mix_weight_down.weight",
    "up": "input_mix_weight_up.weight",
    "inject": "block_inject_weight.weight",
}
_TABLE = "ple.ple_embedding.ngram_embedding"


def _layouts() -> tuple[Layout, ...]:
    names = {
        **DELTA_NAMES,
        "delta_qkv": "linear_attn.in_proj_qkv.weight",
        "delta_z": "linear_attn.in_proj_z.weight",
        "delta_b": "linear_attn.in_proj_b.weight",
        "delta_a": "linear_attn.in_proj_a.weight",
        "index_q": "self_attn.indexer.index_qk_proj.weight",
        "index_k": "self_attn.indexer.index_qk_proj.weight",
        "index_q_norm": "self_attn.indexer.q_layernorm.weight",
        "index_k_norm": "self_attn.indexer.k_layernorm.weight",
        "ngram_key": "ple.key_proj.weight",
        "ngram_value": "ple.value_proj.weight",
        "ngram_key_norm": "ple.norm_key.weight",
        "ngram_query_norm": "ple.norm_query.weight",
        "ngram_conv_norm": "ple.norm_conv.weight",
        "ngram_conv": "ple.conv1d.weight",
        **{f"attn_mix_{part}": f"attn_hyper_connection.{name}" for part, name in _MIX.items()},
        **{f"mlp_mix_{part}": f"mlp_hyper_connection.{name}" for part, name in _MIX.items()},
        **{f"head_mix_{part}": f"hyper_connection_mixer.{name}" for part, name in _MIX.items()},
    }
    passed_over = rf"{MTP_TENSORS}|model\.visual\..*"
    return tuple(
        replace(
            layout,
            joined=("index_q", "index_k"),
            table_names=(f"{_TABLE}.weight", f"{_TABLE}.shard_{{}}.weight"),
            table_constants=(
                "ple.ple_embedding.layer_multipliers",
                "ple.ple_embedding.ngram_heads_vocab_sizes",
                "ple.ple_embedding.ngram_heads_offsets",
            ),
        )
        for layout in make_layouts(names, passed_over=passed_over)
    )


TEXT_LAYOUTS = _layouts()
# A text model taken out of the vision-language model may keep its prefix.
LAYOUTS = (*TEXT_LAYOUTS, *(replace(layout, prefix="model.language_model.") for layout in TEXT_LAYOUTS))


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read a `config.json`; an absent key gets the default of `Qwen4ExpTextConfig` in transformers 5.24.

    Raises:
        UnsupportedModel: a key or value asks for something that is not supported.
        CheckpointError: a key is missing, malformed, or contradicts another.
    """
    reader = ConfigReader(raw, MODEL_TYPE)
    config = read_text(reader, MODEL_TYPE)
    reader.finish()
    return config


def open_gguf(file: GgufFile) -> ModelFiles:
    """The model in a GGUF file of architecture `qwen4exp`.

    Raises:
        UnsupportedModel: a key, value or tensor type that is not supported.
        CheckpointError: a key or tensor is missing, malformed, or contradicts another.
    """
    return open_qwen4_gguf(file, GGUF_ARCHITECTURE, MODEL_TYPE, AXES)


def read_text(reader: ConfigReader, family: str) -> ModelConfig:
    """Read the text model from a config, or from the text part of one."""
    common = read_common(
        reader,
        CommonDefaults(
            vocab_size=248_320,
            hidden_size=2048,
            num_heads=16,
            num_kv_heads=2,
            head_dim=256,
            rope_theta=10_000.0,
            partial_rotary_factor=1.0,
            axes=AXES,
            norm_eps=1e-6,
            context_tokens=32_768,
            num_experts=512,
            experts_per_token=10,
        ),
    )
    num_layers = reader.integer("num_hidden_layers", default=40, most=MOST_LAYERS)
    reader.neutral("attn_output_gate", True)
    reader.neutral("mamba_ssm_dtype", "float32")
    reader.passed("intermediate_size", "mtp", "mtp_num_hidden_layers", "mtp_use_dedicated_embeddings")
    return ModelConfig(
        family=family,
        layers=_read_layers(reader, common, num_layers),
        router=RouterConfig(renormalize=reader.flag("norm_topk_prob", True)),
        residual=GatedResidual(
            num_streams=reader.integer("hc_count", default=4, least=2, most=16),
            rank=reader.integer("hc_lowrank", default=320),
        ),
        has_pre_norms=False,
        norm_offset=1.0,
        draft_form=None,
        expert_width=reader.integer("moe_intermediate_size", default=512),
        shared_width=reader.integer("shared_expert_intermediate_size", default=512),
        shared_is_gated=True,
        **common.model,
    )


def _read_layers(reader: ConfigReader, common: Common, num_layers: int) -> tuple[LayerConfig, ...]:
    has_bias = reader.flag("attention_bias", False)
    attention = AttentionConfig(
        **common.attention,
        has_qkv_bias=has_bias,
        has_o_bias=has_bias,
        qk_norm="head",
        output_gate="query",
        is_causal=True,
        index=_read_index(reader, common),
    )
    gate = reader.one_of("output_gate_type", "silu", ("silu", "sigmoid"))
    delta = replace(read_delta(reader), has_sigmoid_gate=gate == "sigmoid")
    kinds = reader.layer_types(num_layers, (_DELTA, _INDEXED, _FULL))
    interval = reader.integer("full_attention_interval", default=4)
    if kinds is None:
        kinds = tuple(_DELTA if (layer + 1) % interval else _INDEXED for layer in range(num_layers))
    tables = _read_tables(reader, common, kinds)
    mixers: tuple[AttentionConfig | DeltaConfig, ...] = tuple(
        delta if kind == _DELTA else attention for kind in kinds
    )
    return tuple(
        LayerConfig(mixer=mixer, is_moe=True, ngrams=tables.get(layer)) for layer, mixer in enumerate(mixers)
    )


def _read_index(reader: ConfigReader, common: Common) -> BlockIndexConfig | None:
    """Read the indexer of the layers with attention; None if the config has none of its sizes."""
    keys = ("indexer_n_heads", "indexer_head_dim", "indexer_budget", "indexer_compress_ratio")
    has_index = any(reader.optional_integer(key) is not None for key in keys)
    reader.neutral("indexer_kv_heads", 1, None)
    if not has_index:
        return None
    num_heads, head_dim, budget, ratio = (reader.integer(key, default=None) for key in keys)
    rope = common.attention["rope"]
    return make_index(
        num_heads=num_heads,
        head_dim=head_dim,
        budget=budget,
        ratio=ratio,
        rotary_dim=0 if rope is None else rope.rotary_dim,
    )


def _read_tables(reader: ConfigReader, common: Common, kinds: tuple[str, ...]) -> dict[int, NgramConfig]:
    """Return the n-gram tables by layer."""
    layers = sorted(set(reader.integers("ple_layer_ids", least=1, most=len(kinds))))
    size = reader.integer("ngram_size", default=3, least=2, most=16)
    num_heads = (size - 1) * reader.integer("heads_per_ngram", default=8, most=256)
    width = reader.integer("ple_embed_dim", default=common.model["hidden_size"])
    base = reader.integer("ngram_vocab_size_base", default=20_000_000, least=2, most=1 << 40)
    seed = reader.integer("seed", default=1234, least=0, most=(1 << 63) - 1)
    conv_width = reader.integer("ple_conv_kernel_size", default=4, most=64)
    # They follow from the tensors.
    reader.passed(
        "make_ngram_vocab_size_divisible_by",
        "split_ngram_parts",
        "number_of_conv_states",
        "ple_embedding_dtype",
    )
    vocab_size, eos_ids = common.model["vocab_size"], common.model["eos_ids"]
    for layer in layers:
        if kinds[layer - 1] != _DELTA:
            raise CheckpointError(
                f"config.json: ple_layer_ids has {layer}, and layer_types[{layer - 1}] is {kinds[layer - 1]}; "
                f"expected {_DELTA}",
                key="ple_layer_ids",
            )
    if layers and (width % num_heads or not eos_ids):
        raise CheckpointError(
            f"config.json: ple_embed_dim is {width}, expected a multiple of {num_heads}; eos_token_id is "
            f"{list(eos_ids)}, expected a token",
            key="ple_embed_dim" if width % num_heads else "eos_token_id",
        )
    primes = primes_from(base, 0, len(layers) * num_heads)
    return {
        layer - 1: NgramConfig(
            primes=primes[table * num_heads : (table + 1) * num_heads],
            multipliers=splitmix_multipliers(seed, table, vocab_size, size),
            row_dim=width // num_heads,
            blank_id=eos_ids[0],
            border_id=eos_ids[0],
            conv_width=conv_width,
            conv_dilation=size,
        )
        for table, layer in enumerate(layers)
    }
