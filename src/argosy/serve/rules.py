"""JSON schemas of what holds between the fields of one object, where a field that is null counts as absent.

They only describe: the code that refuses a request is where its fields are used.
"""

from __future__ import annotations

from typing import Any

_VALUE: dict[str, Any] = {"type": ["boolean", "number", "string", "array", "object"]}
_NULL: dict[str, Any] = {"type": "null"}


def given(*names: str, **schemas: dict[str, Any]) -> dict[str, Any]:
    """All of these fields are there; those of `schemas` as these say."""
    fields = dict.fromkeys(names, _VALUE) | schemas
    return {"required": list(fields), "properties": fields}


def absent(*names: str) -> dict[str, Any]:
    """None of these fields is there."""
    return {"properties": dict.fromkeys(names, _NULL)}


def any_of(*rules: dict[str, Any]) -> dict[str, Any]:
    """At least one of `rules` holds."""
    return {"anyOf": list(rules)}


def at_most_one(*names: str) -> dict[str, Any]:
    """No two of these fields are there."""
    return any_of(*(absent(*(other for other in names if other != name)) for name in names))


def exactly_one(*names: str) -> dict[str, Any]:
    """One of these fields is there, and no other."""
    rules = []
    for name in names:
        others = absent(*(other for other in names if other != name))
        rules.append({"required": [name], "properties": {name: _VALUE, **others["properties"]}})
    return any_of(*rules)
