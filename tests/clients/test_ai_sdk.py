"""The Vercel AI SDK in node, with `@ai-sdk/openai-compatible` and `@ai-sdk/openai`, which uses Responses by default."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.clients.conftest import ROOT, Server

FOLDER = ROOT / "build" / "clients"
SCRIPTS = Path(__file__).parent / "node"


def converse(script: str, url: str, *, package: str = "ai") -> dict[str, Any]:
    """Run a conversation in node with a package of npm; return the facts that it prints last."""
    if shutil.which("node") is None:
        pytest.skip(f"node is not there, so the package {package} cannot run")
    if not (FOLDER / "node_modules" / package).is_dir():
        pytest.skip(f"{package} is not installed; `make test-clients` does that where npm is there")
    shutil.copy(SCRIPTS / script, FOLDER)  # node looks for modules beside the script
    command = ["node", FOLDER / script, url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    made: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return made


@pytest.fixture(scope="module")
def found(server: Server) -> dict[str, Any]:
    before = server.num_new_tokens
    made = converse("conversation.mjs", server.url)
    server.require_freed(before + 300)  # 300 for the turns before the abandoned one
    return made


def test_plain_and_streamed(found: dict[str, Any]) -> None:
    plain, streamed = found["plain"], found["streamed"]
    assert plain["text"] == "".join(streamed["deltas"]) == "It is well."
    assert plain["reasoning"] == streamed["reasoning"] == "Let me see."
    assert plain["usage"]["outputTokens"] == streamed["usage"]["outputTokens"] > 0
    assert plain["usage"]["outputTokenDetails"]["reasoningTokens"] > 0


def test_parallel_tool_calls_are_streamed_and_their_results_are_accepted(found: dict[str, Any]) -> None:
    assert found["tools"] == {
        "calls": [["get_weather", {"city": "Oslo"}], ["get_weather", {"city": "Rome", "days": 2}]],
        "texts": ["Let me look.", "It is sunny in both."],
        "reasons": ["tool-calls", "stop"],
    }


def test_a_schema_is_parsed(found: dict[str, Any]) -> None:
    assert found["schema"] == {"answer": 42}


def test_leaving_a_stream_frees_the_engine(found: dict[str, Any]) -> None:
    assert 5 <= found["cancelled"] < 400  # the fixture has also seen the engine idle


def test_earlier_answers_sent_back_as_references_are_found(server: Server) -> None:
    made = converse("responses.mjs", server.url)
    assert made["calls"] == [["get_weather", {"city": "Oslo"}], ["get_weather", {"city": "Rome", "days": 2}]]
    assert made["texts"] == ["It is sunny in both.", "It is well, thank you."]
    assert "item_reference" in made["sent"][-1]  # otherwise the SDK has changed and this test proves nothing
