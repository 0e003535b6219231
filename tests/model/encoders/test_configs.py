"""Configs of released towers are read; whatever could change the arithmetic is refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from argosy import _native
from argosy.errors import CheckpointError, UnsupportedModel, UsageError
from argosy.model.encoders import (
    gemma_vision,
    glm_vision,
    intern_vit,
    llama4_vision,
    minimax_vision,
    moon_vit,
    omni_audio,
    pixtral_vision,
    qwen_vision,
    step_vision,
)
from argosy.model.reading.config_reader import ConfigReader
from tests.families.published import llama4
from tests.families.published_internvl import INTERN_VIT, INTERN_VIT_6B
from tests.model.encoders.open_tower import PARTS, dense_weights
from tests.models.tiny_encoders import CONFIGS, RawConfig, Sizes, random_tensors

QWEN3_VL: RawConfig = {
    "deepstack_visual_indexes": [8, 16, 24],
    "depth": 27,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "in_channels": 3,
    "initializer_range": 0.02,
    "intermediate_size": 4304,
    "model_type": "qwen3_vl_moe",
    "num_heads": 16,
    "num_position_embeddings": 2304,
    "out_hidden_size": 2048,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
QWEN3_5 = QWEN3_VL | {"deepstack_visual_indexes": [], "model_type": "qwen3_5_moe"}
QWEN3_OMNI = QWEN3_VL | {
    "_name_or_path": "",
    "add_cross_attention": False,
    "apply_vit_abs_pos_embed": True,
    "bos_token_id": None,
    "dtype": None,
    "eos_token_id": None,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "image_size": 768,
    "in_chans": 3,
    "is_decoder": False,
    "model_type": "qwen3_omni_moe_vision_encoder",
    "spatial_patch_size": 16,
    "tokens_per_second": 2,
}
OMNI_AUDIO: RawConfig = {
    "activation_dropout": 0,
    "activation_function": "gelu",
    "attention_dropout": 0,
    "conv_chunksize": 500,
    "d_model": 1280,
    "downsample_hidden_size": 480,
    "dropout": 0,
    "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
    "encoder_layers": 32,
    "initializer_range": 0.02,
    "max_source_positions": 1500,
    "model_type": "qwen3_omni_moe_audio_encoder",
    "n_window": 50,
    "n_window_infer": 800,
    "num_hidden_layers": 32,
    "num_mel_bins": 128,
    "output_dim": 2048,
    "scale_embedding": False,
}
GLM_4_5V: RawConfig = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "depth": 24,
    "hidden_act": "silu",
    "hidden_dropout_prob": 0.0,
    "hidden_size": 1536,
    "image_size": 336,
    "in_channels": 3,
    "initializer_range": 0.02,
    "intermediate_size": 10944,
    "model_type": "glm4v_moe",
    "num_heads": 12,
    "out_hidden_size": 4096,
    "patch_size": 14,
    "rms_norm_eps": 1e-05,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
KIMI_K25: RawConfig = {
    "_attn_implementation": "flash_attention_2",
    "init_pos_emb_height": 64,
    "init_pos_emb_time": 4,
    "init_pos_emb_width": 64,
    "merge_kernel_size": [2, 2],
    "merge_type": "sd2_tpool",
    "mm_hidden_size": 1152,
    "mm_projector_type": "patchmerger",
    "patch_size": 14,
    "pos_emb_type": "divided_fixed",
    "projector_hidden_act": "gelu",
    "projector_ln_eps": 1e-05,
    "text_hidden_size": 7168,
    "video_attn_type": "spatial_temporal",
    "vt_hidden_size": 1152,
    "vt_intermediate_size": 4304,
    "vt_num_attention_heads": 16,
    "vt_num_hidden_layers": 27,
}
GEMMA_4: RawConfig = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "default_output_length": 280,
    "global_head_dim": 72,
    "head_dim": 72,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "initializer_range": 0.02,
    "intermediate_size": 4304,
    "max_position_embeddings": 131072,
    "model_type": "gemma4_vision",
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "patch_size": 16,
    "pooling_kernel_size": 3,
    "position_embedding_size": 10240,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"},
    "standardize": True,
    "use_clipped_linears": False,
}


PIXTRAL: RawConfig = {
    "attention_dropout": 0.0,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "image_size": 1540,
    "initializer_range": 0.02,
    "intermediate_size": 4096,
    "model_type": "pixtral",
    "num_attention_heads": 16,
    "num_channels": 3,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "rope_theta": 10000.0,
}
# In Mistral-Large-3's params.json.
PIXTRAL_OF_LARGE_3: RawConfig = {
    "adapter_bias": False,
    "add_pre_mm_projector_layer_norm": True,
    "hidden_size": 1664,
    "image_break_token_id": 12,
    "image_end_token_id": 13,
    "image_size": 1540,
    "image_token_id": 10,
    "intermediate_size": 8192,
    "max_image_size": 1540,
    "mm_projector_id": "patch_merge",
    "num_attention_heads": 16,
    "num_channels": 3,
    "num_hidden_layers": 48,
    "patch_size": 14,
    "rope_theta": 10000.0,
    "spatial_merge_size": 2,
}


STEP_3_7: RawConfig = {
    "heads": 16,
    "hidden_act": "quick_gelu",
    "image_size": 728,
    "layer_norm_eps": 1e-05,
    "layers": 47,
    "ls_init_value": 0.1,
    "mlp_ratio": 8960 / 1536,
    "model_type": "perception_encoder",
    "num_channels": 3,
    "patch_size": 14,
    "use_abs_posemb": True,
    "use_cls_token": False,
    "use_ln_post": False,
    "use_ln_pre": True,
    "use_rope2d": True,
    "width": 1536,
}


MINIMAX_M3: RawConfig = {
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "image_size": 2016,
    "img_token_compression_config": {
        "image_token_compression_method": "patch_merge",
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
    "intermediate_size": 5120,
    "layer_norm_eps": 1e-05,
    "model_type": "clip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 32,
    "patch_size": 14,
    "position_embedding_type": "rope",
    "projection_dim": 6144,
    "rope_mode": "3d",
    "rope_theta": 10000.0,
    "vision_segment_max_frames": 4,
}


def config_reader(raw: RawConfig) -> ConfigReader:
    return ConfigReader(raw, "this family", within="vision_config")


def read_kimi(raw: RawConfig, **wrapper: Any) -> moon_vit.MoonViTConfig:
    return moon_vit.read_config(config_reader(raw), ConfigReader(wrapper, "kimi_k25"), hidden_size=7168)


def text_model(hidden_size: int) -> Any:
    return SimpleNamespace(hidden_size=hidden_size, norm_eps=1e-6)


def read_pixtral(raw: RawConfig, **wrapper: Any) -> pixtral_vision.PixtralConfig:
    around = ConfigReader(wrapper, "mistral3")
    return pixtral_vision.read_config(config_reader(raw), around, text_model(4096))


def read_intern_vit(raw: RawConfig, **wrapper: Any) -> intern_vit.InternViTConfig:
    return intern_vit.read_config(config_reader(raw), ConfigReader(wrapper, "internvl"), text_model(2048))


def read_intern_vit_6b(raw: RawConfig) -> intern_vit.InternViTConfig:
    return intern_vit.read_chat_config(
        config_reader(raw), ConfigReader({}, "internvl_chat"), text_model(4096)
    )


def read_step(raw: RawConfig, **wrapper: Any) -> step_vision.StepVisionConfig:
    own = config_reader({key: value for key, value in raw.items() if key != "model_type"})
    return step_vision.read_config(own, ConfigReader(wrapper, "step3p7"), text_model(4096))


def read_minimax(raw: RawConfig, **wrapper: Any) -> minimax_vision.MiniMaxVisionConfig:
    own = config_reader({key: value for key, value in raw.items() if key != "model_type"})
    return minimax_vision.read_config(own, ConfigReader(wrapper, "minimax_m3_vl"), text_model(6144))


# The config of a released tower, how it is read, its tensors, and millions of parameters, as transformers counts them.
RELEASED: dict[str, tuple[RawConfig, Callable[[RawConfig], Any], Callable[[Any], Any], int]] = {
    "Qwen3-VL": (QWEN3_VL, lambda raw: qwen_vision.read_config(config_reader(raw)), qwen_vision.tensors, 539),
    "Qwen3.5": (
        QWEN3_5,
        lambda raw: qwen_vision.read_config(config_reader(raw), has_deepstack=False),
        qwen_vision.tensors,
        447,
    ),
    "Qwen3-Omni": (
        QWEN3_OMNI,
        lambda raw: qwen_vision.read_config(config_reader(raw)),
        lambda config: qwen_vision.tensors(config, is_omni=True),
        539,
    ),
    "Qwen3-Omni audio": (
        OMNI_AUDIO,
        lambda raw: omni_audio.read_config(config_reader(raw)),
        omni_audio.tensors,
        648,
    ),
    "GLM-4.5V": (GLM_4_5V, lambda raw: glm_vision.read_config(config_reader(raw)), glm_vision.tensors, 859),
    "Kimi-K2.5": (KIMI_K25, read_kimi, moon_vit.tensors, 471),
    "MiniMax-M3": (MINIMAX_M3, read_minimax, minimax_vision.tensors, 866),
    "Gemma-4": (
        GEMMA_4,
        lambda raw: gemma_vision.read_config(config_reader(raw), hidden_size=2816),
        gemma_vision.tensors,
        573,
    ),
    "Llama-4": (
        llama4()["vision_config"] | {"model_type": "llama4_vision_model"},
        lambda raw: llama4_vision.read_config(
            config_reader({key: value for key, value in raw.items() if key != "model_type"}), text_model(5120)
        ),
        llama4_vision.tensors,
        872,
    ),
    "InternVL3.5-30B": (INTERN_VIT, read_intern_vit, intern_vit.tensors, 317),
    "InternVL3.5-241B": (
        INTERN_VIT_6B,
        read_intern_vit_6b,
        lambda config: intern_vit.tensors(config, intern_vit._CHAT),
        5606,
    ),
    "Step-3.7-Flash": (STEP_3_7, read_step, step_vision.tensors, 1981),
    "Mistral-Small-4": (PIXTRAL, read_pixtral, pixtral_vision.tensors, 428),
    "Mistral-Large-3": (
        PIXTRAL_OF_LARGE_3,
        lambda raw: pixtral_vision.read_own_config(config_reader(raw), text_model(7168)),
        lambda config: pixtral_vision.tensors(config, pixtral_vision._OWN),
        2570,
    ),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_towers_have_their_number_of_parameters(name: str) -> None:
    raw, read, tensors, millions = RELEASED[name]
    found = sum(math.prod(tensor.shape) for tensor in tensors(read(raw)).values())
    assert round(found / 1e6) == millions


@pytest.mark.parametrize("name", RELEASED)
def test_an_unknown_key_is_refused(name: str) -> None:
    raw, read, _, _ = RELEASED[name]
    with pytest.raises(UnsupportedModel, match="window_size") as error:
        read(raw | {"window_size": 112})
    assert error.value.facts["key"] == "window_size"


REFUSED = [
    ("Qwen3-VL", "hidden_act", "quick_gelu"),
    ("Qwen3-VL", "hidden_size", 1160),
    ("Qwen3-VL", "num_position_embeddings", 2303),
    ("Qwen3-VL", "deepstack_visual_indexes", [8, 24, 16]),
    ("Qwen3-VL", "deepstack_visual_indexes", [8, 16, 27]),
    ("Qwen3-VL", "rope_parameters", {"rope_type": "yarn", "rope_theta": 10000.0}),
    ("Qwen3-VL", "rope_parameters", {"rope_theta": 0}),
    ("Qwen3.5", "deepstack_visual_indexes", [8]),
    ("Qwen3-Omni", "apply_vit_abs_pos_embed", False),
    ("Qwen3-Omni audio", "activation_function", "relu"),
    ("Qwen3-Omni audio", "scale_embedding", True),
    ("Qwen3-Omni audio", "n_window", 48),
    ("Qwen3-Omni audio", "n_window_infer", 99),
    ("Qwen3-Omni audio", "d_model", 1290),
    ("Qwen3-Omni audio", "max_source_positions", 12),
    ("GLM-4.5V", "hidden_act", "gelu"),
    ("GLM-4.5V", "hidden_size", 1540),
    ("GLM-4.5V", "image_size", 13),
    ("MiniMax-M3", "hidden_act", "quick_gelu"),
    ("MiniMax-M3", "hidden_size", 80),
    ("MiniMax-M3", "hidden_size", 1281),
    ("MiniMax-M3", "num_channels", 4),
    ("MiniMax-M3", "position_embedding_type", "learned"),
    ("MiniMax-M3", "projection_dim", 4096),
    ("MiniMax-M3", "rope_mode", "2d"),
    ("Kimi-K2.5", "merge_type", "sd2"),
    ("Kimi-K2.5", "pos_emb_type", "learnable"),
    ("Kimi-K2.5", "video_attn_type", "spatial"),
    ("Kimi-K2.5", "mm_projector_type", "patchmergerv2"),
    ("Kimi-K2.5", "projector_hidden_act", "silu"),
    ("Kimi-K2.5", "merge_kernel_size", [2, 1]),
    ("Kimi-K2.5", "init_pos_emb_width", 32),
    ("Kimi-K2.5", "text_hidden_size", 4096),
    ("Kimi-K2.5", "mm_hidden_size", 1024),
    ("Kimi-K2.5", "vt_hidden_size", 1160),
    ("InternVL3.5-30B", "use_mean_pooling", False),
    ("InternVL3.5-30B", "use_absolute_position_embeddings", False),
    ("InternVL3.5-30B", "use_mask_token", True),
    ("InternVL3.5-30B", "norm_type", "group_norm"),
    ("InternVL3.5-30B", "hidden_act", "quick_gelu"),
    ("InternVL3.5-30B", "image_size", [448, 224]),
    ("InternVL3.5-30B", "hidden_size", 1030),
    ("InternVL3.5-241B", "num_channels", 4),
    ("Mistral-Small-4", "hidden_act", "quick_gelu"),
    ("Mistral-Small-4", "num_channels", 1),
    ("Mistral-Small-4", "head_dim", 128),
    ("Mistral-Large-3", "hidden_size", 1672),
    ("Mistral-Small-4", "rope_parameters", {"rope_type": "yarn", "rope_theta": 10000.0}),
    ("Mistral-Large-3", "mm_projector_id", "linear"),
    ("Mistral-Large-3", "add_pre_mm_projector_layer_norm", False),
    ("Llama-4", "hidden_act", "gelu_pytorch_tanh"),
    ("Llama-4", "hidden_size", 1416),
    ("Llama-4", "image_size", 350),
    ("Llama-4", "intermediate_size", 5000),
    ("Llama-4", "multi_modal_projector_bias", True),
    ("Llama-4", "norm_eps", 1e-6),
    ("Llama-4", "num_channels", 1),
    ("Llama-4", "pixel_shuffle_ratio", 0.4),
    ("Llama-4", "projector_output_dim", 4000),
    ("Llama-4", "vision_feature_layer", -2),
    ("Llama-4", "vision_feature_select_strategy", "full"),
    ("Llama-4", "vision_output_dim", 7680),
    ("Step-3.7-Flash", "hidden_act", "gelu"),
    ("Step-3.7-Flash", "image_size", 742),
    ("Step-3.7-Flash", "num_channels", 1),
    ("Step-3.7-Flash", "rope_parameters", {"rope_type": "yarn", "rope_theta": 10000.0}),
    ("Step-3.7-Flash", "use_abs_posemb", False),
    ("Step-3.7-Flash", "use_cls_token", True),
    ("Step-3.7-Flash", "use_ln_pre", False),
    ("Step-3.7-Flash", "use_ln_post", True),
    ("Step-3.7-Flash", "use_rope2d", False),
    ("Step-3.7-Flash", "width", 1544),
    ("Step-3.7-Flash", "intermediate_size", 8000),
    ("Gemma-4", "use_clipped_linears", True),
    ("Gemma-4", "num_key_value_heads", 5),
    ("Gemma-4", "head_dim", 70),
    ("Gemma-4", "hidden_activation", "silu"),
    ("Gemma-4", "attention_bias", True),
]


@pytest.mark.parametrize(("name", "key", "value"), REFUSED, ids=[f"{name} {key}" for name, key, _ in REFUSED])
def test_a_value_that_changes_the_arithmetic_is_refused(name: str, key: str, value: object) -> None:
    raw, read, _, _ = RELEASED[name]
    with pytest.raises(CheckpointError, match=key) as error:
        read(raw | {key: value})
    assert error.value.facts["key"] == key


def test_both_spellings_of_kimi_give_the_same_config() -> None:
    of_transformers = {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "merge_kernel_size": [2, 2],
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
        "pos_emb_height": 64,
        "pos_emb_time": 4,
        "pos_emb_width": 64,
    }
    wrapper = {"projection_hidden_size": 1152, "projection_layer_norm_eps": 1e-5}
    assert read_kimi(KIMI_K25) == read_kimi(of_transformers, **wrapper) == read_kimi({})


def test_another_projector_of_internvl_is_refused() -> None:
    for wrapper in (
        {"vision_feature_layer": -4},
        {"vision_feature_select_strategy": "full"},
        {"projector_hidden_act": "relu"},
        {"downsample_ratio": 0.3},
    ):
        with pytest.raises(UnsupportedModel, match=f"asks for {next(iter(wrapper))}"):
            read_intern_vit(INTERN_VIT, **wrapper)
    assert read_intern_vit(INTERN_VIT, downsample_ratio=0.25).merge == 4


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("projector_hidden_act", "silu"),
        ("multimodal_projector_bias", False),
        ("vision_feature_layer", -2),
        ("vision_feature_select_strategy", "default"),
    ],
)
def test_another_projector_of_minimax_is_refused(key: str, value: object) -> None:
    with pytest.raises(UnsupportedModel, match=key):
        read_minimax(MINIMAX_M3, **{key: value})


def test_another_compression_of_minimax_is_refused() -> None:
    assert read_minimax(MINIMAX_M3 | {"img_token_compression_config": {"spatial_merge_size": 3}}).merge == 3
    for key, value in (("image_token_compression_method", "pool"), ("kernel", 1)):
        with pytest.raises(UnsupportedModel, match=key):
            read_minimax(MINIMAX_M3 | {"img_token_compression_config": {key: value}})


def test_another_projector_of_pixtral_is_refused() -> None:
    for wrapper in ({"vision_feature_layer": -2}, {"projector_hidden_act": "relu"}):
        with pytest.raises(UnsupportedModel, match=f"asks for {next(iter(wrapper))}"):
            read_pixtral(PIXTRAL, **wrapper)
    assert read_pixtral(PIXTRAL, multimodal_projector_bias=True).has_bias
    assert read_pixtral(PIXTRAL, spatial_merge_size=3).merge == 3


def test_another_projector_of_step_is_refused() -> None:
    for key, value in (
        ("understand_projector_stride", 1),
        ("image_token_len", 168),
        ("patch_token_len", 80),
        ("patch_token_len", 36),
    ):
        with pytest.raises(UnsupportedModel, match=f"asks for {key}"):
            read_step(STEP_3_7, **{key: value})
    assert read_step(STEP_3_7) == read_step({}, image_token_len=169, patch_token_len=81)
    assert read_step({}, patch_token_len=100).window_side == 40
    assert read_step({}, projector_bias=True).has_projector_bias


def test_a_projector_of_another_size_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="projection_hidden_size 1024"):
        read_kimi(KIMI_K25, projection_hidden_size=1024)


@pytest.mark.parametrize(
    ("name", "grid", "words"),
    [
        ("kimi_k25", (5, 2, 2), "5 frames, and the vision tower takes at most 4"),
        ("gemma4", (1, 2, 502), "502 patches on one side, and the vision tower takes at most 500"),
    ],
)
def test_an_input_beyond_a_table_is_refused(name: str, grid: tuple[int, ...], words: str) -> None:
    part = PARTS[name]
    config = part.read(CONFIGS[part.family](Sizes()))
    tensors = part.tensors(config)
    weights = dense_weights(tensors, part.prefix, random_tensors(tensors, part.prefix, 0))
    tower = part.tower(config, weights, _native.Runtime(1))
    patches = np.zeros((math.prod(grid), config.patch_values), np.float32)
    with pytest.raises(UsageError, match=words):
        next(tower.encode(patches, grid))
