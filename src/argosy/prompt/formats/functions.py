"""Calls written as tags: a function, with a tag for each of its parameters.

    <function=NAME> <parameter=KEY>VALUE</parameter> ... </function>

Qwen3-Coder and MiniMax-M2 spell the tags differently and agree on the rest. Values are not quoted, so the tool's schema
decides their types. A closing tag inside a value belongs to the value unless structure follows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from argosy.prompt.formats.parser import CutCall, FoundCall, Reading
from argosy.prompt.json_text import write_json
from argosy.prompt.tools import Tool, value_of


@dataclass(frozen=True, slots=True)
class Tags:
    """A format's spelling of the tags.

    Attributes:
        function, parameter: patterns of the opening tags; their first group is the name. A parameter's second group,
            if there is one, is "true" for a string and "false" for JSON.
        function_end, parameter_end: the closing tags.
        line_around_values: one line break before and one after a value are not part of it.
    """

    function: re.Pattern[str]
    function_end: str
    parameter: re.Pattern[str]
    parameter_end: str
    line_around_values: bool


def read_functions(text: str, tags: Tags, tools: Mapping[str, Tool]) -> Reading:
    """Parse the calls in `text`, which contains functions and white space."""
    return _read(text, tags, tools, [])


def read_cut_functions(text: str, tags: Tags, tools: Mapping[str, Tool]) -> Sequence[FoundCall | CutCall]:
    """Parse the calls in `text`, which the token limit cut off; the last one gets its complete parameters."""
    calls: list[FoundCall | CutCall] = []
    _read(text, tags, tools, calls)
    return calls


def _read(text: str, tags: Tags, tools: Mapping[str, Tool], told: list[FoundCall | CutCall]) -> Reading:
    """Parse like `read_functions`, and add to `told` everything that is certain even if the text breaks off."""
    calls: list[FoundCall] = []
    at = _skip(text, 0)
    while at < len(text) or not calls:
        opening = tags.function.match(text, at)
        if opening is None or opening[1] not in tools:
            return None
        tool = tools[opening[1]]
        arguments: dict[str, object] = {}
        end = _read_parameters(text, _skip(text, opening.end()), tags, tool, arguments)
        if not isinstance(end, int):
            told.append(CutCall(tool.name, write_json(arguments)[:-1]))
            return end
        calls.append(FoundCall(tool.name, arguments))
        told.append(calls[-1])
        at = _skip(text, end)
    return calls


def _read_parameters(
    text: str, at: int, tags: Tags, tool: Tool, arguments: dict[str, object]
) -> int | Literal["more"] | None:
    """Read the parameters from `at` on into `arguments`; return where their function ends, or why it does not."""
    while not text.startswith(tags.function_end, at):
        key = tags.parameter.match(text, at)
        if key is None or key[1] in arguments:
            return None
        end = _end_of_value(text, key.end(), tags)
        if end is None:
            return "more"
        value = text[key.end() : end]
        if tags.line_around_values:
            value = value.removeprefix("\n").removesuffix("\n")
        is_string = key[2] if tags.parameter.groups > 1 else None
        arguments[key[1]] = (
            value if is_string == "true" else value_of(value, tool.properties.get(key[1]), tool.parameters)
        )
        at = _skip(text, end + len(tags.parameter_end))
    return at + len(tags.function_end)


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def _end_of_value(text: str, at: int, tags: Tags) -> int | None:
    """The position where the value that begins at `at` ends, or None if it does not end."""
    while (end := text.find(tags.parameter_end, at)) >= 0:
        behind = _skip(text, end + len(tags.parameter_end))
        if text.startswith(tags.function_end, behind) or tags.parameter.match(text, behind):
            return end
        at = end + 1
    return None
