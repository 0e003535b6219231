"""Code shared by the DeepSeek families: latent attention, shared experts, and tensor names.

    deepseek_v2, deepseek_v3, deepseek_v32, kimi_k2, kimi_k25, glm4_moe_lite, glm_moe_dsa
        ->  read_latent_model  ->  ModelConfig

All have latent attention (DeepSeek-V2, arXiv:2405.04434) with an interleaved rotary embedding, dense networks in the
first layers, and routed and shared experts in the others. They differ only in the router and in defaults, so a family
file gives just these. The norms of the compressed vectors have their own epsilon, 1e-6 regardless of `rms_norm_eps`
(DeepseekV3Attention in transformers 5.24, as in the code that DeepSeek published).

Elsewhere: `deepseek_gguf.py` does the same for GGUF metadata.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from argosy.config import IndexConfig, LatentConfig, LayerConfig, ModelConfig, RopeConfig
from argosy.errors import CheckpointError
from argosy.model.reading.common_config import MoeDefaults, read_common, read_sizes
from argosy.model.reading.config_reader import MOST_LAYERS, ConfigReader
from argosy.model.reading.experts_config import ReadRouter, layers_behind_the_dense, read_mtp_layers
from argosy.model.reading.layout import ATTENTION_NAMES, separate_and_fused

LATENT_NORM_EPS = 1e-6
MOST_CHOSEN = 1 << 30  # positions of an indexer
INDEX_NORM_EPS = 1e-6  # of the LayerNorm of index keys (DeepseekV32Indexer there)

LAYER_NAMES = {
    **ATTENTION_NAMES,
    "q_down": "self_attn.q_a_proj.weight",
    "q_down_norm": "self_attn.q_a_layernorm.weight",
    "q_up": "self_attn.q_b_proj.weight",
    "kv_down": "self_attn.kv_a_proj_with_mqa.weight",
    "kv_norm": "self_attn.kv_a_layernorm.weight",
    "kv_up": "self_attn.kv_b_proj.weight",
    "index_q": "self_attn.indexer.wq_b.weight",
    "index_k": "self_attn.indexer.wk.weight",
    "index_k_norm": "self_attn.indexer.k_norm.weight",
    "index_k_norm_bias": "self_attn.indexer.k_norm.bias",
    "index_weights": "self_attn.indexer.weights_proj.weight",
    "router": "mlp.gate.weight",
    "choice_bias": "mlp.gate.e_score_correction_bias",
    "shared_gate": "mlp.shared_experts.gate_proj.weight",
    "shared_up": "mlp.shared_experts.up_proj.weight",
    "shared_down": "mlp.shared_experts.down_proj.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
}

LAYOUTS = separate_and_fused(LAYER_NAMES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults(MoeDefaults):
    """Defaults of absent keys, as in a family's config class in transformers 5.24."""

    first_dense_layers: int
    query_rank: int | None
    nope_dim: int
    value_dim: int
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    kv_rank: int = 512
    rope_dim: int = 64
    eos_id: int
    bos_id: int | None


DEEPSEEK_V3 = Defaults(
    vocab_size=129_280,
    hidden_size=7168,
    num_layers=61,
    num_heads=128,
    num_kv_heads=128,
    dense_width=18_432,
    expert_width=2048,
    num_experts=256,
    experts_per_token=8,
    num_shared_experts=1,
    first_dense_layers=3,
    context_tokens=4096,
    query_rank=1536,
    nope_dim=128,
    value_dim=128,
    num_mtp_layers=1,
    eos_id=1,
    bos_id=0,
)


