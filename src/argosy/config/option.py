"""Declare a setting once: a field gives its name, type and default, and an `Option` gives everything else.

    threads: Annotated[int | None, Option("--threads N", "Compute threads.", least=1, variable="ARGOSY_THREADS")]

Elsewhere: `cli/shared/declared.py` makes command-line options, `cli/shared/settings.py` reads the environment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, MISSING, dataclass, fields, is_dataclass
from functools import cache
from types import NoneType
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints


@dataclass(frozen=True, slots=True)
class Option:
    """A setting on the command line and in the environment.

    usage: its flags, and a word for its value: `-m --model MODEL`, `--media/--no-media`. `--no-NAME` alone sets the
        field NAME to False. Empty: only the environment sets it.
    help: None: the line of another option describes it.
    title: the title of that line, if it also describes other options.
    least, most: bounds of a number.
    completes: the function of `cli/commands/completion.py` that proposes values.
    variable: the environment variable that gives a value where the command line does not.
    """

    usage: str = ""
    help: str | None = None
    _: KW_ONLY
    title: str | None = None
    least: float | None = None
    most: float | None = None
    completes: str | None = None
    is_hidden: bool = False
    shows_default: bool = False
    variable: str | None = None

    @property
    def flags(self) -> list[str]:
        return [word for word in self.usage.split() if word.startswith("-")]

    @property
    def metavar(self) -> str | None:
        return " ".join(word for word in self.usage.split() if not word.startswith("-")) or None


class Further(Option):
    """An option that only `--help-all` shows."""


class Declaration(NamedTuple):
    """A field with its option.

    kind: the first type of its annotation, which a person types; `Literal` if there are only certain words.
    words: the allowed words.
    is_list: the option may be given several times.
    default: MISSING if the field has none.
    """

    name: str
    option: Option
    kind: Any
    words: tuple[str, ...]
    is_list: bool
    default: Any


@cache
def declarations(owner: type) -> dict[str, Declaration]:
    """Return the fields of a dataclass or typed dictionary that are options, by name, in order."""
    defaults = {one.name: one.default for one in fields(owner)} if is_dataclass(owner) else {}
    found = {}
    for name, annotation in get_type_hints(owner, include_extras=True).items():
        if get_origin(annotation) is Annotated:
            kind, option = get_args(annotation)
            found[name] = Declaration(name, option, *_kind(kind), defaults.get(name, MISSING))
    return found


def _kind(annotation: Any) -> tuple[Any, tuple[str, ...], bool]:
    if get_origin(annotation) is Mapping:  # a text for each item
        return str, (), True
    if get_origin(annotation) in (tuple, Sequence):
        return *_kind(get_args(annotation)[0])[:2], True
    if get_origin(annotation) is Literal:
        return Literal, get_args(annotation), False
    members = [one for one in get_args(annotation) if one is not NoneType] or [annotation]
    words = tuple(word for one in members if get_origin(one) is Literal for word in get_args(one))
    return (Literal, words, False) if words else (members[0], (), False)
