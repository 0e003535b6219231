"""Tiny configurations of the towers that see and hear, random weights in the hub's layout, and inputs for them.

Nothing here needs torch. The references of transformers come from `make_encoders.py`; a test loads the towers of Argosy
with `tests/model/encoders/open_tower.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from argosy.model.encoders import EncoderTensor
from tests.models.safetensors_file import Array, decode, encode
from tests.models.tiny_step import FULL, step3p5

RawConfig = dict[str, Any]

REFERENCE = Path(__file__).parent / "reference_encoders"

# Grids of patches, in units of the cells that become a position: one cell, tall, wide, several frames.
GRIDS = ((1, 1, 1), (1, 3, 2), (1, 1, 5), (3, 2, 1))
LARGE_GRIDS = ((1, 24, 20), (1, 1, 240), (4, 11, 11))
# Mel frames of a sound: shorter than a chunk of 100, whole chunks, and more than a window of attention.
LENGTHS = (37, 100, 130, 517)
LARGE_LENGTHS = (90, 12_040)
# In a video of Qwen3-Omni.
SECONDS_PER_FRAME = 0.7
ANGLES_PER_SECOND = 13


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Sizes of a tiny tower; all are independent of each other."""

    layers: int = 4
    heads: int = 3
    head_dim: int = 8
    mlp: int = 40
    out: int = 20
    side: int = 5
    patch: int = 4
    merge: int = 2
    channels: int = 6  # of the audio tower's convolutions

    @property
    def hidden(self) -> int:
        return self.heads * self.head_dim


def random_sizes(seed: int) -> Sizes:
    """Sizes as random as the seed."""
    rng = np.random.default_rng([seed, 3])

    def pick(*choices: int) -> int:
        return int(rng.choice(choices))

    return Sizes(
        layers=pick(3, 4, 5),
        heads=pick(1, 2, 4, 5),
        head_dim=pick(4, 8, 12, 20),
        mlp=pick(7, 33, 64),
        out=4 * pick(3, 5, 12),
        side=pick(2, 4, 7),
        patch=pick(2, 3, 6),
        merge=pick(1, 2, 3),
        channels=pick(1, 5, 16),
    )


def _text(sizes: Sizes, **more: Any) -> RawConfig:
    return {
        "hidden_size": sizes.out,
        "intermediate_size": 8,
        "max_position_embeddings": 128,
        "moe_intermediate_size": 8,
        "num_attention_heads": 1,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "num_hidden_layers": 1,
        "num_key_value_heads": 1,
        "vocab_size": 64,
    } | more


_TOKENS = {"image_token_id": 50, "video_token_id": 51, "vision_start_token_id": 52, "vision_end_token_id": 53}


def _qwen_vision(sizes: Sizes, **more: Any) -> RawConfig:
    return {
        "depth": sizes.layers,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": sizes.hidden,
        "in_channels": 3,
        "initializer_range": 0.02,
        "intermediate_size": sizes.mlp,
        "num_heads": sizes.heads,
        "num_position_embeddings": sizes.side**2,
        "out_hidden_size": sizes.out,
        "patch_size": sizes.patch,
        "spatial_merge_size": sizes.merge,
        "temporal_patch_size": 2,
    } | more


def qwen3_vl_moe(sizes: Sizes) -> RawConfig:
    return {
        "architectures": ["Qwen3VLMoeForConditionalGeneration"],
        "model_type": "qwen3_vl_moe",
        "text_config": _text(sizes, head_dim=8, model_type="qwen3_vl_moe_text"),
        "tie_word_embeddings": False,
        "vision_config": _qwen_vision(
            sizes, deepstack_visual_indexes=[0, 1, sizes.layers - 1], model_type="qwen3_vl_moe"
        ),
    } | _TOKENS


