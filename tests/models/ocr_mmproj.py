"""Tiny DeepSeek-OCR and DeepSeek-OCR-2 with towers in the form of llama.cpp's files, from a record of its converter.

    python -m tests.models.ocr_mmproj LLAMA_CPP     # rewrite the record (needs torch and transformers)

SAM's squares and the channels after it are constant, so that the smallest file has some megabytes: the record has the
metadata, and for each tensor its name, type, shape and the tensor of the checkpoint with its values. `write_mmproj`
writes a file by it.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

from argosy.model.encoders.encoder import Encoder
from argosy.model.encoders.table import ENCODERS
from argosy.model.reading.config_reader import ConfigReader
from tests.checkpoint.raw_gguf import ARRAY, STRING, RawGguf, entry, tensor
from tests.models.converter import load
from tests.models.safetensors_file import Array, encode, read_checkpoint, write_safetensors
from tests.models.tiny import RawConfig
from tests.models.tiny_encoders import random_tensors
from tests.models.tiny_ocr import deepseek_ocr2, deepseek_vl_v2

RECORD = Path(__file__).with_name("ocr_mmproj.json")
PROJECTORS = ("deepseekocr", "deepseekocr2")
PLACEHOLDER = 50
_TYPES = {"F32": 0, "BF16": 30}
_HIDDEN = 24
_SAM = {"global_attn_indexes": [2, 5, 8, 11], "heads": 1, "layers": 3, "width": 8}
_UNUSED = "model.vision_model.embeddings.patch_embedding.weight"


def config_of(projector: str) -> RawConfig:
    """The config.json that Argosy reads."""
    if projector == "deepseekocr":
        return _on_the_hub(projector)
    raw = deepseek_ocr2(max_position_embeddings=2048)
    raw["vision_config"] = {
        "encoder_config": {
            "hidden_size": 28, "intermediate_size": 10, "num_attention_heads": 14, "num_hidden_layers": 4,
            "num_key_value_heads": 2, "rope_theta": 1e6,
        },
        "model_type": "deepseek_ocr2_vision",
        "sam_config": {
            "downsample_channels": [512, 28], "hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 3,
        },
    }  # fmt: skip
    return raw


def _on_the_hub(projector: str) -> RawConfig:
    """The config.json in DeepSeek's form. What its code of DeepSeek-OCR-2 has constant, the converter takes from it."""
    raw = deepseek_vl_v2(max_position_embeddings=2048)
    if projector == "deepseekocr":
        clip = {"heads": 2, "image_size": 224, "layers": 4, "patch_size": 14, "width": 16}
        widths, input_dim = {"clip-l-14-224": clip}, 32
    else:
        widths, input_dim = {"qwen2-0-5b": {"dim": 28}}, 28
        raw["architectures"] = ["DeepseekOCR2ForCausalLM"]
        raw["vision_config"] |= {"intermediate_size": 10, "layers": 4, "num_attention_heads": 14}
    widths["sam_vit_b"] = _SAM | {"downsample_channels": [512, 16 if input_dim == 32 else 28]}
    raw["vision_config"]["width"] = widths
    raw["projector_config"]["input_dim"] = input_dim
    return raw


def tower_of(projector: str) -> tuple[Encoder, Any, dict[str, Array]]:
    """The tower of the checkpoint, its config and its tensors."""
    raw = config_of(projector)
    encoder = ENCODERS[raw["model_type"]][0]
    own = {key: value for key, value in raw["vision_config"].items() if key != "model_type"}
    model: Any = SimpleNamespace(hidden_size=_HIDDEN)
    config = encoder.read(ConfigReader(own, "it"), ConfigReader(raw, "it"), model)
    values = random_tensors(encoder.tensors(config), "model.", 3)
    if projector == "deepseekocr":
        values[_UNUSED] = np.arange(16 * 3 * 14 * 14, dtype=np.float32).reshape(16, 3, 14, 14) % 256
    return encoder, config, values


