"""Mistral and Mixtral: a list of calls, or since 2025 one call after another.

    [TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Oslo"}}]
    [TOOL_CALLS]get_weather[ARGS]{"city": "Oslo"}
    [TOOL_CALLS]get_weather[CALL_ID]a1b2c3d4e[ARGS]{"city": "Oslo"}

Only the next call or the end closes a call. Templates expect ids of nine letters and digits back.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence

from argosy.prompt.formats.block_format import BlockFormat
from argosy.prompt.formats.format import beginning_of_call, call_of
from argosy.prompt.formats.hermes import named_object
from argosy.prompt.formats.json_list import read_beginning_of_list, read_list
from argosy.prompt.formats.lark import Lark
from argosy.prompt.formats.parser import CutCall, FoundCall, Mark, Reading
from argosy.prompt.messages import Call
from argosy.prompt.tools import Tool

CALLS, ARGUMENTS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
_ID = re.compile(r"[A-Za-z0-9]{9}")


class Mistral(BlockFormat):
    name = "mistral"
    words = (CALLS,)
    thinking = ("[THINK]", "[/THINK]")
    blocks = {CALLS: None}  # noqa: RUF012 (a ClassVar, declared in the base)
    inside = (ARGUMENTS, CALL_ID)

    def read(self, block: Sequence[str], tools: Mapping[str, Tool]) -> Reading:
        if not _has_marks(block):
            return read_list("".join(block[1:]), tools)
        parts = _parts(block)
        call = None if parts is None else call_of(parts[0], parts[1], tools, parts[2])
        return None if call is None else [call]

    def read_cut(self, block: Sequence[str], tools: Mapping[str, Tool]) -> Sequence[FoundCall | CutCall]:
        if not _has_marks(block):
            return read_beginning_of_list("".join(block[1:]), tools)
        parts = _parts(block)
        return () if parts is None else beginning_of_call(parts[0], parts[1], tools, parts[2])

    def _calls(self, lark: Lark, tools: Sequence[Tool], parallel: bool) -> str:
        if lark.has_token(ARGUMENTS):
            bodies = " | ".join(
                lark.rule(f"{lark.literal(tool.name)} {lark.mark(ARGUMENTS)} {lark.arguments(tool)}")
                for tool in tools
            )
            return f"({lark.mark(CALLS)} ({bodies})){'+' if parallel else ''}"
        bodies = lark.rule(" | ".join(lark.rule(named_object(lark, tool)) for tool in tools))
        calls = f'{bodies} (", " {bodies})*' if parallel else bodies
        return f'{lark.mark(CALLS)} {lark.space()} "[" {calls} "]"'

    def own_id(self, call: Call, number: int) -> str:
        if _ID.fullmatch(call.id):
            return call.id
        return hashlib.sha256(call.id.encode()).hexdigest()[:9]


def _has_marks(block: Sequence[str]) -> bool:
    return any(isinstance(lexeme, Mark) for lexeme in block[1:])


def _parts(block: Sequence[str]) -> tuple[str, str, str | None] | None:
    """Name, arguments and id of a call written with marks."""
    marks = [at for at, lexeme in enumerate(block) if isinstance(lexeme, Mark)][1:]
    named = [str(block[at]) for at in marks]
    if named[0] == CALL_ID and named[1:2] == [ARGUMENTS]:
        own_id, last = "".join(block[marks[0] + 1 : marks[1]]).strip(), marks[1]
    elif named[0] == ARGUMENTS:
        own_id, last = None, marks[0]
    else:
        return None
    return "".join(block[1 : marks[0]]).strip(), "".join(block[last + 1 :]).strip(), own_id


FORMATS = (Mistral,)
