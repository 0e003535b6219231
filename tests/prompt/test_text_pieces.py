"""A long text encoded in pieces has the ids of the whole, and one that must be too long is refused before encoding."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, pre_tokenizers, trainers

from argosy.checkpoint.vocabulary.byte_level import WORDS, byte_level_tokenizer
from argosy.errors import PromptTooLong, UsageError
from argosy.prompt import text_pieces, tokenizer
from argosy.prompt.text_pieces import Cutter, Encode, LongestToken
from argosy.prompt.tokenizer import Tokenizer
from tests.prompt.kimi_files import TEXT as KIMI_TEXT
from tests.prompt.kimi_files import write_kimi_tokenizer
from tests.prompt.tokenizers_for_tests import (
    SPECIAL,
    STRUCTURAL,
    TEXT,
    byte_level_json,
    llama_json,
    unigram_json,
    word_piece_json,
)

CONFIG = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": {"content": "<unk>", "special": True}}


def byte_level(pre: str) -> tokenizers.Tokenizer:
    """A vocabulary trained on the words that `pre` splits; runs of spaces and of symbols are tokens too."""
    core = byte_level_tokenizer(models.BPE(), WORDS[pre])
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIAL,
        show_progress=False,
    )
    core.train_from_iterator([KIMI_TEXT, TEXT, "    x\n\n\n  y;\n\n\t\tz!!!!\n" * 3], trainer)
    core.add_tokens([AddedToken(text, normalized=False) for text in STRUCTURAL])
    return core


def made(text: str, config: dict[str, object] | None = None) -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer.from_str(text), config=config)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    kimi = Tokenizer.open(write_kimi_tokenizer(tmp_path_factory.mktemp("kimi")))
    assert kimi is not None
    return {
        **{
            pre: Tokenizer(byte_level(pre), config={"eos_token": "<|im_end|>"})
            for pre in {words: pre for pre, words in reversed(WORDS.items())}.values()
        },
        "byte level": made(byte_level_json(), {"eos_token": "<|im_end|>"}),
        "llama": made(llama_json(), CONFIG),
        "llama first": made(llama_json("first"), CONFIG),
        "unigram": made(unigram_json(), CONFIG),
        "word piece": made(word_piece_json()),
        "kimi": kimi,
    }


class CountingCutter(Cutter):
    num_characters = 0

    def pieces(self, text: str, encode: Encode) -> Iterator[tuple[int, str]]:
        for start, piece in super().pieces(text, encode):
            self.num_characters += len(piece)
            yield start, piece


@contextmanager
def small_pieces() -> Iterator[None]:
    """Make pieces a few characters long, with little text around each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_pieces, "PIECE_CHARACTERS", 12)
        patch.setattr(tokenizer, "PIECE_CHARACTERS", 12)
        patch.setattr(text_pieces, "_AROUND", 40)
        yield


ODD = (
    "'s it's don't 123456 3.14 e\u0301 \u0301 \u1112\u1161\u11ab 汉字 東京 한국 ， 。 !!! -- // _a_ ▁ a▁b aaaaaaaaaaaa"
    " \u200d 🙂 <s> </s> <unk> <0x41> [UNK]"
)
WHITE = ["x  y", "  ", "    ", "\n", "\n\n", " \n ", "\t", "\r\n", "\u00a0", "\u3000"]
words = st.sampled_from([*TEXT.split(), *KIMI_TEXT.split(), *ODD.split(), *WHITE, *SPECIAL, *STRUCTURAL])
joins = st.sampled_from(["", " ", " ", "  ", "\n", ", "])
texts = st.lists(st.tuples(words, joins), max_size=60).map(lambda parts: "".join(a + b for a, b in parts))


