"""Commands count what routers choose, unless they are told not to, and add it to what earlier runs saved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from argosy.cli.main import main
from argosy.model.families import open_model
from argosy.observe import saved
from tests.cli.conftest import FakeEngine

Engine = type[FakeEngine]
Captured = pytest.CaptureFixture[str]

LONG = ["-n", "60", "-t", "0", "--ignore-eos", "--memory", "2GiB", "Hi"]


@pytest.fixture(autouse=True)
def _own_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setattr(saved, "FEWEST_TOKENS", 16)  # the model's context is short


def test_a_run_adds_its_decode_tokens_to_what_was_saved(chat_model: Path, capsys: Captured) -> None:
    for num_runs in (1, 2):
        assert main(["run", "-m", str(chat_model), "--json", *LONG]) == 0
        new_tokens = json.loads(capsys.readouterr().out)["ledger"]["new_tokens"]
        found = saved.find(saved.path_of(open_model(chat_model)))
        assert found is not None
        assert found.num_tokens == num_runs * (new_tokens - 1)


@pytest.mark.parametrize("how", ["a flag", "the environment"])
def test_nothing_is_counted_or_saved_if_that_is_off(
    how: str, chat_model: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if how == "the environment":
        monkeypatch.setenv("ARGOSY_RECORD", "off")
    flags = ["--no-record"] if how == "a flag" else []
    assert main(["run", *flags, "Hi"]) == 0
    assert engine.recorders == [None]
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_written_is_said_and_the_answer_stands(
    chat_model: Path, capsys: Captured, tmp_path: Path
) -> None:
    (tmp_path / "argosy").write_text("a file")
    assert main(["run", "-m", str(chat_model), "-q", *LONG]) == 0
    printed = capsys.readouterr()
    assert printed.out
    assert "note: the counts of routing cannot be saved in" in printed.err
    assert "--no-record" in printed.err


def test_show_plans_what_run_does(chat_model: Path, capsys: Captured) -> None:
    for flags in ([], ["--no-record"]):
        assert main(["run", "-m", str(chat_model), "--json", *flags, *LONG]) == 0
        ran = json.loads(capsys.readouterr().out)["plan"]
        assert main(["show", str(chat_model), "--json", "--memory", "2GiB", *flags]) == 0
        shown = json.loads(capsys.readouterr().out)["plan"]
        assert shown["routing_bytes"] == ran["routing_bytes"]
        assert (ran["routing_bytes"] > 0) == (not flags)
