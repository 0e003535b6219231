"""Workers for tests: in a thread, which is quick, or in a process of their own, which can be killed."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from argosy import Engine, SamplingParams
from argosy.checkpoint.shards import COPY_FILE
from argosy.cluster.group import Group
from argosy.cluster.worker import Worker, bind
from argosy.cluster.worker_plan import WorkerSettings
from argosy.experts.workers import WorkerStatus
from argosy.model.families import open_model
from tests.helpers.command import start_of
from tests.models.tiny import gpt_oss, prompt_ids, qwen3_moe

MIB, GIB = 1 << 20, 1 << 30
NUM_NEW = 10
GREEDY = SamplingParams(max_tokens=NUM_NEW, temperature=0, ignore_eos=True, logprobs=2)
SEEDED = SamplingParams(max_tokens=NUM_NEW, temperature=0.9, seed=5, ignore_eos=True, logprobs=2)
CONFIG = qwen3_moe(max_position_embeddings=1024, num_experts=16, num_experts_per_tok=4, hidden_size=72)
GPT_OSS = gpt_oss(  # experts with biases
    max_position_embeddings=1024, hidden_size=96, intermediate_size=64, num_local_experts=9,
    num_experts_per_tok=3, initial_context_length=1024,
    rope_scaling={"rope_type": "yarn", "factor": 8.0},
)  # fmt: skip
BLOCKS = qwen3_moe(  # rows are whole blocks
    max_position_embeddings=1024, hidden_size=256, moe_intermediate_size=256, num_attention_heads=4,
    num_key_value_heads=2, head_dim=64, num_hidden_layers=2, num_experts=8, num_experts_per_tok=3,
)  # fmt: skip
PROMPT = prompt_ids(CONFIG, 5, 37)
DRIVE = 1e9  # bytes per second; not measured, so that owners are the same in every run


@contextmanager
def worker_thread(model: Path, *, port: int = 0, **settings: Any) -> Iterator[tuple[str, Worker]]:
    """A worker in this process; yields its address."""
    settings = {
        "budget_bytes": 8 * GIB, "threads": 1, "readers": 1, "disk_bytes_per_s": DRIVE, "ask_ahead": "off",
    } | settings  # fmt: skip
    wanted = WorkerSettings(**settings)
    is_copy = ((model if model.is_dir() else model.parent) / COPY_FILE).exists()
    worker = Worker(open_model(model, shards=wanted.shards, is_copy=is_copy), wanted)
    listener = bind("127.0.0.1", port, has_key=True)
    address = f"127.0.0.1:{listener.getsockname()[1]}"
    thread = threading.Thread(target=worker.serve, args=(listener,))
    thread.start()
    wait_until(lambda: is_listening(address))
    try:
        yield address, worker
    finally:
        worker.drain()
        thread.join()
        worker.close()


def is_listening(address: str) -> bool:
    """Whether a port is open, without connecting: a worker would take that for a coordinator."""
    port = f":{int(address.rpartition(':')[2]):04X}"
    rows = Path("/proc/net/tcp").read_text().splitlines()[1:]
    return any(row.split()[1].endswith(port) and row.split()[3] == "0A" for row in rows)


class WorkerProcess:
    """`argosy worker` in a process; it can be killed, stopped, and started again at the same address.

    Args:
        is_awaited: whether `start` waits until it is ready. A worker that copies is not ready without a coordinator.
        is_fork: it starts sooner, but has imported most modules.
    """

    def __init__(
        self, model: Path, *options: str, port: int = 0, is_awaited: bool = True, is_fork: bool = True
    ) -> None:
        self._is_awaited = is_awaited
        self._start, command = start_of(is_fork=is_fork)
        self._command = [
            *command, "worker", str(model), "--memory", "1GiB", "--threads", "1", "--disk-rate", "1GB", *options
        ]  # fmt: skip
        self.process: subprocess.Popen[str]
        self.start(port)

    def start(self, port: int) -> None:
        self.process = self._start(
            [*self._command, "--bind", f"127.0.0.1:{port}"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "ARGOSY_ASK_AHEAD": "off"},
        )  # fmt: skip
        if not self._is_awaited:
            self.address = f"127.0.0.1:{port}"
            return
        assert self.process.stdout is not None
        self.said = self.process.stdout.readline()
        if not self.said.startswith("ready at"):
            assert self.process.stderr is not None
            raise AssertionError(self.said + self.process.stderr.read())
        self.address = self.said.split()[2].rstrip(":,")

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def restart(self) -> None:
        """Start it again where it was."""
        self.end()
        self.start(self.port)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self) -> int:
        with suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        self.process.communicate()
        return self.process.returncode


@contextmanager
def worker_process(model: Path, *options: str, **more: Any) -> Iterator[WorkerProcess]:
    worker = WorkerProcess(model, *options, **more)
    try:
        yield worker
    finally:
        worker.end()


def open_engine(model: Path, group: Group | None = None, **options: Any) -> Engine:
    settings: dict[str, Any] = {
        "memory": "8GiB", "threads": 1, "readers": 1, "ask_ahead": "off", "prefix_reuse": False,
    }  # fmt: skip
    return Engine.open(model, experts=group, **(settings | options))


def visible(result: Any) -> tuple[Any, ...]:
    return result.token_ids, result.logprobs, result.finish_reason


def answers(engine: Engine, prompt: list[int] = PROMPT) -> list[tuple[Any, ...]]:
    """A greedy and a seeded answer, with the log-probabilities of their tokens."""
    return [visible(engine.generate(prompt, params)) for params in (GREEDY, SEEDED)]


def status_of(group: Group, address: str) -> WorkerStatus:
    (found,) = (one for one in group.status() if one["host"] == address)
    return found


def wait_until(holds: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait for something that another thread or process does."""
    until = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > until:
            pytest.fail(f"it did not happen within {seconds:.0f} s")
        time.sleep(0.01)
