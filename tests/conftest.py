"""Keep a developer's `argosy` settings, and the way the tests were started, from affecting the tests.

The longest files come first, so that processes that run files side by side end together.

`make test` leaves out what has the marker `full`, which is what `make test-full` runs. A cross of parameters has the
marker `covering(strength)`: `make test` runs enough of its cases for each `strength` values of different parameters to
meet, and the others are `full`.
"""

from __future__ import annotations

import asyncio
import atexit
import ctypes
import gc
import importlib
import os
import signal
import subprocess
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import certifi
import pytest
from hypothesis import HealthCheck, settings

from argosy import _native, confined_process
from argosy.serve.http import server
from tests.helpers.forks import ForkedWorker

# How fast examples are made and run says how busy the machine is.
settings.register_profile("argosy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("argosy")

# Products run as the defaults say, whatever was measured here: tests neither wait for a probe nor keep what it finds.
os.environ["ARGOSY_TUNE"] = "off"

# A shell makes background commands ignore SIGINT, and their children inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# glibc gives threads that allocate at the same time heaps of their own and keeps the free end of each: 46 MB for every
# client that sent a large body. Only this process has few; those that the tests start and measure are as users' are.
_M_ARENA_MAX = -8
ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 2)

Meeting = tuple[tuple[str, str], ...]  # values of different parameters in one case
KEPT = ("ARGOSY_TUNE", "ARGOSY_CACHE", "ARGOSY_BASE_WHEEL")  # those that tests need from outside
LONGEST = (
    "engine/test_identity.py",
    "cli/test_background.py",
    "prompt/test_tool_prompts.py",
    "model/test_stack.py",
    "engine/test_memory.py",
    "abuse/test_kills.py",
    "abuse/test_figures.py",
    "serve/test_run.py",
    "serve/test_openapi.py",
    "engine/test_gguf.py",
    "abuse/test_videos.py",
    "media/test_ffmpeg.py",
)


# Collecting makes a million objects that live as long as the tests do; looking through them again and again for garbage
# took 40 % of the time, and after collecting they are left out of every search.
gc.disable()


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session: pytest.Session) -> None:
    """Import test files, each process of xdist from another place on: they share the compiling in a new checkout.

    Otherwise all compile the same file at the same time. Collection takes the modules from here, and reports errors.
    """
    config, worker = session.config, os.environ.get("PYTEST_XDIST_WORKER")
    if worker is None:
        return
    root, left_out = config.rootpath, [Path(each).resolve() for each in config.getoption("ignore") or ()]
    files = sorted(
        path.relative_to(root)
        for argument in config.args
        for path in Path(argument).resolve().rglob("test_*.py")
        if path.is_relative_to(root) and not any(path.is_relative_to(each) for each in left_out)
    )
    first = int(worker.removeprefix("gw")) * len(files) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    for path in files[first:] + files[:first]:
        with suppress(Exception, pytest.skip.Exception):
            importlib.import_module(".".join(path.with_suffix("").parts))


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()
    atexit.register(gc.unfreeze)  # later than pytest's own collections, of which there are five


@pytest.hookimpl(tryfirst=True)  # before pytest looks for markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {Path(__file__).parent / name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))
    crosses = defaultdict(list)
    for item in items:
        marks = [item.get_closest_marker(name) for name in ("covering", "full")]
        if isinstance(item, pytest.Function) and marks[0] and not marks[1]:
            crosses[item.path, item.originalname].append(item)
    for cases in crosses.values():
        for case in _not_needed(cases):
            case.add_marker("full")


def _not_needed(cases: Sequence[pytest.Function]) -> Iterator[pytest.Function]:
    """Yield the cases without which each few values of different parameters still meet.

    Cases come in an order that mixes all values, and those that bring the most that is new are chosen first.
    """
    marker = cases[0].get_closest_marker("covering")
    assert marker is not None
    (strength,) = marker.args

    def meetings(case: pytest.Function) -> set[Meeting]:
        return set(
            combinations([(name, repr(value)) for name, value in case.callspec.params.items()], strength)
        )

    left = {case: meetings(case) for case in sorted(cases, key=lambda case: zlib.crc32(case.nodeid.encode()))}
    met: set[Meeting] = set()
    for least in range(len(next(iter(left.values()))), 0, -1):
        for case, own in list(left.items()):
            if len(own - met) >= least:
                met |= left.pop(case)
    yield from left


@pytest.fixture(autouse=True, scope="module")
def _memory_of_a_module_ends_with_it() -> Iterator[None]:
    """Budgets count what the process holds, and that of the tests would hold more with every module."""
    yield
    gc.collect()
    _native.trim_heap()


@pytest.fixture(autouse=True, scope="session")
def _servers_unfreeze_nothing() -> Iterator[None]:
    """A server thaws all objects when it ends; with those of collecting, each later search would take half a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "gc", SimpleNamespace(freeze=lambda: None, unfreeze=lambda: None))
        yield


@pytest.fixture(autouse=True, scope="session")
def _servers_look_often_whether_they_end() -> Iterator[None]:
    """uvicorn sleeps a tenth of a second between two looks, and so would each of some hundred servers at its end."""
    with pytest.MonkeyPatch.context() as patch:
        quick = SimpleNamespace(**vars(asyncio) | {"sleep": lambda seconds: asyncio.sleep(seconds / 10)})
        patch.setattr("uvicorn.server.asyncio", quick)
        yield


@pytest.fixture(autouse=True, scope="session")
def _confined_processes_are_forks() -> Iterator[None]:
    """Those that this process starts, hundreds of them; where they are tested themselves, `as_users_have_them`."""
    with pytest.MonkeyPatch.context() as patch:
        forked = SimpleNamespace(**vars(subprocess) | {"Popen": ForkedWorker})
        patch.setattr(confined_process, "subprocess", forked)
        yield


@pytest.fixture(scope="module")
def as_users_have_them() -> Iterator[None]:
    """Processes of templates and media start with an interpreter of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(confined_process, "subprocess", subprocess)
        yield


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
        # A client of httpx reads every authority that it trusts: 7 ms, some thousand times. None is needed here.
        first, end, _ = Path(certifi.where()).read_text().partition("-----END CERTIFICATE-----\n")
        (base / "authority.pem").write_text(first + end)
        patch.setenv("SSL_CERT_FILE", str(base / "authority.pem"))
        yield
