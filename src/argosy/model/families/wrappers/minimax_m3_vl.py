"""MiniMax-M3 (428B-A23B): block-sparse attention, and experts with gpt-oss's activation.

From the fourth layer on, an indexer chooses 16 blocks of 128 positions for the heads of each KV head; up to 2,048
positions, that is all of them. Norms store their weight minus one. The released files hold the settings of the indexer
in `sparse_attention_config`; transformers writes them as keys of their own. Layers for multi-token prediction are not
read. GGUF metadata have no keys for the activation: as a property of the weights, it is the released model's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.gguf import GgufFile
from argosy.config import (
    KV_BLOCK_TOKENS,
    ActivationConfig,
    AttentionConfig,
    BlockIndexConfig,
    LayerConfig,
    ModelConfig,
    RouterConfig,
)
from argosy.errors import CheckpointError
from argosy.model.families.attention import minimax_m2
from argosy.model.families.attention.minimax_m2 import read_rotary_dim
from argosy.model.families.attention.sigmoid_moe import open_sigmoid_gguf
from argosy.model.families.latent.deepseek import MOST_CHOSEN
from argosy.model.reading.common_config import CommonDefaults, parse_wrapper, read_common
from argosy.model.reading.config_reader import MOST_LAYERS, ConfigReader
from argosy.model.reading.experts_config import read_kinds
from argosy.model.reading.gguf_config import GgufConfigReader
from argosy.model.reading.layout import Layout

MODEL_TYPE = "minimax_m3_vl"
GGUF_ARCHITECTURE = "minimax-m3"

_HUB = minimax_m2.LAYOUTS[0]
LAYOUTS = (
    Layout(
        layer_names={
            **_HUB.layer_names,
            **{f"index_{name}": f"self_attn.index_{name}_proj.weight" for name in "qk"},
            **{f"index_{name}_norm": f"self_attn.index_{name}_norm.weight" for name in "qk"},
            **{name: f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")},
            **{
                f"shared_{name}": f"block_sparse_moe.shared_experts.{name}_proj.weight"
                for name in ("gate", "up", "down")
            },
        },
        expert_names=_HUB.expert_names,
        prefix="language_model.model.",
        head_name="language_model.lm_head.weight",
        passed_over=r"(vision_tower|multi_modal_projector|patch_merge_mlp|(language_model\.)?(model\.)?mtp)\..*",
    ),
)

_IN_GGUF = {
    "index_q": "indexer.q_proj.weight",
    "index_k": "indexer.k_proj.weight",
    "index_q_norm": "indexer.q_norm.weight",
}
_LIMIT, _ALPHA = 7.0, 1.702
# Keys of the tower and its projector, and placeholders of pictures and videos.
_MORE_KEYS = (
    "image_token_index", "video_token_index", "projector_hidden_size", "projector_hidden_act", "image_seq_length",
    "multimodal_projector_bias", "vision_feature_layer", "vision_feature_select_strategy", "process_image_mode",
    "img_token_compression_config", "image_grid_pinpoints",
)  # fmt: skip
_DEFAULTS = CommonDefaults(
    vocab_size=200_064, hidden_size=6144, num_heads=64, num_kv_heads=4, head_dim=128, rope_theta=5_000_000.0,
    norm_eps=1e-6, context_tokens=524_288, num_experts=128, experts_per_token=4, eos_id=200_020, bos_id=200_034,
    partial_rotary_factor=1.0, hidden_acts=("silu", "swigluoai"),
)  # fmt: skip
_NEUTRAL = {
    "use_gemma_norm": True, "attention_output_gate": False, "use_qk_norm": True, "qk_norm_type": "per_head",
    "scoring_func": "sigmoid", "use_routing_bias": True, "n_shared_experts": 1,
}  # fmt: skip


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read the text part of a `config.json`; absent keys get the defaults of `MiniMaxM3VLTextConfig` in transformers
    5.24.

    Raises:
        The same errors as `parse_wrapper`.
    """
    return parse_wrapper(raw, MODEL_TYPE, ("minimax_m3_vl_text",), _read_text, *_MORE_KEYS)


def _read_text(reader: ConfigReader) -> ModelConfig:
    common = read_common(reader, _DEFAULTS)
    num_layers = reader.integer("num_hidden_layers", default=60, most=MOST_LAYERS)
    for key, value in _NEUTRAL.items():
        reader.neutral(key, value)
    reader.passed("num_mtp_modules", "num_nextn_predict_layers", "mtp_transformer_layers")
    attention = AttentionConfig(**common.attention, qk_norm="head", is_causal=True)
    attention = replace(attention, rope=read_rotary_dim(reader, attention))
    networks = read_kinds(reader, "mlp_layer_types", "moe_layer_freq", ("dense", "sparse"), [1] * num_layers)
    if "sparse" not in networks:
        raise CheckpointError(
            f"config.json leaves none of the {num_layers} layers with routed experts", key="moe_layer_freq"
        )
    return ModelConfig(
        family=MODEL_TYPE,
        layers=tuple(
            LayerConfig(mixer=mixer, is_moe=network == "sparse")
            for mixer, network in zip(_read_mixers(reader, attention, num_layers), networks, strict=True)
        ),
        expert_width=reader.integer("intermediate_size", default=3072),
        router=RouterConfig(
            score="sigmoid", has_choice_bias=True, scale=reader.number("routed_scaling_factor", 2.0)
        ),
        activation=ActivationConfig(
            kind="clamped",
            limit=reader.number("swiglu_limit", _LIMIT),
            alpha=reader.number("swiglu_alpha", _ALPHA),
        ),
        dense_width=reader.integer("dense_intermediate_size", default=12_288),
        shared_width=reader.integer("shared_intermediate_size", default=3072),
        norm_offset=1.0,
        **common.model,
    )


