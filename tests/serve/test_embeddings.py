"""Embeddings, reranking and fill-in-the-middle over HTTP, on one server with keys."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from tokenizers import Tokenizer as Core

from argosy.errors import Overloaded, UnsupportedModel, UsageError
from argosy.guard.keys import KeyFile, KeyRing
from argosy.guard.limits import Limits
from argosy.open.engine import Engine
from argosy.prompt.reranking import RERANK_FORMS, Reranking
from argosy.prompt.tokenizer import Tokenizer
from argosy.serve.answer.embedding import MOST_TEXTS
from argosy.serve.answer.embedding import embed as embed_texts
from argosy.serve.answer.service import Service
from argosy.serve.app import make_app
from argosy.serve.guards.governing import Governing
from argosy.serve.guards.guarding import Guarding
from argosy.serve.http.caller import Caller
from argosy.serve.http.failures import Refused
from argosy.serve.http.held import Held, Pool
from tests.models.safetensors_file import Array
from tests.models.tiny import write_model
from tests.models.tiny_dense import qwen3
from tests.prompt.tokenizers_for_tests import CHATML, FIM, byte_level_json, filling_json, write_tokenizer
from tests.serve.conftest import alive_at_once, only, serving, start
from tests.serve.record import read_events

TEXTS = ["How are you?", "I am well, thank you; and you?", "東京の空"]


@pytest.fixture(scope="module")
def own_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    directory = tmp_path_factory.mktemp("embeddings") / "model"
    write_model(directory, qwen3(vocab_size=560, hidden_size=32, max_position_embeddings=512), seed=3)
    config: dict[str, object] = {"eos_token": "<|im_end|>", "chat_template": CHATML}
    write_tokenizer(directory, filling_json("yes", "no"), config)
    with Engine.open(directory, memory="1GiB", threads=1, context=256, max_waiting=64) as engine:
        yield engine


@pytest.fixture(scope="module")
def own_service(own_engine: Engine) -> Iterator[Service]:
    with serving(own_engine) as service:
        service.reranking = Reranking(
            RERANK_FORMS["qwen3"], own_engine.tokenizer, context_tokens=own_engine.plan.context_tokens
        )
        yield service


@pytest.fixture(scope="module")
def server(
    own_service: Service, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, dict[str, str]]]:
    keys = KeyFile(tmp_path_factory.mktemp("keys") / "keys.json")
    _, secret = keys.add("ann", tokens_per_day=100_000)
    ring = KeyRing(keys)
    app = make_app(only(own_service), ring, block_tokens=16, max_sequences=8, limits=Limits(known=ring.ids))
    for url in start(app):
        yield url, {"authorization": f"Bearer {secret}"}


@pytest.fixture
def client(server: tuple[str, dict[str, str]]) -> Iterator[httpx.Client]:
    url, headers = server
    with httpx.Client(base_url=url, headers=headers, timeout=60) as client:
        yield client


def embed(client: httpx.Client, given: Any, **more: Any) -> dict[str, Any]:
    answer = client.post("/v1/embeddings", json={"input": given} | more)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def vectors(found: dict[str, Any]) -> Array:
    return np.array([one["embedding"] for one in found["data"]], np.float32)


def message(answer: httpx.Response, status: int = 400) -> str:
    assert answer.status_code == status, answer.text
    return str(answer.json()["error"]["message"])


# ── embeddings ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_vectors_are_the_engines_in_both_encodings(client: httpx.Client, own_engine: Engine) -> None:
    assert own_engine.tokenizer is not None
    ids = [own_engine.tokenizer.encode(text) for text in TEXTS]
    found = embed(client, TEXTS)
    assert found.keys() == {"object", "data", "model", "usage"}
    assert (found["object"], found["model"]) == ("list", "tiny")
    assert [(one["object"], one["index"]) for one in found["data"]] == [("embedding", at) for at in range(3)]
    num_tokens = sum(map(len, ids))
    assert found["usage"] == {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    written = embed(client, TEXTS, encoding_format="base64")
    decoded = [np.frombuffer(base64.b64decode(one["embedding"]), "<f4") for one in written["data"]]
    np.testing.assert_array_equal(np.array(decoded), vectors(found))  # nine digits are exact
    np.testing.assert_array_equal(vectors(embed(client, ids)), vectors(found))
    np.testing.assert_array_equal(vectors(embed(client, ids[0])), vectors(found)[:1])
    np.testing.assert_array_equal(vectors(embed(client, TEXTS[1], user="ann")), vectors(found)[1:2])


def test_dimensions_shorten_a_vector(client: httpx.Client) -> None:
    whole = vectors(embed(client, TEXTS))
    short = vectors(embed(client, TEXTS, dimensions=8))
    np.testing.assert_allclose(short, whole[:, :8] / np.linalg.norm(whole[:, :8], axis=1)[:, None], rtol=1e-6)
    answer = client.post("/v1/embeddings", json={"input": "a", "dimensions": whole.shape[1] + 1})
    assert (
        message(answer)
        == f"dimensions must be from 1 to {whole.shape[1]} with this model, found {whole.shape[1] + 1}"
    )


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "input: expected a value"),
        ({"input": ""}, "input: expected"),
        ({"input": []}, "input: expected"),
        ({"input": ["a", ""]}, "input.1: expected at least 1 character, found \"\""),
        ({"input": [[1], []]}, "input.1: expected at least 1 item, found a list of 0"),
        ({"input": ["a", [1]]}, "input.1: expected a valid string, found a list of 1"),
        ({"input": [1 << 31]}, "input.0: expected less than 2147483648"),
        ({"input": [1, True]}, "input.1: expected a valid integer"),
        ({"input": 7}, "input: expected a valid string, found 7"),
        ({"input": [559, 560]}, "token id 560 is not in the vocabulary"),
        ({"input": ["a"] * (MOST_TEXTS + 1)}, "input: expected at most 2048 items"),
        ({"input": "a", "dimensions": 0}, "dimensions: expected greater than or equal to 1"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format: expected 'float' or 'base64'"),
        ({"input": "a", "truncate": "END"}, "unknown field 'truncate'"),
        ({"input": "a b " * 400}, "This model's maximum context length is 256 tokens"),
    ],
)  # fmt: skip
def test_a_body_that_is_invalid_is_refused(client: httpx.Client, body: dict[str, Any], said: str) -> None:
    assert message(client.post("/v1/embeddings", json=body)).startswith(said)


def test_one_text_that_is_too_long_ends_its_request_and_is_named(
    client: httpx.Client, own_engine: Engine
) -> None:
    answer = client.post("/v1/embeddings", json={"input": [*TEXTS * 20, "a b " * 400, *TEXTS * 20]})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "input.60"
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    require_idle(own_engine)


def test_ollamas_routes_have_the_vectors_of_openais(client: httpx.Client) -> None:
    theirs = embed(client, TEXTS)
    ours = client.post("/api/embed", json={"input": TEXTS, "keep_alive": "5m", "options": {"num_ctx": 8}})
    assert ours.headers["x-ignored-params"] == "options, keep_alive"
    assert np.array_equal(np.array(ours.json()["embeddings"], np.float32), vectors(theirs))
    assert ours.json()["prompt_eval_count"] == theirs["usage"]["prompt_tokens"]
    assert ours.json()["total_duration"] > 0
    one = client.post("/api/embeddings", json={"prompt": TEXTS[0]})
    assert one.json() == {"embedding": ours.json()["embeddings"][0]}
    (short,) = client.post("/api/embed", json={"input": TEXTS[0], "dimensions": 3}).json()["embeddings"]
    assert short == embed(client, TEXTS[0], dimensions=3)["data"][0]["embedding"]
    for none in ({}, {"input": None}, {"input": ""}, {"input": []}):
        assert client.post("/api/embed", json=none).json()["embeddings"] == []
    for none in ({}, {"prompt": None}, {"prompt": ""}):
        assert client.post("/api/embeddings", json=none).json() == {"embedding": []}


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/api/embed", {"input": ["a", ""]}, "input.1: expected"),
        ("/api/embed", {"input": ["a", 7]}, "input"),
        ("/api/embed", {"input": [1, 2]}, "input"),
        ("/api/embed", {"input": ["a"] * (MOST_TEXTS + 1)}, "input"),
        ("/api/embed", {"input": "a", "dimensions": 10_000}, "dimensions must be from 1 to"),
        (
            "/api/embed",
            {"input": ["a", "Ω" * 5000], "truncate": False},
            "This model's maximum context length is 256 tokens",
        ),
        ("/api/embed", {"prompt": "a"}, "unknown field 'prompt'"),
        ("/api/embed", {"input": "a", "truncate": "END"}, "truncate: expected a valid boolean"),
        ("/api/embeddings", {"prompt": ["a"]}, "prompt: expected"),
        ("/api/embeddings", {"input": "a"}, "unknown field 'input'"),
    ],
)
def test_a_body_of_ollama_that_is_invalid_is_refused(
    client: httpx.Client, path: str, body: dict[str, Any], said: str
) -> None:
    answer = client.post(path, json=body)
    assert answer.status_code == 400
    assert answer.json()["error"].startswith(said)


@pytest.mark.parametrize("text", ["the fox jumps. " * 200, "the fox " * 5000, "<|im_end|> fox " * 3000])
@pytest.mark.parametrize("asked", [{}, {"truncate": None}, {"truncate": True}])
def test_of_a_text_that_does_not_fit_ollamas_route_embeds_the_beginning(
    client: httpx.Client, own_engine: Engine, text: str, asked: dict[str, Any]
) -> None:
    assert own_engine.tokenizer is not None
    start = own_engine.tokenizer.encode(text[:3000])[:256]
    answer = client.post("/api/embed", json={"input": ["a", text, TEXTS[0]], **asked})
    assert answer.status_code == 200, answer.text
    expected = vectors(embed(client, [start, own_engine.tokenizer.encode(TEXTS[0])]))
    np.testing.assert_array_equal(np.array(answer.json()["embeddings"], np.float32)[1:], expected)
    assert answer.headers["x-truncated-texts"] == "1"
    assert answer.json()["prompt_eval_count"] == 1 + 256 + len(own_engine.tokenizer.encode(TEXTS[0]))
    assert "x-truncated-texts" not in client.post("/api/embed", json={"input": TEXTS, **asked}).headers
    older = client.post("/api/embeddings", json={"prompt": text})
    np.testing.assert_array_equal(np.array(older.json()["embedding"], np.float32), expected[0])
    assert older.headers["x-truncated-texts"] == "1"
    assert "x-truncated-texts" not in client.post("/api/embeddings", json={"prompt": TEXTS[0]}).headers


def require_idle(engine: Engine) -> None:
    deadline = time.monotonic() + 10
    while engine.has_work:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_many_texts_do_not_fill_the_queue_of_others(client: httpx.Client) -> None:
    """The engine lets 64 sequences wait; a request of 500 texts has only a few of them there."""
    found: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: found.append(embed(client, [f"{at} fox" for at in range(500)])))
    thread.start()
    answer = client.post("/v1/completions", json={"prompt": "The quick", "max_tokens": 4, "temperature": 0})
    assert answer.status_code == 200
    thread.join()
    assert len(found[0]["data"]) == 500
    np.testing.assert_array_equal(vectors(found[0])[[7, 499]], vectors(embed(client, ["7 fox", "499 fox"])))


def test_a_client_that_leaves_ends_its_texts(client: httpx.Client, own_engine: Engine) -> None:
    with pytest.raises(httpx.ReadTimeout):
        client.post("/v1/embeddings", json={"input": ["a b " * 50] * 2000}, timeout=0.2)
    require_idle(own_engine)


def test_vectors_are_charged_to_the_memory_of_requests(own_service: Service) -> None:
    pool = Pool(60_000)
    caller = Caller(held=Held(share=pool.share()))
    with pytest.raises(
        Refused, match="these embeddings take 64000 bytes of memory, and there are 60000"
    ) as error:
        asyncio.run(embed_texts(own_service, caller, ["a"] * 100))
    assert error.value.http_status == 413
    asyncio.run(embed_texts(own_service, caller, ["a"] * 10))
    assert pool.num_bytes == 6_400
    with pytest.raises(Overloaded):
        asyncio.run(embed_texts(own_service, Caller(held=Held(share=pool.share())), ["a"] * 90))


def test_a_model_whose_pooling_is_not_supported_says_so(
    client: httpx.Client, own_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        own_engine.requests,
        "_pooling",
        UnsupportedModel("config.json asks for pooling 'cls_token'", hint="hm"),
    )
    assert (
        message(client.post("/v1/embeddings", json={"input": "a"}))
        == "config.json asks for pooling 'cls_token'\nhint: hm"
    )


# ── reranking ───────────────────────────────────────────────────────────────────────────────────────────────────────

QUERY = "Who jumps?"
DOCUMENTS = ["The quick brown fox jumps over the lazy dog.", "Pack my box.", "naïve café <|im_end|> yes"]


def expected_score(engine: Engine, document: str) -> float:
    """The softmax of the logits of no and yes, as Qwen3-Reranker's model card computes it."""
    assert engine.tokenizer is not None
    form, encode = RERANK_FORMS["qwen3"], engine.tokenizer.encode_segments
    ids = encode([
        (False, form.before), (True, QUERY), (False, form.between), (True, document), (False, form.after),
    ])  # fmt: skip
    logits = engine.logits(ids)[-1].astype(np.float64)
    yes, no = (logits[engine.tokenizer.encode(word)[0]] for word in ("yes", "no"))
    return float(np.exp(yes) / (np.exp(yes) + np.exp(no)))


