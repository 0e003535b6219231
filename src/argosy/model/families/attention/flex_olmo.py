"""FlexOlmo (arXiv:2507.07024): OLMoE with norms only after attention and after the experts."""

from __future__ import annotations

from collections.abc import Mapping

from argosy.config import AttentionConfig, LayerConfig, ModelConfig, RouterConfig
from argosy.model.families.attention.qwen_moe import make_layouts
from argosy.model.reading.common_config import CommonDefaults, read_common
from argosy.model.reading.config_reader import MOST_LAYERS, ConfigReader

MODEL_TYPE = "flex_olmo"
GGUF_ARCHITECTURE = None  # llama.cpp has none
LAYOUTS = make_layouts(
    {
        "attn_post_norm": "post_attention_layernorm.weight",
        "mlp_post_norm": "post_feedforward_layernorm.weight",
    }
)


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read a `config.json`; an absent key gets the default of `FlexOlmoConfig` in transformers 5.24.

    Raises:
        UnsupportedModel: a key or value asks for something that is not supported.
        CheckpointError: a key is missing, malformed, or contradicts another.
    """
    reader = ConfigReader(raw, MODEL_TYPE)
    common = read_common(
        reader,
        CommonDefaults(
            vocab_size=100_352,
            hidden_size=4096,
            num_heads=32,
            num_kv_heads=None,
            rope_theta=500_000.0,
            norm_eps=1e-6,
            context_tokens=4096,
            num_experts=7,
            experts_per_token=5,
            eos_id=100_257,
        ),
    )
    has_bias = reader.flag("attention_bias", False)
    attention = AttentionConfig(
        **common.attention, has_qkv_bias=has_bias, has_o_bias=has_bias, qk_norm="flat"
    )
    num_layers = reader.integer("num_hidden_layers", default=32, most=MOST_LAYERS)
    config = ModelConfig(
        family=MODEL_TYPE,
        layers=(LayerConfig(mixer=attention, is_moe=True),) * num_layers,
        expert_width=reader.integer("intermediate_size", default=11_008),
        router=RouterConfig(renormalize=reader.flag("norm_topk_prob", False)),
        has_pre_norms=False,
        has_post_norms=True,
        **common.model,
    )
    reader.finish()
    return config
