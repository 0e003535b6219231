"""A tokenizer built from `tiktoken.model` gives the ids of tiktoken, and damaged files are refused by name."""

from __future__ import annotations

import base64
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from argosy import Engine, SamplingParams
from argosy.checkpoint.pack import pack
from argosy.checkpoint.vocabulary import tiktoken_model
from argosy.checkpoint.vocabulary.byte_level import merges_by_rank
from argosy.errors import CheckpointError, UnsupportedModel
from argosy.model.families import open_model
from argosy.prompt.tokenizer import Tokenizer, has_chat_template
from tests.models.tiny import write_model
from tests.models.tiny_latent import kimi_k2
from tests.prompt.kimi_files import (
    NUM_RANKS,
    SPECIAL,
    TEXT,
    UNMADE,
    config_of,
    lines_of,
    peer,
    ranks,
    write_kimi_tokenizer,
)

MARKERS = [*SPECIAL.values(), f"<|reserved_token_{NUM_RANKS + 5}|>", f"<|reserved_token_{NUM_RANKS + 253}|>"]
texts = st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=30)
pieces = [*TEXT.split(), UNMADE, " ", "  ", "\n", "\r\n", "\t", "'", "二", "々", "ǅ", "\u0301"]
words = st.lists(st.sampled_from(pieces)).map("".join)
runs = st.text(st.sampled_from(["a", "b", " ", "=", "-", "月", "\n"]), max_size=60)
ordinary = st.one_of(texts, words, runs)
hostile = st.lists(st.one_of(ordinary, st.sampled_from(MARKERS))).map("".join)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    found = Tokenizer.open(write_kimi_tokenizer(tmp_path_factory.mktemp("kimi")))
    assert found is not None
    return found


@given(text=hostile)
def test_the_bytes_of_a_text_s_tokens_are_the_bytes_of_the_text(tokenizer: Tokenizer, text: str) -> None:
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))) == text.encode()


