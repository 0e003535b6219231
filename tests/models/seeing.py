"""Tiny models that see and hear, whole: their configs and prompts (see `make_seeing.py`)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tokenizers

from argosy.model.encoders.encoder import Encoder
from argosy.model.encoders.table import ENCODERS
from argosy.model.families import open_model
from argosy.model.reading.config_reader import ConfigReader
from tests.models import tiny_encoders
from tests.models.safetensors_file import read_checkpoint, write_safetensors
from tests.models.tiny import qwen2_moe, text_of, write_model
from tests.models.tiny_delta import qwen3_5_moe
from tests.models.tiny_encoders import Sizes
from tests.models.tiny_gemma import gemma4
from tests.models.tiny_latent import kimi_k25, mistral3
from tests.models.tiny_latent import mistral4 as tiny_mistral4
from tests.models.tiny_llama4 import OF_GGUF, apart, llama4
from tests.models.tiny_minimax_m3 import minimax_m3
from tests.models.tiny_ocr import deepseek_ocr2
from tests.models.tiny_qwen4 import qwen4_exp
from tests.models.tiny_step import step3p7
from tests.models.tiny_wrappers import glm4v_moe, internvl, qwen3_omni_moe, qwen3_vl_moe
from tests.prompt.tokenizers_for_tests import byte_level_json, write_tokenizer

REFERENCE = Path(__file__).parent / "reference_seeing"
RATE = 16_000
IMAGE_TOKENS = 600  # cap on a picture's positions, above what these models make
SIZES = Sizes()


def with_towers(family: str, raw: dict[str, Any]) -> dict[str, Any]:
    """The text model of `raw` with the towers of `tiny_encoders`, whose rows have the size of its hidden state."""
    towers = tiny_encoders.CONFIGS[family](SIZES)
    hidden = text_of(raw)["hidden_size"]
    own, theirs = (
        (raw["thinker_config"], towers["thinker_config"]) if "thinker_config" in raw else (raw, towers)
    )
    for key in ("vision_config", "audio_config"):
        if theirs.get(key) is not None:
            own[key] = dict(theirs[key])
            for size in ("out_hidden_size", "output_dim", "projection_dim", "text_hidden_size"):
                if size in own[key]:
                    own[key][size] = hidden
    for key in (
        "projection_hidden_size",
        "projection_layer_norm_eps",
        "image_token_id",
        "boi_token_id",
        "eoi_token_id",
        "image_token_len",
        "patch_token_len",
        "projector_bias",
        "projector_hidden_size",
    ):
        if key in theirs:
            own[key] = theirs[key]
    if "media_placeholder_token_id" in own:  # the hub's name for it
        own["media_placeholder_token_id"] = own["image_token_id"]
        own["video_token_id"] = 52
    if family in ("llama4", "minimax_m3_vl"):  # as for Gemma below
        own["vision_config"]["rope_parameters"] = {"rope_theta": 10_000.0, "rope_type": "default"}
    if family == "mistral3":  # as for Gemma below
        own["vision_config"]["rope_parameters"] = {"rope_theta": 10_000.0, "rope_type": "axial"}
    if family == "gemma4":
        own["video_token_id"] = 51
        own["vision_config"] |= {  # GGUF files have no other values of these, except of the first
            "position_embedding_size": 80,
            "pooling_kernel_size": 3,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"},
        }
    return raw


CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_vl_moe": with_towers("qwen3_vl_moe", qwen3_vl_moe()),
    "qwen3_5_moe": with_towers("qwen3_5_moe", qwen3_5_moe()),
    "qwen4_exp": with_towers(
        "qwen4_exp", qwen4_exp(linear_key_head_dim=8, linear_value_head_dim=8, max_position_embeddings=512)
    ),
    "qwen3_omni_moe": with_towers("qwen3_omni_moe", qwen3_omni_moe()),
    "glm4v_moe": with_towers("glm4v_moe", glm4v_moe()),
    "kimi_k25": with_towers("kimi_k25", kimi_k25()),
    "minimax_m3_vl": with_towers("minimax_m3_vl", minimax_m3()),
    "gemma4": with_towers("gemma4", gemma4(max_position_embeddings=256)),
    "llama4": with_towers("llama4", llama4(**OF_GGUF, num_local_experts=3)),
    "internvl": with_towers("internvl", internvl(hidden_size=24, num_experts=5, num_hidden_layers=2)),
    # The composition of the demo model.
    "qwen2_moe": with_towers(
        "qwen2_moe",
        qwen2_moe(
            hidden_size=24,
            intermediate_size=16,
            moe_intermediate_size=8,
            num_attention_heads=3,
            num_experts=5,
            num_hidden_layers=2,
            num_key_value_heads=3,
            shared_expert_intermediate_size=12,
            vocab_size=64,
        ),
    )
    | {"audio_token_id": 51},
    "step3p7": with_towers("step3p7", step3p7(vocab_size=64)),
    "deepseek_ocr2": with_towers("deepseek_ocr2", deepseek_ocr2(max_position_embeddings=1024)),
    # With a factor of 1, transformers and llama.cpp scale scores as the makers do. GGUF files have no other beta.
    "mistral3": with_towers(
        "mistral3",
        mistral3(
            rope_parameters=tiny_mistral4()["rope_parameters"] | {"factor": 1.0, "llama_4_scaling_beta": 0.1}
        ),
    ),
}


# Texts that chat templates write for media, in the families for which llama.cpp's converter writes towers.
MMPROJ_PLACEHOLDERS = {
    "qwen3_vl_moe": {"image_token_id": "<|image_pad|>"},
    "qwen3_5_moe": {"image_token_id": "<|image_pad|>"},
    "qwen4_exp": {"image_token_id": "<|image_pad|>"},
    "qwen3_omni_moe": {"image_token_id": "<|image_pad|>", "audio_token_id": "<|audio_pad|>"},
    "glm4v_moe": {"image_token_id": "<|image|>"},
    "kimi_k25": {"media_placeholder_token_id": "<|media_pad|>"},
    "minimax_m3_vl": {"image_token_index": "]<]image[>["},
    "gemma4": {"image_token_id": "<|image|>", "boi_token_id": "<|image>", "eoi_token_id": "<image|>"},
    "llama4": {"image_token_index": "<|patch|>"},
    "mistral3": {"image_token_index": "[IMG]"},
    "internvl": {"image_token_id": "<IMG_CONTEXT>"},
    "step3p7": {"image_token_id": "<im_patch>"},
}
# Texts of control tokens around a picture or between its rows, and their ids, which no config names.
WRITTEN: dict[str, dict[str, int]] = {
    "deepseek_v4": {"<｜deepseek_image｜>": 50},
    "llama4": {
        "<|image_start|>": 53, "<|image_end|>": 54, "<|tile_x_separator|>": 55, "<|tile_y_separator|>": 56,
        "<|image|>": 50,
    },
    "mistral3": {"[IMG_BREAK]": 63, "[IMG_END]": 64},
    "internvl": {"<img>": 51, "</img>": 52},
    "minimax_m3_vl": {"]<]start of image[>[": 53, "]<]end of image[>[": 54},
    "step3p7": {
        "<im_start>": 53, "<im_end>": 54, "<patch_start>": 55, "<patch_end>": 56, "<patch_newline>": 57,
    },
}  # fmt: skip


def write(directory: Path, family: str, raw: dict[str, Any], seed: int) -> None:
    """Write a text model with whole towers instead of the few tensors of towers that it has, and its processor."""
    write_model(directory, raw, seed=seed)
    for name, made in (
        ("preprocessor_config.json", processor_config(family)),
        ("video_preprocessor_config.json", video_processor_config(family)),
    ):
        if made:
            (directory / name).write_text(json.dumps(made, indent=2) + "\n")
    write_marks(directory, family)
    tensors = {
        # Not transposed, as transformers writes them, so that the model runs in place.
        name: ("BF16", value.swapaxes(1, 2) if family == "qwen3_vl_moe" and ".experts." in name else value)
        for name, value in read_checkpoint(directory).items()
    }
    others = open_model(directory).others
    if family == "llama4":  # runs in place so
        tensors = {
            name: ("BF16", value) for name, value in apart({n: v for n, (_, v) in tensors.items()}).items()
        }
    for encoder, config in complete(family, raw):
        replaced = {
            name for name in others if name.startswith(encoder.prefix or ("vision", "vit_", "multi_modal"))
        }
        tensors = {name: value for name, value in tensors.items() if name not in replaced}
        made = tiny_encoders.random_tensors(encoder.tensors(config), encoder.prefix, seed)
        tensors |= {name: ("BF16", value) for name, value in made.items()}
    write_safetensors(directory / "model.safetensors", tensors)


def write_marks(directory: Path, family: str) -> None:
    """Name the tokens of a picture, or around it, in `tokenizer_config.json`, where the config does not."""
    if family not in WRITTEN:  # unlimited_ocr, say: transformers' model, of no family here
        return
    named = {name for one in ENCODERS[family] for name in (*(one.marks or ()), *one.placeholders)}
    if not named.isdisjoint(WRITTEN[family]):
        added = {str(token_id): {"content": text} for text, token_id in WRITTEN[family].items()}
        (directory / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}) + "\n")


SEEING_TEMPLATE = """{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}
{%- if part.type == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- elif part.type == 'video' %}{{ '<|vision_start|><|video_pad|><|vision_end|>' }}
{%- elif part.type == 'audio' %}{{ '<|audio_pad|>' }}
{%- elif 'text' in part %}{{ part.text }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
"""As Qwen's: content is text, or a list of parts."""


def seeing_tokenizer() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer.from_str(byte_level_json())
    names = (
        "image_pad", "audio_pad", "vision_start", "vision_end", "video_pad", "audio_start", "audio_end"
    )  # fmt: skip
    made.add_special_tokens([f"<|{name}|>" for name in names])
    return made


def write_seeing_chat_model(directory: Path) -> Path:
    """A tiny Qwen3.5 that takes pictures and videos, with a tokenizer and a chat template; it answers nonsense."""
    core = seeing_tokenizer()
    raw = with_towers("qwen3_5_moe", qwen3_5_moe(vocab_size=544, max_position_embeddings=512))
    for kind in ("image", "video"):
        raw[f"{kind}_token_id"] = core.token_to_id(f"<|{kind}_pad|>")
    write(directory, "qwen3_5_moe", raw, seed=3)
    config = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": SEEING_TEMPLATE}
    return write_tokenizer(directory, core.to_str(), config)


def complete(family: str, raw: dict[str, Any]) -> list[tuple[Encoder, Any]]:
    """The towers of a family with their configs."""
    found = []
    for encoder in ENCODERS[family]:
        around = raw
        for key in encoder.path[:-1]:
            around = around[key]
        inner = {key: value for key, value in around[encoder.path[-1]].items() if key != "model_type"}
        text = text_of(raw)
        model: Any = SimpleNamespace(hidden_size=text["hidden_size"], norm_eps=text.get("rms_norm_eps"))
        found.append(
            (encoder, encoder.read(ConfigReader(inner, family), ConfigReader(around, family), model))
        )
    return found


def processor_config(family: str) -> dict[str, Any]:
    """A `preprocessor_config.json`."""
    (_, config), *_ = complete(family, CONFIGS[family])
    if family == "gemma4":
        return {
            "do_normalize": False,
            "image_mean": [0.0, 0.0, 0.0],
            "image_processor_type": "Gemma4ImageProcessor",
            "image_std": [1.0, 1.0, 1.0],
            "max_soft_tokens": 70,
            "patch_size": config.patch_size,
            "pooling_kernel_size": config.merge,
        }
    if family == "llama4":
        side = config.position_side * config.patch_size
        return {
            "image_mean": [0.5, 0.4, 0.3],
            "image_processor_type": "Llama4ImageProcessorFast",
            "image_std": [0.5, 0.25, 0.3],
            "merge_size": config.merge,
            "patch_size": config.patch_size,
            "resample": 2,
            "size": {"height": side, "width": side},
        }
    if family == "deepseek_ocr2":
        return {
            "image_mean": [0.5, 0.4, 0.3],
            "image_processor_type": "DeepseekOcr2ImageProcessor",
            "image_std": [0.5, 0.25, 0.3],
            "size": {"height": 128, "width": 128},
            "tile_size": 96,
        }
    if family == "mistral3":
        return {
            "image_mean": [0.5, 0.4, 0.3],
            "image_processor_type": "PixtralImageProcessorFast",
            "image_std": [0.5, 0.25, 0.3],
            "patch_size": config.patch_size,
            "size": {"longest_edge": 40},
            "spatial_merge_size": config.merge,
        }
    if family == "step3p7":
        side, window = (one * config.patch_size for one in (config.position_side, config.window_side))
        return {
            "image_mean": [0.5, 0.4, 0.3],
            "image_processor_type": "Step3p7ImageProcessor",
            "image_std": [0.5, 0.25, 0.3],
            "max_image_size": 40,
            "patch_size": window,
            "resample": 2,
            "size": {"height": side, "width": side},
            "vision_patch_size": config.patch_size,
        }
    if family == "internvl":
        tile = config.position_side * config.patch_size
        return {
            "crop_to_patches": True,
            "image_mean": [0.5, 0.4, 0.3],
            "image_processor_type": "GotOcr2ImageProcessorFast",
            "image_std": [0.5, 0.25, 0.3],
            "max_patches": 4,
            "merge_size": config.merge,
            "patch_size": config.patch_size,
            "size": {"height": tile, "width": tile},
            "tile_size": tile,
        }
    names = {
        "glm4v_moe": "Glm4vImageProcessor",
        "kimi_k25": "Kimi_K25ImageProcessor",
        "minimax_m3_vl": "MiniMaxM3VLImageProcessor",
    }
    made: dict[str, Any] = {
        "image_processor_type": names.get(family, "Qwen2VLImageProcessorFast"),
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.5, 0.25, 0.3],
        "merge_size": config.merge,
        "patch_size": config.patch_size,
    }
    if family == "kimi_k25":
        return made | {"max_patches": 64, "size": {"max_height": 32, "max_width": 32}}
    pixels = (config.patch_size * config.merge) ** 2
    made |= {
        "size": {"shortest_edge": 4 * pixels, "longest_edge": 24 * pixels},
        "temporal_patch_size": config.patch_frames,
    }
    if family in ("qwen2_moe", "qwen3_omni_moe"):
        (_, _), (_, audio) = complete(family, CONFIGS[family])
        made |= {"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": audio.num_mels}
    return made


