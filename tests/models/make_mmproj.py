"""Convert the tiny models that see to GGUF with llama.cpp's own converter: text and vision tower, a file each.

    python -O -m tests.models.make_mmproj LLAMA_CPP     # rewrite the committed files (needs torch, transformers)

Without -O, the converter asserts that Step-3.7's tower has the released sizes.

Each checkpoint of `reference_seeing/` gets `gguf/model.gguf` and `gguf/mmproj-model.gguf`. `converter.py` runs the
converter; the placeholder of pictures is among the tokens. Before, a checkpoint is put into the form that it has on the
hub where that is another one.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from tests.models.converter import convert, load
from tests.models.safetensors_file import read_header, read_safetensors, write_safetensors
from tests.models.seeing import MMPROJ_PLACEHOLDERS, REFERENCE, WRITTEN, text_of
from tests.models.tiny_llama4 import fused
from tests.models.tiny_qwen4 import constants

# Names of OpenGVLab's code for those of transformers.
INTERNVL_CHAT = {
    "vision_tower.": "vision_model.", "patch_embeddings.projection": "patch_embedding", "cls_token": "class_embedding",
    "position_embeddings": "position_embedding", "encoder.layer.": "encoder.layers.", "layernorm_before": "norm1",
    "layernorm_after": "norm2", "lambda_1": "ls1", "lambda_2": "ls2", "attention.projection_layer": "attn.proj",
    "attention.q_norm": "attn.q_norm", "attention.k_norm": "attn.k_norm", "multi_modal_projector.layer_norm": "mlp1.0",
    "multi_modal_projector.linear_1": "mlp1.1", "multi_modal_projector.linear_2": "mlp1.3",
}  # fmt: skip


def as_internvl_chat(raw: dict[str, Any]) -> dict[str, Any]:
    """The config of a tiny InternVL as OpenGVLab writes it."""
    vision = raw["vision_config"]
    kept = ("hidden_act", "hidden_size", "intermediate_size", "layer_norm_eps", "norm_type", "num_attention_heads",
            "num_channels", "num_hidden_layers")  # fmt: skip
    return {
        "architectures": ["InternVLChatModel"],
        "downsample_ratio": raw["downsample_ratio"],
        "dynamic_image_size": True,
        "force_image_size": vision["image_size"][0],
        "llm_config": raw["text_config"] | {"architectures": ["Qwen3MoeForCausalLM"]},
        "max_dynamic_patch": 4,
        "min_dynamic_patch": 1,
        "model_type": "internvl_chat",
        "pad2square": False,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internvl2_5",
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "use_thumbnail": True,
        "vision_config": {key: vision[key] for key in kept}
        | {
            "architectures": ["InternVisionModel"],
            "drop_path_rate": 0.0,
            "dropout": 0.0,
            "image_size": vision["image_size"][0],
            "initializer_factor": 0.1,
            "model_type": "intern_vit_6b",
            "patch_size": vision["patch_size"][0],
            "qk_normalization": vision["use_qk_norm"],
            "qkv_bias": vision["attention_bias"],
            "use_flash_attn": True,
        },
    }


def named_as_internvl_chat(
    tensors: dict[str, Any], header: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors in OpenGVLab's names, with one matrix for queries, keys and values; the header has their types."""
    found: dict[str, Any] = {}
    types: dict[str, Any] = {}
    for name, value in tensors.items():
        if re.search(r"attention\.[kv]_proj", name):
            continue
        joined = value
        if ".q_proj" in name and "vision" in name:
            joined = np.concatenate([tensors[name.replace("q_proj", f"{one}_proj")] for one in "qkv"])
        own = name.replace("attention.q_proj", "attn.qkv")
        for theirs, ours in INTERNVL_CHAT.items():
            own = own.replace(theirs, ours) if not own.startswith("language_model.") else own
        found[own], types[own] = joined, header[name]
    return found, types


