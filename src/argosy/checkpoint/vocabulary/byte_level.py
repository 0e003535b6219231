"""Byte-level BPE: how text is split into words, and how a vocabulary spells bytes.

    text  ->  words, by a model's patterns  ->  bytes, each spelled as a character  ->  merges  ->  tokens

`WORDS` lists the patterns of the models' own tokenizers by their GGUF names.

Elsewhere: vocabularies and merges come from `gguf_tokenizer.py`, `tiktoken_model.py` and `tekken.py`; a
`tokenizer.json` contains all of this itself.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from argosy.errors import CheckpointError

# Patterns that split text into words, from the models' own tokenizer.json files.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_O200K = (  # a word is capitals, then small letters, with one character before it and a contraction after it
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = _O200K.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)?", "").replace(r"\p{N}{1,3}", r"\p{N}")
_YOUTU = (
    "[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥぀-ゟ゠-ヿ]+",
    _O200K.replace(r"\p{N}{1,3}", r"\p{N}"),
)
# K-EXAONE: a word goes on over single spaces between letters.
_EXAONE_MOE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)
# Qwen3.5: accents stay with their letters (PRETOKENIZE_REGEX of transformers 5.24, tokenization_qwen3_5.py).
_QWEN35 = _QWEN2.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")
_NOT_HAN = r"&&[^\p{Han}]"  # Kimi-K2: Chinese characters form separate words
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
# Trinity: digits in threes from the right, then runs of each script that has no spaces, then DeepSeek-V3's words.
_AFMOE = (
    r"\p{Nd}{1,510}(?=(?>\p{Nd}{510})*(?:\P{Nd}|$))|\G\p{Nd}{510}",
    r"\A\p{Nd}{1,2}(?=\p{Nd}{3}+\z)",
    r"\A\p{Nd}{3}|\G\p{Nd}{3}",
    "[\u4e00-\u9fff\u3040-\u309f\u30a0-\u30ff\u3400-\u4dbf\uf900-\ufaff\uff65-\uff9f\u2f00-\u2fdf]+|[\u0e00-\u0e7f]+"
    "|[\u0e80-\u0eff]+|[\u1780-\u17ff]+|[\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff]+|[\uac00-\ud7af\u1100-\u11ff]+",
    _DEEPSEEK_V3[2],
)
# DeepSeek-V2: cased letters, as the code point ranges in its tokenizer.json.
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
class Words:
    """How one `pre` prepares text: patterns apply in order, each splitting the pieces that earlier patterns left."""

    patterns: tuple[str, ...]
    is_nfc: bool = False  # text is first normalized to Unicode's composed form
    ignores_merges: bool = False  # a word that is a token becomes that token, whatever the merges
    is_ranked: bool = False  # two tokens merge if they form a third; the lowest id merges first
    adds_bos: bool = False


# Names as in llama.cpp's converter (conversion/base.py, get_vocab_base_pre), for the families that run here. Patterns
# and flags as in the models' tokenizer.json, even if llama.cpp simplifies a pattern or lacks the corresponding step.
_LLAMA_BPE = Words(patterns=(_LLAMA3,), ignores_merges=True, adds_bos=True)
_GPT_4O = Words(patterns=(_O200K,), ignores_merges=True)
_OF_DEEPSEEK_V3 = Words(patterns=_DEEPSEEK_V3)
_DIGITS = Words(patterns=(r"\p{N}", _GPT2))
_OF_QWEN2 = Words(patterns=(_QWEN2,))
WORDS: Mapping[str, Words] = {
    "gpt-2": Words(patterns=(_GPT2,)),
    "olmo": Words(patterns=(_GPT2,), is_nfc=True),  # GPT-NeoX's tokenizer
    "smollm": _DIGITS,
    "llama-bpe": _LLAMA_BPE,
    "qwen2": Words(patterns=(_QWEN2,), is_nfc=True),
    "qwen35": Words(patterns=(_QWEN35,), is_nfc=True),
    "gpt-4o": _GPT_4O,
    "minimax-m2": Words(patterns=(_O200K,)),
    "tekken": Words(patterns=(_TEKKEN,), ignores_merges=True, adds_bos=True),
    "deepseek-v3": _OF_DEEPSEEK_V3,
    "deepseek-llm": Words(patterns=_DEEPSEEK_V2),
    # Kimi-K2 uses tiktoken, with ranks instead of merges; converters write at most one merge per token.
    "kimi-k2": Words(patterns=(_KIMI,), ignores_merges=True, is_ranked=True),
    "hunyuan": Words(patterns=(_QWEN2,), is_nfc=True, ignores_merges=True, is_ranked=True),  # tiktoken
    **dict.fromkeys(("glm4", "glm5"), Words(patterns=(_LLAMA3,), ignores_merges=True)),
    "dbrx": Words(patterns=(_LLAMA3,)),  # and Granite-4
    "youtu": Words(patterns=_YOUTU, ignores_merges=True),
    "exaone-moe": Words(patterns=(_EXAONE_MOE,)),
    "afmoe": Words(patterns=_AFMOE),
    # A run of line breaks begins a piece that goes on to the next one.
    "laguna": Words(patterns=(r"(?:\r?\n)+(?:[^\r\n]|\r(?!\n))*+", _QWEN2)),
    "cohere2moe": Words(patterns=(r"\d{1,3}(?=(?:\d{3})*\b)", _O200K)),  # digits in threes from the right
    # llama.cpp's rule for a file that names none.
    "default": Words(patterns=(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    # The same words under other names.
    **dict.fromkeys(("exaone4", "gigachat", "a.x-4.0"), Words(patterns=(_GPT2,))),
    **dict.fromkeys(("refact", "starcoder", "mellum2"), _DIGITS),  # the first two are Granite-3's
    **dict.fromkeys(("llama3", "llama-v3", "lfm2", "pixtral"), _LLAMA_BPE),  # Nemotron-3 says pixtral
    **dict.fromkeys(("llama4", "kanana2"), _GPT_4O),
    **dict.fromkeys(("hunyuan-dense", "hy_v4", "joyai-llm"), _OF_DEEPSEEK_V3),
    **dict.fromkeys(("bailingmoe", "bailingmoe2", "grok-2", "solar-open", "deepseek-r1-qwen"), _OF_QWEN2),
}

# `merges_by_rank` tries every cut of every token: tokens much longer than in any real vocabulary would take hours.
LONGEST_TOKEN = 512


def spelling_of_bytes() -> tuple[str, ...]:
    """Return GPT-2's table: the character that spells each byte in a vocabulary."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return tuple(chr(byte if byte in printable else next(others)) for byte in range(256))