def qwen3_5_moe(sizes: Sizes) -> RawConfig:
    return {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "model_type": "qwen3_5_moe",
        "text_config": _text(
            sizes, head_dim=8, layer_types=["full_attention"], model_type="qwen3_5_moe_text"
        ),
        "tie_word_embeddings": False,
        "vision_config": _qwen_vision(sizes, deepstack_visual_indexes=[], model_type="qwen3_5_moe"),
    } | _TOKENS


def qwen4_exp(sizes: Sizes) -> RawConfig:
    raw = qwen3_5_moe(sizes)
    return raw | {
        "architectures": ["Qwen4ExpForConditionalGeneration"],
        "model_type": "qwen4_exp",
        "vision_config": raw["vision_config"] | {"model_type": "qwen4_exp"},
    }


def qwen3_omni_moe(sizes: Sizes) -> RawConfig:
    return {
        "architectures": ["Qwen3OmniMoeForConditionalGeneration"],
        "enable_audio_output": False,
        "model_type": "qwen3_omni_moe",
        "thinker_config": {
            "audio_config": {
                "activation_function": "gelu",
                "conv_chunksize": 500,
                "d_model": sizes.hidden,
                "downsample_hidden_size": sizes.channels,
                "encoder_attention_heads": sizes.heads,
                "encoder_ffn_dim": sizes.mlp,
                "encoder_layers": 2,
                "max_source_positions": 1500,
                "model_type": "qwen3_omni_moe_audio_encoder",
                "n_window": 50,
                "n_window_infer": 200,
                "num_hidden_layers": 2,
                "num_mel_bins": 20,
                "output_dim": sizes.out,
                "scale_embedding": False,
            },
            "audio_end_token_id": 55,
            "audio_start_token_id": 54,
            "audio_token_id": 56,
            "model_type": "qwen3_omni_moe_thinker",
            "position_id_per_seconds": ANGLES_PER_SECOND,
            "text_config": _text(sizes, head_dim=8, model_type="qwen3_omni_moe_text"),
            "user_token_id": 57,
            "vision_config": _qwen_vision(
                sizes,
                apply_vit_abs_pos_embed=True,
                deepstack_visual_indexes=[0, 1, sizes.layers - 1],
                image_size=sizes.side * sizes.patch,
                in_chans=3,
                model_type="qwen3_omni_moe_vision_encoder",
                spatial_patch_size=sizes.patch,
                tokens_per_second=2,
            ),
        }
        | _TOKENS,
    }


def glm4v_moe(sizes: Sizes) -> RawConfig:
    return {
        "architectures": ["Glm4vMoeForConditionalGeneration"],
        "image_end_token_id": 53,
        "image_start_token_id": 52,
        "image_token_id": 50,
        "model_type": "glm4v_moe",
        "text_config": _text(sizes, head_dim=8, model_type="glm4v_moe_text", n_routed_experts=2),
        "tie_word_embeddings": False,
        "video_token_id": 51,
        "vision_config": {
            "attention_bias": sizes.heads % 2 == 0,
            "attention_dropout": 0.0,
            "depth": sizes.layers,
            "hidden_act": "silu",
            "hidden_dropout_prob": 0.0,
            "hidden_size": sizes.hidden,
            "image_size": sizes.side * sizes.patch + 1,
            "in_channels": 3,
            "initializer_range": 0.02,
            "intermediate_size": sizes.mlp,
            "model_type": "glm4v_moe",
            "num_heads": sizes.heads,
            "out_hidden_size": sizes.out,
            "patch_size": sizes.patch,
            "rms_norm_eps": 1e-5,
            "spatial_merge_size": sizes.merge,
            "temporal_patch_size": 2,
        },
    }


