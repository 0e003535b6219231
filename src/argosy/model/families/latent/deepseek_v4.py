"""DeepSeek-V4: residual streams, one key and value for all heads, and layers whose experts follow from token ids.

A layer sees a window of positions. Most layers also see entries that pool groups of positions (`compress_ratios`): all
entries of 128, or those of 4 that an index chooses, which overlap. Layers without pools rotate by `rope_theta`, those
with pools by `compress_rope_theta`, scaled by yarn whose magnitude is 1 unless the file gives it. With a vision tower,
positions of pictures choose experts in every layer, by a bias of their own.

Tensors have DeepSeek's own names. transformers 5.24 (`DeepseekV4Config`) describes layers by type instead of ratio, and
has the rotary embeddings under `main` and `compress`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from argosy.config import (
    ActivationConfig,
    CompressedConfig,
    EntryIndexConfig,
    LayerConfig,
    ModelConfig,
    RopeConfig,
    RouterConfig,
    SinkhornResidual,
)
from argosy.errors import CheckpointError
from argosy.model.families.latent.deepseek import MOST_CHOSEN
from argosy.model.families.latent.deepseek_v4_gguf import GGUF_ARCHITECTURE, mixers_by_ratio, open_gguf
from argosy.model.reading.common_config import Common, MoeDefaults, read_sizes
from argosy.model.reading.config_reader import MOST_LAYERS, ConfigReader
from argosy.model.reading.experts_config import RENORMALIZE_EPS
from argosy.model.reading.layout import Layout
from argosy.model.reading.rope_config import read_rope, read_ropes_of_layers

__all__ = ["GGUF_ARCHITECTURE", "LAYOUTS", "MODEL_TYPE", "open_gguf", "parse_config"]

MODEL_TYPE = "deepseek_v4"

_DEFAULTS = MoeDefaults(
    vocab_size=129_280,
    hidden_size=4096,
    num_layers=43,
    num_heads=64,
    num_kv_heads=1,
    head_dim=512,
    rope_theta=10_000.0,
    norm_eps=1e-6,
    context_tokens=1_048_576,
    num_experts=256,
    experts_per_token=6,
    dense_width=0,
    expert_width=2048,
    num_shared_experts=1,
    eos_id=1,
    bos_id=0,
)
_DRAFT_KEYS = (
    "dspark_block_size", "dspark_noise_token_id", "dspark_target_layer_ids", "dspark_markov_rank",
)  # fmt: skip
_VISION_KEYS = (
    "vision_dim", "vision_n_heads", "vision_inter_dim", "vision_patch_size", "vision_rope_theta",
    "vision_downsample_ratio", "vision_max_n_token", "vision_min_pixels", "vision_max_wh_ratio",
)  # fmt: skip
_HASH_LAYERS = 3
_MOST_ITERATIONS = 1000
_RATIOS = {"sliding_attention": 0, "compressed_sparse_attention": 4, "heavily_compressed_attention": 128}
_MIX = {"": "fn", "_bias": "base", "_scale": "scale"}
_POOL = {"vectors": "wkv.weight", "gates": "wgate.weight", "bias": "ape", "norm": "norm.weight"}

LAYOUTS = (
    Layout(
        prefix="",
        embed_name="embed.weight",
        head_name="head.weight",
        layer_names={
            "attn_norm": "attn_norm.weight",
            "q_down": "attn.wq_a.weight",
            "q_down_norm": "attn.q_norm.weight",
            "q_up": "attn.wq_b.weight",
            "kv": "attn.wkv.weight",
            "kv_norm": "attn.kv_norm.weight",
            "sinks": "attn.attn_sink",
            **{f"pool_{ours}": f"attn.compressor.{name}" for ours, name in _POOL.items()},
            **{f"index_pool_{ours}": f"attn.indexer.compressor.{name}" for ours, name in _POOL.items()},
            "index_q": "attn.indexer.wq_b.weight",
            "index_weights": "attn.indexer.weights_proj.weight",
            "o_down": "attn.wo_a.weight",
            "o": "attn.wo_b.weight",
            "mlp_norm": "ffn_norm.weight",
            "router": "ffn.gate.weight",
            "choice_bias": "ffn.gate.bias",
            "media_bias": "ffn.gate.bias_vl",
            "token_experts": "ffn.gate.tid2eid",
            "shared_gate": "ffn.shared_experts.w1.weight",
            "shared_up": "ffn.shared_experts.w3.weight",
            "shared_down": "ffn.shared_experts.w2.weight",
            **{f"attn_mix{ours}": f"hc_attn_{name}" for ours, name in _MIX.items()},
            **{f"mlp_mix{ours}": f"hc_ffn_{name}" for ours, name in _MIX.items()},
        },
        model_names={f"head_mix{ours}": f"hc_head_{name}" for ours, name in _MIX.items()},
        expert_names=tuple(f"ffn.experts.{{expert}}.w{number}.weight" for number in (1, 3, 2)),
        # The bias of a layer whose experts follow from token ids has no effect.
        passed_over=r"(mtp\.\d+|vision|aligner)\..+|image_(start|end|newline|pad)|layers\.\d+\.ffn\.gate\.bias",
    ),
)


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read a `config.json`; an absent key gets the default of `DeepseekV4Config` in transformers 5.24.

    Raises:
        UnsupportedModel: a key or value asks for something that is not supported.
        CheckpointError: a key is missing, malformed, or contradicts another.
    """
    reader = ConfigReader(raw, MODEL_TYPE)
    sizes = read_sizes(reader, _DEFAULTS)
    num_layers = reader.integer("num_hidden_layers", default=_DEFAULTS.num_layers, most=MOST_LAYERS)
    num_mtp = reader.integer("num_nextn_predict_layers", default=1, least=0, most=MOST_LAYERS)
    ratios = _read_ratios(reader, num_layers, num_mtp)
    attention = read_attention(reader, sizes, query_rank=1024)
    window, compressed = read_ropes(reader, attention.head_dim, sizes.model["context_tokens"])
    index = read_index(reader, compressed, num_heads=64)
    mixers = mixers_by_ratio(replace(attention, has_head_norm=True), window, compressed, index)
    expert_width = reader.integer(
        "moe_intermediate_size", "intermediate_size", default=_DEFAULTS.expert_width
    )
    is_hashed = _read_hashed(reader, num_layers, num_mtp)
    config = ModelConfig(
        family=MODEL_TYPE,
        layers=tuple(
            LayerConfig(mixer=mixers[ratio], is_moe=True, has_token_experts=hashed)
            for ratio, hashed in zip(ratios, is_hashed, strict=True)
        ),
        expert_width=expert_width,
        shared_width=expert_width * reader.integer("n_shared_experts", default=1),
        router=replace(
            read_router(reader), has_media_bias=reader.integer("vision_n_layers", default=0, least=0) > 0
        ),
        activation=ActivationConfig(kind="silu_limited", limit=reader.number("swiglu_limit", 10.0)),
        residual=read_residual(reader),
        draft_form=None,
        **sizes.model,
    )
    reader.neutral("norm_topk_prob", True)
    reader.neutral("attention_bias", False, None)
    reader.neutral("first_k_dense_replace", 0, None)
    reader.passed("expert_dtype")  # how weights are stored
    reader.passed(*_DRAFT_KEYS, *_VISION_KEYS)
    reader.finish()
    return config


