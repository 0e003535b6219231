"""Convert the tiny models that see to GGUF with llama.cpp's own converter: text and vision tower, a file each.

    python -m tests.models.make_mmproj LLAMA_CPP        # rewrite the committed files (needs torch, transformers)

Each checkpoint of `reference_seeing/` gets `gguf/model.gguf` and `gguf/mmproj-model.gguf`. `converter.py` runs the
converter; the placeholder of pictures is among the tokens. Before, a checkpoint is put into the form that it has on the
hub where that is another one.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from tests.models.converter import convert, load
from tests.models.safetensors_file import read_header, read_safetensors, write_safetensors
from tests.models.seeing import MMPROJ_PLACEHOLDERS, REFERENCE, WRITTEN, text_of
from tests.models.tiny_llama4 import fused


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
    if family in WRITTEN:
        added = {str(token_id): {"content": text} for text, token_id in WRITTEN[family].items()}
        (destination / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    (destination / "config.json").write_text(json.dumps(raw))
    write_safetensors(
        destination / "model.safetensors",
        {name: (header[name]["dtype"], value) for name, value in tensors.items()},
    )


def repair(model_class: Any) -> None:
    """Let the converter find the tensors of Qwen3-Omni's vision tower, which it looks for without prefix."""
    filter_tensors = model_class.filter_tensors.__func__

    def without_prefix(cls: Any, item: tuple[str, Any]) -> Any:
        name, tensor = item
        return filter_tensors(cls, (name.replace("thinker.visual.", "visual."), tensor))

    model_class.filter_tensors = classmethod(without_prefix)


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
                convert(converter, source, made, "--outtype", "bf16", *more, tokens=tokens)
                shutil.copy(made, directory / name)


if __name__ == "__main__":
    main()