def _read_mixers(
    reader: ConfigReader, attention: AttentionConfig, num_layers: int
) -> tuple[AttentionConfig, ...]:
    """Read which layers have an indexer, and its sizes: the hub's keys win over those that transformers writes."""
    sparse = ConfigReader(
        reader.mapping("sparse_attention_config") or {}, MODEL_TYPE, within="sparse_attention_config"
    )
    sparse.neutral("use_sparse_attention", True)
    sparse.neutral("sparse_score_type", "max")
    sparse.neutral("sparse_init_block", 0)

    def size(hub: str, own: str, default: int) -> int:
        return sparse.integer(f"sparse_{hub}", default=reader.integer(f"index_{own}", default=default))

    num_heads = size("num_index_heads", "n_heads", 4)
    index = BlockIndexConfig(
        num_chosen=size("topk_blocks", "topk_blocks", 16),
        block_size=size("block_size", "block_size", 128),
        num_local=size("local_block", "local_blocks", 1),
        head_dim=size("index_dim", "head_dim", 128),
    )
    numbers = sparse.integers("sparse_attention_freq", least=0, most=1) or [0] * num_layers
    names = ("full_attention", "minimax_m3_sparse")
    kinds = reader.layer_types(num_layers, names) or tuple(names[number] for number in numbers)
    if len(kinds) != num_layers:
        raise CheckpointError(
            f"config.json: sparse_attention_freq has {len(kinds)} entries, expected {num_layers}",
            key="sparse_attention_freq",
        )
    without_value = sparse.integers("sparse_disable_index_value", least=0, most=1) or [1] * num_layers
    if any(kind == names[1] and not off for kind, off in zip(kinds, without_value, strict=False)):
        raise sparse.unsupported("sparse_disable_index_value", "1 in every layer with an indexer")
    sparse.finish()
    if num_heads != attention.num_kv_heads:
        raise sparse.unsupported(
            "sparse_num_index_heads", f"{attention.num_kv_heads}, as num_key_value_heads"
        )
    _require_index(index, attention)
    own = replace(attention, index=index)
    return tuple(own if kind == names[1] else attention for kind in kinds)


def _require_index(index: BlockIndexConfig, attention: AttentionConfig) -> None:
    """Refuse sizes that the attention cannot have.

    Raises:
        CheckpointError: names the size.
    """
    rotary_dim = attention.rope.rotary_dim if attention.rope is not None else 0
    for name, value, is_right, expected in (
        (
            "index dimensions",
            index.head_dim,
            index.head_dim >= rotary_dim,
            f"at least {rotary_dim}, which rotate",
        ),
        (
            "positions of an index block",
            index.block_size,
            index.block_size % KV_BLOCK_TOKENS == 0 and index.block_size <= 8192,
            f"a multiple of {KV_BLOCK_TOKENS} up to 8192",
        ),
        (
            "positions in the blocks that an indexer chooses",
            index.num_positions,
            index.num_positions <= MOST_CHOSEN,
            f"up to {MOST_CHOSEN}",
        ),
        (
            "local blocks",
            index.num_local,
            index.num_local <= index.num_chosen,
            f"at most the {index.num_chosen} that a token sees",
        ),
    ):
        if not is_right:
            raise CheckpointError(
                f"the model has {value} {name}, expected {expected}", key="index_block_size"
            )


def open_gguf(file: GgufFile) -> ModelFiles:
    """Open a GGUF file of architecture `minimax-m3`, in which layers with experts have the indexer. Raises what
    `open_sigmoid_gguf` raises.
    """
    return open_sigmoid_gguf(file, GGUF_ARCHITECTURE, MODEL_TYPE, names=_IN_GGUF, complete=_complete)


def _complete(reader: GgufConfigReader, config: ModelConfig) -> ModelConfig:
    attention = replace(config.attention, is_causal=True)
    index = BlockIndexConfig(
        num_chosen=reader.integer("attention.indexer.top_k"),
        block_size=reader.integer("attention.indexer.block_size"),
        num_local=reader.integer("attention.indexer.local_blocks"),
        head_dim=reader.integer("attention.indexer.key_length"),
    )
    reader.neutral("attention.indexer.head_count", attention.num_kv_heads)
    _require_index(index, attention)
    sparse = replace(attention, index=index)
    layers = (replace(one, mixer=sparse if one.is_moe else attention) for one in config.layers)
    activation = ActivationConfig(kind="clamped", limit=_LIMIT, alpha=_ALPHA)
    return replace(config, layers=tuple(layers), activation=activation)
