"""Real agents and a server in a network namespace with only a loopback device: neither can reach anything else.

    unshare (network, user)  ->  argosy serve, with a speaking model  <-  nsenter: an agent with an empty environment

An agent gets its own home and working directory, only the variables that the test names, and the settings that
`argosy connect --write` makes. Elsewhere: the model is `tests/serve/speaking.py`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.clients.conftest import ROOT

CLIENTS = ROOT / "build" / "clients"
MODULES = CLIENTS / "node_modules"
# The programs that npm's packages would start; they are installed without running their scripts.
PROGRAMS = {
    "aider": CLIENTS / "aider/bin/aider",
    "claude": MODULES / "@anthropic-ai/claude-code-linux-x64/claude",
    "codex": MODULES / "@openai/codex-linux-x64/vendor/x86_64-unknown-linux-musl/bin/codex",
    "opencode": MODULES / "opencode-linux-x64-baseline/bin/opencode",
}
PORT = 8080  # always free: the namespace holds nothing else
URL = f"http://127.0.0.1:{PORT}"
_NAMESPACE = ["unshare", "--user", "--map-root-user", "--net"]


def require_program(name: str) -> Path:
    """Return the path of an agent, or skip the test."""
    path = PROGRAMS[name]
    if not path.is_file():
        pytest.skip(
            f"{name} is not installed; `make test-clients` does that (aider: Python 3.12 at most; others: npm)"
        )
    return path


def require_namespaces() -> None:
    command = [*_NAMESPACE, "ip", "link", "set", "lo", "up"]
    if shutil.which("ip") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("network namespaces are not allowed here, or `ip` (iproute2) is missing")


@dataclass(frozen=True)
class Done:
    """The exit status and the output of a program."""

    status: int
    stdout: str
    stderr: str

    def events(self) -> list[dict[str, object]]:
        """The lines of stdout that are JSON objects."""
        lines = (line for line in self.stdout.splitlines() if line.startswith("{"))
        return [json.loads(line) for line in lines]


@dataclass(frozen=True)
class Loopback:
    """A running server, and how to start programs in its namespace."""

    pid: int
    log: Path

    def run(
        self, command: Sequence[str | Path], *, home: Path, work: Path, timeout_s: float = 300,
        variables: Mapping[str, str] | None = None,
    ) -> Done:  # fmt: skip
        """Run a program in the server's namespace, with a minimal environment plus `variables`."""
        environment = {
            "HOME": str(home), "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "TERM": "dumb", **(variables or {}),
        }  # fmt: skip
        enter = ["nsenter", f"--target={self.pid}", "--user", "--net", "--preserve-credentials"]
        done = subprocess.run(
            [*enter, *command], cwd=work, env=environment, stdin=subprocess.DEVNULL, capture_output=True,
            text=True, timeout=timeout_s, check=False,
        )  # fmt: skip
        return Done(done.returncode, done.stdout, done.stderr)

    def connect(self, client: str, *, home: Path, work: Path) -> None:
        """Write a client's settings as a user would."""
        command = [sys.executable, "-m", "argosy", "connect", client, "--url", URL, "--write"]
        done = self.run(command, home=home, work=work)
        assert done.status == 0, done.stderr

    def answered(self, route: str) -> list[int]:
        """Statuses of the requests to `route` so far."""
        time.sleep(0.2)  # a separate thread writes the log
        return [int(found) for found in re.findall(rf"POST {route} (\d+) ", self.log.read_text())]


@contextmanager
def served(directory: Path, scripts: Mapping[str, object], *arguments: str) -> Iterator[Loopback]:
    """Run `argosy serve` with a speaking model in its own network namespace."""
    require_namespaces()
    directory.mkdir(exist_ok=True)
    (directory / "scripts.json").write_text(json.dumps(scripts))
    log = directory / "server.log"
    serve = [sys.executable, "-m", "tests.serve.speaking", "serve", str(directory / "tiny")]
    serve += ["--port", str(PORT), "--memory", "3GiB", *arguments]
    command = [*_NAMESPACE, "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *serve]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "SPEAKING_SCRIPTS": str(directory / "scripts.json")}
    with log.open("w") as stderr:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=stderr)
    try:
        deadline = time.monotonic() + 120
        while "serving tiny at" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, "the server does not start"
            time.sleep(0.1)
        yield Loopback(process.pid, log)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
