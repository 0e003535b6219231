"""List the tensors that a `ModelConfig` requires, under Argosy's own names, with their shapes.

    ModelConfig  ->  dense_shapes   {"embed": (vocab, hidden), "layers.0.q": (heads * head_dim, hidden), ...}
                 ->  expert_shapes  gate, up and down, or up and down, of one routed expert
                 ->  count_parameters

Shapes are [rows, columns], as in the product y = W x; a vector's shape is one number. Files in place and packs are
both checked against these shapes, so later code never meets a matrix of an unexpected size.

Elsewhere: `model/families/` maps a checkpoint's tensor names to these.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from math import prod
from typing import cast

from argosy.checkpoint.formats import rows_together
from argosy.config import (
    AttentionConfig,
    BankResidual,
    CompressedConfig,
    DeltaConfig,
    Format,
    GatedResidual,
    KimiDeltaConfig,
    LatentConfig,
    LightningConfig,
    MambaConfig,
    Mixer,
    ModelConfig,
    NgramConfig,
    ShortConvConfig,
    SinkhornResidual,
)
from argosy.errors import UnsupportedModel

Shape = tuple[int, ...]

_MOST_EXPERTS = 1 << 20  # in all layers together; the largest released model has 82,432


def expert_shapes(config: ModelConfig, layer: int) -> tuple[tuple[int, int], ...]:
    """Return the shapes of gate, up and down, or of up and down if the activation has no gate: the same for every
    routed expert of a layer.
    """
    width, hidden = config.expert_width_in(layer), config.expert_hidden
    wide, narrow = (width, hidden), (hidden, width)
    return (wide, wide, narrow) if config.activation.has_gate else (wide, narrow)


def dense_shapes(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    """Return canonical name and shape of every tensor that each token needs, in the order of use."""
    hidden = config.hidden_size
    yield "embed", (config.vocab_size, hidden)
    for layer in range(config.num_layers):
        for name, shape in _layer_shapes(config, layer):
            yield f"layers.{layer}.{name}", shape
    yield from _mix_shapes(config, "head")
    if not isinstance(config.residual, GatedResidual):  # whose head norms the streams itself
        yield "final_norm", (hidden,)
    if not config.is_embedding_tied:
        yield "head", (config.vocab_size, hidden)


def draft_shapes(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    """Return the same for the draft layer, the last of `config.layers`: a layer, and the tensors before it and the
    head.

    Its input is draft_join [RMSNorm(embedding of a token), RMSNorm(hidden state that predicted the token)].
    """
    hidden, number = config.hidden_size, config.num_layers - 1
    for name, shape in _layer_shapes(config, number):
        yield f"layers.{number}.{name}", shape
    yield f"layers.{number}.draft_token_norm", (hidden,)
    yield f"layers.{number}.draft_state_norm", (hidden,)
    yield f"layers.{number}.draft_join", (hidden, 2 * hidden)
    yield f"layers.{number}.draft_final_norm", (hidden,)


def shapes_together(config: ModelConfig, layer: int, names: Iterable[str]) -> dict[str, Shape]:
    """Return the shapes of those of a layer's tensors, in this order, which some files store as one."""
    shapes = dict(_layer_shapes(config, layer))
    return {name: shapes[name] for name in names if name in shapes}


def require_countable(config: ModelConfig) -> None:
    """Check that the experts of a config are few enough to list.

    A header of a few kilobytes can claim any number: stacked experts are one tensor, and files may have holes.

    Raises:
        UnsupportedModel: there are too many experts.
    """
    num_experts = len(config.moe_layers) * config.num_experts
    if num_experts > _MOST_EXPERTS:
        raise UnsupportedModel(
            f"its layers have {num_experts} experts together; at most {_MOST_EXPERTS} are supported",
            key="num_experts",
            value=num_experts,
            supported=_MOST_EXPERTS,
        )


def count_parameters(config: ModelConfig) -> tuple[int, int]:
    """Return the total parameters of a model, and those that one token uses: all but the experts that it does not
    choose.
    """
    dense = sum(prod(shape) for _, shape in dense_shapes(config))
    sizes = {layer: sum(map(prod, expert_shapes(config, layer))) for layer in config.moe_layers}
    active = sum(config.chosen_in(layer) * size for layer, size in sizes.items())
    active += sum(layer.ngrams.width for layer in config.layers if layer.ngrams is not None)
    total = config.num_experts * sum(sizes.values()) + num_table_parameters(config)
    return dense + total, dense + active


