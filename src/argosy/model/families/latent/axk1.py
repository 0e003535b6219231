"""A.X-K1: a DeepSeek-V3 whose layers with experts norm what their networks add, before it joins the hidden state.

Released files have this norm in the dense layers as well, where it is not used, and no bias for the choice of experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from argosy.config import ModelConfig
from argosy.model.families.latent import deepseek
from argosy.model.families.latent.deepseek import DEEPSEEK_V3, read_latent_model
from argosy.model.reading.config_reader import ConfigReader
from argosy.model.reading.experts_config import layers_by_type, read_sigmoid_router

__all__ = ["GGUF_ARCHITECTURE", "LAYOUTS", "MODEL_TYPE", "parse_config"]

MODEL_TYPE = "axk1"
GGUF_ARCHITECTURE = None  # llama.cpp does not know it

LAYOUTS = tuple(
    replace(
        layout,
        layer_names={**layout.layer_names, "mlp_post_norm": f"{within}post_mlp_layernorm.weight"},
        passed_over=r"model\.layers\.\d+\.(mlp\.)?post_mlp_layernorm\.weight",
        has_optional_bias=True,
    )
    for layout in deepseek.LAYOUTS
    for within in ("", "mlp.")  # as released; as transformers writes it
)

_DEFAULTS = replace(
    DEEPSEEK_V3,
    vocab_size=163_840,
    num_heads=64,
    num_kv_heads=64,
    num_experts=192,
    first_dense_layers=1,
    context_tokens=32_768,
    num_mtp_layers=0,
    eos_id=163_691,
    bos_id=163_691,
)


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read a `config.json`; an absent key gets the default of `AXK1Config` in transformers 5.24.

    Raises:
        UnsupportedModel: a key or value asks for something that is not supported.
        CheckpointError: a key is missing, malformed, or contradicts another.
    """
    reader = ConfigReader(raw, MODEL_TYPE)
    config = read_latent_model(
        reader,
        family=MODEL_TYPE,
        defaults=_DEFAULTS,
        read_router=read_sigmoid_router(2.5, 8, 4, may_lack_method=True),
        read_moe_layers=layers_by_type(_DEFAULTS.first_dense_layers),
    )
    reader.finish()
    return replace(config, has_moe_post_norm=True)
