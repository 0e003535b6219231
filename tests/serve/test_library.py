"""A server that has the whole library: by its names, from every dialect, within one budget, and never by a path."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from argosy.budget.planner import shared_bytes
from argosy.cli.commands import served_library
from argosy.cli.commands.served_library import ServedLibrary
from argosy.config import GIB, MIB, Claim
from argosy.guard.keys import KeyRing
from argosy.library import names as library_names
from argosy.serve.answer.kept_items import KeptItems
from argosy.serve.answer.service import Common
from argosy.serve.answer.work import Work
from argosy.serve.app import make_app
from argosy.serve.claims import server_claims
from argosy.serve.models.entry import Entry
from argosy.serve.models.models import Models
from tests.cli.tiny_chat_model import write_chat_model
from tests.library.caches import add_to_hub
from tests.serve.conftest import start
from tests.serve.seeing_model import write_seeing_model


@pytest.fixture(scope="module")
def model_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("files") / "model")


@pytest.fixture
def hub(tmp_path: Path, model_files: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub's cache with two models, and no other program's."""
    for name in ("HF_HOME", "OLLAMA_MODELS", "HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "ARGOSY_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / name))
    hub = tmp_path / "HF_HOME" / "hub"
    add_to_hub(hub, "Acme/One-30B", model_files)
    two = add_to_hub(hub, "Acme/Two", model_files)
    (two / "generation_config.json").write_text('{"temperature": 0.6, "top_k": 20}')
    return hub


