"""`argosy serve` as a separate process, with a tiny model that answers by script."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # otherwise litellm fetches its price list on import
ROOT = Path(__file__).parents[2]
NUM_LONG = 1200  # tokens of the answer to "#long"; it ends earlier when its client hangs up


@dataclass(frozen=True)
class Server:
    url: str
    model: Path

    @contextmanager
    def preset(self, name: str, text: str) -> Iterator[None]:
        """A preset of the server's model."""
        path = self.model.parent / "data" / "argosy" / "presets" / f"{name}.toml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'model = "{self.model.resolve()}"\n{text}')
        try:
            yield
        finally:
            path.unlink()

    @property
    def num_new_tokens(self) -> int:
        text = httpx.get(f"{self.url}/metrics").text
        found = re.search(r"^argosy_new_tokens_total ([0-9.e+]+)$", text, re.MULTILINE)
        assert found is not None
        return int(float(found[1]))

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs or waits, and no block is held."""
        state = httpx.get(f"{self.url}/v1/engine/state").json()
        return (state["queue"]["running"], state["queue"]["waiting"], state["kv"]["blocks_used"]) == (0, 0, 0)

    def require_freed(self, num_before: int) -> None:
        """Require that the engine abandoned an answer of NUM_LONG tokens early.

        A token takes a millisecond or less, and a client in its own process needs about a hundred to hang up.
        """
        time.sleep(0.15)  # the engine publishes its state ten times a second
        deadline = time.monotonic() + 10
        while not self.is_idle:
            assert time.monotonic() < deadline, "what was cancelled still runs"
            time.sleep(0.02)
        assert self.num_new_tokens - num_before < NUM_LONG * 9 // 10


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    model = tmp_path_factory.mktemp("clients") / "tiny"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tests.serve.speaking", "serve", str(model)]
    command += ["--memory", "1GiB", "--port", str(port)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XDG_DATA_HOME": str(model.parent / "data")}
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(1200):
            assert process.poll() is None
            try:
                httpx.get(f"{url}/ready").raise_for_status()
                break
            except httpx.TransportError:
                time.sleep(0.05)
        yield Server(url, model)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
