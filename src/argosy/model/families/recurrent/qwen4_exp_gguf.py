"""The `qwen4exp` architecture of GGUF: Qwen3.8-Flash-Next.

Norms hold their whole weight, and value heads are in the order of `qwen35moe` (`qwen_delta_gguf.py`). The constants of
n-gram tables are stored, and the table is one tensor of the model.
"""

from __future__ import annotations

from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.gguf import GgufArray, GgufFile
from argosy.config import (
    AttentionConfig,
    BlockIndexConfig,
    GatedResidual,
    LayerConfig,
    ModelConfig,
    NgramConfig,
    RopeConfig,
    RouterConfig,
)
from argosy.errors import CheckpointError
from argosy.model.families.recurrent.qwen4_exp_index import make_index
from argosy.model.families.recurrent.qwen_delta_gguf import DELTA_NAMES, read_delta, recurrent_layers
from argosy.model.reading.gguf_config import GgufConfigReader
from argosy.model.reading.gguf_layout import read_gguf_layout
from argosy.model.reading.rope_config import Axes

_MIXES = {"attn_mix_": "hc_attn_", "mlp_mix_": "hc_ffn_", "head_mix_": "output_hc_"}
_NAMES = {
    **DELTA_NAMES,
    **{
        f"{canonical}{part}": f"{name}{part}.weight"
        for canonical, name in _MIXES.items()
        for part in ("norm", "down", "up", "inject")
    },
    "index_q": "indexer.q_proj.weight",
    "index_k": "indexer.k_proj.weight",
    "index_q_norm": "indexer.q_norm.weight",
    "index_k_norm": "indexer.k_norm.weight",
    "ngram_key": "ple_key.weight",
    "ngram_value": "ple_value.weight",
    "ngram_key_norm": "ple_norm_key.weight",
    "ngram_query_norm": "ple_norm_query.weight",
    "ngram_conv_norm": "ple_norm_conv.weight",
    "ngram_conv": "ple_conv1d.weight",
}
_TABLE = "per_layer_token_embd.weight"
_INDEXERS = r"blk\.\d+\.indexer\.[qk]_(proj|norm)\.weight"
_MOST_ROWS = 1 << 40  # of a head
_MOST_MULTIPLIER = (1 << 63) - 1


def open_qwen4_gguf(file: GgufFile, architecture: str, family: str, axes: Axes) -> ModelFiles:
    """The model in a GGUF file; `axes` as for `GgufConfigReader.common`.

    Raises:
        UnsupportedModel: a key, value or tensor type that is not supported.
        CheckpointError: a key or tensor is missing, malformed, or contradicts another.
    """
    reader = GgufConfigReader(file, architecture)
    common = reader.common(has_partial_rope=True, axes=axes)
    reader.integer("feed_forward_length", 0, least=0)  # of layers without experts; every layer has experts
    delta = read_delta(reader, has_sigmoid_gate=True)
    is_recurrent = recurrent_layers(reader)
    attention = AttentionConfig(
        **common.attention,
        qk_norm="head",
        output_gate="query",
        is_causal=True,
        index=_read_index(reader, is_recurrent, common.attention["rope"]),
    )
    tables = _read_tables(reader, is_recurrent)
    config = ModelConfig(
        family=family,
        layers=tuple(
            LayerConfig(mixer=delta if one else attention, is_moe=True, ngrams=tables.get(layer))
            for layer, one in enumerate(is_recurrent)
        ),
        expert_width=reader.integer("expert_feed_forward_length"),
        router=RouterConfig(renormalize=reader.flag("expert_weights_norm", True)),
        residual=GatedResidual(
            num_streams=reader.integer("hyper_connection.count", least=2, most=16),
            rank=reader.integer("hyper_connection.low_rank"),
        ),
        has_pre_norms=False,
        shared_width=reader.integer("expert_shared_feed_forward_length"),
        shared_is_gated=True,
        draft_form=None,
        num_mtp_layers=reader.num_mtp_layers(),
        **common.model,
    )
    reader.finish()
    return read_gguf_layout(
        file,
        config,
        is_paired=False,
        has_rope_freqs=False,
        names=_NAMES,
        table_name=_TABLE,
        passed_over=(_INDEXERS,) if attention.index is None else (),
    )


def _read_index(
    reader: GgufConfigReader, is_recurrent: tuple[bool, ...], rope: RopeConfig | None
) -> BlockIndexConfig | None:
    """Read the indexer; None: attention is dense, as in llama.cpp, because the block size is 0. The converter writes
    that if transformers renamed the layers ("indexed_attention").
    """
    ratios = reader.integers("attention.compress_ratios", len(is_recurrent), default=0, least=0)
    sizes = [reader.integer(f"attention.indexer.{name}") for name in ("head_count", "key_length", "top_k")]
    found = {ratio for ratio, one in zip(ratios, is_recurrent, strict=True) if not one}
    if len(found) > 1:
        raise reader.file.wrong(
            reader.key("attention.compress_ratios"), list(ratios), "the same in all layers with attention"
        )
    if not any(found):
        return None
    num_heads, head_dim, budget = sizes
    return make_index(
        num_heads=num_heads,
        head_dim=head_dim,
        budget=budget,
        ratio=found.pop(),
        rotary_dim=0 if rope is None else rope.rotary_dim,
    )


def _read_tables(reader: GgufConfigReader, is_recurrent: tuple[bool, ...]) -> dict[int, NgramConfig]:
    """Return the n-gram table by its layer; llama.cpp's files hold at most one."""
    if not reader.has("ple.layers"):
        return {}
    (layer,) = _numbers(reader, "ple.layers", 1, 0, len(is_recurrent) - 1)
    size = reader.integer("ple.ngram_size", least=2, most=16)
    num_heads = (size - 1) * reader.integer("ple.heads_per_ngram", most=256)
    primes = _numbers(reader, "ple.head_vocab_sizes", num_heads, 1, _MOST_ROWS)
    offsets = _numbers(reader, "ple.head_offsets", num_heads, 0, num_heads * _MOST_ROWS)
    if any(offset != sum(primes[:head]) for head, offset in enumerate(offsets)):
        raise reader.file.wrong(
            reader.key("ple.head_offsets"), list(offsets), "the sums of ple.head_vocab_sizes"
        )
    if not is_recurrent[layer]:
        raise CheckpointError(
            f"{reader.file.path.name}: ple.layers has {layer}, which is a layer with attention",
            path=reader.file.path,
            key=reader.key("ple.layers"),
        )
    # Pictures are hashed as the placeholders that stand for them.
    reader.integer("ple.image_token_id", 0, least=0)
    eos_id = reader.integer("ple.eos_token_id", least=0)
    ngrams = NgramConfig(
        primes=primes,
        multipliers=_numbers(reader, "ple.layer_multipliers", size, 1, _MOST_MULTIPLIER),
        row_dim=reader.integer("embedding_length_per_layer_input"),
        blank_id=eos_id,
        border_id=eos_id,
        conv_width=reader.integer("ple.conv_kernel", most=64),
        conv_dilation=size,
    )
    return {layer: ngrams}


def _numbers(reader: GgufConfigReader, name: str, count: int, least: int, most: int) -> tuple[int, ...]:
    """Read `count` whole numbers."""
    key = reader.key(name)
    value = reader.file.metadata.get(key)
    values = value.values() if isinstance(value, GgufArray) and len(value) == count else []
    found = tuple(one for one in values if type(one) is int and least <= one <= most)
    if len(found) != count:
        raise reader.file.wrong(key, value, f"{count} whole numbers from {least} to {most}")
    return found
