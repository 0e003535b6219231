"""A tokenizer built from `tekken.json` gives tiktoken's ids behind the special tokens; damage is refused by name."""

from __future__ import annotations

import base64
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from argosy.checkpoint.vocabulary import tekken
from argosy.errors import CheckpointError
from argosy.prompt.tokenizer import Tokenizer, has_chat_template
from tests.prompt.kimi_files import TEXT, UNMADE, ranks
from tests.prompt.test_gguf_tokenizer import MARKS, TEKKEN

NUM_SPECIAL = 40
LISTED = [
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[TOOL_CALLS]",
    "[ARGS]",
    "[THINK]",
    "[/THINK]",
    "<pad>",
]


def file_of(**changes: object) -> dict[str, Any]:
    """The contents of a tekken.json, whose vocabulary goes beyond the size that its config asks for."""
    vocab = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
        for token, rank in ranks().items()
    ]
    special = [{"rank": at, "token_str": token, "is_control": True} for at, token in enumerate(LISTED)]
    config = {
        "pattern": TEKKEN,
        "num_vocab_tokens": len(vocab) + 1,
        "default_vocab_size": len(vocab) + NUM_SPECIAL,
        "default_num_special_tokens": NUM_SPECIAL,
        "version": "v13",
    }
    beyond = {"rank": len(vocab), "token_bytes": base64.b64encode(b"zzzz").decode(), "token_str": "zzzz"}
    return {"config": config, "vocab": [*vocab, beyond], "special_tokens": special, **changes}


def write(directory: Path, content: dict[str, Any], config: dict[str, object] | None = None) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "tekken.json").write_text(json.dumps(content))
    if config is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def opened(directory: Path) -> Tokenizer:
    found = Tokenizer.open(directory)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = write(tmp_path_factory.mktemp("tekken"), file_of())
    (directory / "tokenizer.json").write_text("a file that must not be read")
    return opened(directory)


@functools.cache
def peer() -> tiktoken.Encoding:
    """The same vocabulary as mistral_common builds it."""
    return tiktoken.Encoding("tekken", pat_str=TEKKEN, mergeable_ranks=dict(ranks()), special_tokens={})


words = st.lists(st.sampled_from([*TEXT.split(), *MARKS, UNMADE, "zzzz", " ", "\n"])).map("".join)


@given(text=st.one_of(words, st.text(st.characters(exclude_categories=["Cs"]), max_size=30)))
def test_ids_are_those_of_tiktoken_behind_the_special_tokens(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids == [NUM_SPECIAL + rank for rank in peer().encode_ordinary(text)]
    assert tokenizer.decode(ids) == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


def test_special_tokens_have_the_first_ids_and_only_templates_write_them(tokenizer: Tokenizer) -> None:
    assert [tokenizer.token_text(at) for at in range(11)] == [*LISTED, "<SPECIAL_10>"]
    assert tokenizer.vocab_size == len(ranks()) + NUM_SPECIAL
    assert (tokenizer.prefix_ids, tokenizer.eos_ids, tokenizer.unk_id) == ((1,), (2,), 0)
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    assert tokenizer.special_tokens == named
    segments = [(False, "<s>[INST]"), (True, "[/INST]"), (False, "[/INST]")]
    ids = tokenizer.encode_segments(segments)
    assert ids[:2] == [1, 3]
    assert ids[-1] == 4
    assert 4 not in ids[:-1]
    assert tokenizer.decode(ids) == "[/INST]"


def test_the_files_beside_it_are_read(tmp_path: Path) -> None:
    write(
        tmp_path,
        file_of(),
        {"add_bos_token": False, "eos_token": "[/INST]", "chat_template": "{{ bos_token }}"},
    )
    assert has_chat_template(tmp_path)
    tokenizer = opened(tmp_path)
    assert (tokenizer.prefix_ids, tokenizer.eos_ids, tokenizer.bos_id) == ((), (4,), 1)
    assert tokenizer.chat_template == "{{ bos_token }}"


def test_a_file_before_version_7_lists_no_special_tokens(tmp_path: Path) -> None:
    tokenizer = opened(write(tmp_path, file_of(special_tokens=None)))
    assert tokenizer.token_text(9) == "[TOOL_CALLS]"
    assert tokenizer.token_text(20) == "<SPECIAL_20>"
    assert tokenizer.special_tokens["pad_token"] == "<pad>"


def config_with(**changes: object) -> Callable[[dict[str, Any]], None]:
    return lambda file: file["config"].update(changes)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda file: file.pop("config"), "config is 'None', expected an object"),
        (config_with(pattern="(a"), r"config.pattern is '\(a', expected a regular expression"),
        (config_with(pattern=3), "config.pattern is '3', expected a regular expression"),
        (config_with(default_vocab_size="9"), "config.default_vocab_size is '9', expected a number"),
        (
            config_with(default_num_special_tokens=True),
            "default_num_special_tokens is 'True', expected a number",
        ),
        (config_with(default_vocab_size=1 << 20), r"vocab has \d+ tokens; config asks for 1048536 beside"),
        (config_with(default_vocab_size=3), r"vocab has \d+ tokens; config asks for -37 beside"),
        (config_with(default_num_special_tokens=3), "expected a list of at most 3 tokens"),
        (lambda file: file["special_tokens"][3].update(rank=5), r"special_tokens\[3\] is .* and rank 3"),
        (lambda file: file["special_tokens"][3].update(token_str="<s>"), "special_tokens has '<s>' twice"),
        (lambda file: file["special_tokens"][3].update(token_str="a"), "special token 'a' is also in vocab"),
        (lambda file: file["vocab"][300].update(rank=7), r"vocab\[300\] is .* expected rank 300"),
        (lambda file: file["vocab"][300].update(token_bytes="!"), r"vocab\[300\] is .* in base64"),
        (
            lambda file: file["vocab"][300].update(token_bytes="YWFh" * 200),
            "expected rank 300, and 1 to 512 bytes",
        ),
        (lambda file: file["vocab"][0].update(token_bytes="YWFhYWFh"), "has no token for the byte"),
        (
            lambda file: file["vocab"][9].update(token_bytes=file["vocab"][8]["token_bytes"]),
            "gives ranks 8 and 9 to the same token",
        ),
    ],
)
def test_a_damaged_file_is_refused_by_name(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], sentence: str
) -> None:
    content = file_of()
    change(content)
    with pytest.raises(CheckpointError, match=rf"tekken\.json.*{sentence}"):
        Tokenizer.open(write(tmp_path, content))


def test_a_file_larger_than_any_vocabulary_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tekken, "_MAX_FILE_BYTES", 1000)
    with pytest.raises(CheckpointError, match=r"tekken\.json has \d+ bytes; at most 1000 are read"):
        Tokenizer.open(write(tmp_path, file_of()))
