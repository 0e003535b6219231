"""Describe the mixers of a checkpoint's layers to the native stack, with what they keep and their sizes.

A family with another kind of mixer adds a function here, its shapes in checkpoint/geometry.py, and its counterpart in
native/ops/stack.h.
"""

from __future__ import annotations

from bisect import bisect_left

import numpy as np

from argosy import _native
from argosy.config import (
    AttentionConfig,
    BlockIndexConfig,
    CompressedConfig,
    DeltaConfig,
    EntryIndexConfig,
    IndexConfig,
    KimiDeltaConfig,
    LatentConfig,
    LightningConfig,
    MambaConfig,
    Mixer,
    ModelConfig,
    QueryScale,
    ShortConvConfig,
)
from argosy.errors import CheckpointError
from argosy.model.weights import DenseWeights, Vector


def describe_mixer(config: ModelConfig, layer: int, weights: DenseWeights) -> _native.Mixer | None:
    """Describe the mixer of a layer, using the memory of `weights`."""
    name = f"layers.{layer}."
    state_layer = bisect_left(
        config.recurrent_layers, layer
    )  # its number among the recurrent layers, if it is one
    match config.layers[layer].mixer:
        case AttentionConfig() as attention:
            return _attention(attention, name, weights, _store(config, layer), state_layer)
        case LatentConfig() as latent:
            return _latent(latent, name, weights, _store(config, layer), state_layer)
        case CompressedConfig() as compressed:
            source = None if compressed.pool is None else compressed.pool.source
            store = _store(config, layer if source is None else source)
            return _compressed(compressed, name, weights, store, state_layer)
        case DeltaConfig() as delta:
            return _delta(delta, name + "delta_", weights, state_layer)
        case KimiDeltaConfig() as delta:
            return _kimi_delta(delta, name + "kda_", weights, state_layer)
        case ShortConvConfig():
            return _short_conv(name + "shortconv_", weights, state_layer)
        case MambaConfig() as mamba:
            return _mamba(mamba, name + "mamba_", weights, state_layer)
        case LightningConfig() as lightning:
            return _lightning(lightning, name + "lightning_", weights, state_layer)
    return None


def _store(config: ModelConfig, layer: int) -> int:
    """Return the number of the layer's first further store in the KV cache."""
    return config.num_layers + sum(len(further_stores(one.mixer)) for one in config.layers[:layer])


def _attention(
    attention: AttentionConfig, name: str, weights: DenseWeights, store: int, state_layer: int
) -> _native.Mixer:
    """Grouped-query attention (arXiv:2305.13245)."""
    head_dim = attention.head_dim
    unweighted = np.ones(head_dim, np.float32) if attention.qk_norm == "unweighted" else None
    query, key, output = (weights.matrices[name + part] for part in "qko")
    return _native.grouped_query_attention(
        query,
        key,
        None if attention.keys_are_values else weights.matrices[name + "v"],
        output,
        num_heads=attention.num_heads,
        window=attention.sliding_window,
        is_chunked=attention.is_chunked,
        scale=attention.scale or head_dim**-0.5,
        query_scale=_query_scale(attention.query_scale),
        query_bias=weights.vectors.get(name + "q_bias"),
        key_bias=weights.vectors.get(name + "k_bias"),
        value_bias=weights.vectors.get(name + "v_bias"),
        output_bias=weights.vectors.get(name + "o_bias"),
        query_norm=weights.vectors.get(name + "q_norm", unweighted),
        key_norm=weights.vectors.get(name + "k_norm", unweighted),
        is_norm_flat=attention.qk_norm == "flat",
        is_norm_last=attention.is_norm_last,
        limit=attention.qkv_limit,
        sinks=weights.vectors.get(name + "sinks"),
        has_gate=attention.output_gate == "query",
        gate=weights.matrices.get(name + "attn_gate"),
        gate_kind=attention.gate_activation,
        value_norm=np.ones(attention.width_of_values, np.float32) if attention.has_value_norm else None,
        value_scale=attention.value_scale,
        is_causal=attention.is_causal,
        indexer=None
        if attention.index is None
        else _block_indexer(attention.index, name + "index_", weights, (store, state_layer)),
    )


def _block_indexer(
    index: BlockIndexConfig, name: str, weights: DenseWeights, pool: tuple[int, int]
) -> _native.BlockIndexer:
    """The indexer of block-sparse attention; if blocks have a key each, with its store and layer of the state."""
    return _native.BlockIndexer(
        weights.matrices[name + "q"],
        weights.matrices[name + "k"],
        query_norm=weights.vectors[name + "q_norm"],
        key_norm=weights.vectors[name + "k_norm"],
        num_chosen=index.num_chosen,
        block_size=index.block_size,
        num_local=index.num_local,
        pool=pool if index.joint_heads else None,
    )


