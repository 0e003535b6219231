"""A tokenizer rebuilt from GGUF metadata gives the ids of the tokenizer it was made from."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
import tokenizers
from gguf import GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from argosy.checkpoint.gguf import read_gguf
from argosy.checkpoint.vocabulary.byte_level import spelling_of_bytes
from argosy.checkpoint.vocabulary.gguf_tokenizer import read_tokenizer
from argosy.errors import CheckpointError, UnsupportedModel
from argosy.prompt.tokenizer import Tokenizer
from tests.prompt import kimi_files

TEXTS = [
    "Hello world! It's 12345, we'll see 3.14.",
    "  two  spaces\n\n\tand an indent\r\n",
    "naïve café “quotes” … — привет 日本語 🙂👩‍👧",
    "def f(x):\n    return x ** 2  # squares\n",
    "!!!??? <b>bold</b> a_b-c+d=e",
    "",
    " ",
]
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA3 = (
    CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]*[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]+{CONTRACTIONS}?|"
    rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]+[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]*{CONTRACTIONS}?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN35 = (
    CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


# The patterns of these models' tokenizer.json: Mistral's is also in tekken.json.
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LING = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
K_EXAONE = (
    CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
DEEPSEEK = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TRINITY = (
    r"\p{Nd}{1,510}(?=(?>\p{Nd}{510})*(?:\P{Nd}|$))|\G\p{Nd}{510}",
    r"\A\p{Nd}{1,2}(?=\p{Nd}{3}+\z)",
    r"\A\p{Nd}{3}|\G\p{Nd}{3}",
    r"(?:[\u4E00-\u9FFF\u3040-\u309F\u30A0-\u30FF\u3400-\u4DBF\uf900-\uFAFF\uFF65-\uFF9F\u2F00-\u2FDF]+|[\u0E00-\u0E7F]+"
    r"|[\u0E80-\u0EFF]+|[\u1780-\u17FF]+|[\u1000-\u109F\uAA60-\uAA7F\uA9E0-\uA9FF]+|[\uAC00-\uD7AF\u1100-\u11FF]+)",
    DEEPSEEK,
)


class Original(NamedTuple):
    """The steps in a model's own tokenizer.json before it merges bytes."""

    words: pre_tokenizers.PreTokenizer
    is_nfc: bool = False
    ignores_merges: bool = False


def split(*patterns: str, first: str = "isolated") -> pre_tokenizers.PreTokenizer:
    behaviors = [first, *["isolated"] * len(patterns)]
    steps = [
        pre_tokenizers.Split(Regex(one), behavior=how) for one, how in zip(patterns, behaviors, strict=False)
    ]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*steps, byte_level])


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS = pre_tokenizers.Digits(individual_digits=True)
# These are from transformers 5.24: `GPTNeoXTokenizer` (OLMoE), `Qwen2Tokenizer` (up to Qwen3-Next), `Qwen3_5Tokenizer`
# and `TikTokenConverter` (gpt-oss, GLM). Expressions from MiniMax-M2's on are those of the models' tokenizer.json.
ORIGINALS = {
    "gpt-2": Original(GPT2),
    "olmo": Original(GPT2, is_nfc=True),
    "smollm": Original(pre_tokenizers.Sequence([DIGITS, GPT2])),
    "llama-bpe": Original(split(LLAMA3), ignores_merges=True),
    "qwen2": Original(split(QWEN2), is_nfc=True),
    "qwen35": Original(split(QWEN35), is_nfc=True),
    "gpt-4o": Original(split(O200K), ignores_merges=True),
    "minimax-m2": Original(split(O200K)),
    "glm4": Original(split(LLAMA3), ignores_merges=True),
    "tekken": Original(split(TEKKEN), ignores_merges=True),
    "bailingmoe2": Original(split(LING)),
    "exaone-moe": Original(split(K_EXAONE)),
    "afmoe": Original(split(*TRINITY)),
    "cohere2moe": Original(split(r"\d{1,3}(?=(?:\d{3})*\b)", O200K)),
    "laguna": Original(split(r"(?:\r?\n)+(?!\r?\n)", QWEN2, first="merged_with_next")),
    "dbrx": Original(split(LLAMA3)),
}


def trained(pre: str) -> tokenizers.Tokenizer:
    original = ORIGINALS[pre]
    core = tokenizers.Tokenizer(models.BPE(ignore_merges=original.ignores_merges))
    core.pre_tokenizer = original.words
    core.decoder = decoders.ByteLevel()
    if original.is_nfc:
        core.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=list(CONTROL),
        show_progress=False,
    )  # fmt: skip
    core.train_from_iterator(TEXTS * 3, trainer)
    return core


