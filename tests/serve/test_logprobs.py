"""The tokens in log-probabilities have their true bytes, and together they spell the answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest

from argosy.guard.keys import KeyRing
from argosy.open.engine import Engine
from argosy.serve.answer.logprobs import Speller
from argosy.serve.app import make_app
from tests.models.tiny import qwen3_moe, write_model
from tests.prompt.test_tokenizer import BYTE_LEVEL, LLAMA, LLAMA_CONFIG, QWEN_CONFIG, UNIGRAM, WORD_PIECE
from tests.prompt.tokenizers_for_tests import byte_level_json, llama_json, unigram_json, write_tokenizer
from tests.serve.conftest import only, serving, start
from tests.serve.record import read_events

TEMPLATE = "{% for message in messages %}[{{ message.role }}] {{ message.content }} {% endfor %}[answer]"
KINDS: dict[str, tuple[Callable[[], str], dict[str, object]]] = {
    "byte": (byte_level_json, dict(QWEN_CONFIG)),
    "llama": (llama_json, dict(LLAMA_CONFIG)),
    "first": (lambda: llama_json("first"), dict(LLAMA_CONFIG)),
    "unigram": (unigram_json, dict(LLAMA_CONFIG)),
}


@pytest.fixture(scope="module", params=KINDS)
def asked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of a server whose random model has this kind of tokenizer."""
    text, config = KINDS[request.param]
    model = tmp_path_factory.mktemp("logprobs") / request.param
    write_model(model, qwen3_moe(vocab_size=640, max_position_embeddings=512), seed=3)
    write_tokenizer(Path(model), text(), {**config, "chat_template": TEMPLATE})
    with Engine.open(model, memory="2GiB", threads=1) as engine, serving(engine) as service:
        for url in start(make_app(only(service), KeyRing(None), block_tokens=16, max_sequences=8)):
            with httpx.Client(base_url=url, timeout=60) as client:
                yield client


every_seed = pytest.mark.parametrize(
    "seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.full) for seed in (2, 3))]
)
SAMPLED = {"temperature": 1.0, "max_tokens": 60, "ignore_eos": True}


def bytes_of(token: str) -> bytes:
    """The bytes of a token as Completions spells it."""
    if not token.startswith("bytes:"):
        return token.encode()
    return token.removeprefix("bytes:").encode().decode("unicode_escape").encode("latin-1")


def choice_of(asked: httpx.Client, path: str, **body: Any) -> Any:
    answer = asked.post(path, json=SAMPLED | body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


@pytest.mark.parametrize("shows_special", [False, True])
@every_seed
def test_bytes_of_all_tokens_are_the_bytes_of_the_completion(
    asked: httpx.Client, seed: int, shows_special: bool
) -> None:
    more = {"seed": seed, "skip_special_tokens": not shows_special}
    choice = choice_of(asked, "/v1/completions", prompt="How are you", logprobs=1, **more)
    scores = choice["logprobs"]
    ends = [*scores["text_offset"][1:], len(choice["text"])]
    written = b""
    for token, at, end in zip(scores["tokens"], scores["text_offset"], ends, strict=True):
        assert len(written.decode(errors="ignore")) <= at  # invalid bytes become one character of the text
        if end > at or not token.startswith("<"):  # a hidden special token takes no text
            written += bytes_of(token)
    assert written.decode(errors="replace") == choice["text"]
    assert scores["text_offset"][0] == 0


@every_seed
def test_bytes_of_all_tokens_are_the_bytes_of_the_chat(asked: httpx.Client, seed: int) -> None:
    """Except for the space that SentencePiece puts before a text: in a chat, an answer is a text of its own."""
    body = {"messages": [{"role": "user", "content": "How are you"}], "logprobs": True, "top_logprobs": 3}
    choice = choice_of(asked, "/v1/chat/completions", seed=seed, **body)
    tokens = choice["logprobs"]["content"]
    written = b"".join(bytes(token["bytes"]) for token in tokens).decode(errors="replace")
    content = choice["message"]["content"] + choice["message"].get("reasoning_content", "")
    assert written.split() == content.split()
    for token in tokens:
        for one in (token, *token["top_logprobs"]):
            is_text = bytes(one["bytes"]).decode(errors="replace").encode() == bytes(one["bytes"])
            assert one["bytes"] != list("\N{REPLACEMENT CHARACTER}".encode())
            assert one["token"].encode() == bytes(one["bytes"]) or not is_text or not one["bytes"]


def test_a_completion_keeps_the_space_between_prompt_and_answer(asked: httpx.Client) -> None:
    """With echo, each token's slice of the text equals the token, across the end of the prompt as well."""
    more = {"prompt": "The quick brown", "echo": True, "logprobs": 0, "seed": 7}
    choice = choice_of(asked, "/v1/completions", **more)
    text, scores = choice["text"], choice["logprobs"]
    assert text.startswith("The quick brown")
    assert scores["text_offset"] == sorted(scores["text_offset"])
    for (token, at), (_, after) in pairwise(zip(scores["tokens"], scores["text_offset"], strict=True)):
        if "bytes:" not in token and after > at > 0 and "\N{REPLACEMENT CHARACTER}" not in text[at:after]:
            assert text[at:after] == token


def test_streamed_tokens_and_offsets_equal_those_of_the_whole_answer(asked: httpx.Client) -> None:
    body = SAMPLED | {"prompt": "How are you", "logprobs": 2, "seed": 5}
    whole = asked.post("/v1/completions", json=body).json()["choices"][0]
    events = list(read_events(asked.post("/v1/completions", json=body | {"stream": True}).text))
    choices = [event["data"]["choices"][0] for event in events if event["data"] != "[DONE]"]
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    for name, values in whole["logprobs"].items():
        assert [value for choice in choices for value in (choice["logprobs"] or {name: []})[name]] == values


def test_a_partial_character_is_spelled_by_its_bytes() -> None:
    for tokenizer in (BYTE_LEVEL, LLAMA):
        spell = Speller(tokenizer, keep_special=False)
        *_, last = tokenizer.encode("🦑")
        assert spell.bytes_of(last) == b"\x91"
        assert spell.text_of(last) == "\\x91"
        assert spell.marked_text_of(last) == "bytes:\\x91"


def test_a_special_token_adds_bytes_only_if_the_text_shows_it() -> None:
    special = BYTE_LEVEL.control_id("<|im_start|>")
    assert special is not None
    for keep_special in (False, True):
        spell = Speller(BYTE_LEVEL, keep_special=keep_special)
        assert spell.text_of(special) == "<|im_start|>"
        assert spell.bytes_of(special) == (b"<|im_start|>" if keep_special else b"")


def test_every_sentencepiece_token_keeps_its_space() -> None:
    for tokenizer in (LLAMA, UNIGRAM):
        spell = Speller(tokenizer, keep_special=False)
        ids = tokenizer.encode("you and you")
        assert "".join(map(spell.text_of, ids)) == " you and you"


def test_a_tokenizer_without_bytes_per_token_decodes_each_token_alone() -> None:
    spell = Speller(WORD_PIECE, keep_special=False)
    assert [spell.text_of(token_id) for token_id in WORD_PIECE.encode("hello world")] == ["hello", "world"]
    assert Speller(None, keep_special=False).text_of(7) == "token_id:7"
