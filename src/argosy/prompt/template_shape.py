"""Finds out how a chat template expects conversations with tools, by rendering small ones once.

    template  ->  find_shape  ->  Shape        turns  ->  Shape.messages  ->  messages for the template

Templates agree on `role` and `content` and on little else: some expect a call's arguments as an object and some as JSON
text, some print nothing for a turn that has both text and calls, some print only its first call. Anything that a
template would silently leave out is rewritten so that it prints it, or refused by name. Two things may still be
left out: thoughts, and text alongside calls where there is no way to print both. Refusing those would end a
conversation because of words that the model itself chose.

Elsewhere: `messages.py` checks what a client sends; `chat.py` renders.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from argosy.errors import UsageError
from argosy.prompt.json_text import write_json
from argosy.prompt.messages import Call, Turn
from argosy.prompt.tools import Tool

Messages = list[dict[str, Any]]
Try = Callable[[Messages, list[dict[str, object]] | None], str | None]
"""Returns what a template prints for messages and tools, or None if it fails."""

# The first one that a template reads is used.
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
# The names that templates use for media in a content's parts.
_TYPES = {"picture": "image", "sound": "audio", "video": "video"}


@dataclass(frozen=True, slots=True)
class Shape:
    """The kinds of messages that a template reads and prints.

    Attributes:
        variables: names that a caller may set.
        takes_tools: it tells the model about tools.
        takes_calls: it prints calls in earlier turns, and their results.
        arguments_as_text: it expects arguments as JSON text instead of an object.
        content_beside_calls: the value for "no text" in a turn with calls: "" or None.
        prints_all_calls: it prints every call in a turn with several.
        names_results: it prints which call a result answers; otherwise their order alone says so.
        content_goes: where the text of a turn with calls goes: alongside the calls, in a turn of its own before
            them, or nowhere. takes_content_and_reasoning: it prints both in a turn with calls.
        reasoning_key: the key from which it reads the assistant's thoughts, or None.
        knows_developer: it handles that role.
        takes_system: it prints a system message that is the first message.
        takes_late_system: it prints a system message that is not the first message.
        between_texts: the white space that it prints between the texts of a message; a newline if it takes only one
            text.
        trims_texts: it drops white space around each text.
    """

    variables: frozenset[str]
    takes_tools: bool
    takes_calls: bool
    arguments_as_text: bool
    content_beside_calls: str | None
    prints_all_calls: bool
    names_results: bool
    content_goes: Literal["beside", "before", "nowhere"]
    takes_content_and_reasoning: bool
    reasoning_key: str | None
    knows_developer: bool
    takes_system: bool
    takes_late_system: bool
    between_texts: str
    trims_texts: bool

    def join_texts(self, texts: Sequence[str]) -> str:
        """Adjacent texts of a message, as one text that the template prints in the same way."""
        return self.between_texts.join(text.strip() if self.trims_texts else text for text in texts)

    def messages(self, turns: Sequence[Turn]) -> Messages:
        """Convert `turns` to the messages that this template reads.

        Raises:
            UsageError: the template has no place for part of them.
        """
        made: Messages = []
        for turn in self._split(self._with_one_system(turns)):
            message: dict[str, Any] = {"role": turn.role, "content": _content(turn)}
            if turn.role == "developer" and not self.knows_developer:
                message["role"] = "system"
            if turn.name is not None:
                message["name"] = turn.name
            if turn.answers is not None:
                message["tool_call_id"] = turn.answers
            if (turn.calls or turn.role == "tool") and not self.takes_calls:
                raise UsageError("this model's chat template does not support tool calls and their results")
            if turn.calls:
                message["content"] = turn.content or self.content_beside_calls
                message["tool_calls"] = [self._call(call) for call in turn.calls]
            if turn.reasoning and self.reasoning_key is not None:
                message[self.reasoning_key] = turn.reasoning
            made.append(message)
        return made

    def _call(self, call: Call) -> dict[str, Any]:
        arguments = call.text if self.arguments_as_text else call.arguments
        return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}

    def _with_one_system(self, turns: Sequence[Turn]) -> Sequence[Turn]:
        """Merge leading instructions into one message if the template prints only one."""
        kinds = [turn.role in ("system", "developer") for turn in turns]
        if self.takes_late_system or not any(kinds[1:]):
            return turns
        num_first = kinds.index(False) if False in kinds else len(kinds)
        if any(kinds[num_first:]):
            at = kinds.index(True, num_first)
            raise UsageError(
                f"message {at}: this model's chat template takes instructions ({turns[at].role}) "
                "only at the start of a conversation"
            )
        whole = "\n\n".join(turn.content for turn in turns[:num_first])
        return [replace(turns[0], content=whole), *turns[num_first:]]

    def _split(self, turns: Sequence[Turn]) -> list[Turn]:
        """Split turns so that the template prints as much as possible of them."""
        made: list[Turn] = []
        for turn in turns:
            if not turn.calls or not turn.content:
                made.append(turn)
            elif self.content_goes == "before":
                made += [replace(turn, calls=()), replace(turn, content="", reasoning="")]
            elif turn.reasoning and not self.takes_content_and_reasoning:
                made.append(replace(turn, content="", reasoning=f"{turn.reasoning}\n\n{turn.content}"))
            else:
                made.append(turn)
        return made if self.prints_all_calls else _one_call_each(made)


def _content(turn: Turn) -> object:
    """A turn's text, its pieces of text, or a list of parts if it contains media."""
    if not turn.media:
        return list(turn.pieces) or turn.content
    parts: list[dict[str, Any]] = []
    for piece in turn.pieces:
        if not isinstance(piece, tuple):
            parts.append({"type": _TYPES[piece.kind]})
        elif parts and parts[-1]["type"] == "text":
            parts[-1]["text"].append(piece)
        else:
            parts.append({"type": "text", "text": [piece]})
    return parts


