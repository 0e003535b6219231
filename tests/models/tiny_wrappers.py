"""Tiny configurations of models that also see or hear, whose text part belongs to another family, and their tensors.

The text part has its own prefix, beside some tensors of the other parts. Qwen3-VL-MoE stores the experts of a layer
transposed, gate before up.

Elsewhere: values and files are `tiny.py`; Kimi-K2.5 is `tiny_latent.py`, Qwen3.5-MoE `tiny_delta.py`.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from tests.models.rows import WHOLE, Row
from tests.models.tiny import tensor_shapes, text_of

RawConfig = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]

# The family of the text part.
TEXT_FAMILIES = {
    "qwen3_vl_moe": "qwen3_moe",
    "qwen3_omni_moe": "qwen3_moe",
    "internvl": "qwen3_moe",
    "glm4v_moe": "glm4_moe",
}
TEXT_TYPES = {f"{wrapper}_text": family for wrapper, family in TEXT_FAMILIES.items()}

_PREFIXES = {
    "qwen3_vl_moe": "model.language_model.",
    "qwen3_omni_moe": "thinker.model.",
    "internvl": "language_model.model.",
    "glm4v_moe": "model.language_model.",
}
_HEADS = {"qwen3_omni_moe": "thinker.lm_head.weight", "internvl": "language_model.lm_head.weight"}
_VISION = {
    "deepstack_visual_indexes": [0],
    "depth": 1,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 16,
    "in_channels": 3,
    "initializer_range": 0.02,
    "intermediate_size": 8,
    "num_heads": 2,
    "num_position_embeddings": 16,
    "patch_size": 2,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
_AXES = {"mrope_interleaved": True, "mrope_section": [3, 2, 2], "rope_type": "default"}


def _qwen3_text(**changes: Any) -> RawConfig:
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "decoder_sparse_step": 1,
        "dtype": "bfloat16",
        "eos_token_id": 2,
        "head_dim": 14,
        "hidden_act": "silu",
        "hidden_size": 36,
        "initializer_range": 0.02,
        "intermediate_size": 20,
        "max_position_embeddings": 128,
        "mlp_only_layers": [],
        "moe_intermediate_size": 11,
        "norm_topk_prob": True,
        "num_attention_heads": 4,
        "num_experts": 7,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": _AXES,
        "rope_theta": 5000000,
        "use_cache": True,
        "vocab_size": 96,
    } | changes


def qwen3_vl_moe(**changes: Any) -> RawConfig:
    """A config.json with the keys of Qwen3-VL-30B-A3B-Instruct's; `changes` apply to its text part."""
    text = _qwen3_text(**{"model_type": "qwen3_vl_moe_text"} | changes)
    return {
        "architectures": ["Qwen3VLMoeForConditionalGeneration"],
        "image_token_id": 51,
        "model_type": "qwen3_vl_moe",
        "text_config": text,
        "tie_word_embeddings": text.get("tie_word_embeddings", False),
        "transformers_version": "4.57.0.dev0",
        "video_token_id": 52,
        "vision_config": _VISION | {"model_type": "qwen3_vl_moe", "out_hidden_size": text["hidden_size"]},
        "vision_end_token_id": 54,
        "vision_start_token_id": 53,
    }


