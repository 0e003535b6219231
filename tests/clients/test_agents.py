"""Claude Code, Codex, opencode and aider as users install them: each answers, works, survives known session killers.

Every test is one or two turns of the real program, isolated with a server in one namespace (`loopback.py`).
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.clients.loopback import URL, Done, Loopback, require_program, served
from tests.serve.speaking import call

CONTEXT_TOKENS = 131_072
# Claude Code's own prompt has 41,000 tokens with the tests' tokenizer; these options leave a few hundred, and one tool.
BRIEF = ("--system-prompt", "Be brief.", "--tools", "Read", "--setting-sources", "user")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a note and a picture to read."""
    directory = tmp_path_factory.mktemp("project")
    (directory / "note.txt").write_text("The harbour opens at nine.\n")
    (directory / "picture.png").write_bytes(_png())
    return directory


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, project: Path) -> Iterator[Loopback]:
    note, picture = (json.dumps(str(project / name)) for name in ("note.txt", "picture.png"))
    scripts = {
        "#claude-note": [call("Read", f'{{"file_path": {note}}}'), "At nine."],
        "#claude-picture": [call("Read", f'{{"file_path": {picture}}}'), "I cannot see it."],
        "#codex-note": [call("exec_command", f'{{"cmd": "cat {project}/note.txt"}}'), "At nine."],
        "#opencode-note": [call("read", f'{{"filePath": {note}}}'), "At nine."],
        "#aider-note": "note.txt\n```\nThe harbour opens at ten.\n```\n",
    }
    directory = tmp_path_factory.mktemp("server")
    with served(directory, scripts, "--context", str(CONTEXT_TOKENS)) as loopback:
        yield loopback


@pytest.fixture(scope="module")
def small_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    """A model with less context than any agent's first prompt."""
    with served(tmp_path_factory.mktemp("small"), {}, "--context", "1024") as loopback:
        yield loopback


@pytest.fixture
def home(tmp_path: Path) -> Path:
    made = tmp_path / "home"
    made.mkdir()
    return made


class Agent:
    """An agent configured as a user would configure it.

    PROGRAM is its key in `loopback.PROGRAMS`, CLIENT its name for `argosy connect`.
    """

    PROGRAM: str
    CLIENT: str

    def __init__(self, server: Loopback, home: Path, project: Path) -> None:
        self._server, self._home, self._project = server, home, project
        self._program = require_program(self.PROGRAM)
        server.connect(self.CLIENT, home=home, work=project)


class Claude(Agent):
    PROGRAM, CLIENT = "claude", "claude-code"

    def ask(self, text: str, *options: str, **variables: str) -> dict[str, Any]:
        done = self.run(text, *options, **variables)
        result: dict[str, Any] = json.loads(done.stdout)
        return result

    def run(self, text: str, *options: str, **variables: str) -> Done:
        command = [self._program, "-p", text, "--output-format", "json", *options]
        settings = {"DISABLE_TELEMETRY": "1", "DISABLE_AUTOUPDATER": "1", **variables}
        return self._server.run(command, home=self._home, work=self._project, variables=settings)


@pytest.fixture
def claude(server: Loopback, home: Path, project: Path) -> Claude:
    return Claude(server, home, project)


def test_claude_code_answers_with_its_own_prompt_and_tools(claude: Claude) -> None:
    result = claude.ask("#plain")
    assert (result["result"], result["is_error"]) == ("It is well, thank you.", False)
    assert result["usage"]["output_tokens"] > 0


def test_claude_code_reads_a_file_and_continues(claude: Claude) -> None:
    result = claude.ask("#claude-note", *BRIEF)
    assert (result["result"], result["is_error"], result["num_turns"]) == ("At nine.", False, 2)


def test_a_picture_read_by_a_tool_does_not_end_a_claude_code_session(claude: Claude) -> None:
    first = claude.ask("#claude-picture", *BRIEF)
    assert (first["result"], first["is_error"]) == ("I cannot see it.", False)
    later = claude.ask("#plain", *BRIEF, "--continue")
    assert (later["result"], later["is_error"]) == ("It is well, thank you.", False)


def test_claude_code_recognizes_the_error_for_too_long_a_prompt(
    small_server: Loopback, home: Path, project: Path
) -> None:
    result = Claude(small_server, home, project).ask("#plain", *BRIEF)
    assert result["is_error"]
    assert result["result"].startswith("Prompt is too long")