# Most positions of a video, and of a picture or group of frames beside it: the fewest that Gemma takes.
VIDEO_TOKENS, GROUP_TOKENS = 32, 70


def video_processor_config(family: str) -> dict[str, Any]:
    """A `video_preprocessor_config.json`; empty for Qwen3-Omni, which has none, and for towers of pictures alone."""
    if family not in VIDEO_PROMPTS or family == "qwen3_omni_moe":
        return {}
    made = processor_config(family)
    del made["image_processor_type"]
    if family == "gemma4":
        return made | {"video_processor_type": "Gemma4VideoProcessor", "num_frames": 4}
    if family == "kimi_k25":
        return made | {"video_processor_type": "Kimi_K25VideoProcessor", "temporal_patch_size": 4}
    name = "Glm4vVideoProcessor" if family == "glm4v_moe" else "Qwen3VLVideoProcessor"
    size = made["size"]
    return made | {
        "video_processor_type": name,
        "size": {"shortest_edge": size["shortest_edge"], "longest_edge": 4 * size["longest_edge"]},
    }


_CONTROLS = {
    "image_pad": 50, "image": 50, "video_pad": 52, "video": 52, "kimi_k25_video_placeholder": 52,
    "vision_start": 53, "begin_of_image": 53, "vision_end": 54, "end_of_image": 54, "audio_start": 55,
    "audio_end": 56, "audio_pad": 57, "begin_of_video": 57, "end_of_video": 58, "media_begin": 60,
    "media_content": 61, "media_end": 62,
    "gemma_video": 51, "gemma_begin": 52, "gemma_end": 53,
}  # fmt: skip