def _delta(delta: DeltaConfig, name: str, weights: DenseWeights, state_layer: int) -> _native.Mixer:
    """A gated delta net (arXiv:2412.06464)."""
    matrices = weights.matrices
    return _native.gated_delta_net(
        matrices[name + ("qkvz" if delta.has_joined_qkvz else "qkv")],
        matrices[name + ("ba" if delta.has_joined_ba else "b")],
        matrices[name + "out"],
        z=None if delta.has_joined_qkvz else matrices[name + "z"],
        a=None if delta.has_joined_ba else matrices[name + "a"],
        conv=weights.vectors[name + "conv"],
        rate=_decay_rate(name + "rate", weights, is_log=delta.is_rate_log),
        dt_bias=weights.vectors[name + "dt_bias"],
        norm=weights.vectors[name + "norm"],
        sizes=delta.sizes,
        is_tiled=delta.is_tiled,
        has_sigmoid_gate=delta.has_sigmoid_gate,
        state_layer=state_layer,
    )


def _kimi_delta(delta: KimiDeltaConfig, name: str, weights: DenseWeights, state_layer: int) -> _native.Mixer:
    """Kimi Delta Attention (arXiv:2510.26692)."""
    matrices, vectors = weights.matrices, weights.vectors
    return _native.kimi_delta_attention(
        *(matrices[name + part] for part in ("q", "k", "v", "beta", "decay", "gate", "out")),
        decay_down=matrices.get(name + "decay_down"),
        gate_down=matrices.get(name + "gate_down"),
        conv=(vectors[name + "q_conv"], vectors[name + "k_conv"], vectors[name + "v_conv"]),
        rate=_decay_rate(name + "rate", weights, is_log=delta.is_rate_log, has_sign=False),
        dt_bias=vectors[name + "dt_bias"],
        norm=vectors[name + "norm"],
        floor=delta.floor,
        sizes=delta.sizes,
        state_layer=state_layer,
    )


def _short_conv(name: str, weights: DenseWeights, state_layer: int) -> _native.Mixer:
    """A short convolution with two gates, as in LFM2."""
    vectors = weights.vectors
    return _native.short_conv(
        weights.matrices[name + "in"],
        weights.matrices[name + "out"],
        conv=vectors[name + "conv"],
        conv_bias=vectors.get(name + "conv_bias"),
        input_bias=vectors.get(name + "in_bias"),
        output_bias=vectors.get(name + "out_bias"),
        state_layer=state_layer,
    )


def _mamba(mamba: MambaConfig, name: str, weights: DenseWeights, state_layer: int) -> _native.Mixer:
    """A Mamba-2 mixer (arXiv:2405.21060)."""
    vectors = weights.vectors
    return _native.mamba(
        weights.matrices[name + "in"],
        weights.matrices[name + "out"],
        conv=vectors[name + "conv"],
        conv_bias=vectors.get(name + "conv_bias"),
        rate=_decay_rate(name + "rate", weights, is_log=mamba.is_rate_log),
        dt_bias=vectors[name + "dt_bias"],
        skip=vectors[name + "skip"],
        norm=vectors[name + "norm"],
        sizes=mamba.sizes,
        dt_limit=(mamba.least_dt, mamba.most_dt or float("inf")),
        input_bias=vectors.get(name + "in_bias"),
        output_bias=vectors.get(name + "out_bias"),
        state_layer=state_layer,
    )


def _lightning(
    lightning: LightningConfig, name: str, weights: DenseWeights, state_layer: int
) -> _native.Mixer:
    """Lightning attention (arXiv:2401.04658)."""
    matrices, vectors = weights.matrices, weights.vectors
    return _native.lightning_attention(
        matrices[name + ("qkv" if lightning.has_joined_qkv else "q")],
        matrices.get(name + "k"),
        matrices.get(name + "v"),
        matrices[name + "gate"],
        matrices[name + "out"],
        num_heads=lightning.num_heads,
        has_silu=lightning.has_silu,
        query_norm=vectors.get(name + "q_norm"),
        key_norm=vectors.get(name + "k_norm"),
        decay=np.exp(-np.array(lightning.slopes)).astype(np.float32),
        norm=vectors[name + "norm"],
        norm_eps=lightning.norm_eps,
        num_groups=lightning.num_groups,
        scale=lightning.scale,
        state_layer=state_layer,
    )


def _decay_rate(name: str, weights: DenseWeights, *, is_log: bool, has_sign: bool = True) -> Vector:
    """The decay rate of each head. Without a sign, a file may also store minus the rate.

    Raises:
        CheckpointError: a rate would make the state grow from token to token, or turn it into NaN.
    """
    rate = weights.vectors[name]
    with np.errstate(over="ignore"):
        rate = -np.exp(rate) if is_log else rate if has_sign else -np.abs(rate)
    wrong = np.flatnonzero(~(np.isfinite(rate) & (rate <= 0)))
    if wrong.size:
        raise CheckpointError(
            f"{name} gives head {wrong[0]} a decay of e^({rate[wrong[0]]} * softplus), expected a rate of 0 or less",
            hint="the file is damaged, or the model was already broken when it was saved",
            tensor=name,
        )
    return rate


