"""Settings that a developer has made for `argosy` stay out of the tests, and so does how they were started."""

from __future__ import annotations

import signal

import pytest

# A shell lets what it runs in the background ignore SIGINT, and children inherit that.
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
