"""A preset is a model of a server under another name: what it fills in, and what it cannot escape."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import pytest

from argosy.cli.commands.served_library import ServedPresets
from argosy.config import Preset, SamplingParams
from argosy.guard.keys import KeyFile, KeyRing
from argosy.library.names import Named
from argosy.serve.answer.service import Service
from argosy.serve.app import make_app
from argosy.serve.guards.governing import Governing
from argosy.serve.guards.guarding import Guarding
from argosy.serve.http.caller import Caller, Watch
from tests.serve.conftest import only, start

POLICY = """
default = "plain"
[policies.plain]
input = ["secrets"]
[checks.secrets]
words = "secrets.txt"
"""
PATHS = {
    "chat": "/v1/chat/completions", "completions": "/v1/completions", "responses": "/v1/responses",
    "messages": "/v1/messages", "ollama": "/api/chat", "generate": "/api/generate",
}  # fmt: skip
HELLO = [{"role": "user", "content": "hello"}]


@dataclass
class Rig:
    """A server with one model, `tiny`, and what its engine was asked for."""

    client: httpx.Client
    admin: dict[str, str]
    folder: Path
    asked: list[tuple[str, SamplingParams]]

    def write(self, name: str, text: str, model: str = "/models/tiny") -> None:
        (self.folder / f"{name}.toml").write_text(f"model = {json.dumps(model)}\n{text}")

    def ask(self, name: str | None, dialect: str = "chat", **more: Any) -> httpx.Response:
        said: dict[str, Any] = {"messages": HELLO}
        if dialect in ("completions", "generate"):
            said = {"prompt": "hello"}
        elif dialect == "responses":
            said = {"input": "hello"}
        elif dialect == "messages":
            said |= {"max_tokens": 2}
        if dialect in ("ollama", "generate"):
            said["stream"] = False
        named = {} if name is None else {"model": name}
        return self.client.post(PATHS[dialect], json={**said, **named, **more}, headers=self.admin)

    def params(self, name: str | None, dialect: str = "chat", **more: Any) -> SamplingParams:
        answer = self.ask(name, dialect, **more)
        assert answer.status_code == 200, answer.text
        return self.asked[-1][1]

    def prompt(self, name: str, dialect: str = "chat", **more: Any) -> str:
        assert self.ask(name, dialect, **more).status_code == 200
        return self.asked[-1][0]


@pytest.fixture
def rig(service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "data" / "argosy" / "presets"
    folder.mkdir(parents=True)
    keys = KeyFile(tmp_path / "keys.json")
    _, secret = keys.add("boss", scopes=("admin",))
    (tmp_path / "policy.toml").write_text(POLICY)
    (tmp_path / "secrets.txt").write_text("xyzzy\n")
    asked: list[tuple[str, SamplingParams]] = []
    submit = service.loop.submit

    def noted(prompt: Any, params: Any, *args: Any, **more: Any) -> Any:
        asked.append((service.tokenizer.decode(prompt.token_ids, keep_special=True), params))  # type: ignore[union-attr]
        return submit(prompt, params, *args, **more)

    monkeypatch.setattr(service.loop, "submit", noted)
    presets = ServedPresets({"tiny": Named("tiny", Path("/models/tiny"), "tiny")})
    presets.__dict__["_own_ids"] = {"/models/tiny": "tiny"}
    app = make_app(
        only(service, presets=presets),
        KeyRing(keys),
        block_tokens=16,
        max_sequences=8,
        governance=Governing(guarding=Guarding(tmp_path / "policy.toml")),
    )
    admin = {"authorization": f"Bearer {secret}"}
    for url in start(app):
        with httpx.Client(base_url=url, timeout=60) as client:
            yield Rig(client, admin, folder, asked)


@pytest.mark.parametrize("dialect", PATHS)
def test_every_dialect_answers_under_the_name_of_a_preset(rig: Rig, dialect: str) -> None:
    rig.write("brief", "top-k = 7\nmax-tokens = 2\nseed = 5\nstop = ['zzz']\n")
    answer = rig.ask("brief", dialect)
    assert (answer.status_code, answer.json()["model"]) == (200, "brief"), answer.text
    _, params = rig.asked[-1]
    assert (params.top_k, params.seed, params.stop) == (7, 5, ("zzz",))
    assert "top_p" in params.left_to_model  # the operator's, or the checkpoint's


def test_the_request_goes_before_the_preset_and_the_preset_before_the_rest(rig: Rig) -> None:
    rig.write("brief", "temperature = 0.5\nmax-tokens = 3\nseed = 5\nstop = ['zzz']\n")
    params = rig.params("brief", temperature=0, seed=0, stop=["a"], max_tokens=2)
    assert (params.temperature, params.seed, params.stop, params.max_tokens) == (0, 0, ("a",), 2)
    params = rig.params("brief")
    assert (params.temperature, params.seed, params.stop, params.max_tokens) == (0.5, 5, ("zzz",), 3)
    assert rig.params("brief", max_tokens=-1, stop=["e"]).max_tokens not in (None, 3)  # to the context's end
    assert rig.params("brief", seed=-1).seed not in (None, 5)  # a random one
    assert rig.params("brief", "ollama", options={"seed": -1}).seed not in (None, 5)
    assert "temperature" in rig.params("tiny", max_tokens=2).left_to_model


def test_a_system_message_of_the_request_replaces_the_presets(rig: Rig) -> None:
    rig.write(
        "brief",
        "system = 'from preset'\nmax-tokens = 2\n[[message]]\nrole = 'user'\ncontent = 'example one'\n"
        "[[message]]\nrole = 'assistant'\ncontent = 'example two'\n",
    )
    for dialect in ("chat", "responses", "messages", "ollama", "generate"):
        said = rig.prompt("brief", dialect)
        places = [said.find(text) for text in ("from preset", "example one", "example two", "hello")]
        assert -1 < places[0] < places[1] < places[2] < places[3], (dialect, said)
    own = [{"role": "system", "content": "from request"}, *HELLO]
    for dialect, more in (
        ("chat", {"messages": own}), ("responses", {"instructions": "from request"}),
        ("messages", {"system": "from request"}), ("ollama", {"messages": own}),
        ("generate", {"system": "from request"}),
    ):  # fmt: skip
        said = rig.prompt("brief", dialect, **more)
        assert "from preset" not in said
        assert -1 < said.find("from request") < said.find("example one") < said.find("hello"), (dialect, said)


def test_a_conversation_is_counted_with_what_the_preset_says(rig: Rig) -> None:
    rig.write("brief", f"system = '{'from preset ' * 10}'\n")
    counts = []
    for name in ("tiny", "brief"):
        body = {"model": name, "messages": HELLO}
        counted = rig.client.post("/v1/messages/count_tokens", json=body, headers=rig.admin)
        assert counted.status_code == 200, counted.text
        counts.append(counted.json()["input_tokens"])
    assert counts[0] < counts[1]


def test_a_context_limits_prompt_and_answer_and_makes_none_larger(rig: Rig) -> None:
    rig.write("small", "context = 60\n")
    rig.write("large", "context = 1000000\n")
    answer = rig.ask("small", ignore_eos=True)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["total_tokens"] == 60
    assert answer.json()["choices"][0]["finish_reason"] == "length"
    long = [{"role": "user", "content": "word " * 60}]
    for dialect in ("chat", "messages", "ollama"):
        refused = rig.ask("small", dialect, messages=long)
        assert refused.status_code == 400, dialect
        assert "59" in refused.text or "60" in refused.text, refused.text
    facts = {one["id"]: one for one in rig.client.get("/v1/models", headers=rig.admin).json()["data"]}
    assert facts["small"]["context_length"] == 60
    assert facts["large"]["context_length"] == facts["tiny"]["context_length"]


def test_presets_are_listed_with_their_model_and_defaults(rig: Rig) -> None:
    rig.write("brief", "temperature = 0.25\nsystem = 'Be brief.'\n")
    rig.write("other", "", model="Qwen/elsewhere")  # the server does not have its model
    rig.write("tiny", "temperature = 1\n")  # the name of a model always means the model
    rig.write("broken", "temprature = 1\n")
    data = rig.client.get("/v1/models", headers=rig.admin).json()["data"]
    assert [(one["id"], one.get("parent")) for one in data] == [("tiny", None), ("brief", "tiny")]
    assert data[1]["default_parameters"] == {**data[0]["default_parameters"], "temperature": 0.25}
    assert rig.client.get("/v1/models/brief", headers=rig.admin).json() == data[1]
    assert rig.client.get("/props?model=brief", headers=rig.admin).json()["model_alias"] == "brief"
    shown = rig.client.post("/api/show", json={"model": "brief:latest"}, headers=rig.admin).json()
    assert (shown["system"], shown["details"]["parent_model"]) == ("Be brief.", "tiny:latest")
    assert shown["modelfile"] == 'FROM tiny:latest\nPARAMETER temperature 0.25\nSYSTEM "Be brief."\n'
    assert "temperature" in rig.params("tiny", max_tokens=1).left_to_model
    for name, told in (
        ("other", "does not exist"),
        ("broken", "its file is damaged"),
        ("../keys", "does not exist"),
    ):
        refused = rig.ask(name)
        assert (refused.status_code, told in refused.text) == (404, True), refused.text
        assert str(rig.folder) not in refused.text


def test_a_change_and_the_end_of_a_preset_have_effect_at_the_next_request(rig: Rig) -> None:
    assert rig.ask("brief").status_code == 404
    for top_k in (3, 4):
        rig.write("brief", f"top-k = {top_k}\nmax-tokens = 1\n")
        assert rig.params("brief").top_k == top_k
    (rig.folder / "brief.toml").unlink()
    for dialect in PATHS:
        gone = rig.ask("brief", dialect)
        assert (gone.status_code, "does not exist" in gone.text) == (404, True), dialect


def test_a_stopped_model_and_a_policy_hold_for_its_presets(rig: Rig) -> None:
    rig.write("brief", "max-tokens = 1\n")
    rig.write("spoken", "system = 'say xyzzy'\nmax-tokens = 1\n")

    def stop(name: str, is_stopped: bool) -> None:
        body = {"kind": "model", "name": name, "is_stopped": is_stopped}
        assert rig.client.post("/v1/engine/stops", json=body, headers=rig.admin).status_code == 200

    stop("tiny", True)
    assert {rig.ask(name).status_code for name in ("tiny", "brief")} == {403}
    stop("tiny", False)
    stop("brief", True)
    assert [rig.ask(name).status_code for name in ("tiny", "brief")] == [200, 403]
    stop("brief", False)
    blocked = [{"role": "user", "content": "xyzzy"}]
    statuses = [rig.ask(name, messages=blocked).status_code for name in ("tiny", "brief")]
    assert statuses[0] == statuses[1] != 200
    assert rig.ask("spoken").status_code == statuses[0]  # its own texts are judged as well


def test_the_record_of_a_request_names_the_preset_and_its_digest(service: Service) -> None:
    digests = set()
    for context in (64, 65):
        watch = mock.Mock(spec=Watch)
        caller = Caller(watches=[watch])
        under = service.under(Preset(name="brief", model="tiny", context=context))
        caller.answered_by(under.model.id, under.digests)
        ((model, made), _) = watch.answered_by.call_args
        assert model == "brief"
        digests.add(made["preset_sha256"])
    assert len(digests) == 2
    assert service.model.id == "tiny"
