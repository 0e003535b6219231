"""Checks messages as clients send them, and turns them into turns.

    {"role", "content", "tool_calls", ...}  ->  check_messages  ->  Turn

Nothing is dropped silently: an unknown key is refused by name.

Elsewhere: `template_shape.py` finds out what a chat template expects of a turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from argosy.errors import UsageError
from argosy.media.parts import Audio, Content, Image, Text, Video
from argosy.prompt.json_text import MAX_PARTS, count_values, plain_json, plain_text, read_object, write_json

ROLES = ("system", "developer", "user", "assistant", "tool")

Message = Mapping[str, Any]
"""One turn: {"role", "content"}, and the keys that agents add.

    role                system, developer, user, assistant or tool
    content             text, or a list of parts: {"type": "text", "text": text}, {"type": "image", "image": Image},
                        "audio" and "video" likewise, or such objects alone: Text, Image, Audio, Video
    name                the speaker's name, for templates that use it
    reasoning_content   assistant: its thoughts before the answer; `reasoning` is another name for it
    tool_calls          assistant: [{"id", "type": "function", "function": {"name", "arguments"}}]; arguments are an
                        object or its JSON text; for a truncated call, any text
    tool_call_id        tool: the id of the call that this is the result of

A key whose value is None counts as absent. So do `parsed` and `parsed_arguments`, copies that OpenAI's client makes of
other content, and an empty list of annotations.
"""

_KEYS = {
    "assistant": ("role", "content", "name", "reasoning_content", "reasoning", "tool_calls"),
    "tool": ("role", "content", "name", "tool_call_id"),
}
_OTHER_KEYS = ("role", "content", "name")
# The key under which Anthropic wants non-object arguments to be sent back.
UNREADABLE = "INVALID_JSON"
_LONGEST_NAME = 256  # of a speaker, a call, or a call's id


@dataclass(frozen=True, slots=True)
class Call:
    """A tool call in an assistant's turn; `text` is the JSON of its arguments as sent."""

    id: str
    name: str
    arguments: Mapping[str, object]
    text: str


Media = Image | Audio | Video | Content
Piece = tuple[bool, str] | Media
"""(is the caller's, text), or a picture, sound or video, as it was given or read."""

JoinTexts = Callable[[Sequence[str]], str]

_MEDIA_TYPES: Mapping[str, type[Image | Audio | Video]] = {"image": Image, "audio": Audio, "video": Video}
_MEDIA_ROLES = ("user", "tool")
_MOST_MEDIA = 256  # per conversation


@dataclass(frozen=True, slots=True)
class Turn:
    """One checked message.

    answers: the id of the call that a tool turn answers.
    pieces: its content split by author, with media in their places; empty if it is all caller's text.
    """

    role: str
    content: str
    name: str | None = None
    reasoning: str = ""
    calls: tuple[Call, ...] = ()
    answers: str | None = None
    pieces: tuple[Piece, ...] = ()

    @property
    def media(self) -> tuple[Media, ...]:
        """Its pictures, sounds and videos, in order."""
        return tuple(piece for piece in self.pieces if not isinstance(piece, tuple))


def check_messages(
    messages: Sequence[Message], *, add_generation_prompt: bool = True, join_texts: JoinTexts = "\n".join
) -> tuple[Turn, ...]:
    """Check messages and turn them into turns; the first fault raises an error.

    If the model is to answer and the last turn is the assistant's, the answer continues it; an empty turn is
    dropped.

    Args:
        join_texts: joins adjacent texts of a message (`Shape.join_texts`).

    Raises:
        UsageError: there are no messages, a role or key is unknown, content is neither text nor media, two calls in
            a message share an id, a result has no call, or there is nothing for the model to answer or continue.
    """
    if not messages:
        raise UsageError("a conversation needs at least one message")
    require_few_values(messages)
    turns = []
    called: set[str] = set()
    for at, message in enumerate(messages):
        turn = _turn(_without_copies(message), f"message {at}", join_texts)
        called |= {call.id for call in turn.calls}
        if turn.answers is not None and turn.answers not in called:
            raise UsageError(
                f"message {at}: tool_call_id '{turn.answers}' matches no call in an earlier message"
            )
        turns.append(turn)
    num_media = sum(len(turn.media) for turn in turns)
    if num_media > _MOST_MEDIA:
        raise UsageError(
            f"a conversation may have at most {_MOST_MEDIA} pictures, sounds and videos, found {num_media}"
        )
    while add_generation_prompt and turns[-1].role == "assistant":
        if last := _to_be_continued(turns.pop()):
            turns += last
            break
        if not turns:
            raise UsageError(
                "every message is an empty one from the assistant, so there is nothing to answer"
            )
    return tuple(turns)


