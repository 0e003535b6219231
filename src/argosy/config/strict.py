"""Settings that reject misspelt keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Self

from argosy.errors import UsageError


class Strict:
    """Adds `from_mapping` to a dataclass; it rejects misspelt keys."""

    @classmethod
    def from_mapping(cls, values: Mapping[str, object]) -> Self:
        known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
        for key in values:
            if key not in known:
                raise UsageError(f"unknown setting '{key}'; known: {', '.join(known)}")
        return cls(**values)