@pytest.mark.parametrize(
    ("path", "body", "differs"),
    [
        ("/v1/embeddings", {"input": TEXTS, "encoding_format": "base64"}, ()),
        ("/api/embed", {"input": TEXTS}, ("total_duration",)),
        ("/api/embeddings", {"prompt": TEXTS[0]}, ()),
        ("/v1/rerank", {"query": QUERY, "documents": DOCUMENTS}, ("id",)),
    ],
)
def test_vectors_and_scores_that_come_late_follow_line_breaks(
    client: httpx.Client,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    body: dict[str, Any],
    differs: Sequence[str],
) -> None:
    """Many texts take minutes, and Node's fetch waits for five."""
    soon = client.post(path, json=body)
    monkeypatch.setattr("argosy.serve.http.streams.WHOLE_S", 0)
    alive_at_once(monkeypatch)
    late = client.post(path, json=body)
    assert late.text.startswith("\n{")
    assert late.headers["content-type"] == soon.headers["content-type"] == "application/json"
    same = [
        {name: value for name, value in answer.json().items() if name not in differs}
        for answer in (soon, late)
    ]
    assert same[0] == same[1]


@pytest.mark.parametrize("path", ["/v1/rerank", "/rerank"])
def test_scores_are_the_probability_of_yes_over_yes_and_no(
    client: httpx.Client, own_engine: Engine, path: str
) -> None:
    expected = [expected_score(own_engine, document) for document in DOCUMENTS]
    answer = client.post(
        path, json={"query": QUERY, "documents": [DOCUMENTS[0], {"text": DOCUMENTS[1]}, DOCUMENTS[2]]}
    )
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert [one.keys() for one in found["results"]] == [{"index", "relevance_score"}] * 3
    order = sorted(range(3), key=lambda at: -expected[at])
    assert [one["index"] for one in found["results"]] == order
    for one in found["results"]:
        assert one["relevance_score"] == pytest.approx(expected[one["index"]], rel=1e-5)
    assert found["usage"]["prompt_tokens"] > 0

    best = client.post(
        path, json={"query": QUERY, "documents": DOCUMENTS, "top_n": 1, "return_documents": True}
    ).json()
    assert best["results"] == [{**found["results"][0], "document": {"text": DOCUMENTS[order[0]]}}]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"query": "a", "documents": []}, "documents: expected at least 1 item"),
        ({"query": "", "documents": ["a"]}, "query: expected"),
        ({"query": "a", "documents": [{"title": "a"}]}, "documents.0"),
        ({"query": "a", "documents": ["a"], "top_n": 0}, "top_n: expected"),
        (
            {"query": "a", "documents": ["b", "a b " * 400]},
            "This model's maximum context length is 256 tokens",
        ),
    ],
)
def test_documents_that_cannot_be_ranked_are_refused(
    client: httpx.Client, body: dict[str, Any], said: str
) -> None:
    assert message(client.post("/v1/rerank", json=body)).startswith(said)