def _to_be_continued(last: Turn) -> list[Turn]:
    if last.calls:
        raise UsageError(
            "the last message calls tools, so there is nothing to answer",
            hint="send the results: one message with role tool for each call",
        )
    if last.content.strip():
        return [last]
    if last.reasoning:
        raise UsageError("the last message has only reasoning, and only text can be continued")
    return []


def require_few_values(messages: Sequence[Message]) -> None:
    """Check the arguments of all calls together before parsing them, because they are JSON inside JSON.

    Raises:
        UsageError: they have more than MAX_PARTS values.
    """
    num_left = MAX_PARTS
    for at, message in enumerate(messages):
        num_left -= _num_values(message)
        if num_left < 0:
            raise UsageError(f"message {at}: tool call arguments have more than {MAX_PARTS} values so far")


def _num_values(message: Message) -> int:
    """The number of values in the JSON of a message's arguments; more than MAX_PARTS if one text has too many."""
    calls = message.get("tool_calls")
    calls = calls if isinstance(calls, list | tuple) else ()
    functions = [call.get("function") for call in calls if isinstance(call, Mapping)]
    texts = [function.get("arguments") for function in functions if isinstance(function, Mapping)]
    try:
        return sum(
            sum(count_values(text.encode(errors="replace"))) for text in texts if isinstance(text, str)
        )
    except ValueError:
        return MAX_PARTS + 1


def _without_copies(message: Message) -> Message:
    """The message without absent keys and copies."""
    return {
        key: value
        for key, value in message.items()
        if value is not None and key != "parsed" and not (key == "annotations" and value == [])
    }


def _turn(message: Message, where: str, join_texts: JoinTexts) -> Turn:
    role = message.get("role")
    if role is None:
        raise UsageError(f"{where}: no 'role'")
    if not isinstance(role, str):
        raise UsageError(f"{where}: role is a {type(role).__name__}, expected text")
    if role not in ROLES:
        raise UsageError(f"{where}: unknown role '{role}'; known: {', '.join(ROLES)}")
    known = _KEYS.get(role, _OTHER_KEYS)
    unknown = [key for key in message if key not in known]
    if unknown:
        raise UsageError(f"{where}: unknown key '{unknown[0]}' for role {role}; known: {', '.join(known)}")
    calls = _calls(message.get("tool_calls", ()), where)
    if "content" not in message and not calls:
        raise UsageError(f"{where}: no 'content'")
    reasoning = [
        _text(message[key], f"{where}: {key}") for key in ("reasoning_content", "reasoning") if key in message
    ]
    if len(set(reasoning)) > 1:
        raise UsageError(f"{where}: reasoning_content and reasoning differ")
    content, pieces = _content(message.get("content", ""), role, where, join_texts)
    return Turn(
        role,
        content,
        name=_short(message["name"], f"{where}: name") if "name" in message else None,
        reasoning=reasoning[0] if reasoning else "",
        calls=calls,
        answers=_short(message["tool_call_id"], f"{where}: tool_call_id")
        if "tool_call_id" in message
        else None,
        pieces=pieces,
    )


def _content(content: object, role: str, where: str, join_texts: JoinTexts) -> tuple[str, tuple[Piece, ...]]:
    """The content's text, and its pieces if they include media."""
    if isinstance(content, str) or not isinstance(content, Sequence):
        return _text(content, f"{where}: content"), ()
    found = (_part(part, role, f"{where}: part {at}") for at, part in enumerate(content))
    return joined([(True, part) if isinstance(part, str) else part for part in found], join_texts)


