"""The README's commands exist as written, and its Python runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from argosy.cli.main import cli
from tests.cli.tiny_chat_model import write_chat_model

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^\$ argosy (.*)$", README, flags=re.MULTILINE)
PYTHON = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_readme_shows_commands_and_python() -> None:
    assert len(COMMANDS) >= 5
    assert len(PYTHON) == 1


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_of_the_readme_is_understood(line: str) -> None:
    name, *arguments = shlex.split(line)
    context = click.Context(cli)
    command = cli.get_command(context, name)
    assert command is not None
    command.make_context(name, arguments, parent=context)  # parses, and does not run


def test_the_python_of_the_readme_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_chat_model(tmp_path / "model")
    exec(PYTHON[0].replace('"demo"', repr(str(tmp_path / "model"))), {})
    assert capsys.readouterr().out