def test_a_server_without_a_form_says_how_to_start_one(
    client: httpx.Client, own_service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_service, "reranking", None)
    said = message(client.post("/v1/rerank", json={"query": "a", "documents": ["b"]}), 404)
    assert said.startswith("this server does not rerank")
    assert "--rerank qwen3" in said


def test_a_vocabulary_without_the_two_words_cannot_rerank() -> None:
    with pytest.raises(UsageError, match="has no tokens 'yes' and 'no'"):
        Reranking(RERANK_FORMS["qwen3"], Tokenizer(Core.from_str(byte_level_json())), context_tokens=64)


# ── fill in the middle ──────────────────────────────────────────────────────────────────────────────────────────────


def test_a_suffix_makes_a_prompt_to_fill_in(client: httpx.Client, own_engine: Engine) -> None:
    assert own_engine.tokenizer is not None
    ids = own_engine.tokenizer.encode_segments([
        (False, "<|fim_prefix|>"), (True, "def add(a, b):"), (False, "<|fim_suffix|>"), (True, "return"),
        (False, "<|fim_middle|>"),
    ])  # fmt: skip
    greedy = {"max_tokens": 8, "temperature": 0, "ignore_eos": True}
    stops = [
        own_engine.tokenizer.control_id(token)
        for token in (*FIM, "<|endoftext|>", "<|im_start|>", "<|im_end|>")
    ]
    expected = client.post("/v1/completions", json={"prompt": ids, "stop_token_ids": stops, **greedy}).json()
    asked = {"prompt": "def add(a, b):", "suffix": "return", **greedy}
    found = client.post("/v1/completions", json=asked).json()
    assert found["usage"]["prompt_tokens"] == len(ids)
    assert found["choices"][0]["text"] == expected["choices"][0]["text"]
    streamed = read_events(client.post("/v1/completions", json={**asked, "stream": True}).text)
    texts = [event["data"]["choices"][0]["text"] for event in streamed if event["data"] != "[DONE]"]
    assert "".join(texts) == found["choices"][0]["text"]
    both = client.post("/v1/completions", json={**asked, "prompt": ["def add(a, b):", "x"]}).json()
    assert both["choices"][0]["text"] == found["choices"][0]["text"]


