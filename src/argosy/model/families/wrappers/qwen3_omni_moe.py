"""Qwen3-Omni (30B-A3B): the text part of its thinker, a Qwen3-MoE under `thinker.`.

`config.json` holds the thinker in `thinker_config`, and the text model in `text_config` inside that. Its towers
(`thinker.audio_tower.*`, `thinker.visual.*`) are in `model/encoders/`; the models that speak (`talker.*`, `code2wav.*`)
are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from argosy.config import ModelConfig
from argosy.model.families.attention.qwen3_moe import read_text
from argosy.model.families.attention.qwen_moe import make_layouts
from argosy.model.families.wrappers.qwen3_vl_moe import AXES, GGUF_ARCHITECTURE, open_gguf
from argosy.model.reading.common_config import VISION_KEYS, in_wrapper
from argosy.model.reading.config_reader import ConfigReader

__all__ = ["GGUF_ARCHITECTURE", "LAYOUTS", "MODEL_TYPE", "open_gguf", "parse_config"]

MODEL_TYPE = "qwen3_omni_moe"

LAYOUTS = tuple(
    replace(layout, prefix="thinker.model.", head_name="thinker.lm_head.weight")
    for layout in make_layouts(passed_over=r"(talker|code2wav|thinker\.(audio_tower|visual))\..*")
)

_END_OF_TURN = 151_645  # <|im_end|>

_THINKER_KEYS = (
    *VISION_KEYS, "audio_config", "audio_token_id", "audio_start_token_id", "audio_end_token_id", "user_token_id",
    "position_id_per_seconds", "seconds_per_chunk",
)  # fmt: skip
_OTHER_KEYS = (
    "talker_config", "code2wav_config", "enable_audio_output", "im_start_token_id", "tts_pad_token_id",
    "tts_bos_token_id", "tts_eos_token_id", "system_token_id", "user_token_id", "assistant_token_id",
)  # fmt: skip


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read the text part of a `config.json`, as `Qwen3OmniMoeTextConfig` in transformers 5.24 does.

    If no file says which token ends an answer, the end-of-turn token does (`generate` of
    Qwen3OmniMoeForConditionalGeneration).

    Raises:
        UnsupportedModel: a key or value asks for something that is not supported.
        CheckpointError: a key is missing, malformed, or contradicts another.
    """
    whole = ConfigReader(raw, MODEL_TYPE)
    thinker = whole.nested("thinker_config", "qwen3_omni_moe_thinker")
    text = thinker.nested("text_config", "qwen3_omni_moe_text")
    config = read_text(
        text,
        MODEL_TYPE,
        num_layers=28,
        renormalize=True,
        expert_width=768,
        dense_width=18_944,
        vocab_size=3584,
        hidden_size=2048,
        num_heads=28,
        num_kv_heads=4,
        rope_theta=1_000_000.0,
        axes=AXES,
        norm_eps=1e-6,
        context_tokens=32_768,
        num_experts=128,
        experts_per_token=8,
    )
    text.finish()
    config = in_wrapper(config, thinker)
    thinker.passed(*_THINKER_KEYS)
    thinker.finish()
    config = in_wrapper(config, whole)
    ends = whole.token_ids("im_end_token_id", _END_OF_TURN)
    whole.passed(*_OTHER_KEYS)
    whole.finish()
    return replace(config, eos_ids=config.eos_ids or ends)