@settings(max_examples=150, deadline=None)
@given(text=st.one_of(texts, st.text(st.characters(exclude_categories=["Cs"]), max_size=200)))
def test_pieces_have_the_ids_of_the_whole_text_for_every_kind_of_tokenizer(
    kinds: dict[str, Tokenizer], text: str
) -> None:
    for kind, made in kinds.items():
        for encode in (made._bare_ids, made._plain_ids):
            with small_pieces():
                pieces = [encode(piece) for _, piece in made._cutter.pieces(text, encode)]
            assert [token_id for ids in pieces for token_id in ids] == encode(text), kind


@settings(max_examples=100, deadline=None)
@given(parts=st.lists(st.tuples(st.booleans(), texts), max_size=4))
def test_a_conversation_encoded_in_pieces_has_the_ids_of_the_whole(
    kinds: dict[str, Tokenizer], parts: list[tuple[bool, str]]
) -> None:
    for kind in ("byte level", "llama", "llama first", "kimi"):
        whole = kinds[kind].encode_segments(parts)
        with small_pieces():
            assert kinds[kind].encode_segments(parts) == whole, kind


def test_prose_is_cut_into_pieces_of_the_intended_length(kinds: dict[str, Tokenizer]) -> None:
    text = TEXT * 400
    for kind, made in kinds.items():
        pieces = [piece for _, piece in made._cutter.pieces(text, made._bare_ids)]
        assert len(pieces) > 5, kind
        assert max(map(len, pieces)) < 1.1 * text_pieces.PIECE_CHARACTERS, kind


def test_a_run_without_a_place_to_cut_is_refused_without_encoding(kinds: dict[str, Tokenizer]) -> None:
    for run in ("a", " ", "!", "汉"):
        with pytest.raises(UsageError, match="not certain to begin a new token"):
            kinds["qwen2"].encode(run * (text_pieces.MAX_PIECE_CHARACTERS + 1))


@pytest.mark.parametrize("pattern", [r"(?<=a)b|.", r"^\w+|.", r"\bx|.", r"\Ax|."])
def test_text_is_not_cut_if_words_depend_on_the_text_before_them(pattern: str) -> None:
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    assert Cutter(core)._separator is None


@pytest.mark.parametrize("pre", ["afmoe", "cohere2moe"])
def test_text_is_cut_between_letters_if_only_digits_look_around(pre: str) -> None:
    core = byte_level(pre)
    assert Cutter(core)._separator == ""
    text = "12,345,678 1234567. 12345a 1a\u00b2 123456 x " * 20
    with small_pieces():
        pieces = [piece for _, piece in Cutter(core).pieces(text, lambda part: text_pieces._ids(core, part))]
    assert len(pieces) > 20
    assert all(piece[-1] in "a\u00b2x" for piece in pieces[:-1])
    assert [token_id for piece in pieces for token_id in text_pieces._ids(core, piece)] == text_pieces._ids(
        core, text
    )


def test_text_is_not_cut_if_tokens_span_spaces() -> None:
    state = json.loads(llama_json())
    vocab = state["model"]["vocab"]
    vocab["▁a▁b"] = len(vocab)
    assert Cutter(tokenizers.Tokenizer.from_str(json.dumps(state)))._separator is None
    assert Cutter(tokenizers.Tokenizer.from_str(llama_json()))._separator == " "


# The fewest tokens a text can have


@settings(max_examples=150, deadline=None)
@given(text=texts)
def test_a_text_has_at_least_its_bytes_divided_by_the_longest_token_s(
    kinds: dict[str, Tokenizer], text: str
) -> None:
    known = 0
    for kind, made in kinds.items():
        longest = LongestToken.of(made._core)
        if longest is not None and longest.holds_for(text):
            known += 1
            assert len(made._core.encode(text).ids) * longest.num_bytes >= len(text.encode()), kind
            assert len(made._plain_ids(text)) * longest.num_bytes >= len(text.encode()), kind
    assert known >= 8