def test_a_client_of_ollama_fills_in_as_a_completion_does(client: httpx.Client) -> None:
    asked = {"prompt": "def add(a, b):", "suffix": "return"}
    theirs = client.post("/v1/completions", json={**asked, "max_tokens": 8, "temperature": 0}).json()
    options = {"num_predict": 8, "temperature": 0}
    for more in ({}, {"raw": True}, {"system": "", "images": []}):
        ours = client.post(
            "/api/generate", json={**asked, **more, "options": options, "stream": False}
        ).json()
        assert ours["response"] == theirs["choices"][0]["text"]
        assert ours["prompt_eval_count"] == theirs["usage"]["prompt_tokens"]
    streamed = client.post("/api/generate", json={**asked, "options": options}).text
    said = "".join(json.loads(line)["response"] for line in streamed.splitlines())
    assert said == theirs["choices"][0]["text"]
    at_start = client.post(
        "/api/generate", json={"suffix": "return", "options": options, "stream": False}
    ).json()
    assert at_start["eval_count"] > 0  # nothing stands before the gap: no request to load the model
    assert "insert" in client.post("/api/show", json={"model": "tiny"}).json()["capabilities"]


def test_continues_request_for_a_completion_is_answered(client: httpx.Client) -> None:
    """The body of its provider `llamastack`, which reads `choices[0].text` of every event."""
    body = {
        "prompt": "def add(a, b):\n    return ", "suffix": "\n\nadd(1, 2)", "max_tokens": 6, "temperature": 0.01,
        "top_p": None, "frequency_penalty": None, "presence_penalty": None, "stop": ["\n\n", "/src/"], "stream": True,
    }  # fmt: skip
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    events = [event["data"] for event in read_events(answer.text)]
    assert events[-1] == "[DONE]"
    assert all(isinstance(event["choices"][0]["text"], str) for event in events[:-1])


