"""A server's adapters: requests name them as MODEL:ADAPTER, and administrators load and drop them."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest

from argosy import Engine, SamplingParams
from argosy.adapters import needs, registry
from argosy.adapters.allowed import find_below
from argosy.adapters.files import AdapterFiles
from argosy.checkpoint.files import ModelFiles
from argosy.errors import CheckpointError, UsageError
from argosy.guard.keys import KeyFile, KeyRing
from argosy.serve.answer.service import Service
from argosy.serve.app import make_app
from tests.adapters.random_adapter import random_adapter
from tests.cli.tiny_chat_model import write_chat_model
from tests.serve.conftest import only, serving, start

PROMPT, NUM_NEW = "The sea is", 6
TARGETS = {"q", "k", "v", "o", "head"}
INVOCATION = (70, 71)
CHAT = [{"role": "user", "content": "Hi"}]


@dataclass
class Served:
    url: str
    engine: Engine
    service: Service
    root: Path
    blocked: threading.Event  # reading waits for it
    begun: threading.Event

    def post(self, path: str, **body: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=30)

    def load(self, name: str, path: str, **more: Any) -> httpx.Response:
        return self.post("/v1/load_lora_adapter", lora_name=name, lora_path=path, **more)

    def unload(self, name: str) -> httpx.Response:
        return self.post("/v1/unload_lora_adapter", lora_name=name)

    def say(self, model: str) -> str:
        answer = self.post(
            "/v1/completions", model=model, prompt=PROMPT, max_tokens=NUM_NEW, temperature=0, ignore_eos=True
        )
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"] == model
        text: str = answer.json()["choices"][0]["text"]
        return text

    def alone(self, adapter: str | None) -> str:
        params = SamplingParams(max_tokens=NUM_NEW, temperature=0, ignore_eos=True)
        ids = self.engine.prompts.tokenize(PROMPT)
        return self.engine.generate(ids, params, adapter=adapter).text


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Files named after a seed are adapters made in memory."""
    root = tmp_path_factory.mktemp("adapters")
    for name in ("1", "2", "bad", "slow-3", "invoked-4"):
        (root / name).touch()
    blocked, begun = threading.Event(), threading.Event()

    def open_adapter(path: str | Path, files: ModelFiles, *, columns: str = "") -> AdapterFiles:
        path = Path(path)
        if path.name == "bad":
            raise CheckpointError(f"{path} is cut off")
        if path.name.startswith("slow"):
            begun.set()
            assert blocked.wait(20)
        tokens = INVOCATION if path.name.startswith("invoked") else ()
        return random_adapter(
            files.own_config, seed=int(path.name[-1]), targets=TARGETS, invocation_tokens=tokens
        )

    patch = pytest.MonkeyPatch()
    for module in (registry, needs):
        patch.setattr(module, "open_adapter", open_adapter)
    model = write_chat_model(tmp_path_factory.mktemp("model") / "model")
    with (
        Engine.open(model, memory="2GiB", threads=1, loras={"one": root / "1"}) as engine,
        serving(engine) as service,
    ):
        service.lora_dir = root
        app = make_app(only(service), KeyRing(None), block_tokens=16, max_sequences=8)
        for url in start(app):
            yield Served(url, engine, service, root, blocked, begun)
    patch.undo()


def test_every_dialect_names_an_adapter_behind_the_model(served: Served) -> None:
    chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
    for path, body in (
        ("/v1/chat/completions", chat),
        ("/v1/messages", chat),
        ("/v1/completions", {"prompt": "Hi", "max_tokens": 1}),
        ("/v1/responses", {"input": "Hi", "max_output_tokens": 2}),
        ("/v1/embeddings", {"input": "Hi"}),
        ("/api/chat", {"messages": chat["messages"], "stream": False, "options": {"num_predict": 2}}),
        ("/api/generate", {"prompt": "Hi", "stream": False, "options": {"num_predict": 2}}),
    ):
        answer = served.post(path, model="tiny:one", **body)
        assert answer.status_code == 200, (path, answer.text)
        assert answer.json()["model"] == "tiny:one", path
        unknown = served.post(path, model="tiny:nine", **body)
        assert unknown.status_code == 404, (path, unknown.text)
        assert 'the model "tiny" has no adapter "nine"; it has: one' in json.loads(
            json.dumps(unknown.text)
        ).replace("\\", ""), path


