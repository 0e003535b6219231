"""GLM-5.3-Flash: three layers of Kimi Delta Attention, then one of latent attention, on four residual streams.

Latent attention has no rotary embedding; its norms have the model's epsilon. An indexer chooses pools of positions for
it, `index_topk` positions in all, and it sees the unfinished pool too. Sinkhorn's weights mix the streams
(arXiv:2512.24880), and the final norm reads their mean. `config.json` is a wrapper with the text model in
`text_config`; the tower is in `model/encoders/glm_vision.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.gguf import GgufFile
from argosy.config import (
    KV_BLOCK_TOKENS,
    ActivationConfig,
    IndexConfig,
    KimiDeltaConfig,
    LatentConfig,
    LayerConfig,
    ModelConfig,
    SinkhornResidual,
)
from argosy.errors import CheckpointError
from argosy.model.families.latent.deepseek import (
    INDEX_NORM_EPS,
    LAYER_NAMES,
    MOST_CHOSEN,
    Defaults,
    read_latent_model,
)
from argosy.model.families.latent.deepseek_gguf import read_latent
from argosy.model.families.latent.glm_moe_dsa import read_index_kinds
from argosy.model.families.recurrent.kimi_delta import (
    DELTA_NAMES,
    GGUF_NAMES,
    read_floor,
    read_router,
    with_delta_layers,
)
from argosy.model.reading.common_config import parse_wrapper
from argosy.model.reading.config_reader import ConfigReader
from argosy.model.reading.experts_config import (
    layers_by_type,
    read_dense_layers,
    read_sigmoid_router,
    require_groups,
)
from argosy.model.reading.gguf_config import SIGMOID, GgufConfigReader
from argosy.model.reading.gguf_layout import read_gguf_layout
from argosy.model.reading.layout import separate_and_fused

__all__ = ["GGUF_ARCHITECTURE", "LAYOUTS", "MODEL_TYPE", "open_gguf", "parse_config"]

MODEL_TYPE = "glm5_next"
GGUF_ARCHITECTURE = "glm5-next"

_MIXES = {
    f"{part}_mix{ours}": f"hc_{name}_{theirs}"
    for part, name in (("attn", "attn"), ("mlp", "ffn"))
    for ours, theirs in (("", "fn"), ("_bias", "base"), ("_scale", "scale"))
}
LAYOUTS = tuple(
    replace(
        layout,
        prefix="model.language_model.",
        passed_over=r"model\.visual\..*",
    )
    for layout in separate_and_fused(
        {
            **LAYER_NAMES,
            **{name: "self_attn." + in_file for name, in_file in DELTA_NAMES.items()},
            "kda_decay_down": "self_attn.f_a_proj.weight",
            "kda_decay": "self_attn.f_b_proj.weight",
            "kda_gate_down": "self_attn.g_a_proj.weight",
            "kda_gate": "self_attn.g_b_proj.weight",
            "index_gate": "self_attn.indexer.index_kpool_compress_gate",
            "index_gate_bias": "self_attn.indexer.index_kpool_compress_ape",
            **_MIXES,
        }
    )
)

_DEFAULTS = Defaults(
    vocab_size=154_880, hidden_size=4096, num_layers=45, num_heads=64, num_kv_heads=64, dense_width=12_288,
    norm_eps=1e-5, expert_width=2048, num_experts=288, experts_per_token=8, num_shared_experts=1, first_dense_layers=3,
    nope_dim=256, rope_dim=0, value_dim=256, query_rank=1536, context_tokens=1_048_576, eos_id=154_820, bos_id=None,
)  # fmt: skip
_SIZES = (
    ("num_heads", "linear_num_heads", 64), ("head_dim", "linear_head_dim", 128),
    ("short_conv_kernel_size", "linear_conv_kernel_dim", 4),
)  # fmt: skip
_OF_THE_INDEXER = ("indexer_rope_interleave", "index_kpool_compress", "index_share_for_mtp_iteration")
_TOKEN_KEYS = ("image_start_token_id", "image_end_token_id", "video_start_token_id", "video_end_token_id")


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read the text part of a `config.json`, as `Glm5NextTextConfig` in transformers 5.24 does.

    Raises:
        The same errors as `parse_wrapper`.
    """
    text = raw.get("text_config")
    if isinstance(text, Mapping) and text.get("head_dim") == 0:  # that of the rotary embedding, which is none
        raw = {**raw, "text_config": {key: value for key, value in text.items() if key != "head_dim"}}
    return parse_wrapper(raw, MODEL_TYPE, ("glm5_next_text",), _read_text, *_TOKEN_KEYS)