def test_a_token_of_the_form_ends_what_is_filled_in(client: httpx.Client, own_engine: Engine) -> None:
    assert own_engine.tokenizer is not None
    asked = {"prompt": "a", "suffix": "b", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    for token in ("<|file_sep|>", "<|fim_prefix|>", "<|endoftext|>"):
        bias = {str(own_engine.tokenizer.control_id(token)): 100}
        found = client.post("/v1/completions", json={**asked, "logit_bias": bias}).json()
        assert (found["choices"][0]["finish_reason"], found["choices"][0]["text"]) == ("stop", "")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"echo": True}, "a prompt with a suffix cannot be echoed"),
        ({"prompt": [1, 2]}, "a suffix needs a prompt of text, found token ids"),
        ({"prompt": [[1], [2]]}, "a suffix needs a prompt of text, found token ids"),
        ({"suffix": "a b " * 400}, "This model's maximum context length is 256 tokens"),
    ],
)
def test_a_suffix_that_cannot_be_used_is_refused(
    client: httpx.Client, more: dict[str, Any], said: str
) -> None:
    asked = {"prompt": "a", "suffix": "b", "max_tokens": 1} | more
    assert message(client.post("/v1/completions", json=asked)).startswith(said)


def test_a_model_that_cannot_fill_in_says_so_and_ignores_an_empty_suffix(url: str) -> None:
    with httpx.Client(base_url=url, timeout=60) as client:
        asked = {"prompt": "a", "max_tokens": 1, "temperature": 0}
        assert message(client.post("/v1/completions", json={**asked, "suffix": "b"})).startswith(
            "this model cannot fill in a text: its vocabulary has no tokens for that"
        )
        plain = client.post("/v1/completions", json=asked).json()
        empty = client.post("/v1/completions", json={**asked, "suffix": ""}).json()
        assert empty["choices"] == plain["choices"]
        assert empty["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"]


