"""Towers with the geometry of real models and random weights, for benchmarks: their files and their inputs.

    qwen3-vl        vision tower of Qwen3-VL-30B-A3B: 27 layers of 1152, three deepstack mergers, 539 M parameters
    qwen3-omni      audio tower of Qwen3-Omni-30B-A3B: 32 layers of 1280, 648 M parameters

A tower is a directory with the tower's object of `config.json` and one safetensors file in bfloat16, with the names of
the hub. Pictures and sounds are noise: time does not depend on what they contain.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from argosy.checkpoint.safetensors import open_tensors
from argosy.checkpoint.safetensors_write import TensorToWrite, encode, write_safetensors
from argosy.media.pictures import read_picture_processor
from argosy.media.sounds import read_sound_processor
from argosy.model.encoders import EncoderTensor
from argosy.model.encoders.table import ENCODERS, Encoder
from argosy.model.reading.config_reader import ConfigReader
from common import REPOSITORY

DIRECTORY = REPOSITORY / "build" / "models" / "towers"
OUT_SIZE = 2048  # the hidden size of Qwen3-30B-A3B
RATE = 16_000  # samples per second

CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "qwen3-vl": {
        "deepstack_visual_indexes": [8, 16, 24],
        "depth": 27,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 1152,
        "in_channels": 3,
        "intermediate_size": 4304,
        "num_heads": 16,
        "num_position_embeddings": 2304,
        "out_hidden_size": OUT_SIZE,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
    "qwen3-omni": {
        "activation_function": "gelu",
        "d_model": 1280,
        "downsample_hidden_size": 480,
        "encoder_attention_heads": 20,
        "encoder_ffn_dim": 5120,
        "encoder_layers": 32,
        "max_source_positions": 1500,
        "n_window": 50,
        "n_window_infer": 800,
        "num_mel_bins": 128,
        "output_dim": OUT_SIZE,
    },
}
_FAMILIES = {"qwen3-vl": ("qwen3_vl_moe", "picture"), "qwen3-omni": ("qwen3_omni_moe", "sound")}


@dataclass(frozen=True, kw_only=True)
class Input:
    """The input of a tower: a picture of `width` x `height`, or `seconds` of sound."""

    label: str
    tower: str
    width: int = 0
    height: int = 0
    seconds: int = 0

    def media(self) -> NDArray[Any]:
        """The picture, uint8 [height, width, 3], or the sound, float32 [samples]."""
        rng = np.random.default_rng(5)
        if self.seconds:
            return rng.standard_normal(self.seconds * RATE).astype(np.float32) * np.float32(0.1)
        return rng.integers(0, 256, (self.height, self.width, 3), np.uint8)

    def values(self) -> tuple[NDArray[np.float32], tuple[int, ...]]:
        """Return the tower's input: patches and their grid (frames, rows, columns), or mel features and ()."""
        raw = CONFIGS[self.tower]
        if self.seconds:
            features = {
                "feature_extractor_type": "WhisperFeatureExtractor",
                "feature_size": raw["num_mel_bins"],
            }
            return read_sound_processor(features, padding="none").prepare(self.media()), ()
        processor = read_picture_processor(
            {
                "image_processor_type": "Qwen2VLImageProcessorFast",
                "image_mean": [0.5, 0.5, 0.5],
                "image_std": [0.5, 0.5, 0.5],
                "merge_size": raw["spatial_merge_size"],
                "patch_size": raw["patch_size"],
                "temporal_patch_size": raw["temporal_patch_size"],
            }
        )
        return processor.patches(self.media())


INPUTS = (
    Input(label="448 x 448", tower="qwen3-vl", width=448, height=448),
    Input(label="1024 x 768", tower="qwen3-vl", width=1024, height=768),
    Input(label="30 s of sound", tower="qwen3-omni", seconds=30),
)


def encoder_of(tower: str) -> tuple[Encoder, Any]:
    """The row of the families' table for a tower, and its config."""
    family, kind = _FAMILIES[tower]
    encoder = next(one for one in ENCODERS[family] if one.kind == kind)
    reader = ConfigReader(dict(CONFIGS[tower]), family)
    model: Any = type("Model", (), {"hidden_size": OUT_SIZE})
    return encoder, encoder.read(reader, reader, model)


def make(tower: str) -> Path:
    """Write a tower unless it is there; returns its directory."""
    directory = DIRECTORY / tower
    if (directory / "config.json").exists():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    encoder, config = encoder_of(tower)
    rng = np.random.default_rng(11)
    tensors: list[TensorToWrite] = [
        (tensor.name, "BF16", tensor.shape, partial(_random, tensor, rng))
        for tensor in encoder.tensors(config).values()
    ]
    write_safetensors(directory / "model.safetensors", tensors)
    (directory / "config.json").write_text(json.dumps(CONFIGS[tower], indent=2) + "\n")
    return directory


def _random(tensor: EncoderTensor, rng: np.random.Generator) -> bytes:
    """Values that keep activations of ordinary size through all layers."""
    values = rng.standard_normal(tensor.shape, dtype=np.float32)
    if len(tensor.shape) == 1:
        values *= np.float32(0.02)
        if "norm" in tensor.name or ".ln_" in tensor.name or tensor.name.startswith("ln_"):
            values += np.float32(tensor.name.endswith("weight"))
    else:
        values /= np.float32(math.sqrt(math.prod(tensor.shape[1:])))
    return encode(values, "BF16")


