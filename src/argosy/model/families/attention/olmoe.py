"""OLMoE (arXiv:2409.02060): routed experts only; q and k are normed over all heads at once.

`clip_qkv` clamps v, and q and k after their norms. `attention_bias` adds a bias to q, k, v and o. Routing weights are
the softmax probabilities unless `norm_topk_prob` is set.
"""

from __future__ import annotations

from collections.abc import Mapping

from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.gguf import GgufFile
from argosy.config import AttentionConfig, LayerConfig, ModelConfig, RouterConfig
from argosy.model.families.attention.qwen_moe import LAYOUTS
from argosy.model.reading.common_config import CommonDefaults, read_common
from argosy.model.reading.config_reader import MOST_LAYERS, ConfigReader
from argosy.model.reading.gguf_config import GgufConfigReader
from argosy.model.reading.gguf_layout import read_gguf_layout

__all__ = ["GGUF_ARCHITECTURE", "LAYOUTS", "MODEL_TYPE", "open_gguf", "parse_config"]

MODEL_TYPE = "olmoe"
GGUF_ARCHITECTURE = "olmoe"


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read a `config.json`; an absent key gets the default of `OlmoeConfig` in transformers 5.24.

    Raises:
        UnsupportedModel: a key or value asks for something that is not supported.
        CheckpointError: a key is missing, malformed, or contradicts another.
    """
    reader = ConfigReader(raw, MODEL_TYPE)
    common = read_common(
        reader,
        CommonDefaults(
            vocab_size=50_304,
            hidden_size=2048,
            num_heads=16,
            num_kv_heads=None,
            rope_theta=10_000.0,
            norm_eps=1e-5,
            context_tokens=4096,
            num_experts=64,
            experts_per_token=8,
            eos_id=50_279,
        ),
    )
    num_layers = reader.integer("num_hidden_layers", default=16, most=MOST_LAYERS)
    has_bias = reader.flag("attention_bias", False)
    attention = AttentionConfig(
        **common.attention,
        has_qkv_bias=has_bias,
        has_o_bias=has_bias,
        qk_norm="flat",
        qkv_limit=reader.optional_number("clip_qkv") or 0.0,
    )
    config = ModelConfig(
        family=MODEL_TYPE,
        layers=(LayerConfig(mixer=attention, is_moe=True),) * num_layers,
        expert_width=reader.integer("intermediate_size", default=2048),
        router=RouterConfig(renormalize=reader.flag("norm_topk_prob", False)),
        **common.model,
    )
    reader.finish()
    return config


def open_gguf(file: GgufFile) -> ModelFiles:
    """The model in a GGUF file of architecture `olmoe`, in which nothing is clamped.

    Raises:
        UnsupportedModel: a key, value or tensor type that is not supported.
        CheckpointError: a key or tensor is missing, malformed, or contradicts another.
    """
    reader = GgufConfigReader(file, GGUF_ARCHITECTURE)
    common = reader.common()
    reader.neutral("attention.clamp_kqv", 0.0)
    width = reader.integer("feed_forward_length")
    attention = AttentionConfig(**common.attention, qk_norm="flat")
    config = ModelConfig(
        family=MODEL_TYPE,
        layers=(LayerConfig(mixer=attention, is_moe=True),) * reader.num_layers(),
        expert_width=reader.integer("expert_feed_forward_length", width),
        router=RouterConfig(renormalize=reader.flag("expert_weights_norm", False)),
        **common.model,
    )
    reader.finish()
    return read_gguf_layout(file, config, is_paired=False, has_rope_freqs=False)
