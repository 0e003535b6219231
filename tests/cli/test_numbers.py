"""Every number on the command line: what is no number, or one that nothing can hold, is refused in a sentence."""

from __future__ import annotations

from collections.abc import Iterator

import click
import pytest

from argosy.cli.main import _COMMANDS, cli, main
from argosy.cli.shared.settings import read_settings
from argosy.errors import UsageError


def commands() -> Iterator[tuple[list[str], click.Command]]:
    """Every command with its words, and those of groups."""
    context = click.Context(cli)
    found = [([name], cli.get_command(context, name)) for name in _COMMANDS]
    for words, command in found:
        assert command is not None
        if isinstance(command, click.Group):
            found += [([*words, name], one) for name, one in command.commands.items()]
        yield words, command


NUMBERS = [
    (words, option)
    for words, command in commands()
    for option in command.params
    if isinstance(option, click.Option)
    and isinstance(option.type, click.types.IntParamType | click.types.FloatParamType)
]


WORDS = ("", "x", "nan", "inf", "1e999")
TOO_LONG = ("9" * 5000, "-" + "9" * 5000, "1" + "0" * 400, "-1" + "0" * 400)
FRACTIONS = ("0.5", "1e3")


def test_every_number_of_every_command_refuses_what_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(NUMBERS) > 90
    for words, option in NUMBERS:
        flag = option.opts[-1]
        is_whole = isinstance(option.type, click.types.IntParamType)
        for value in (*WORDS, *TOO_LONG, *(FRACTIONS if is_whole else ())):
            assert main([*words, flag, value]) == 2, (words, flag, value[:30])
            said = capsys.readouterr().err
            assert said.startswith("error: invalid value for "), (words, flag, said[:200])
            assert flag in said.partition(": ")[2], said[:200]
            assert len(said) < 300, said[:300]


def test_numbers_with_bounds_refuse_what_is_beyond_them(capsys: pytest.CaptureFixture[str]) -> None:
    for words, option in NUMBERS:
        kind, flag = option.type, option.opts[-1]
        assert isinstance(kind, click.types._NumberRangeBase)
        beyond = [None if kind.min is None else kind.min - 1, None if kind.max is None else kind.max + 1]
        for value in [one for one in beyond if one is not None]:
            assert main([*words, flag, str(value)]) == 2, (words, flag, value)
            assert "is not in the range" in capsys.readouterr().err


def test_the_last_of_a_number_that_is_given_twice_counts() -> None:
    run = cli.get_command(click.Context(cli), "run")
    assert run is not None
    assert run.make_context("run", ["--threads", "1", "--threads", "2", "Hi"]).params["threads"] == 2


@pytest.mark.parametrize("text", ["", *WORDS[1:], *TOO_LONG, "0", "1025", "99999999999", *FRACTIONS])
def test_a_variable_that_is_a_number_refuses_what_is_none(text: str) -> None:
    if not text:
        assert "threads" not in read_settings({"ARGOSY_THREADS": text})
        return
    with pytest.raises(UsageError) as refused:
        read_settings({"ARGOSY_THREADS": text})
    assert str(refused.value).startswith(
        "ARGOSY_THREADS must be a whole number of at least 1 and at most 1024"
    )
    assert len(str(refused.value)) < 120
