"""The `llm` command, with the server configured as one of its OpenAI-compatible models."""

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
MODEL = """- model_id: tiny
  model_name: tiny
  api_base: "{url}/v1"
  can_stream: true
  supports_tools: true
  supports_schema: true
"""
WEATHER = """def get_weather(city: str, days: int = 1) -> str:
    "Weather of a city"
    return "#sunny"
"""


@pytest.fixture
def environment(server: Server, tmp_path: Path) -> dict[str, str]:
    (tmp_path / "extra-openai-models.yaml").write_text(MODEL.format(url=server.url))
    return os.environ | {"LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none"}


@pytest.fixture
def llm(environment: dict[str, str]) -> Callable[..., str]:
    def run(*arguments: str) -> str:
        command = [LLM, "-m", "tiny", "--no-log", *arguments]
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
    command = [LLM, "-m", "tiny", "--no-log", "#long"]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read(20)
        process.send_signal(signal.SIGINT)
        process.stdout.close()
    server.require_freed(before)