def test_a_tokenizer_that_drops_or_joins_text_has_no_longest_token() -> None:
    white = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    white.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    stripping = tokenizers.Tokenizer.from_str(byte_level_json())
    stripping.add_special_tokens([AddedToken("<|x|>", rstrip=True)])
    unigram = tokenizers.Tokenizer.from_str(unigram_json())
    state = json.loads(llama_json())
    del state["model"]["vocab"]["<0x41>"]
    incomplete = tokenizers.Tokenizer.from_str(json.dumps(state))
    for core in (white, stripping, unigram, incomplete):
        assert LongestToken.of(core) is None


def test_a_text_that_must_be_too_long_is_refused_before_encoding(
    kinds: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = kinds["qwen2"]

    def refuse(self: Tokenizer, text: str) -> None:
        raise AssertionError("something is encoded")

    monkeypatch.setattr(Tokenizer, "_encoding", refuse)
    with pytest.raises(PromptTooLong, match=r"at least \d+ tokens, and the context holds 101") as caught:
        made.encode("many words " * 10_000, max_tokens=100)
    assert caught.value.facts["needed"] > caught.value.facts["available"] == 101


def test_encoding_stops_when_the_limit_is_exceeded(
    kinds: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    for text in ("many words " * 10_000, "<|im_end|> words " * 10_000):  # the second has markers
        made = kinds["qwen2"]
        monkeypatch.setattr(made, "_require_possible", lambda *_: None)
        counting = CountingCutter(made._core)
        with monkeypatch.context() as patch:
            patch.setattr(made, "_cutter", counting)
            with pytest.raises(PromptTooLong, match="at least"):
                made.encode(text, max_tokens=2000)
        assert counting.num_characters < len(text) / 2


def test_a_short_text_over_the_limit_is_refused_with_its_token_count(
    kinds: dict[str, Tokenizer],
) -> None:
    text = "many words " * 100
    number = len(kinds["qwen2"].encode(text))
    with pytest.raises(PromptTooLong, match=f"the prompt has {number} tokens"):
        kinds["qwen2"].encode(text, max_tokens=number - 1)
    assert len(kinds["qwen2"].encode(text, max_tokens=number)) == number


def test_a_long_text_of_exactly_the_allowed_number_of_tokens_is_encoded(kinds: dict[str, Tokenizer]) -> None:
    text = TEXT * 100
    for kind in ("qwen2", "llama", "kimi"):
        ids = kinds[kind].encode(text)
        assert len(text) > text_pieces.PIECE_CHARACTERS
        assert kinds[kind].encode(text, max_tokens=len(ids)) == ids
        with pytest.raises(PromptTooLong):
            kinds[kind].encode(text, max_tokens=len(ids) - 1)


@settings(max_examples=60, deadline=None)
@given(text=texts, num_tokens=st.integers(0, 80))
def test_the_start_of_a_text_has_the_first_ids_of_the_whole(
    kinds: dict[str, Tokenizer], text: str, num_tokens: int
) -> None:
    for kind in ("qwen2", "llama", "llama first", "kimi"):
        with small_pieces():
            assert kinds[kind].encode_start(text, num_tokens) == kinds[kind].encode(text)[:num_tokens], kind


def test_of_a_long_text_only_the_start_is_encoded(
    kinds: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    for text in (TEXT * 1000, "<|im_end|> words " * 10_000):
        made = kinds["qwen2"]
        expected, counting = made.encode(text)[:2000], CountingCutter(made._core)
        with monkeypatch.context() as patch:
            patch.setattr(made, "_cutter", counting)
            assert made.encode_start(text, 2000) == expected
        assert counting.num_characters < len(text) / 2


def test_a_lone_surrogate_in_a_long_text_is_refused(kinds: dict[str, Tokenizer]) -> None:
    for most in (None, 10, 1 << 20):
        with pytest.raises(UsageError, match="lone surrogate"):
            kinds["qwen2"].encode("a b " * 20_000 + "\ud800", max_tokens=most)
