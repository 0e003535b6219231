"""The command line of a server with several models: names, times, and what such a server refuses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from argosy.cli.commands.serve import _ids
from argosy.cli.main import main
from argosy.config import SamplingDefaults, parse_seconds
from argosy.errors import UsageError
from argosy.library import kept, names
from argosy.library.names import look_up
from argosy.library.places import Found
from argosy.serve.answer.service import Common
from argosy.serve.models.entry import Entry, Offer
from tests.cli.tiny_chat_model import write_chat_model

Captured = pytest.CaptureFixture[str]


def test_names_are_those_of_the_files_or_one_for_each_model() -> None:
    same = [look_up(text) for text in ("a/model.gguf", "b/model.gguf")]
    assert _ids([look_up("models/Qwen3.gguf"), look_up("demo")], ()) == ["Qwen3", "demo"]
    assert _ids(same, ("x", "y")) == ["x", "y"]
    with pytest.raises(UsageError, match="two models are named model"):
        _ids(same, ())
    with pytest.raises(UsageError, match="--name was given 1 time, and there are 2 models"):
        _ids(same, ("x",))
    for name in ("", "x\ny"):
        with pytest.raises(UsageError, match="--name must be printable text"):
            _ids(same, ("x", name))


def test_times_have_units() -> None:
    times = {"90": 90, "90s": 90, "10m": 600, "1.5h": 5400}
    assert {text: parse_seconds(text) for text in times} == times
    for text in ("", "0", "-1s", "10 minutes", "1e9", "9" * 400):
        with pytest.raises(UsageError, match="not a time above zero"):
            parse_seconds(text)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--preload", "x"), "--preload x: this server has: one, two"),
        (("--ears", "tiny.en"), "--ears is for a server with one model"),
        (("--memory", "1TiB"), "the budget is 1024 GiB, and there are"),
        (("--memory", "200MiB"), "one needs "),
    ],
)
def test_what_a_server_with_several_models_refuses(
    tmp_path: Path, capsys: Captured, options: tuple[str, ...], told: str
) -> None:
    models = [write_chat_model(tmp_path / name) for name in ("one", "two")]
    assert main(["serve", *map(str, models), "--port", "0", *options]) in (2, 3)
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("options", [(), ("--idle-unload", "1m"), ("--name", "x")])
def test_a_model_is_looked_up_once(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    names.add_alias("short", str(write_chat_model(tmp_path / "one")))
    looks: list[int] = []
    find_models = names.find_models

    def counted() -> Found:
        looks.append(1)
        return find_models()

    monkeypatch.setattr(names, "find_models", counted)
    assert main(["serve", "short", "--port", "0", "--memory", "1MiB", *options]) in (2, 3)
    assert "the budget is 1.0 MiB" in capsys.readouterr().err
    assert len(looks) == 1


def test_a_model_served_with_others_is_noted_as_used_when_it_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    paths = [write_chat_model(tmp_path / name) for name in ("one", "two")]
    names.add_alias("short", str(paths[0]))

    def serve(*_: Any, note_use: Callable[[str], None], **__: Any) -> None:
        assert kept.read().used == {}
        note_use("two")  # named by its path, so it is in no library
        assert kept.read().used == {}
        note_use("one")

    monkeypatch.setattr("argosy.serve.run.serve", serve)
    assert main(["serve", "short", str(paths[1]), "--port", "0", "--memory", "1GiB"]) == 0
    assert list(kept.read().used) == [str(paths[0])]


@pytest.mark.parametrize("options", [(), ("--idle-unload", "1m")])
def test_sampling_options_go_before_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    model = write_chat_model(tmp_path / "one")
    (model / "generation_config.json").write_text('{"temperature": 0.6, "top_k": 20}')
    found: list[SamplingDefaults] = []

    def serve(offers: Sequence[Offer], *_: Any, **__: Any) -> None:
        entry = Entry(offers[0], Common())
        found.append(entry.facts.sampling)
        entry.close()

    monkeypatch.setattr("argosy.serve.run.serve", serve)
    assert main(["serve", str(model), "--port", "0", "--memory", "1GiB", "-t", "0.3", *options]) == 0
    assert (found[0].temperature, found[0].top_k, found[0].top_p) == (0.3, 20, 1)


def test_sampling_options_out_of_bounds_are_refused_before_a_model_opens(capsys: Captured) -> None:
    assert main(["serve", "nowhere", "--top-p", "0"]) == 2
    assert "top_p must be above 0, at most 1, found 0.0" in capsys.readouterr().err
