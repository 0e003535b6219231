"""A wait for the workers that Ray starts shows what it waits for, and ends when they cannot start; without Ray."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from argosy.cluster import ray_control
from argosy.cluster.ray_control import RESOURCE, SAID_S, NoWorkers, RayWorkers, WorkerKeeper, _Node, _Telling

PATIENCE_S = 20.0
State = tuple[str, str, int, int, int]
STARTING: State = ("", "", 1, 0, 0)


def ready(port: int) -> State:
    return (f"10.0.0.{port}:7070", "", 1, 4711, 0)


def failed(times: int) -> State:
    return ("", f"reading\nerror: there is no model \x1b[2J{'x' * 30}\n", times + 1, 0, times)


class FakeRay:
    """Nodes whose actors have the states that a test sets; a call of an actor is its node's name."""

    exceptions = SimpleNamespace(RayError=RuntimeError)

    def __init__(self, **states: State) -> None:
        self.states = states
        self.killed: list[str] = []

    def is_initialized(self) -> bool:
        return True

    def nodes(self) -> list[dict[str, Any]]:
        return [
            {"NodeID": name, "Alive": True, "Resources": {RESOURCE: 1.0}, "NodeManagerAddress": f"at-{name}"}
            for name in self.states
        ]

    def wait(self, calls: list[str], timeout: float) -> tuple[list[str], list[str]]:
        return calls, []

    def get(self, call: str) -> State:
        return self.states[call]

    def kill(self, actor: Any) -> None:
        self.killed.append(actor.state.remote())


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Callable[..., RayWorkers]:
    def open_workers(ray: FakeRay, **options: Any) -> RayWorkers:
        monkeypatch.setattr(ray_control, "_LOOK_S", 0.005)
        monkeypatch.setattr(ray_control, "_import_ray", lambda: ray)
        actor = lambda self, name: SimpleNamespace(state=SimpleNamespace(remote=lambda: name))  # noqa: E731
        monkeypatch.setattr(RayWorkers, "_actor_on", actor)
        return RayWorkers(["model"], **options)

    return open_workers


def test_a_wait_for_workers_says_at_once_how_many_are_ready_and_again_when_that_changes(
    opened: Callable[..., RayWorkers],
) -> None:
    ray = FakeRay(one=STARTING, two=STARTING)
    told: list[str] = []

    def tell(text: str) -> None:
        told.append(text)
        if text == "waiting for workers: 0 of 2 nodes ready":
            ray.states["one"] = ready(1)
        elif text == "waiting for workers: 1 of 2 nodes ready":
            ray.states["two"] = ready(2)

    with opened(FakeRay()) as workers, pytest.raises(NoWorkers, match="no worker is ready"):
        workers.hosts(timeout_s=0.05, tell=told.append)
    assert told == [f"waiting for workers: no node has {RESOURCE} yet"]
    told.clear()
    with opened(ray, num_workers=2) as workers:
        assert sorted(workers.hosts(timeout_s=PATIENCE_S, tell=tell)) == ["10.0.0.1:7070", "10.0.0.2:7070"]
    assert told == [f"waiting for workers: {count} of 2 nodes ready" for count in (0, 1)]
    assert sorted(ray.killed) == ["one", "two"]


def test_a_worker_that_does_not_start_is_told_with_its_last_words_and_after_three_starts_the_wait_ends(
    opened: Callable[..., RayWorkers],
) -> None:
    ray = FakeRay(one=ready(1), two=failed(1))
    told: list[str] = []

    def tell(text: str) -> None:
        told.append(text)
        if "did not start" in text:
            ray.states["two"] = failed(3)

    words = "  reading\n  error: there is no model \N{REPLACEMENT CHARACTER}[2J" + "x" * 30
    with (
        opened(ray) as workers,
        pytest.raises(NoWorkers, match="did not start, 3 times in a row") as refused,
    ):
        workers.hosts(timeout_s=PATIENCE_S, tell=tell)
    assert [text for text in told if "did not start" in text] == [
        f"the worker on node two (at-two) did not start:\n{words}"
    ]
    assert words in refused.value.message
    assert refused.value.hint is not None
    assert "`ray start`" in refused.value.hint


def test_a_worker_that_is_not_needed_may_fail(opened: Callable[..., RayWorkers]) -> None:
    ray = FakeRay(one=failed(7), two=STARTING)

    def tell(text: str) -> None:
        if "did not start" in text:
            ray.states["two"] = ready(2)

    with opened(ray, num_workers=1) as workers:
        assert workers.hosts(timeout_s=PATIENCE_S, tell=tell) == ["10.0.0.2:7070"]


def test_a_wait_is_told_again_every_minute() -> None:
    now, told = [0.0], list[str]()
    telling = _Telling(told.append, lambda: now[0])
    node = _Node("one", None, num_failed=1, fault="x\n" * 5000)
    for second in range(int(3 * SAID_S)):
        now[0] = float(second)
        telling.look([node], 0, 1)
    assert told[0] == "the worker on node one did not start:\n" + "\n".join(["  x"] * 8)
    assert told[1:] == ["waiting for workers: 0 of 1 nodes ready"] * 3


def test_a_keeper_counts_starts_that_fail_until_one_succeeds(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[State] = []
    is_over = threading.Event()

    def launch(arguments: Any, key: bytes, on_ready: Callable[[str], None]) -> Any:
        seen.append(keeper[0].state())
        if len(seen) == 3:
            on_ready("10.0.0.1:7070")
            return SimpleNamespace(wait=lambda: 9, poll=lambda: None, pid=1)
        if len(seen) == 5:
            is_over.set()
            raise SystemExit  # ends the keeper's thread
        raise RuntimeError("no model")

    monkeypatch.setattr(ray_control, "launch", launch)
    monkeypatch.setattr(WorkerKeeper, "where", lambda _: "10.0.0.1")
    monkeypatch.setattr(ray_control.time, "sleep", lambda _: None)
    keeper: list[WorkerKeeper] = []
    start = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", lambda _: None)
    keeper.append(WorkerKeeper(["model"], b""))
    monkeypatch.setattr(threading.Thread, "start", start)

    def keep() -> None:
        with suppress(SystemExit):
            keeper[0]._keep()

    threading.Thread(target=keep, daemon=True).start()
    assert is_over.wait(PATIENCE_S)
    assert [num_failed for *_, num_failed in seen] == [0, 1, 2, 0, 1]
    assert seen[1][1] == "no model"


WAITING = """
from argosy.cluster import ray_control
from tests.cluster.test_ray_control import STARTING, FakeRay, RayWorkers, SimpleNamespace
ray = FakeRay(one=STARTING, two=STARTING)
ray_control._import_ray = lambda: ray
RayWorkers._actor_on = lambda self, name: SimpleNamespace(state=SimpleNamespace(remote=lambda: name))
try:
    with RayWorkers(["model"]) as workers:
        workers.hosts(tell=lambda text: print(text, flush=True))
finally:
    print("ended", ray.killed, flush=True)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 128 + 15), (signal.SIGINT, -2)])
def test_a_wait_that_a_signal_ends_ends_its_actors(number: signal.Signals, code: int) -> None:
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    with process:
        line = ""
        while "0 of 2" not in line:
            line = process.stdout.readline()
            assert line
        process.send_signal(number)
        assert "ended ['one', 'two']" in process.stdout.read()
    assert process.returncode == code
