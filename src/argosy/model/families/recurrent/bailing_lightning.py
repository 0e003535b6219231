"""Ling and Ring 2.5 and 2.6 (flash 104B-A7.4B, 1T-A63B): lightning attention, and latent attention in the last layer of
a group. They have the `model_type` of Ling-3, and are known by their `architectures`.

Routers, shared experts and the layer for multi-token prediction, which only drafts, are DeepSeek-V3's. The slopes of
layer l, counted from 0, have the factor 1 - l / (layers - 1) + 1e-5: so they are in the makers' code for training, in
SGLang, vLLM and mlx-lm. The makers' modeling_bailing_moe_v2_5.py has l - 1, which is training's formula with its layers
counted from 1. Compressed vectors are normed with `rms_norm_eps`, as there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from argosy.config import LatentConfig, ModelConfig
from argosy.model.families.latent.deepseek import Defaults, read_latent_model
from argosy.model.families.recurrent.lightning import with_lightning_layers
from argosy.model.reading.config_reader import ConfigReader
from argosy.model.reading.experts_config import layers_behind_the_dense, read_sigmoid_router

ARCHITECTURES = ["BailingMoeV2_5ForCausalLM"]

_ALIASES = {"num_shared_experts": "n_shared_experts"}

# Of the released config of Ling-2.6-flash.
_DEFAULTS = Defaults(
    vocab_size=157_184, hidden_size=4096, num_layers=32, num_heads=32, num_kv_heads=32, dense_width=9216,
    expert_width=1024, num_experts=256, experts_per_token=8, num_shared_experts=1, first_dense_layers=1,
    context_tokens=131_072, query_rank=None, nope_dim=128, value_dim=128, rope_theta=6_000_000.0, eos_id=156_892,
    bos_id=None,
)  # fmt: skip

# Keys with the only value that the released files have, or that changes nothing.
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "moe_router_enable_expert_bias": (True,), "norm_head": (False,), "norm_softmax": (False,),
    "norm_topk_prob": (True, None), "router_dtype": ("fp32",), "score_function": ("sigmoid",), "use_bias": (False,),
    "use_rmsnorm": (True,), "use_sliding_window": (False,),
}  # fmt: skip


def read_ling_2_5(raw: Mapping[str, object], family: str) -> ModelConfig:
    """Read a `config.json`; an absent key gets the value of Ling-2.6-flash.

    Raises:
        UnsupportedModel: a key or value asks for something that is not supported.
        CheckpointError: a key is missing, malformed, or contradicts another.
    """
    own = ConfigReader(raw, family)
    head_dim = own.integer("head_dim", default=128)  # of lightning attention
    share = own.number("partial_rotary_factor", 0.5)  # of its dimensions that rotate
    elsewhere = ("head_dim", "partial_rotary_factor")
    reader = ConfigReader({k: v for k, v in raw.items() if k not in elsewhere}, family, aliases=_ALIASES)
    for name, accepted in _NEUTRAL.items():
        reader.neutral(name, *accepted)
    reader.passed("max_window_layers", "embedding_dropout", "output_dropout", "mtp_loss_scaling_factor")
    config = read_latent_model(
        reader,
        family=family,
        defaults=_DEFAULTS,
        read_router=read_sigmoid_router(1.0, 8, 4),
        read_moe_layers=layers_behind_the_dense(_DEFAULTS.first_dense_layers),
    )
    latent = config.latent
    assert latent is not None
    assert latent.rope is not None
    reader.neutral("moe_shared_expert_intermediate_size", config.expert_width)
    rotary_dim = int(head_dim * share)
    if share > 1 or rotary_dim % 2 or not rotary_dim:
        raise own.unsupported(
            "partial_rotary_factor", f"a share of {head_dim} dimensions that is an even number of them"
        )
    reader.neutral("rotary_dim", rotary_dim)
    config = with_lightning_layers(
        reader,
        replace(config.with_mixers(LatentConfig, norm_eps=config.norm_eps), draft_form="ling"),
        num_heads=latent.num_heads,
        head_dim=head_dim,
        rope=replace(latent.rope, rotary_dim=rotary_dim, is_interleaved=False),
        has_qk_norm=reader.flag("use_qk_norm", True),
        numbered_from=0,
    )
    reader.finish()
    return config