def read_latent_model(
    reader: ConfigReader,
    *,
    family: str,
    defaults: Defaults,
    read_router: ReadRouter,
    read_moe_layers: Callable[[ConfigReader, int], Sequence[bool]] | None = None,
    read_indexers: Callable[[ConfigReader, int], Sequence[IndexConfig]] | None = None,
) -> ModelConfig:
    """Read the config of any of these families; the caller calls `finish()`.

    Args:
        read_router: reads the keys of the family's router.
        read_moe_layers: given the number of layers, tells for each whether it has routed experts; None means all
            layers from `first_k_dense_replace` on.
        read_indexers: the same for what chooses a layer's positions; None means that every token sees all.

    Raises:
        UnsupportedModel: a key or value asks for something that is not supported.
        CheckpointError: a key is missing, malformed, or contradicts another.
    """
    nope_dim = reader.integer("qk_nope_head_dim", default=defaults.nope_dim)
    rope_dim = reader.integer("qk_rope_head_dim", default=defaults.rope_dim, least=min(1, defaults.rope_dim))
    common = (
        read_common(reader, replace(defaults, rotary_dim=rope_dim))
        if rope_dim
        else read_sizes(reader, defaults)
    )
    num_heads, num_kv_heads = (common.attention[name] for name in ("num_heads", "num_kv_heads"))
    is_interleaved = reader.flag("rope_interleave", True)
    rope = replace(common.attention["rope"], is_interleaved=is_interleaved) if rope_dim else None
    latent = LatentConfig(
        num_heads=num_heads,
        query_rank=reader.optional_integer("q_lora_rank", default=defaults.query_rank) or 0,
        kv_rank=reader.integer("kv_lora_rank", default=defaults.kv_rank),
        nope_dim=nope_dim,
        rope_dim=rope_dim,
        value_dim=reader.integer("v_head_dim", default=defaults.value_dim),
        norm_eps=LATENT_NORM_EPS,
        rope=rope,
        scale=0.0 if rope is None else attention_scale(nope_dim + rope_dim, rope),
    )
    if num_kv_heads != num_heads:
        raise CheckpointError(
            f"config.json gives num_key_value_heads as {num_kv_heads}, expected {num_heads}, the "
            "same as num_attention_heads: latent attention has a key for each head",
            key="num_key_value_heads",
        )
    # Sizes repeated under other names: in transformers 5, the rotary dimensions and the whole head; in Sarvam's files,
    # those of the cache; in GLM-5.2's, whose class does not read them, the other dimensions.
    others = (latent.cached_dim,) if read_indexers is None else (latent.cached_dim, nope_dim)
    reader.neutral("head_dim", rope_dim, latent.head_dim, *others, None)
    reader.neutral("qk_head_dim", latent.head_dim)
    reader.neutral("q_head_dim", latent.head_dim)
    reader.neutral("attention_bias", False, None)
    reader.neutral("moe_layer_freq", 1)
    num_layers = reader.integer("num_hidden_layers", default=defaults.num_layers, most=MOST_LAYERS)
    is_moe = (read_moe_layers or layers_behind_the_dense(defaults.first_dense_layers))(reader, num_layers)
    has_experts = defaults.num_experts != 0
    expert_width = (
        reader.integer("moe_intermediate_size", default=defaults.expert_width) if has_experts else 0
    )
    shared = "num_shared_experts" if reader.has("num_shared_experts") else "n_shared_experts"
    num_shared = reader.optional_integer(shared, default=defaults.num_shared_experts, least=0) or 0
    indexers = read_indexers(reader, num_layers) if read_indexers else (None,) * num_layers
    mixers = {index: replace(latent, index=index) for index in indexers}
    return ModelConfig(
        family=family,
        layers=tuple(
            LayerConfig(mixer=mixers[index], is_moe=moe) for index, moe in zip(indexers, is_moe, strict=True)
        ),
        expert_width=expert_width,
        router=read_router(
            reader, common.model.get("num_experts", 0), common.model.get("experts_per_token", 0)
        ),
        dense_width=reader.integer("intermediate_size", default=defaults.dense_width),
        shared_width=num_shared * expert_width,
        num_mtp_layers=read_mtp_layers(reader, defaults.num_mtp_layers),
        **common.model,
    )


def attention_scale(head_dim: int, rope: RopeConfig) -> float:
    """The scale of attention scores: 1 / sqrt(head_dim), times the square of yarn's `mscale_all_dim` magnitude.

    `yarn_apply_mscale` of `modeling_deepseek_v2.py` in transformers 5.24.
    """
    magnitude = 1.0
    if rope.kind == "yarn" and rope.mscale_all_dim and rope.factor > 1:
        magnitude = 0.1 * rope.mscale_all_dim * math.log(rope.factor) + 1.0
    return float(head_dim**-0.5 * magnitude * magnitude)