def write(
    path: Path, kind: str, tokens: Sequence[str], types: Sequence[int], more: Callable[[GGUFWriter], object]
) -> Path:
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model(kind)
    writer.add_token_list(list(tokens))
    writer.add_token_types(list(types))
    more(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def write_bpe(path: Path, core: tokenizers.Tokenizer, pre: str, **special: int) -> Path:
    model = json.loads(core.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)

    def more(writer: GGUFWriter) -> None:
        writer.add_tokenizer_pre(pre)
        writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
        writer.add_chat_template(TEMPLATE)
        for role, token_id in special.items():
            writer.add_uint32(f"tokenizer.ggml.{role}_token_id", token_id)

    return write(path, "gpt2", tokens, [3 if token in CONTROL else 1 for token in tokens], more)


def opened(path: Path) -> Tokenizer:
    tokenizer = Tokenizer.open(path)
    assert tokenizer is not None
    return tokenizer


@pytest.mark.parametrize("pre", ORIGINALS)
def test_byte_level_ids_are_those_of_the_original(pre: str, tmp_path: Path) -> None:
    core = trained(pre)
    tokenizer = opened(write_bpe(tmp_path / "v.gguf", core, pre, bos=0, eos=2))
    for text in TEXTS:
        ids = core.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == text
        assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


MARKS = [
    "e\u0301",
    "\u0301",
    "\u0e33",
    "क्षि",
    "Å",
    "ﬁ",
    "ǅ",
    "'",
    "'S",
    "'ll",
    "\r\n",
    "\n",
    "\t",
    "  ",
    " ",
    "/",
    "12",
    "12345",
    "1234567",
    "a_",
    "東京",
    "ไทย",
    "한국",
    "한국 어",
]
pieces = st.one_of(st.text(st.characters(exclude_categories=["Cs", "Cn"])), st.sampled_from(MARKS))
# Argosy reads a control token in a caller's text as plain characters, and `tokenizers` does not.
texts = st.lists(pieces).map("".join).filter(lambda text: not any(token in text for token in CONTROL))


@pytest.fixture(scope="module", params=ORIGINALS)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[tokenizers.Tokenizer, Tokenizer]:
    """The tokenizer of a model's own files, and the one rebuilt from its GGUF."""
    core = trained(request.param)
    path = tmp_path_factory.mktemp("pair") / "v.gguf"
    return core, opened(write_bpe(path, core, request.param, bos=0, eos=2))


@settings(deadline=None)
@given(text=texts)
def test_ids_of_any_text_are_those_of_the_original(
    pair: tuple[tokenizers.Tokenizer, Tokenizer], text: str
) -> None:
    core, tokenizer = pair
    assert tokenizer.encode(text) == core.encode(text, add_special_tokens=False).ids


def test_in_glm_a_word_that_is_a_token_becomes_that_token(tmp_path: Path) -> None:
    """GLM's merges come from tiktoken: greedy merging cannot reach some tokens, but their words become them."""
    vocab = {
        token: at for at, token in enumerate([*pre_tokenizers.ByteLevel.alphabet(), "ab", "abc", "bc", "bcd"])
    }
    merges = [("b", "c"), ("a", "b"), ("ab", "c"), ("bc", "d")]
    for pre, tokens in (("glm4", ["abc"]), ("minimax-m2", ["a", "bc"])):
        core = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
        tokenizer = opened(write_bpe(tmp_path / f"{pre}.gguf", core, pre))
        assert pieces_of(tokenizer, "abc") == tokens


def write_kimi_gguf(path: Path) -> Path:
    """Kimi's tokenizer as `DeepseekV2Model.set_vocab` of llama.cpp writes it: at most one merge per token."""
    spelled = {token: "".join(spelling_of_bytes()[byte] for byte in token) for token in kimi_files.ranks()}
    special = [kimi_files.SPECIAL.get(at, f"[PAD{kimi_files.NUM_RANKS + at}]") for at in range(256)]
    kinds = [1] * len(spelled) + [3 if at in kimi_files.SPECIAL else 5 for at in range(256)]
    merges = [
        " ".join(spelled[part] for part in parts)
        for token, rank in kimi_files.ranks().items()
        if len(parts := merged_below(token, rank)) == 2
    ]

    def more(writer: GGUFWriter) -> None:
        writer.add_tokenizer_pre("kimi-k2")
        writer.add_token_merges(merges)
        writer.add_bos_token_id(kimi_files.NUM_RANKS)
        writer.add_eos_token_id(kimi_files.NUM_RANKS + 1)

    return write(path, "gpt2", [*spelled.values(), *special], kinds, more)


def merged_below(token: bytes, rank: int) -> list[bytes]:
    """The parts of a token after all merges into tokens of lower rank, lowest rank first."""
    parts, ranks = [bytes([byte]) for byte in token], kimi_files.ranks()
    while True:
        made = [(ranks.get(left + right, rank), at) for at, (left, right) in enumerate(pairwise(parts))]
        lowest, at = min(made, default=(rank, 0))
        if lowest >= rank:
            return parts
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


@pytest.fixture(scope="module")
def kimi(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return opened(write_kimi_gguf(tmp_path_factory.mktemp("kimi") / "v.gguf"))


def test_a_kimi_token_that_no_merge_reaches_is_still_found(kimi: Tokenizer) -> None:
    assert len(kimi.encode(kimi_files.UNMADE)) == 1


KIMI_WORDS = st.sampled_from([*kimi_files.TEXT.split(), kimi_files.UNMADE, " ", "\n"])


@settings(deadline=None)
@given(text=st.one_of(texts, st.lists(KIMI_WORDS)).map("".join))
def test_ids_of_kimi_are_those_of_tiktoken(kimi: Tokenizer, text: str) -> None:
    assert kimi.encode(text) == kimi_files.peer().encode_ordinary(text)


def test_a_kimi_token_longer_than_512_bytes_is_refused(tmp_path: Path) -> None:
    path = write(
        tmp_path / "v.gguf", "gpt2", ["a", "a" * 513], [1, 1], lambda w: w.add_tokenizer_pre("kimi-k2")
    )
    with pytest.raises(CheckpointError, match="a token has 513 bytes, expected at most 512"):
        Tokenizer.open(path)


WORDS = {
    "gpt-4o": {  # words are split by case and keep their contractions
        "HelloWorld": ["Hello", "World"],
        "I'm they'LL": ["I'm", "Ġthey'LL"],
        "12345 67": ["123", "45", "Ġ", "67"],
        "a //b\n\n c": ["a", "Ġ//", "b", "ĊĊ", "Ġc"],
        "x   y": ["x", "ĠĠ", "Ġy"],
    },
    "deepseek-v3": {  # digits in threes, Chinese by itself
        "12345 67": ["123", "45", "Ġ", "67"],
        "It's HelloWorld": ["It", "'s", "ĠHelloWorld"],
        "f(x.y)\n\n z": ["f", "(x", ".y", ")ĊĊ", "Ġz"],
        "ab一二c": ["ab", "ä¸ĢäºĮ", "c"],
    },
    "deepseek-llm": {  # line breaks and punctuation by themselves, letters of one script
        "12345 67": ["12345", "Ġ", "67"],
        "It's a\n\n b": ["It", "'", "s", "Ġa", "Ċ", "Ċ", "Ġb"],
        "(x.y)": ["(", "x", ".", "y", ")"],
        "ab一二é": ["ab", "ä¸ĢäºĮ", "Ã©"],
    },
    "kimi-k2": {  # as gpt-4o, but Chinese by itself
        "HelloWorld's": ["Hello", "World's"],
        "12345 67": ["123", "45", "Ġ", "67"],
        "a //b\n c": ["a", "Ġ//", "b", "Ċ", "Ġc"],
        "ab一二c": ["ab", "ä¸ĢäºĮ", "c"],
    },
    "qwen35": {  # accents stay with their letters, digits one by one
        "क्षि 12": ["à¤ķà¥įà¤·à¤¿", "Ġ", "1", "2"],
        "!\u0301x": ["!Ìģx"],
        "It's x\n y": ["It", "'s", "Ġx", "Ċ", "Ġy"],
    },
    "qwen2": {"क्षि": ["à¤ķ", "à¥įà¤·", "à¤¿"]},
    "minimax-m2": {
        "HelloWorld": ["Hello", "World"],
        "they'LL //b\n": ["they'LL", "Ġ//", "b", "Ċ"],
        "12345 67": ["123", "45", "Ġ", "67"],
    },
    "olmo": {
        "It's HelloWorld": ["It", "'s", "ĠHelloWorld"],
        "12345  x": ["12345", "Ġ", "Ġx"],
    },
    "tekken": {
        "HelloWorld": ["Hello", "World"],
        "They'LL go": ["They", "'LL", "Ġgo"],
        "123 a/b//\n": ["1", "2", "3", "Ġa", "/b", "//Ċ"],
    },
    "afmoe": {
        "1234567 89a": ["1", "234", "567", "Ġ", "89", "a"],
        "a東京ไทย한국": ["a", "æĿ±äº¬", "à¹Ħà¸Ĺà¸¢", "íķľêµŃ"],
        "It's (x.y)": ["It", "'s", "Ġ(", "x", ".y", ")"],
    },
    "cohere2moe": {  # digits in threes from the right, unless a letter follows
        "1234567": ["1", "234", "567"],
        "1234567a": ["123", "456", "7", "a"],
        "HelloWorld 12": ["Hello", "World", "Ġ", "12"],
    },
    "exaone-moe": {  # a word goes on over single spaces
        "one two  three": ["oneĠtwo", "Ġ", "Ġthree"],
        "12 a/\n\nb": ["1", "2", "Ġa", "/Ċ", "Ċ", "b"],
    },
    "laguna": {  # a piece begins at each run of line breaks
        "a  \r\n\r\n b": ["a", "ĠĠ", "čĊčĊ", "Ġb"],
        "!\nx": ["!", "Ċ", "x"],
    },
    "youtu": {
        "a한국，。東京": ["a", "íķľêµŃ", "ï¼ĮãĢĤ", "æĿ±äº¬"],
        "HelloWorld's 12": ["Hello", "World's", "Ġ", "1", "2"],
    },
    "bailingmoe2": {"It's 12\n\n x": ["It", "'s", "Ġ", "1", "2", "ĊĊ", "Ġx"]},
    "mellum2": {"It's 12": ["It", "'s", "Ġ", "1", "2"]},
    "gigachat": {"It's 12": ["It", "'s", "Ġ12"]},
    "glm4": {
        "12345 67": ["123", "45", "Ġ", "67"],
        "It's HelloWorld": ["It", "'s", "ĠHelloWorld"],
        "ab一二c": ["abä¸ĢäºĮc"],
    },
}


@pytest.mark.parametrize("pre", WORDS)
def test_text_is_split_into_the_model_s_words(pre: str, tmp_path: Path) -> None:
    core = trained("gpt-2")
    file = read_gguf(write_bpe(tmp_path / "v.gguf", core, pre, bos=0, eos=2))
    read = read_tokenizer(file)
    assert read is not None
    for text, words in WORDS[pre].items():
        assert [word for word, _ in read.core.pre_tokenizer.pre_tokenize_str(text)] == words


def test_special_tokens_and_the_template_come_from_the_metadata(tmp_path: Path) -> None:
    tokenizer = opened(write_bpe(tmp_path / "v.gguf", trained("smollm"), "smollm", bos=1, eos=2))
    assert tokenizer.chat_template == TEMPLATE
    assert (tokenizer.bos_id, tokenizer.prefix_ids) == (1, ())
    assert tokenizer.eos_ids == (0, 2)  # <|endoftext|> ends an answer too
    assert tokenizer.special_tokens == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    assert {0, 1, 2} <= tokenizer.control_ids
    assert tokenizer.control_ids.isdisjoint(tokenizer.encode("<|im_start|>system"))
    assert tokenizer.encode_segments([(False, "<|im_start|>")]) == [1]


@pytest.mark.parametrize("end", ["<|eom|>", "<|observation|>", "</assistant>", "<|calls|>"])
def test_a_token_that_ends_turns_ends_an_answer_though_no_key_names_it(end: str, tmp_path: Path) -> None:
    for kind, ends in ((3, (0, 2)), (4, (0, 2)), (1, (2,))):
        tokens = [end, "a", "</s>", "b", "ab"]

        def more(writer: GGUFWriter) -> None:
            writer.add_tokenizer_pre("gpt-2")
            writer.add_token_merges(["a b"])
            writer.add_eos_token_id(2)

        path = write(tmp_path / f"{kind}.gguf", "gpt2", tokens, [kind, 1, 3, 1, 1], more)
        assert opened(path).eos_ids == ends


def test_llama_bpe_starts_with_bos(tmp_path: Path) -> None:
    core = trained("llama-bpe")
    assert opened(write_bpe(tmp_path / "a.gguf", core, "llama-bpe", bos=1, eos=2)).prefix_ids == (1,)


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def write_sentencepiece(path: Path, pieces: dict[str, float], **flags: bool) -> Path:
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *pieces]

    def more(writer: GGUFWriter) -> None:
        writer.add_token_scores([0.0] * 259 + list(pieces.values()))
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
        for name, value in flags.items():
            writer.add_bool(f"tokenizer.ggml.{name}", value)

    return write(path, "llama", tokens, [2, 3, 3, *[6] * 256, *[1] * len(pieces)], more)


PIECES = {
    "▁a": -1.0,
    "ab": -2.0,
    "▁ab": -3.0,
    "bc": -1.5,
    "▁": -9.0,
    "a": -9.1,
    "b": -9.2,
    "c": -9.3,
    "é": -9.4,
}


def pieces_of(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.token_text(token_id) for token_id in tokenizer.encode(text)]


def test_sentencepiece_merges_the_pair_with_the_best_score_first(tmp_path: Path) -> None:
    tokenizer = opened(write_sentencepiece(tmp_path / "v.gguf", PIECES))
    assert pieces_of(tokenizer, "ab") == ["▁ab"]
    assert pieces_of(tokenizer, "abc") == ["▁a", "bc"]  # scores -1.0 and -1.5 win over -2.0 and -3.0
    assert pieces_of(tokenizer, "cab") == ["▁", "c", "ab"]


def test_a_character_without_a_token_falls_back_to_bytes_and_decodes_again(tmp_path: Path) -> None:
    tokenizer = opened(write_sentencepiece(tmp_path / "v.gguf", PIECES))
    assert pieces_of(tokenizer, "é€") == ["▁", "é", "<0xE2>", "<0x82>", "<0xAC>"]
    assert tokenizer.token_bytes(tokenizer.encode("é€")[2]) == b"\xe2"
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert b"".join(map(tokenizer.token_bytes, ids)) == (f" {text}".encode() if text else b"")
    assert (tokenizer.prefix_ids, tokenizer.eos_ids) == ((1,), (2,))


def test_the_space_prefix_and_bos_can_be_turned_off(tmp_path: Path) -> None:
    path = write_sentencepiece(tmp_path / "v.gguf", PIECES, add_space_prefix=False, add_bos_token=False)
    tokenizer = opened(path)
    assert pieces_of(tokenizer, "ab") == ["ab"]
    assert tokenizer.decode(tokenizer.encode(" ab")) == " ab"
    assert tokenizer.prefix_ids == ()


def gemma() -> tokenizers.Tokenizer:
    """A small tokenizer as `GemmaTokenizer` of transformers 5.24 builds it; runs of newlines are tokens."""
    core = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.normalizer = normalizers.Replace(" ", "▁")
    core.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<eos>", "<bos>", "<unk>", *BYTES],
        limit_alphabet=60,
        show_progress=False,
    )
    core.train_from_iterator([*TEXTS, *["\n", "\n\n", "\n\n\n", "x ab"] * 3] * 3, trainer)
    state = json.loads(core.to_str())
    state["added_tokens"] = state["added_tokens"][:3]
    return tokenizers.Tokenizer.from_str(json.dumps(state))