def glm5_next(sizes: Sizes) -> RawConfig:
    text = {
        "first_k_dense_replace": 1, "hidden_size": sizes.out, "index_head_dim": 8, "index_kpool": 4, "index_n_heads": 1,
        "index_topk": 8, "intermediate_size": 8, "kv_lora_rank": 8, "linear_head_dim": 8, "linear_num_heads": 1,
        "max_position_embeddings": 128, "model_type": "glm5_next_text", "moe_intermediate_size": 8,
        "n_routed_experts": 2, "num_attention_heads": 1, "num_experts_per_tok": 1, "num_hidden_layers": 1,
        "num_key_value_heads": 1, "pad_token_id": 0, "q_lora_rank": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
        "vocab_size": 64,
    }  # fmt: skip
    return {
        "architectures": ["Glm5NextForConditionalGeneration"],
        "image_end_token_id": 53,
        "image_start_token_id": 52,
        "image_token_id": 50,
        "model_type": "glm5_next",
        "text_config": text,
        "tie_word_embeddings": False,
        "video_token_id": 51,
        "vision_config": {
            "attention_bias": sizes.heads % 2 == 1,
            "attention_dropout": 0.0,
            "depth": sizes.layers,
            "hidden_act": "silu",
            "hidden_size": sizes.hidden,
            "image_size": 336,
            "in_channels": 3,
            "initializer_range": 0.02,
            "intermediate_size": sizes.mlp,
            "model_type": "glm5_next_vision",
            "num_heads": sizes.heads,
            "out_hidden_size": sizes.out,
            "patch_size": sizes.patch,
            "projection_intermediate_size": sizes.mlp + 3,
            "rms_norm_eps": 1e-4,
            "rope_parameters": {"rope_theta": 300.0, "rope_type": "axial"},
            "spatial_merge_size": sizes.merge,
            "swiglu_limit": 0.5,
            "temporal_patch_size": 2,
        },
    }


def minimax_m3_vl(sizes: Sizes) -> RawConfig:
    """In the spelling of the hub, and that of transformers beside it."""
    frames = 1 + sizes.heads % 2
    return {
        "architectures": ["MiniMaxM3SparseForConditionalGeneration"],
        "image_token_index": 50,
        "model_type": "minimax_m3_vl",
        "multimodal_projector_bias": True,
        "projector_hidden_act": "gelu",
        "projector_hidden_size": sizes.mlp + 3,
        "text_config": _text(
            sizes, model_type="minimax_m3_vl_text", num_local_experts=2, head_dim=8, rotary_dim=4
        ),
        "video_token_index": 51,
        "vision_config": {
            "hidden_act": "gelu",
            "hidden_size": sizes.heads * max(6, sizes.head_dim),
            "image_size": 2016,
            "img_token_compression_config": {
                "image_token_compression_method": "patch_merge",
                "spatial_merge_size": sizes.merge,
                "temporal_patch_size": frames,
            },
            "intermediate_size": sizes.mlp,
            "layer_norm_eps": 1e-3,
            "model_type": "minimax_m3_vl_vision",
            "num_attention_heads": sizes.heads,
            "num_channels": 3,
            "num_hidden_layers": sizes.layers,
            "patch_size": sizes.patch,
            "position_embedding_type": "rope",
            "projection_dim": sizes.out,
            "rope_mode": "3d",
            "rope_parameters": {"rope_theta": 300.0, "rope_type": "axial"},
            "spatial_merge_size": sizes.merge,
            "temporal_patch_size": frames,
            "vision_segment_max_frames": 4,
        },
    }


def deepseek_v4(sizes: Sizes) -> RawConfig:
    return _text(sizes) | {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "vision_dim": sizes.hidden,
        "vision_downsample_ratio": sizes.merge,
        "vision_inter_dim": sizes.mlp,
        "vision_max_n_token": 384,
        "vision_max_wh_ratio": 8,
        "vision_min_pixels": 147456,
        "vision_n_heads": sizes.heads,
        "vision_n_layers": sizes.layers,
        "vision_patch_size": sizes.patch,
        "vision_rope_theta": 300.0,
    }


