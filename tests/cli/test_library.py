"""`argosy list` and `argosy alias`, and names wherever a command takes a model."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from argosy.cli.main import main
from argosy.cli.shared import output
from argosy.config import SamplingDefaults
from argosy.forecast import planning
from argosy.library import kept
from tests.cli.fake_engine import FakeEngine
from tests.library.caches import GGUF, TINY, WEIGHTS, add_to_hub, add_to_lm_studio, add_to_ollama

Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "ollama"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("ARGOSY_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def models(home: Path) -> Path:
    add_to_hub(home / "hf" / "hub", "Qwen/Qwen3-30B-A3B", TINY)
    add_to_lm_studio(home, "someone/vision-GGUF", GGUF / "model.gguf")
    other = home / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "bert"}')
    (other / "model.safetensors").write_bytes((TINY / "model.safetensors").read_bytes())
    add_to_hub(home / "hf" / "hub", "someone/bert", other)
    return home


def listed(capsys: Captured) -> dict[str, dict[str, Any]]:
    assert main(["list", "--json"]) == 0
    return {model["name"]: model for model in json.loads(capsys.readouterr().out)["models"]}


def test_a_list_says_what_is_here_from_headers(models: Path, capsys: Captured) -> None:
    kept.note_use("Qwen/Qwen3-30B-A3B")
    found = listed(capsys)
    assert found["Qwen/Qwen3-30B-A3B"] | {"smallest_bytes": 0, "resident_bytes": 0, "last_used": 0} == {
        "name": "Qwen/Qwen3-30B-A3B",
        "place": "hub",
        "revision": None,
        "path": str(next((models / "hf/hub/models--Qwen--Qwen3-30B-A3B/snapshots").iterdir())),
        "size_bytes": (TINY / "model.safetensors").stat().st_size,
        "last_used": 0,
        "family": "mixtral",
        "format": "bf16",
        "num_experts": 8,
        "experts_per_token": 2,
        "smallest_bytes": 0,
        "resident_bytes": 0,
        "context_tokens": 128,
        "num_layers": 3,
        "vocab_size": 112,
        "num_parameters": 82200,
        "weight_bytes": 164400,
        "sampling": SamplingDefaults().as_dict(),
        "media_kinds": [],
        "fits": "resident",
    }
    assert found["Qwen/Qwen3-30B-A3B"]["last_used"] == pytest.approx(time.time(), abs=60)
    assert "model_type 'bert'" in found["someone/bert"]["fault"]
    assert main(["list"]) == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert lines[0].split() == ["NAME", "FAMILY", "SIZE", "FORMAT", "EXPERTS", "USED", "FITS", "PLACE"]
    assert lines[1].startswith("Qwen/Qwen3-30B-A3B")
    assert "2 of 8" in lines[1]
    assert "just now" in lines[1]
    assert lines[2].startswith("someone/vision-GGUF:model")
    assert lines[2].endswith("LM Studio")
    assert len(lines) == 3
    assert "Argosy cannot run 1 other model; --all lists it" in said.err
    assert main(["list", "--all"]) == 0
    assert "someone/bert" in capsys.readouterr().out


@pytest.mark.parametrize(
    "width", [46, 100, *(pytest.param(width, marks=pytest.mark.full) for width in (50, 80))]
)
@pytest.mark.parametrize("command", [["list", "--all"], ["show", "qwen"], ["plan", "qwen"], ["data", "list"]])
def test_a_narrow_terminal_breaks_no_word(
    command: list[str], width: int, models: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "terminal_width", lambda: width)
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines
    for line in lines:
        assert len(line) <= width or " " not in line.strip(), line  # only a word that is longer takes more


def test_a_model_is_shown_by_its_name_however_it_is_found(models: Path, capsys: Captured) -> None:
    path = next((models / "hf/hub/models--Qwen--Qwen3-30B-A3B/snapshots").iterdir())
    for text in ("qwen", str(path)):
        assert main(["show", text]) == 0
        assert capsys.readouterr().out.startswith(f"model     Qwen/Qwen3-30B-A3B\n  path          {path}\n")
    assert main(["show", str(TINY)]) == 0
    assert capsys.readouterr().out.startswith(f"model     {TINY.name}\n  path          {TINY}\n")


def test_a_budget_says_what_fits(models: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    smallest = listed(capsys)["Qwen/Qwen3-30B-A3B"]["smallest_bytes"]
    for budget_bytes, fits in ((smallest - 1, "no"), (smallest, "streams"), (smallest * 100, "resident")):
        monkeypatch.setattr(
            "argosy.machine.resources.default_budget", lambda limit, most=budget_bytes: (most, 0)
        )
        assert listed(capsys)["Qwen/Qwen3-30B-A3B"]["fits"] == fits
    monkeypatch.setattr("argosy.machine.resources.default_budget", lambda limit: (1, 0))
    assert main(["list"]) == 0
    assert "no, needs " in capsys.readouterr().out


def test_headers_are_read_once_until_a_file_changes(
    models: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    summarise = planning.summarise
    monkeypatch.setattr(planning, "summarise", lambda path: (read.append(path), summarise(path))[1])
    first = listed(capsys)
    assert len(read) == 3
    assert listed(capsys) == first
    assert len(read) == 3
    config = models / "hf/hub/models--Qwen--Qwen3-30B-A3B/snapshots"
    path = (next(config.iterdir()) / "config.json").resolve()
    path.write_text(path.read_text() + " ")
    assert listed(capsys) == first
    assert len(read) == 4
    settings = next(config.iterdir()) / "hf_quant_config.json"
    settings.write_text("{}")
    listed(capsys)
    assert len(read) == 5
    settings.unlink()
    kept = models / "cache" / "library-facts.json"
    kept.write_text("damaged")
    assert listed(capsys) == first
    good = json.loads(kept.read_text())
    for name, value in [("family", None), ("smallest_bytes", "x"), ("sampling", {"a": 1}), ("fault", [])]:
        kept.write_text(json.dumps({key: {**facts, name: value} for key, facts in good.items()}))
        assert listed(capsys) == first
        assert json.loads(kept.read_text()) == good


def test_a_list_of_nothing_says_how_to_get_something(capsys: Captured) -> None:
    assert main(["list"]) == 0
    assert "`argosy search WORDS` finds some to pull" in capsys.readouterr().out


def test_what_is_passed_over_is_a_note(models: Path, capsys: Captured) -> None:
    (models / "hf" / "hub" / "models--a--b").symlink_to("/etc")
    assert main(["list"]) == 0
    assert "note: " in (said := capsys.readouterr().err)
    assert "models--a--b is a link, which Argosy does not follow" in said


def test_an_unfinished_pull_and_a_model_with_missing_parts_are_listed(models: Path, capsys: Captured) -> None:
    folder = next((models / "hf/hub/models--Qwen--Qwen3-30B-A3B/snapshots").iterdir())
    (folder / "model.safetensors").rename(folder / "model-00001-of-00003.safetensors")
    with kept.changing() as known:
        known.pulled["a/b"] = kept.Pulled("a/b", "c" * 40, 10**10, ())
    assert listed(capsys)["a/b"]["fault"] == "download incomplete; `argosy pull a/b` finishes it"
    assert main(["list"]) == 0
    said = capsys.readouterr().out
    assert "download incomplete; `argosy pull a/b` finishes it" in said
    assert "2 of its files are missing" in said


def test_aliases_are_made_listed_and_forgotten(models: Path, capsys: Captured) -> None:
    assert main(["alias", "small", "Qwen3-30B-A3B"]) == 0
    assert main(["alias"]) == 0
    assert capsys.readouterr().out == "small = Qwen/Qwen3-30B-A3B\n" * 2
    assert main(["list"]) == 0
    assert "alias     small = Qwen/Qwen3-30B-A3B" in capsys.readouterr().out
    assert main(["alias", "small", "--remove"]) == 0
    assert capsys.readouterr().out == "forgot small, which stood for Qwen/Qwen3-30B-A3B\n"
    for arguments in (["x"], ["x", "y", "--remove"], ["--remove"]):
        assert main(["alias", *arguments]) == 2
        assert "alias needs NAME and TARGET" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["run", "Hi", "-m"], ["chat"]])
def test_a_command_takes_a_name_says_which_it_found_and_remembers_its_use(
    models: Path,
    capsys: Captured,
    engine: type[FakeEngine],
    command: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert main([*command, "30b"]) == 0
    assert "note: 30b is Qwen/Qwen3-30B-A3B" in capsys.readouterr().err
    assert list(kept.read().used) == ["Qwen/Qwen3-30B-A3B"]
    assert main([*command, "Qwen/Qwen3-30B-A3B"]) == 0
    assert "note: " not in capsys.readouterr().err


def test_plans_descriptions_and_packs_take_a_name(models: Path, capsys: Captured) -> None:
    assert main(["show", "30b"]) == 0
    assert "mixtral" in capsys.readouterr().out
    assert main(["plan", "30b"]) == 0
    assert "its files are here" in capsys.readouterr().out
    assert main(["pack", "30b", str(models / "pack"), "--format", "q8"]) == 0
    assert main(["alias", "packed", str(models / "pack")]) == 0
    capsys.readouterr()
    assert main(["show", "packed"]) == 0
    assert "a pack" in capsys.readouterr().out


def test_ollamas_models_run_in_place(models: Path, capsys: Captured) -> None:
    add_to_ollama(models / "ollama", "vision:30b", {WEIGHTS: GGUF / "model.gguf"})
    assert main(["show", "vision:30b"]) == 0
    assert "a GGUF file" in capsys.readouterr().out


def test_a_no_on_the_terminal_removes_nothing(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", Mock(isatty=lambda: True))
    monkeypatch.setattr("sys.stderr", Mock(isatty=lambda: True))
    monkeypatch.setattr("click.confirm", Mock(return_value=False))
    assert main(["rm", "Qwen/Qwen3-30B-A3B"]) == 1
    assert list((models / "hf/hub").glob("models--Qwen*"))
