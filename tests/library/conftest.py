"""Places of a user who has no models yet."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("HF_HOME", str(home / "hf"))
    monkeypatch.setenv("OLLAMA_MODELS", str(home / "ollama"))
    monkeypatch.setenv("XDG_DATA_HOME", str(home / "data"))
    monkeypatch.setenv("ARGOSY_CACHE", str(home / "cache"))
    monkeypatch.setenv("ARGOSY_MEMORY", "2GiB")
    monkeypatch.chdir(tmp_path)
    return home


@pytest.fixture
def hub(home: Path) -> Path:
    return home / "hf" / "hub"


@pytest.fixture
def ollama(home: Path) -> Path:
    return home / "ollama"