def _read_text(reader: ConfigReader) -> ModelConfig:
    config = read_latent_model(
        reader,
        family=MODEL_TYPE,
        defaults=_DEFAULTS,
        read_router=read_sigmoid_router(scale=2.5, num_groups=1, kept_groups=1),
        read_moe_layers=layers_by_type(_DEFAULTS.first_dense_layers),
        read_indexers=_read_indexers,
    )
    reader.neutral("mla_use_nope", True)
    reader.neutral("mhc", True)
    reader.neutral("moe_router_dtype", "float32")
    reader.passed(*_OF_THE_INDEXER)
    config = config.with_mixers(LatentConfig, rope=None, scale=0.0, norm_eps=config.norm_eps)
    is_delta = [kind == "linear_attention" for kind in _kinds(reader, config.num_layers)]
    config = replace(
        config,
        activation=ActivationConfig(kind="silu_limited", limit=reader.number("swiglu_limit", 10.0)),
        residual=SinkhornResidual(
            num_streams=reader.integer("hc_mult", default=4, least=2, most=16),
            iterations=reader.integer("hc_sinkhorn_iters", default=20, most=1000),
            eps=reader.number("hc_eps", 1e-6),
            head="mean",
        ),
        draft_form=None,
    )
    config = with_delta_layers(config, _read_delta(reader), is_delta)
    if config.latent is not None and config.latent.own_index is None:
        raise CheckpointError(
            "config.json: the first layer with latent attention shares the choice of an earlier one, and there is none",
            key="indexer_types",
        )
    return config


def _kinds(reader: ConfigReader, num_layers: int) -> tuple[str, ...]:
    latent = ("indexed_attention", "full_attention", "deepseek_sparse_attention")
    kinds = reader.layer_types(num_layers, ("linear_attention", *latent))
    default = ("linear_attention", "linear_attention", "linear_attention", "indexed_attention")
    return kinds or tuple(default[layer % 4] for layer in range(num_layers))


def _read_indexers(reader: ConfigReader, num_layers: int) -> tuple[IndexConfig, ...]:
    pool = reader.integer("index_kpool", default=16, most=MOST_CHOSEN)
    if pool < 2 or (KV_BLOCK_TOKENS % pool and pool % KV_BLOCK_TOKENS):
        raise reader.unsupported(
            "index_kpool", f"2 to {MOST_CHOSEN}, and a divisor or a multiple of {KV_BLOCK_TOKENS}"
        )
    reader.neutral("index_kpool_always_select_tail", True)
    chosen = reader.integer("index_topk", default=2048, most=MOST_CHOSEN)
    if chosen % pool:
        raise reader.unsupported("index_topk", f"a multiple of index_kpool, {pool}")
    own = IndexConfig(
        num_chosen=chosen,
        num_heads=reader.integer("index_n_heads", default=32),
        head_dim=reader.integer("index_head_dim", default=128),
        is_interleaved=False,
        norm_eps=INDEX_NORM_EPS,
        group_size=pool,
    )
    shared = replace(own, kind="shared")
    return tuple(own if kind == "full" else shared for kind in read_index_kinds(reader, num_layers))


def _read_delta(reader: ConfigReader) -> KimiDeltaConfig:
    """Read the sizes of Kimi Delta Attention from `linear_attn_config`, or the keys that transformers writes."""
    linear = reader.nested("linear_attn_config", MODEL_TYPE) if reader.has("linear_attn_config") else None
    sizes = []
    for name, again, default in _SIZES:
        size = reader.integer(again, default=default)
        if linear is not None and linear.has(name):
            size = linear.integer(name, default=default)
            reader.neutral(again, size)
        sizes.append(size)
    floor = reader.negative_number("linear_lower_bound", -5.0)
    if linear is not None:
        floor = linear.negative_number("gate_lower_bound", floor)
        linear.neutral("safe_gate", True)
        linear.passed("kda_layers", "full_attn_layers")  # layer_types says the same
        linear.finish()
    heads, dim, width = sizes
    return KimiDeltaConfig(
        num_heads=heads, head_dim=dim, conv_width=width, decay_rank=dim, gate_rank=dim, floor=floor
    )


