"""Build a tokenizer from `tiktoken.model` or `hy.tiktoken`, which Kimi and Hunyuan have instead of `tokenizer.json`.

    tiktoken.model + tokenizer_config.json  ->  read_tiktoken  ->  tokenizers.Tokenizer

A line is the bytes of a token in base64, a space and its rank. The rank is the token's id and decides which pair of a
word merges first. Ids of special tokens follow the ranks. Kimi has 256: `added_tokens_decoder` names some, and the
others are reserved. The rule that splits text into words is code in the checkpoint (`tokenization_kimi.py`), which is
never run; the class in `tokenizer_config.json` implies that rule, so any other class is refused. That code also splits
runs of more than 25,000 characters without a space, to spare tiktoken; here they stay whole. Hunyuan's code
(`tokenization_hy.py`) names its special tokens, and counts lines that have a new token instead of reading ranks.

Elsewhere: `prompt/tokenizer.py` uses the tokenizer; `byte_level.py` handles words and merges.
"""

from __future__ import annotations

import base64
import binascii
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, models

from argosy.checkpoint.untrusted_file import open_regular, quote, read_at
from argosy.checkpoint.vocabulary.byte_level import (
    LONGEST_TOKEN,
    WORDS,
    byte_level_tokenizer,
    merges_by_rank,
    ranked_tokens,
    spelling_of_bytes,
)
from argosy.errors import CheckpointError, UnsupportedModel

_MAX_FILE_BYTES = 16 << 20  # a vocabulary of 250,000 tokens takes 4.6 MB
# The class, whose it is, and the name of its rule for words, by the file's name.
_CLASSES = {
    "tiktoken.model": ("TikTokenTokenizer", "Kimi's", "kimi-k2"),
    "hy.tiktoken": ("HYTokenizer", "Hunyuan's", "hunyuan"),
}
_NUM_SPECIAL = 256
_NAMES_OF_HUNYUAN = (
    "endoftext",
    "startoftext",
    "bos",
    "eos",
    "pad",
    *(f"extra_{number}" for number in range(205)),
)
# Flags of an added token. It must match exactly as written, anywhere in the text, so these must be off.
_OFF = ("lstrip", "rstrip", "single_word")
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")


def read_tiktoken(path: Path, config: Mapping[str, object]) -> tokenizers.Tokenizer:
    """Build the tokenizer that one of these files and the contents of its `tokenizer_config.json` describe.

    Raises:
        CheckpointError: a line is damaged, a rank or byte is missing or repeated, or a special token's id does not
            follow the ranks.
        UnsupportedModel: the file belongs to another tokenizer class, or a special token has a flag set.
    """
    expected, whose, words = _CLASSES[path.name]
    if (found := config.get("tokenizer_class")) != expected:
        raise UnsupportedModel(
            f"tokenizer_config.json asks for tokenizer_class '{quote(found)}' with {path.name}; supported: "
            f"{expected}, {whose}",
            path=path,
            key="tokenizer_class",
            value=found,
            supported=(expected,),
        )
    spelled = spelling_of_bytes()
    is_hunyuan = words == "hunyuan"
    ranks = _read_ranks(path, counts_lines=is_hunyuan)
    vocab = {token.decode("latin-1").translate(spelled): rank for rank, token in enumerate(ranks)}
    special = _tokens_of_hunyuan() if is_hunyuan else _special_tokens(path, config, len(vocab))
    _require_named(path, config, {token.content for token in special})
    if twice := [token.content for token in special if token.content in vocab]:
        raise CheckpointError(
            f"tokenizer_config.json: special token '{quote(twice[0])}' is also a token of {path.name}",
            path=path,
            key="added_tokens_decoder",
        )
    merges = merges_by_rank(vocab, vocab)
    core = byte_level_tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True), WORDS[words])
    core.add_tokens(special)
    return core


