"""Workers that Ray finds and starts: three raylets on this machine, two with a worker and one to spare."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from argosy import Engine
from argosy.cluster.group import Group
from argosy.cluster.ray_control import NoWorkers, RayWorkers, launch
from tests.cluster.rigs import CONFIG, GREEDY, PROMPT, answers, open_engine, visible, wait_until
from tests.models.tiny import write_model
from tests.on_ray.conftest import add_node

# Ray's own files and sockets are not closed before the interpreter ends.
pytestmark = pytest.mark.filterwarnings("ignore")

KEY = b"a key of the tests, thirty-two bytes"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ray") / "model"
    write_model(folder, CONFIG, seed=3)
    return folder


@dataclass
class Running:
    workers: RayWorkers
    group: Group
    engine: Engine

    def states(self) -> dict[str, str]:
        return {one["host"]: one["state"] for one in self.group.status()}

    def ready(self) -> set[str]:
        return {host for host, state in self.states().items() if state == "ready"}

    def pid(self, host: str) -> int:
        """The process of a worker; 0 while there is none."""
        (node,) = [node for node in self.workers._nodes.values() if node.last_host == host]
        return int(ray.get(node.actor.state.remote())[3])


@pytest.fixture(scope="module")
def running(cluster: Cluster, model: Path) -> Iterator[Running]:
    arguments = [str(model), "--memory", "1GiB", "--threads", "1", "--disk-rate", "1GB"]
    with (
        RayWorkers(arguments, key=KEY, num_workers=2) as workers,
        Group(workers.hosts(timeout_s=60), key=KEY, local=False, disk_bytes_per_s=1e9) as group,
    ):
        workers.follow(group)
        with open_engine(model, group) as engine:
            yield Running(workers, group, engine)


@pytest.fixture(scope="module")
def expected(model: Path) -> list[Any]:
    with open_engine(model) as engine:
        return answers(engine)


def test_workers_of_a_ray_cluster_give_the_tokens_of_one_machine(
    running: Running, expected: list[Any]
) -> None:
    assert len(running.ready()) == 2
    assert answers(running.engine) == expected


def test_no_token_costs_a_call_of_ray(running: Running, expected: list[Any]) -> None:
    calls: list[str] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and f"{os.sep}ray{os.sep}" in frame.f_code.co_filename:
            calls.append(frame.f_code.co_qualname)

    sys.setprofile(note)
    try:
        ray.is_initialized()  # so the check below can fail
        num_before = len(calls)
        found = answers(running.engine)
    finally:
        sys.setprofile(None)
    assert num_before >= 1
    assert len(calls) == num_before
    assert found == expected


def test_the_key_is_no_argument_and_no_file(running: Running) -> None:
    for host in running.ready():
        process = Path(f"/proc/{running.pid(host)}")
        assert KEY not in (process / "cmdline").read_bytes()
        assert KEY not in (process / "environ").read_bytes()
        assert b"--key-file\0/proc/self/fd/" in (process / "cmdline").read_bytes()


def during(act: Callable[[], None]) -> Callable[[], None]:
    """Do something while an answer is computed; returns what waits for it."""
    thread = threading.Thread(target=act)
    thread.start()
    return thread.join


def test_a_killed_worker_is_started_again_at_its_address(running: Running, expected: list[Any]) -> None:
    host = sorted(running.ready())[0]
    was = running.pid(host)
    join = during(lambda: os.kill(was, signal.SIGKILL))
    assert answers(running.engine) == expected
    join()
    wait_until(lambda: running.pid(host) not in (0, was) and host in running.ready())
    assert answers(running.engine) == expected


def test_a_spare_node_takes_over_from_one_that_dies(
    running: Running, cluster: Cluster, expected: list[Any], record_property: Callable[[str, object], None]
) -> None:
    before = running.ready()
    victim = sorted(before)[0]
    (name,) = [node.id for node in running.workers._nodes.values() if node.last_host == victim]
    (node,) = [node for node in cluster.worker_nodes if node.node_id == name]
    began = time.monotonic()
    join = during(lambda: cluster.remove_node(node, allow_graceful=False))
    tokens = []
    while len(running.ready() - before) == 0:
        tokens.append(visible(running.engine.generate(PROMPT, GREEDY)))
        assert time.monotonic() - began < 60
    seconds = time.monotonic() - began
    join()
    assert tokens
    assert all(found == expected[0] for found in tokens)  # no answer failed or changed meanwhile
    assert running.engine.generate(PROMPT, GREEDY)
    wait_until(lambda: victim not in running.ready())
    record_property("replacement_s", round(seconds, 2))
    print(f"a spare worker serves {seconds:.2f} s after the node died")
    wait_until(lambda: running.states()[victim] == "draining")
    add_node(cluster)  # the next one to spare
    wait_until(lambda: sum(bool(node.host) for node in running.workers._nodes.values()) == 3)
    assert len(running.ready()) == 2


def test_a_cluster_without_nodes_for_workers_says_how_to_start_one(cluster: Cluster) -> None:
    with (
        RayWorkers(["model"], key=KEY) as workers,
        pytest.raises(NoWorkers, match="no worker is ready") as refused,
    ):
        workers.hosts(timeout_s=0.5)
    assert "ray start" in str(refused.value)


def test_a_worker_that_cannot_start_says_why() -> None:
    with pytest.raises(RuntimeError, match="nowhere"):
        launch(["/nowhere/model", "--bind", "127.0.0.1:0"], KEY, lambda address: None)
