"""Command-A-plus and North-Mini-Code (Cohere): the network reads what attention reads, after one norm.

Layers with a window rotate adjacent pairs; the others rotate nothing, except dense layers at the beginning. Experts are
weighted by the softmax of the chosen logits, or by sigmoids. What routed and shared experts add is averaged, or added.
A config with `rms_norm_eps` has RMSNorm, otherwise LayerNorm without a bias.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from argosy.config import AttentionConfig, ModelConfig, RouterConfig
from argosy.model.families.attention.cohere2_moe_gguf import GGUF_ARCHITECTURE, layers_of, open_gguf
from argosy.model.families.windows.windowed import kinds_by_turns, read_networks, read_window
from argosy.model.reading.common_config import CommonDefaults, read_common
from argosy.model.reading.config_reader import MOST_LAYERS, ConfigReader
from argosy.model.reading.experts_config import read_mtp_layers
from argosy.model.reading.layout import ATTENTION_NAMES, separate_and_fused

__all__ = ["GGUF_ARCHITECTURE", "LAYOUTS", "MODEL_TYPE", "open_gguf", "parse_config"]

MODEL_TYPE = "cohere2_moe"

LAYOUTS = separate_and_fused(
    {
        **ATTENTION_NAMES,
        "router": "mlp.gate.weight",
        **{part: f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")},
        **{f"shared_{part}": f"mlp.shared_experts.{part}_proj.weight" for part in ("gate", "up", "down")},
    }
)

_DEFAULTS = CommonDefaults(
    vocab_size=256_000, hidden_size=8192, num_heads=64, num_kv_heads=None, head_dim=128, rope_theta=10_000.0,
    norm_eps=1e-5, norm_eps_name="layer_norm_eps", context_tokens=8192, num_experts=8, experts_per_token=2,
    eos_id=255_001, bos_id=5, is_embedding_tied=True,
)  # fmt: skip
# Keys with the only value that changes nothing.
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "position_embedding_type": ("rope_gptj",), "rotary_pct": (1.0,), "use_embedding_sharing": (True,),
    "use_gated_activation": (True,), "use_parallel_block": (True,), "use_qk_norm": (False,),
}  # fmt: skip


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read a `config.json`, as `Cohere2MoeConfig` in transformers 5.24 does; raises the errors of `parse_wrapper`."""
    reader = ConfigReader(
        {k: v for k, v in raw.items() if (k, v) != ("tie_word_embeddings", None)}, MODEL_TYPE
    )
    for name, accepted in _NEUTRAL.items():
        reader.neutral(name, *accepted)
    reader.passed(
        "cache_implementation", "order_of_interleaved_layers", "layer_switch", "use_parallel_embedding"
    )
    is_rms = reader.optional_number("rms_norm_eps") is not None
    reader.passed("layer_norm_eps", "rms_norm_eps")
    common = read_common(reader, replace(_DEFAULTS, norm_eps_name="rms_norm_eps") if is_rms else _DEFAULTS)
    num_layers = reader.integer("num_hidden_layers", default=40, most=MOST_LAYERS)
    num_dense = reader.integer("first_k_dense_replace", default=0, least=0, most=num_layers)
    is_moe = read_networks(reader, num_layers, num_dense)
    of_dense = reader.integer("prefix_dense_sliding_window_pattern", default=1)
    period = reader.integer("sliding_window_pattern", "_sliding_window_pattern", default=4)
    kinds = reader.layer_types(num_layers) or (
        *kinds_by_turns(num_dense, of_dense),
        *kinds_by_turns(num_layers - num_dense, period),
    )
    has_bias = reader.flag("attention_bias", False)
    attention = AttentionConfig(
        **{**common.attention, "rope": replace(common.attention["rope"], is_interleaved=True)},
        sliding_window=read_window(reader, kinds, 4096),
        has_qkv_bias=has_bias,
        has_o_bias=has_bias,
    )
    is_sigmoid = reader.one_of("expert_selection_fn", "softmax", ("softmax", "sigmoid")) == "sigmoid"
    renormalize = reader.flag("norm_topk_prob", True) or not is_sigmoid
    width = reader.integer("intermediate_size", default=22_528)
    strategy = reader.one_of("shared_expert_combination_strategy", "average", ("average", "sum"))
    num_shared = reader.integer("num_shared_experts", default=0, least=0)
    config = ModelConfig(
        family=MODEL_TYPE,
        layers=layers_of(kinds, is_moe, attention, dense_rotate=of_dense == 1),
        expert_width=width,
        router=RouterConfig(score="sigmoid" if is_sigmoid else "softmax", renormalize=renormalize),
        dense_width=reader.optional_integer("prefix_dense_intermediate_size") or width,
        shared_width=num_shared * width,
        shared_is_averaged=num_shared > 0 and strategy == "average",
        norm_kind="rms" if is_rms else "layer",
        is_parallel=True,
        logit_scale=reader.number("logit_scale", 0.0625),
        num_mtp_layers=read_mtp_layers(reader, 0),
        **common.model,
    )
    reader.finish()
    return config