def qwen3_omni_moe(**changes: Any) -> RawConfig:
    """A config.json with the keys of Qwen3-Omni-30B-A3B-Instruct's; `changes` apply to the thinker's text part."""
    text = _qwen3_text(
        bos_token_id=None,
        eos_token_id=None,
        model_type="qwen3_omni_moe_text",
        rope_scaling=_AXES | {"interleaved": True, "type": "default"},
        rope_theta=1000000,
        shared_expert_intermediate_size=0,
        sliding_window=None,
        use_qk_norm=True,
        use_sliding_window=False,
    )
    text |= {"tie_word_embeddings": False} | changes
    audio = {
        "d_model": 8, "downsample_hidden_size": 4, "encoder_attention_heads": 2, "encoder_ffn_dim": 8,
        "encoder_layers": 1, "max_source_positions": 16, "model_type": "qwen3_omni_moe_audio_encoder",
        "num_mel_bins": 8, "output_dim": text["hidden_size"],
    }  # fmt: skip
    return {
        "architectures": ["Qwen3OmniMoeForConditionalGeneration"],
        "assistant_token_id": 7,
        "code2wav_config": {"codebook_size": 8, "hidden_size": 8},
        "dtype": "bfloat16",
        "enable_audio_output": True,
        "im_end_token_id": 2,
        "im_start_token_id": 1,
        "model_type": "qwen3_omni_moe",
        "system_token_id": 8,
        "talker_config": {"num_code_groups": 2, "text_config": {"hidden_size": 8}},
        "thinker_config": {
            "audio_config": audio,
            "audio_end_token_id": 56,
            "audio_start_token_id": 55,
            "audio_token_id": 57,
            "dtype": "bfloat16",
            "image_token_id": 51,
            "initializer_range": 0.02,
            "model_type": "qwen3_omni_moe_thinker",
            "position_id_per_seconds": 13,
            "seconds_per_chunk": 2,
            "text_config": text,
            "user_token_id": 9,
            "video_token_id": 52,
            "vision_config": _VISION
            | {"model_type": "qwen3_omni_moe_vision_encoder", "out_hidden_size": text["hidden_size"]},
            "vision_end_token_id": 54,
            "vision_start_token_id": 53,
        }
        | ({"tie_word_embeddings": True} if text["tie_word_embeddings"] else {}),
        "transformers_version": "4.57.0.dev0",
        "tts_bos_token_id": 10,
        "tts_eos_token_id": 11,
        "tts_pad_token_id": 12,
        "user_token_id": 9,
    }


def internvl(**changes: Any) -> RawConfig:
    """A config.json with the keys of InternVL3.5-30B-A3B's in the form of transformers."""
    text = _qwen3_text(
        architectures=["Qwen3MoeForCausalLM"],
        max_window_layers=48,
        model_type="qwen3_moe",
        rope_scaling=None,
        sliding_window=None,
        tie_word_embeddings=False,
        use_sliding_window=False,
    )
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "downsample_ratio": 0.5,
        "image_seq_length": 256,
        "image_token_id": 50,
        "model_type": "internvl",
        "projector_hidden_act": "gelu",
        "text_config": text | changes,
        "tie_word_embeddings": changes.get("tie_word_embeddings", False),
        "transformers_version": "4.55.0",
        "vision_config": {
            "hidden_size": 16,
            "image_size": [8, 8],
            "model_type": "internvl_vision",
            "patch_size": [2, 2],
        },
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
    }


def glm4v_moe(**changes: Any) -> RawConfig:
    """A config.json with the keys of GLM-4.5V's; `changes` apply to its text part."""
    text = {
        "attention_bias": True,
        "attention_dropout": 0.0,
        "dtype": "bfloat16",
        "eos_token_id": [2, 5, 6],
        "first_k_dense_replace": 1,
        "head_dim": 28,
        "hidden_act": "silu",
        "hidden_size": 36,
        "image_end_token_id": 54,
        "image_start_token_id": 53,
        "image_token_id": 51,
        "initializer_range": 0.02,
        "intermediate_size": 20,
        "max_position_embeddings": 128,
        "model_type": "glm4v_moe_text",
        "moe_intermediate_size": 12,
        "n_group": 1,
        "n_routed_experts": 6,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {"mrope_section": [3, 2, 2], "rope_type": "default"},
        "rope_theta": 10000.0,
        "routed_scaling_factor": 1.0,
        "tie_word_embeddings": False,
        "topk_group": 1,
        "use_cache": True,
        "use_qk_norm": False,
        "vocab_size": 68,
    } | changes
    return {
        "architectures": ["Glm4vMoeForConditionalGeneration"],
        "image_end_token_id": 54,
        "image_start_token_id": 53,
        "image_token_id": 51,
        "model_type": "glm4v_moe",
        "text_config": text,
        "tie_word_embeddings": text["tie_word_embeddings"],
        "transformers_version": "4.57.1",
        "video_end_token_id": 58,
        "video_start_token_id": 57,
        "video_token_id": 52,
        "vision_config": {
            "depth": 1,
            "hidden_size": 16,
            "image_size": 8,
            "intermediate_size": 8,
            "model_type": "glm4v_moe",
            "num_heads": 2,
            "out_hidden_size": text["hidden_size"],
            "patch_size": 2,
        },
    }


