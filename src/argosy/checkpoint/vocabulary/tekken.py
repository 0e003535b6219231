"""Build a tokenizer from `tekken.json`, Mistral's own file.

    tekken.json  ->  read_tekken  ->  tokenizers.Tokenizer  +  the named tokens of a tokenizer_config.json

Special tokens have the first ids, then the vocabulary in rank order, cut to the size that the file's config names; the
rank decides which pair of a word merges first. Special tokens that the file does not list are reserved; files before
version 7 list none. The pattern that splits text into words is in the file.

Elsewhere: `prompt/tokenizer.py` uses the tokenizer and prefers this file to `tokenizer.json`, because several releases
of Mistral have the wrong pattern there; `byte_level.py` handles words and merges.
"""

from __future__ import annotations

import base64
import binascii
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, models

from argosy.checkpoint.untrusted_file import open_regular, parse_object, quote, read_at
from argosy.checkpoint.vocabulary.byte_level import (
    LONGEST_TOKEN,
    Words,
    byte_level_tokenizer,
    merges_by_rank,
    ranked_tokens,
    spelling_of_bytes,
)
from argosy.errors import CheckpointError

_MAX_FILE_BYTES = 64 << 20  # 150,000 tokens take 19 MB
_MAX_TOKENS = 1 << 20
_NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
# In id order, for files that list none (mistral_common, Tekkenizer.DEPRECATED_SPECIAL_TOKENS).
_FIRST_SPECIAL = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]",
    "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
)  # fmt: skip


def read_tekken(path: Path) -> tuple[tokenizers.Tokenizer, dict[str, object]]:
    """Build the tokenizer of a `tekken.json`.

    Returns:
        core: the tokenizer.
        config: `bos_token` and others as in tokenizer_config.json, and `add_bos_token`, which is true.

    Raises:
        CheckpointError: the file is damaged, or its parts do not match.
    """
    with open_regular(path) as (descriptor, size):
        if size > _MAX_FILE_BYTES:
            raise CheckpointError(
                f"{path.name} has {size} bytes; at most {_MAX_FILE_BYTES} are read", path=path
            )
        file = parse_object(read_at(descriptor, size, 0, path), path)
    config = file.get("config")
    if not isinstance(config, dict):
        raise _wrong(path, "config", config, "an object")
    num_special = _count(path, config, "default_num_special_tokens")
    num_ranks = _count(path, config, "default_vocab_size") - num_special
    special = _special_tokens(path, file.get("special_tokens"), num_special)
    pattern = config.get("pattern")
    if not isinstance(pattern, str) or not pattern:
        raise _wrong(path, "config.pattern", pattern, "a regular expression")
    spelled = spelling_of_bytes()
    ranked = [token.decode("latin-1").translate(spelled) for token in _tokens(path, file, num_ranks)]
    vocab = {token: num_special + rank for rank, token in enumerate(ranked)}
    if twice := [token for token in special if token in vocab]:
        raise CheckpointError(
            f"{path.name}: special token '{quote(twice[0])}' is also in vocab",
            path=path,
            key="special_tokens",
        )
    merges = merges_by_rank(ranked, vocab)
    vocab |= {token: at for at, token in enumerate(special)}
    model = models.BPE(vocab=vocab, merges=merges, ignore_merges=True)
    try:
        core = byte_level_tokenizer(model, Words(patterns=(pattern,)))
    except Exception:  # the tokenizers package raises plain Exception
        raise _wrong(path, "config.pattern", pattern, "a regular expression") from None
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    named = {name: token for name, token in _NAMED.items() if token in special}
    return core, {**named, "add_bos_token": "bos_token" in named}


def _count(path: Path, config: Mapping[str, object], key: str) -> int:
    found = config.get(key)
    if not isinstance(found, int) or isinstance(found, bool) or not 0 <= found <= _MAX_TOKENS:
        raise _wrong(path, f"config.{key}", found, f"a number from 0 to {_MAX_TOKENS}")
    return found


def _special_tokens(path: Path, listed: object, num_special: int) -> list[str]:
    """The special tokens in id order; ids without a name are reserved."""
    if listed is None:
        listed = [{"rank": at, "token_str": token} for at, token in enumerate(_FIRST_SPECIAL)]
    if not isinstance(listed, list) or len(listed) > num_special:
        raise _wrong(path, "special_tokens", listed, f"a list of at most {num_special} tokens")
    tokens = [f"<SPECIAL_{at}>" for at in range(num_special)]
    for at, one in enumerate(listed):
        content = one.get("token_str") if isinstance(one, dict) else None
        if not isinstance(content, str) or not content or one.get("rank") != at:
            raise _wrong(path, f"special_tokens[{at}]", one, f"an object with token_str, and rank {at}")
        tokens[at] = content
    if len(set(tokens)) < len(tokens):
        ((twice, _),) = Counter(tokens).most_common(1)
        raise CheckpointError(
            f"{path.name}: special_tokens has '{quote(twice)}' twice", path=path, key="special_tokens"
        )
    return tokens


def _tokens(path: Path, file: Mapping[str, object], num_ranks: int) -> list[bytes]:
    """The bytes of the first `num_ranks` tokens, in rank order."""
    listed = file.get("vocab")
    if not isinstance(listed, list) or not 0 < num_ranks <= len(listed):
        held = len(listed) if isinstance(listed, list) else "no"
        raise CheckpointError(
            f"{path.name}: vocab has {held} tokens; config asks for {num_ranks} beside the special ones",
            path=path,
            key="vocab",
        )
    by_rank: dict[int, bytes] = {}
    for at, one in enumerate(listed[:num_ranks]):
        text = one.get("token_bytes") if isinstance(one, dict) else None
        try:
            token = base64.b64decode(text, validate=True) if isinstance(text, str) else b""
        except (binascii.Error, ValueError):
            token = b""
        if not 0 < len(token) <= LONGEST_TOKEN or one.get("rank") != at:
            expected = f"rank {at}, and 1 to {LONGEST_TOKEN} bytes in base64 as token_bytes"
            raise _wrong(path, f"vocab[{at}]", one, expected)
        by_rank[at] = token
    return ranked_tokens(by_rank, path)


def _wrong(path: Path, key: str, found: object, expected: str) -> CheckpointError:
    return CheckpointError(f"{path.name}: {key} is '{quote(found)}', expected {expected}", path=path, key=key)
