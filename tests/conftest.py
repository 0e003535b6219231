"""Keep a developer's `argosy` settings, and the way the tests were started, from affecting the tests."""

from __future__ import annotations

import signal

import pytest

# A shell makes background commands ignore SIGINT, and their children inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

SETTINGS = (
    "ARGOSY_MEMORY",
    "ARGOSY_THREADS",
    "ARGOSY_INSTRUCTION_SET",
    "ARGOSY_ASK_AHEAD",
    "ARGOSY_TRACEBACK",
)


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
