"""Settings from the environment, read in one place. A flag takes precedence.

    flags, environment -> Settings -> keyword arguments of Engine

ARGOSY_MEMORY, ARGOSY_THREADS and ARGOSY_INSTRUCTION_SET are the defaults of the flags with the same names.
ARGOSY_RECORD (on, off) says whether a run adds to what is known of the model's routing (`observe/saved.py`).
ARGOSY_TUNE (on, off) says whether products run as measured on this machine (read by `machine/tuning.py`), and
ARGOSY_ASK_AHEAD fixes how they prefetch weights.
ARGOSY_CACHE is the directory of the demo model (read by `demo/locate.py`), ARGOSY_API_KEY is the key for a running
server, ARGOSY_TRACEBACK=1 shows tracebacks, and rich honours NO_COLOR. A misspelt ARGOSY_ variable is an error.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, get_args

from argosy.config import GIB, AskAhead, KvDtype, parse_size
from argosy.errors import UsageError, did_you_mean

KNOWN = (
    "ARGOSY_MEMORY",
    "ARGOSY_THREADS",
    "ARGOSY_INSTRUCTION_SET",
    "ARGOSY_ASK_AHEAD",
    "ARGOSY_TUNE",
    "ARGOSY_RECORD",
    "ARGOSY_CACHE",
    "ARGOSY_API_KEY",
    "ARGOSY_TRACEBACK",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How to run an engine; None leaves the choice to the engine."""

    memory: str | None = None
    threads: int | None = None
    context: int | None = None
    kv_dtype: KvDtype | None = None
    instruction_set: str | None = None
    media: bool | None = None
    image_tokens: int | None = None
    video_tokens: int | None = None
    mmproj: str | None = None
    ears: str | None = None
    watermark: Path | None = None
    ask_ahead: AskAhead | None = None
    speculate: str | None = None
    tune: bool | None = None
    record: bool = True  # count what routers choose

    @classmethod
    def read(cls, environment: Mapping[str, str] | None = None, **flags: Any) -> Self:
        """Take given flags, and the environment for the rest.

        Raises:
            UsageError: a variable is misspelt or has an invalid value, or the memory is not a size with a unit.
        """
        environment = os.environ if environment is None else environment
        refuse_misspelt(environment)
        _one_of(environment, "ARGOSY_TUNE", ("on", "off"))
        values: dict[str, Any] = {
            "memory": environment.get("ARGOSY_MEMORY") or None,
            "threads": _whole_number(environment, "ARGOSY_THREADS"),
            "instruction_set": environment.get("ARGOSY_INSTRUCTION_SET") or None,
            "ask_ahead": _one_of(environment, "ARGOSY_ASK_AHEAD", get_args(AskAhead)),
            "record": _one_of(environment, "ARGOSY_RECORD", ("on", "off")) != "off",
        }
        settings = cls(**{**values, **{name: value for name, value in flags.items() if value is not None}})
        if settings.memory is not None:
            parse_size(
                settings.memory, total_bytes=GIB
            )  # only its form: the total is read when an engine opens
        return settings

    def for_engine(self) -> dict[str, Any]:
        """Keyword arguments for `Engine`, only those that are set."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "record"}
        return {name: value for name, value in values.items() if value is not None}


def refuse_misspelt(environment: Mapping[str, str]) -> None:
    """Raise UsageError for a variable that looks like a misspelt one of ours."""
    for name in environment:
        is_unknown = name.startswith("ARGOSY") and name not in KNOWN
        if is_unknown and (said := did_you_mean(name, KNOWN, quote="", cutoff=0.8)):
            raise UsageError(f"unknown environment variable {name}; {said}")


def api_key(key_file: Path | None = None, environment: Mapping[str, str] | None = None) -> str | None:
    """The key for a running server: the file's one line, or ARGOSY_API_KEY, or None.

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
            text = key_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not text"
            raise UsageError(f"the key file {key_file} cannot be read: {reason}") from error
    if not text or not all("!" <= character <= "~" for character in text):  # it becomes a header
        raise UsageError(f"{origin} must hold a key: one line of printable characters without spaces")
    return text


def wants_traceback(environment: Mapping[str, str] | None = None) -> bool:
    value = (os.environ if environment is None else environment).get("ARGOSY_TRACEBACK", "")
    return value not in ("", "0")


def _whole_number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name)
    if not text:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"{name} must be a whole number of at least 1, found '{text}'")
    return int(text)


def _one_of(environment: Mapping[str, str], name: str, known: tuple[str, ...]) -> str | None:
    text = environment.get(name)
    if not text:
        return None
    if text not in known:
        raise UsageError(f"{name} must be {' or '.join(known)}, found '{text}'")
    return text
