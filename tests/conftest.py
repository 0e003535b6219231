"""Keep a developer's `argosy` settings, and the way the tests were started, from affecting the tests.

The longest files come first, so that processes that run files side by side end together.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from argosy import _native

# Products run as the defaults say, whatever was measured here: tests neither wait for a probe nor keep what it finds.
os.environ["ARGOSY_TUNE"] = "off"

# A shell makes background commands ignore SIGINT, and their children inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# glibc gives threads that allocate at the same time heaps of their own and keeps the free end of each: 46 MB for every
# client that sent a large body. Only this process has few; those that the tests start and measure are as users' are.
_M_ARENA_MAX = -8
ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 2)

KEPT = ("ARGOSY_TUNE", "ARGOSY_CACHE", "ARGOSY_BASE_WHEEL")  # those that tests need from outside
LONGEST = (
    "engine/test_identity.py",
    "serve/test_openapi.py",
    "engine/test_gguf.py",
    "serve/test_run.py",
    "prompt/test_tool_prompts.py",
    "abuse/test_kills.py",
    "abuse/test_figures.py",
    "abuse/test_videos.py",
    "media/test_ffmpeg.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {Path(__file__).parent / name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


@pytest.fixture(autouse=True, scope="module")
def _memory_of_a_module_ends_with_it() -> Iterator[None]:
    """Budgets count what the process holds, and that of the tests would hold more with every module."""
    yield
    gc.collect()
    _native.trim_heap()


@pytest.fixture(autouse=True, scope="session")
def _no_settings_from_outside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """For the whole session, so that the models and servers that modules share see it as well."""
    base = tmp_path_factory.getbasetemp()
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith("ARGOSY_") and name not in KEPT:
                patch.delenv(name)
        # Commands keep aliases and counts of routing there.
        patch.setenv("XDG_DATA_HOME", str(base / "data"))
        # A server that a developer started with `argosy up` answers none of the tests' commands.
        patch.setenv("XDG_STATE_HOME", str(base / "state"))
        # Models of a developer's library are none of the tests'.
        for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_ENDPOINT", "HF_TOKEN", "HF_HUB_OFFLINE"):
            patch.delenv(name, raising=False)
        patch.setenv("HF_HOME", str(base / "hub"))
        patch.setenv("OLLAMA_MODELS", str(base / "ollama"))
        yield
