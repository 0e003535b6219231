"""The README's commands exist as written, in an order that works, and its Python runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from argosy.cli.main import cli
from tests.cli.tiny_chat_model import write_chat_model

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ALL_COMMANDS = re.findall(r"^\$ (.*)$", README, flags=re.MULTILINE)
COMMANDS = re.findall(r"^\$ argosy (.*)$", README, flags=re.MULTILINE)
PYTHON = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_readme_shows_commands_and_python() -> None:
    assert len(COMMANDS) >= 5
    assert len(PYTHON) == 1


def test_every_command_of_the_readme_is_known_to_this_file() -> None:
    targets = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for line in ALL_COMMANDS:
        words = line.split("#")[0].split()
        match words:
            case ["argosy", *_]:
                pass  # a test below parses these
            case ["make", target]:
                assert target in targets, line
            case ["source", ".venv/bin/activate"]:
                pass
            case _:
                pytest.fail(f"nobody checks `{line}`")


def test_argosy_is_on_the_path_before_its_first_command() -> None:
    activates = ALL_COMMANDS.index("source .venv/bin/activate")
    assert ALL_COMMANDS.index("make demo") < activates
    assert not any(line.startswith("argosy") for line in ALL_COMMANDS[:activates])


@pytest.mark.parametrize("name", ["README.md", "SECURITY.md", "CONTRIBUTING.md"])
def test_no_section_is_empty_and_no_placeholder_is_left(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert not re.search(r"^#[^\n]*\n\s*(^#|\Z)", text.split("\n", 1)[1], flags=re.MULTILINE)
    assert "REPOSITORY" not in text
    assert "TODO" not in text


@pytest.mark.parametrize("line", COMMANDS)
def test_every_argosy_command_of_the_readme_parses(line: str) -> None:
    name, *arguments = shlex.split(line)
    context = click.Context(cli)
    command = cli.get_command(context, name)
    assert command is not None
    command.make_context(name, arguments, parent=context)  # parses without running


def test_the_python_of_the_readme_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_chat_model(tmp_path / "model")
    exec(PYTHON[0].replace('"demo"', repr(str(tmp_path / "model"))), {})
    assert capsys.readouterr().out
