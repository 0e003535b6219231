"""A tokenizer built from `hy.tiktoken` gives the ids of tiktoken, as Hunyuan's own code uses it."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from argosy.checkpoint.pack_contents import _COPIED_NAMES
from argosy.errors import CheckpointError, UnsupportedModel
from argosy.prompt.tokenizer import Tokenizer, has_chat_template
from tests.prompt.kimi_files import NUM_RANKS, TEXT, lines_of, ranks

# `PAT_STR` and the special tokens of HYTokenizer in Tencent's tokenization_hy.py.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = [
    *(f"<|{name}|>" for name in ("endoftext", "startoftext", "bos", "eos", "pad")),
    *(f"<|extra_{number}|>" for number in range(205)),
]
PEER = tiktoken.Encoding(
    "HunYuan",
    pat_str=PATTERN,
    mergeable_ranks=dict(ranks()),
    special_tokens={token: NUM_RANKS + at for at, token in enumerate(SPECIAL)},
)
CONFIG: Mapping[str, object] = {
    "tokenizer_class": "HYTokenizer",
    "eos_token": "<|eos|>",
    "pad_token": "<|pad|>",
    "additional_special_tokens": ["<|startoftext|>", "<|extra_0|>"],
    "chat_template": "{% for m in messages %}<|startoftext|>{{ m.content }}<|extra_0|>{% endfor %}",
}
pieces = [*TEXT.split(), " ", "  ", "\n", "\r\n", "12345", "e\u0301", "\u1100\u1161", "'S", *SPECIAL[:7]]
texts = st.one_of(
    st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=30),
    st.lists(st.sampled_from(pieces)).map("".join),
)


def write(directory: Path, lines: list[str], **changes: object) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "hy.tiktoken").write_text("\n".join(lines) + "\n")
    (directory / "tokenizer_config.json").write_text(json.dumps({**CONFIG, **changes}))
    return directory


def opened(directory: Path) -> Tokenizer:
    found = Tokenizer.open(directory)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return opened(write(tmp_path_factory.mktemp("hunyuan"), lines_of(ranks())))


@given(text=texts)
def test_ids_are_those_of_tiktoken_for_composed_text(tokenizer: Tokenizer, text: str) -> None:
    composed = unicodedata.normalize("NFC", text)
    ids = tokenizer.encode(text)
    assert ids == PEER.encode_ordinary(composed)
    assert tokenizer.control_ids.isdisjoint(ids)
    assert tokenizer.decode(ids) == composed


@given(text=texts)
def test_special_tokens_of_a_template_have_the_ids_of_tiktoken(tokenizer: Tokenizer, text: str) -> None:
    composed = unicodedata.normalize("NFC", text)
    assert tokenizer.encode_segments([(False, text)]) == PEER.encode(composed, allowed_special="all")


def test_special_tokens_follow_the_ranks(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == NUM_RANKS + 210
    assert [tokenizer.token_text(NUM_RANKS + at) for at in range(210)] == SPECIAL
    assert tokenizer.eos_ids == (NUM_RANKS + 3,)
    assert tokenizer.decode([NUM_RANKS + 1, NUM_RANKS + 209]) == ""


def test_lines_are_counted_and_a_repeated_token_is_not(tmp_path: Path, tokenizer: Tokenizer) -> None:
    lines = [f"{line.split()[0]} {7 * at}" for at, line in enumerate(lines_of(ranks()))]
    lines.insert(300, lines[20])
    assert opened(write(tmp_path, lines)).encode(TEXT) == tokenizer.encode(TEXT)


def test_the_file_is_packed_and_has_a_template(tmp_path: Path) -> None:
    assert "hy.tiktoken" in _COPIED_NAMES
    assert has_chat_template(write(tmp_path, lines_of(ranks())))


def test_another_class_or_a_damaged_line_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"'QWenTokenizer' with hy\.tiktoken; supported: HYTokenizer"):
        Tokenizer.open(write(tmp_path / "class", lines_of(ranks()), tokenizer_class="QWenTokenizer"))
    with pytest.raises(CheckpointError, match=r"hy\.tiktoken: line 2 is 'YWI', expected base64"):
        Tokenizer.open(write(tmp_path / "line", [lines_of(ranks())[0], "YWI"]))
    with pytest.raises(
        CheckpointError, match=r"eos_token is '<.other.>', expected one of the special tokens"
    ):
        Tokenizer.open(write(tmp_path / "eos", lines_of(ranks()), eos_token="<|other|>"))
