"""Formats whose calls are one JSON list between two marks.

    <tool_calls>[{"name": "get_weather", "arguments": {"city": "Oslo"}}]</tool_calls>            Hunyuan-A13B
    <|tool_call|>[{"name": "get_weather", "arguments": {"city": "Oslo"}}]                        Granite-3
    <tool_calls>
    {"name": "get_weather", "arguments": {"city": "Oslo"}}
    </tool_calls>                                                                                 MiniMax-M1
    <|START_ACTION|>[
        {"tool_call_id": "0", "tool_name": "get_weather", "parameters": {"city": "Oslo"}}
    ]<|END_ACTION|>                                                                               Command-A-plus
    <|function_call|>{"name": "get_weather", "arguments": {"city": "Oslo"}}                      GigaChat-3.1

Objects without a list around them are read as well. Hunyuan and Command-A-plus also put marks around the text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import ClassVar

from argosy.prompt.formats.block_format import BlockFormat, inside_of
from argosy.prompt.formats.format import beginning_of_call, call_of, ends_inside_string
from argosy.prompt.formats.lark import Lark
from argosy.prompt.formats.parser import CutCall, FoundCall, Reading
from argosy.prompt.json_text import read_json
from argosy.prompt.messages import Call
from argosy.prompt.tools import Tool

_BETWEEN = re.compile(r"[\s,;]*")
_ID = re.compile(r"[0-9]{1,6}")
_BEGINNING = re.compile(
    r'\s*\{\s*(?:"tool_call_id"\s*:\s*"([^"\\]*)"\s*,\s*)?"(?:tool_)?name"\s*:\s*"([^"\\]+)"'
    r'(?:\s*,\s*"(?:arguments|parameters)"\s*:\s*(\{.*))?',
    re.DOTALL,
)


class JsonList(BlockFormat):
    """Calls in a list; `item` is the object of one call, with `{}` for the name, around its arguments."""

    item: ClassVar[tuple[str, str]] = ('{{"name": "{}", "arguments": ', "}")
    around: ClassVar[tuple[str, str]] = ("[", "]")
    between: ClassVar[str] = ", "

    def read(self, block: Sequence[str], tools: Mapping[str, Tool]) -> Reading:
        text = "".join(self._inside(block))
        calls = read_list(text, tools)
        return "more" if calls is None and self._closing(block) and ends_inside_string(text) else calls

    def read_cut(self, block: Sequence[str], tools: Mapping[str, Tool]) -> Sequence[FoundCall | CutCall]:
        return read_beginning_of_list("".join(self._inside(block)), tools)

    def _inside(self, block: Sequence[str]) -> Sequence[str]:
        return inside_of(block, self._closing(block) or "")

    def _closing(self, block: Sequence[str]) -> str | None:
        return self.blocks[block[0]]

    def _calls(self, lark: Lark, tools: Sequence[Tool], parallel: bool) -> str:
        before, after = self.item
        bodies = lark.rule(
            " | ".join(
                lark.rule(
                    f"{self._head(lark, before.format(tool.name))} {lark.arguments(tool)} {lark.literal(after)}"
                )
                for tool in tools
            )
        )
        calls = f"{bodies} ({lark.literal(self.between)} {bodies})*" if parallel else bodies
        opened, closed = next(iter(self.blocks.items()))
        first, last = (lark.literal(text) if text else "" for text in self.around)
        return f"{lark.mark(opened)} {first} {calls} {last} {lark.mark(closed) if closed else ''}".strip()

    def _head(self, lark: Lark, text: str) -> str:
        return lark.literal(text)


class Hunyuan(JsonList):
    name = "hunyuan"
    words = ("<tool_calls>",)
    blocks = {"<tool_calls>": "</tool_calls>"}  # noqa: RUF012 (a ClassVar, declared in the base)
    wrapping = (("<answer>", "</answer>"),)


class MiniMaxM1(JsonList):
    name = "minimax_m1"
    words = ("<tool_calls>", "<beginning_of_sentence>")
    spells_thoughts = True  # vLLM's parser looks for calls behind them
    blocks = {"<tool_calls>": "</tool_calls>"}  # noqa: RUF012
    around = ("\n", "\n")
    between = "\n"


class Granite3(JsonList):
    name = "granite"
    words = ("<|tool_call|>",)
    blocks = {"<|tool_call|>": None}  # noqa: RUF012


class Cohere2(JsonList):
    name = "cohere2"
    tokens = ("<|START_ACTION|>", "<|END_ACTION|>")
    thinking = ("<|START_THINKING|>", "<|END_THINKING|>")
    blocks = {"<|START_ACTION|>": "<|END_ACTION|>"}  # noqa: RUF012
    wrapping = (("<|START_TEXT|>", "<|END_TEXT|>"), ("<|START_RESPONSE|>", "<|END_RESPONSE|>"))
    item = ('", "tool_name": "{}", "parameters": ', "}")
    around = ("[\n    ", "\n]")
    between = ",\n    "

    def _head(self, lark: Lark, text: str) -> str:
        return " ".join([lark.literal('{"tool_call_id": "'), lark.rule("/[0-9]+/"), lark.literal(text)])

    def own_id(self, call: Call, number: int) -> str:
        return call.id if _ID.fullmatch(call.id) else str(number)


class GigaChat(JsonList):
    name = "gigachat"
    tokens = ("<|function_call|>",)
    blocks = {"<|function_call|>": None}  # noqa: RUF012
    around = ("", "")

    def _calls(self, lark: Lark, tools: Sequence[Tool], parallel: bool) -> str:
        return super()._calls(lark, tools, parallel=False)


def read_list(text: str, tools: Mapping[str, Tool]) -> list[FoundCall] | None:
    """The calls in a list of objects, or in objects one after another; None if anything else is there."""
    calls: list[FoundCall] = []
    try:
        said = read_json(text)
    except ValueError:
        said = _in_sequence(text)
    for item in said if isinstance(said, list) else [said]:
        if not isinstance(item, dict):
            return None
        own_id = item.get("id", item.get("tool_call_id"))
        call = call_of(
            item.get("name", item.get("tool_name")),
            item.get("arguments", item.get("parameters")),
            tools,
            own_id if isinstance(own_id, str) else None,
        )
        if call is None:
            return None
        calls.append(call)
    return calls or None


def _in_sequence(text: str) -> list[object]:
    """The values of a text that has several, or nothing if anything else is there."""
    values, at = [], 0
    while (start := _BETWEEN.match(text, at)) is not None and (at := start.end()) < len(text):
        try:
            _, end = json.JSONDecoder().raw_decode(text, at)
            values.append(read_json(text[at:end]))
        except (ValueError, RecursionError):
            return []
        at = end
    return values


def read_beginning_of_list(text: str, tools: Mapping[str, Tool]) -> Sequence[FoundCall | CutCall]:
    """Parse the items of a cut list: complete ones, and the start of the last."""
    calls: list[FoundCall | CutCall] = []
    text = text.lstrip().removeprefix("[")
    at = 0
    while (start := _BETWEEN.match(text, at)) is not None and (at := start.end()) < len(text):
        try:
            _, end = json.JSONDecoder().raw_decode(text, at)
        except (ValueError, RecursionError):
            return [*calls, *beginning_of_named_object(text[at:], tools)]
        calls += read_list(f"[{text[at:end]}]", tools) or []
        at = end
    return calls


def beginning_of_named_object(text: str, tools: Mapping[str, Tool]) -> Sequence[FoundCall | CutCall]:
    """The call that begins with `text`, if the text contains its name."""
    begun = _BEGINNING.match(text)
    return () if begun is None else beginning_of_call(begun[2], begun[3] or "", tools, begun[1])


FORMATS = (MiniMaxM1, Hunyuan, Granite3, Cohere2, GigaChat)