def test_an_adapter_answers_as_it_does_alone(served: Served) -> None:
    assert served.say("tiny:one") == served.alone("one")
    assert served.say("tiny") == served.alone(None)
    assert served.alone("one") != served.alone(None)


def test_embeddings_of_an_adapter_differ(served: Served) -> None:
    base, adapted = (
        served.post("/v1/embeddings", model=model, input="Hi").json()["data"][0]["embedding"]
        for model in ("tiny", "tiny:one")
    )
    assert base != adapted


def test_models_with_adapters_are_listed(served: Served) -> None:
    listed = {one["id"]: one for one in httpx.get(f"{served.url}/v1/models").json()["data"]}
    assert list(listed) == ["tiny", "tiny:one"]
    assert "parent" not in listed["tiny"]
    assert listed["tiny:one"]["parent"] == listed["tiny:one"]["root"] == "tiny"
    assert httpx.get(f"{served.url}/v1/models/tiny:one").json()["id"] == "tiny:one"
    assert httpx.get(f"{served.url}/v1/models/tiny:nine").status_code == 404
    assert httpx.get(f"{served.url}/lora-adapters").json() == [{"id": 0, "path": "one", "scale": 1.0}]
    names = [one["name"] for one in httpx.get(f"{served.url}/api/tags").json()["models"]]
    assert names == ["tiny:latest", "tiny:one"]
    for name, parent in (("tiny", ""), ("tiny:one", "tiny:latest")):
        assert served.post("/api/show", model=name).json()["details"]["parent_model"] == parent


def test_latest_is_the_model_itself(served: Served) -> None:
    assert (
        served.post("/v1/completions", model="tiny:latest", prompt="Hi", max_tokens=1).json()["model"]
        == "tiny"
    )


def test_an_admin_loads_and_drops_adapters(served: Served) -> None:
    made = served.load("two", "2", scale=0.5)
    assert made.status_code == 200, made.text
    assert {name: made.json()[name] for name in ("id", "parent", "scale", "num_requests")} == {
        "id": "tiny:two", "parent": "tiny", "scale": 0.5, "num_requests": 0,
    }  # fmt: skip
    assert served.say("tiny:two") == served.alone("two") != served.say("tiny")
    assert served.load("two", "1").status_code == 400

    assert served.unload("two").json()["id"] == "tiny:two"
    assert served.post("/v1/completions", model="tiny:two", prompt="Hi").status_code == 404
    assert served.unload("two").status_code == 404
    assert (
        served.load("three", str(served.root / "2")).status_code == 200
    )  # an absolute path below the directory
    assert served.unload("three").status_code == 200


def test_replay_keeps_answers_of_adapters_apart(served: Served) -> None:
    base = served.service.prompts
    memory = base._memory
    assert memory is not None
    before = memory.num_turns
    body = {
        "messages": [{"role": "user", "content": "Who?"}],
        "max_tokens": 4,
        "temperature": 0,
        "ignore_eos": True,
    }
    for model in ("tiny", "tiny:one"):
        assert served.post("/v1/chat/completions", model=model, **body).status_code == 200
    keys = [key for tenant in memory._tenants.values() for key in tenant.turns]
    assert memory.num_turns - before == sum(1 for key in keys[before:])
    assert all(key.startswith(b"one") or len(key) == 32 for key in keys[before:])


@pytest.mark.parametrize(
    "path",
    [
        "../model",
        "/etc/passwd",
        "/",
        ".",
        "..",
        "missing",
        "1/../../x",
        "a\0b",
        "x" * 1024,
        "out",
        "pipe",
        "loop",
    ],
)
def test_nothing_outside_the_directory_is_loaded(served: Served, path: str) -> None:
    for name, make in (
        ("out", lambda at: at.symlink_to("/etc")),
        ("pipe", os.mkfifo),
        ("loop", lambda at: at.symlink_to(at)),
    ):
        if not os.path.lexists(served.root / name):
            make(served.root / name)  # type: ignore[operator]
    refused = served.load("x", path)
    assert refused.status_code == 404
    assert "there is no adapter" in refused.json()["error"]["message"]


