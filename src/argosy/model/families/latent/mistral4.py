"""Mistral-Small-4 and Mistral-Large-3: latent attention whose queries grow with the position, and a softmax router.

A query, after its rotary embedding, is multiplied by 1 + beta ln(1 + floor(position / original context)).

Yarn stretches the frequencies here and nothing else: the makers' `params.json` says `apply_scale: false`, which is
`mscale` and `mscale_all_dim` 1 in a config.json. Mistral's code for vLLM leaves scores alone, and so did transformers
until July 2026. Since then transformers multiplies them by the square of DeepSeek-V3's magnitude, 2.2 for
Mistral-Small-4, as llama.cpp does; vLLM measured that this makes answers worse (vllm-project/vllm pull request 57563,
sgl-project/sglang 26203).

Elsewhere: `reading/mistral_params.py` translates `params.json`; `families/wrappers/mistral3.py` reads the model with
its vision tower.
"""

from __future__ import annotations

from collections.abc import Mapping

from argosy.config import LatentConfig, ModelConfig, QueryScale, RouterConfig
from argosy.model.families.latent import deepseek
from argosy.model.families.latent.deepseek import Defaults, read_latent_model
from argosy.model.families.latent.deepseek_gguf import open_gguf
from argosy.model.reading.config_reader import ConfigReader
from argosy.model.reading.experts_config import RENORMALIZE_EPS, read_kept_groups, require_groups
from argosy.model.reading.layout import Layout

__all__ = ["GGUF_ARCHITECTURE", "LAYOUTS", "MODEL_TYPE", "open_gguf", "parse_config"]

MODEL_TYPE = "mistral4"
GGUF_ARCHITECTURE = "mistral4"

_OWN_NAMES = {
    "attn_norm": "attention_norm.weight", "q": "attention.wq.weight", "k": "attention.wk.weight",
    "v": "attention.wv.weight", "q_down": "attention.wq_a.weight",
    "q_down_norm": "attention.q_a_norm.weight", "q_up": "attention.wq_b.weight",
    "kv_down": "attention.wkv_a_with_mqa.weight", "kv_norm": "attention.kv_a_norm.weight",
    "kv_up": "attention.wkv_b.weight", "o": "attention.wo.weight", "mlp_norm": "ffn_norm.weight",
    "router": "gate.weight", "gate": "feed_forward.w1.weight", "up": "feed_forward.w3.weight",
    "down": "feed_forward.w2.weight", "shared_gate": "shared_experts.w1.weight",
    "shared_up": "shared_experts.w3.weight", "shared_down": "shared_experts.w2.weight",
}  # fmt: skip
OWN_LAYOUT = Layout(  # Mistral's own names, also those of its models without experts
    layer_names=_OWN_NAMES,
    expert_names=("experts.{expert}.w1.weight", "experts.{expert}.w3.weight", "experts.{expert}.w2.weight"),
    prefix="",
    embed_name="tok_embeddings.weight",
    head_name="output.weight",
    passed_over=r"(vision_encoder|patch_merger|pre_mm_projector_norm|vision_language_adapter)\..*",
)
LAYOUTS = (*deepseek.LAYOUTS, OWN_LAYOUT)

_DEFAULTS = Defaults(
    vocab_size=131_072,
    hidden_size=4096,
    num_layers=36,
    num_heads=32,
    num_kv_heads=32,
    dense_width=12_288,
    expert_width=2048,
    num_experts=128,
    experts_per_token=4,
    num_shared_experts=1,
    first_dense_layers=0,
    context_tokens=1_048_576,
    query_rank=1024,
    kv_rank=256,
    nope_dim=64,
    value_dim=128,
    eos_id=2,
    bos_id=1,
)
_BETA = "llama_4_scaling_beta"
_ROPE: Mapping[str, object] = {
    "rope_type": "yarn", "rope_theta": 10_000.0, "factor": 128.0, "original_max_position_embeddings": 8192,
    "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
}  # fmt: skip


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read a `config.json`, or a translated `params.json`; an absent key gets the default of `Mistral4Config` in
    transformers 5.24.

    Raises:
        UnsupportedModel: a key or value asks for something that is not supported.
        CheckpointError: a key is missing, malformed, or contradicts another.
    """
    reader = ConfigReader(raw, MODEL_TYPE)
    config = read_text(reader)
    reader.passed("vision_config", "image_token_id")
    reader.finish()
    return config


def read_text(reader: ConfigReader, family: str = MODEL_TYPE) -> ModelConfig:
    """The text model that a config describes; the caller calls `finish()`."""
    reader.lift("rope_parameters", _BETA, "partial_rotary_factor", "max_position_embeddings", default=_ROPE)
    config = read_latent_model(reader, family=family, defaults=_DEFAULTS, read_router=_read_router)
    latent = config.latent
    assert latent is not None
    assert latent.rope is not None
    reader.neutral("rope_parameters.partial_rotary_factor", latent.rope_dim / latent.head_dim)
    reader.neutral("rope_parameters.max_position_embeddings", config.context_tokens)
    reader.neutral("sliding_window", None)
    beta = reader.optional_number(f"rope_parameters.{_BETA}")
    scale = None if beta is None else QueryScale(beta=beta, period=latent.rope.original_context)
    return config.with_mixers(LatentConfig, scale=0.0, query_scale=scale)


def _read_router(reader: ConfigReader, num_experts: int, experts_per_token: int) -> RouterConfig:
    renormalize = reader.flag("norm_topk_prob", True)
    groups = reader.optional_integer("n_group", default=1) or 1
    router = RouterConfig(
        score="softmax",
        num_groups=groups,
        kept_groups=read_kept_groups(reader, groups, 1),
        group_score="top2",
        renormalize=renormalize,
        renormalize_eps=RENORMALIZE_EPS if renormalize else 0.0,
        scale=reader.number("routed_scaling_factor", 1.0),
    )
    return require_groups(router, num_experts, experts_per_token)