@given(text=ordinary)
def test_ids_are_those_of_tiktoken(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.encode(text) == peer().encode_ordinary(text)


def test_ids_of_a_page_are_those_of_tiktoken(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode(TEXT) == peer().encode_ordinary(TEXT)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


@given(text=hostile)
def test_text_never_becomes_a_special_token(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.control_ids.isdisjoint(ids)
    assert ids == peer().encode_ordinary(text)
    assert tokenizer.decode(ids) == text


@given(text=hostile)
def test_special_tokens_in_a_template_s_text_have_the_ids_of_tiktoken(
    tokenizer: Tokenizer, text: str
) -> None:
    assert tokenizer.encode_segments([(False, text)]) == peer().encode(text, allowed_special="all")


def test_special_and_reserved_tokens_have_the_ids_behind_the_ranks(tokenizer: Tokenizer) -> None:
    assert tokenizer.control_ids == frozenset(range(NUM_RANKS, NUM_RANKS + 256))
    assert tokenizer.vocab_size == NUM_RANKS + 256
    for at in range(256):
        spelled = SPECIAL.get(at, f"<|reserved_token_{NUM_RANKS + at}|>")
        assert tokenizer.token_text(NUM_RANKS + at) == spelled
    assert (tokenizer.bos_id, tokenizer.unk_id) == (NUM_RANKS, NUM_RANKS + 254)
    assert tokenizer.eos_ids == (NUM_RANKS + 1, NUM_RANKS + 2)
    assert tokenizer.prefix_ids == ()


def test_only_a_special_token_that_is_not_flagged_as_special_is_shown(tokenizer: Tokenizer) -> None:
    thought, end, reserved = NUM_RANKS + 22, NUM_RANKS + 2, NUM_RANKS + 5
    assert tokenizer.decode([thought, end, reserved]) == "<think>"


@pytest.mark.parametrize("seed", range(20))
def test_merges_reproduce_tiktoken_for_any_ranks(seed: int) -> None:
    """Random tokens of repeated letters, randomly ranked: some can be merged in several ways, and some in none."""
    rng = random.Random(seed)
    longer = {"".join(rng.choices("ab", k=rng.choice([2, 2, 3, 4, 5, 7]))).encode() for _ in range(25)}
    tokens = [*(bytes([byte]) for byte in range(256)), *rng.sample(sorted(longer), len(longer))]
    by_rank = {token: rank for rank, token in enumerate(tokens)}
    expected = tiktoken.Encoding("any", pat_str=r"[\s\S]+", mergeable_ranks=by_rank, special_tokens={})
    vocab = {token.decode("latin-1"): rank for token, rank in by_rank.items()}
    model = tiktoken_model.models.BPE(vocab, merges_by_rank(vocab, vocab), ignore_merges=True)
    for _ in range(200):
        text = "".join(rng.choices("ab", k=rng.randint(1, 40)))
        assert [token.id for token in model.tokenize(text)] == expected.encode_ordinary(text), text


def test_the_order_of_lines_does_not_matter(tmp_path: Path, tokenizer: Tokenizer) -> None:
    lines = lines_of(ranks())
    random.Random(3).shuffle(lines)
    found = Tokenizer.open(write_kimi_tokenizer(tmp_path, ["", *lines, ""]))
    assert found is not None
    assert found.encode(TEXT) == tokenizer.encode(TEXT)


def test_tokenizer_json_takes_precedence_over_tiktoken_model(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_kimi_tokenizer(tmp_path)
    tokenizer._core.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tiktoken.model").write_text("damaged")
    found = Tokenizer.open(tmp_path)
    assert found is not None
    assert found.encode(TEXT) == tokenizer.encode(TEXT)


def _line(at: int, text: str) -> Callable[[list[str]], None]:
    def change(lines: list[str]) -> None:
        lines[at] = text

    return change


def _without(at: int) -> Callable[[list[str]], object]:
    return lambda lines: lines.pop(at)


LONG = base64.b64encode(b"x" * 513).decode()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (_line(300, "YWI"), r"line 301 is 'YWI', expected base64, a space and a rank"),
        (_line(300, "Y?I= 300"), r"line 301 is 'Y\?I= 300', expected base64"),
        (_line(300, "YWI 300"), r"line 301 is 'YWI 300', expected base64"),
        (_line(300, " 300"), r"line 301 is ' 300', expected base64"),
        (_line(300, "YWI= -1"), r"line 301 is 'YWI= -1', expected base64"),
        (_line(300, "YWI= 3_0"), r"line 301 is 'YWI= 3_0', expected base64"),
        (_line(300, "YWI=  300"), r"line 301 is 'YWI=  300', expected base64"),
        (_line(300, "YWI= 1234567890"), r"line 301 is 'YWI= 1234567890', expected base64"),
        (_line(300, f"{LONG} 300"), r"line 301 has a token of 513 bytes; at most 512"),
        (_line(300, "eHl6enk= 299"), r"line 301 repeats rank 299"),
        (lambda lines: lines.append(lines[7]), r"repeats rank 7"),
        (_line(300, "YQ== 300"), r"gives ranks \d+ and 300 to the same token"),
        (_line(300, "eHl6enk= 9000"), rf"has {NUM_RANKS} tokens but none with rank 300; expected ranks from 0 on"),
        (_without(300), rf"has {NUM_RANKS - 1} tokens but none with rank 300"),
        (lambda lines: lines.clear(), r"has no token for the byte 0x00"),
    ],
)  # fmt: skip
def test_a_damaged_vocabulary_is_refused_with_its_line(
    tmp_path: Path, change: Callable[[list[str]], object], sentence: str
) -> None:
    lines = lines_of(ranks())
    change(lines)
    with pytest.raises(CheckpointError, match=rf"tiktoken\.model.*{sentence}"):
        Tokenizer.open(write_kimi_tokenizer(tmp_path, lines))


def test_a_vocabulary_that_lacks_a_byte_is_refused(tmp_path: Path) -> None:
    others = [token for token in ranks() if token != b"\x00"]
    lines = lines_of({token: rank for rank, token in enumerate(others)})
    with pytest.raises(CheckpointError, match=r"no token for the byte 0x00, so text that contains it"):
        Tokenizer.open(write_kimi_tokenizer(tmp_path, lines))


def test_a_file_larger_than_any_vocabulary_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiktoken_model, "_MAX_FILE_BYTES", 1000)
    with pytest.raises(CheckpointError, match=r"tiktoken\.model has \d+ bytes; at most 1000"):
        Tokenizer.open(write_kimi_tokenizer(tmp_path))


def _added(**changes: object) -> dict[str, object]:
    """A config with `changes` in added_tokens_decoder."""
    config = config_of()
    added = config["added_tokens_decoder"]
    assert isinstance(added, dict)
    return {**config, "added_tokens_decoder": {**added, **changes}}


@pytest.mark.parametrize(
    ("config", "kind", "sentence"),
    [
        (config_of(tokenizer_class="QWenTokenizer"), UnsupportedModel,
         r"tokenizer_class 'QWenTokenizer' with tiktoken\.model; supported: TikTokenTokenizer, Kimi's"),
        ({}, UnsupportedModel, r"tokenizer_class 'None' with tiktoken\.model"),
        (config_of(added_tokens_decoder=None), CheckpointError,
         r"added_tokens_decoder is 'None', expected the special tokens by id"),
        (_added(**{str(NUM_RANKS - 1): {"content": "<x>"}}), CheckpointError,
         rf"added_tokens_decoder is '{NUM_RANKS - 1}', expected ids from {NUM_RANKS} to {NUM_RANKS + 255}, after"),
        (_added(**{str(NUM_RANKS + 256): {"content": "<x>"}}), CheckpointError,
         rf"'{NUM_RANKS + 256}', expected ids from {NUM_RANKS} to"),
        (_added(**{str(NUM_RANKS): {"special": True}}), CheckpointError,
         rf"added_tokens_decoder\.{NUM_RANKS} is .*, expected an object with content"),
        (_added(**{str(NUM_RANKS): "[BOS]"}), CheckpointError,
         rf"added_tokens_decoder\.{NUM_RANKS} is '\[BOS\]'"),
        (_added(**{str(NUM_RANKS + 9): {"content": "[EOS]"}}), CheckpointError,
         r"added_tokens_decoder has '\[EOS\]' twice"),
        (_added(**{str(NUM_RANKS + 9): {"content": "a"}}), CheckpointError,
         r"special token 'a' is also a token of tiktoken\.model"),
        (_added(**{str(NUM_RANKS + 9): {"content": "<x>", "lstrip": True}}), UnsupportedModel,
         rf"added_tokens_decoder\.{NUM_RANKS + 9} sets lstrip; supported: false"),
        (config_of(eos_token="<eos>"), CheckpointError, r"eos_token is '<eos>', expected one of the special"),
        (config_of(pad_token={"content": "<p>"}), CheckpointError, r"pad_token is '<p>', expected one of the special"),
    ],
)  # fmt: skip
def test_an_inconsistent_config_is_refused_by_name(
    tmp_path: Path, config: dict[str, object], kind: type[Exception], sentence: str
) -> None:
    with pytest.raises(kind, match=sentence):
        Tokenizer.open(write_kimi_tokenizer(tmp_path, config=config))


def test_a_kimi_checkpoint_answers_a_conversation_in_place_and_from_a_pack(tmp_path: Path) -> None:
    source = tmp_path / "kimi"
    write_model(source, kimi_k2(vocab_size=NUM_RANKS + 256 + 12, max_position_embeddings=256), seed=4)
    write_kimi_tokenizer(source)
    pack(open_model(source), tmp_path / "packed", format="bf16")
    answers = []
    for path in (source, tmp_path / "packed"):
        assert has_chat_template(path)
        with Engine.open(path, memory="2GiB", threads=1) as engine:
            tokenizer = engine.tokenizer
            assert tokenizer is not None
            result = engine.generate("二零 <|im_end|>[EOS]", SamplingParams(max_tokens=6, ignore_eos=True))
            answers.append(result.token_ids)
            built = engine.prompts.build("二零 <|im_end|>[EOS]")
    assert answers[0] == answers[1]
    system = peer().encode("<|im_user|>user<|im_middle|>", allowed_special="all")
    said = peer().encode_ordinary("二零 <|im_end|>[EOS]")
    tail = peer().encode("<|im_end|><|im_assistant|>assistant<|im_middle|>", allowed_special="all")
    assert list(built.token_ids or ()) == [*system, *said, *tail]
