"""Small tokenizers of the kinds found on the hub, trained on a page of text."""

from __future__ import annotations

import functools
import json
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
STRUCTURAL = ["<think>", "</think>", "<tool_call>"]  # added, not flagged special
FIM = ["<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|file_sep|>", "<|repo_name|>"]

TEXT = """The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs!
def add(a, b):
    return a + b  # 12345 + 67890
Größe, naïve café, Ελλάδα, 東京の空, привет мир, 🙂🚀 and 🏴󠁧󠁢󠁥󠁮󠁧󠁿.
How are you today? I am well, thank you; and you? <b>bold</b> <|x|> [INST] think im_start im_end
"""

CHATML = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful AI assistant<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""


@functools.cache
def byte_level_json(structural: tuple[str, ...] = tuple(STRUCTURAL)) -> str:
    """Like Qwen and SmolLM: byte-level BPE; special tokens, structural ones, and runs of spaces as tokens."""
    core = Tokenizer(models.BPE())
    split = Regex(
        r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(split, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIAL,
        show_progress=False,
    )
    core.train_from_iterator(TEXT.splitlines(keepends=True) * 3, trainer)
    core.add_tokens([AddedToken(text, normalized=False) for text in structural])
    return core.to_str()


def filling_json(*words: str) -> str:
    """A byte-level tokenizer with the tokens to fill in, and with further words, each one token."""
    state = json.loads(byte_level_json())
    vocab, merges = state["model"]["vocab"], state["model"]["merges"]
    structural = [token["content"] for token in state["added_tokens"] if token["content"] not in vocab]
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in vocab]
    free = len(vocab)
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocab:
                vocab[word[:end]] = free
                merges.append([word[: end - 1], word[end - 1]])
                free += 1
    core = Tokenizer.from_str(json.dumps(state))
    core.add_tokens([AddedToken(token, normalized=False) for token in structural])
    core.add_special_tokens([AddedToken(token, normalized=False) for token in FIM])
    return core.to_str()


@functools.cache
def llama_json(scheme: str = "legacy") -> str:
    """Like Mixtral: SentencePiece BPE with byte fallback; `legacy` prepends U+2581 everywhere, `first` once."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if scheme == "legacy":
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        limit_alphabet=90,
        show_progress=False,
    )
    core.train_from_iterator([word for line in TEXT.splitlines() for word in line.split(" ")] * 3, trainer)
    state = json.loads(core.to_str())
    state["added_tokens"] = state["added_tokens"][:3]  # the bytes are ordinary tokens
    state["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    return json.dumps(state)


@functools.cache
def unigram_json() -> str:
    """SentencePiece unigram, whose vocabulary holds the markers as pieces that plain text can match."""
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=130, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    core.train_from_iterator(TEXT.splitlines() * 3, trainer)
    return core.to_str()


def word_piece_json() -> str:
    """A tokenizer whose decoder needs a window of tokens."""
    words = ["[UNK]", "[SEP]", "hello", "world", "##ly", "##s", ",", "friend"]
    core = Tokenizer(models.WordPiece({word: at for at, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.decoder = decoders.WordPiece()
    core.add_special_tokens(["[UNK]", "[SEP]"])
    return core.to_str()


def write_tokenizer(
    directory: Path,
    text: str,
    config: dict[str, object] | None = None,
    generation_config: dict[str, object] | None = None,
) -> Path:
    """Write the text-related files of a model's directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(text, encoding="utf-8")
    if config is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    if generation_config is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation_config), encoding="utf-8")
    return directory
