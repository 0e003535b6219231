"""`search` lists models of the hub that may run here, and without a network those of this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest

from argosy.cli.main import main
from tests.helpers.hub_server import Served, served
from tests.library.caches import REFERENCE, add_to_hub

Captured = pytest.CaptureFixture[str]
TINY = REFERENCE / "qwen3_moe_plain"

MOE: dict[str, Any] = {
    "id": "Qwen/Qwen3-30B-A3B",
    "downloads": 1234567,
    "gated": False,
    "tags": ["transformers", "safetensors", "qwen3_moe", "license:apache-2.0"],
    "safetensors": {"parameters": {"BF16": 30532122624}, "total": 30532122624},
}
GGUF: dict[str, Any] = {
    "id": "bartowski/Qwen3-30B-A3B-GGUF",
    "downloads": 99,
    "gated": "manual",
    "tags": ["gguf", "license:other"],
    "gguf": {"total": 30532122624, "architecture": "qwen3moe"},
}
OTHERS: list[dict[str, Any]] = [
    {"id": "Qwen/Qwen3-Dense", "tags": ["safetensors", "phi3"]},
    {"id": "a/dense-GGUF", "tags": ["gguf"], "gguf": {"architecture": "phi3"}},
    {"id": "a/new-GGUF", "tags": ["gguf"], "gguf": {"architecture": "of tomorrow"}},
    {"id": "a/exl3", "tags": ["safetensors", "qwen3_moe", "exl3"]},
    {"id": "a/hqq", "tags": ["safetensors", "qwen3_moe", "hqq"]},
    {"id": "a/old", "tags": ["pytorch", "qwen3_moe"]},
]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for name in (
        "HF_HUB_CACHE",
        "HF_TOKEN",
        "HF_HUB_OFFLINE",
        "HF_ENDPOINT",
        "OLLAMA_MODELS",
        "XDG_DATA_HOME",
    ):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def server(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    with served({}, models=[MOE, GGUF, *OTHERS]) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def test_models_that_run_are_listed_with_parameters_downloads_and_licence(
    server: Served, capsys: Captured
) -> None:
    assert main(["search", "qwen3", "30b"]) == 0
    said = capsys.readouterr()
    cells = [line.split() for line in said.out.splitlines()[1:3]]
    assert cells == [
        ["Qwen/Qwen3-30B-A3B", "30.5", "B", "safetensors", "1,234,567", "apache-2.0"],
        ["bartowski/Qwen3-30B-A3B-GGUF", "30.5", "B", "GGUF", "99", "other,", "gated"],
    ]
    assert said.err == "note: Argosy does not run 6 others; --all lists them\n"


@pytest.mark.parametrize("tag", ["awq", "gptq", "mlx", "bitsandbytes", "nvfp4", "compressed-tensors"])
def test_a_quantised_model_whose_method_is_read_may_run(tag: str, server: Served, capsys: Captured) -> None:
    server.models = [{"id": "a/b", "tags": ["safetensors", "qwen3_moe", tag]}]
    assert main(["search", "qwen3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["models"][0]["may_run"] is True


def test_all_lists_the_others_and_json_has_the_same_facts(server: Served, capsys: Captured) -> None:
    assert main(["search", "qwen3", "--all"]) == 0
    said = capsys.readouterr().out
    assert all(other["id"] in said for other in OTHERS)
    assert main(["search", "qwen3", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["from"] == "hub"
    assert answer["models"][0] == {
        "name": "Qwen/Qwen3-30B-A3B",
        "format": "safetensors",
        "num_parameters": 30532122624,
        "downloads": 1234567,
        "licence": "apache-2.0",
        "is_gated": False,
        "may_run": True,
    }
    assert [model["name"] for model in answer["models"]] == [MOE["id"], GGUF["id"]]


def test_one_bounded_request_goes_to_the_hub_with_its_token(
    server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server.token = "hf_secret"
    assert main(["search", "  Qwen3 &limit=9999  ", "30b"]) == 0
    ((path, token),) = server.tokens
    query = parse_qs(path.partition("?")[2])
    assert query["search"] == ["Qwen3 &limit=9999 30b"]
    assert query["limit"] == ["100"]
    assert set(query["expand"]) == {"downloads", "gated", "gguf", "safetensors", "tags"}
    assert token == "Bearer hf_secret"


_OF_THE_HUBS_CLIENT = """
import sys
from huggingface_hub import HfApi
fields = ["downloads", "gated", "gguf", "safetensors", "tags"]
print([one.id for one in HfApi().list_models(search=sys.argv[1], sort="downloads", limit=100, expand=fields)])
"""


def test_the_hubs_own_client_sends_the_same_request(
    server: Served, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    server.models = [MOE]
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert main(["search", "Qwen3 30b & more"]) == 0
    # A process of its own: the client reads its environment once, when it is imported.
    command = [sys.executable, "-c", _OF_THE_HUBS_CLIENT, "Qwen3 30b & more"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout == f"{[MOE['id']]}\n", done.stderr
    ours, theirs = (one for one in server.tokens if one[0].startswith("/api/models?"))
    assert ours == theirs


@pytest.mark.parametrize(
    ("status", "token", "message", "hint"),
    [
        (401, "hf_old", "refuses the search: it answers 401", "unset HF_TOKEN, or set it to a valid token of this hub"),
        (403, "", "refuses the search: it answers 403", "set HF_TOKEN to a token of this hub"),
        (429, "", "answers 429: too many requests", "try again in 7 s; with HF_TOKEN set, the hub allows more"),
        (503, "", "has an internal fault: it answers 503", "try again later; HF_ENDPOINT names a mirror"),
    ],
)  # fmt: skip
def test_a_search_that_is_refused_says_why_and_what_to_do(
    server: Served,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Captured,
    status: int,
    token: str,
    message: str,
    hint: str,
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    server.refusal = (status, {"Retry-After": "7"}, b"")
    assert main(["search", "qwen3"]) == 1
    host = server.url.removeprefix("http://")
    assert capsys.readouterr().err == f"error: {host} {message}\nhint: {hint}\n"


@pytest.mark.parametrize(
    "entry",
    [
        None,
        7,
        [],
        {},
        {"id": None},
        {"id": "no-owner"},
        {"id": "a/b\x1b[2J"},
        {"id": "a/" + "b" * 500},
        {"id": "../x"},
    ],
)
def test_what_is_no_model_is_passed_over(server: Served, capsys: Captured, entry: object) -> None:
    server.models = [entry, MOE]
    assert main(["search", "x", "--all", "--json"]) == 0
    assert [one["name"] for one in json.loads(capsys.readouterr().out)["models"]] == [MOE["id"]]


@pytest.mark.parametrize(
    "facts",
    [
        {"downloads": -1, "safetensors": {"total": -5}},
        {"downloads": "many", "safetensors": {"total": "x"}, "gated": None},
        {"downloads": 10**30, "safetensors": [1]},
        {"downloads": True, "safetensors": None},
        {"tags": [*MOE["tags"], None, {"a": 1}] * 400},
    ],
)
def test_facts_of_another_kind_are_not_known(
    server: Served, capsys: Captured, facts: dict[str, object]
) -> None:
    server.models = [MOE | facts]
    assert main(["search", "x"]) == 0
    assert MOE["id"] in capsys.readouterr().out


def test_a_licence_controls_no_terminal_and_is_short(server: Served, capsys: Captured) -> None:
    licence = "license:\x1b[2J\n\u202e" + "x" * 5000
    server.models = [MOE | {"tags": ["safetensors", "qwen3_moe", licence]}]
    assert main(["search", "x"]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert "\u202e" not in said
    assert max(map(len, said.splitlines())) < 200


@pytest.mark.parametrize("answer", [{}, "models", 7, {"error": "x"}])
def test_an_answer_that_is_no_list_is_refused(server: Served, capsys: Captured, answer: object) -> None:
    server.models = answer
    assert main(["search", "x"]) == 4
    assert "its list of models is not a list" in capsys.readouterr().err


def test_an_answer_that_is_too_long_is_refused(server: Served, capsys: Captured) -> None:
    server.models = ["x" * (5 << 20)]
    assert main(["search", "x"]) == 4
    assert "at most 4194304 are read" in capsys.readouterr().err


@pytest.mark.parametrize("words", [" ", "x" * 201])
def test_words_are_needed_and_bounded(server: Served, capsys: Captured, words: str) -> None:
    assert main(["search", words]) == 2
    assert "a search needs 1 to 200 characters" in capsys.readouterr().err
    assert server.tokens == []


def test_many_models_fill_one_screen_and_the_rest_is_counted(server: Served, capsys: Captured) -> None:
    server.models = [MOE | {"id": f"a/{at}"} for at in range(150)]
    assert main(["search", "x"]) == 0
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 1 + 25 + 1
    assert "note: 75 more are not shown; --json prints all" in said.err
    assert "only the 100 most downloaded were looked at" in said.err


def test_an_architecture_that_mixtures_and_others_share_runs(server: Served, capsys: Captured) -> None:
    server.models = [
        {"id": "a/Mixtral-8x7B-GGUF", "tags": ["gguf"], "gguf": {"architecture": "llama"}},
        {"id": "a/Llama-3-8B-GGUF", "tags": ["gguf"], "gguf": {"architecture": "llama"}},
        {"id": "a/Qwen3-0.6B", "tags": ["safetensors", "qwen3"]},
        {"id": "a/unread-GGUF", "tags": ["gguf"]},
    ]
    assert main(["search", "x"]) == 0
    said = capsys.readouterr().out
    assert "a/Mixtral-8x7B-GGUF" in said
    assert "a/Llama-3-8B-GGUF" in said
    assert "a/Qwen3-0.6B" in said
    assert "GGUF (not known whether it runs)" in said


def test_nothing_that_runs_is_said(server: Served, capsys: Captured) -> None:
    server.models = OTHERS
    assert main(["search", "qwen3"]) == 0
    said = capsys.readouterr()
    assert said.out == "the hub has no model that Argosy runs for: qwen3\n"
    assert "does not run 6 others" in said.err


def test_a_refusal_of_the_hub_is_an_error_and_no_search_of_this_machine(
    server: Served, capsys: Captured
) -> None:
    server.refusal = (429, {}, b"")
    assert main(["search", "x"]) == 1
    assert "answers 429: too many requests" in capsys.readouterr().err


@pytest.mark.parametrize("is_offline", [True, False])
def test_without_a_hub_this_machine_is_searched_and_a_note_says_so(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured, is_offline: bool
) -> None:
    add_to_hub(home / "hf" / "hub", "Qwen/Qwen3-30B-A3B", TINY)
    add_to_hub(home / "hf" / "hub", "other/model", TINY)
    if is_offline:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        why = "HF_HUB_OFFLINE is set"
    else:
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        why = "cannot reach 127.0.0.1:9 (connection refused)"
    assert main(["search", "QWEN3", "a3b"]) == 0
    said = capsys.readouterr()
    assert said.err.startswith(f"note: {why}")
    assert "; only this machine is searched" in said.err
    assert [line.split()[0] for line in said.out.splitlines()] == ["NAME", "Qwen/Qwen3-30B-A3B"]
    assert main(["search", "nothing", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["from"], answer["models"]) == ("library", [])
    assert main(["search", "nothing"]) == 0
    assert capsys.readouterr().out == "no local model matches: nothing\n"
