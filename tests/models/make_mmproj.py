"""Convert the tiny models that see to GGUF with llama.cpp's own converter: text and vision tower, a file each.

    python -m tests.models.make_mmproj LLAMA_CPP        # rewrite the committed files (needs torch, transformers)

LLAMA_CPP is a directory with `convert_hf_to_gguf.py`, as in the source distribution of llama-cpp-python (0.3.36:
`vendor/llama.cpp`). Each checkpoint of `reference_seeing/` gets `gguf/model.gguf` and `gguf/mmproj-model.gguf`.

The converter is run as it is, except that tiny models have no tokenizer: the file gets a list of tokens, among them the
placeholder of pictures. Before, a checkpoint is put into the form that it has on the hub where that is another one.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.models.safetensors_file import read_header, read_safetensors, write_safetensors
from tests.models.seeing import MMPROJ_PLACEHOLDERS, REFERENCE, text_of


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
    if family == "kimi_k25":
        vision = raw["vision_config"]
        for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers"):
            vision[f"vt_{key}"] = vision[key]
        for axis in ("height", "width", "time"):
            vision[f"init_pos_emb_{axis}"] = vision[f"pos_emb_{axis}"]
        vision["projector_ln_eps"] = raw["projection_layer_norm_eps"]
    (destination / "config.json").write_text(json.dumps(raw))
    write_safetensors(
        destination / "model.safetensors",
        {name: (header[name]["dtype"], value) for name, value in tensors.items()},
    )


def convert(converter: Any, arguments: Sequence[str]) -> None:
    before = sys.argv
    sys.argv = ["convert_hf_to_gguf.py", *arguments]
    try:
        converter.main()
    finally:
        sys.argv = before


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("llama_cpp", type=Path)
    parser.add_argument("families", nargs="*", default=list(MMPROJ_PLACEHOLDERS))
    parser.add_argument("--out", type=Path, default=REFERENCE)
    options = parser.parse_args()
    sys.path[:0] = [str(options.llama_cpp / "gguf-py"), str(options.llama_cpp)]
    import convert_hf_to_gguf as converter

    for family in options.families:
        raw = json.loads((REFERENCE / family / "config.json").read_text())
        text = text_of(raw)
        tokens = [f"token {number}" for number in range(text["vocab_size"])]
        tokens[raw.get("media_placeholder_token_id", raw["image_token_id"])] = MMPROJ_PLACEHOLDERS[family]

        def set_vocab(model: Any, tokens: list[str] = tokens) -> None:
            model.gguf_writer.add_tokenizer_model("none")
            model.gguf_writer.add_token_list(tokens)
            model.gguf_writer.add_eos_token_id(2)

        text_class = converter.get_model_architecture(raw, converter.ModelType.TEXT)
        converter.get_model_class(text_class).set_vocab = set_vocab
        directory = options.out / family / "gguf"
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            source = Path(scratch) / family
            as_on_the_hub(REFERENCE / family, source, family)
            for name, more in (("model.gguf", []), ("mmproj-model.gguf", ["--mmproj"])):
                made = Path(scratch) / name
                convert(converter, [str(source), "--outtype", "bf16", "--outfile", str(made), *more])
                shutil.copy(made, directory / name)


if __name__ == "__main__":
    main()