MARKS_OF_GEMMA = {"<turn|>": 3, "<|tool_response>": 4, "<|channel>": 4}  # and their types


def write_gemma(
    path: Path, core: tokenizers.Tokenizer, kind: str = "gemma4", *, adds_bos: bool = True
) -> Path:
    model = json.loads(core.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)

    def more(writer: GGUFWriter) -> None:
        if kind == "gpt2":
            writer.add_tokenizer_pre("sarvam-moe")
        writer.add_token_scores([-1000.0] * (len(tokens) + len(MARKS_OF_GEMMA)))
        writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
        for role, token_id in (("eos", 0), ("bos", 1), ("unknown", 2)):
            writer.add_uint32(f"tokenizer.ggml.{role}_token_id", token_id)
        writer.add_add_bos_token(adds_bos)

    types = [3, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259), *MARKS_OF_GEMMA.values()]
    return write(path, kind, [*tokens, *MARKS_OF_GEMMA], types, more)


@pytest.fixture(scope="module", params=["gemma4", "gpt2"])
def gemma_pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[tokenizers.Tokenizer, Tokenizer]:
    """Gemma's tokenizer and the one rebuilt from its GGUF, or from one with the pre-tokenizer of Sarvam."""
    core = gemma()
    return core, opened(write_gemma(tmp_path_factory.mktemp("gemma") / "v.gguf", core, request.param))


