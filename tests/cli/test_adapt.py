"""`argosy adapt` refuses before it trains: without torch, for a place, rows, a model or memory that cannot be used."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from argosy.cli.main import main
from argosy.machine.resources import MemoryLimit
from tests.models.tiny import qwen2_moe, qwen3_moe, write_model
from tests.prompt.tokenizers_for_tests import CHATML, byte_level_json, write_tokenizer

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a b c"}\n{"txet": "a"}\n')
    return path


@pytest.fixture
def with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if torch were installed; what is tested here ends before it is imported."""
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: name == "torch" or real(name, *more))


def write_chat(directory: Path, config: dict[str, Any]) -> Path:
    write_model(directory, config | {"vocab_size": 512}, seed=3)
    return write_tokenizer(directory, byte_level_json(), {"eos_token": "<|im_end|>", "chat_template": CHATML})


def test_without_torch_the_command_says_how_to_install_it(
    tmp_path: Path, rows: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "torch" else real(name, *more)
    )
    monkeypatch.setattr("argosy.installed.metadata.requires", lambda _: ['torch<3,>=2.6; extra == "adapt"'])
    assert main(["adapt", "demo", str(rows), "-o", str(tmp_path / "made")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        "error: training needs torch, which is not installed; running an adapter does not"
    )
    assert error.split("hint: ")[1].strip().endswith("install 'torch<3,>=2.6'`")


@pytest.mark.usefixtures("with_torch")
def test_a_bad_row_ends_it_before_training(tmp_path: Path, rows: Path, capsys: Captured) -> None:
    model = write_chat(tmp_path / "model", qwen2_moe())
    assert main(["adapt", str(model), str(rows), "-o", str(tmp_path / "made")]) == 2
    assert f"error: {rows}, line 2: it needs `text` or `messages`" in capsys.readouterr().err
    assert not (tmp_path / "made").exists()


@pytest.mark.usefixtures("with_torch")
def test_other_families_are_refused(tmp_path: Path, rows: Path, capsys: Captured) -> None:
    model = write_chat(tmp_path / "model", qwen3_moe())
    assert main(["adapt", str(model), str(rows), "-o", str(tmp_path / "made")]) != 0
    error = capsys.readouterr().err
    assert "needs the family qwen2_moe" in error
    assert "found qwen3_moe" in error


@pytest.mark.usefixtures("with_torch")
def test_too_little_memory_is_refused(
    tmp_path: Path, rows: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_chat(tmp_path / "model", qwen2_moe())
    limit = MemoryLimit(2 << 30, 1 << 30, "machine")
    monkeypatch.setattr("argosy.machine.resources.memory_limit", lambda: limit)
    assert main(["adapt", str(model), str(rows), "-o", str(tmp_path / "made")]) == 3
    assert "training needs about 2.0 GiB of memory; 1.0 GiB free of 2.0 GiB" in capsys.readouterr().err


@pytest.mark.usefixtures("with_torch")
def test_what_is_in_the_way_is_refused_first(tmp_path: Path, rows: Path, capsys: Captured) -> None:
    place = tmp_path / "made"
    place.mkdir()
    ask = ["adapt", "no/model", str(rows), "-o", str(place)]
    assert main([*ask, "--force"]) == 2
    assert "is not an adapter" in capsys.readouterr().err
    (place / "adapter_config.json").write_text(json.dumps({}))
    assert main(ask) == 2
    assert "--force" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option", [["--rank", "0"], ["--steps", "0"], ["--learning-rate", "0"], ["--context", "1"]]
)
def test_options_are_bounded(tmp_path: Path, rows: Path, option: list[str], capsys: Captured) -> None:
    assert main(["adapt", "demo", str(rows), "-o", str(tmp_path / "made"), *option]) == 2
    assert option[0] in capsys.readouterr().err
