"""Fixtures of the command line: a fake engine, and a tiny real model."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest

from argosy.config import SamplingParams
from tests.cli.fake_engine import FakeEngine
from tests.cli.tiny_chat_model import write_chat_model


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> type[FakeEngine]:
    """The class that commands will open instead of `Engine`."""

    class Engine(FakeEngine):
        opened: ClassVar[list[dict[str, object]]] = []
        recorders: ClassVar[list[object]] = []
        asked: ClassVar[list[object]] = []
        params: ClassVar[list[SamplingParams]] = []

    monkeypatch.setattr("argosy.open.engine.Engine", Engine)
    return Engine


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("chat") / "model")