def deepseek_v41(sizes: Sizes) -> RawConfig:
    return {
        "architectures": ["DeepseekV41ForCausalLM"],
        "image_token_id": 50,
        "model_type": "deepseek_v41",
        "text_config": _text(sizes, model_type="deepseek_v41_text"),
        "vision_config": {
            "downsample_ratio": sizes.merge,
            "hidden_size": sizes.hidden,
            "intermediate_size": sizes.mlp,
            "max_image_tokens": 1024,
            "max_wh_ratio": None,
            "min_pixels": 295_936,
            "model_type": "deepseek_v41_vision",
            "num_attention_heads": sizes.heads,
            "num_hidden_layers": sizes.layers,
            "patch_size": sizes.patch,
            "rope_theta": 300.0,
        },
    }


def kimi_k3(sizes: Sizes) -> RawConfig:
    """In the spelling of the hub; heads are together wider than the hidden state."""
    return {
        "architectures": ["KimiK3ForConditionalGeneration"],
        "media_placeholder_token_id": 50,
        "model_type": "kimi_k3",
        "text_config": _text(sizes, model_type="kimi_linear"),
        "vision_config": {
            "activation_func": "gelu_pytorch_tanh",
            "attn_bias": False,
            "init_pos_emb_height": sizes.side,
            "init_pos_emb_time": 4,
            "init_pos_emb_width": sizes.side,
            "linear_bias": False,
            "merge_kernel_size": [sizes.merge, sizes.merge],
            "merge_type": "sd2_tpool",
            "mlp_type": "mlp2",
            "mm_hidden_size": sizes.hidden,
            "mm_projector_type": "patchmergerv2",
            "model_type": "moonvit3d",
            "norm_type": "rmsnorm",
            "patch_embed_proj_bias": False,
            "patch_size": sizes.patch,
            "pos_emb_interpolation_mode": "bilinear",
            "pos_emb_type": "divided_fixed",
            "projector_hidden_act": "gelu",
            "projector_ln_eps": 1e-4,
            "qkv_hidden_size": sizes.heads * (sizes.head_dim + 4),
            "text_hidden_size": sizes.out,
            "vt_hidden_size": sizes.hidden,
            "vt_intermediate_size": sizes.mlp,
            "vt_num_attention_heads": sizes.heads,
            "vt_num_hidden_layers": sizes.layers,
        },
    }


def kimi_k25(sizes: Sizes) -> RawConfig:
    """In the spelling of transformers, which ignores that of the hub."""
    return {
        "architectures": ["Kimi_K25ForConditionalGeneration"],
        "image_token_id": 50,
        "model_type": "kimi_k25",
        "projection_hidden_size": sizes.hidden,
        "projection_layer_norm_eps": 1e-4,
        "text_config": _text(
            sizes,
            kv_lora_rank=8,
            model_type="deepseek_v3",
            n_group=1,
            n_routed_experts=2,
            q_lora_rank=8,
            qk_nope_head_dim=8,
            qk_rope_head_dim=4,
            topk_group=1,
            v_head_dim=8,
        ),
        "tie_word_embeddings": False,
        "video_token_id": 51,
        "vision_config": {
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": sizes.hidden,
            "intermediate_size": sizes.mlp,
            "merge_kernel_size": [sizes.merge, sizes.merge],
            "model_type": "kimi_k25_vision",
            "num_attention_heads": sizes.heads,
            "num_hidden_layers": sizes.layers,
            "patch_size": sizes.patch,
            "pos_emb_height": sizes.side,
            "pos_emb_time": 4,
            "pos_emb_width": sizes.side,
        },
    }