def _latent(
    latent: LatentConfig, name: str, weights: DenseWeights, store: int, state_layer: int
) -> _native.Mixer:
    """Multi-head latent attention (arXiv:2405.04434). Loading split kv_up into k_up, transposed, and v_up."""
    return _native.multi_head_latent_attention(
        weights.matrices[name + ("q_up" if latent.query_rank else "q")],
        weights.matrices[name + "kv_down"],
        weights.matrices[name + "k_up"],
        weights.matrices[name + "v_up"],
        weights.matrices[name + "o"],
        num_heads=latent.num_heads,
        rope_dim=latent.rope_dim,
        scale=latent.scale or latent.head_dim**-0.5,
        norm_eps=latent.norm_eps,
        kv_norm=weights.vectors[name + "kv_norm"],
        query_down=weights.matrices.get(name + "q_down"),
        query_norm=weights.vectors.get(name + "q_down_norm"),
        query_scale=_query_scale(latent.query_scale),
        gate=weights.matrices.get(name + "attn_gate"),
        sinks=weights.vectors.get(name + "sinks"),
        num_chosen=latent.num_chosen // latent.group_size,
        group_size=latent.group_size,
        indexer=(
            None
            if latent.own_index is None
            else _indexer(latent.own_index, name + "index_", weights, store, state_layer)
        ),
    )


def _indexer(
    index: IndexConfig, name: str, weights: DenseWeights, store: int, state_layer: int
) -> _native.PositionIndexer:
    """The lightning indexer (arXiv:2512.02556), maybe with keys of groups (GLM-5.3)."""
    is_pooled = index.group_size > 1
    return _native.PositionIndexer(
        *(weights.matrices[name + part] for part in ("q", "k", "weights")),
        key_norm=weights.vectors[name + "k_norm"],
        key_norm_bias=weights.vectors[name + "k_norm_bias"],
        norm_eps=index.norm_eps,
        has_interleaved_pairs=index.is_interleaved,
        rope_begin=index.rope_begin,
        gate=weights.matrices[name + "gate"] if is_pooled else None,
        gate_bias=weights.vectors[name + "gate_bias"].reshape(-1, index.head_dim) if is_pooled else None,
        store=store if is_pooled else 0,
        state_layer=state_layer if is_pooled else 0,
    )


def _compressed(
    mixer: CompressedConfig, name: str, weights: DenseWeights, store: int, state_layer: int
) -> _native.Mixer:
    """DeepSeek-V4's attention. Entries and index keys lie in the KV cache's stores from `store` on."""
    vectors, matrices = weights.vectors, weights.matrices
    pools = [
        _native.Pool(
            matrices[name + pool + "vectors"],
            matrices.get(name + pool + "gates"),
            sizes=sizes,
            bias=bias.reshape(sizes[0], -1)
            if (bias := vectors.get(name + pool + "bias")) is not None
            else None,
            norm=vectors[name + pool + "norm"],
            store=store + i,
        )
        for i, (pool, sizes) in enumerate(mixer.pools.items())
    ]
    indexer = None
    if (index := mixer.own_index) is not None:
        indexer = _native.EntryIndexer(
            matrices[name + "index_q"],
            matrices[name + "index_weights"],
            pool=pools[1] if index.keys == "pool" else None,
            key=matrices.get(name + "index_k"),
            key_norm=vectors.get(name + "index_k_norm"),
            store=store + 1,
            candidates=_candidates(index),
            finds_candidates=index.candidates is not None and index.candidates.is_source,
        )
    return _native.compressed_attention(
        *(weights.matrices[name + part] for part in ("q_down", "q_up", "kv", "o_down", "o")),
        num_heads=mixer.num_heads,
        num_groups=mixer.num_groups,
        rope_dim=0 if mixer.rope is None else mixer.rope.rotary_dim,
        window=mixer.sliding_window,
        scale=mixer.scale or mixer.head_dim**-0.5,
        norm_eps=mixer.norm_eps,
        query_norm=vectors[name + "q_down_norm"],
        kv_norm=vectors[name + "kv_norm"],
        head_norm=np.ones(mixer.head_dim, np.float32) if mixer.has_head_norm else None,
        sinks=vectors[name + "sinks"],
        pool=pools[0] if pools else None,
        entries=(store, mixer.pool.ratio) if mixer.pool and not pools else None,
        indexer=indexer,
        num_chosen=mixer.index.num_chosen if mixer.index else 0,
        state_layer=state_layer,
    )