def test_a_directory_with_a_link_that_leads_out_is_refused(tmp_path: Path) -> None:
    root, inside = tmp_path / "root", tmp_path / "root" / "a"
    inside.mkdir(parents=True)
    (root / "blob").touch()
    (inside / "config").symlink_to("../blob")  # as in the cache of Hugging Face
    assert find_below(root, "a") == inside
    assert find_below(root, str(inside)) == inside
    (tmp_path / "secret").touch()
    (inside / "weights").symlink_to(tmp_path / "secret")
    with pytest.raises(UsageError, match="there is no adapter 'a'"):
        find_below(root, "a")


def test_an_error_of_a_file_shows_no_path_of_the_server(served: Served) -> None:
    refused = served.load("x", "bad")
    assert refused.status_code == 400
    assert refused.json()["error"]["message"] == "bad is cut off"


@pytest.mark.parametrize("name", ["", "a b", "a:b", "../x", "a" * 65, "latest"])
def test_invalid_names_are_refused(served: Served, name: str) -> None:
    assert served.load(name, "1").status_code == 400


def test_one_adapter_is_loaded_at_a_time_and_answers_go_on(served: Served) -> None:
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(served.load("slow", "slow-3")))
    thread.start()
    try:
        assert served.begun.wait(20)
        assert served.load("other", "2").status_code == 409
        assert served.say("tiny:one") == served.alone("one")
    finally:
        served.blocked.set()
        thread.join()
    assert answers[0].status_code == 200
    assert served.unload("slow").status_code == 200


def test_many_loads_and_drops_under_load_leave_nothing(served: Served) -> None:
    wanted = {name: served.say(name) for name in ("tiny", "tiny:one")}
    wrong: list[str] = []

    def ask(model: str) -> None:
        wrong.extend(model for _ in range(6) if served.say(model) != wanted[model])

    threads = [threading.Thread(target=ask, args=[model]) for model in wanted]
    for thread in threads:
        thread.start()
    for _ in range(20):
        assert served.load("more", "2").status_code == 200
        assert served.unload("more").status_code == 200
    for thread in threads:
        thread.join()
    assert wrong == []
    adapters = served.engine.requests.adapters
    assert adapters is not None
    assert list(adapters._named) == ["one"]
    assert adapters._leaving == []


def test_only_administrators_load(served: Served, tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "keys.json")
    _, secret = file.add("guest", scopes=["infer"])
    app = make_app(only(served.service), KeyRing(file), block_tokens=16, max_sequences=8)
    for url in start(app):
        for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
            body = {"lora_name": "one", "lora_path": "1"} if "un" not in path else {"lora_name": "one"}
            headers = {"authorization": f"Bearer {secret}"}
            assert httpx.post(url + path, json=body, headers=headers).status_code == 403
            assert httpx.post(url + path, json=body).status_code == 401
    assert [one.name for one in served.engine.adapters] == ["one"]


def test_a_server_without_the_option_loads_nothing(served: Served) -> None:
    served.service.lora_dir = None
    try:
        refused = served.load("x", "1")
    finally:
        served.service.lora_dir = served.root
    assert refused.status_code == 409
    assert "loads no adapters on request" in refused.json()["error"]["message"]


def test_a_prompt_that_does_not_invoke_its_adapter_says_so(served: Served) -> None:
    assert served.load("act", "invoked-4").status_code == 200
    for prompt, model, said in (
        ([65, 66, 67], "tiny:act", "act"),
        ([65, 70, 71], "tiny:act", None),
        ([[65, 70, 71], [65, 71, 70]], "tiny:act", "act"),
        ([65, 66, 67], "tiny", None),
        ([65, 66, 67], "tiny:one", None),
    ):
        for stream in (False, True):
            answer = served.post(
                "/v1/completions", model=model, prompt=prompt, max_tokens=1, temperature=0, stream=stream
            )
            assert answer.status_code == 200, answer.text
            assert answer.headers.get("x-unused-adapter") == said
    assert served.unload("act").status_code == 200