def joined(parts: Sequence[Piece], join_texts: JoinTexts = "\n".join) -> tuple[str, tuple[Piece, ...]]:
    """The caller's texts joined, and the pieces that they form with media; no pieces without media.

    Args:
        join_texts: joins texts without media between them.
    """
    texts: list[str] = []
    pieces: list[Piece] = []
    for is_text, run in groupby(parts, key=lambda part: isinstance(part, tuple)):
        if not is_text:
            pieces += run
            continue
        texts.append(join_texts([part[1] for part in run if isinstance(part, tuple)]))
        pieces.append((True, texts[-1]))
    return "\n".join(texts), tuple(pieces) if len(texts) < len(pieces) else ()


def _part(part: object, role: str, where: str) -> str | Media:
    """The text of one part, or its picture, sound or video."""
    if isinstance(part, Text):
        return _text(part.text, f"{where}: text")
    media = part if isinstance(part, Media) else None
    if media is None:
        if not isinstance(part, Mapping):
            raise UsageError(f"{where} is a {type(part).__name__}, expected an object with a type")
        kind = part.get("type")
        if kind == "text":
            return _text(part.get("text"), f"{where}: text")
        if not isinstance(kind, str) or kind not in _MEDIA_TYPES:
            known = ", ".join(("text", *_MEDIA_TYPES))
            raise UsageError(f"{where} is of type {kind!r}; known: {known}")
        _only(("type", kind), part, where)
        media = part.get(kind)
        if not isinstance(media, _MEDIA_TYPES[kind]):
            raise UsageError(
                f"{where}: {kind} is a {type(media).__name__}, expected {_MEDIA_TYPES[kind].__name__}"
            )
    if role not in _MEDIA_ROLES:
        raise UsageError(
            f"{where} is a {media.kind}, and a message of role {role} takes text only",
            hint=f"put it in a message of role {_MEDIA_ROLES[0]}",
        )
    return media


def _calls(calls: object, where: str) -> tuple[Call, ...]:
    if isinstance(calls, str) or not isinstance(calls, Sequence):
        raise UsageError(f"{where}: tool_calls is a {type(calls).__name__}, expected a list")
    made: dict[str, Call] = {}
    for at, given in enumerate(calls):
        call = _call(given, f"{where}: tool call {at}")
        if call.id in made:
            raise UsageError(
                f"{where}: tool call {at} has the id '{call.id}' of an earlier call in this message",
                hint="give each call of a message an id of its own",
            )
        made[call.id] = call
    return tuple(made.values())


def _call(call: object, where: str) -> Call:
    if not isinstance(call, Mapping):
        raise UsageError(f"{where} is a {type(call).__name__}, expected an object")
    _only(("id", "type", "index", "function"), call, where)
    if call.get("type", "function") != "function":
        raise UsageError(f"{where}: type is {call['type']!r}; known: 'function'")
    function = call.get("function")
    if not isinstance(function, Mapping):
        raise UsageError(f"{where}: no 'function' with name and arguments")
    _only(("name", "arguments"), (key for key in function if key != "parsed_arguments"), where)
    given = function.get("arguments")
    if isinstance(given, str):
        text = plain_text(given, f"{where}: arguments") if given.strip() else "{}"
        arguments = read_object(text)
        if arguments is None:
            arguments = {UNREADABLE: text}
            text = write_json(arguments)
    elif isinstance(given, Mapping):
        plain = plain_json(given, f"{where}: arguments")
        assert isinstance(plain, dict)
        arguments, text = plain, write_json(plain)
    else:
        raise UsageError(
            f"{where}: arguments are a {type(given).__name__}, expected an object or its JSON text"
        )
    return Call(
        _short(call.get("id"), f"{where}: id"),
        _short(function.get("name"), f"{where}: name"),
        arguments,
        text,
    )


def _only(known: Sequence[str], given: Iterable[object], where: str) -> None:
    for key in given:
        if key not in known:
            raise UsageError(f"{where}: unknown key '{key}'; known: {', '.join(known)}")


def _short(value: object, where: str) -> str:
    text = _text(value, where)
    if not 1 <= len(text) <= _LONGEST_NAME:
        raise UsageError(f"{where} has {len(text)} characters, expected 1 to {_LONGEST_NAME}")
    return text


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise UsageError(f"{where} is a {type(value).__name__}, expected text")
    return plain_text(value, where)
