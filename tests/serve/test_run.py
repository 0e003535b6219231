"""`argosy serve` as a process of its own."""

from __future__ import annotations

import fcntl
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from argosy.engine.engine import Engine
from argosy.guard.keys import KeyFile
from argosy.prompt.replay import ReplayMemory
from tests.cli.tiny_chat_model import write_chat_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("run") / "model")


@contextmanager
def served(model: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The address of a server that is ready, and its process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "argosy", "serve", str(model), "--memory", "1GiB", "--port", str(port),
        "--max-sequences", "3",
    ]  # fmt: skip
    process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True)
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(600):
            try:
                assert httpx.get(f"{url}/ready").status_code == 200
                break
            except httpx.TransportError:
                assert process.poll() is None
                time.sleep(0.05)
        yield url, process
    finally:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def end(process: subprocess.Popen[str]) -> str:
    """What a process logged until it ended."""
    timer = threading.Timer(30, process.kill)
    timer.start()
    log = process.communicate()[1]
    timer.cancel()
    return log


def test_a_served_model_answers_and_sigterm_lets_a_stream_end_first(model: Path) -> None:
    with served(model) as (url, process):
        state = httpx.get(f"{url}/v1/engine/state").json()
        assert state["queue"]["max_sequences"] == 3
        assert ("replay", 16 << 20) in [(line["name"], line["bytes"]) for line in state["memory"]["lines"]]
        ask = {
            "messages": [{"role": "user", "content": "canary"}], "max_tokens": 150, "stream": True,
            "temperature": 0, "logit_bias": {"2": -100, "0": -100},
        }  # fmt: skip
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=ask, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2][6:])["choices"][0]["finish_reason"] in ("stop", "length")
        log = end(process)
        assert process.returncode == 0
        assert "POST /v1/chat/completions 200" in log
        assert "canary" not in log


def test_a_server_whose_log_nobody_reads_answers_and_ends(model: Path) -> None:
    with served(model) as (url, process):
        assert process.stderr is not None
        size = fcntl.fcntl(process.stderr, fcntl.F_SETPIPE_SZ, 4096)
        with httpx.Client(timeout=20) as client:
            for _ in range(size // 40):  # a line has more
                assert client.get(f"{url}/health").status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def test_conversations_are_rendered_by_the_process_that_came_with_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise AssertionError(
            "another process for chat templates is started, which the memory plan does not count"
        )

    with Engine(write_chat_model(tmp_path / "model"), memory="1GiB", threads=1) as engine:
        monkeypatch.setattr("argosy.prompt.chat.Worker", refuse)
        prompts = engine.prompts.remembering(ReplayMemory())
        assert prompts.build([{"role": "user", "content": "hi"}], tenant="a").token_ids
        assert engine.prompts.build([{"role": "user", "content": "hi"}]).token_ids


def test_a_restart_gives_no_quota_again_and_a_revoked_key_ends_and_leaves_no_file(
    model: Path, tmp_path: Path
) -> None:
    keys = KeyFile(tmp_path / "keys.json")
    headers = {}
    for name in ("spent", "revoked", "revoked meanwhile"):
        headers[name] = {"Authorization": f"Bearer {keys.add(name, tokens_per_day=20)[1]}"}

    def ask(url: str, name: str) -> int:
        body = {"prompt": name * 6, "max_tokens": 8}
        return httpx.post(f"{url}/v1/completions", json=body, headers=headers[name]).status_code

    def num_tenants() -> int:
        return len({path.parent for path in tmp_path.glob("kv/*/*.kv")})

    def wait_for(num: int) -> None:
        for _ in range(300):
            if num_tenants() == num:
                return
            time.sleep(0.02)
        raise AssertionError(f"{num_tenants()} tenants have files, expected {num}")

    options = ("--keys", str(keys.path), "--kv-dir", str(tmp_path / "kv"))
    with served(model, *options) as (url, process):
        assert [ask(url, name) for name in headers] == [200, 200, 200]
        wait_for(3)
        subprocess.run(
            [sys.executable, "-m", "argosy", "keys", "revoke", "revoked", "--keys", keys.path], check=True
        )
        wait_for(2)
        assert ask(url, "revoked") == 401
        process.send_signal(signal.SIGTERM)
        assert "is revoked" in end(process)
    keys.revoke("revoked meanwhile")
    with served(model, *options) as (url, _):
        assert [ask(url, name) for name in headers] == [429, 401, 401]
        wait_for(1)
