"""A tiny random checkpoint with a tokenizer and a chat template; it answers with meaningless text."""

from __future__ import annotations

from pathlib import Path

from tests.models.tiny import qwen3_moe, write_model
from tests.prompt.tokenizers_for_tests import CHATML, byte_level_json, write_tokenizer


def write_chat_model(
    directory: Path, *, chat_template: str | None = CHATML, context_tokens: int = 256
) -> Path:
    """Write the model; its vocabulary is padded beyond its tokenizer's, as in checkpoints on the hub."""
    write_model(directory, qwen3_moe(vocab_size=512, max_position_embeddings=context_tokens), seed=3)
    config = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    if chat_template is not None:
        config["chat_template"] = chat_template
    return write_tokenizer(directory, byte_level_json(), config)
