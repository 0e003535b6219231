"""Run llama.cpp's own converter, `convert_hf_to_gguf.py`, on tiny checkpoints (needs torch and transformers).

    python -m tests.models.converter LLAMA_CPP SOURCE MADE [SOURCE MADE ...]      # in float32

LLAMA_CPP is a directory with the script, as in the source distribution of llama-cpp-python (0.3.36:
`vendor/llama.cpp`). The converter is run as it is, except that tiny models have no tokenizer: the file gets a list of
tokens. It brings a `gguf` package of its own, so it needs an interpreter of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

from tests.models.rows import rows
from tests.models.tiny import text_of
from tests.models.tiny_delta import FAMILIES as DELTA

LLAMA_CPP = Path(os.environ.get("ARGOSY_LLAMA_CPP") or Path(__file__).parents[2] / "build" / "llama.cpp")


def load(llama_cpp: Path) -> Any:
    """The converter's module."""
    sys.path[:0] = [str(llama_cpp / "gguf-py"), str(llama_cpp)]
    import convert_hf_to_gguf

    return convert_hf_to_gguf


def convert(converter: Any, source: Path, made: Path, *arguments: str, tokens: Sequence[str] = ()) -> None:
    """Convert `source`, whose vocabulary is `tokens`, or its own, or numbers. `arguments` are the script's."""
    raw = json.loads((source / "config.json").read_text())
    if "llm_config" in raw:  # InternVL's name
        raw["text_config"] = raw["llm_config"]
    vocab = list(tokens) or [f"token {number}" for number in range(text_of(raw)["vocab_size"])]
    if has_own := (source / "tokenizer.json").exists():
        for token, number in json.loads((source / "tokenizer.json").read_text())["model"]["vocab"].items():
            vocab[number] = token
    else:  # some classes count its tokens
        ids = {token: at for at, token in enumerate(vocab)}
        (source / "tokenizer.json").write_text(json.dumps({"model": {"vocab": ids}, "added_tokens": []}))

    def set_vocab(model: Any) -> None:
        model.gguf_writer.add_tokenizer_model("none")
        model.gguf_writer.add_token_list(vocab)
        model.gguf_writer.add_vocab_size(len(vocab))  # llama.cpp does not count the tokens then
        model.gguf_writer.add_eos_token_id(2)

    architecture = converter.get_model_architecture(raw, converter.ModelType.TEXT)
    model_class = converter.get_model_class(architecture)
    for one in (
        model_class,
        getattr(model_class, "Mistral4Model", model_class),
    ):  # a class inside Mistral3Model
        one.set_vocab = set_vocab
        if hasattr(one, "_get_suppress_tokens"):  # tokens without an embedding, by the tokenizer
            one._get_suppress_tokens = lambda model: None
    if raw["model_type"] in DELTA:  # the tiny ones have some tensors of their MTP layers, to ignore
        arguments = (*arguments, "--no-mtp")
    # An architecture's names of tensors stay in this dictionary of a class, where they hide those of others.
    names = sys.modules["gguf"].TensorNameMap.block_mappings_cfg
    before = sys.argv
    sys.argv = ["convert_hf_to_gguf.py", str(source), "--outfile", str(made), *arguments]
    try:
        with mock.patch.dict(names), reading_itself() if has_own_spelling(raw) else nullcontext():
            converter.main()
    finally:
        sys.argv = before
        if not has_own:
            (source / "tokenizer.json").unlink()


def has_own_spelling(config: dict[str, Any]) -> bool:
    row = rows().get(config["model_type"])
    # transformers adds experts to a Nemotron without any.
    adds_experts = config["model_type"] == "nemotron_h" and "num_experts_per_tok" not in config
    return adds_experts or (row is not None and row.has_own_spelling)


def reading_itself() -> Any:
    """The converter as with a transformers that does not know the model: it reads config.json itself."""
    return mock.patch("conversion.base.AutoConfig.from_pretrained", side_effect=OSError("not known"))


def convert_all(pairs: Sequence[tuple[Path, Path]]) -> None:
    """Convert checkpoints to float32 in another interpreter.

    Raises:
        RuntimeError: the converter failed; the message is the end of what it said.
    """
    places = [str(path) for pair in pairs for path in pair]
    command = [sys.executable, "-m", "tests.models.converter", str(LLAMA_CPP), *places]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])


def main() -> None:
    converter = load(Path(sys.argv[1]))
    places = list(map(Path, sys.argv[2:]))
    for source, made in zip(places[::2], places[1::2], strict=True):
        convert(converter, source, made, "--outtype", "f32")


if __name__ == "__main__":
    main()