def num_table_parameters(config: ModelConfig) -> int:
    """Return the parameters of all n-gram tables."""
    tables = (layer.ngrams for layer in config.layers if layer.ngrams is not None)
    return sum(table.num_rows * table.row_dim for table in tables)


def _layer_shapes(config: ModelConfig, layer: int) -> Iterator[tuple[str, Shape]]:
    vector, parts = (config.hidden_size,), config.layers[layer]
    if parts.ngrams is not None:
        yield from _ngram_shapes(config, parts.ngrams)
    if parts.mixer is not None:
        yield from _mix_shapes(config, "attn")
        if config.has_pre_norms:
            yield "attn_norm", vector
        yield from _mixer_shapes(parts.mixer, config.hidden_size)
        if config.has_post_norms:
            yield "attn_post_norm", vector
    if parts.has_network:
        yield from _mix_shapes(config, "mlp")
        if config.has_pre_norms and not config.is_parallel:
            yield "mlp_norm", vector
        yield from _routed_shapes(config, layer) if parts.is_moe else _dense_shapes(config)
        if config.has_post_norms or (config.has_moe_post_norm and parts.is_moe):
            yield "mlp_post_norm", vector
    if config.has_layer_scale:
        yield "layer_scale", (1,)


def _ngram_shapes(config: ModelConfig, ngrams: NgramConfig) -> Iterator[tuple[str, Shape]]:
    """Return the shapes of an n-gram sublayer, except its table. Rows of the key: those of each stream in turn."""
    channels = config.num_streams * config.hidden_size
    yield "ngram_key", (channels, ngrams.width)
    yield "ngram_value", (config.hidden_size, ngrams.width)
    yield "ngram_key_norm", (channels,)
    yield "ngram_query_norm", (channels,)
    if ngrams.conv_width:
        yield "ngram_conv_norm", (channels,)
        yield "ngram_conv", (channels, ngrams.conv_width)


def _mix_shapes(config: ModelConfig, part: str) -> Iterator[tuple[str, Shape]]:
    """Return the shapes of how the mixer, the networks or the head read residual streams, and write them."""
    residual, name = config.residual, f"{part}_mix"
    match residual:
        case SinkhornResidual(num_streams=streams):
            rows = streams if part == "head" else residual.num_weights
            if part == "head" and residual.head != "own":
                return
            yield name, (rows, streams * config.hidden_size)
            yield f"{name}_bias", (rows,)
            yield f"{name}_scale", (1 if part == "head" else residual.num_parts,)
        case GatedResidual(num_streams=streams, rank=rank):
            width = streams * config.hidden_size
            yield f"{name}_norm", (width,)
            yield f"{name}_down", (rank, width)
            yield f"{name}_up", (width, rank)
            if part != "head":
                yield f"{name}_inject", (streams, width)
        case BankResidual(has_norms=has_norms):
            if has_norms:
                yield f"{name}_norm", (config.hidden_size,)
            yield f"{name}_scale", (config.hidden_size,)


def _mixer_shapes(mixer: Mixer, hidden: int) -> Iterator[tuple[str, Shape]]:
    match mixer:
        case AttentionConfig():
            return _attention_shapes(mixer, hidden)
        case LatentConfig():
            return _latent_shapes(mixer, hidden)
        case CompressedConfig():
            return _compressed_shapes(mixer, hidden)
        case DeltaConfig():
            return _delta_shapes(mixer, hidden)
        case KimiDeltaConfig():
            return _kimi_delta_shapes(mixer, hidden)
        case ShortConvConfig():
            return _short_conv_shapes(mixer, hidden)
        case MambaConfig():
            return _mamba_shapes(mixer, hidden)
        case LightningConfig():
            return _lightning_shapes(mixer, hidden)


