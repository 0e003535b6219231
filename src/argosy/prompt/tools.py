"""Checks the tools that a caller offers, and parses values as the tools' schemas require.

    {"type": "function", "function": {name, description, parameters}}  ->  check_tools  ->  Tool
    bare text from a model  ->  value_of  ->  a JSON value that fits the parameter's schema

Elsewhere: the chat template tells a model about tools (`chat.py`); `formats/` reads the model's calls.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from argosy.errors import UsageError
from argosy.prompt.json_text import plain_json, plain_text, read_json

# These characters are safe in every format: no quote, bracket, colon or white space that could pass for syntax.
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_MOST_PARTS = 256  # parts of a parameter's schema that are searched for its types


@dataclass(frozen=True, slots=True)
class Tool:
    """One function. `parameters` is the JSON schema of an object; with `is_strict`, every call must follow it."""

    name: str
    description: str = ""
    parameters: Mapping[str, object] = field(default_factory=lambda: {"type": "object", "properties": {}})
    is_strict: bool = False

    @property
    def properties(self) -> Mapping[str, object]:
        """Maps each parameter's name to its schema."""
        found = self.parameters.get("properties")
        return found if isinstance(found, Mapping) else {}

    @property
    def required(self) -> tuple[str, ...]:
        """Names of the parameters that a call must provide."""
        found = self.parameters.get("required")
        return tuple(name for name in found if isinstance(name, str)) if isinstance(found, list) else ()

    def as_template_reads_it(self) -> dict[str, object]:
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}


def check_tools(tools: Sequence[Tool | Mapping[str, object]]) -> tuple[Tool, ...]:
    """Check a caller's tools; the first fault raises an error.

    Raises:
        UsageError: a type is not function, a key is unknown or missing, a name is invalid or used twice, or parameters
            are not the JSON schema of an object.
    """
    checked = []
    names = set()
    for at, given in enumerate(tools):
        tool = given if isinstance(given, Tool) else _tool(given, f"tool {at}")
        if tool.name in names:
            raise UsageError(f"tool {at}: the name '{tool.name}' is used twice")
        names.add(tool.name)
        checked.append(tool)
    return tuple(checked)


def require_tools(tools: Sequence[Tool]) -> None:
    """Check that a required call has a tool to call.

    Raises:
        UsageError: there is none.
    """
    if not tools:
        raise UsageError("tool_choice requires a tool call, and there are no tools", param="tool_choice")


def tool_named(tools: Sequence[Tool], name: str) -> Tool:
    """Return the tool with that name.

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
        raise UsageError(f"{where}: name {name!r} is not 1 to 128 of the characters A-Z a-z 0-9 _ - .")
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
    """The JSON types that `schema` allows; empty if it names none.

    Only its first parts and values are read: many parameters may refer to one long definition.

    Args:
        schema: the schema of one parameter.
        root: the schema that contains it, for `$ref`.
    """
    types: set[str] = set()
    seen: set[str] = set()  # a schema may refer to itself
    waiting = [schema]
    num_left = _MOST_PARTS
    while waiting and num_left:
        part = waiting.pop()
        num_left -= 1
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
            types |= (
                {_type_of(value) for value in listed[:_MOST_PARTS]} if isinstance(listed, list) else set()
            )
            types |= {_type_of(part["const"])} if "const" in part else set()
        for key in ("anyOf", "oneOf", "allOf"):
            members = part.get(key)
            waiting += members[:num_left] if isinstance(members, list) else []
    return frozenset(types)


def schema_of(schema: object, name: str, root: Mapping[str, object]) -> object:
    """Return the schema of a value's part: of the property `name`, or of an item; None if it has none."""
    if isinstance(schema, Mapping) and isinstance(reference := schema.get("$ref"), str):
        schema = _referred(reference, root)
    if not isinstance(schema, Mapping):
        return None
    properties = schema.get("properties")
    return properties.get(name) if isinstance(properties, Mapping) else schema.get("items")


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
    """Parse `text`, written by a model without quotes, into the value that it means.

    The schema decides: text that spells a number becomes one only where a number is allowed. Where a string is allowed
    as well, `null`, `3` or `true` still becomes the value that it spells, if that type is allowed.
    """
    types = types_of(schema, root)
    try:
        value = read_json(_as_python_writes_it.get(text.strip(), text))
    except ValueError:
        return text
    kind = _type_of(value)
    if kind in types or (kind == "integer" and "number" in types):
        return value
    # If the schema names no type, lists and objects are unlikely to be meant as text.
    return value if not types and isinstance(value, dict | list) else text


_as_python_writes_it = {"True": "true", "False": "false", "None": "null"}  # some templates write these