def _read_ranks(path: Path, *, counts_lines: bool = False) -> list[bytes]:
    """Read the tokens in rank order; with `counts_lines`, in the order of the first lines that have them."""
    with open_regular(path) as (descriptor, size):
        if size > _MAX_FILE_BYTES:
            raise CheckpointError(
                f"{path.name} has {size} bytes; at most {_MAX_FILE_BYTES} are read", path=path
            )
        lines = read_at(descriptor, size, 0, path).splitlines()
    by_rank: dict[int, bytes] = {}
    seen: set[bytes] = set()
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        text, _, digits = line.partition(b" ")
        try:
            token = base64.b64decode(text, validate=True)
        except binascii.Error:
            token = b""
        if not token or not digits.isdigit() or len(digits) > 9:
            raise _damaged(
                path, number, f"is '{quote(line.decode('latin-1'))}', expected base64, a space and a rank"
            )
        if len(token) > LONGEST_TOKEN:
            raise _damaged(
                path, number, f"has a token of {len(token)} bytes; at most {LONGEST_TOKEN} are allowed"
            )
        rank = len(by_rank) if counts_lines else int(digits)
        if counts_lines and token in seen:
            continue
        if rank in by_rank:
            raise _damaged(path, number, f"repeats rank {rank}")
        by_rank[rank] = token
        seen.add(token)
    return ranked_tokens(by_rank, path)


def _damaged(path: Path, number: int, what: str) -> CheckpointError:
    return CheckpointError(f"{path.name}: line {number} {what}", path=path)


def _tokens_of_hunyuan() -> list[AddedToken]:
    return [AddedToken(f"<|{name}|>", special=True, normalized=False) for name in _NAMES_OF_HUNYUAN]


def _special_tokens(path: Path, config: Mapping[str, object], first: int) -> list[AddedToken]:
    """Return the special tokens in id order, from `first` on; ids without a name are reserved."""
    given = config.get("added_tokens_decoder")
    if not isinstance(given, dict) or not given:
        raise _wrong(path, "added_tokens_decoder", given, "the special tokens by id")
    ids = {str(token_id) for token_id in range(first, first + _NUM_SPECIAL)}
    if others := [token_id for token_id in given if token_id not in ids]:
        raise _wrong(
            path,
            "added_tokens_decoder",
            others[0],
            f"ids from {first} to {first + _NUM_SPECIAL - 1}, after the ranks",
        )
    tokens = []
    for token_id in range(first, first + _NUM_SPECIAL):
        fields = given.get(str(token_id), {"content": f"<|reserved_token_{token_id}|>", "special": True})
        content = fields.get("content") if isinstance(fields, dict) else None
        if not isinstance(content, str) or not content:
            raise _wrong(path, f"added_tokens_decoder.{token_id}", fields, "an object with content")
        if asked := [name for name in _OFF if fields.get(name)]:
            raise UnsupportedModel(
                f"tokenizer_config.json: added_tokens_decoder.{token_id} sets {asked[0]}; supported: false",
                path=path,
                key=f"added_tokens_decoder.{token_id}.{asked[0]}",
                value=fields[asked[0]],
                supported=(False,),
            )
        tokens.append(AddedToken(content, special=fields.get("special") is True, normalized=False))
    contents = Counter(token.content for token in tokens)
    if len(contents) < len(tokens):
        ((twice, _),) = contents.most_common(1)
        raise CheckpointError(
            f"tokenizer_config.json: added_tokens_decoder has '{quote(twice)}' twice",
            path=path,
            key="added_tokens_decoder",
        )
    return tokens


def _require_named(path: Path, config: Mapping[str, object], contents: set[str]) -> None:
    """Check that tokens with a role are special tokens."""
    for name in _NAMED:
        named = config.get(name)
        content = named.get("content") if isinstance(named, dict) else named
        if content is not None and content not in contents:
            raise _wrong(path, name, content, "one of the special tokens")


def _wrong(path: Path, key: str, found: object, expected: str) -> CheckpointError:
    return CheckpointError(
        f"tokenizer_config.json: {key} is '{quote(found)}', expected {expected}", path=path, key=key
    )
