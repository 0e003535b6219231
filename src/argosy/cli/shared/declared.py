"""The command line of declared options: a command names those that it takes, and gets them as one object.

    @choices(Settings, "memory", "threads", into="flags")
    def routes(flags: Settings) -> None: ...

Elsewhere: `config/option.py` declares settings; `settings.py` adds the environment.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import click

from argosy.cli.commands import completion
from argosy.cli.shared.help_all import Further
from argosy.config.option import Declaration, declarations

Command = TypeVar("Command", bound=Callable[..., Any])


class SharedLine(click.Option):
    """An option that shares a line of help with others: `line` of the first one, and None of the others."""

    def __init__(self, *args: Any, line: tuple[str, str] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._line = line

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        return self._line


def choices(
    owner: type, *names: str, into: str, **changes: Mapping[str, Any]
) -> Callable[[Command], Command]:
    """Add options for fields of `owner` to a command, which gets those that are given in a dictionary.

    Several of these may fill one dictionary.

    Args:
        owner: a class with declarations.
        names: its fields, in the order of the help.
        into: the command's argument.
        changes: by name, what click gets otherwise, such as another `help`.
    """
    declared = declarations(owner)

    def add(command: Command) -> Command:
        @functools.wraps(command)
        def take(**given: Any) -> Any:
            taken = {name: value for name in names if (value := given.pop(name)) is not None and value != ()}
            given[into] = given.get(into, {}) | taken
            return command(**given)

        for name in reversed(names):
            one = declared[name]
            keywords = _keywords(one) | dict(changes.get(name, {}))
            click.option(*one.option.flags.split(), name, **keywords)(take)
        return take  # type: ignore[return-value]

    return add


def _keywords(one: Declaration) -> dict[str, Any]:
    """What click's `option` takes for a declaration."""
    option = one.option
    found: dict[str, Any] = {"help": option.help, "metavar": option.metavar, "hidden": option.is_hidden}
    if option.is_further:
        found["cls"] = Further
    if option.help is None or option.title is not None:
        found |= {"cls": SharedLine, "help": None}
        if option.title is not None:
            found["line"] = (option.title, option.help)
    if option.completes is not None:
        found["shell_complete"] = getattr(completion, option.completes)
    if one.is_list:
        found["multiple"] = True
    return found | _type(one)


def _type(one: Declaration) -> dict[str, Any]:
    option = one.option
    if one.kind is bool:
        if "/" in option.flags:
            return {"default": None}
        if option.flags == f"--no-{one.name}":
            return {"flag_value": False, "default": None, "type": bool}
        return {"is_flag": True}
    if one.kind is Literal:
        return {"type": click.Choice(one.words)}
    if one.kind is Path:
        return {"type": click.Path(path_type=Path)}
    if one.kind in (int, float) and (option.least, option.most) != (None, None):
        bounded: Any = click.IntRange if one.kind is int else click.FloatRange
        return {"type": bounded(option.least, option.most)}
    return {"type": one.kind} if one.kind is not str else {}
