"""Events of an answer as it is generated: text, thoughts, and tool calls.

tokens  ->  parser.py  ->  events  ->  a dialect's stream, or `collect` for the whole answer
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More text of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More of the model's thoughts before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallBegin:
    """The start of a call to `name`; `own_id` is the id that the model itself gave it, if its format has ids."""

    index: int
    id: str
    name: str
    own_id: str | None = None


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """A piece of the call's arguments; all pieces of a call form the JSON text of an object."""

    index: int
    json_fragment: str


@dataclass(frozen=True, slots=True)
class ToolCallEnd:
    """The call is complete. A call without this event was cut off by the token limit."""

    index: int


Event = TextDelta | ReasoningDelta | ToolCallBegin | ToolCallArguments | ToolCallEnd


@dataclass(frozen=True, slots=True)
class AnsweredCall:
    """One call of an answer; `arguments` is JSON text, or the start of it if the token limit cut off the call."""

    id: str
    name: str
    arguments: str
    own_id: str | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer."""

    text: str = ""
    reasoning: str = ""
    calls: tuple[AnsweredCall, ...] = ()


def collect(events: Iterable[Event]) -> Answer:
    """Combine events into a whole answer."""
    text, reasoning = [], []
    begun: dict[int, ToolCallBegin] = {}
    arguments: dict[int, list[str]] = {}
    for event in events:
        match event:
            case TextDelta():
                text.append(event.text)
            case ReasoningDelta():
                reasoning.append(event.text)
            case ToolCallBegin():
                begun[event.index] = event
            case ToolCallArguments():
                arguments.setdefault(event.index, []).append(event.json_fragment)
    calls = (
        AnsweredCall(call.id, call.name, "".join(arguments.get(index, ())), call.own_id)
        for index, call in begun.items()
    )
    return Answer("".join(text), "".join(reasoning), tuple(calls))
