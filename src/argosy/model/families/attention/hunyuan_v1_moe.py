"""Hunyuan-A13B (80B-A13B, Tencent): heads of q and k are normed after they rotate, and each layer has a shared expert.

A rotary embedding "dynamic" with `alpha` has a constant NTK factor, which multiplies theta. Keys may give a number for
each layer, all the same. All experts have `intermediate_size`, as in transformers; the makers' code reads another key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.gguf import GgufFile
from argosy.config import AttentionConfig, LayerConfig, ModelConfig, RouterConfig
from argosy.model.families.attention.qwen_moe import make_layouts
from argosy.model.reading.common_config import CommonDefaults, read_common
from argosy.model.reading.config_reader import MOST_LAYERS, ConfigReader
from argosy.model.reading.gguf_config import SOFTMAX, GgufConfigReader
from argosy.model.reading.gguf_layout import read_gguf_layout

MODEL_TYPE = "hunyuan_v1_moe"
OTHER_TYPES = ("hunyuan",)  # of the first release
GGUF_ARCHITECTURE = "hunyuan-moe"
LAYOUTS = make_layouts({
    "q_norm": "self_attn.query_layernorm.weight",
    "k_norm": "self_attn.key_layernorm.weight",
    "router": "mlp.gate.wg.weight",
    **{f"shared_{name}": f"mlp.shared_mlp.{name}_proj.weight" for name in ("gate", "up", "down")},
})  # fmt: skip
_DEFAULTS = CommonDefaults(
    vocab_size=290_943, hidden_size=4096, num_heads=32, num_kv_heads=None, rope_theta=10_000.0, norm_eps=1e-5,
    context_tokens=2048, num_experts=1, experts_per_token=1, eos_id=2, bos_id=1,
)  # fmt: skip
_BY_LAYER = ("num_experts", "moe_topk", "moe_intermediate_size", "num_shared_expert")
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "norm_topk_prob": (True,), "norm_type": ("rms",), "num_shared_expert": (1,), "xdrope_section": (None,),
    "routed_scaling_factor": (1, None, False), "use_mixed_mlp_moe": (True,), "use_qk_norm": (True,),
    "use_rotary_pos_emb": (True,), "use_cla": (False,), "use_mla": (False,), "group_limited_greedy": (False,),
    "add_classification_head": (False,), "n_group": (None, 1), "topk_group": (None, 1), "moe_layer_num_skipped": (0,),
    **dict.fromkeys(("moe_drop_tokens", "moe_random_routing_dropped_token", "position_embedding_xdrope"), (False,)),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), (None,)),
}  # fmt: skip
_OF_OTHER_PARTS = (
    "vit_", "anyres_", "im_", "video_", "image_token_id", "text_start_id", "text_end_id", "mask_init_id", "pool_type",
    "num_media_embeds", "class_num", "dense_list", "org_vocab_size", "pad_id", "eod_token_id", "skip_cls_token",
    "cla_share_factor",
)  # fmt: skip


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read a `config.json`; an absent key gets the default of `HunYuanMoEV1Config` in transformers 5.24.

    Raises:
        UnsupportedModel: a key or value asks for something that is not supported.
        CheckpointError: a key is missing, malformed, or contradicts another.
    """
    numbers = {name: values for name in _BY_LAYER if isinstance(values := raw.get(name), list)}
    for name, each in numbers.items():
        if not each or each != each[:1] * len(each) or len(each) != raw.get("num_hidden_layers", 32):
            raise ConfigReader(raw, MODEL_TYPE).unsupported(name, "the same number in every layer")
    first = {name: values[0] for name, values in numbers.items()}
    aliases = {"moe_topk": "num_experts_per_tok", "attention_head_dim": "head_dim"}
    reader = ConfigReader({**raw, **first}, MODEL_TYPE, aliases=aliases)
    theta_factor = _read_alpha(reader)
    common = read_common(reader, _DEFAULTS)
    width = reader.integer("intermediate_size", default=11_008)
    reader.neutral("moe_intermediate_size", width, None)
    for name, accepted in _NEUTRAL.items():
        reader.neutral(name, *accepted)
    reader.passed(*(name for name in raw if name.startswith(_OF_OTHER_PARTS)))
    dim, rope = common.attention["head_dim"], common.attention["rope"]
    scaled = replace(rope, theta=rope.theta * theta_factor ** (dim / max(dim - 2, 1)))
    has_bias = reader.flag("attention_bias", False)
    heads = common.attention | {"rope": scaled, "has_qkv_bias": has_bias, "has_o_bias": has_bias}
    num_layers = reader.integer("num_hidden_layers", default=32, most=MOST_LAYERS)
    reader.finish()
    return _model(heads, num_layers, width, common.model)


def open_gguf(file: GgufFile) -> ModelFiles:
    """Open a GGUF file of architecture `hunyuan-moe`, whose theta is scaled already. Raises as `parse_config` does."""
    reader = GgufConfigReader(file, GGUF_ARCHITECTURE)
    common, width = reader.common(), reader.integer("feed_forward_length")
    for name in ("expert_feed_forward_length", "expert_shared_feed_forward_length"):
        reader.neutral(name, width)
    reader.neutral("expert_shared_count", 1)
    reader.neutral("expert_gating_func", 0, SOFTMAX)
    reader.neutral("expert_weights_norm", True)  # llama.cpp always does
    config = _model(common.attention, reader.num_layers(), width, common.model)
    reader.finish()
    return read_gguf_layout(file, config, is_paired=False, has_rope_freqs=False)


def _read_alpha(reader: ConfigReader) -> float:
    """Take kind and `alpha` out of the rotary embedding; its other numbers are ignored, as by the makers' code."""
    name = "rope_parameters" if reader.has("rope_parameters") else "rope_scaling"
    ignored = ("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
    reader.lift(name, "type", "rope_type", "alpha", *ignored, default={})
    reader.passed(*(f"{name}.{key}" for key in ignored))
    kinds = {
        reader.one_of(f"{name}.{key}", "default", ("default", "dynamic")) for key in ("type", "rope_type")
    }
    if ("dynamic" in kinds) != reader.has(f"{name}.alpha"):
        raise reader.unsupported(f"{name}.alpha", "a number with kind 'dynamic', none with kind 'default'")
    if (alpha := reader.number(f"{name}.alpha", 1.0)) <= 1e9:
        return alpha
    raise reader.unsupported(f"{name}.alpha", "at most 1e9")


def _model(heads: Mapping[str, Any], num_layers: int, width: int, common: Mapping[str, Any]) -> ModelConfig:
    layer = LayerConfig(mixer=AttentionConfig(**heads, qk_norm="head", is_norm_last=True), is_moe=True)
    return ModelConfig(
        family=MODEL_TYPE,
        layers=(layer,) * num_layers,
        expert_width=width,
        router=RouterConfig(),
        shared_width=width,
        **common,
    )