def _attention_shapes(attention: AttentionConfig, hidden: int) -> Iterator[tuple[str, Shape]]:
    head_dim = attention.head_dim
    q_rows, k_rows = attention.num_heads * head_dim, attention.num_kv_heads * head_dim
    v_rows = attention.num_kv_heads * attention.width_of_values
    query_rows = 2 * q_rows if attention.output_gate == "query" else q_rows
    yield "q", (query_rows, hidden)
    yield "k", (k_rows, hidden)
    if not attention.keys_are_values:
        yield "v", (v_rows, hidden)
    if attention.has_qkv_bias:
        yield "q_bias", (query_rows,)
        yield "k_bias", (k_rows,)
        yield "v_bias", (v_rows,)
    if attention.qk_norm in ("head", "flat"):
        is_flat = attention.qk_norm == "flat"
        yield "q_norm", (q_rows if is_flat else head_dim,)
        yield "k_norm", (k_rows if is_flat else head_dim,)
    if attention.has_sinks:
        yield "sinks", (attention.num_heads,)
    if attention.gate_rows:
        yield "attn_gate", (attention.gate_rows, hidden)
    if (index := attention.index) is not None:
        yield "index_q", ((index.joint_heads or attention.num_kv_heads) * index.head_dim, hidden)
        yield "index_k", (index.head_dim, hidden)
        yield "index_q_norm", (index.head_dim,)
        yield "index_k_norm", (index.head_dim,)
    yield "o", (hidden, attention.num_heads * attention.width_of_values)
    if attention.has_o_bias:
        yield "o_bias", (hidden,)


def _latent_shapes(latent: LatentConfig, hidden: int) -> Iterator[tuple[str, Shape]]:
    """Return the shapes of multi-head latent attention. Rows per head: q: nope, then rope; kv_up: the key's nope, then
    value.

    With `is_up_split`, k_up has kv_rank rows of nope columns for each head: the key half of kv_up, transposed.
    """
    heads, rank = latent.num_heads, latent.kv_rank
    q_rows = heads * latent.head_dim
    if latent.query_rank:
        yield "q_down", (latent.query_rank, hidden)
        yield "q_down_norm", (latent.query_rank,)
        yield "q_up", (q_rows, latent.query_rank)
    else:
        yield "q", (q_rows, hidden)
    yield "kv_down", (latent.cached_dim, hidden)
    yield "kv_norm", (rank,)
    if latent.is_up_split:
        yield "k_up", (heads * rank, latent.nope_dim)
        yield "v_up", (heads * latent.value_dim, rank)
    else:
        yield "kv_up", (heads * (latent.nope_dim + latent.value_dim), rank)
    if (index := latent.own_index) is not None:
        yield "index_q", (index.num_heads * index.head_dim, latent.query_rank)
        yield "index_k", (index.head_dim, hidden)
        yield "index_k_norm", (index.head_dim,)
        yield "index_k_norm_bias", (index.head_dim,)
        yield "index_weights", (index.num_heads, hidden)
        if index.group_size > 1:
            yield "index_gate", (index.head_dim, hidden)
            yield "index_gate_bias", (index.group_size, index.head_dim)
    if latent.has_sinks:
        yield "sinks", (latent.num_heads,)
    if latent.gate_rows:
        yield "attn_gate", (latent.gate_rows, hidden)
    yield "o", (hidden, heads * latent.value_dim)


def _compressed_shapes(mixer: CompressedConfig, hidden: int) -> Iterator[tuple[str, Shape]]:
    yield "q_down", (mixer.query_rank, hidden)
    yield "q_down_norm", (mixer.query_rank,)
    yield "q_up", (mixer.num_heads * mixer.head_dim, mixer.query_rank)
    yield "kv", (mixer.head_dim, hidden)
    yield "kv_norm", (mixer.head_dim,)
    yield "sinks", (mixer.num_heads,)
    for name, (ratio, dim, has_overlap) in mixer.pools.items():
        columns = 2 * dim if has_overlap else dim
        yield name + "vectors", (columns, hidden)
        if ratio > 1:
            yield name + "gates", (columns, hidden)
            if mixer.pool is not None and mixer.pool.has_bias:
                yield name + "bias", (ratio, columns)
        yield name + "norm", (dim,)
    if (index := mixer.own_index) is not None:
        yield "index_q", (index.num_heads * index.head_dim, mixer.query_rank)
        yield "index_weights", (index.num_heads, hidden)
        if mixer.makes_keys:
            yield "index_k", (index.head_dim, mixer.head_dim)
            yield "index_k_norm", (index.head_dim,)
    yield "o_down", (mixer.num_groups * mixer.output_rank, mixer.group_dim)
    yield "o", (hidden, mixer.num_groups * mixer.output_rank)