def _read_ratios(reader: ConfigReader, num_layers: int, num_mtp: int) -> Sequence[int]:
    """Read how many positions an entry of each layer pools; 0: the layer has no entries."""
    reader.neutral("compress_rate_csa", 4, None)
    reader.neutral("compress_rate_hca", 128, None)
    reader.neutral("compress_rates", None, {name: ratio for name, ratio in _RATIOS.items() if ratio})
    kinds = reader.layer_types(num_layers, tuple(_RATIOS), num_mtp_layers=num_mtp)
    ratios = reader.integers("compress_ratios", least=0, most=128)
    if ratios and not num_layers <= len(ratios) <= num_layers + max(num_mtp, 1):
        raise CheckpointError(
            f"config.json: compress_ratios has {len(ratios)} entries, expected one for each of {num_layers} layers",
            key="compress_ratios",
        )
    if unknown := set(ratios) - set(_RATIOS.values()):
        raise reader.unsupported(
            "compress_ratios", f"{', '.join(map(str, _RATIOS.values()))}, not {min(unknown)}"
        )
    if kinds is not None:
        return [_RATIOS[kind] for kind in kinds]
    return ratios[:num_layers] or [128 if layer < 2 or layer % 2 == 0 else 4 for layer in range(num_layers)]


def _read_hashed(reader: ConfigReader, num_layers: int, num_mtp: int) -> Sequence[bool]:
    """Read in which layers token ids choose the experts."""
    kinds = reader.layer_types(
        num_layers, ("hash_moe", "moe"), name="mlp_layer_types", num_mtp_layers=num_mtp
    )
    count = reader.optional_integer("num_hash_layers", default=_HASH_LAYERS, least=0)
    if kinds is not None:
        return [kind == "hash_moe" for kind in kinds]
    return [layer < (_HASH_LAYERS if count is None else count) for layer in range(num_layers)]


