"""`argosy preset`, and presets wherever a command takes a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from argosy.cli.main import main
from argosy.cli.shared.server_model import _entry_of
from argosy.errors import UsageError
from argosy.library import presets
from argosy.serve.run import ServerSettings
from tests.cli.tiny_chat_model import write_chat_model

Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, value in (
        ("HOME", ""), ("HF_HOME", "hf"), ("OLLAMA_MODELS", "ollama"), ("XDG_DATA_HOME", "data"),
        ("XDG_STATE_HOME", "state"), ("ARGOSY_CACHE", "cache"),
    ):  # fmt: skip
        monkeypatch.setenv(name, str(tmp_path / value))
    monkeypatch.setenv("ARGOSY_MEMORY", "2GiB")
    return write_chat_model(tmp_path / "tiny")


def make(*options: str) -> int:
    return main(["preset", *options])


def test_a_new_user_is_told_how_to_make_the_first_preset_or_alias(capsys: Captured) -> None:
    assert make() == main(["alias"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "no presets yet: `argosy preset NAME -m MODEL` makes one",
        "no aliases yet: `argosy alias NAME TARGET` makes one",
    ]


def test_a_preset_is_made_changed_shown_listed_and_forgotten(model: Path, capsys: Captured) -> None:
    assert (
        make("coder", "-m", str(model), "--system", "Be brief.", "-t", "0.5", "--stop", "a", "--stop", "b")
        == 0
    )
    assert make("coder", "--context", "100", "-n", "5", "-t", "0.2", "--no-think") == 0
    capsys.readouterr()
    assert make("coder") == 0
    shown = capsys.readouterr().out
    assert shown.splitlines() == [
        f"FROM {model}", "PARAMETER temperature 0.2", "PARAMETER num_ctx 100", "PARAMETER num_predict 5",
        'PARAMETER stop "a"', 'PARAMETER stop "b"', "PARAMETER think false", 'SYSTEM "Be brief."',
    ]  # fmt: skip
    (model.parent / "Modelfile").write_text(shown)
    assert make("again", "--modelfile", str(model.parent / "Modelfile")) == 0
    first, second = presets.find("coder"), presets.find("again")
    assert first is not None
    assert second is not None
    assert presets.facts_of(first) == presets.facts_of(second)
    assert (
        make("again", "--effort", "high", "--system", "", "-n", "-1") == 0
    )  # the last word on thinking counts
    capsys.readouterr()
    assert make() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f'again = {model}, temperature 0.2, context 100, stop ["a", "b"], effort "high"'
    assert main(["list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["presets"]
    assert listed["coder"]["max_tokens"] == 5
    assert main(["list"]) == 0
    assert f"preset    coder = {model}, a system message" in capsys.readouterr().out
    assert make("coder", "--remove") == 0
    assert presets.names() == ["again"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("-t", "1"), "preset needs NAME"),
        (("new", "-t", "1"), "'new' is not a preset"),
        (("new",), "'new' is not a preset"),
        (("new", "--remove"), "'new' is not a preset"),
        (("new", "--remove", "-t", "1"), "exclude each other"),
        (("new", "-m", "nowhere"), "no model here is named 'nowhere'"),
        (("demo", "-m", "MODEL"), "'demo' cannot be the name of a preset"),
        (("new", "-m", "MODEL", "-t", "101"), "temperature must be from 0 to 100"),
        (("new", "-m", "MODEL", "-n", "0"), "max-tokens must be from 1"),
        (("new", "-m", "MODEL", "--no-think", "--effort", "low"), "an effort needs thinking"),
        (("new", "--modelfile", "away"), "away cannot be read"),
    ],
)
def test_what_cannot_be_a_preset_is_refused(
    model: Path, capsys: Captured, options: tuple[str, ...], told: str
) -> None:
    assert make(*(str(model) if one == "MODEL" else one for one in options)) != 0
    assert told in capsys.readouterr().err
    assert presets.names() == []


def test_a_modelfile_is_imported_with_notes_about_what_has_no_effect(model: Path, capsys: Captured) -> None:
    (model.parent / "Modelfile").write_text(
        'FROM ./tiny\nTEMPLATE """{{ .Prompt }}"""\nPARAMETER num_gpu 3\n'
    )
    assert make("mario", "--modelfile", str(model.parent / "Modelfile")) == 0
    said = capsys.readouterr().err
    assert "note: TEMPLATE has no effect: the model's own chat template is used" in said
    assert "note: PARAMETER num_gpu has no effect" in said
    found = presets.find("mario")
    assert found is not None
    assert found.model == str(model)
    (model.parent / "Modelfile").write_text("FROM ./tiny\nADAPTER ./lora.gguf\n")
    assert make("luigi", "--modelfile", str(model.parent / "Modelfile")) == 2
    assert "Modelfile: line 2: ADAPTER: adapters are not supported yet" in capsys.readouterr().err


def test_run_and_show_take_a_preset(model: Path, capsys: Captured) -> None:
    assert (
        make("coder", "-m", str(model), "--context", "100", "-n", "3", "-t", "0", "--system", "Be brief.")
        == 0
    )
    capsys.readouterr()
    found: list[Mapping[str, Any]] = []
    for options in ((), ("-n", "2"), ("--system", "No.")):
        assert main(["run", "-m", "coder", "--json", "--ignore-eos", *options, "hello"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert [one["usage"]["completion_tokens"] for one in found] == [3, 2, 3]
    assert found[0]["usage"]["prompt_tokens"] > found[2]["usage"]["prompt_tokens"]
    assert main(["show", "coder", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["preset"]["context"], facts["sampling"]["temperature"]) == (100, 0)
    assert facts["plan"]["context_tokens"] == 100


def test_a_server_answers_as_its_preset_and_has_its_model_once(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("coder", "writer"):
        assert make(name, "-m", str(model)) == 0
    served: list[tuple[str, ServerSettings]] = []
    monkeypatch.setattr(
        "argosy.serve.run.serve",
        lambda offers, sockets, settings, **_: served.append((offers[0].facts.id, settings)),
    )
    assert main(["serve", "coder", "writer", str(model), "--port", "0"]) == 0
    assert main(["serve", str(model), "--port", "0"]) == 0
    (name, settings), (_, plain) = served
    assert (name, settings.default, plain.default) == ("tiny", "coder", None)
    assert settings.presets is not None
    assert [(one.name, one.model) for one in settings.presets.all()] == [
        ("coder", "tiny"),
        ("writer", "tiny"),
    ]
    found = settings.presets.find("coder")
    assert found is not None
    assert found.model == "tiny"


def test_a_server_without_a_preset_does_not_stand_in_for_it(model: Path) -> None:
    assert make("coder", "-m", str(model)) == 0
    entries = [{"id": "tiny"}]
    with pytest.raises(UsageError, match="does not have coder"):
        _entry_of("coder", lambda: entries, "here")
    assert _entry_of("coder", lambda: [*entries, {"id": "coder"}], "here") == {"id": "coder"}