def _delta_shapes(delta: DeltaConfig, hidden: int) -> Iterator[tuple[str, Shape]]:
    """Return the shapes of a gated delta net. Channels of qkv and of the convolution: q of all key heads, then k, then
    v.
    """
    if delta.has_joined_qkvz:
        yield "delta_qkvz", (delta.conv_channels + delta.value_channels, hidden)
    else:
        yield "delta_qkv", (delta.conv_channels, hidden)
        yield "delta_z", (delta.value_channels, hidden)
    if delta.has_joined_ba:
        yield "delta_ba", (2 * delta.num_value_heads, hidden)
    else:
        yield "delta_b", (delta.num_value_heads, hidden)
        yield "delta_a", (delta.num_value_heads, hidden)
    yield "delta_conv", (delta.conv_channels, delta.conv_width)
    yield "delta_rate", (delta.num_value_heads,)
    yield "delta_dt_bias", (delta.num_value_heads,)
    yield "delta_norm", (delta.value_dim,)
    yield "delta_out", (hidden, delta.value_channels)


def _kimi_delta_shapes(delta: KimiDeltaConfig, hidden: int) -> Iterator[tuple[str, Shape]]:
    """Return the shapes of Kimi Delta Attention. The projections of the decay and of the output gate may have two
    factors.
    """
    rows = delta.channels
    for name in "qkv":
        yield f"kda_{name}", (rows, hidden)
        yield f"kda_{name}_conv", (rows, delta.conv_width)
    yield "kda_beta", (delta.num_heads, hidden)
    for name, rank in (("kda_decay", delta.decay_rank), ("kda_gate", delta.gate_rank)):
        if rank:
            yield name + "_down", (rank, hidden)
        yield name, (rows, rank or hidden)
    yield "kda_rate", (delta.num_heads,)
    yield "kda_dt_bias", (rows,)
    yield "kda_norm", (delta.head_dim,)
    yield "kda_out", (hidden, rows)


def _short_conv_shapes(conv: ShortConvConfig, hidden: int) -> Iterator[tuple[str, Shape]]:
    """Return the shapes of a short convolution. Rows of the input projection: B, then C, then x."""
    yield "shortconv_in", (3 * conv.channels, hidden)
    yield "shortconv_conv", (conv.channels, conv.conv_width)
    yield "shortconv_out", (hidden, conv.channels)
    if conv.has_bias:
        yield "shortconv_in_bias", (3 * conv.channels,)
        yield "shortconv_conv_bias", (conv.channels,)
        yield "shortconv_out_bias", (hidden,)


def _mamba_shapes(mamba: MambaConfig, hidden: int) -> Iterator[tuple[str, Shape]]:
    """Return the shapes of a Mamba-2 mixer. Rows of the input projection: z, x, B, C, then dt; the convolution's
    channels: x, B, C.
    """
    rows = mamba.channels + mamba.conv_channels + mamba.num_heads
    yield "mamba_in", (rows, hidden)
    yield "mamba_conv", (mamba.conv_channels, mamba.conv_width)
    if mamba.has_conv_bias:
        yield "mamba_conv_bias", (mamba.conv_channels,)
    yield "mamba_rate", (mamba.num_heads,)
    yield "mamba_dt_bias", (mamba.num_heads,)
    yield "mamba_skip", (mamba.num_heads,)
    yield "mamba_norm", (mamba.channels,)
    yield "mamba_out", (hidden, mamba.channels)
    if mamba.has_bias:
        yield "mamba_in_bias", (rows,)
        yield "mamba_out_bias", (hidden,)


def _lightning_shapes(lightning: LightningConfig, hidden: int) -> Iterator[tuple[str, Shape]]:
    rows = lightning.channels
    if lightning.has_joined_qkv:
        yield "lightning_qkv", (3 * rows, hidden)
    else:
        yield from ((f"lightning_{name}", (rows, hidden)) for name in "qkv")
    if lightning.has_qk_norm:
        yield "lightning_q_norm", (lightning.head_dim,)
        yield "lightning_k_norm", (lightning.head_dim,)
    yield "lightning_gate", (rows, hidden)
    yield "lightning_norm", (rows,)
    yield "lightning_out", (hidden, rows)


