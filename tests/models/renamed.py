"""The models of `reference_seeing/` with the same weights in the layout of another family.

directory  ->  RENAMED[family]  ->  a checkpoint that answers what transformers answered for the reference
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

from argosy.model.encoders.pixtral_vision import _HUB, _OWN
from tests.families.test_mistral_layouts import in_own_names, params_of
from tests.models.make_mmproj import as_internvl_chat, named_as_internvl_chat
from tests.models.safetensors_file import read_header, read_safetensors, write_safetensors
from tests.models.seeing import REFERENCE, WRITTEN

# Parts of names in Kimi-K2.5's files, and what Kimi-VL's have.
KIMI_VL = (("mm_projector", "multi_modal_projector"), ("proj.0", "linear_1"), ("proj.2", "linear_2"))


def write_internvl_chat(directory: Path, **changes: Any) -> Path:
    """InternVL in OpenGVLab's layout; `changes` apply to its config."""
    source = REFERENCE / "internvl"
    header, _ = read_header(source / "model.safetensors")
    tensors, types = named_as_internvl_chat(read_safetensors(source / "model.safetensors"), header)
    write_safetensors(
        directory / "model.safetensors",
        {name: (types[name]["dtype"], value) for name, value in tensors.items()},
    )
    raw = as_internvl_chat(json.loads((source / "config.json").read_text())) | changes
    (directory / "config.json").write_text(json.dumps(raw))
    added = {"50": {"content": "<IMG_CONTEXT>"}, "51": {"content": "<img>"}}
    (directory / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    # It belongs to another processor, which OpenGVLab's code does not use.
    clip = {
        "crop_size": 448,
        "do_center_crop": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "size": 448,
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(clip))
    return directory


def write_mistral4(directory: Path) -> Path:
    """Mistral-3 in Mistral's own layout: its names, and the pairs of queries and keys of the tower adjacent."""
    source = REFERENCE / "mistral3"
    raw = json.loads((source / "config.json").read_text())
    vision = raw["vision_config"]
    num_heads = vision["num_attention_heads"]
    text, tower = {}, {}
    for name, value in read_safetensors(source / "model.safetensors").items():
        if "language_model" in name or name.startswith("lm_head"):
            text[
                name.replace("language_model.model.", "model.").replace("language_model.lm_head", "lm_head")
            ] = value
            continue
        own_name = name
        for key, theirs in _HUB.items():
            own_name = own_name.replace(theirs, _OWN[key])
        is_rotated = re.search(r"attention\.[qk]_proj", name)
        halves = value.reshape(num_heads, 2, -1, *value.shape[1:]) if is_rotated else value
        tower[own_name] = halves.swapaxes(1, 2).reshape(value.shape) if is_rotated else value
    tensors = in_own_names(text) | tower
    write_safetensors(
        directory / "consolidated.safetensors", {name: ("BF16", value) for name, value in tensors.items()}
    )
    kept = ("hidden_size", "image_size", "intermediate_size", "num_attention_heads", "num_channels",
            "num_hidden_layers", "patch_size")  # fmt: skip
    after_row, after_all = WRITTEN["mistral3"].values()
    own = {key: vision[key] for key in kept} | {
        "adapter_bias": False, "add_pre_mm_projector_layer_norm": True, "image_break_token_id": after_row,
        "image_end_token_id": after_all, "image_token_id": raw["image_token_index"], "max_image_size": 1540,
        "mm_projector_id": "patch_merge", "rope_theta": 10_000.0, "spatial_merge_size": raw["spatial_merge_size"],
    }  # fmt: skip
    params = params_of(raw["text_config"]) | {"vision_encoder": own}
    (directory / "params.json").write_text(json.dumps(params))
    return directory


def write_kimi_vl(directory: Path) -> Path:
    """Kimi-K2.5 as Kimi-VL."""
    source = REFERENCE / "kimi_k25"
    header, _ = read_header(source / "model.safetensors")
    tensors = {}
    for name, value in read_safetensors(source / "model.safetensors").items():
        renamed = reduce(lambda found, pair: found.replace(*pair), KIMI_VL, name)
        tensors[renamed] = header[name]["dtype"], value
    write_safetensors(directory / "model.safetensors", tensors)
    raw = json.loads((source / "config.json").read_text())
    vision = raw["vision_config"]
    kept = ("hidden_size", "intermediate_size", "merge_kernel_size", "num_attention_heads", "num_hidden_layers",
            "patch_size")  # fmt: skip
    config = {
        "architectures": ["KimiVLForConditionalGeneration"],
        "ignore_index": -100,
        "media_placeholder_token_id": raw["media_placeholder_token_id"],
        "model_type": "kimi_vl",
        "text_config": raw["text_config"] | {"model_type": "deepseek_v3"},
        "vision_config": {key: vision[key] for key in kept}
        | {f"init_{key}": vision[key] for key in ("pos_emb_height", "pos_emb_width")}
        | {"model_type": "moonvit", "projector_ln_eps": raw["projection_layer_norm_eps"]},
    }
    (directory / "config.json").write_text(json.dumps(config))
    settings = json.loads((source / "preprocessor_config.json").read_text())
    merge = settings["merge_size"]
    own = {key: settings[key] for key in ("image_mean", "image_std", "patch_size")} | {
        "image_processor_type": "KimiVLImageProcessor",
        "in_token_limit": settings["max_patches"],
        "merge_kernel_size": [merge, merge],
        "num_pooled_tokens": 1024,
        "pad_input": True,
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(own))
    return directory


# By family: the reference's, and what writes it.
RENAMED: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "internvl_chat": ("internvl", write_internvl_chat),
    "kimi_vl": ("kimi_k25", write_kimi_vl),
    "mistral4": ("mistral3", write_mistral4),
}