MARKED = st.lists(
    st.one_of(pieces, st.sampled_from(["\n\n\n\n", "▁", " ▁ ", "<0x41>", "the ", "quotes"]))
).map("".join)


@settings(deadline=None)
@given(text=MARKED)
def test_ids_of_gemma_are_those_of_the_original(
    gemma_pair: tuple[tokenizers.Tokenizer, Tokenizer], text: str
) -> None:
    core, tokenizer = gemma_pair
    ids = core.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids) == core.decode(ids)


def test_gemma_merges_whole_texts_and_newlines_and_falls_back_to_bytes(tmp_path: Path) -> None:
    tokenizer = opened(write_gemma(tmp_path / "v.gguf", gemma()))
    assert pieces_of(tokenizer, "\n\n\n") == ["\n\n\n"]
    assert pieces_of(tokenizer, "x ab")[-1] in ("x▁ab", "▁ab")
    assert pieces_of(tokenizer, "€\n") == ["<0xE2>", "<0x82>", "<0xAC>", "\n"]


def test_gemma_starts_with_bos_whatever_the_file_says_and_ends_at_marks_of_any_type(tmp_path: Path) -> None:
    tokenizer = opened(write_gemma(tmp_path / "v.gguf", gemma(), adds_bos=False))
    assert tokenizer.prefix_ids == (1,)
    ends = [tokenizer.token_text(token_id) for token_id in tokenizer.eos_ids]
    assert ends == ["<eos>", "<turn|>", "<|tool_response>"]
    (channel,) = tokenizer.encode_segments([(False, "<|channel>")])
    assert tokenizer.decode([channel]) == "<|channel>"  # a user-defined token is printed
    assert channel not in tokenizer.encode("<|channel>")
    sarvam = opened(write_gemma(tmp_path / "s.gguf", gemma(), "gpt2", adds_bos=False))
    assert sarvam.prefix_ids == ()


