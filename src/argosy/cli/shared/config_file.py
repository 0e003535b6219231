"""Read the settings of `argosy serve --config FILE`: TOML, whose keys are the long options without their dashes.

    FILE  ->  checked against the command's options  ->  click's defaults, which the command line overrides

    models = ["./Qwen3-30B-A3B"]   # a path that begins with ./ or ../ is relative to FILE
    memory = "16GiB"
    keys = "keys.json"             # as is every path of an option that takes a file or directory
    allow-host = ["models.example.org"]
    media = false                  # --no-media

Elsewhere: the environment is `settings.py`.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import click

from argosy.directory import read_named
from argosy.errors import UsageError, did_you_mean

_MOST_BYTES = 64 << 10
_NOT_IN_FILE = {"config", "check"}


def use_config(ctx: click.Context, _: click.Parameter, path: Path | None) -> None:
    """Callback of --config: make the file's settings the command's defaults.

    Raises:
        UsageError: the file cannot be read, or a setting is unknown or invalid.
    """
    if path is not None and not ctx.resilient_parsing:
        ctx.default_map = read_config(path, ctx)


def read_config(path: Path, ctx: click.Context) -> dict[str, Any]:
    """Read the settings in `path`, by the parameter names of the context's command.

    Raises:
        UsageError: the file cannot be read, or a setting is unknown or invalid.
    """
    known = {
        key: parameter
        for parameter in ctx.command.params
        if (key := _key_of(parameter)) not in _NOT_IN_FILE and not getattr(parameter, "is_eager", False)
    }
    found: dict[str, Any] = {}
    for key, value in _parse(path).items():
        if key not in known:
            said = did_you_mean(key, known) or f"known: {', '.join(sorted(known))}"
            raise UsageError(f"{path}: unknown setting {key[:64]!a}; {said}")
        parameter = known[key]
        assert parameter.name is not None
        try:
            found[parameter.name] = _checked(value, parameter, path.parent, ctx)
        except UsageError as error:
            raise UsageError(f"{path}: {key} {error.message}") from None
        except click.BadParameter as error:
            raise UsageError(f"{path}: {key}: {error.message}") from None
    return found


def _parse(path: Path) -> dict[str, Any]:
    try:
        data = read_named(path, _MOST_BYTES + 1)
    except OSError as error:
        raise UsageError(f"--config {path} cannot be read: {error.strerror}") from None
    if len(data) > _MOST_BYTES:
        raise UsageError(f"{path} is larger than {_MOST_BYTES} bytes, so it is not a file of settings")
    try:
        return tomllib.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not text in UTF-8: byte {error.start} is invalid") from None
    except ValueError as error:  # not only TOMLDecodeError: a number may have too many digits
        raise UsageError(f"{path} is not valid TOML: {error}") from None
    except RecursionError:
        raise UsageError(f"{path} is not a file of settings: it is nested too deeply") from None


def _key_of(parameter: click.Parameter) -> str:
    """The long option of a setting, without its dashes, or the name of an argument."""
    if isinstance(parameter, click.Argument):
        return parameter.name or ""
    name = next(option for option in parameter.opts if option.startswith("--"))
    return name.removeprefix("--no-" if getattr(parameter, "flag_value", None) is False else "--")


def _checked(value: object, parameter: click.Parameter, folder: Path, ctx: click.Context) -> Any:
    if not (parameter.multiple or parameter.nargs == -1):
        return _one(value, parameter, folder, ctx)
    if not isinstance(value, list):
        raise UsageError(f"must be a list, found {_kind(value)}")
    return tuple(_one(item, parameter, folder, ctx) for item in value)


def _one(value: object, parameter: click.Parameter, folder: Path, ctx: click.Context) -> Any:
    kind = parameter.type
    if isinstance(kind, click.types.BoolParamType):
        wanted, fits = "true or false", isinstance(value, bool)
    elif isinstance(kind, click.types.IntParamType):
        wanted, fits = "a whole number", type(value) is int
    elif isinstance(kind, click.types.FloatParamType):
        wanted, fits = "a number", type(value) in (int, float)
    elif parameter.metavar == "SIZE":
        wanted, fits = 'a size with its unit, such as "16GiB"', isinstance(value, str)
    else:
        wanted, fits = "text", isinstance(value, str)
    if not fits:
        raise UsageError(f"must be {wanted}, found {_kind(value)}")
    if isinstance(value, str):
        if "\0" in value:
            raise UsageError("contains a null character, which is invalid in paths and names")
        takes_path = isinstance(kind, click.Path) or parameter.metavar == "FILE"
        scheme, path = ("unix:", value[5:]) if value.startswith("unix:") else ("", value)
        if takes_path or scheme or value.startswith(("./", "../")):
            value = scheme + str(folder / path)
    return kind.convert(value, parameter, ctx)


def _kind(value: object) -> str:
    """Describe a value in a few words."""
    if isinstance(value, str):
        return f"the text {value[:64]!a}"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return str(value)[:64]
    if isinstance(value, list):
        return "a list"
    return "a table" if isinstance(value, dict) else "a date or time"
