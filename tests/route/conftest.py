"""Tiny servers as processes, which may be killed and started again, and routers in front of them."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

import httpx
import pytest

from argosy.guard.keys import KeyRing
from argosy.route.app import make_router
from argosy.route.servers import Fleet, Health
from argosy.route.upstream import parse_address
from argosy.serve.http.listen import bind
from argosy.serve.http.server import WokenServer, uvicorn_config
from tests.cli.tiny_chat_model import write_chat_model
from tests.helpers.forks import FORKS


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class RealServer:
    """`argosy serve` in a process of its own."""

    model: Path
    port: int = field(default_factory=free_port)
    options: Sequence[str] = ()
    process: BaseProcess | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, and return once it is ready."""
        from tests.route.serving import main

        args = [
            "serve", str(self.model), "--memory", "1GiB", "--port", str(self.port), "--name", "tiny", "--threads",
            "1", *self.options,
        ]  # fmt: skip
        self.process = FORKS.Process(target=main, args=(args,), daemon=True)
        self.process.start()
        for _ in range(1200):
            with suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/ready").status_code == 200:
                    return
            assert self.process.is_alive()
            time.sleep(0.02)
        raise AssertionError("the server does not start")

    def kill(self, number: int = signal.SIGKILL) -> None:
        assert self.process is not None
        assert self.process.pid is not None
        if self.process.is_alive():
            os.kill(self.process.pid, number)
        if number == signal.SIGKILL:
            self.process.join()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("route") / "model", context_tokens=1024)


@pytest.fixture(scope="module")
def servers(model: Path) -> Iterator[list[RealServer]]:
    """Two real servers; a test that kills one starts it again."""
    both = [RealServer(model), RealServer(model)]
    starts = [threading.Thread(target=server.start) for server in both]
    for start in starts:
        start.start()
    for start in starts:
        start.join()
    yield both
    for server in both:
        server.kill()


@dataclass
class RunningRouter:
    url: str
    fleet: Fleet

    def state(self, server: RealServer) -> str:
        return next(one.state for one in self.fleet.servers if str(one.address) == server.url)

    def until(self, server: RealServer, state: str) -> None:
        for _ in range(1000):
            if self.state(server) == state:
                return
            time.sleep(0.01)
        raise AssertionError(f"{server.url} is {self.state(server)}, not {state}")

    def until_idle(self) -> None:
        """Wait until no server owes an answer: a client has its last event before the router has closed."""
        for _ in range(1000):
            if not any(server.replies for server in self.fleet.servers):
                return
            time.sleep(0.01)
        raise AssertionError("a server still owes an answer")

    def client(self, **options: object) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, **options)  # type: ignore[arg-type]


@contextmanager
def routing(urls: Sequence[str], *, health: Health | None = None) -> Iterator[RunningRouter]:
    """A router in a thread of this process."""
    health = health or Health(period_s=0.1, timeout_s=1.0)
    fleet = Fleet([parse_address(url) for url in urls], health)

    class Server(WokenServer):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await fleet.preload()
            await super().startup(sockets)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            await super().shutdown(sockets)
            await fleet.close()

    server = Server(uvicorn_config(make_router(fleet, KeyRing(None)), grace_s=5))
    with bind("127.0.0.1", 0) as sockets:
        port = sockets[0].getsockname()[1]
        thread = threading.Thread(target=server.run, args=[sockets])
        thread.start()
        while not server.started:
            time.sleep(0.001)
        try:
            yield RunningRouter(f"http://127.0.0.1:{port}", fleet)
        finally:
            server.end()
            thread.join()


@pytest.fixture(scope="module")
def module_router(servers: list[RealServer]) -> Iterator[RunningRouter]:
    with routing([server.url for server in servers]) as router:
        yield router