def add_tower(directory: Path, projector: str) -> None:
    """Give a checkpoint of the text part the tower, settings of its processor, and its placeholder."""
    _, _, values = tower_of(projector)
    text = {name: value for name, value in read_checkpoint(directory).items() if name not in values}
    every = {name: ("F32", value) for name, value in text.items()}
    every |= {name: ("BF16", value) for name, value in values.items()}
    write_safetensors(directory / "model.safetensors", every)
    (directory / "config.json").write_text(json.dumps(config_of(projector)))
    added = {"added_tokens_decoder": {str(PLACEHOLDER): {"content": "<image>"}}}
    (directory / "tokenizer_config.json").write_text(json.dumps(added))
    (directory / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    )


def read_record(projector: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(RECORD.read_text())[projector]
    return record


def write_mmproj(
    path: Path,
    projector: str,
    metadata: dict[str, tuple[int, Any] | None] | None = None,
    without: str | None = None,
) -> Path:
    """Write the file as the converter does, but with these entries (kind, value), without those that are None, and
    without a tensor."""
    record, (_, _, values) = read_record(projector), tower_of(projector)
    entries = record["metadata"] | (metadata or {})
    listed, data = [], bytearray()
    for name, kind, shape, source in record["tensors"]:
        if name == without:
            continue
        listed.append(tensor(name, shape[::-1], _TYPES[kind], len(data)))
        stored = encode(kind, values[source]).tobytes()
        data += stored.ljust(len(stored) + -len(stored) % 32, b"\0")
    found = [entry(key, *value) for key, value in entries.items() if value is not None]
    return RawGguf(found, listed, bytes(data)).write(path)


def main() -> None:
    converter = load(Path(sys.argv[1]))
    from gguf import GGUFReader  # the converter's own package, which it brings

    records = {}
    for projector in PROJECTORS:
        _, _, values = tower_of(projector)
        with tempfile.TemporaryDirectory() as scratch:
            source, made = Path(scratch) / "model", Path(scratch) / "mmproj.gguf"
            source.mkdir()
            (source / "config.json").write_text(json.dumps(_on_the_hub(projector)))
            colours = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
            (source / "processor_config.json").write_text(json.dumps(colours))
            write_safetensors(
                source / "model.safetensors", {name: ("BF16", value) for name, value in values.items()}
            )
            arguments = [str(source), "--outfile", str(made), "--outtype", "bf16", "--mmproj"]
            with mock.patch.object(sys, "argv", ["convert_hf_to_gguf.py", *arguments]):
                converter.main()
            records[projector] = _record(GGUFReader(made), values)
    RECORD.write_text("{" + ",\n".join(f'"{name}": {_lines(one)}' for name, one in records.items()) + "}\n")


def _lines(record: dict[str, Any]) -> str:
    """An object of an object and an array, with a line for each of their items."""
    metadata = ",\n".join(
        f"    {json.dumps(key)}: {json.dumps(value)}" for key, value in record["metadata"].items()
    )
    tensors = ",\n".join(f"    {json.dumps(one)}" for one in record["tensors"])
    return f'{{\n  "metadata": {{\n{metadata}\n  }},\n  "tensors": [\n{tensors}\n  ]\n}}'


def _record(file: Any, values: dict[str, Array]) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for key, field in file.fields.items():
        kind = int(field.types[0]) if field.types else None
        if key.startswith(("GGUF.", "general.")) and key != "general.architecture":
            continue
        value = field.contents()
        if kind == ARRAY:
            value = [int(field.types[1]), value]
        metadata[key] = [kind, value]
    tensors = []
    for one in file.tensors:
        kind = one.tensor_type.name
        stored = one.data.tobytes()
        (source,) = [name for name, value in values.items() if encode(kind, value).tobytes() == stored]
        tensors.append([one.name, kind, [int(size) for size in one.shape[::-1]], source])
    assert len({source for *_, source in tensors}) == len(values) == len(tensors)
    assert metadata["general.architecture"] == [STRING, "clip"]
    return {"metadata": metadata, "tensors": tensors}


if __name__ == "__main__":
    main()