def test_claude_code_does_not_retry_a_wrong_key(
    tmp_path_factory: pytest.TempPathFactory, home: Path, project: Path
) -> None:
    directory = tmp_path_factory.mktemp("keys")
    keys = directory / "keys.json"
    keys.write_text('{"version": 1, "keys": []}')
    keys.chmod(0o600)
    with served(directory, {}, "--keys", str(keys)) as loopback:
        program = require_program("claude")
        done = loopback.run(
            [program, "-p", "#plain", "--model", "tiny", "--output-format", "json", *BRIEF],
            home=home, work=project, timeout_s=60,
            variables={"ANTHROPIC_BASE_URL": URL, "ANTHROPIC_AUTH_TOKEN": "ak-wrong"},
        )  # fmt: skip
        assert json.loads(done.stdout)["api_error_status"] == 401
        assert loopback.answered("/v1/messages") == [401]


class Codex(Agent):
    PROGRAM, CLIENT = "codex", "codex"

    def ask(self, text: str) -> list[dict[str, Any]]:
        """The events of one turn."""
        # The command that the script runs reads one file, in a namespace without a network.
        command = [self._program, "exec", "--json", "--skip-git-repo-check"]
        command += ["--dangerously-bypass-approvals-and-sandbox", text]
        done = self._server.run(command, home=self._home, work=self._project)
        found: list[dict[str, Any]] = done.events()
        return found


def _items(events: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    items = [event["item"] for event in events if event["type"] == "item.completed"]
    return [item for item in items if item["type"] == kind]


def test_codex_answers(server: Loopback, home: Path, project: Path) -> None:
    events = Codex(server, home, project).ask("#plain")
    assert [item["text"] for item in _items(events, "agent_message")] == ["It is well, thank you."]
    assert events[-1]["type"] == "turn.completed"


def test_codex_runs_a_command_and_continues(server: Loopback, home: Path, project: Path) -> None:
    events = Codex(server, home, project).ask("#codex-note")
    [command] = _items(events, "command_execution")
    assert command["aggregated_output"] == "The harbour opens at nine.\n"
    assert _items(events, "agent_message")[-1]["text"] == "At nine."


def test_codex_recognizes_the_error_for_too_long_a_prompt(
    small_server: Loopback, home: Path, project: Path
) -> None:
    events = Codex(small_server, home, project).ask("#plain")
    assert events[-1]["type"] == "turn.failed"
    assert "context window" in events[-1]["error"]["message"]


class OpenCode(Agent):
    PROGRAM, CLIENT = "opencode", "opencode"

    def ask(self, text: str) -> list[dict[str, Any]]:
        """The parts of one turn."""
        command = [self._program, "run", "--format", "json", text]
        done = self._server.run(command, home=self._home, work=self._project)
        return [event["part"] for event in done.events() if "part" in event]  # type: ignore[misc]


def test_opencode_answers(server: Loopback, home: Path, project: Path) -> None:
    parts = OpenCode(server, home, project).ask("#plain")
    assert [part["text"] for part in parts if part["type"] == "text"] == ["It is well, thank you."]


def test_opencode_reads_a_file_and_continues(server: Loopback, home: Path, project: Path) -> None:
    parts = OpenCode(server, home, project).ask("#opencode-note")
    [used] = [part for part in parts if part["type"] == "tool"]
    assert (used["tool"], used["state"]["status"]) == ("read", "completed")
    assert "The harbour opens at nine." in used["state"]["output"]
    assert [part["text"] for part in parts if part["type"] == "text"] == ["At nine."]


class Aider(Agent):
    PROGRAM, CLIENT = "aider", "aider"

    def ask(self, text: str, *files: str) -> Done:
        """One turn. aider uses no tools: it puts whole files into its prompt, and the answer has whole files."""
        command = [self._program, "--env-file", "aider.env", "--message", text, "--yes-always", "--no-git"]
        command += ["--no-check-update", "--analytics-disable", "--no-pretty", *files]
        return self._server.run(command, home=self._home, work=self._project)


@pytest.mark.parametrize("how", [(), ("--no-stream",)], ids=["streamed", "whole"])
def test_aider_writes_the_file_that_the_answer_holds(
    server: Loopback, home: Path, tmp_path: Path, how: tuple[str, ...]
) -> None:
    project = tmp_path / "own"
    project.mkdir()
    note = project / "note.txt"
    note.write_text("The harbour opens at nine.\n")
    done = Aider(server, home, project).ask("#aider-note", *how, "note.txt")
    assert done.status == 0, done.stderr
    assert note.read_text() == "The harbour opens at ten.\n", done.stdout


def _png(width: int = 32, height: int = 32) -> bytes:
    """A red square (PNG specification, third edition)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + b"\xff\0\0" * width for _ in range(height))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
