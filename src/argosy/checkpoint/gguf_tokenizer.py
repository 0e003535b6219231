"""Rebuild a tokenizer from what a GGUF says about it.

    metadata  ->  read_tokenizer   ->  tokenizers.Tokenizer, special tokens, ends of an answer, chat template
              ->  tokenizer_files  ->  tokenizer.json  +  tokenizer_config.json, as a checkpoint directory has them

Two kinds are known. "gpt2" is byte-level BPE with a list of merges; its `pre` names how text is cut into words first.
"llama" is SentencePiece BPE: a score for each token decides which pair merges first, and a character without a token
falls back to bytes.

Elsewhere: what is done with a tokenizer is `prompt/tokenizer.py`; the file's header is read by `gguf.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from argosy.checkpoint.gguf import GgufFile, read_gguf
from argosy.checkpoint.json_strict import quote
from argosy.errors import CheckpointError, UnsupportedModel

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # token types
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"

# Words of byte-level BPE, as the models' own tokenizer.json files cut them.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_O200K = (  # a word is capitals and then small letters, with what stands before it and a contraction after it
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_NOT_HAN = r"&&[^\p{Han}]"  # Kimi-K2: Chinese characters make words of their own
_KIMI = (
    rf"\p{{Han}}+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}{_NOT_HAN}]*[{_LOWER}{_NOT_HAN}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}{_NOT_HAN}]+[{_LOWER}{_NOT_HAN}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# DeepSeek-V3: digits in threes, then Chinese and Japanese, then the rest.
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
# DeepSeek-V2: letters that have case, by the ranges of code points that its tokenizer.json lists.
_CASED_SPANS = (
    "41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386 388-38A 38C "
    "38E-3A1 3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF 1D00-1D2B "
    "1D6B-1D77 1D79-1D9A 1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 "
    "1FB6-1FBC 1FBE 1FC2-1FC4 1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 "
    "2115 2119-211D 2124 2126 2128 212A-212D 212F-2134 2139 213C-213F 2145-2149 214E 2183 2184 2C00-2C7B "
    "2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 A640-A66D A680-A69B A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 "
    "FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F 104B0-104D3 104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF "
    "1E900-1E943"
)
_CASED = "".join("-".join(chr(int(end, 16)) for end in span.split("-")) for span in _CASED_SPANS.split())
_DEEPSEEK_V2 = (
    r"[\r\n]",
    rf"\s?[{_CASED}]+",
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
    r"\p{N}+",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Words:
    """How one `pre` prepares text: patterns applied one after the other, each cutting what the others left."""

    patterns: tuple[str, ...]
    is_nfc: bool = False  # text is brought into Unicode's composed form first
    ignores_merges: bool = False  # a word that is a token is that token, whatever the merges say
    adds_bos: bool = False


_WORDS: Mapping[str, _Words] = {
    "gpt-2": _Words(patterns=(_GPT2,)),
    "smollm": _Words(patterns=(r"\p{N}", _GPT2)),
    "llama-bpe": _Words(patterns=(_LLAMA3,), ignores_merges=True, adds_bos=True),
    "qwen2": _Words(patterns=(_QWEN2,), is_nfc=True),
    "gpt-4o": _Words(patterns=(_O200K,), ignores_merges=True),
    "deepseek-v3": _Words(patterns=_DEEPSEEK_V3),
    "deepseek-llm": _Words(patterns=_DEEPSEEK_V2),
    "kimi-k2": _Words(patterns=(_KIMI,)),
    "glm4": _Words(patterns=(_LLAMA3,)),
    # What llama.cpp does for a file that names none.
    "default": _Words(patterns=(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
}
# Spellings of tokens that end a turn, whatever the file says of eos: models are trained to stop at any of them.
_ENDS_OF_TURN = frozenset({
    "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|return|>", "<|call|>",
})  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTokenizer:
    """A tokenizer, with what tokenizer_config.json and generation_config.json would say beside it."""

    core: tokenizers.Tokenizer
    config: Mapping[str, Any]  # bos_token ... as text, add_bos_token
    eos_ids: tuple[int, ...]
    chat_template: str | None


def read_tokenizer(file: GgufFile) -> GgufTokenizer | None:
    """The tokenizer that a GGUF describes; None where it describes none.

    Raises:
        CheckpointError: a key is missing, or the parts do not belong together.
        UnsupportedModel: another kind of tokenizer.
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
    if kind == "gpt2":
        core, adds_bos = _byte_level(file, vocab)
    elif kind == "llama":
        core, adds_bos = _sentencepiece(file, tokens, vocab, kinds), True
    else:
        raise UnsupportedModel(
            f"{file.path.name} has a tokenizer of kind '{quote(kind)}'; supported: gpt2, llama",
            hint="use the safetensors directory of the same model, it holds tokenizer.json",
            path=file.path,
            key="tokenizer.ggml.model",
            value=kind,
            supported=("gpt2", "llama"),
        )
    for at, token in enumerate(tokens):
        if kinds[at] in (_CONTROL, _UNKNOWN) and token:
            core.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kinds[at] == _USER_DEFINED and token:
            core.add_tokens([AddedToken(token, special=False, normalized=False)])
    config: dict[str, Any] = {"add_bos_token": file.flag("tokenizer.ggml.add_bos_token", adds_bos)}
    for name, role in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token_id = _special_id(file, role, len(tokens))
        if token_id is not None:
            config[f"{name}_token"] = tokens[token_id]
    ends = {_special_id(file, role, len(tokens)) for role in ("eos", "eot", "eom")}
    ends |= {vocab[text] for text in _ENDS_OF_TURN & vocab.keys() if kinds[vocab[text]] == _CONTROL}
    template = file.metadata.get("tokenizer.chat_template")
    return GgufTokenizer(
        core=core,
        config=config,
        eos_ids=tuple(sorted(token_id for token_id in ends if token_id is not None)),
        chat_template=None if template is None else file.text("tokenizer.chat_template"),
    )


