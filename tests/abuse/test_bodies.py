"""Hostile bodies and prompts against a real server: the right status, service for other clients, bounded memory.

`benchmarks/hostile.py` measures how much of a server's memory each of them takes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from argosy.guard.keys import KeyFile, KeyRing
from argosy.open.engine import Engine
from argosy.prompt.text_pieces import MAX_PIECE_CHARACTERS
from argosy.prompt.tokenizer import Tokenizer
from argosy.serve.app import make_app
from argosy.serve.http.gate import Gate
from argosy.serve.http.held import BODY_BYTES
from tests.abuse.hostile_bodies import ATTACKS, CHAT, SPEAKING_OF_BRACES
from tests.cli.tiny_chat_model import write_chat_model
from tests.serve.conftest import only, serving, start

JSON = {"content-type": "application/json"}
HI = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}


class Server:
    def __init__(self, gate: Gate, url: str, secrets: dict[str, str]) -> None:
        self.gate, self.url, self.secrets = gate, url, secrets

    @contextmanager
    def client(self, key: str) -> Iterator[httpx.Client]:
        headers = JSON | {"authorization": f"Bearer {self.secrets[key]}"}
        with httpx.Client(base_url=self.url, headers=headers, timeout=60) as client:
            yield client


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("bodies")
    keys = KeyFile(folder / "keys.json")
    secrets = {name: keys.add(name, scopes=("infer",))[1] for name in ("attacker", "other")}
    model = write_chat_model(folder / "model")
    with Engine.open(model, memory="2GiB", threads=1, grammars=True) as engine, serving(engine) as service:
        gate = make_app(only(service), KeyRing(keys), block_tokens=16, max_sequences=4)
        for url in start(gate):
            yield Server(gate, url, secrets)


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The length of each text that is passed to one encoding call."""
    lengths: list[int] = []
    encoding = Tokenizer._encoding

    def note(self: Tokenizer, text: str) -> Any:
        lengths.append(len(text))
        return encoding(self, text)

    monkeypatch.setattr(Tokenizer, "_encoding", note)
    return lengths


# Others of the same kind are in `make test`.
MORE = ("six chats of 2 MB", "2 MB of one letter", "Ollama: four bodies of 8 MB of {}")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.full) if name in MORE else name for name in ATTACKS]
)
def test_a_hostile_body_is_refused_within_bounds_while_another_client_is_answered(
    server: Server, pieces: list[int], name: str
) -> None:
    path, make, at_once, sentence = ATTACKS[name]
    data, answers = make(), []
    server.gate.bodies.peak_bytes = 0

    def attack() -> None:
        with server.client("attacker") as client:
            answers.append(client.post(path, content=data))

    # At most three at once, so that the test takes seconds.
    attackers = [threading.Thread(target=attack) for _ in range(min(at_once, 3))]
    for attacker in attackers:
        attacker.start()
    with server.client("other") as other:
        num_answered = 0
        while num_answered < 1 or any(attacker.is_alive() for attacker in attackers):
            assert other.post(CHAT, json=HI).status_code == 200
            assert other.get("/health").status_code == 200
            num_answered += 1
    for attacker in attackers:
        attacker.join()
    for answer in answers:
        assert answer.status_code in (400, 413, 503), answer.text
        if answer.status_code != 503:
            error = answer.json()["error"]
            assert sentence in (error if path.startswith("/api/") else error["message"])
    assert any(answer.status_code != 503 for answer in answers)
    assert server.gate.bodies.peak_bytes <= BODY_BYTES
    until = time.monotonic() + 10  # a client may have its answer before the server has freed the request
    while server.gate.bodies.num_bytes and time.monotonic() < until:
        time.sleep(0.01)
    assert server.gate.bodies.num_bytes == 0
    assert max(pieces, default=0) <= MAX_PIECE_CHARACTERS


def test_long_but_valid_bodies_are_answered(server: Server) -> None:
    parts = [{"type": "text", "text": ""}] * 4000
    tool = {
        "type": "function",
        "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}},
    }
    with server.client("other") as client:
        for body in (
            {
                "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "Hi"}]}],
                "max_tokens": 1,
            },
            HI | {"metadata": {"a": [[]] * 50_000, "b": [7] * 400_000}},
            HI | {"tools": [tool | {"function": tool["function"] | {"name": f"f{at}"}} for at in range(512)]},
        ):
            answer = client.post(CHAT, json=body)
            said = answer.text
            # A context of 256 tokens has no room for them, but they are read to their end.
            assert (
                answer.status_code == 200
                or "maximum context length" in said
                or "does not support tools" in said
            ), said
        ids = client.post("/tokenize", json={"content": "a b " * 25_000})
        assert ids.status_code == 200
        text = client.post("/detokenize", json={"tokens": ids.json()["tokens"]})
        assert text.json()["content"] == "a b " * 25_000


def test_braces_inside_a_string_are_not_counted_as_objects(server: Server) -> None:
    with server.client("other") as client:
        answer = client.post(CHAT, content=SPEAKING_OF_BRACES)
        assert "maximum context length" in answer.json()["error"]["message"]
