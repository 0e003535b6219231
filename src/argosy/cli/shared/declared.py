"""Declared options on the command line: a command names those it takes and gets them as one object.

    @choices(Settings, "memory", "threads", into="flags")
    def routes(flags: Settings) -> None: ...

Elsewhere: `config/option.py` declares settings; `settings.py` adds the environment.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any, Literal, TypeVar

import click

from argosy.cli.commands import completion
from argosy.cli.shared.help_all import Further
from argosy.cli.shared.numbers import RealNumber, WholeNumber
from argosy.config import option as config_option
from argosy.config.option import Declaration, declarations

Command = TypeVar("Command", bound=Callable[..., Any])


class SharedLine(click.Option):
    """An option that shares a help line with others: the first has `line`, the others None."""

    def __init__(self, *args: Any, line: tuple[str, str] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._line = line

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        return self._line


def options(
    owner: type, *names: str, into: str, **changes: Mapping[str, Any]
) -> Callable[[Command], Command]:
    """Add options for a dataclass's fields to a command, which gets the resulting object.

    Several of these may fill one object, which is created when all its fields are present.

    Args:
        owner: a class with declarations.
        names: its fields, in the order of the help; empty for all.
        into: the command's argument.
        changes: by name, overrides for click, such as another `help`.
    """
    declared = declarations(owner)
    chosen = names or tuple(declared)

    def add(command: Command) -> Command:
        @functools.wraps(command)
        def take(**given: Any) -> Any:
            taken = given.pop(into, {}) | {name: given.pop(name) for name in chosen}
            given[into] = owner(**taken) if taken.keys() == declared.keys() else taken
            return command(**given)

        _add(take, owner, chosen, changes, has_defaults=True)
        return take  # type: ignore[return-value]

    return add


def choices(
    owner: type, *names: str, into: str, **changes: Mapping[str, Any]
) -> Callable[[Command], Command]:
    """Like `options`, but the command gets a dictionary of the given options, and the defaults live elsewhere."""

    def add(command: Command) -> Command:
        @functools.wraps(command)
        def take(**given: Any) -> Any:
            taken = {name: value for name in names if (value := given.pop(name)) is not None and value != ()}
            given[into] = given.get(into, {}) | taken
            return command(**given)

        _add(take, owner, names, changes, has_defaults=False)
        return take  # type: ignore[return-value]

    return add


def _add(
    command: Callable[..., Any],
    owner: type,
    names: Sequence[str],
    changes: Mapping[str, Mapping[str, Any]],
    *,
    has_defaults: bool,
) -> None:
    declared = declarations(owner)
    for name in reversed(names):
        one = declared[name]
        keywords = _keywords(one)
        if has_defaults and one.default is MISSING:
            keywords["required"] = True
        elif has_defaults and one.kind is not bool and one.default not in (None, ()):
            keywords |= {"default": one.default} | (
                {"show_default": True} if one.option.shows_default else {}
            )
        click.option(*one.option.flags, name, **(keywords | dict(changes.get(name, {}))))(command)


def _keywords(one: Declaration) -> dict[str, Any]:
    """The arguments of click's `option` for a declaration."""
    option = one.option
    found: dict[str, Any] = {"help": option.help, "metavar": option.metavar, "hidden": option.is_hidden}
    if isinstance(option, config_option.Further):
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
        if "/" in option.usage:
            return {"default": None}
        if option.flags == [f"--no-{one.name}"]:
            return {"flag_value": False, "default": None, "type": bool}
        return {"is_flag": True}
    if one.kind is Literal:
        return {"type": click.Choice(one.words)}
    if one.kind is Path:
        return {"type": click.Path(path_type=Path)}
    if one.kind in (int, float):
        bounds: Any = (option.least, option.most)
        return {"type": WholeNumber(*bounds) if one.kind is int else RealNumber(*bounds)}
    return {"type": one.kind} if one.kind is not str else {}