def read_attention(reader: ConfigReader, sizes: Common, *, query_rank: int) -> CompressedConfig:
    """Read what the mixers of all layers have, but the rotary embedding.

    Args:
        query_rank: the default.
    """
    num_heads, num_groups = sizes.attention["num_heads"], reader.integer("o_groups", default=8)
    if num_heads % num_groups:
        raise CheckpointError(
            f"config.json gives o_groups as {num_groups}, expected a divisor of the {num_heads} heads",
            key="o_groups",
        )
    reader.neutral("num_key_value_heads", 1)
    return CompressedConfig(
        num_heads=num_heads,
        head_dim=sizes.attention["head_dim"],
        query_rank=reader.integer("q_lora_rank", default=query_rank),
        num_groups=num_groups,
        output_rank=reader.integer("o_lora_rank", default=1024),
        sliding_window=reader.integer("sliding_window", default=128),
        norm_eps=sizes.model["norm_eps"],
        rope=None,
    )


def read_index(reader: ConfigReader, rope: RopeConfig, *, num_heads: int) -> EntryIndexConfig:
    """Read the sizes of indexers, whose queries and keys rotate by `rope`; `num_heads` is the default."""
    index = EntryIndexConfig(
        num_chosen=reader.integer("index_topk", default=512, most=MOST_CHOSEN),
        num_heads=reader.integer("index_n_heads", default=num_heads),
        head_dim=reader.integer("index_head_dim", default=128),
    )
    if index.head_dim < rope.rotary_dim:
        raise CheckpointError(
            f"config.json: index_head_dim is {index.head_dim}, less than the {rope.rotary_dim} dimensions that "
            "rotate (qk_rope_head_dim)",
            key="index_head_dim",
        )
    return index


def read_residual(reader: ConfigReader) -> SinkhornResidual:
    """Read the residual streams."""
    return SinkhornResidual(
        num_streams=reader.integer("hc_mult", default=4, least=2, most=16),
        iterations=reader.integer("hc_sinkhorn_iters", default=20, most=_MOST_ITERATIONS),
        eps=reader.number("hc_eps", 1e-6),
    )


def read_router(reader: ConfigReader) -> RouterConfig:
    """Read how experts are chosen and weighted."""
    reader.one_of("scoring_func", "sqrtsoftplus", ("sqrtsoftplus",))
    reader.one_of("topk_method", "noaux_tc", ("noaux_tc",))
    for key in ("n_group", "topk_group"):
        reader.neutral(key, 1, None)
    return RouterConfig(
        score="sqrt_softplus",
        has_choice_bias=True,
        renormalize_eps=RENORMALIZE_EPS,
        scale=reader.number("routed_scaling_factor", 1.5),
    )


def read_ropes(reader: ConfigReader, head_dim: int, context_tokens: int) -> tuple[RopeConfig, RopeConfig]:
    """Read the embeddings of layers without and with pools. Files give `qk_rope_head_dim`, or transformers' share of a
    head.
    """
    rope_dim = reader.optional_integer("qk_rope_head_dim")
    given = reader.optional_number("partial_rotary_factor")
    share = given or (64 / 512 if rope_dim is None else rope_dim / head_dim)
    if rope_dim is not None and int(head_dim * share) != rope_dim:
        raise CheckpointError(
            f"config.json gives qk_rope_head_dim as {rope_dim} and partial_rotary_factor as {given} of {head_dim} "
            "dimensions",
            key="qk_rope_head_dim",
        )
    theta = reader.number("compress_rope_theta", 160_000.0)
    parameters = reader.mapping("rope_parameters")
    if parameters is not None and {"main", "compress"} <= parameters.keys():
        reader.neutral("rope_scaling", None)
        reader.passed("rope_theta")  # the default of thetas that are given
        dims = {"main": head_dim, "compress": head_dim}
        ropes = read_ropes_of_layers(
            reader, dims, {"main": {}, "compress": {}}, default_partial=share, context_tokens=context_tokens
        )
        window, compressed = ropes["main"], ropes["compress"]
    else:
        scaled = read_rope(
            reader,
            head_dim=head_dim,
            context_tokens=context_tokens,
            default_theta=_DEFAULTS.rope_theta,
            default_partial=share,
        )
        window = RopeConfig(theta=scaled.theta, rotary_dim=scaled.rotary_dim, original_context=context_tokens)
        compressed = replace(scaled, theta=theta)
        if scaled.kind == "yarn":
            compressed = replace(compressed, attention_factor=scaled.attention_factor or 1.0)
    return replace(window, is_interleaved=True), replace(compressed, is_interleaved=True)