def _one_call_each(turns: Sequence[Turn]) -> list[Turn]:
    """Split turns into one call each, followed by its results."""
    made: list[Turn] = []
    at = 0
    while at < len(turns):
        turn, at = turns[at], at + 1
        if len(turn.calls) < 2:
            made.append(turn)
            continue
        results: dict[str | None, list[Turn]] = {}
        while at < len(turns) and turns[at].role == "tool":
            results.setdefault(turns[at].answers, []).append(turns[at])
            at += 1
        for num, call in enumerate(turn.calls):
            first = turn if num == 0 else replace(turn, content="", reasoning="")
            made.append(replace(first, calls=(call,)))
            made += results.pop(call.id, ())
        for others in results.values():
            made += others
    return made


def in_order_of_calls(turns: Sequence[Turn]) -> Sequence[Turn]:
    """Return `turns` with the results of each turn's calls in the order of the calls."""
    made = list(turns)
    for at, turn in enumerate(turns):
        if len(turn.calls) < 2:
            continue
        places = []
        for place in range(at + 1, len(turns)):
            if turns[place].role == "tool":
                places.append(place)
            elif turns[place].role not in ("user", "developer"):
                break
        order = {call.id: number for number, call in enumerate(turn.calls)}
        ranked = sorted((turns[place] for place in places), key=lambda one: order.get(one.answers or "", 0))
        for place, one in zip(places, ranked, strict=True):
            made[place] = one
    return made