def make_mmproj(tower: str) -> Path:
    """Write the tower for llama.cpp's mtmd unless it is there, as its converter does with float16; returns the file.

    Needs the `gguf` package, which has llama.cpp's own names.
    """
    import gguf

    path = DIRECTORY / f"mmproj-{tower}-F16.gguf"
    if path.exists():
        return path
    raw, encoder = CONFIGS[tower], encoder_of(tower)[0]
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_type(gguf.GGUFType.MMPROJ)
    if encoder.kind == "picture":
        layers, hidden = raw["depth"], raw["hidden_size"]
        writer.add_clip_has_vision_encoder(True)
        writer.add_clip_projector_type("qwen3vl_merger")
        writer.add_vision_projection_dim(OUT_SIZE)
        writer.add_vision_image_size(math.isqrt(raw["num_position_embeddings"]) * raw["patch_size"])
        writer.add_vision_patch_size(raw["patch_size"])
        writer.add_vision_embedding_length(hidden)
        writer.add_vision_feed_forward_length(raw["intermediate_size"])
        writer.add_vision_block_count(layers)
        writer.add_vision_head_count(raw["num_heads"])
        writer.add_vision_attention_layernorm_eps(1e-6)
        writer.add_vision_image_mean([0.5, 0.5, 0.5])
        writer.add_vision_image_std([0.5, 0.5, 0.5])
        writer.add_vision_use_gelu(True)
        writer.add_vision_spatial_merge_size(raw["spatial_merge_size"])
        writer.add_vision_is_deepstack_layers(
            [layer in raw["deepstack_visual_indexes"] for layer in range(layers)]
        )
        prefix = "visual."
    else:
        layers, hidden = raw["encoder_layers"], raw["d_model"]
        writer.add_clip_has_audio_encoder(True)
        writer.add_clip_projector_type("qwen3a")
        writer.add_audio_projection_dim(OUT_SIZE)
        writer.add_audio_embedding_length(hidden)
        writer.add_audio_feed_forward_length(raw["encoder_ffn_dim"])
        writer.add_audio_block_count(layers)
        writer.add_audio_head_count(raw["encoder_attention_heads"])
        writer.add_audio_num_mel_bins(raw["num_mel_bins"])
        writer.add_audio_attention_layernorm_eps(1e-5)
        angles = np.arange(1500)[:, None] * np.exp(
            -math.log(1e4) / (hidden // 2 - 1) * np.arange(hidden // 2)
        )
        table = np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)
        writer.add_tensor("a.position_embd.weight", table)
        prefix = "audio_tower."
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, layers)
    for ref in open_tensors(make(tower)).values():
        stored = np.fromfile(ref.path, np.uint16, ref.nbytes // 2, offset=ref.offset)
        values = (stored.astype(np.uint32) << 16).view(np.float32).reshape(ref.shape)
        for name, part in _mtmd_tensors(ref.name, values, raw, names, prefix).items():
            is_matrix = part.ndim > 1 and "position" not in name and not name.endswith("bias")
            writer.add_tensor(name, np.ascontiguousarray(part, np.float16 if is_matrix else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _mtmd_tensors(
    name: str, values: NDArray[np.float32], raw: Mapping[str, Any], names: Any, prefix: str
) -> dict[str, NDArray[np.float32]]:
    """A tensor of a tower under llama.cpp's names; a patch's two frames are two tensors there."""
    if name == "patch_embed.proj.weight":
        return {"v.patch_embd.weight": values[:, :, 0], "v.patch_embd.weight.1": values[:, :, 1]}
    if name == "patch_embed.proj.bias":
        return {"v.patch_embd.bias": values}
    module, suffix = name.rsplit(".", 1)
    if module.startswith("deepstack_merger_list."):
        _, number, part = module.split(".")
        ours = part.replace("linear_fc", "fc")
        return {f"v.deepstack.{raw['deepstack_visual_indexes'][int(number)]}.{ours}.{suffix}": values}
    if module.startswith("merger."):
        own = {"norm": "v.post_ln", "linear_fc1": "mm.0", "linear_fc2": "mm.2"}[module.split(".")[1]]
        return {f"{own}.{suffix}": values}
    if module.startswith("conv2d") and suffix == "bias":
        values = values[:, None, None]
    return {f"{names.get_name(prefix + module)}.{suffix}": values}


def make_vocabulary(tower: str) -> Path:
    """Write what mtmd asks of a model of text unless it is there: sizes and a vocabulary, and no weights."""
    import gguf

    path = DIRECTORY / f"vocabulary-{tower}.gguf"
    if path.exists():
        return path
    num_additions = len(CONFIGS[tower].get("deepstack_visual_indexes", ()))
    architecture = "qwen3vlmoe" if num_additions else "qwen3moe"
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(4096)
    writer.add_embedding_length(OUT_SIZE)
    writer.add_block_count(4)
    writer.add_feed_forward_length(768)
    writer.add_head_count(32)
    writer.add_head_count_kv(4)
    writer.add_key_length(128)
    writer.add_value_length(128)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_expert_count(8)
    writer.add_expert_used_count(2)
    writer.add_expert_feed_forward_length(768)
    if num_additions:
        writer.add_rope_dimension_sections([24, 20, 20, 0])
        writer.add_num_deepstack_layers(num_additions)
    text = ["<|endoftext|>", *(chr(code) for code in range(33, 127)), "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(text)
    writer.add_token_types([gguf.TokenType.CONTROL, *[gguf.TokenType.NORMAL] * (len(text) - 1)])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path
