"""DeepSeek-OCR and DeepSeek-OCR-2 (3B-A0.6B): the text part, DeepSeek-V2's experts behind Llama's attention.

Transformers' form is `deepseek_ocr2`, with the text in `text_config`; DeepSeek's own is `deepseek_vl_v2`, with the text
in `language_config`. There, the keys beside it repeat its own, and DeepSeek's code reads only those: files in which
they differ are refused. DeepSeek-VL2 has that model type too, with latent attention or tensors of other names.

The vision towers are in `model/encoders/deep_encoder.py`. Unlimited-OCR's answers see only their last tokens and the
prompt, and the family is not supported, though llama.cpp runs its files and ignores the window.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from argosy.config import ModelConfig
from argosy.errors import CheckpointError
from argosy.model.families.attention.sigmoid_moe import read_sigmoid_model
from argosy.model.families.latent import deepseek, deepseek_v2
from argosy.model.families.wrappers.deepseek_ocr_gguf import GGUF_ARCHITECTURE, HUB_TYPE, open_gguf
from argosy.model.reading.common_config import MoeDefaults, parse_wrapper
from argosy.model.reading.config_reader import ConfigReader
from argosy.model.reading.experts_config import layers_by_type

__all__ = ["GGUF_ARCHITECTURE", "LAYOUTS", "MODEL_TYPE", "OTHER_TYPES", "open_gguf", "parse_config"]

MODEL_TYPE = "deepseek_ocr2"
OTHER_TYPES = (HUB_TYPE,)

_TOWER = r"model\.((sam_model|vision_model|qwen2_model|projector)\..*|image_newline|view_seperator)"
LAYOUTS = tuple(replace(layout, passed_over=_TOWER) for layout in deepseek.LAYOUTS)

# Of `DeepseekOcr2TextConfig` in transformers 5.24, and of DeepSeek's own `DeepseekV2Config`.
_DEFAULTS = MoeDefaults(
    vocab_size=102_400, hidden_size=4096, num_layers=32, num_heads=32, num_kv_heads=None, rope_theta=10_000.0,
    norm_eps=1e-6, context_tokens=2048, dense_width=11_008, expert_width=1407, num_experts=64, experts_per_token=None,
    num_shared_experts=2, eos_id=2, bos_id=1,
)  # fmt: skip
_HUB_DEFAULTS = replace(_DEFAULTS, num_layers=30, num_experts=None, num_shared_experts=None)
_HUB_KEYS = frozenset({
    "candidate_resolutions", "global_view_pos", "tile_tag", "projector_config", "vision_config", "language_config",
    "architectures", "auto_map", "model_type", "transformers_version", "_name_or_path",
})  # fmt: skip


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read the text part of a `config.json`.

    Raises:
        The same errors as `parse_wrapper`.
    """
    is_hub = raw.get("model_type") == HUB_TYPE
    family = HUB_TYPE if is_hub else MODEL_TYPE

    def read_text(reader: ConfigReader) -> ModelConfig:
        if reader.flag("use_mla", is_hub):
            raise reader.unsupported("use_mla", "false, of DeepSeek-OCR")
        # Sizes of latent attention.
        reader.passed("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        reader.neutral("lm_head", True)
        reader.neutral("rm_head", False)
        reader.neutral("attention_bias", False)
        reader.neutral("moe_layer_freq", 1)
        reader.neutral("sliding_window", None)
        reader.neutral("sliding_window_size", None)
        config = read_sigmoid_model(
            reader,
            family,
            _HUB_DEFAULTS if is_hub else _DEFAULTS,
            read_router=deepseek_v2.read_router,
            read_moe_layers=layers_by_type(0),
        )
        reader.neutral("head_dim", config.hidden_size // config.attention.num_heads, None)
        return config

    return parse_wrapper(
        _with_text(raw) if is_hub else raw,
        family,
        ("deepseek_ocr2_text", "deepseek_v2"),
        read_text,
        *sorted(_HUB_KEYS),
    )


def _with_text(raw: Mapping[str, object]) -> dict[str, object]:
    """Return a config with its text in `text_config`: the keys of `language_config` and those that repeat them."""
    own = raw.get("language_config", {})
    if not isinstance(own, dict):
        raise CheckpointError("config.json: language_config must be an object", key="language_config")
    repeated = {key: value for key, value in raw.items() if key not in _HUB_KEYS}
    for key in own.keys() & repeated.keys():
        if own[key] != repeated[key]:
            raise CheckpointError(
                f"config.json gives {key} as {repeated[key]!r:.80}, and its language_config as {own[key]!r:.80}",
                key=key,
            )
    wrapper = {key: value for key, value in raw.items() if key in _HUB_KEYS}
    return wrapper | {"text_config": {"model_type": "deepseek_v2", **own, **repeated}}
