"""Settings that a developer has made for `argosy` stay out of the tests."""

from __future__ import annotations

import pytest

SETTINGS = ("ARGOSY_MEMORY", "ARGOSY_THREADS", "ARGOSY_INSTRUCTION_SET", "ARGOSY_TRACEBACK")


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