# llama-server's /infill

GAP = {"input_prefix": "def add(a, b):\n", "prompt": "    ", "input_suffix": "return"}
SNIPPETS = [
    {"text": "the fox " * 200, "filename": "fox.txt"},
    {"text": "x = 1\n", "filename": "x.py", "time": 7},
]


def test_infill_says_what_a_completion_with_a_suffix_says(client: httpx.Client) -> None:
    asked = {"prompt": GAP["input_prefix"] + GAP["prompt"], "suffix": GAP["input_suffix"]}
    greedy = {"temperature": 0, "ignore_eos": True}
    theirs = client.post("/v1/completions", json={**asked, **greedy, "max_tokens": 8}).json()
    ours = client.post("/infill", json={**GAP, **greedy, "n_predict": 8}).json()
    assert ours["content"] == theirs["choices"][0]["text"] != ""
    assert (ours["stop"], ours["stop_type"], ours["model"]) == (True, "limit", "tiny")
    assert (ours["tokens_predicted"], ours["tokens_evaluated"]) == (8, theirs["usage"]["prompt_tokens"])
    assert ours["tokens_cached"] == ours["tokens_predicted"] + ours["tokens_evaluated"]
    timings = ours["timings"]
    assert timings["cache_n"] + timings["prompt_n"] == ours["tokens_evaluated"]
    assert timings["predicted_n"] == 8
    assert min(timings["prompt_ms"], timings["predicted_ms"], timings["predicted_per_second"]) > 0

    events = [
        event["data"]
        for event in read_events(
            client.post("/infill", json={**GAP, **greedy, "n_predict": 8, "stream": True}).text
        )
    ]
    assert "".join(event["content"] for event in events) == ours["content"]
    assert [event["stop"] for event in events] == [False] * (len(events) - 1) + [True]
    assert {**events[-1], "content": ours["content"], "timings": timings} == ours


