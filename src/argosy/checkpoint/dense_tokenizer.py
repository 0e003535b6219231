"""Rebuild the tokenizer files that a checkpoint directory has from what a GGUF says about its tokenizer.

    GGUF fields  ->  tokenizer.json  +  tokenizer_config.json with the chat template

One kind is known: byte-level BPE with digits split off one by one ("gpt2", pre-tokenizer "smollm").

Elsewhere: the tensors of the same GGUF are read by `dense.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from argosy.errors import CheckpointError, UnsupportedModel

_CONTROL_TOKEN = 3  # GGUF token type of a special token
_KNOWN_KIND = ("gpt2", "smollm")


def read_tokenizer(gguf_path: Path) -> tuple[str, dict[str, Any]]:
    """The tokenizer that a GGUF describes.

    Returns:
        tokenizer_json: text of `tokenizer.json`.
        tokenizer_config: content of `tokenizer_config.json`, chat template included.

    Raises:
        CheckpointError: a field is missing.
        UnsupportedModel: another kind of tokenizer.
    """
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    reader = GGUFReader(gguf_path)

    def field(key: str) -> Any:
        found = reader.get_field(key)
        if found is None:
            raise CheckpointError(f"{gguf_path.name} has no field {key}", path=gguf_path)
        return found.contents()

    kind = (field("tokenizer.ggml.model"), field("tokenizer.ggml.pre"))
    if kind != _KNOWN_KIND:
        raise UnsupportedModel(
            f"{gguf_path.name} has a tokenizer of kind {'/'.join(kind)}; supported: {'/'.join(_KNOWN_KIND)}",
            hint="use the safetensors directory of the same model, it holds tokenizer.json",
            key="tokenizer.ggml.pre",
            value=kind[1],
            supported=(_KNOWN_KIND[1],),
        )
    tokens: list[str] = field("tokenizer.ggml.tokens")
    kinds: list[int] = field("tokenizer.ggml.token_type")
    merges = [
        (left, right) for left, right in (merge.split(" ", 1) for merge in field("tokenizer.ggml.merges"))
    ]
    tokenizer = Tokenizer(models.BPE(vocab={token: at for at, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind_id in zip(tokens, kinds, strict=True) if kind_id == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    bos, eos, pad, unknown = (
        tokens[field(f"tokenizer.ggml.{role}_token_id")] for role in ("bos", "eos", "padding", "unknown")
    )
    config = {
        "add_prefix_space": False,
        "bos_token": bos,
        "chat_template": field("tokenizer.chat_template"),
        "clean_up_tokenization_spaces": False,
        "eos_token": eos,
        "model_max_length": int(field("llama.context_length")),
        "pad_token": pad,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": unknown,
    }
    return tokenizer.to_str(pretty=False), config
