"""The tokenizer files of a small Kimi, and the same tokenizer built by `tiktoken`."""

from __future__ import annotations

import base64
import functools
import json
import random
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import tiktoken
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

# `pat_str` of TikTokenTokenizer in moonshotai's tokenization_kimi.py.
PATTERN = "|".join([
    r"[\p{Han}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
])  # fmt: skip
TEXT = """Kimi's the quick brown fox; it'll jump over 12345 lazy dogs, won't it? HelloWorld HTTPServer's McDonald'S
def add(first, second):
    return first + second        # ====== ------ ====== 67890

月之暗面科技有限公司成立于二零二三年, 中文English混合 汉字abc 東京の空は青い 한국어 привет мир Ελλάδα naïve café 🙂🚀
<|im_user|>user<|im_middle|> reserved_token im_end think [BOS] [EOS] aaaaaaaaaaaaaaaa abababababab
"""
UNMADE = "jabberwocky"
# Some of Kimi-K2's special tokens, by their offset behind the ranks; one of them is not flagged as special.
SPECIAL = {
    0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 3: "<|im_user|>", 4: "<|im_assistant|>", 10: "<|im_system|>",
    17: "<|im_middle|>", 22: "<think>", 254: "[UNK]", 255: "[PAD]",
}  # fmt: skip
TEMPLATE = (
    "{%- for m in messages -%}<|im_{{ m.role }}|>{{ m.role }}<|im_middle|>{{ m.content }}<|im_end|>{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|>{%- endif -%}"
)


@functools.cache
def ranks() -> Mapping[bytes, int]:
    """A vocabulary trained on `TEXT`; single bytes have the first ranks, in no particular order, as in Kimi's.

    Behind the trained tokens come some that reach from one word of `TEXT` into the next, so that splitting text
    differently would show, and one token that no merges lead to.
    """
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator([TEXT, TEXT], trainer)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    as_they_are = [byte for byte in range(256) if chr(byte) in alphabet]
    byte_of = {chr(byte): byte for byte in as_they_are}
    byte_of |= {chr(256 + at): byte for at, byte in enumerate(sorted(set(range(256)) - set(as_they_are)))}
    vocab = core.get_vocab()
    tokens = [bytes(byte_of[c] for c in token) for token in sorted(vocab, key=vocab.__getitem__)]
    single, longer = [t for t in tokens if len(t) == 1], [t for t in tokens if len(t) > 1]
    random.Random(7).shuffle(single)
    for (left, _), (right, _) in pairwise(split.pre_tokenize_str(TEXT)):
        last, first = left[-1].encode(), right[0].encode()
        longer += [last[: at + 1] for at in range(len(last))] + [first[: at + 1] for at in range(len(first))]
        longer.append(last + first)
    return {token: rank for rank, token in enumerate(dict.fromkeys([*single, *longer, UNMADE.encode()]))}


NUM_RANKS = len(ranks())


def lines_of(ranks: Mapping[bytes, int]) -> list[str]:
    return [f"{base64.b64encode(token).decode()} {rank}" for token, rank in ranks.items()]


def config_of(num_ranks: int = NUM_RANKS, **changes: object) -> dict[str, object]:
    """The contents of tokenizer_config.json, with `changes`."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {
        "added_tokens_decoder": {
            str(num_ranks + at): {"content": content, **flags, "special": content != "<think>"}
            for at, content in SPECIAL.items()
        },
        "additional_special_tokens": ["<|im_end|>", "<|im_user|>"],
        "bos_token": "[BOS]",
        "eos_token": "[EOS]",
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
        "tokenizer_class": "TikTokenTokenizer",
        "chat_template": TEMPLATE,
        **changes,
    }


def write_kimi_tokenizer(
    directory: Path, lines: list[str] | None = None, config: Mapping[str, object] | None = None
) -> Path:
    """Write tiktoken.model and the files beside it."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tiktoken.model").write_text("\n".join(lines_of(ranks()) if lines is None else lines) + "\n")
    (directory / "tokenizer_config.json").write_text(json.dumps(config_of() if config is None else config))
    end = NUM_RANKS + 2
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": end, "max_length": 64}))
    return directory


@functools.cache
def peer() -> tiktoken.Encoding:
    """The same tokenizer, as TikTokenTokenizer builds it."""
    special = {SPECIAL.get(at, f"<|reserved_token_{NUM_RANKS + at}|>"): NUM_RANKS + at for at in range(256)}
    return tiktoken.Encoding("kimi", pat_str=PATTERN, mergeable_ranks=dict(ranks()), special_tokens=special)
