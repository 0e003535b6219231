"""The base class of answer types."""

from __future__ import annotations

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict


@with_config(ConfigDict(extra="forbid"))
class Closed(TypedDict):
    """An answer, or a part of one, has exactly the fields of its type."""
