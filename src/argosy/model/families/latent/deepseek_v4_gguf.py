"""DeepSeek-V4 in a GGUF file of architecture `deepseek4`; `deepseek_v4.py` says what the model computes.

llama.cpp scales the magnitude of yarn away, so that it is 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.gguf import GgufFile
from argosy.config import (
    ActivationConfig,
    CompressedConfig,
    EntryIndexConfig,
    LayerConfig,
    ModelConfig,
    PoolConfig,
    RopeConfig,
    RouterConfig,
    SinkhornResidual,
)
from argosy.model.families.latent.deepseek import MOST_CHOSEN
from argosy.model.reading.experts_config import RENORMALIZE_EPS
from argosy.model.reading.gguf_config import GgufConfigReader
from argosy.model.reading.gguf_layout import read_gguf_layout

GGUF_ARCHITECTURE = "deepseek4"

_SQRT_SOFTPLUS = 4  # of expert_gating_func
_MIX = {"": "fn", "_bias": "base", "_scale": "scale"}
_POOL = {"vectors": "kv", "gates": "gate", "bias": "ape", "norm": "norm"}
_NAMES = {
    "kv": "attn_kv.weight",
    **{f"pool_{ours}": f"attn_compressor_{name}.weight" for ours, name in _POOL.items()},
    **{f"index_pool_{ours}": f"indexer_compressor_{name}.weight" for ours, name in _POOL.items()},
    "media_bias": "exp_probs_b_vl.bias",
    "o_down": "attn_output_a.weight",
    "o": "attn_output_b.weight",
    **{f"attn_mix{ours}": f"hc_attn_{name}.weight" for ours, name in _MIX.items()},
    **{f"mlp_mix{ours}": f"hc_ffn_{name}.weight" for ours, name in _MIX.items()},
    **{f"head_mix{ours}": f"output_hc_{name}.weight" for ours, name in _MIX.items()},
}


def mixers_by_ratio(
    attention: CompressedConfig, window: RopeConfig, compressed: RopeConfig, index: EntryIndexConfig
) -> dict[int, CompressedConfig]:
    """Return the mixers by the positions of an entry: 0 for layers without entries, 4 for those that choose among them,
    128 for those that see all.

    Args:
        attention: what all have.
        window, compressed: the rotary embeddings of layers without and with entries.
    """
    pooled = replace(attention, rope=compressed)
    return {
        0: replace(attention, rope=window),
        4: replace(pooled, pool=PoolConfig(ratio=4, has_overlap=True), index=index),
        128: replace(pooled, pool=PoolConfig(ratio=128)),
    }


def open_gguf(file: GgufFile) -> ModelFiles:
    """Open a GGUF file of architecture `deepseek4`.

    Raises:
        UnsupportedModel: a key, value or tensor type that is not supported.
        CheckpointError: a key or tensor is missing, malformed, or contradicts another.
    """
    reader = GgufConfigReader(file, GGUF_ARCHITECTURE)
    sizes, num_layers = reader.sizes(), reader.num_layers()
    mixers = _read_mixers(reader, sizes, num_layers)
    reader.neutral("expert_gating_func", _SQRT_SOFTPLUS)
    reader.neutral("expert_weights_norm", True)
    reader.neutral(
        "embedding_length_out", None, sizes["hidden_size"] * reader.integer("hyper_connection.count")
    )
    num_hashed = reader.integer("hash_layer_count", least=0)
    width = reader.integer("expert_feed_forward_length")
    reader.integer("feed_forward_length", width)
    limits = set(reader.limits("swiglu_clamp_exp"))
    if len(limits) > 1 or set(reader.limits("swiglu_clamp_shexp")) != limits:
        raise reader.unsupported(
            "swiglu_clamp_exp", sorted(limits), "one limit for all experts of all layers"
        )
    (limit,) = limits
    config = ModelConfig(
        family="deepseek_v4",
        layers=tuple(
            LayerConfig(mixer=mixer, is_moe=True, has_token_experts=layer < num_hashed)
            for layer, mixer in enumerate(mixers)
        ),
        expert_width=width,
        shared_width=width * reader.integer("expert_shared_count"),
        router=RouterConfig(
            score="sqrt_softplus",
            has_choice_bias=True,
            has_media_bias="blk.0.exp_probs_b_vl.bias" in file.tensors,
            renormalize_eps=RENORMALIZE_EPS,
            scale=reader.number("expert_weights_scale"),
        ),
        activation=ActivationConfig(kind="silu_limited" if limit else "silu", limit=limit),
        residual=SinkhornResidual(
            num_streams=reader.integer("hyper_connection.count"),
            iterations=reader.integer("hyper_connection.sinkhorn_iterations", most=1000),
            eps=reader.number("hyper_connection.epsilon"),
        ),
        draft_form=None,
        num_mtp_layers=reader.num_mtp_layers(),
        **sizes,
    )
    reader.finish()
    return read_gguf_layout(file, config, is_paired=False, has_rope_freqs=False, names=_NAMES)


def _read_mixers(
    reader: GgufConfigReader, sizes: Mapping[str, Any], num_layers: int
) -> list[CompressedConfig]:
    file = reader.file
    key = reader.key("attention.compress_ratios")
    ratios = file.numbers(key)[:num_layers]
    if len(ratios) < num_layers:
        raise file.wrong(key, ratios, f"a ratio for each of {num_layers} layers")
    if unknown := set(ratios) - {0, 4, 128}:
        raise reader.unsupported("attention.compress_ratios", min(unknown), "0, 4, 128")
    head_dim, num_heads = reader.integer("attention.key_length"), reader.integer("attention.head_count")
    reader.neutral("attention.value_length", head_dim)
    reader.neutral("attention.head_count_kv", 1)
    turning = reader.integer("rope.dimension_count", head_dim, most=head_dim)
    scaled = reader.rope(turning, sizes["context_tokens"])
    window = RopeConfig(
        theta=scaled.theta,
        rotary_dim=turning,
        is_interleaved=True,
        original_context=sizes["context_tokens"],
    )
    compressed = replace(
        scaled,
        theta=reader.number("attention.compress_rope_freq_base"),
        is_interleaved=True,
        attention_factor=1.0 if scaled.kind == "yarn" else None,
    )
    num_groups = reader.integer("attention.output_group_count")
    if num_heads % num_groups:
        raise reader.unsupported("attention.output_group_count", num_groups, f"divisors of {num_heads} heads")
    attention = CompressedConfig(
        num_heads=num_heads,
        head_dim=head_dim,
        query_rank=reader.integer("attention.q_lora_rank"),
        num_groups=num_groups,
        output_rank=reader.integer("attention.output_lora_rank"),
        sliding_window=reader.integer("attention.sliding_window"),
        norm_eps=sizes["norm_eps"],
        rope=None,
        has_head_norm=True,
    )
    index = EntryIndexConfig(
        num_chosen=reader.integer("attention.indexer.top_k", most=MOST_CHOSEN),
        num_heads=reader.integer("attention.indexer.head_count"),
        head_dim=reader.integer("attention.indexer.key_length", least=turning),
    )
    mixers = mixers_by_ratio(attention, window, compressed, index)
    return [mixers[int(ratio)] for ratio in ratios]