def gemma4(sizes: Sizes) -> RawConfig:
    return {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "audio_config": None,
        "audio_token_id": 54,
        "boi_token_id": 52,
        "eoi_token_id": 53,
        "image_token_id": 50,
        "model_type": "gemma4",
        "text_config": _text(
            sizes,
            enable_moe_block=True,
            head_dim=8,
            hidden_size_per_layer_input=0,
            layer_types=["full_attention"],
            model_type="gemma4_text",
            num_kv_shared_layers=0,
            top_k_experts=1,
        ),
        "tie_word_embeddings": True,
        "video_token_id": 51,
        "vision_config": {
            "default_output_length": 280,
            "head_dim": sizes.head_dim,
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size": sizes.hidden + 4,
            "intermediate_size": sizes.mlp,
            "model_type": "gemma4_vision",
            "num_attention_heads": 2 * sizes.heads,
            "num_hidden_layers": sizes.layers,
            "num_key_value_heads": sizes.heads,
            "patch_size": sizes.patch,
            "pooling_kernel_size": max(2, sizes.merge),  # for 1, transformers returns no rows
            "position_embedding_size": 100 * sizes.side,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_theta": 90.0, "rope_type": "default"},
            "standardize": sizes.heads % 2 == 1,
            "use_clipped_linears": False,
        },
    }


def mistral3(sizes: Sizes) -> RawConfig:
    text = kimi_k25(sizes)["text_config"] | {"model_type": "mistral4", "rms_norm_eps": 1e-3}
    return {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "image_token_index": 50,
        "model_type": "mistral3",
        "multimodal_projector_bias": sizes.heads % 2 == 0,
        "projector_hidden_act": "gelu",
        "spatial_merge_size": sizes.merge,
        "text_config": text | {"rope_parameters": {"rope_theta": 10_000.0, "rope_type": "default"}},
        "vision_config": {
            "attention_dropout": 0.0,
            "head_dim": sizes.head_dim,
            "hidden_act": "silu" if sizes.heads % 2 else "gelu",
            "hidden_size": sizes.hidden,
            "image_size": 1540,
            "initializer_range": 0.02,
            "intermediate_size": sizes.mlp,
            "model_type": "pixtral",
            "num_attention_heads": sizes.heads,
            "num_channels": 3,
            "num_hidden_layers": sizes.layers,
            "patch_size": sizes.patch,
            "rope_parameters": {"rope_theta": 300.0, "rope_type": "axial"},
        },
        "vision_feature_layer": -1,
    }


def llama4(sizes: Sizes) -> RawConfig:
    """Tiles of a few cells. The sizes of MLP and projector depend on each other."""
    return {
        "architectures": ["Llama4ForConditionalGeneration"],
        "boi_token_index": 52,
        "eoi_token_index": 53,
        "image_token_index": 50,
        "model_type": "llama4",
        "text_config": {
            "head_dim": 8,
            "hidden_size": sizes.out,
            "intermediate_size": 8,
            "intermediate_size_mlp": 8,
            "max_position_embeddings": 128,
            "model_type": "llama4_text",
            "num_attention_heads": 1,
            "num_hidden_layers": 1,
            "num_key_value_heads": 1,
            "num_local_experts": 2,
            "vocab_size": 64,
        },
        "tie_word_embeddings": False,
        "vision_config": {
            "attention_dropout": 0.0,
            "hidden_act": "gelu",
            "hidden_size": sizes.hidden,
            "image_size": sizes.merge * 2 * sizes.patch,
            "initializer_range": 0.02,
            "intermediate_size": sizes.hidden * sizes.merge**2,
            "model_type": "llama4_vision_model",
            "multi_modal_projector_bias": False,
            "norm_eps": 1e-5,
            "num_attention_heads": sizes.heads,
            "num_channels": 3,
            "num_hidden_layers": sizes.layers,
            "patch_size": sizes.patch,
            "pixel_shuffle_ratio": 1 / sizes.merge,
            "projector_dropout": 0.0,
            "projector_input_dim": sizes.mlp,
            "projector_output_dim": sizes.mlp,
            "rope_parameters": {"rope_theta": 300.0, "rope_type": "default"},
            "vision_feature_select_strategy": "default",
            "vision_output_dim": sizes.mlp,
        },
    }