def find_shape(variables: frozenset[str], names: frozenset[str], attempt: Try) -> Shape:
    """Find a template's shape.

    Args:
        variables: names that it reads from outside, except those with a fixed meaning.
        names: all attributes, keys and strings in it.
        attempt: renders messages and tools.
    """

    def printed(messages: Messages, *wanted: str) -> str | None:
        """The printed text, if it contains these words in this order."""
        text = attempt(messages, tools)
        at = 0
        for word in wanted if text is not None else ():
            at = text.find(word, at) if text is not None else -1
            if at < 0:
                return None
        # A template that means to print arguments does not print them in Python's own notation.
        return None if text is None or "'probe_key1'" in text else text

    tools: list[dict[str, object]] | None = [Tool("probe_tool", "probe").as_template_reads_it()]
    takes_tools = printed([_USER], "probe_tool") is not None
    if not takes_tools:
        tools = None

    results = [_probe_result(1, 1), _probe_result(2, 2)]
    arguments_as_text, takes_calls = False, False
    empty: str | None = ""
    for as_text in (False, True):
        forms = {
            none: printed(
                [_USER, _probe_turn(as_text, 1, content=none), results[0]], "probe_key1", "probe_result1"
            )
            for none in ("", None)
        }
        # The shortest output prints nothing twice, and no "None".
        taken = [(len(text), none is None, none) for none, text in forms.items() if text is not None]
        if taken:
            arguments_as_text, empty, takes_calls = as_text, min(taken)[2], True
            break

    def prints(*wanted: str, num_calls: int = 1, **more: Any) -> bool:
        turn = _probe_turn(arguments_as_text, num_calls, **more)
        return printed([_USER, turn, *results[:num_calls]], *wanted) is not None

    is_beside = prints("probe_text", "probe_key1", content="probe_text")
    said = {"role": "assistant", "content": "probe_text"}
    turn = _probe_turn(arguments_as_text, 1, content=empty)
    # If a template counts turns, only later ones show it.
    split = [_USER, said, turn, results[0], said, _USER]
    both = [_USER, _probe_turn(arguments_as_text, 2, content=empty)]
    exchanged = [_probe_result(1, 2), _probe_result(2, 1)]
    is_before = printed(split, "probe_text", "probe_key1") is not None
    key = next((key for key in _REASONING_KEYS if key in names), None)
    thought: dict[str, Any] = {} if key is None else {key: "probe_thought"}
    between_texts, trims_texts = _seam(attempt([{"role": "user", "content": _TWO_TEXTS}], tools))
    late = [{"role": "system", "content": "probe"}, _USER, {"role": "system", "content": "probe_late"}, _USER]
    return Shape(
        variables=variables,
        takes_tools=takes_tools,
        takes_calls=takes_calls,
        arguments_as_text=arguments_as_text,
        content_beside_calls=empty,
        prints_all_calls=prints("probe_key1", "probe_key2", num_calls=2, content=empty),
        names_results=attempt([*both, *results], tools) != attempt([*both, *exchanged], tools),
        content_goes="beside" if is_beside else "before" if is_before else "nowhere",
        takes_content_and_reasoning=prints("probe_key1", content="probe_text", **thought),
        reasoning_key=key,
        knows_developer="developer" in names,
        takes_system=printed([{"role": "system", "content": "probe_system"}, _USER], "probe_system")
        is not None,
        takes_late_system=printed(late, "probe_late") is not None,
        between_texts=between_texts,
        trims_texts=trims_texts,
    )


def _seam(printed: str | None) -> tuple[str, bool]:
    """What a template printed between `_TWO_TEXTS`, and whether it trimmed them."""
    found = re.search(r"probe_one(\s*)probe_two", printed or "")
    if found is None:  # it takes one text
        return "\n", False
    is_whole = len(found[1]) > 1 and found[1][0] == found[1][-1] == " "
    return (found[1][1:-1], False) if is_whole else (found[1], True)


_USER: dict[str, Any] = {"role": "user", "content": "probe"}
_TWO_TEXTS = [{"type": "text", "text": [(True, text)]} for text in ("probe_one ", " probe_two")]


def _probe_id(at: int) -> str:
    return f"probeid{at:02}"  # some templates require nine characters


def _probe_result(at: int, call: int) -> dict[str, Any]:
    return {"role": "tool", "content": f"probe_result{at}", "tool_call_id": _probe_id(call)}


def _probe_turn(as_text: bool, num_calls: int, **more: Any) -> dict[str, Any]:
    calls = []
    for at in range(1, num_calls + 1):
        arguments: Any = {f"probe_key{at}": "probe"}
        function = {"name": "probe_tool", "arguments": write_json(arguments) if as_text else arguments}
        calls.append({"id": _probe_id(at), "type": "function", "function": function})
    return {"role": "assistant", "tool_calls": calls, **more}
