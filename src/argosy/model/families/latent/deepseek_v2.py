"""DeepSeek-V2, V2-Lite and V2.5 (arXiv:2405.04434): latent attention; softmax routing among all or the best groups.

Routing weights are the unchanged probabilities of the chosen experts, times `routed_scaling_factor`. With
`norm_topk_prob`, DeepSeek's own code divides by their sum and omits the factor, while transformers 5.24 ignores the
key; no released model sets it, and it is refused here.
"""

from __future__ import annotations

from collections.abc import Mapping

from argosy.config import ModelConfig, RouterConfig
from argosy.model.families.latent.deepseek import LAYOUTS, Defaults, read_latent_model
from argosy.model.families.latent.deepseek_gguf import GGUF_ARCHITECTURE, open_gguf
from argosy.model.reading.config_reader import ConfigReader
from argosy.model.reading.experts_config import read_kept_groups, require_groups

__all__ = ["GGUF_ARCHITECTURE", "LAYOUTS", "MODEL_TYPE", "open_gguf", "parse_config", "read_router"]

MODEL_TYPE = "deepseek_v2"

_DEFAULTS = Defaults(
    vocab_size=102_400,
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=None,
    dense_width=11_008,
    expert_width=1407,
    num_experts=64,
    experts_per_token=None,
    num_shared_experts=2,
    first_dense_layers=0,
    context_tokens=2048,
    query_rank=1536,
    nope_dim=128,
    value_dim=128,
    eos_id=2,
    bos_id=1,
)


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read a `config.json`; an absent key gets the default of `DeepseekV2Config` in transformers 5.24.

    Raises:
        UnsupportedModel: a key or value asks for something that is not supported.
        CheckpointError: a key is missing, malformed, or contradicts another.
    """
    reader = ConfigReader(raw, MODEL_TYPE)
    config = read_latent_model(reader, family=MODEL_TYPE, defaults=_DEFAULTS, read_router=read_router)
    # DeepSeek-V2 is always interleaved: a file that says otherwise describes something else.
    reader.neutral("rope_interleave", True)
    reader.finish()
    return config


def read_router(reader: ConfigReader, num_experts: int, experts_per_token: int) -> RouterConfig:
    """Read a softmax router, whose weights are not renormalised."""
    reader.one_of("scoring_func", "softmax", ("softmax",))
    method = reader.one_of("topk_method", "greedy", ("greedy", "group_limited_greedy"))
    reader.neutral("norm_topk_prob", False, None)
    num_groups = kept_groups = 1
    if method == "group_limited_greedy":
        num_groups = reader.integer("n_group", default=None)
        kept_groups = read_kept_groups(reader, num_groups, None)
    else:  # groups may be given, but are ignored
        reader.optional_integer("n_group")
        reader.optional_integer("topk_group")
    router = RouterConfig(
        score="softmax",
        num_groups=num_groups,
        kept_groups=kept_groups,
        group_score="max",
        renormalize=False,
        scale=reader.number("routed_scaling_factor", 1.0),
    )
    return require_groups(router, num_experts, experts_per_token)
