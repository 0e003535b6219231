"""A tiny model that sees and hears, with a tokenizer and a chat template; it answers with meaningless text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np

from tests.models.safetensors_file import read_header, read_safetensors, write_safetensors
from tests.models.seeing import REFERENCE, SEEING_TEMPLATE, seeing_tokenizer
from tests.prompt.tokenizers_for_tests import write_tokenizer

VOCAB_SIZE = 512
CONTEXT_TOKENS = 2048  # the prompt about tools is long


def write_seeing_model(directory: Path) -> Path:
    """Write the tiny Qwen3-Omni of the references with a larger vocabulary."""
    source = REFERENCE / "qwen3_omni_moe"
    directory.mkdir()
    shutil.copy(source / "preprocessor_config.json", directory)
    config = json.loads((source / "config.json").read_text())
    thinker, core = config["thinker_config"], seeing_tokenizer()
    thinker["image_token_id"] = core.token_to_id("<|image_pad|>")
    thinker["audio_token_id"] = core.token_to_id("<|audio_pad|>")
    thinker["video_token_id"] = core.token_to_id("<|video_pad|>")
    thinker["text_config"] |= {"vocab_size": VOCAB_SIZE, "max_position_embeddings": CONTEXT_TOKENS}
    (directory / "config.json").write_text(json.dumps(config))
    values = np.random.default_rng(5)
    header, _ = read_header(source / "model.safetensors")
    tensors = {}
    for name, tensor in read_safetensors(source / "model.safetensors").items():
        is_vocabulary = name.endswith(("thinker.model.embed_tokens.weight", "lm_head.weight"))
        wider = values.normal(0, 0.3, (VOCAB_SIZE, tensor.shape[1])) if is_vocabulary else tensor
        tensors[name] = (header[name]["dtype"], wider)
    write_safetensors(directory / "model.safetensors", tensors)
    return write_tokenizer(
        directory, core.to_str(), {"eos_token": "<|im_end|>", "chat_template": SEEING_TEMPLATE}
    )
