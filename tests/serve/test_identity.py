"""Over HTTP, concurrent requests, prefix-cache hits and restarts change no token of a request.

The tests compare whole choices with log-probabilities, greedy and sampled with a seed; experts come from the drive.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from argosy import Engine
from argosy.guard.keys import KeyRing
from argosy.serve.app import make_app
from tests.cli.tiny_chat_model import write_chat_model
from tests.serve.conftest import only, serving, start

TEXT = "{} begins it, and it goes on for some time before anything is asked of anyone. "
WAYS = ({"temperature": 0}, {"temperature": 0.9, "top_p": 0.95, "seed": 7}, {"temperature": 1.3, "seed": 8})
GOES_ON = {"max_tokens": 40, "logit_bias": {"2": -100, "0": -100}}
ASKS = [
    *(
        ("/v1/chat/completions", way | {"messages": [{"role": "user", "content": TEXT.format(way)}], "n": n})
        for n, way in zip((1, 2, 1), WAYS, strict=True)
    ),
    *(("/v1/completions", way | {"prompt": TEXT.format(way)}) for way in WAYS),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("identity") / "model")


@contextmanager
def served(model: Path, **options: Any) -> Iterator[tuple[Engine, httpx.Client]]:
    settings = {"memory": "2GiB", "threads": 1, "expert_slots": 5, "chunk_tokens": 24, "max_sequences": 4}
    with Engine.open(model, **settings, grammars=True, **options) as engine, serving(engine) as service:
        running = start(make_app(only(service), KeyRing(None), block_tokens=16, max_sequences=4))
        with httpx.Client(base_url=next(running), timeout=60) as client:
            yield engine, client
        next(running, None)


def ask(client: httpx.Client, path: str, body: dict[str, Any]) -> tuple[list[Any], int]:
    """The choices, and the number of prompt tokens found in the prefix cache."""
    logprobs = {"logprobs": True, "top_logprobs": 3} if "messages" in body else {"logprobs": 3}
    answer = client.post(path, json=body | GOES_ON | logprobs).raise_for_status().json()
    assert all(one["finish_reason"] == "length" and one["logprobs"] for one in answer["choices"])
    return answer["choices"], answer["usage"]["prompt_tokens_details"]["cached_tokens"]


@pytest.fixture(scope="module")
def alone(model: Path) -> list[list[Any]]:
    """The choices of each request on a server without other requests and without prefix reuse."""
    with served(model, prefix_reuse=False) as (_, client):
        answers = [ask(client, *one) for one in ASKS]
    assert not any(num_cached for _, num_cached in answers)
    return [choices for choices, _ in answers]


def test_prefix_hits_and_a_restart_change_no_token(
    model: Path, tmp_path: Path, alone: list[list[Any]]
) -> None:
    for is_restarted in (False, True):
        with served(model, kv_dir=tmp_path / "kv") as (engine, client):
            for is_again in (False, True):
                answers = []
                for one in ASKS:
                    answers.append(ask(client, *one))
                    while engine.is_writing:  # a block evicted before it is written is in no file
                        time.sleep(0.005)
                assert [choices for choices, _ in answers] == alone
                if is_restarted or is_again:
                    assert min(num_cached for _, num_cached in answers) >= 16


def test_concurrent_requests_change_no_token(model: Path, alone: list[list[Any]]) -> None:
    is_over = threading.Event()

    def others(number: int) -> int:
        """Keep the server busy; every third client does not wait for its answer."""
        rng, num_asked = random.Random(number), 0
        with httpx.Client(base_url=url) as client:
            while not is_over.is_set():
                path, body = rng.choice(ASKS)
                text = TEXT.format(rng.choice(WAYS))[: rng.randrange(1, 60)]
                given: dict[str, Any] = {"prompt": text}
                if "messages" in body:
                    given = {"messages": [{"role": "user", "content": text}]}
                own = given | {"max_tokens": rng.randrange(1, 60), "temperature": rng.choice([0, 1.5])}
                with suppress(httpx.ReadTimeout):
                    client.post(path, json=own, timeout=0.03 if rng.random() < 0.3 else 60)
                num_asked += 1
        return num_asked

    with served(model) as (engine, client), ThreadPoolExecutor(5) as pool:
        url = client.base_url
        asked = [pool.submit(others, number) for number in range(5)]
        most_running = 0
        try:
            for _ in range(2):
                for one, expected in zip(ASKS, alone, strict=True):
                    most_running = max(most_running, engine.facts().num_running)
                    assert ask(client, *one)[0] == expected
        finally:
            is_over.set()
        assert all(one.result() > 3 for one in asked)
        assert most_running > 1