def internvl(sizes: Sizes) -> RawConfig:
    is_large = sizes.heads % 2 == 0  # with the norms of the large tower
    merge = min(sizes.merge, 2)  # transformers finds that a third does not divide
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "downsample_ratio": 1 / merge,
        "image_seq_length": 9,
        "image_token_id": 50,
        "model_type": "internvl",
        "projector_hidden_act": "gelu",
        "text_config": _text(sizes, head_dim=8, model_type="qwen3_moe"),
        "tie_word_embeddings": False,
        "vision_config": {
            "attention_bias": not is_large,
            "attention_dropout": 0.0,
            "hidden_act": "gelu",
            "hidden_dropout_prob": 0.0,
            "hidden_size": sizes.hidden,
            "image_size": [3 * merge * sizes.patch] * 2,
            "initializer_range": 0.02,
            "intermediate_size": sizes.mlp,
            "layer_norm_eps": 1e-3,
            "layer_scale_init_value": 0.1,
            "model_type": "internvl_vision",
            "norm_type": "rms_norm" if is_large else "layer_norm",
            "num_attention_heads": sizes.heads,
            "num_channels": 3,
            "num_hidden_layers": sizes.layers,
            "patch_size": [sizes.patch] * 2,
            "projection_dropout": 0.0,
            "use_absolute_position_embeddings": True,
            "use_mask_token": False,
            "use_mean_pooling": True,
            "use_qk_norm": is_large,
        },
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
    }