def as_on_the_hub(source: Path, destination: Path, family: str) -> None:
    """Copy a checkpoint of `reference_seeing/`; Qwen3-VL keeps experts transposed, Kimi has other keys."""
    destination.mkdir()
    shutil.copy(source / "preprocessor_config.json", destination)
    raw = json.loads((source / "config.json").read_text())
    header, _ = read_header(source / "model.safetensors")
    tensors = read_safetensors(source / "model.safetensors")
    if family == "qwen3_vl_moe":
        for name, value in tensors.items():
            if ".mlp.experts." in name:
                tensors[name] = value.swapaxes(1, 2)
    if family == "llama4":
        dtypes = {one["dtype"] for one in header.values()}
        tensors, header = fused(tensors), {}
        header = {name: {"dtype": next(iter(dtypes))} for name in tensors}
    if family == "kimi_k25":
        vision = raw["vision_config"]
        for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers"):
            vision[f"vt_{key}"] = vision[key]
        for axis in ("height", "width", "time"):
            vision[f"init_pos_emb_{axis}"] = vision[f"pos_emb_{axis}"]
        vision["projector_ln_eps"] = raw["projection_layer_norm_eps"]
    if family == "internvl":
        raw = as_internvl_chat(raw)
        tensors, header = named_as_internvl_chat(tensors, header)
    if family in WRITTEN:
        added = {str(token_id): {"content": text} for text, token_id in WRITTEN[family].items()}
        (destination / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    (destination / "config.json").write_text(json.dumps(raw))
    stored = {name: (header[name]["dtype"], value) for name, value in tensors.items()}
    if family == "qwen4_exp":
        stored |= {name: ("I64", np.array(values)) for name, values in constants(raw).items()}
    write_safetensors(destination / "model.safetensors", stored)


def repair(model_class: Any) -> None:
    """Let the converter find the tensors of Qwen3-Omni's vision tower, which it looks for without prefix."""
    filter_tensors = model_class.filter_tensors.__func__

    def without_prefix(cls: Any, item: tuple[str, Any]) -> Any:
        name, tensor = item
        return filter_tensors(cls, (name.replace("thinker.visual.", "visual."), tensor))

    model_class.filter_tensors = classmethod(without_prefix)


def reading_config_itself() -> AbstractContextManager[Any]:
    """Let the converter read `config.json`, as with a transformers that does not know Step-3.7 or Qwen3.8; it expects
    keys and values that the classes of transformers 5.24 change.
    """
    import transformers

    unknown = ValueError("this family is unknown")
    return mock.patch.object(transformers.AutoConfig, "from_pretrained", side_effect=unknown)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("llama_cpp", type=Path)
    parser.add_argument("families", nargs="*", default=list(MMPROJ_PLACEHOLDERS))
    parser.add_argument("--out", type=Path, default=REFERENCE)
    options = parser.parse_args()
    converter = load(options.llama_cpp)
    for family in options.families:
        raw = json.loads((REFERENCE / family / "config.json").read_text())
        around = raw.get("thinker_config", raw)
        tokens = [f"token {number}" for number in range(text_of(raw)["vocab_size"])]
        for key, placeholder in MMPROJ_PLACEHOLDERS[family].items():
            tokens[around[key]] = placeholder
        for text, token_id in WRITTEN.get(family, {}).items():
            tokens[token_id] = text

        architecture = converter.get_model_architecture(raw, converter.ModelType.TEXT)
        if family == "qwen3_omni_moe":
            repair(converter.get_model_class(architecture, mmproj=True))
        directory = options.out / family / "gguf"
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            source = Path(scratch) / family
            as_on_the_hub(REFERENCE / family, source, family)
            for name, more in (("model.gguf", []), ("mmproj-model.gguf", ["--mmproj"])):
                made = Path(scratch) / name
                with reading_config_itself() if family in ("step3p7", "qwen4_exp") else nullcontext():
                    convert(converter, source, made, "--outtype", "bf16", *more, tokens=tokens)
                shutil.copy(made, directory / name)


if __name__ == "__main__":
    main()
