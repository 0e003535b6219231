"""Continue's adapter for autocompletion fills in a text, with a model that was trained for it."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from argosy.guard.keys import KeyRing
from argosy.open.engine import Engine
from argosy.serve.app import make_app
from tests.clients.test_ai_sdk import converse
from tests.models.tiny import qwen3_moe, write_model
from tests.prompt.tokenizers_for_tests import CHATML, filling_json, write_tokenizer
from tests.serve.conftest import only, serving, start


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory = tmp_path_factory.mktemp("continue") / "tiny"
    write_model(directory, qwen3_moe(vocab_size=560, max_position_embeddings=512), seed=3)
    write_tokenizer(directory, filling_json(), {"eos_token": "<|im_end|>", "chat_template": CHATML})
    with Engine.open(directory, memory="1GiB", threads=1) as engine, serving(engine) as service:
        yield from start(make_app(only(service), KeyRing(None), block_tokens=16, max_sequences=8))


def test_an_autocompletion_is_the_text_between_prompt_and_suffix(url: str) -> None:
    found = converse("continue.mjs", url, package="@continuedev/openai-adapters")
    asked = {
        "prompt": "def add(a, b):\n    return ",
        "suffix": "\n\nadd(1, 2)",
        "temperature": 0,
        "max_tokens": 12,
    }
    (choice,) = httpx.post(f"{url}/v1/completions", json=asked, timeout=60).json()["choices"]
    assert "".join(found["parts"]) == choice["text"] != ""
    without = httpx.post(f"{url}/v1/completions", json={**asked, "suffix": None}, timeout=60).json()
    assert without["choices"][0]["text"] != choice["text"]
    assert found["stopped"] == choice["text"].partition(found["parts"][2])[0]
