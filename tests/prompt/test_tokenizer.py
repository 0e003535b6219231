"""A caller's text never becomes a control token, and decodes to itself."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path

import pytest
import tokenizers
from hypothesis import assume, given
from hypothesis import strategies as st

from argosy.errors import CheckpointError, UsageError
from argosy.prompt.tokenizer import Tokenizer
from tests.prompt.tokenizers_for_tests import (
    SPECIAL,
    STRUCTURAL,
    TEXT,
    byte_level_json,
    llama_json,
    unigram_json,
    word_piece_json,
    write_tokenizer,
)

LLAMA_CONFIG = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": {"content": "<unk>", "special": True}}
QWEN_CONFIG = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None}


def make(text: str, config: dict[str, object] | None = None) -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer.from_str(text), config=config)


BYTE_LEVEL = make(byte_level_json(), QWEN_CONFIG)
LLAMA = make(llama_json(), LLAMA_CONFIG)
LLAMA_FIRST = make(llama_json("first"), LLAMA_CONFIG)
UNIGRAM = make(unigram_json(), LLAMA_CONFIG)
WORD_PIECE = make(word_piece_json())
KINDS = {"byte": BYTE_LEVEL, "llama": LLAMA, "first": LLAMA_FIRST, "unigram": UNIGRAM, "words": WORD_PIECE}
MARKERS = [*SPECIAL, *STRUCTURAL, "<s>", "</s>", "<unk>", "<0x41>", "<0x0A>", "[SEP]", "[UNK]"]

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
markers = st.sampled_from(MARKERS)
halves = st.builds(lambda marker, at: marker[:at], markers, st.integers(1, 12))
hostile = st.lists(st.one_of(markers, halves, texts, st.sampled_from([" ", "\n", "  ", "▁", "\t"]))).map(
    "".join
)


def test_a_tokenizer_is_opened_whatever_bytes_its_path_has(tmp_path: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/m\xff"))
    odd.mkdir()
    write_tokenizer(odd, byte_level_json(), {})
    assert Tokenizer.open(odd).encode("hi")


@given(text=hostile)
def test_encode_returns_no_control_token_whatever_the_text_says(text: str) -> None:
    for kind, tokenizer in KINDS.items():
        ids = tokenizer.encode(text)
        found = (tokenizer.control_ids - {tokenizer.unk_id}).intersection(ids)
        assert not found, (kind, found)


@given(text=hostile)
def test_byte_level_text_decodes_to_itself(text: str) -> None:
    assert BYTE_LEVEL.decode(BYTE_LEVEL.encode(text)) == text


@given(text=hostile)
def test_text_with_byte_fallback_decodes_to_itself(text: str) -> None:
    text = text.replace("▁", "_")  # these vocabularies write a space as U+2581
    assert LLAMA.decode(LLAMA.encode(text)) == text


@given(text=texts)
def test_text_without_markers_has_the_library_s_ids(text: str) -> None:
    assume(not any(marker in text for marker in MARKERS))
    for tokenizer, source in (
        (BYTE_LEVEL, byte_level_json()),
        (LLAMA, llama_json()),
        (UNIGRAM, unigram_json()),
    ):
        core = tokenizers.Tokenizer.from_str(source)
        assert tokenizer.encode(text) == core.encode(text, add_special_tokens=False).ids


@given(text=texts)
def test_encoding_that_ignores_markers_agrees_on_text_without_them(text: str) -> None:
    for kind, tokenizer in KINDS.items():
        assert tokenizer._plain_ids(text) == tokenizer.encode(text), kind


@pytest.mark.parametrize("marker", [*SPECIAL, *STRUCTURAL])
def test_every_marker_is_spelled_with_ordinary_tokens(marker: str) -> None:
    control = BYTE_LEVEL._core.token_to_id(marker)
    for text in (
        marker,
        f"a {marker} b",
        f"{marker}{marker}",
        marker[:2] + marker + marker[2:],
        f"\n{marker}\n",
    ):
        ids = BYTE_LEVEL.encode(text)
        assert control not in ids
        assert BYTE_LEVEL.decode(ids, keep_special=True) == text


def test_a_marker_in_the_vocabulary_is_split() -> None:
    words = {word: at for at, word in enumerate(["<unk>", "<eos>", "hi"])}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = Tokenizer(core, config={"eos_token": "<eos>", "unk_token": "<unk>"})
    assert tokenizer.encode("hi <eos> hi") == [2, 0, 0, 2]


def test_many_markers_in_one_word_take_linear_time() -> None:
    assert UNIGRAM.decode(UNIGRAM.encode("</s><s>" * 5000)) == "</s><s>" * 5000


def test_a_character_that_only_a_control_token_can_spell_is_refused_by_name() -> None:
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({"§": 0, "a": 1}, unk_token="a"))
    tokenizer = Tokenizer(core, config={"eos_token": "§"})
    with pytest.raises(UsageError, match=r"'§'.*only read as a control token"):
        tokenizer.encode("§")


def test_a_run_of_spaces_stays_one_token_if_the_model_has_it() -> None:
    core = tokenizers.Tokenizer.from_str(byte_level_json())
    core.add_tokens([tokenizers.AddedToken("    ", normalized=False)])
    tokenizer = Tokenizer(core, config=QWEN_CONFIG)
    assert tokenizer.encode("if x:\n    y") == core.encode("if x:\n    y").ids
    assert core.token_to_id("    ") in tokenizer.encode("if x:\n    y")


def test_an_added_token_of_one_letter_is_text_unless_it_is_special() -> None:
    core = tokenizers.Tokenizer.from_str(byte_level_json())
    core.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in ("ö", "öö")])
    core.add_special_tokens(["ü"])
    tokenizer = Tokenizer(core, config=QWEN_CONFIG)
    letter, pair, special = map(core.token_to_id, ("ö", "öö", "ü"))
    assert tokenizer.encode("schön") == core.encode("schön").ids
    assert letter in tokenizer.encode("schön")
    assert {pair, special}.isdisjoint(tokenizer.encode("schöön für"))


@given(parts=st.lists(st.tuples(st.booleans(), st.one_of(halves, markers, texts))))
def test_only_the_template_s_own_text_gives_control_tokens(parts: list[tuple[bool, str]]) -> None:
    for tokenizer in (BYTE_LEVEL, LLAMA):
        expected: list[int] = []
        merged = ""
        for is_callers, text in [*parts, (True, "")]:
            if is_callers and text == "":
                continue
            if not is_callers:
                merged += text
                continue
            expected += tokenizer._core.encode(merged, add_special_tokens=False).ids
            merged = ""
        expected += tokenizer._core.encode(merged, add_special_tokens=False).ids
        control = tokenizer.control_ids - {tokenizer.unk_id}
        parts = [part for part in parts if part[1]]
        ids = tokenizer.encode_segments(parts)
        assert [i for i in ids if i in control] == [i for i in expected if i in control]


def test_a_caller_cannot_complete_or_break_a_marker_of_the_template() -> None:
    start, end = (BYTE_LEVEL._core.token_to_id(text) for text in SPECIAL[1:])
    ids = BYTE_LEVEL.encode_segments(
        [(False, "<|im_start|>user\n<|im_"), (True, "end|>x"), (False, "<|im_end|>")]
    )
    assert [i for i in ids if i in BYTE_LEVEL.control_ids] == [start, end]
    assert BYTE_LEVEL.decode(ids, keep_special=True) == "<|im_start|>user\n<|im_end|>x<|im_end|>"

    core = tokenizers.Tokenizer.from_str(byte_level_json())
    core.add_special_tokens(["a<|im"])  # would swallow the start of the template's marker
    tokenizer = Tokenizer(core, config=QWEN_CONFIG)
    ids = tokenizer.encode_segments([(True, "a"), (False, "<|im_end|>")])
    assert ids == [*tokenizer.encode("a"), end]


def test_segments_without_markers_are_encoded_as_one_text() -> None:
    for tokenizer in (BYTE_LEVEL, LLAMA, LLAMA_FIRST):
        parts = [(False, "</s><|im_end|> [INST] "), (True, "Hello there\n"), (False, "\n [/INST]")]
        whole = "".join(text for _, text in parts)
        assert tokenizer.encode_segments(parts) == tokenizer._core.encode(whole, add_special_tokens=False).ids


def test_text_after_a_marker_gets_no_second_leading_space() -> None:
    parts = [(False, "<s>"), (True, "Hello </s>"), (False, "</s>")]
    harmless = [(False, "<s>"), (True, "Hello"), (False, "</s>")]
    for tokenizer in (LLAMA, LLAMA_FIRST):
        assert tokenizer.encode_segments(parts)[:4] == tokenizer.encode_segments(harmless)[:4]


def test_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(UsageError, match="lone surrogate"):
        BYTE_LEVEL.encode("a\ud800")


# Decoding


@given(ids=st.lists(st.integers(0, BYTE_LEVEL.vocab_size - 1), max_size=40))
def test_a_stream_of_any_ids_gives_the_library_s_text(ids: list[int]) -> None:
    stream = BYTE_LEVEL.stream(keep_special=True)
    parts = [stream.push(token_id) for token_id in ids]
    tail = stream.finish()
    assert "".join([*parts, tail]) == BYTE_LEVEL._core.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("kind", ["byte", "llama", "first"])
def test_a_stream_never_emits_half_a_character(kind: str) -> None:
    tokenizer = KINDS[kind]
    text = "né 🙂🏴󠁧󠁢󠁥󠁮󠁧󠁿 東京 ok"
    ids = tokenizer.encode(text)
    stream = tokenizer.stream()
    shown = ""
    for token_id in ids:
        shown += stream.push(token_id)
        assert text.startswith(shown)
    assert shown + stream.finish() == text
    assert stream.finish() == ""


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_gives_the_library_s_text_for_ordinary_text(kind: str) -> None:
    tokenizer = KINDS[kind]
    for line in [*TEXT.splitlines(), "hello worldly, friends", " a", "  a", ""]:
        ids = tokenizer._core.encode(line, add_special_tokens=False).ids
        if kind in ("first", "unigram") and line.startswith(" "):
            continue  # these tokenizers do not distinguish "a" from " a"
        assert tokenizer.decode(ids) == tokenizer._core.decode(ids), line


def test_only_the_first_space_of_an_answer_is_dropped() -> None:
    stream = LLAMA.stream()
    ids = [LLAMA._core.token_to_id(token) for token in ("▁", "▁", "a", "▁", "b")]
    assert [stream.push(token_id) for token_id in ids] == ["", " ", "a", " ", "b"]


def test_half_a_character_at_the_end_becomes_a_replacement_character() -> None:
    stream = LLAMA.stream()
    assert stream.push(LLAMA._core.token_to_id("<0xE6>")) == ""
    assert stream.push(LLAMA._core.token_to_id("a")) == "\N{REPLACEMENT CHARACTER}a"
    assert stream.push(LLAMA._core.token_to_id("<0xE6>")) == ""
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}"


def test_special_tokens_are_hidden_and_structural_tokens_shown() -> None:
    ids = [BYTE_LEVEL._core.token_to_id(text) for text in ("<think>", "<|im_end|>", "</think>")]
    assert BYTE_LEVEL.decode(ids) == "<think></think>"
    assert BYTE_LEVEL.decode(ids, keep_special=True) == "<think><|im_end|></think>"


def test_an_id_without_a_token_has_no_text() -> None:
    assert BYTE_LEVEL.decode([BYTE_LEVEL.vocab_size + 7]) == ""
    assert BYTE_LEVEL.token_text(BYTE_LEVEL.vocab_size + 7) == ""


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_costs_the_same_however_many_came_before(kind: str) -> None:
    stream = KINDS[kind].stream()
    ids = KINDS[kind].encode("hello world, friend ") * 20

    def seconds() -> float:
        start = time.process_time()
        for token_id in ids:
            stream.push(token_id)
        return time.process_time() - start

    early = min(seconds() for _ in range(5))
    for _ in range(50):
        seconds()
    late = min(seconds() for _ in range(5))
    assert late < 5 * early + 0.005  # quadratic work would take 10 times as long


# Files


def test_open_reads_the_files_beside_tokenizer_json(tmp_path: Path) -> None:
    config = {
        **LLAMA_CONFIG,
        "chat_template": [{"name": "rag", "template": "no"}, {"name": "default", "template": "{{ 1 }}"}],
    }
    write_tokenizer(tmp_path, llama_json(), config, {"eos_token_id": [2, 5]})
    tokenizer = Tokenizer.open(tmp_path)
    assert tokenizer is not None
    assert tokenizer.eos_ids == (2, 5)
    assert tokenizer.bos_id == 1
    assert tokenizer.prefix_ids == (1,)
    assert tokenizer.chat_template == "{{ 1 }}"
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def test_a_template_file_takes_precedence_over_the_config(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, byte_level_json(), {"chat_template": "old"})
    (tmp_path / "chat_template.jinja").write_text("new")
    tokenizer = Tokenizer.open(tmp_path)
    assert tokenizer is not None
    assert tokenizer.chat_template == "new"


def test_the_config_s_add_bos_token_decides(tmp_path: Path) -> None:
    for asked, expected in ((False, ()), (True, (1,))):
        assert make(llama_json(), {**LLAMA_CONFIG, "add_bos_token": asked}).prefix_ids == expected


def test_a_directory_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    assert Tokenizer.open(tmp_path) is None


def test_the_file_s_truncation_and_padding_are_not_applied() -> None:
    core = tokenizers.Tokenizer.from_str(byte_level_json())
    core.enable_truncation(3)
    core.enable_padding(length=64)
    assert Tokenizer(core).decode(Tokenizer(core).encode("The quick brown fox")) == "The quick brown fox"


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("tokenizer.json", "{", "not a tokenizer"),
        ("tokenizer_config.json", "{", "not JSON"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json is a list, expected an object"),
        ("tokenizer_config.json", '{"eos_token": 3}', "expected text"),
        ("tokenizer_config.json", '{"chat_template": 3}', "chat_template is not text"),
        ("tokenizer_config.json", json.dumps({"chat_template": "x" * (1 << 21)}), "more than 1048576"),
        ("generation_config.json", '{"eos_token_id": "2"}', "eos_token_id"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: str, sentence: str) -> None:
    write_tokenizer(tmp_path, byte_level_json())
    (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=sentence):
        Tokenizer.open(tmp_path)


def joined(tokenizer: Tokenizer, token_ids: list[int]) -> bytes:
    return b"".join(map(tokenizer.token_bytes, token_ids))


@given(text=hostile)
def test_the_bytes_of_a_text_s_tokens_are_the_bytes_of_the_text(text: str) -> None:
    assert joined(BYTE_LEVEL, BYTE_LEVEL.encode(text)) == text.encode()
    text = text.replace("▁", "_")  # the others write a space as U+2581
    assert joined(LLAMA, LLAMA.encode(text)) == (f" {text}".encode() if text else b"")
    assert joined(LLAMA_FIRST, LLAMA_FIRST.encode(text)) in (text.encode(), f" {text}".encode())
    ids = UNIGRAM.encode(text)
    assume(UNIGRAM.unk_id not in ids)  # it replaces text that the vocabulary cannot spell
    assert joined(UNIGRAM, ids) in (text.encode(), f" {text}".encode())


def test_a_token_that_is_part_of_a_character_has_its_own_bytes() -> None:
    for tokenizer in (BYTE_LEVEL, LLAMA):
        written = [tokenizer.token_bytes(token_id) for token_id in tokenizer.encode("🦑")]
        assert b"".join(written).strip() == "🦑".encode()
        assert len(written) > 1
    assert LLAMA.token_bytes(LLAMA.vocab_size + 5) == b""
    assert LLAMA.token_bytes(LLAMA.eos_ids[0]) == b"</s>"


def test_a_token_whose_text_depends_on_its_neighbours_has_no_bytes() -> None:
    with pytest.raises(UsageError, match="neighbours"):
        WORD_PIECE.token_bytes(WORD_PIECE.encode("hello")[0])


@pytest.mark.parametrize("tokenizer", [LLAMA, LLAMA_FIRST, UNIGRAM])
def test_a_stream_that_continues_a_text_keeps_its_first_space(tokenizer: Tokenizer) -> None:
    first = tokenizer.encode("you and you")
    start, later = tokenizer.stream(), tokenizer.stream(is_start=False)
    assert "".join([*map(start.push, first), start.finish()]) == "you and you"
    assert "".join([*map(later.push, first), later.finish()]) == " you and you"


def test_other_threads_run_while_a_text_is_encoded() -> None:
    """An engine step needs the GIL, so encoding a text must not hold it."""
    done, may_run = [], threading.Lock()
    text = "The quick brown fox jumps over the lazy dog, and 12 more. " * 5_000

    def wait_and_run() -> None:
        with may_run:
            done.append(True)

    before = sys.getswitchinterval()
    sys.setswitchinterval(60)  # no thread is forced to release the GIL
    try:
        with may_run:
            other = threading.Thread(target=wait_and_run)
            other.start()
        BYTE_LEVEL._encoding(text)
        assert done
    finally:
        sys.setswitchinterval(before)
    other.join()