@pytest.fixture
def server(hub: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr("argosy.serve.models.models.LIBRARY_S", 0.0)
    given = {"memory": 4 * GIB, "threads": 1, "grammars": True, "max_sequences": 4, "max_waiting": 8}
    given["sampling"] = {"top_p": 0.9}
    process_bytes = shared_bytes(None, SERVER)
    library = ServedLibrary(given, process_bytes, None)
    common = Common(ring=None, kept=KeptItems(), work=Work())
    models = Models(
        library.look, partial(Entry, common=common), common, budget_bytes=4 * GIB, process_bytes=process_bytes,
    )  # fmt: skip
    yield from start(make_app(models, KeyRing(None), block_tokens=16, max_sequences=4))
    for entry in models.loader.entries:
        entry.close()


def post(url: str, body: dict[str, Any]) -> Any:
    return httpx.post(url, json=body, timeout=60)


SERVER = (*server_claims(keeps_content=False), Claim("replay_bytes", MIB))
MESSAGES = [{"role": "user", "content": "Hello"}]


def test_a_model_shows_its_own_sampling_before_it_is_loaded_and_after(server: str) -> None:
    def shown() -> dict[str, Any]:
        models = httpx.get(f"{server}/v1/models", timeout=60).json()["data"]
        return {one["id"]: one["default_parameters"] for one in models}

    before = shown()
    two = before["Acme/Two"]
    assert (two["temperature"], two["top_k"], two["top_p"], two["min_p"]) == (0.6, 20, 0.9, 0)
    assert before["Acme/One-30B"]["temperature"] == 0.8
    body = {"model": "Acme/Two", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    assert httpx.post(f"{server}/v1/chat/completions", json=body, timeout=60).status_code == 200
    assert shown() == before
    props = httpx.get(f"{server}/props", params={"model": "Acme/Two"}, timeout=60).json()
    assert props["default_generation_settings"]["params"]["top_k"] == 20
    parameters = httpx.post(f"{server}/api/show", json={"model": "Acme/Two"}, timeout=60).json()["parameters"]
    assert [line.split() for line in parameters.splitlines()][1:3] == [
        ["temperature", "0.6"],
        ["top_k", "20"],
    ]


def test_what_a_model_takes_is_listed_before_it_is_loaded_and_how_it_thinks_once_it_was_read(
    hub: Path, server: str, tmp_path: Path
) -> None:
    add_to_hub(hub, "Acme/Seeing", write_seeing_model(tmp_path / "seeing"))

    def shown() -> tuple[list[str], str | None, str]:
        models = httpx.get(f"{server}/v1/models", timeout=60).json()["data"]
        (one,) = (model for model in models if model["id"] == "Acme/Seeing")
        return one["architecture"]["input_modalities"], one["capabilities"]["thinking"], one["state"]

    assert shown() == (["text", "image", "audio", "video"], None, "unloaded")
    assert post(f"{server}/api/show", {"model": "Acme/Seeing"}).status_code == 200
    assert shown() == (["text", "image", "audio", "video"], "none", "unloaded")


def test_a_model_is_described_under_its_name_with_its_owner(server: str) -> None:
    for path in ("Acme/Two", "Acme%2FTwo"):
        described = httpx.get(f"{server}/v1/models/{path}", timeout=60).json()
        assert (described["id"], described["default_parameters"]["top_k"]) == ("Acme/Two", 20)
    assert OpenAI(base_url=f"{server}/v1", api_key="none").models.retrieve("Acme/Two").id == "Acme/Two"
    for path in ("Acme/Three", "Acme/Two/", "Acme/Two/../One-30B"):
        answer = httpx.get(f"{server}/v1/models/{path.replace('..', '%2E%2E')}", timeout=60)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found"), path
    for path in ("/Acme/Two", "", f"Acme/{'x' * 252}"):
        answer = httpx.get(f"{server}/v1/models/{path}", timeout=60)
        assert answer.json()["error"]["message"].startswith("there is no such path"), path


def test_a_model_is_planned_in_the_budget_that_is_given(hub: Path) -> None:
    given = {"memory": 8 * GIB, "threads": 1, "max_sequences": 4, "max_waiting": 8}
    library = ServedLibrary(given, shared_bytes(None, SERVER), None)
    one, _ = library.look().offers
    assert one.make is not None
    budgets = [
        one.make(budget)[0].plan.budget_bytes for budget in (None, 4 * GIB)
    ]  # the process takes over 1
    assert budgets == [8 * GIB, 4 * GIB]


def test_every_dialect_loads_a_model_of_the_library_by_its_name(
    server: str, hub: Path, model_files: Path
) -> None:
    assert httpx.get(f"{server}/v1/engine/state").json()["models"] == []  # before anybody asked for the list
    listed = httpx.get(f"{server}/v1/models").json()["data"]
    assert [(one["id"], one["state"], one["context_length"]) for one in listed] == [
        ("Acme/One-30B", "unloaded", 256),
        ("Acme/Two", "unloaded", 256),
    ]
    tags = httpx.get(f"{server}/api/tags").json()["models"]
    assert [one["name"] for one in tags] == ["Acme/One-30B:latest", "Acme/Two:latest"]
    shown = post(f"{server}/api/show", {"model": "Acme/Two"}).json()
    assert (shown["capabilities"], "<|im_start|>" in shown["template"]) == (["completion", "tools"], True)

    library_names.add_alias("coder", "Acme/Two")
    limit = {"messages": MESSAGES, "max_tokens": 2}
    for name, whole in (("Acme/One-30B", "Acme/One-30B"), ("one-30b", "Acme/One-30B"), ("coder", "Acme/Two")):
        chat = post(f"{server}/v1/chat/completions", {"model": name, **limit})
        assert chat.status_code == 200, chat.text
        assert chat.json()["model"] == whole
        message = post(f"{server}/v1/messages", {"model": name, **limit})
        assert (message.status_code, message.json()["model"]) == (200, whole)
        line = post(
            f"{server}/api/chat",
            {"model": name, "messages": MESSAGES, "stream": False, "options": {"num_predict": 2}},
        )
        assert (line.status_code, line.json()["model"]) == (200, whole)
    assert {one["id"]: one["state"] for one in httpx.get(f"{server}/v1/models").json()["data"]} == {
        "Acme/One-30B": "ready",
        "Acme/Two": "ready",
    }
    add_to_hub(hub, "Acme/Three", model_files)  # a pull, while the server runs


def test_a_model_that_was_pulled_meanwhile_is_there(server: str, hub: Path, model_files: Path) -> None:
    assert len(httpx.get(f"{server}/v1/models").json()["data"]) == 2
    add_to_hub(hub, "Acme/Three", model_files)
    answer = post(f"{server}/v1/completions", {"model": "Acme/Three", "prompt": "x", "max_tokens": 1})
    assert answer.status_code == 200, answer.text


def test_a_path_in_a_request_is_never_opened(server: str, hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (snapshot,) = (hub / "models--Acme--Two" / "snapshots").iterdir()
    monkeypatch.chdir(snapshot.parent)
    library_names.add_alias("mine", str(snapshot))
    (snapshot.parent / "here").symlink_to(snapshot)
    names = {
        "snapshot": str(snapshot), "relative": snapshot.name, "link": "here", "config": f"{snapshot}/config.json",
        "traversal": f"../snapshots/{snapshot.name}", "alias of a path, by its path": f"{snapshot}/",
    }  # fmt: skip
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("/v1/chat/completions", {"messages": MESSAGES}),
        ("/v1/embeddings", {"input": "x"}),
        ("/api/show", {}),
        ("/api/generate", {"keep_alive": 0}),
    ]
    for (kind, name), (path, body) in product(names.items(), bodies):
        answer = post(server + path, {"model": name, **body})
        assert answer.status_code == 404, (kind, answer.text)
        assert "this server has: Acme/One-30B, Acme/Two, mine" in answer.text, kind
    # The user's own alias of a path is a name.
    answer = post(f"{server}/v1/completions", {"model": "mine", "prompt": "x", "max_tokens": 1})
    assert answer.status_code == 200, answer.text


def test_a_model_that_cannot_be_read_says_why_and_the_others_answer(hub: Path, server: str) -> None:
    (snapshot,) = (hub / "models--Acme--Two" / "snapshots").iterdir()
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").write_text("{")
    assert [one["id"] for one in httpx.get(f"{server}/v1/models").json()["data"]] == ["Acme/One-30B"]
    answer = post(f"{server}/v1/completions", {"model": "Acme/Two", "prompt": "x"})
    assert answer.status_code == 404
    assert answer.json()["error"]["message"].startswith(
        'the model "Acme/Two" cannot run: config.json is not JSON'
    )
    answer = post(f"{server}/v1/completions", {"model": "Acme/One-30B", "prompt": "x", "max_tokens": 1})
    assert answer.status_code == 200
    assert served_library.DEMO not in answer.text
