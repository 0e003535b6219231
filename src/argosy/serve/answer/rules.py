"""JSON schemas of dependencies between the fields of one object. A null field counts as absent.

They are only documentation: the code that uses the fields refuses an invalid request.
"""

from __future__ import annotations

from typing import Any

_VALUE: dict[str, Any] = {"type": ["boolean", "number", "string", "array", "object"]}
_NULL: dict[str, Any] = {"type": "null"}


def given(*names: str, **schemas: dict[str, Any]) -> dict[str, Any]:
    """All of these fields are present; those in `schemas` match their schema."""
    fields = dict.fromkeys(names, _VALUE) | schemas
    return {"required": list(fields), "properties": fields}


def absent(*names: str) -> dict[str, Any]:
    """None of these fields is present."""
    return {"properties": dict.fromkeys(names, _NULL)}


def any_of(*rules: dict[str, Any]) -> dict[str, Any]:
    """At least one of `rules` holds."""
    return {"anyOf": list(rules)}


def at_most_one(*names: str) -> dict[str, Any]:
    """At most one of these fields is present."""
    return any_of(*(absent(*(other for other in names if other != name)) for name in names))


def exactly_one(*names: str) -> dict[str, Any]:
    """Exactly one of these fields is present."""
    rules = []
    for name in names:
        others = absent(*(other for other in names if other != name))
        rules.append({"required": [name], "properties": {name: _VALUE, **others["properties"]}})
    return any_of(*rules)
