"""`argosy serve` as a process of its own."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from argosy.engine.engine import Engine
from argosy.prompt.replay import ReplayMemory
from tests.cli.tiny_chat_model import write_chat_model


def test_a_served_model_answers_and_sigterm_lets_a_stream_end_first(tmp_path: Path) -> None:
    model = write_chat_model(tmp_path / "model")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "argosy", "serve", str(model), "--memory", "1GiB", "--port", str(port),
        "--max-sequences", "3",
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(600):
            try:
                assert httpx.get(f"{url}/ready").status_code == 200
                break
            except httpx.TransportError:
                assert process.poll() is None
                time.sleep(0.05)
        assert httpx.get(f"{url}/v1/engine/state").json()["queue"]["max_sequences"] == 3
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
        timer = threading.Timer(30, process.kill)
        timer.start()
        log = process.communicate()[1]
        timer.cancel()
        assert process.returncode == 0
        assert "POST /v1/chat/completions 200" in log
        assert "canary" not in log
    finally:
        process.kill()
        process.wait()


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