def step3p7(sizes: Sizes) -> RawConfig:
    """Heads of 4, so that a product of the second convolution is small; a view of 12 patches, windows of 8."""
    width = 4 * sizes.heads
    return {
        "architectures": ["Step3p7ForConditionalGeneration"],
        "image_token_id": 50,
        "image_token_len": 9,
        "model_type": "step3p7",
        "patch_token_len": 4,
        "projector_bias": sizes.heads % 2 == 0,
        "text_config": step3p5(
            attention_other_setting=None, hidden_size=sizes.out, layer_types=[FULL], moe_layers_enum="0",
            num_hidden_layers=1, num_nextn_predict_layers=0, partial_rotary_factors=[0.5], rope_scaling=None,
            rope_theta=[10_000.0], swiglu_limits=None, swiglu_limits_shared=None, vocab_size=64,
        ),
        "understand_projector_stride": 2,
        "vision_config": {
            "heads": sizes.heads,
            "hidden_act": "quick_gelu",
            "image_size": 12 * (sizes.patch // 2),
            "layer_norm_eps": 1e-3,
            "layers": sizes.layers,
            "ls_init_value": 0.1,
            "mlp_ratio": (sizes.mlp + 0.25) / width,
            "model_type": "perception_encoder",
            "num_channels": 3,
            "patch_size": sizes.patch // 2,
            "use_abs_posemb": True,
            "use_cls_token": False,
            "use_ln_post": False,
            "use_ln_pre": True,
            "use_rope2d": True,
            "width": width,
        },
    }  # fmt: skip


def qwen2_moe(sizes: Sizes) -> RawConfig:
    """The composition of the demo model: the eye's tower is Qwen3-VL's; the ear's and its projector are Voxtral's."""
    return _text(sizes) | {
        "architectures": ["Qwen2MoeForCausalLM"],
        "audio_config": {
            "activation_function": "gelu",
            "hidden_size": sizes.hidden,
            "intermediate_size": 4 * sizes.hidden,
            "max_source_positions": 20 + sizes.merge,
            "model_type": "voxtral_encoder",
            "num_attention_heads": sizes.heads,
            "num_hidden_layers": 2,
            "num_mel_bins": 20,
        },
        "audio_token_id": 56,
        "image_token_id": 57,
        "model_type": "qwen2_moe",
        "vision_config": _qwen_vision(sizes, deepstack_visual_indexes=[], model_type="qwen3_vl"),
    }


def sam(sizes: Sizes, *, patch: int, image: int, rows: int) -> RawConfig:
    """A `sam_config` whose last convolution makes `rows` channels."""
    return {
        "downsample_channels": [sizes.channels, rows],
        "global_attn_indexes": [1],
        "hidden_size": sizes.hidden,
        "image_size": image,
        "mlp_dim": sizes.mlp,
        "num_attention_heads": sizes.heads,
        "num_hidden_layers": sizes.layers - 1,
        "output_channels": sizes.channels + 3,
        "patch_size": patch,
        "window_size": sizes.side,
    }


def deepseek_ocr2(sizes: Sizes) -> RawConfig:
    second = 2 * sizes.head_dim
    return {
        "vision_config": {
            "encoder_config": {
                "hidden_size": second, "intermediate_size": sizes.mlp, "num_attention_heads": 4,
                "num_hidden_layers": 2, "num_key_value_heads": 2, "vocab_size": 1,
            },
            # The squares have the sizes of the released model, in patches: one head of attention takes a second.
            "sam_config": sam(sizes, patch=2, image=96, rows=second)
            | {"hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 2},
        },
    }  # fmt: skip


def unlimited_ocr(sizes: Sizes) -> RawConfig:
    """DeepSeek-OCR's tower, which transformers knows in Unlimited-OCR alone."""
    return {
        "architectures": ["UnlimitedOcrForConditionalGeneration"],
        "image_token_id": 50,
        "model_type": "unlimited_ocr",
        "text_config": _text(sizes, model_type="unlimited_ocr_text", n_routed_experts=2, n_shared_experts=1),
        "vision_config": {
            "encoder_config": {
                "hidden_act": "quick_gelu", "hidden_size": sizes.hidden, "image_size": sizes.side * sizes.patch,
                "intermediate_size": 4 * sizes.hidden, "num_attention_heads": sizes.heads,
                "num_hidden_layers": 2, "patch_size": sizes.patch,
            },
            "model_type": "unlimited_ocr_vision",
            "sam_config": sam(sizes, patch=2, image=20, rows=sizes.hidden),
        },
    }  # fmt: skip


CONFIGS: dict[str, Callable[[Sizes], RawConfig]] = {
    "qwen3_vl_moe": qwen3_vl_moe,
    "qwen3_5_moe": qwen3_5_moe,
    "qwen4_exp": qwen4_exp,
    "qwen3_omni_moe": qwen3_omni_moe,
    "glm4v_moe": glm4v_moe,
    "glm5_next": glm5_next,
    "minimax_m3_vl": minimax_m3_vl,
    "kimi_k25": kimi_k25,
    "kimi_k3": kimi_k3,
    "deepseek_v4": deepseek_v4,
    "deepseek_v41": deepseek_v41,
    "gemma4": gemma4,
    "mistral3": mistral3,
    "llama4": llama4,
    "internvl": internvl,
    "step3p7": step3p7,
    "deepseek_ocr2": deepseek_ocr2,
    "unlimited_ocr": unlimited_ocr,
    "qwen2_moe": qwen2_moe,
}


def random_tensors(tensors: Mapping[str, EncoderTensor], prefix: str, seed: int) -> dict[str, Array]:
    """Random values of all tensors, by their names in the checkpoint; exact in bfloat16."""
    rng = np.random.default_rng([seed, 1])
    out = {}
    for canonical, tensor in tensors.items():
        values = rng.standard_normal(tensor.shape)
        if len(tensor.shape) > 1 and "position" not in canonical:
            values /= np.sqrt(tensor.cols)
        elif canonical.endswith("norm"):
            values = 1 + 0.2 * values
        else:
            values *= 0.5
        out[prefix + tensor.name] = decode("BF16", encode("BF16", values)).reshape(tensor.shape)
    return out


def random_input(shape: tuple[int, ...], seed: int) -> Array:
    """Patches or mel features."""
    return np.random.default_rng([seed, 2]).standard_normal(shape).astype(np.float32)
