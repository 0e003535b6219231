"""Parse and format sizes and times for people."""

from __future__ import annotations

import math
import re

from argosy.errors import UsageError

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

_MOST_BYTES = 1 << 63
_UNITS = {"": 1, "b": 1, "kib": KIB, "mib": MIB, "gib": GIB, "tib": 1 << 40}
_UNITS |= {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "k": KIB, "m": MIB, "g": GIB, "t": 1 << 40}


def parse_size(text: str | int, *, total_bytes: int | None = None) -> int:
    """Turn `8GiB`, `8GB`, `512M`, `4096B`, `75%` or an integer number of bytes into bytes.

    A percentage is relative to `total_bytes`, the memory that the machine or its cgroup allows.

    Raises:
        UsageError: `text` is not a size, is not above zero, is 8 EiB or more, has no unit, or is a percentage without
            a total.
    """
    size: float
    if not isinstance(text, str | int):
        raise UsageError(
            f"a size is text or a whole number of bytes, found {text!r:.40}", hint="write 8GiB, 8GB or 75%"
        )
    if isinstance(text, int):
        size = text
    elif match := re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*(%|[a-zA-Z]*)", text.strip()):
        number, unit = float(match[1]), match[2].lower()
        if unit == "%":
            if total_bytes is None:
                raise UsageError(f"'{text}' is a percentage, and the total is unknown here")
            if number > 100:
                raise UsageError(f"'{text}' is more than all of the memory; the maximum is 100%")
            size = total_bytes * number / 100
        elif not unit and number:
            shown = match[1][:40]
            raise UsageError(
                f"'{shown}' has no unit", hint=f"write {shown}GiB, {shown}MiB, or {shown}B for bytes"
            )
        elif unit in _UNITS:
            size = number * _UNITS[unit]
        else:
            raise UsageError(f"unknown unit '{match[2]}' in '{text}'; known: KiB MiB GiB TiB KB MB GB TB %")
    else:
        raise UsageError(f"'{text}' is not a size", hint="write 8GiB, 8GB or 75%")
    if not 1 <= size < _MOST_BYTES:
        shown = str(text)[:40]
        raise UsageError(f"a size must be at least 1 byte and less than 8 EiB, found '{shown}'")
    return int(size)


def parse_seconds(text: str) -> float:
    """Turn `90s`, `10m`, `1.5h`, `30d` or a plain number of seconds into seconds.

    Raises:
        UsageError: `text` is not a time, or is not above zero.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([smhd]?)", text.strip())
    units = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}
    seconds = 0.0 if match is None else float(match[1]) * units[match[2]]
    if not 0 < seconds < float("inf"):
        raise UsageError(f"'{text}' is not a time above zero", hint="write 90s, 10m, 1h or 30d")
    return seconds


def format_bytes(count: float, *, rounds_up: bool = False) -> str:
    """Format a memory size for people: `16.5 GiB`, `310 MiB`, `12 KiB`, `0 B`.

    A size that is needed rounds up, so that a budget of the printed size is enough.
    """
    for unit, size in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(count) >= size:
            value = count / size
            digits = 1 if value < 100 else 0
            if rounds_up:
                value = math.ceil(value * 10**digits) / 10**digits
            return f"{value:.{digits}f} {unit}"
    return f"{count:.0f} B"


def disk_size(nbytes: int) -> str:
    """Format bytes on a drive or a network line, in decimal units: `18.6 GB`, `271 MB`, `4 kB`."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= size:
            value = nbytes / size
            return f"{value:.1f} {unit}" if unit == "GB" and value < 1000 else f"{value:.0f} {unit}"
    return f"{nbytes} bytes"


def counted(number: int, noun: str, nouns: str | None = None) -> str:
    """Format a number with its noun: `1 expert`, `3 experts`. `nouns` is an irregular plural."""
    return f"{number} {noun}" if number == 1 else f"{number} {nouns or noun + 's'}"
