"""The `llm` command, with the settings that `argosy connect llm --write` gives it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.clients.conftest import Server

LLM = Path(sys.executable).with_name("llm")
WEATHER = """def get_weather(city: str, days: int = 1) -> str:
    "Weather of a city"
    return "#sunny"
"""


@pytest.fixture
def environment(server: Server, tmp_path: Path) -> dict[str, str]:
    environment = os.environ | {"LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none"}
    connect = [sys.executable, "-m", "argosy", "connect", "llm", "--url", server.url, "--write"]
    subprocess.run(connect, env=environment, capture_output=True, timeout=60, check=True)
    assert (tmp_path / "extra-openai-models.yaml").is_file()
    return environment


@pytest.fixture
def llm(environment: dict[str, str]) -> Callable[..., str]:
    def run(*arguments: str) -> str:
        command = [LLM, "-m", "argosy", "--no-log", *arguments]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


def test_plain_and_streamed(llm: Callable[..., str]) -> None:
    assert llm("#plain", "--no-stream") == llm("#plain") == "It is well, thank you."


@pytest.mark.parametrize("stream", [(), ("--no-stream",)])
def test_parallel_tools_are_called_and_their_results_are_accepted(
    llm: Callable[..., str], stream: tuple[str, ...]
) -> None:
    said = llm("#weather", "--functions", WEATHER, "--tools-debug", *stream)
    assert said.endswith("It is sunny in both.")


def test_a_schema_is_followed(llm: Callable[..., str]) -> None:
    assert json.loads(llm("#json", "--schema", "answer int", "--no-stream")) == {"answer": 42}


def test_interrupting_the_command_frees_the_engine(server: Server, environment: dict[str, str]) -> None:
    before = server.num_new_tokens
    command = [LLM, "-m", "argosy", "--no-log", "#long"]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read(20)
        process.send_signal(signal.SIGINT)
        process.stdout.close()
    server.require_freed(before)