def test_infill_puts_snippets_before_the_gap_and_names_those_that_do_not_fit(
    client: httpx.Client, own_engine: Engine
) -> None:
    assert own_engine.tokenizer is not None
    ids = own_engine.tokenizer.encode_segments([
        (False, "<|repo_name|>"), (True, "myproject\n"), (False, "<|file_sep|>"), (True, "x.py\nx = 1\n"),
        (False, "<|file_sep|>"), (True, "filename\n"), (False, "<|fim_prefix|>"), (True, "def add(a, b):\n    "),
        (False, "<|fim_suffix|>"), (True, "return"), (False, "<|fim_middle|>"),
    ])  # fmt: skip
    options = {"n_predict": 8, "temperature": 0, "ignore_eos": True}
    stops = [
        own_engine.tokenizer.control_id(token)
        for token in (*FIM, "<|endoftext|>", "<|im_start|>", "<|im_end|>")
    ]
    expected = client.post(
        "/v1/completions",
        json={"prompt": ids, "stop_token_ids": stops, "max_tokens": 8, "temperature": 0, "ignore_eos": True},
    ).json()["choices"][0]["text"]
    found = client.post("/infill", json={**GAP, "input_extra": SNIPPETS, **options})
    assert found.json()["content"] == expected
    assert found.json()["tokens_evaluated"] == len(ids)
    assert found.headers["x-ignored-params"] == "input_extra.time, input_extra.0"


def test_infill_takes_what_editors_send_and_computes_a_prompt_ahead(client: httpx.Client) -> None:
    """The bodies of llama.vim: snippets sent ahead, then the request at the cursor."""
    ring = [{"text": "y = 2\n" * 8, "filename": "y.py", "time": 1_700_000_000.5}]
    ahead = {
        "id_slot": 0, "input_prefix": "", "input_suffix": "", "input_extra": ring, "prompt": "", "n_predict": 0,
        "temperature": 0.0, "stream": False, "samplers": [], "cache_prompt": True, "t_max_prompt_ms": 1,
        "t_max_predict_ms": 1, "response_fields": [""],
    }  # fmt: skip
    warmed = client.post("/infill", json=ahead)
    assert warmed.status_code == 200, warmed.text
    assert (warmed.json()["content"], warmed.json()["tokens_predicted"]) == ("", 0)
    asked = ahead | GAP | {
        "n_predict": 4, "stop": ["\n\n"], "n_indent": 4, "top_k": 40, "top_p": 0.9, "samplers": ["top_k", "infill"],
        "t_max_prompt_ms": 500, "t_max_predict_ms": 1000, "response_fields": ["content", "timings/prompt_n"],
    }  # fmt: skip
    found = client.post("/infill", json=asked)
    assert found.status_code == 200, found.text
    assert found.json()["timings"]["cache_n"] >= 32  # blocks of the snippets
    ignored = found.headers["x-ignored-params"].split(", ")
    assert {"samplers", "t_max_predict_ms", "response_fields", "input_extra.time"} <= set(ignored)