def tokenizer_files(path: Path) -> tuple[str, dict[str, Any]]:
    """The tokenizer of a GGUF as the files of a checkpoint directory.

    Returns:
        tokenizer_json: text of `tokenizer.json`.
        tokenizer_config: content of `tokenizer_config.json`, chat template included.

    Raises:
        CheckpointError, UnsupportedModel: as `read_tokenizer`; or the file describes no tokenizer.
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
        **{name: text for name, text in read.config.items() if name != "add_bos_token"},
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
    key = f"tokenizer.ggml.{role}_token_id"
    if key not in file.metadata:
        return None
    token_id = file.integer(key, most=2**32 - 1)
    if token_id == 2**32 - 1:  # how some converters write "none"
        return None
    if token_id >= num_tokens:
        raise file.wrong(key, token_id, f"an id below {num_tokens}, the number of tokens")
    return token_id


def _byte_level(file: GgufFile, vocab: dict[str, int]) -> tuple[tokenizers.Tokenizer, bool]:
    name = file.text("tokenizer.ggml.pre", "default")
    if name not in _WORDS:
        raise UnsupportedModel(
            f"{file.path.name} cuts text into words by '{quote(name)}'; supported: {', '.join(_WORDS)}",
            hint="use the safetensors directory of the same model, it holds tokenizer.json",
            path=file.path,
            key="tokenizer.ggml.pre",
            value=name,
            supported=tuple(_WORDS),
        )
    words = _WORDS[name]
    merges = [tuple(merge.split(" ", 1)) for merge in file.texts("tokenizer.ggml.merges")]
    if whole := [merge[0] for merge in merges if len(merge) != 2]:
        raise CheckpointError(
            f"{file.path.name}: tokenizer.ggml.merges holds '{quote(whole[0])}', expected two tokens and a space",
            path=file.path,
            key="tokenizer.ggml.merges",
        )
    core = _tokenizer_of(file, vocab=vocab, merges=merges, ignore_merges=words.ignores_merges)
    if words.is_nfc:
        core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in words.patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    return core, words.adds_bos


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
    core = _tokenizer_of(
        file,
        vocab=vocab,
        merges=_merges_of_scores(vocab, scores, kinds),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=True,
    )
    adds_space = file.flag("tokenizer.ggml.add_space_prefix", True)
    replace = normalizers.Replace(" ", _SPACE)
    core.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replace]) if adds_space else replace
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if adds_space else steps)
    return core


def _merges_of_scores(
    vocab: Mapping[str, int], scores: Sequence[float], kinds: Sequence[float]
) -> list[tuple[str, str]]:
    """SentencePiece merges the adjacent pair whose token has the best score: the same as a list of merges, best first.

    Every cut of a token into two others is one, for they may meet in that way; equal scores keep the order of ids.
    """
    found = []
    for token, at in vocab.items():
        if kinds[at] not in (_NORMAL, _USER_DEFINED):
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                found.append((-scores[at], at, vocab[left], vocab[right], left, right))
    found.sort(key=lambda merge: merge[:4])
    return [(left, right) for *_, left, right in found]


def _tokenizer_of(file: GgufFile, **parts: Any) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer(models.BPE(**parts))
    except Exception as error:  # the package raises plain Exception
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{file.path.name}: the tokens and merges do not belong together: {quote(said)}", path=file.path
        ) from None
