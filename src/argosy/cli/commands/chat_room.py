"""Make room in a full conversation: choose the oldest turns to drop, and what replaces them.

A turn begins with a user message. The system message and the last turn always stay.

Elsewhere: `conversation.py` requests room, says what was dropped, and lets the model summarise it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, Literal

from argosy.errors import UsageError

if TYPE_CHECKING:
    from argosy.media.parts import Kind

ContextPolicy = Literal["stop", "trim", "summarise"]

Message = dict[str, Any]
_WORDS_PER_TOKEN = 0.6  # fewer than in most languages, so that the summary is not cut off


def split_turns(messages: Sequence[Message]) -> tuple[list[Message], list[list[Message]]]:
    """Split off the system message, if there is one, and split the rest into turns."""
    start: list[Message] = []
    turns: list[list[Message]] = []
    for message in messages:
        if message["role"] in ("system", "developer") and not turns:
            start.append(message)
        elif message["role"] == "user" or not turns:
            turns.append([message])
        else:
            turns[-1].append(message)
    return start, turns


def without_oldest(messages: Sequence[Message], num_turns: int) -> list[Message]:
    """The conversation without its first turns."""
    start, turns = split_turns(messages)
    return [*start, *(message for turn in turns[num_turns:] for message in turn)]


def oldest(messages: Sequence[Message], num_turns: int) -> list[Message]:
    """The system message and the first turns."""
    start, turns = split_turns(messages)
    return [*start, *(message for turn in turns[:num_turns] for message in turn)]


def num_to_drop(
    messages: Sequence[Message], most_tokens: int, count: Callable[[Sequence[Message]], int]
) -> int:
    """How many of the oldest turns to drop so that the rest has at most `most_tokens`; all but the last if nothing
    helps.

    `count` counts the tokens of a conversation; it is called once per doubling of the number of turns.
    """
    num_turns = len(split_turns(messages)[1])
    droppable = range(max(1, num_turns))
    found = bisect_left(droppable, True, key=lambda n: count(without_oldest(messages, n)) <= most_tokens)
    return min(found, droppable[-1])


def wanted_tokens(text: str, context_tokens: int) -> int:
    """How many tokens `/trim TEXT` should free: a number, a percentage, or half of the context.

    Raises:
        UsageError: the text is invalid, or exceeds the context.
    """
    number = text.removesuffix("%").strip()
    if not text:
        return context_tokens // 2
    if not (number.isdecimal() and len(number) < 10):
        raise UsageError(f"/trim takes a number of tokens or a percentage, found '{text}'", hint="/trim 25%")
    wanted = context_tokens * int(number) // 100 if text.endswith("%") else int(number)
    if wanted > context_tokens:
        raise UsageError(f"/trim: the context has {context_tokens:,} tokens, and {wanted:,} cannot be free")
    return wanted


def text_of(message: Message) -> str:
    """The text of an assistant message."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def summary_question(most_tokens: int) -> str:
    """The request for a summary, made before the oldest turns are dropped."""
    return (
        f"Summarise our conversation so far in at most {int(most_tokens * _WORDS_PER_TOKEN)} words, "
        "so that we can go on without it: facts, names, numbers, decisions and open questions."
    )


def with_notes(
    messages: Sequence[Message], kinds: Collection[Kind], *, takes_calls: bool
) -> tuple[list[Message], list[str]]:
    """Adapt a conversation to a model that takes only these kinds of media, and perhaps no tool calls.

    Returns:
        The conversation, with notes in place of what the model does not take, and the names of what was replaced.
    """
    from argosy.media.parts import Content

    replaced: dict[str, None] = {}  # an ordered set

    def noted(what: str, note: str) -> str:
        replaced[what] = None
        return note

    def part_or_note(part: object) -> object:
        if not isinstance(part, Content) or part.kind in kinds:
            return part
        return {"type": "text", "text": noted(part.kind, f"[{part.kind} omitted: this model cannot take it]")}

    def message_or_note(message: Message) -> Message:
        content = message.get("content")
        if isinstance(content, list):
            content = list(map(part_or_note, content))
            message = {**message, "content": content}
        calls = message.get("tool_calls") or []
        if takes_calls or not (calls or message["role"] == "tool"):
            return message
        parts = content if isinstance(content, list) else [{"type": "text", "text": content or ""}]
        if not calls:
            note = {"type": "text", "text": noted("tool call", "[result of a tool]")}
            return {"role": "user", "content": [note, *parts]}
        called = [call["function"] for call in calls]
        notes = [noted("tool call", f"[called {one['name']}: {one['arguments']}]") for one in called]
        return {
            "role": "assistant",
            "content": "\n".join([*(part["text"] for part in parts), *notes]).strip(),
        }

    return list(map(message_or_note, messages)), list(replaced)
