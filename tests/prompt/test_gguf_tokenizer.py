"""A tokenizer rebuilt from GGUF metadata gives the ids of the tokenizer it was made from."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import tokenizers
from gguf import GGUFWriter
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from argosy.checkpoint.gguf import read_gguf
from argosy.checkpoint.gguf_tokenizer import read_tokenizer
from argosy.errors import CheckpointError, UnsupportedModel
from argosy.prompt.tokenizer import Tokenizer

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
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def words_of(pre: str) -> pre_tokenizers.PreTokenizer:
    """How the models' own tokenizer.json files cut text."""
    if pre == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre == "smollm":
        steps = [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
        return pre_tokenizers.Sequence(steps)
    pattern = LLAMA3 if pre == "llama-bpe" else LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def trained(pre: str) -> tokenizers.Tokenizer:
    core = tokenizers.Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    core.pre_tokenizer = words_of(pre)
    core.decoder = decoders.ByteLevel()
    if pre == "qwen2":
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


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_byte_level_ids_are_those_of_the_original(pre: str, tmp_path: Path) -> None:
    core = trained(pre)
    tokenizer = opened(write_bpe(tmp_path / "v.gguf", core, pre, bos=0, eos=2))
    for text in TEXTS:
        ids = core.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == text
        assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


WORDS = {
    "gpt-4o": {  # by case, and contractions stay
        "HelloWorld": ["Hello", "World"],
        "I'm they'LL": ["I'm", "Ġthey'LL"],
        "12345 67": ["123", "45", "Ġ", "67"],
        "a //b\n\n c": ["a", "Ġ//", "b", "ĊĊ", "Ġc"],
        "x   y": ["x", "ĠĠ", "Ġy"],
    },
    "deepseek-v3": {  # digits in threes, and Chinese apart
        "12345 67": ["123", "45", "Ġ", "67"],
        "It's HelloWorld": ["It", "'s", "ĠHelloWorld"],
        "f(x.y)\n\n z": ["f", "(x", ".y", ")ĊĊ", "Ġz"],
        "ab一二c": ["ab", "ä¸ĢäºĮ", "c"],
    },
    "deepseek-llm": {  # a new line alone, punctuation alone, letters of one script
        "12345 67": ["12345", "Ġ", "67"],
        "It's a\n\n b": ["It", "'", "s", "Ġa", "Ċ", "Ċ", "Ġb"],
        "(x.y)": ["(", "x", ".", "y", ")"],
        "ab一二é": ["ab", "ä¸ĢäºĮ", "Ã©"],
    },
    "kimi-k2": {  # as gpt-4o's, and Chinese apart
        "HelloWorld's": ["Hello", "World's"],
        "12345 67": ["123", "45", "Ġ", "67"],
        "a //b\n c": ["a", "Ġ//", "b", "Ċ", "Ġc"],
        "ab一二c": ["ab", "ä¸ĢäºĮ", "c"],
    },
    "glm4": {
        "12345 67": ["123", "45", "Ġ", "67"],
        "It's HelloWorld": ["It", "'s", "ĠHelloWorld"],
        "ab一二c": ["abä¸ĢäºĮc"],
    },
}


@pytest.mark.parametrize("pre", WORDS)
def test_text_is_cut_into_the_words_of_the_model(pre: str, tmp_path: Path) -> None:
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
    assert tokenizer.eos_ids == (0, 2)  # <|endoftext|> ends an answer, too
    assert tokenizer.special_tokens == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    assert {0, 1, 2} <= tokenizer.control_ids
    assert tokenizer.control_ids.isdisjoint(tokenizer.encode("<|im_start|>system"))
    assert tokenizer.encode_segments([(False, "<|im_start|>")]) == [1]


def test_llama_bpe_starts_with_bos_and_the_file_has_the_last_word(tmp_path: Path) -> None:
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
    assert pieces_of(tokenizer, "abc") == ["▁a", "bc"]  # -1.0 and -1.5 go before -2.0 and -3.0
    assert pieces_of(tokenizer, "cab") == ["▁", "c", "ab"]


def test_a_character_without_a_token_falls_back_to_bytes_and_comes_back(tmp_path: Path) -> None:
    tokenizer = opened(write_sentencepiece(tmp_path / "v.gguf", PIECES))
    assert pieces_of(tokenizer, "é€") == ["▁", "é", "<0xE2>", "<0x82>", "<0xAC>"]
    assert tokenizer.token_bytes(tokenizer.encode("é€")[2]) == b"\xe2"
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert b"".join(map(tokenizer.token_bytes, ids)) == (f" {text}".encode() if text else b"")
    assert (tokenizer.prefix_ids, tokenizer.eos_ids) == ((1,), (2,))


def test_a_space_before_the_text_and_bos_can_be_off(tmp_path: Path) -> None:
    path = write_sentencepiece(tmp_path / "v.gguf", PIECES, add_space_prefix=False, add_bos_token=False)
    tokenizer = opened(path)
    assert pieces_of(tokenizer, "ab") == ["ab"]
    assert tokenizer.decode(tokenizer.encode(" ab")) == " ab"
    assert tokenizer.prefix_ids == ()


def test_what_cannot_be_rebuilt_is_refused_by_name(tmp_path: Path) -> None:
    core = trained("gpt-2")
    with pytest.raises(UnsupportedModel, match=r"cuts text into words by 'tekken'; supported: gpt-2, smollm"):
        Tokenizer.open(write_bpe(tmp_path / "a.gguf", core, "tekken"))
    with pytest.raises(UnsupportedModel, match="a tokenizer of kind 'bert'; supported: gpt2, llama"):
        Tokenizer.open(write(tmp_path / "b.gguf", "bert", ["a"], [1], lambda writer: None))
    with pytest.raises(
        CheckpointError, match=r"tokenizer\.ggml\.eos_token_id is '9999', expected an id below"
    ):
        Tokenizer.open(write_bpe(tmp_path / "c.gguf", core, "gpt-2", eos=9999))
    with pytest.raises(CheckpointError, match=r"tokenizer\.ggml\.tokens holds 'a' twice"):
        Tokenizer.open(write(tmp_path / "d.gguf", "gpt2", ["a", "b", "a"], [1] * 3, lambda writer: None))
    bad = write(tmp_path / "e.gguf", "gpt2", ["a", "b"], [1] * 2, lambda w: w.add_token_merges(["a x"]))
    with pytest.raises(CheckpointError, match=r"the tokens and merges do not belong together"):
        Tokenizer.open(bad)
    with pytest.raises(CheckpointError, match=r"token_type has 1 entries for 2 tokens"):
        Tokenizer.open(write(tmp_path / "f.gguf", "llama", ["a", "b"], [1], lambda writer: None))


def test_a_score_that_ranks_nothing_and_a_token_without_end_are_refused(tmp_path: Path) -> None:
    for at, pieces in enumerate([{**PIECES, "bc": float("nan")}, {**PIECES, "b" * 513: -5.0}]):
        with pytest.raises(
            CheckpointError, match=r"characters and score \S+; expected at most 512, and a number"
        ):
            Tokenizer.open(write_sentencepiece(tmp_path / f"{at}.gguf", pieces))


def test_a_file_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    assert Tokenizer.open(write(tmp_path / "a.gguf", "none", ["a"], [1], lambda writer: None)) is None