def test_a_tokenizer_that_cannot_be_rebuilt_is_refused_by_name(tmp_path: Path) -> None:
    core = trained("gpt-2")
    with pytest.raises(
        UnsupportedModel, match=r"uses the pre-tokenizer 'superbpe'; supported: gpt-2, olmo, smollm"
    ):
        Tokenizer.open(write_bpe(tmp_path / "a.gguf", core, "superbpe"))
    with pytest.raises(UnsupportedModel, match="a tokenizer of kind 'bert'; supported: gpt2, llama, gemma4"):
        Tokenizer.open(write(tmp_path / "b.gguf", "bert", ["a"], [1], lambda writer: None))
    with pytest.raises(
        CheckpointError, match=r"tokenizer\.ggml\.eos_token_id is '9999', expected an id below"
    ):
        Tokenizer.open(write_bpe(tmp_path / "c.gguf", core, "gpt-2", eos=9999))
    with pytest.raises(CheckpointError, match=r"tokenizer\.ggml\.tokens holds 'a' twice"):
        Tokenizer.open(write(tmp_path / "d.gguf", "gpt2", ["a", "b", "a"], [1] * 3, lambda writer: None))
    bad = write(tmp_path / "e.gguf", "gpt2", ["a", "b"], [1] * 2, lambda w: w.add_token_merges(["a x"]))
    with pytest.raises(CheckpointError, match=r"the tokens and merges do not match"):
        Tokenizer.open(bad)
    with pytest.raises(CheckpointError, match=r"token_type has 1 entries for 2 tokens"):
        Tokenizer.open(write(tmp_path / "f.gguf", "llama", ["a", "b"], [1], lambda writer: None))


def test_a_nan_score_and_an_overlong_token_are_refused(tmp_path: Path) -> None:
    for at, pieces in enumerate([{**PIECES, "bc": float("nan")}, {**PIECES, "b" * 513: -5.0}]):
        with pytest.raises(
            CheckpointError, match=r"characters and score \S+; expected at most 512 characters, and a number"
        ):
            Tokenizer.open(write_sentencepiece(tmp_path / f"{at}.gguf", pieces))


def test_a_file_without_a_tokenizer_gives_none(tmp_path: Path) -> None:
    assert Tokenizer.open(write(tmp_path / "a.gguf", "none", ["a"], [1], lambda writer: None)) is None