def _read_activation(reader: GgufConfigReader) -> ActivationConfig:
    limits = {*reader.limits("swiglu_clamp_exp"), *reader.limits("swiglu_clamp_shexp")}
    if len(limits) != 1 or 0 in limits:
        raise reader.unsupported("swiglu_clamp_exp", sorted(limits), "one limit above zero for all layers")
    return ActivationConfig(kind="silu_limited", limit=limits.pop())


def _read_gguf_indexer(reader: GgufConfigReader) -> IndexConfig:
    pool = reader.integer("attention.indexer.kpool", most=MOST_CHOSEN)
    if pool < 2 or (KV_BLOCK_TOKENS % pool and pool % KV_BLOCK_TOKENS):
        expected = f"2 to {MOST_CHOSEN}, and a divisor or a multiple of {KV_BLOCK_TOKENS}"
        raise reader.unsupported("attention.indexer.kpool", pool, expected)
    reader.neutral("attention.indexer.kpool_select_tail", True)
    index = IndexConfig(
        num_chosen=reader.integer("attention.indexer.top_k", most=MOST_CHOSEN),
        num_heads=reader.integer("attention.indexer.head_count"),
        head_dim=reader.integer("attention.indexer.key_length"),
        is_interleaved=False,
        norm_eps=INDEX_NORM_EPS,
        group_size=pool,
    )
    if index.num_chosen % pool:
        raise reader.unsupported("attention.indexer.top_k", index.num_chosen, f"a multiple of {pool}")
    return index


def open_gguf(file: GgufFile) -> ModelFiles:
    """The model in a GGUF file of architecture `glm5-next`.

    Raises:
        UnsupportedModel: a key, value or tensor type that is not supported.
        CheckpointError: a key or tensor is missing, malformed, or contradicts another.
    """
    reader = GgufConfigReader(file, GGUF_ARCHITECTURE)
    sizes = reader.sizes()
    num_layers = reader.num_layers()
    kv_heads, has_latent = reader.attention_layers()
    if kv_heads != 1:
        raise reader.unsupported("attention.head_count_kv", kv_heads, "1 in layers with latent attention")
    num_heads, dim = reader.integer("attention.head_count"), reader.integer("kda.head_dim")
    delta = KimiDeltaConfig(
        num_heads=num_heads,
        head_dim=dim,
        conv_width=reader.integer("ssm.conv_kernel", most=64),
        decay_rank=dim,
        gate_rank=dim,
        floor=read_floor(reader) if reader.has("kda.gate_lower_bound") else 0.0,
        is_rate_log=False,
    )
    reader.number("attention.layer_norm_epsilon", INDEX_NORM_EPS)
    index = _read_gguf_indexer(reader)
    is_own = reader.flags("attention.indexer.types", num_layers) or (True,) * num_layers
    latent = read_latent(reader, num_heads, sizes["context_tokens"], is_everywhere=False)
    latent = replace(latent, norm_eps=sizes["norm_eps"], index=index)
    shared = replace(latent, index=replace(index, kind="shared"))
    num_dense = read_dense_layers(reader, num_layers)
    expert_width = reader.integer("expert_feed_forward_length")
    config = ModelConfig(
        family=MODEL_TYPE,
        layers=tuple(
            LayerConfig(
                mixer=(latent if is_own[layer] else shared) if is_latent else delta, is_moe=layer >= num_dense
            )
            for layer, is_latent in enumerate(has_latent)
        ),
        expert_width=expert_width,
        router=require_groups(
            read_router(reader, is_kimi=False, default=SIGMOID),
            sizes["num_experts"],
            sizes["experts_per_token"],
        ),
        activation=_read_activation(reader),
        dense_width=reader.integer("feed_forward_length"),
        shared_width=reader.integer("expert_shared_count") * expert_width,
        draft_form=None,
        num_mtp_layers=reader.num_mtp_layers(),
        residual=SinkhornResidual(
            num_streams=reader.integer("hyper_connection.count", least=2, most=16),
            iterations=reader.integer("hyper_connection.sinkhorn_iterations", most=1000),
            eps=reader.number("hyper_connection.epsilon"),
            head="mean",
        ),
        **sizes,
    )
    reader.finish()
    names = GGUF_NAMES | {f"{name}": f"{in_file}.weight" for name, in_file in _MIXES.items()}
    names |= {"kda_decay_down": "ssm_f_a.weight", "kda_gate_down": "ssm_g_a.weight"}
    names |= {"kda_decay": "ssm_f_b.weight", "kda_gate": "ssm_g_b.weight"}
    return read_gguf_layout(
        file,
        config,
        is_paired=False,
        has_rope_freqs=False,
        names=names,
    )
