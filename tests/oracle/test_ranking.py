"""A tiny Qwen3 reranker and a tiny Qwen3 that embeds, over HTTP: scores and vectors of transformers, from texts on.

llama.cpp's own converter then makes a GGUF of each, which is compared with llama.cpp's ranks and embeddings.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import transformers

from argosy import Engine
from argosy.guard.keys import KeyRing
from argosy.prompt.reranking import RERANK_FORMS, Reranking
from argosy.serve.app import make_app
from tests.models.converter import LLAMA_CPP, convert_all
from tests.models.references import difference
from tests.models.safetensors_file import Array
from tests.models.tiny import write_model
from tests.models.tiny_dense import qwen3
from tests.oracle.test_peer import PEER
from tests.prompt.tokenizers_for_tests import CHATML, filling_json
from tests.serve.conftest import only, serving, start

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.usefixtures("one_quiet_thread")]
converts = pytest.mark.skipif(not LLAMA_CPP.exists() or not PEER.exists(), reason="no llama.cpp")

LARGEST_DIFFERENCE = 3e-4
QUERY = "Who jumps?"
DOCUMENTS = ["The quick brown fox jumps over the lazy dog.", "Pack my box.", "naïve café yes", "no"]
TEXTS = ["How are you?", "I am well, thank you; and you?", "東京の空", "a"]
# The prompt of Qwen3-Reranker's model card, whole.
CARD = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n<Instruct>: Given a web '
    "search query, retrieve relevant passages that answer the query\n<Query>: {query}\n<Document>: {document}<|im_end|>"
    "\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
)
SIZES: dict[str, Any] = {"vocab_size": 560, "hidden_size": 40, "max_position_embeddings": 512}


@pytest.fixture(scope="module", params=["tied", "own head"])
def reranker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose name tells llama.cpp's converter what it is."""
    directory = tmp_path_factory.mktemp("ranking") / "qwen3-reranker-tiny"
    return written(directory, qwen3(**SIZES, tie_word_embeddings=request.param == "tied"))


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer ends every text with a token, whose state is the vector, as Qwen3-Embedding's does."""
    directory = written(tmp_path_factory.mktemp("embedding") / "model", qwen3(**SIZES, num_key_value_heads=1))
    state = json.loads((directory / "tokenizer.json").read_text())
    end = {
        "id": "<|im_end|>",
        "ids": [state["model"]["vocab"].get("<|im_end|>") or id_of(state, "<|im_end|>")],
    }
    text = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<|im_end|>", "type_id": 0}}]
    state["post_processor"] = {
        "type": "TemplateProcessing", "single": text, "pair": text,
        "special_tokens": {"<|im_end|>": end | {"tokens": ["<|im_end|>"]}},
    }  # fmt: skip
    (directory / "tokenizer.json").write_text(json.dumps(state))
    modules = [{"path": "", "type": "sentence_transformers.models.Transformer"}]
    modules += [{"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]
    (directory / "modules.json").write_text(json.dumps(modules))
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_lasttoken": True}))
    return directory


def id_of(state: dict[str, Any], token: str) -> int:
    return next(one["id"] for one in state["added_tokens"] if one["content"] == token)


def written(directory: Path, config: dict[str, Any]) -> Path:
    directory.mkdir()
    write_model(directory, config | {"architectures": ["Qwen3ForCausalLM"]}, seed=17)
    (directory / "tokenizer.json").write_text(filling_json("yes", "no"), encoding="utf-8")
    tokenizer = {
        "eos_token": "<|im_end|>",
        "chat_template": CHATML,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return directory


def client_of(engine: Engine) -> Iterator[httpx.Client]:
    with serving(engine) as service:
        service.reranking = Reranking(
            RERANK_FORMS["qwen3"], engine.tokenizer, context_tokens=engine.plan.context_tokens
        )
        for url in start(make_app(only(service), KeyRing(None), block_tokens=16, max_sequences=8)):
            with httpx.Client(base_url=url, timeout=60) as client:
                yield client


@torch.no_grad()
def scores_of_card(directory: Path) -> list[float]:
    """As the model card: the softmax of the last logits of no and yes."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    words = tokenizer.convert_tokens_to_ids(["no", "yes"])
    found = []
    for document in DOCUMENTS:
        ids = tokenizer(CARD.format(query=QUERY, document=document), add_special_tokens=False).input_ids
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1, words].double()
        found.append(float(torch.softmax(logits, 0)[1]))
    return found


def prompts_of_card(directory: Path) -> list[list[int]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    texts = [CARD.format(query=QUERY, document=document) for document in DOCUMENTS]
    return [tokenizer(text, add_special_tokens=False).input_ids for text in texts]


def pooled_by_peer(path: Path, texts: list[list[int]]) -> Array:
    job, out = path.with_suffix(".json"), path.with_suffix(".npy")
    job.write_text(json.dumps({"model": str(path), "texts": texts, "pooling": -1, "out": str(out)}))
    subprocess.run(
        [PEER, Path(__file__).parents[1] / "models" / "peer_side.py", "pool", job],
        check=True,
        capture_output=True,
        timeout=300,
    )
    return np.asarray(np.load(out))


def test_scores_over_http_are_those_of_the_model_card(reranker: Path) -> None:
    expected = scores_of_card(reranker)
    with Engine.open(reranker, memory="1GiB", threads=1, context=256, kv_dtype="f32") as engine:
        for client in client_of(engine):
            body = {"query": QUERY, "documents": DOCUMENTS}
            results = client.post("/v1/rerank", json=body).raise_for_status().json()["results"]
    found = {one["index"]: one["relevance_score"] for one in results}
    assert [found[at] for at in range(len(DOCUMENTS))] == pytest.approx(expected, abs=1e-5)
    assert [one["index"] for one in results] == sorted(found, key=lambda at: -expected[at])
    assert max(expected) - min(expected) > 1e-3  # so that another prompt or token shows


@converts
def test_scores_from_a_converted_reranker_are_those_of_llama_cpp(reranker: Path) -> None:
    """The converter moves the rows of yes and no into a tensor of their own. llama.cpp keeps keys in 16 bits."""
    path = reranker.with_suffix(".gguf")
    convert_all([(reranker, path)])
    if not json.loads((reranker / "config.json").read_text())["tie_word_embeddings"]:
        with pytest.raises(Exception, match=r"only the rows of its head that score documents"):
            Engine.open(path, memory="1GiB", threads=1)
        return
    prompts = prompts_of_card(reranker)
    words = transformers.AutoTokenizer.from_pretrained(reranker).convert_tokens_to_ids(["yes", "no"])
    with Engine.open(path, memory="1GiB", threads=1, context=256) as engine:
        logits = np.array([engine.logits(prompt)[-1][words] for prompt in prompts], np.float64)
    found = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(found[:, 0], scores_of_card(reranker), atol=1e-4)
    np.testing.assert_allclose(found, pooled_by_peer(path, prompts), atol=1e-4)


def test_vectors_over_http_are_those_of_transformers(embedder: Path) -> None:
    expected = vectors_of_card(embedder)
    with Engine.open(embedder, memory="1GiB", threads=1, context=256, kv_dtype="f32") as engine:
        for client in client_of(engine):
            data = client.post("/v1/embeddings", json={"input": TEXTS}).raise_for_status().json()["data"]
    assert difference(np.array([one["embedding"] for one in data]), expected) < LARGEST_DIFFERENCE


@converts
def test_vectors_from_a_converted_file_are_those_of_llama_cpp(embedder: Path) -> None:
    path = embedder.with_suffix(".gguf")
    convert_all([(embedder, path)])
    tokenizer = transformers.AutoTokenizer.from_pretrained(embedder)
    ids = [tokenizer(text).input_ids for text in TEXTS]
    peer = pooled_by_peer(path, ids)
    with Engine.open(path, memory="1GiB", threads=1, context=256, kv_dtype="f32") as engine:
        found = engine.embed(ids)  # pooled as the file says
    assert difference(found, vectors_of_card(embedder)) < LARGEST_DIFFERENCE
    # llama.cpp keeps keys in 16 bits; the state of another token differs by more than 1e-1.
    assert difference(found, peer / np.linalg.norm(peer, axis=1, keepdims=True)) < 3e-3


@torch.no_grad()
def vectors_of_card(directory: Path) -> Array:
    """The state of the last token after the final norm, of length 1."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModel.from_pretrained(directory, dtype=torch.float32)
    states = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, -1] for text in TEXTS]
    return np.array([(one / one.norm()).numpy() for one in states])