def encode_text(text: str) -> list[int]:
    """A tokenizer for texts around frames: control tokens have the ids of `CONFIGS`, and others depend on the text."""
    for written in WRITTEN.values():
        if text in written:
            return [written[text]]
    pieces = re.findall(r"<\|(\w+)\|>|(\w+|.)", text)
    return [_CONTROLS[control] if control else 20 + sum(other.encode()) % 25 for control, other in pieces]


VIDEO_PROMPTS = {
    "qwen3_vl_moe": "<|vision_start|><|video_pad|><|vision_end|>",
    "qwen3_5_moe": "<|vision_start|><|video_pad|><|vision_end|>",
    "qwen4_exp": "<|vision_start|><|video_pad|><|vision_end|>",
    "qwen3_omni_moe": "<|vision_start|><|video_pad|><|vision_end|>",
    "glm4v_moe": "<|begin_of_video|><|video|><|end_of_video|>",
    "kimi_k25": "<|kimi_k25_video_placeholder|>",
    "gemma4": "<|gemma_video|>",
}
"""The text that a chat template writes for a video, as token ids."""


def prompt_of(family: str, placeholders: list[int]) -> list[int]:
    """Token ids with one placeholder for each picture and sound."""
    raw = CONFIGS[family]
    around = raw.get("thinker_config", raw)
    begin = around.get("vision_start_token_id") or around.get("image_start_token_id") or 4
    prompt = [3, 5, 6]
    for at, token_id in enumerate(placeholders):
        is_sound = token_id == around.get("audio_token_id")
        prompt += [
            around.get("audio_start_token_id", begin) if is_sound else begin,
            token_id,
            12 + at,
            20 + at,
        ]
    return [*prompt, 30, 31]