def test_bodies_and_statuses_are_those_of_vllm(served: Served) -> None:
    body = {"lora_name": "v", "lora_path": "1", "load_inplace": False, "is_3d_lora_weight": False}
    first = served.post("/v1/load_lora_adapter", **body)
    assert first.status_code == 200
    said = served.say("tiny:v")
    again = served.post("/v1/load_lora_adapter", **body)
    assert again.status_code == 400
    assert "there is already an adapter v" in again.text

    replaced = served.post("/v1/load_lora_adapter", **body | {"lora_path": "2", "load_inplace": True})
    assert replaced.status_code == 200, replaced.text
    assert served.say("tiny:v") == served.alone("v") != said
    for missing, status in (
        ({"lora_path": "none"}, 404), ({"lora_path": "bad", "load_inplace": True}, 400), ({"lora_path": ""}, 400),
        ({"lora_name": ""}, 400), ({"lora_path": None}, 400), ({"lora_name": None}, 400),
    ):  # fmt: skip
        assert served.post("/v1/load_lora_adapter", **body | missing).status_code == status, missing
    assert served.say("tiny:v") == served.alone("v")  # a file that is refused replaces nothing
    adapters = served.engine.requests.adapters
    assert adapters is not None
    assert adapters._leaving == []
    assert served.post("/v1/unload_lora_adapter", lora_name="v", lora_int_id=3).status_code == 200
    assert served.post("/v1/unload_lora_adapter", lora_name="v", lora_int_id=None).status_code == 404
    assert served.post("/v1/unload_lora_adapter", lora_int_id=3).status_code == 400


def test_clients_of_openai_and_anthropic_name_adapters(served: Served) -> None:
    messages: Any = [{"role": "user", "content": "Hi"}]
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        assert [one.id for one in client.models.list()] == ["tiny", "tiny:one"]
        said = client.completions.create(
            model="tiny:one",
            prompt=PROMPT,
            max_tokens=NUM_NEW,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
        assert said.choices[0].text == served.alone("one")
        whole = client.chat.completions.create(
            model="tiny:one", messages=messages, max_tokens=4, temperature=0
        )
        parts = client.chat.completions.create(
            model="tiny:one", messages=messages, max_tokens=4, temperature=0, stream=True
        )
        text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
        assert text == whole.choices[0].message.content
        assert client.responses.create(model="tiny:one", input="Hi", max_output_tokens=2).model == "tiny:one"
        for stream in (False, True):
            with pytest.raises(openai.NotFoundError) as refused:
                client.chat.completions.create(model="tiny:nine", messages=messages, stream=stream)
            assert refused.value.code == "model_not_found"
    with anthropic.Anthropic(base_url=served.url, api_key="none", max_retries=0) as other:
        answer = other.messages.create(model="tiny:one", messages=messages, max_tokens=3)
        assert answer.model == "tiny:one"
        with other.messages.stream(model="tiny:one", messages=messages, max_tokens=3) as stream_of:
            assert stream_of.get_final_message().model == "tiny:one"
        with pytest.raises(anthropic.NotFoundError):
            other.messages.create(model="tiny:nine", messages=messages, max_tokens=3)


@pytest.mark.parametrize("name", ["x" * 10_000, "a\0b", "a\nb", "\u202eb", "one/..", None, 3, ["one"], {}])
def test_odd_names_are_refused_everywhere_and_change_nothing(served: Served, name: Any) -> None:
    assert served.post("/v1/load_lora_adapter", lora_name=name, lora_path="1").status_code == 400
    assert served.post("/v1/unload_lora_adapter", lora_name=name).status_code == 400
    if isinstance(name, str):
        answer = served.post("/v1/completions", model=f"tiny:{name}", prompt="Hi", max_tokens=1)
        assert answer.status_code in (400, 404)
        assert len(answer.content) < 2000
    assert [one.name for one in served.engine.adapters] == ["one"]


def test_adapters_by_number_are_refused_with_what_to_do(served: Served) -> None:
    for path, more in (("/v1/completions", {"prompt": "Hi"}), ("/v1/chat/completions", {"messages": CHAT})):
        body: dict[str, Any] = {"model": "tiny:one", "max_tokens": 1, **more}
        assert served.post(path, **body, lora=[]).status_code == 200
        refused = served.post(path, **body, lora=[{"id": 0, "scale": 0.5}])
        assert refused.status_code == 400
        error = refused.json()["error"]
        assert error["param"] == "lora"
        assert "`model` names the adapter as MODEL:ADAPTER" in error["message"]
