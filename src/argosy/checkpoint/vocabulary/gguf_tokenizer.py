"""Rebuild a tokenizer from the metadata of a GGUF.

    metadata  ->  read_tokenizer   ->  tokenizers.Tokenizer, special tokens, end tokens, chat template
              ->  tokenizer_files  ->  tokenizer.json  +  tokenizer_config.json, as in a checkpoint directory

Three kinds are supported. "gpt2" is byte-level BPE with a list of merges; its `pre` names the rule that first splits
text into words. "llama" is SentencePiece BPE: a score for each token decides which pair merges first, and a character
without a token falls back to bytes. "gemma4" is the same with a list of merges, and so is "gpt2" for some models.

Elsewhere: `prompt/tokenizer.py` uses the tokenizer; `byte_level.py` splits words; `gguf.py` reads the file's header.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from argosy.checkpoint.gguf import GgufFile, read_gguf
from argosy.checkpoint.untrusted_file import quote
from argosy.checkpoint.vocabulary.byte_level import LONGEST_TOKEN, WORDS, byte_level_tokenizer, merges_by_rank
from argosy.errors import CheckpointError, UnsupportedModel

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # token types
_ADDED = (_CONTROL, _USER_DEFINED)
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
_KINDS = ("gpt2", "llama", "gemma4")
_CHARACTER_LEVEL = frozenset({"sarvam-moe"})  # names of `pre`, in files of kind "gpt2"

# Tokens that end a turn, whatever the file names as eos: models are trained to stop at any of them.
_ENDS_OF_TURN = frozenset({
    "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|return|>", "<|call|>",
    "<turn|>", "<|tool_response>", "<|eot|>", "<|eom|>", "<|user|>", "<|observation|>", "<|role_end|>", "</assistant>",
    "<|END_OF_TURN_TOKEN|>", "<|flush|>", "<|calls|>", "<|endofturn|>", "[e~[",
})  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTokenizer:
    """A tokenizer, with the contents of the matching tokenizer_config.json and generation_config.json."""

    core: tokenizers.Tokenizer
    config: Mapping[str, Any]  # bos_token ... as text, add_bos_token
    eos_ids: tuple[int, ...]
    chat_template: str | None


def read_tokenizer(file: GgufFile) -> GgufTokenizer | None:
    """Build the tokenizer that a GGUF describes; return None if it describes none.

    Raises:
        CheckpointError: a key is missing, or the parts do not match.
        UnsupportedModel: the kind of tokenizer is not supported.
    """
    if "tokenizer.ggml.model" not in file.metadata:
        return None
    kind = file.text("tokenizer.ggml.model")
    if kind in ("none", "no_vocab"):
        return None
    tokens = file.texts("tokenizer.ggml.tokens")
    vocab = {token: at for at, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        twice = next(token for at, token in enumerate(tokens) if vocab[token] != at)
        raise CheckpointError(
            f"{file.path.name}: tokenizer.ggml.tokens holds '{quote(twice)}' twice", path=file.path
        )
    kinds = _token_kinds(file, len(tokens))
    if kind == "gemma4":
        core, adds_bos = _character_level(file, tokens, vocab), True
    elif kind == "gpt2" and file.text("tokenizer.ggml.pre", "default") in _CHARACTER_LEVEL:
        core, adds_bos = _character_level(file, tokens, vocab), False
    elif kind == "gpt2":
        core, adds_bos = _byte_level(file, tokens, vocab, kinds)
    elif kind == "llama":
        core, adds_bos = _sentencepiece(file, tokens, vocab, kinds), True
    else:
        raise UnsupportedModel(
            f"{file.path.name} has a tokenizer of kind '{quote(kind)}'; supported: {', '.join(_KINDS)}",
            hint="use the safetensors checkpoint of the same model, which has tokenizer.json",
            path=file.path,
            key="tokenizer.ggml.model",
            value=kind,
            supported=_KINDS,
        )
    for at, token in enumerate(tokens):
        if kinds[at] in (_CONTROL, _UNKNOWN) and token:
            core.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kinds[at] == _USER_DEFINED and token:
            core.add_tokens([AddedToken(token, special=False, normalized=False)])
    config: dict[str, Any] = {
        # The first files of Gemma-4 say false; the model was trained with BOS.
        "add_bos_token": file.flag("tokenizer.ggml.add_bos_token", adds_bos) or kind == "gemma4",
        "add_eos_token": file.flag("tokenizer.ggml.add_eos_token", False),
    }
    for name, role in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token_id = _special_id(file, role, len(tokens))
        if token_id is not None:
            config[f"{name}_token"] = tokens[token_id]
    ends = {_special_id(file, role, len(tokens)) for role in ("eos", "eot", "eom")}
    ends |= {vocab[text] for text in _ENDS_OF_TURN & vocab.keys() if kinds[vocab[text]] in _ADDED}
    template = file.metadata.get("tokenizer.chat_template")
    return GgufTokenizer(
        core=core,
        config=config,
        eos_ids=tuple(sorted(token_id for token_id in ends if token_id is not None)),
        chat_template=None if template is None else file.text("tokenizer.chat_template"),
    )


def tokenizer_files(path: Path) -> tuple[str, dict[str, Any]]:
    """Return the tokenizer of a GGUF as the files of a checkpoint directory.

    Returns:
        tokenizer_json: text of `tokenizer.json`.
        tokenizer_config: content of `tokenizer_config.json`, chat template included.

    Raises:
        CheckpointError, UnsupportedModel: for the same reasons as `read_tokenizer`, or there is no tokenizer.
    """
    file = read_gguf(path)
    read = read_tokenizer(file)
    if read is None:
        raise CheckpointError(f"{path.name} describes no tokenizer", path=path)
    architecture = file.text("general.architecture")
    config = {
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": file.integer(f"{architecture}.context_length"),
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: text for name, text in read.config.items() if not name.startswith("add_")},
    }
    if read.chat_template is not None:
        config["chat_template"] = read.chat_template
    return read.core.to_str(pretty=False), dict(sorted(config.items()))


def _token_kinds(file: GgufFile, num_tokens: int) -> Sequence[float]:
    if "tokenizer.ggml.token_type" not in file.metadata:
        return [_NORMAL] * num_tokens
    kinds = file.numbers("tokenizer.ggml.token_type")
    if len(kinds) != num_tokens:
        raise CheckpointError(
            f"{file.path.name}: tokenizer.ggml.token_type has {len(kinds)} entries for {num_tokens} tokens",
            path=file.path,
            key="tokenizer.ggml.token_type",
        )
    return kinds


def _special_id(file: GgufFile, role: str, num_tokens: int) -> int | None:
    token_id = file.token_id(role)
    if token_id is not None and token_id >= num_tokens:
        raise file.wrong(
            f"tokenizer.ggml.{role}_token_id", token_id, f"an id below {num_tokens}, the number of tokens"
        )
    return token_id


def _byte_level(
    file: GgufFile, tokens: list[str], vocab: dict[str, int], kinds: Sequence[float]
) -> tuple[tokenizers.Tokenizer, bool]:
    name = file.text("tokenizer.ggml.pre", "default")
    if name not in WORDS:
        raise UnsupportedModel(
            f"{file.path.name} uses the pre-tokenizer '{quote(name)}'; supported: {', '.join(WORDS)}",
            hint="use the safetensors checkpoint of the same model, which has tokenizer.json",
            path=file.path,
            key="tokenizer.ggml.pre",
            value=name,
            supported=tuple(WORDS),
        )
    words = WORDS[name]
    merges = _ranked_merges(file, tokens, kinds) if words.is_ranked else _listed_merges(file)
    model = _model_of(file, vocab=vocab, merges=merges, ignore_merges=words.ignores_merges)
    return byte_level_tokenizer(model, words), words.adds_bos


def _listed_merges(file: GgufFile) -> list[tuple[str, ...]]:
    merges = [tuple(merge.split(" ", 1)) for merge in file.texts("tokenizer.ggml.merges")]
    if whole := [merge[0] for merge in merges if len(merge) != 2]:
        raise CheckpointError(
            f"{file.path.name}: tokenizer.ggml.merges holds '{quote(whole[0])}', expected two tokens and a space",
            path=file.path,
            key="tokenizer.ggml.merges",
        )
    return merges


def _ranked_merges(file: GgufFile, tokens: list[str], kinds: Sequence[float]) -> list[tuple[str, str]]:
    """Return all merges of a vocabulary whose ids are ranks."""
    ranked = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _NORMAL]
    for token in ranked:
        if len(token) > LONGEST_TOKEN:
            raise CheckpointError(
                f"{file.path.name}: a token has {len(token)} bytes, expected at most {LONGEST_TOKEN}",
                path=file.path,
                key="tokenizer.ggml.tokens",
            )
    return merges_by_rank(ranked, set(ranked))


def _sentencepiece(
    file: GgufFile, tokens: list[str], vocab: dict[str, int], kinds: Sequence[float]
) -> tokenizers.Tokenizer:
    scores = file.numbers("tokenizer.ggml.scores")
    if len(scores) != len(tokens):
        raise CheckpointError(
            f"{file.path.name}: tokenizer.ggml.scores has {len(scores)} entries for {len(tokens)} tokens",
            path=file.path,
            key="tokenizer.ggml.scores",
        )
    unknown = next((tokens[at] for at, kind in enumerate(kinds) if kind == _UNKNOWN), None)
    core = tokenizers.Tokenizer(
        _model_of(
            file,
            vocab=vocab,
            merges=merges_by_rank(_by_score(file, tokens, scores, kinds), vocab),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    return _with_spaces(core, adds_first=file.flag("tokenizer.ggml.add_space_prefix", True))


def _character_level(file: GgufFile, tokens: list[str], vocab: dict[str, int]) -> tokenizers.Tokenizer:
    """BPE over characters with a list of merges, as `GemmaTokenizer` in transformers 5.24 builds it."""
    unknown = _special_id(file, "unknown", len(tokens))
    core = tokenizers.Tokenizer(
        _model_of(
            file,
            vocab=vocab,
            merges=_listed_merges(file),
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    core.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    return _with_spaces(core, adds_first=False)


def _with_spaces(core: tokenizers.Tokenizer, *, adds_first: bool) -> tokenizers.Tokenizer:
    """Spell spaces as SentencePiece does; `adds_first` puts one before a text."""
    replace = normalizers.Replace(" ", _SPACE)
    core.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replace]) if adds_first else replace
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if adds_first else steps)
    return core


def _by_score(
    file: GgufFile, tokens: Sequence[str], scores: Sequence[float], kinds: Sequence[float]
) -> list[str]:
    """Return the tokens that pairs may merge into: best score first; on a tie the lower id."""
    found = [at for at, kind in enumerate(kinds) if kind in (_NORMAL, _USER_DEFINED)]
    for at in found:
        if len(tokens[at]) > LONGEST_TOKEN or not math.isfinite(scores[at]):
            raise CheckpointError(
                f"{file.path.name}: token {at} has {len(tokens[at])} characters and score {scores[at]}; expected at "
                f"most {LONGEST_TOKEN} characters, and a number",
                path=file.path,
                key="tokenizer.ggml.tokens",
            )
    return [tokens[at] for at in sorted(found, key=lambda at: -scores[at])]


def _model_of(file: GgufFile, **parts: Any) -> models.BPE:
    try:
        return models.BPE(**parts)
    except Exception as error:  # the tokenizers package raises plain Exception
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{file.path.name}: the tokens and merges do not match: {quote(said)}", path=file.path
        ) from None