def merges_by_rank(tokens: Iterable[str], vocab: Collection[str]) -> list[tuple[str, str]]:
    """Return the list of merges equivalent to always merging the adjacent pair whose token ranks first.

    Args:
        tokens: the tokens that pairs may merge into, in merge order.
        vocab: the tokens that may form pairs.

    Returns:
        Every split of a token into two others, because a token may form from any of these pairs.
    """
    return [
        (token[:cut], token[cut:])
        for token in tokens
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]


def ranked_tokens(by_rank: Mapping[int, bytes], path: Path) -> list[bytes]:
    """Return the tokens of the file at `path` in rank order.

    Raises:
        CheckpointError: a rank or a byte is missing, or two ranks have the same token.
    """
    tokens = [token for _, token in sorted(by_rank.items())]
    if missing := set(range(len(tokens))) - by_rank.keys():
        raise CheckpointError(
            f"{path.name} has {len(tokens)} tokens but none with rank {min(missing)}; expected ranks "
            "from 0 on without gaps",
            path=path,
        )
    known = {token: rank for rank, token in enumerate(tokens)}
    if len(known) < len(tokens):
        rank = next(rank for rank, token in enumerate(tokens) if known[token] != rank)
        raise CheckpointError(
            f"{path.name} gives ranks {rank} and {known[tokens[rank]]} to the same token", path=path
        )
    for byte in range(256):
        if bytes([byte]) not in known:
            raise CheckpointError(
                f"{path.name} has no token for the byte 0x{byte:02X}, so text that contains it cannot be encoded",
                path=path,
            )
    return tokens


def byte_level_tokenizer(model: models.Model, words: Words) -> tokenizers.Tokenizer:
    """Build a tokenizer that splits text by `words` and merges bytes by `model`."""
    core = tokenizers.Tokenizer(model)
    if words.is_nfc:
        core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in words.patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    return core
