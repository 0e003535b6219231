"""Tools that a model may call: what a caller offers, checked, and the values that their schemas ask for.

    {"type": "function", "function": {name, description, parameters}}  ->  check_tools  ->  Tool
    what a model wrote as bare text  ->  value_of  ->  the JSON value that the parameter's schema asks for

Elsewhere: how a model is told of them is its chat template's business (`chat.py`); how it calls them is `formats/`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from argosy.errors import UsageError
from argosy.prompt.json_text import plain_json, plain_text, read_json

# So a name is a name in every format: no quote, bracket, colon or white space to confuse it with what is around it.
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")


@dataclass(frozen=True, slots=True)
class Tool:
    """One function. `parameters` is a JSON schema of an object; `is_strict`: every call of it is held to that."""

    name: str
    description: str = ""
    parameters: Mapping[str, object] = field(default_factory=lambda: {"type": "object", "properties": {}})
    is_strict: bool = False

    @property
    def properties(self) -> Mapping[str, object]:
        """Parameter name to its schema."""
        found = self.parameters.get("properties")
        return found if isinstance(found, Mapping) else {}

    @property
    def required(self) -> tuple[str, ...]:
        """Names of the parameters that a call must give."""
        found = self.parameters.get("required")
        return tuple(name for name in found if isinstance(name, str)) if isinstance(found, list) else ()

    def as_template_reads_it(self) -> dict[str, object]:
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}


def check_tools(tools: Sequence[Tool | Mapping[str, object]]) -> tuple[Tool, ...]:
    """Tools as callers write them, or a sentence about the first thing that is wrong with them.

    Raises:
        UsageError: another type than function, an unknown or missing key, a name that is none or comes twice, or
            parameters that are no JSON schema of an object.
    """
    checked = []
    names = set()
    for at, given in enumerate(tools):
        tool = given if isinstance(given, Tool) else _tool(given, f"tool {at}")
        if tool.name in names:
            raise UsageError(f"tool {at}: the name '{tool.name}' comes twice")
        names.add(tool.name)
        checked.append(tool)
    return tuple(checked)


def tool_named(tools: Sequence[Tool], name: str) -> Tool:
    """The tool of that name.

    Raises:
        UsageError: there is none.
    """
    for tool in tools:
        if tool.name == name:
            return tool
    known = ", ".join(tool.name for tool in tools) or "none"
    raise UsageError(f"tool_choice names '{name}', which is not among the tools: {known}")


def _tool(given: object, where: str) -> Tool:
    if not isinstance(given, Mapping):
        raise UsageError(f"{where} is a {type(given).__name__}, expected an object")
    if given.get("type") != "function":
        raise UsageError(f"{where}: type is {given.get('type')!r}; known: 'function'")
    function = given.get("function")
    if not isinstance(function, Mapping):
        raise UsageError(f"{where}: no 'function' with name, description and parameters")
    for key in (*(key for key in given if key not in ("type", "function")), *function):
        if key not in ("name", "description", "parameters", "strict"):
            raise UsageError(f"{where}: unknown key '{key}'; known: name, description, parameters, strict")
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UsageError(f"{where}: name {name!r} is not 1 to 128 of A-Z a-z 0-9 _ - .")
    description = function.get("description")
    if not isinstance(description, str | None):
        raise UsageError(f"{where}: description is a {type(description).__name__}, expected text")
    is_strict = function.get("strict")
    if not isinstance(is_strict, bool | None):
        raise UsageError(f"{where}: strict is a {type(is_strict).__name__}, expected true or false")
    parameters = function.get("parameters")
    if parameters is None:
        return Tool(name, plain_text(description or "", where), is_strict=is_strict is True)
    schema = plain_json(parameters, f"{where}: parameters")
    if not isinstance(schema, dict) or schema.get("type", "object") != "object":
        raise UsageError(f"{where}: parameters are not the JSON schema of an object")
    if not isinstance(schema.get("properties", {}), dict):
        raise UsageError(f"{where}: properties of its parameters are not an object")
    schema = {"type": "object", "properties": {}} | schema
    return Tool(name, plain_text(description or "", where), schema, is_strict is True)


def types_of(schema: object, root: Mapping[str, object]) -> frozenset[str]:
    """The JSON types that `schema` lets a value have; none if it does not say.

    Args:
        schema: of one parameter.
        root: the schema that it is part of, for `$ref`.
    """
    types: set[str] = set()
    seen: set[str] = set()  # a schema may refer to itself
    waiting = [schema]
    while waiting:
        part = waiting.pop()
        if not isinstance(part, Mapping):
            continue
        reference, named = part.get("$ref"), part.get("type")
        if isinstance(reference, str) and reference not in seen:
            seen.add(reference)
            waiting.append(_referred(reference, root))
        if isinstance(named, str):
            types.add(named)
        elif isinstance(named, list):
            types |= {name for name in named if isinstance(name, str)}
        else:
            listed = part.get("enum")
            types |= {_type_of(value) for value in listed} if isinstance(listed, list) else set()
            types |= {_type_of(part["const"])} if "const" in part else set()
        for key in ("anyOf", "oneOf", "allOf"):
            members = part.get(key)
            waiting += members if isinstance(members, list) else []
    return frozenset(types)


def _referred(reference: str, root: Mapping[str, object]) -> object:
    found: object = root
    for step in reference.removeprefix("#/").split("/"):
        found = found.get(step) if isinstance(found, Mapping) else None
    return found


def _type_of(value: object) -> str:
    if isinstance(value, float) and value.is_integer():
        return "integer"
    kinds = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    return kinds.get(type(value), "null")


def value_of(text: str, schema: object, root: Mapping[str, object]) -> object:
    """The value that a model means by `text`, which it wrote without quotes.

    What the schema allows decides: text that spells a number is one only where a number may stand. Where text may stand
    as well, `null`, `3` or `true` is still read as what it spells, if that is allowed.
    """
    types = types_of(schema, root)
    try:
        value = read_json(_as_python_writes_it.get(text.strip(), text))
    except ValueError:
        return text
    kind = _type_of(value)
    if kind in types or (kind == "integer" and "number" in types):
        return value
    # A schema that says nothing: lists and objects can hardly be meant as text.
    return value if not types and isinstance(value, dict | list) else text


_as_python_writes_it = {"True": "true", "False": "false", "None": "null"}  # as some templates do