def test_infill_stops_at_a_word_and_at_a_token_of_the_form(client: httpx.Client, own_engine: Engine) -> None:
    assert own_engine.tokenizer is not None
    options = {"temperature": 0, "ignore_eos": True, "n_predict": 12}
    whole = client.post("/infill", json={**GAP, **options}).json()["content"]
    word = whole[len(whole) // 2 :][:2]
    found = client.post("/infill", json={**GAP, **options, "stop": word}).json()
    assert (found["stop_type"], found["stopping_word"]) == ("word", word)
    assert found["content"] == whole[: whole.index(word)]
    bias = {str(own_engine.tokenizer.control_id("<|file_sep|>")): 100}
    ended = client.post("/infill", json={**GAP, **options, "logit_bias": bias}).json()
    assert (ended["stop_type"], ended["stopping_word"], ended["content"]) == ("eos", "", "")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"input_suffix": ""}, "input_prefix: expected a value"),
        ({"input_prefix": ""}, "input_suffix: expected a value"),
        ({**GAP, "input_prefix": None}, "input_prefix: expected a valid string"),
        ({**GAP, "input_extra": [{"filename": "x"}]}, "input_extra.0.text: expected a value"),
        ({**GAP, "input_extra": [{"text": "a"}] * 257}, "input_extra: expected at most 256 items"),
        ({**GAP, "n_predict": -3}, "n_predict: expected"),
        (
            {**GAP, "mirostat": 2},
            "mirostat: expected less than or equal to 0, found 2\nhint: Argosy does not support this setting",
        ),
        ({**GAP, "input_suffix": "a b " * 400}, "This model's maximum context length is 256 tokens"),
    ],
)
def test_an_infill_that_is_invalid_is_refused(client: httpx.Client, body: dict[str, Any], said: str) -> None:
    assert message(client.post("/infill", json=body)).startswith(said)


def test_infill_gives_the_model_placeholders_and_refuses_listed_phrases(
    own_service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "words.txt").write_text("blue moon\n")
    path = tmp_path / "policy.toml"
    path.write_text(
        'default = "a"\n[policies.a]\npii-input = "redact"\ninput = ["w"]\n[checks.w]\nwords = "words.txt"\n'
    )
    seen, submit = list[str](), own_service.loop.submit

    def submitted(prompt: Any, *more: Any, **named: Any) -> Any:
        seen.append(own_service.prompts.detokenize(prompt.token_ids))
        return submit(prompt, *more, **named)

    monkeypatch.setattr(own_service.loop, "submit", submitted)
    app = make_app(
        only(own_service),
        KeyRing(None),
        block_tokens=16,
        max_sequences=8,
        governance=Governing(guarding=Guarding(path)),
    )
    body = {
        **GAP,
        "n_predict": 1,
        "input_suffix": "joe@example.com",
        "input_extra": [{"text": "ann@example.org"}],
    }
    for url in start(app):
        assert httpx.post(f"{url}/infill", json=body, timeout=60).status_code == 200
        for place in ({"input_prefix": "a blue moon"}, {"input_extra": [{"text": "a blue moon"}]}):
            assert "not allowed by the policy" in message(
                httpx.post(f"{url}/infill", json=GAP | place, timeout=60)
            )
    (prompt,) = seen
    assert "<EMAIL_1>" in prompt
    assert "<EMAIL_2>" in prompt
    assert "@" not in prompt


def test_infill_of_a_model_that_cannot_fill_in_is_refused(url: str) -> None:
    answer = httpx.post(f"{url}/infill", json=GAP)
    assert message(answer).startswith(
        "this model cannot fill in a text: its vocabulary has no tokens for that"
    )