def _dense_shapes(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    if config.activation.has_gate:
        yield "gate", (config.dense_width, config.hidden_size)
    yield "up", (config.dense_width, config.hidden_size)
    yield "down", (config.hidden_size, config.dense_width)


def _routed_shapes(config: ModelConfig, layer: int) -> Iterator[tuple[str, Shape]]:
    hidden, width = config.hidden_size, config.expert_width_in(layer)
    if config.router.has_norm:
        yield "router_norm", (hidden,)
    yield "router", (config.num_experts, hidden)
    if config.router.has_bias:
        yield "router_bias", (config.num_experts,)
    if config.layers[layer].has_token_experts:
        yield "token_experts", (config.vocab_size, config.chosen_in(layer))
    elif config.router.has_choice_bias:
        yield "choice_bias", (config.num_experts,)
    if config.router.has_media_bias:
        yield "media_bias", (config.num_experts,)
    if config.router.has_expert_scale:
        yield "expert_scale", (config.num_experts,)
    if config.has_expert_norms:
        yield "expert_norm", (hidden,)
        yield "expert_post_norm", (hidden,)
        yield "shared_post_norm", (hidden,)
    if config.has_expert_bias:
        yield "expert_gate_bias", (config.num_experts, width)
        yield "expert_up_bias", (config.num_experts, width)
        yield "expert_down_bias", (config.num_experts, config.expert_hidden)
    if config.expert_latent:
        yield "latent_down", (config.expert_latent, hidden)
        yield "latent_up", (hidden, config.expert_latent)
        if config.has_latent_norm:
            yield "latent_norm", (config.expert_latent,)
    if config.shared_width:
        if config.activation.has_gate:
            yield "shared_gate", (config.shared_width, hidden)
        yield "shared_up", (config.shared_width, hidden)
        yield "shared_down", (hidden, config.shared_width)
        if config.shared_is_gated:
            yield "shared_score", (1, hidden)


_DENSE_FORMATS: Mapping[str, Format] = {"bf16": "bf16", "q8": "q8", "q4": "q8"}
# Besides vectors: rows that score or name experts, and rows that set how fast a recurrent state forgets and learns.
_KEPT_EXACT = frozenset(
    {
        "router",
        "token_experts",
        "shared_score",
        "sinks",
        "index_weights",
        "delta_a",
        "delta_b",
        "delta_ba",
        "kda_beta",
        "attn_mix",
        "mlp_mix",
        "head_mix",
    }
)


def is_kept_exact(name: str) -> bool:
    """Whether a dense tensor stays float32 in a pack: norms, biases, factors and sinks, and rows of scores and gates.

    The router decides which experts run. Rounding it does not blur a sum, it picks another expert; and all of these
    tensors together make up a thousandth of a model.
    """
    last = name.rpartition(".")[2]
    return last.endswith(("norm", "_bias", "_scale", "_conv", "_rate", "_skip")) or last in _KEPT_EXACT


def packed_config(config: ModelConfig) -> ModelConfig:
    """Return the config of a bf16, q8 or q4 pack, which stores kv_up as two matrices, as in memory (`latent_up.py`)."""
    return config.with_mixers(LatentConfig, is_up_split=True)


def packed_format(name: str, format: str, config: ModelConfig) -> Format:
    """Return the format of a dense tensor in a pack of `format`: bf16, q8 or q4. Only routed experts become q4, and the
    networks of a model without them.

    Each head of k_up and v_up, and each group of o_down, is a separate matrix; it is bf16 if its rows do not fill whole
    panels.
    """
    if is_kept_exact(name):
        return "f32"
    last, chosen = name.rpartition(".")[2], _DENSE_FORMATS[format]
    if not config.num_experts and last in ("gate", "up", "down"):
        return cast(Format, format)
    if last in ("k_up", "v_up"):
        assert config.latent is not None
        head_rows = config.latent.kv_rank if last == "k_up" else config.latent.value_dim
        if head_rows % rows_together(chosen):
            return "bf16"
    if last == "o_down":
        layer = int(name.split(".")[1])
        mixer = config.layers[layer].mixer
        assert isinstance(mixer, CompressedConfig)
        if mixer.output_rank % rows_together(chosen):
            return "bf16"
    return chosen