def _candidates(index: EntryIndexConfig) -> tuple[int, int] | None:
    """Return the blocks inside which an indexer chooses, and the entries of a block."""
    one = index.candidates
    return None if one is None else (one.num_blocks, one.block_size)


def further_stores(mixer: Mixer | None) -> list[_native.KvShape]:
    """Return the stores of a layer with this mixer behind the layers' own: those of its pools, and of the index keys
    that it makes.
    """
    if not isinstance(mixer, AttentionConfig | LatentConfig | CompressedConfig):
        return []
    stores = [_native.KvShape.pooled(dim, ratio) for ratio, dim, _ in mixer.pools.values()]
    if isinstance(mixer, CompressedConfig) and mixer.makes_keys:
        assert mixer.index is not None
        assert mixer.pool is not None
        stores.append(_native.KvShape.pooled(mixer.index.head_dim, mixer.pool.ratio))
    return stores


def _query_scale(scale: QueryScale | None) -> tuple[float, int, int]:
    return (0.0, 1, 0) if scale is None else (scale.beta, scale.period, scale.offset)


def kv_shape(mixer: Mixer | None) -> _native.KvShape:
    """Return the data that a layer with this mixer keeps per position."""
    match mixer:
        case AttentionConfig():
            return _native.KvShape.keys_values(
                mixer.num_kv_heads,
                mixer.head_dim,
                is_windowed=mixer.sliding_window > 0,
                value_dim=mixer.width_of_values,
                index_dim=mixer.index.head_dim if mixer.index and not mixer.pools else 0,
            )
        case LatentConfig():
            index = None if mixer.pools else mixer.own_index
            return _native.KvShape.latent(mixer.cached_dim, index.head_dim if index else 0)
        case CompressedConfig():
            return _native.KvShape.latent(mixer.head_dim, is_windowed=True)
    return _native.KvShape.none()


def state_shape(mixer: Mixer | None) -> _native.StateShape:
    """Return the state that a layer with this mixer keeps per sequence."""
    match mixer:
        case DeltaConfig() | KimiDeltaConfig() | LightningConfig():
            return _native.StateShape.delta_net(mixer.sizes)
        case ShortConvConfig():
            return _native.StateShape.short_conv(mixer.channels, mixer.conv_width)
        case MambaConfig():
            return _native.StateShape.mamba(mixer.sizes)
        case AttentionConfig() | LatentConfig() | CompressedConfig():
            return _native.StateShape.pools(list(mixer.pools.values()))
    return _native.StateShape.pools([])


def add_mixer_sizes(sizes: _native.StackSizes, mixer: Mixer | None) -> None:
    """Add the dimensions of a mixer, from which native code computes its working memory."""
    match mixer:
        case AttentionConfig():
            sizes.add_attention(
                mixer.num_heads,
                mixer.num_kv_heads,
                mixer.head_dim,
                mixer.output_gate == "query",
                mixer.width_of_values,
                mixer.gate_rows,
                *(
                    (blocks.head_dim, blocks.num_chosen, blocks.block_size, blocks.joint_heads)
                    if (blocks := mixer.index)
                    else ()
                ),
            )
        case LatentConfig():
            sizes.add_latent_attention(
                mixer.num_heads,
                mixer.nope_dim,
                mixer.rope_dim,
                mixer.kv_rank,
                mixer.value_dim,
                mixer.query_rank,
                *(
                    (index.num_heads, index.head_dim, index.num_chosen // index.group_size)
                    if (index := mixer.own_index)
                    else (0, 0, 0)
                ),
                mixer.gate_rows,
                mixer.group_size if mixer.own_index else 1,
            )
        case CompressedConfig():
            sizes.add_compressed_attention(
                mixer.num_heads,
                mixer.head_dim,
                mixer.query_rank,
                mixer.num_groups,
                mixer.output_rank,
                rope_dim=0 if mixer.rope is None else mixer.rope.rotary_dim,
                pool=mixer.pools.get("pool_"),
                has_gates=mixer.has_state,
                num_chosen=mixer.index.num_chosen if mixer.index else 0,
                index=(entry.num_heads, entry.head_dim) if (entry := mixer.own_index) else None,
                keys=mixer.pools.get("index_pool_"),
                has_entry_keys=mixer.makes_keys,
                candidates=_candidates(entry) if entry else None,
            )
        case DeltaConfig() | LightningConfig():
            sizes.add_delta_net(mixer.sizes)
        case KimiDeltaConfig():
            sizes.add_kimi_delta(mixer.sizes, mixer.decay_rank + mixer.gate_rank)
        case ShortConvConfig():
            sizes.add_short_conv(mixer.channels)
        case MambaConfig():
            sizes.add_mamba(mixer.sizes)