def without_text(config: RawConfig, *keys: str) -> RawConfig:
    """Return a config whose `text_config` lacks some keys."""
    return config | {"text_config": {k: v for k, v in config["text_config"].items() if k not in keys}}


def wrapped_shapes(config: RawConfig) -> Shapes:
    """Return names and shapes of every tensor in the hub's checkpoint of this config: those of its text part as a
    separate model, under the wrapper's names, and some of other parts.
    """
    family = config["model_type"]
    text = {"tie_word_embeddings": config.get("tie_word_embeddings", False)} | text_of(config)
    text["model_type"] = TEXT_FAMILIES[family]
    plain = tensor_shapes(text)
    if family == "qwen3_vl_moe":
        plain = _transposed(plain, text)
    shapes = {}
    for name, shape in plain.items():
        if name == "lm_head.weight":
            shapes[_HEADS.get(family, name)] = shape
        else:
            shapes[_PREFIXES[family] + name.removeprefix("model.")] = shape
    if family == "internvl":
        return shapes | {
            "vision_tower.embeddings.cls_token": (1, 1, 16),
            "multi_modal_projector.linear_1.bias": (text["hidden_size"],),
        }
    if family == "glm4v_moe":
        position = "model.visual.embeddings.position_embedding.weight"
        return shapes | {"model.visual.patch_embed.proj.bias": (16,), position: (16, 16)}
    visual = "thinker.visual." if family == "qwen3_omni_moe" else "model.visual."
    shapes |= {visual + "patch_embed.proj.bias": (16,), visual + "pos_embed.weight": (16, 16)}
    if family == "qwen3_omni_moe":
        shapes |= {
            "thinker.audio_tower.proj1.bias": (8,),
            "talker.model.norm.weight": (8,),
            "code2wav.code_embedding.weight": (8, 8),
        }
    return shapes


def _transposed(plain: Shapes, text: RawConfig) -> Shapes:
    """Store the experts of a layer in two tensors, [experts, hidden, 2 * width] and [experts, width, hidden]."""
    experts, hidden, width = text["num_experts"], text["hidden_size"], text["moe_intermediate_size"]
    shapes: Shapes = {}
    for name, shape in plain.items():
        found = re.fullmatch(r"(.*\.experts\.)\d+\..*", name)
        if found is None:
            shapes[name] = shape
        else:
            shapes[found[1] + "gate_up_proj"] = (experts, hidden, 2 * width)
            shapes[found[1] + "down_proj"] = (experts, width, hidden)
    return shapes


def _thinker(config: RawConfig) -> tuple[str, RawConfig]:
    return "Qwen3OmniMoeThinkerConfig", config["thinker_config"]


ROWS = {
    "qwen3_vl_moe": Row(shapes=wrapped_shapes, loading=WHOLE, has_own_experts=True, chats=("qwen3",)),
    "qwen3_omni_moe": Row(
        shapes=wrapped_shapes,
        loading=replace(WHOLE, config=_thinker),
        has_own_experts=True,
        chats=("qwen3",),
    ),
    "internvl": Row(
        shapes=wrapped_shapes,
        loading=WHOLE,
        has_own_experts=True,
    ),
    "internvl_chat": Row(
        shapes=None,
        without_references="transformers has no class; `renamed.py` renames internvl's tensors",
    ),
    "glm4v_moe": Row(shapes=wrapped_shapes, loading=WHOLE, has_own_experts=True, chats=("glm",)),
}
