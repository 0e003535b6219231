"""Every option says in `--help-all` what it does."""

from __future__ import annotations

import re
from collections.abc import Iterator

import click
import pytest

from argosy.cli.main import cli, main


def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name)


@pytest.mark.parametrize("command", [*commands(cli)], ids=" ".join)
def test_every_option_is_explained(command: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    main([*command, "--help"])
    text = capsys.readouterr().out
    if "--help-all" in text:
        main([*command, "--help-all"])
        text = capsys.readouterr().out
    shown = text.partition("\nOptions:\n")[2]
    options = re.findall(r"^  (-.*(?:\n {8,}.*)*)", shown, flags=re.MULTILINE)
    assert options
    for option in options:
        _, _, explained = re.sub(r"\[[^\]]*\]", "", re.sub(r"\s*\n\s*", "  ", option)).partition("  ")
        assert re.search(r"[A-Za-z]{3}", explained), option
