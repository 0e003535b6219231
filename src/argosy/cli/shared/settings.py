"""Settings from the environment, read in one place. A flag takes precedence.

    flags, environment -> Settings -> keyword arguments of Engine

`EngineOptions` and `Settings` declare the variables of options, and `argosy --help` lists `VARIABLES`.
ARGOSY_RECORD (on, off) says whether a run adds to the saved working set (`observe/saved.py`), and ARGOSY_TUNE (on,
off) whether products run as measured on this machine. A misspelt ARGOSY_ variable is an error.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, Unpack, cast

from argosy.config import GIB, INSTRUCTION_SETS, EngineOptions, parse_size
from argosy.config.option import Declaration, Further, declarations
from argosy.directory import read_named
from argosy.errors import UsageError, did_you_mean

_MOST_KEY_BYTES = 16 << 10  # servers take no longer header


class Settings(EngineOptions, total=False):
    """How a command runs an engine; missing settings are left to the engine.

    record: count what routers choose; the default is yes.
    """

    record: Annotated[bool, Further("--no-record", "Keep no counts of routing.", variable="ARGOSY_RECORD")]


VARIABLES = (
    *(one.option.variable for one in declarations(Settings).values() if one.option.variable is not None),
    "ARGOSY_CACHE",  # the directory of the demo model; read by `user_directories.py`
    "ARGOSY_API_KEY",  # the key for a running server
    "ARGOSY_TRACEBACK",  # 1 shows tracebacks
)


def read_settings(environment: Mapping[str, str] | None = None, **flags: Unpack[Settings]) -> Settings:
    """Combine given flags with the environment for the rest.

    Raises:
        UsageError: a variable is misspelt or has an invalid value, the memory is not a size with a unit, or there is no
            such instruction set.
    """
    environment = os.environ if environment is None else environment
    refuse_misspelt(environment)
    found = {
        name: value
        for name, one in declarations(Settings).items()
        if one.option.variable is not None and (value := _value(environment, one)) is not None
    }
    found.pop("tune", None)  # only checked here: `machine/tuning.py` reads it in every process of ours
    found |= {name: value for name, value in flags.items() if value is not None}
    with _naming("ARGOSY_MEMORY", flags.get("memory")):
        if "memory" in found:  # checks only the format: the total is read when an engine opens
            parse_size(found["memory"], total_bytes=GIB)
    if (chosen := found.get("instruction_set")) is not None:
        from argosy import _native

        # A plan for another machine may name what this processor lacks.
        known = _native.instruction_sets() if flags.get("instruction_set") is None else INSTRUCTION_SETS
        if chosen not in known:
            from argosy.engine.options import choose_instruction_set

            with _naming("ARGOSY_INSTRUCTION_SET", flags.get("instruction_set")):
                choose_instruction_set(chosen)
    return cast(Settings, found)


@contextmanager
def _naming(variable: str, flag: object) -> Iterator[None]:
    """Let an error say that its value came from the environment, unless a flag took precedence."""
    try:
        yield
    except UsageError as error:
        if flag is not None:
            raise
        raise UsageError(f"{variable}: {error.message}", hint=error.hint) from None


def for_engine(settings: Settings) -> dict[str, Any]:
    """The settings that are keyword arguments of `Engine`."""
    return {name: value for name, value in settings.items() if name != "record"}


def refuse_misspelt(environment: Mapping[str, str]) -> None:
    """Raise UsageError for a variable that looks like a misspelling of ours."""
    for name in environment:
        is_unknown = name.startswith("ARGOSY") and name not in VARIABLES
        if is_unknown and (said := did_you_mean(name, VARIABLES, quote="", cutoff=0.8)):
            raise UsageError(f"unknown environment variable {name}; {said}")


def api_key(key_file: Path | None = None, environment: Mapping[str, str] | None = None) -> str | None:
    """The key for a running server: the file's only line, ARGOSY_API_KEY, or None.

    Raises:
        UsageError: the file cannot be read, or the text cannot be a key.
    """
    environment = os.environ if environment is None else environment
    refuse_misspelt(environment)
    if key_file is None:
        origin, text = "ARGOSY_API_KEY", environment.get("ARGOSY_API_KEY", "")
        if not text:
            return None
    else:
        origin = str(key_file)
        try:
            text = read_named(key_file, _MOST_KEY_BYTES + 1).decode().strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not text"
            raise UsageError(f"the key file {key_file} cannot be read: {reason}") from error
        if len(text) > _MOST_KEY_BYTES:
            raise UsageError(f"{origin} has more than {_MOST_KEY_BYTES} bytes, so it is not a key")
    if not text or not all("!" <= character <= "~" for character in text):  # it goes into a header
        raise UsageError(f"{origin} must contain a key: one line of printable characters without spaces")
    return text


def wants_traceback(environment: Mapping[str, str] | None = None) -> bool:
    value = (os.environ if environment is None else environment).get("ARGOSY_TRACEBACK", "")
    return value not in ("", "0")


def _value(environment: Mapping[str, str], one: Declaration) -> Any:
    """The value of an option's variable, converted to the option's type; None if it is not set."""
    name = one.option.variable or ""
    text = environment.get(name)
    if not text or one.kind is str:
        return text or None
    if one.kind is int:
        least, most = one.option.least or 0, one.option.most or math.inf
        if not text.isdecimal() or len(text) > 18 or not least <= int(text) <= most:
            bounds = f"at least {least}" + ("" if most == math.inf else f" and at most {most}")
            raise UsageError(f"{name} must be a whole number of {bounds}, found '{text[:20]}'")
        return int(text)
    known = one.words if one.kind is Literal else ("on", "off")
    if text not in known:
        raise UsageError(f"{name} must be {' or '.join(known)}, found '{text}'")
    return text if one.kind is Literal else text == "on"
