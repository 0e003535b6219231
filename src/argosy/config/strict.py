"""Settings that reject misspelt keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Self, SupportsIndex

from argosy.errors import UsageError


def require_whole(
    name: str, value: object, least: int, most: int | None = None, *, hint: str | None = None
) -> None:
    """Raise UsageError unless a setting is a whole number within its bounds."""
    if not isinstance(value, SupportsIndex):  # NumPy's integers are whole numbers, too
        raise UsageError(f"{name} must be a whole number, found {value!r:.40}")
    if value.__index__() < least:
        raise UsageError(f"{name} must be at least {least}, found {value}", hint=hint)
    if most is not None and value.__index__() > most:
        raise UsageError(f"{name} must be at most {most}, found {value}")


class Strict:
    """Adds `from_mapping` to a dataclass; it rejects misspelt keys."""

    @classmethod
    def from_mapping(cls, values: Mapping[str, object]) -> Self:
        known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
        for key in values:
            if key not in known:
                raise UsageError(f"unknown setting '{key}'; known: {', '.join(known)}")
        return cls(**values)
