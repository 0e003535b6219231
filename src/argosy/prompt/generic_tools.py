"""Tool calling for chat templates that do not support it: tools, calls and results become text.

    turns, tools  ->  with_generic_tools  ->  turns that any chat template prints

The wording is that of Hermes and Qwen2.5, which most models have seen in training. The text around a caller's is
ours and is not tainted, so a mark becomes its token where the model has one; schemas, arguments and results are the
caller's, character by character.

Elsewhere: `builder.py` decides which models need this; `formats/hermes.py` reads the answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import groupby

from argosy.prompt.json_text import write_json
from argosy.prompt.messages import Piece, Turn
from argosy.prompt.tools import Tool

_HEAD = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>"""
_TAIL = """
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>"""


def with_generic_tools(turns: Sequence[Turn], tools: Sequence[Tool], *, takes_system: bool) -> list[Turn]:
    """Write calls and results into the texts of `turns`.

    Leading instructions and tools become one system message, or the start of the first question if the template takes
    no system message. Consecutive results and questions become one turn, because many templates require user and
    assistant turns to alternate.
    """
    num_first = next((at for at, turn in enumerate(turns) if not _instructs(turn)), len(turns))
    instructions = _joined([*(_pieces(turn) for turn in turns[:num_first]), *_told(tools)], "\n\n")
    made = [_without_calls(turn, takes_system=takes_system) for turn in turns[num_first:]]
    if instructions and takes_system:
        made.insert(0, _turn("system", instructions))
    elif instructions:
        made.insert(0, _turn("user", instructions))
    return [turn for group in _groups(made) for turn in _merged(group)]


def _instructs(turn: Turn) -> bool:
    return turn.role in ("system", "developer")


def _told(tools: Sequence[Tool]) -> list[list[Piece]]:
    if not tools:
        return []
    schemas = [[(False, "\n"), (True, write_json(tool.as_template_reads_it()))] for tool in tools]
    return [[(False, _HEAD), *(piece for schema in schemas for piece in schema), (False, _TAIL)]]


def _without_calls(turn: Turn, *, takes_system: bool) -> Turn:
    if turn.role == "tool":
        return _turn("user", [(False, "<tool_response>\n"), *_pieces(turn), (False, "\n</tool_response>")])
    if turn.calls:
        said = [_pieces(turn)] if turn.content else []
        pieces = _joined([*said, *([*_call(call.name, call.arguments)] for call in turn.calls)], "\n")
        return replace(_turn(turn.role, pieces), name=turn.name, reasoning=turn.reasoning)
    if _instructs(turn) and not takes_system:
        return _turn("user", _pieces(turn))
    return turn


def _call(name: str, arguments: object) -> list[Piece]:
    text = write_json({"name": name, "arguments": arguments})
    return [(False, "<tool_call>\n"), (True, text), (False, "\n</tool_call>")]


def _groups(turns: Iterable[Turn]) -> Iterable[list[Turn]]:
    return (list(group) for _, group in groupby(turns, key=lambda turn: turn.role))


def _merged(turns: list[Turn]) -> list[Turn]:
    """Merge consecutive user turns into one."""
    if turns[0].role != "user" or len(turns) == 1:
        return turns
    return [replace(_turn("user", _joined(map(_pieces, turns), "\n\n")), name=turns[-1].name)]


def _pieces(turn: Turn) -> list[Piece]:
    return list(turn.pieces) if turn.pieces else [(True, turn.content)]


def _joined(parts: Iterable[list[Piece]], between: str) -> list[Piece]:
    made: list[Piece] = []
    for part in parts:
        made += [(False, between), *part] if made else part
    return made


def _turn(role: str, pieces: Sequence[Piece]) -> Turn:
    text = "".join(piece[1] for piece in pieces if isinstance(piece, tuple))
    return Turn(role, text, pieces=tuple(pieces))
