"""Continue the stream of a server that died with the same answer from another server.

    bytes  ->  Splitter  ->  events  ->  Transcript.take     what the client has, as a length and a digest
                                         Transcript.replay   the second server's events, without what the client has

When two servers give the same answer, its surroundings still differ: ids, times, token counts, and how much text
each event carries. A transcript therefore compares the substance: the texts, and the facts between them (roles,
tool names, stop reasons), joined in order. It keeps a digest per choice, not the answer itself. During a replay,
the part that the client has is compared and dropped; an event that reaches beyond it loses the beginning of its
text; later events get the ids that the client knows.

Elsewhere: `app.py` replaces a dead server; `serve/http/streams.py` is how servers write events.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from argosy.errors import ArgosyError
from argosy.serve.http.streams import DONE, Encoding
from argosy.strict_json import JsonError, parse_json

MOST_EVENT_BYTES = 8 << 20  # the last event of a response repeats its request and all its text
MOST_IDS = 4096  # per choice; tools called later keep the ids of the second server
_ID_KEYS = {"id", "item_id", "call_id", "response_id", "created", "created_at"}
# Keys whose values may differ between equal answers or say nothing about them.
_SURROUNDINGS = _ID_KEYS | {
    "previous_response_id", "model", "object", "usage", "timings", "prompt_progress", "logprobs", "sequence_number",
    "obfuscation", "total_duration", "load_duration", "prompt_eval_count", "prompt_eval_duration", "eval_count",
    "eval_duration",
}  # fmt: skip
_TEXT_KEYS = {
    "content", "reasoning_content", "text", "thinking", "partial_json", "arguments", "delta", "response",
}  # fmt: skip
_OUTSIDE = -1  # the channel of events that belong to no choice

Path = tuple[str | int, ...]


class NotTheSame(ArgosyError):
    """The second server's answer differs from the beginning that the client has."""

    http_status = 503


class BadStream(ArgosyError):
    """A server sent something other than a stream of events."""

    http_status = 502


class Splitter:
    """Cuts a stream into events, each with its separator.

    Args:
        encoding: how the server writes events.
        hold: called with the bytes of an incomplete event beyond the first 64 KiB; raises if there is no room for
            them.
    """

    _HELD_BYTES = 64 << 10

    def __init__(self, encoding: Encoding, hold: Callable[[int], None]) -> None:
        self._separator = b"\n\n" if encoding.media_type == "text/event-stream" else b"\n"
        self._hold = hold
        self._rest = bytearray()
        self._held_bytes = self._HELD_BYTES

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield the events that `data` completes.

        Raises:
            BadStream: an event is larger than MOST_EVENT_BYTES.
        """
        searched = max(0, len(self._rest) - 1)
        self._rest += data
        start = 0
        while (end := self._rest.find(self._separator, max(start, searched))) >= 0:
            end += len(self._separator)
            yield bytes(self._rest[start:end])
            start = end
        del self._rest[:start]
        if len(self._rest) > MOST_EVENT_BYTES:
            raise BadStream(f"an event is larger than {MOST_EVENT_BYTES} bytes")
        if len(self._rest) > self._held_bytes:
            self._hold(2 * len(self._rest) - self._held_bytes)  # doubled, so that calls are rare
            self._held_bytes = 2 * len(self._rest)

    def end(self) -> None:
        """Note the end of the stream.

        Raises:
            BadStream: it is inside an event.
        """
        if self._rest:
            raise BadStream("the stream ended inside an event")


@dataclass(slots=True)
class Event:
    """An event of a stream.

    name: after `event:`, if it has one.
    data: a JSON object, or `DONE`; None for a comment.
    """

    name: str | None
    data: dict[str, Any] | str | None


def parse_event(raw: bytes) -> Event:
    """Parse one event: a server-sent one or a line of JSON.

    Raises:
        BadStream: it is neither.
    """
    name, found = None, None
    for line in raw.splitlines():
        if line.startswith(b"event: "):
            name = line[7:].decode("utf-8", "replace")
        elif line.startswith(b"data: "):
            found = line[6:]
        elif line.startswith(b"{"):
            found = line
        elif line and not line.startswith(b":"):
            raise BadStream("a server sent a line that belongs to no event")
    if found is None:
        return Event(name, None)
    if found == DONE.encode():
        return Event(name, DONE)
    try:
        data = parse_json(found)
    except JsonError as error:
        raise BadStream(f"the data of an event cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise BadStream("the data of an event is not an object")
    return Event(name, data)


@dataclass(slots=True)
class _Said:
    """The text of one choice of an answer.

    digest: of all pieces so far, `num_bytes` in total.
    shape: the facts around the latest text.
    path: the place of that text in its event.
    """

    num_bytes: int = 0
    digest: Any = field(default_factory=lambda: hashlib.blake2b(digest_size=16))
    shape: bytes = b""
    path: Path = ()

    def pieces(self, data: dict[str, Any] | str) -> list[tuple[bytes, Path | None]]:
        """The pieces of an event, in order: facts paired with None, texts with their places. Adjacent texts are
        joined.
        """
        if isinstance(data, str):
            return [(b"\0D" + data.encode(), None)]
        if data.get("type") == "ping":
            return []
        texts: list[tuple[Path, str]] = []
        facts = _facts(data, (), texts)
        if not texts and _is_bare(facts):
            return [(b"\0L", None)] if _has_scores(data) else []  # a token whose text is still held back
        pieces: list[tuple[bytes, Path | None]] = []
        shape = json.dumps(facts, sort_keys=True).encode()
        if shape != self.shape:
            pieces.append((b"\0S" + shape, None))
            self.shape, self.path = shape, ()
        for path, text in texts:
            if path != self.path:
                pieces.append((b"\0P" + json.dumps(path).encode(), None))
                self.path = path
            pieces.append((text.encode(), path))
        return pieces

    def add(self, data: bytes) -> None:
        self.digest.update(data)
        self.num_bytes += len(data)


@dataclass(slots=True)
class _Ids:
    """Ids in the order of their first use.

    clients, noted: the ids that the client knows.
    known: a replaying server's ids -> those that the client knows.
    """

    clients: list[str | int] = field(default_factory=list)
    noted: set[str | int] = field(default_factory=set)
    known: dict[str | int, str | int] = field(default_factory=dict)

    def note(self, own: str | int) -> None:
        if own not in self.noted and len(self.clients) < MOST_IDS:
            self.noted.add(own)
            self.clients.append(own)

    def of(self, own: str | int) -> str | int:
        """The client's id for a server's id."""
        if own not in self.known:
            at = len(self.known)
            if at == len(self.clients):
                self.note(own)
            self.known[own] = self.clients[at] if at < len(self.clients) else own
        return self.known[own]


@dataclass(slots=True)
class _Choice:
    """One choice of an answer.

    said: the text that the client has.
    ids: the ids of its parts.
    again: the text that the replaying server has repeated; None outside a replay or once all of `said` is repeated.
    """

    said: _Said = field(default_factory=_Said)
    ids: _Ids = field(default_factory=_Ids)
    again: _Said | None = None


class Transcript:
    """The part of a stream that a client has.

    Attributes:
        is_whole: the last event that the client has ends the stream.
        renamed: the client's ids -> those of the server that answers now.
    """

    def __init__(self, encoding: Encoding) -> None:
        self._encoding = encoding
        self._choices: dict[int, _Choice] = {}
        self._ids = _Ids()  # for the whole answer, if it has choices
        self._is_replay = False
        self._number = -1  # number of the last event, where events are numbered
        self.is_whole = False
        self.renamed: dict[str, str] = {}

    @property
    def is_catching_up(self) -> bool:
        """Whether the replaying server still has to repeat part of what the client has."""
        return any(choice.again is not None for choice in self._choices.values())

    def begin_replay(self) -> None:
        """Expect the stream of another server, from its beginning."""
        self._is_replay = True
        self._ids.known.clear()
        for choice in self._choices.values():
            choice.again = _Said() if choice.said.num_bytes else None
            choice.ids.known.clear()

    def take(self, raw: bytes, event: Event) -> bytes | None:
        """Note an event; return what to send to the client, or None if the client already has it.

        Raises:
            NotTheSame: a replay contradicts what the client has.
        """
        data = event.data
        if data is None:
            return None if self.is_catching_up else raw
        choice = self._choices.setdefault(_channel(data), _Choice())
        if isinstance(data, dict):
            self._note_ids(data, choice)
        if choice.again is not None:
            rest = self._beyond(data, choice, choice.again)
            if rest is None:
                return None
            data = rest
        else:
            for piece, _ in choice.said.pieces(data):
                choice.said.add(piece)
        self.is_whole = _is_last(data)
        if isinstance(data, dict) and "sequence_number" in data:
            self._number += 1
            data["sequence_number"] = self._number
        return self._encoding.write(data, event.name) if self._is_replay else raw

    def _beyond(
        self, data: dict[str, Any] | str, choice: _Choice, again: _Said
    ) -> dict[str, Any] | str | None:
        """The part of a repeated event that the client lacks; None if it lacks nothing."""
        had = choice.said
        is_new = False
        for piece, path in again.pieces(data):
            num_known = min(len(piece), had.num_bytes - again.num_bytes)
            again.add(piece[:num_known])
            if (
                again.num_bytes == had.num_bytes
                and not is_new
                and again.digest.digest() != had.digest.digest()
            ):
                raise _difference()
            if path is not None and num_known:
                assert isinstance(data, dict)
                _set_text(data, path, _text(piece[num_known:]))
            if num_known == len(piece):
                continue
            if num_known and path is None:
                raise _difference()
            is_new = True
            had.num_bytes = again.num_bytes = again.num_bytes + len(piece) - num_known
            again.digest.update(piece[num_known:])
            had.digest = again.digest
        if again.num_bytes == had.num_bytes:
            choice.said, choice.again = again, None
        if is_new and isinstance(data, dict) and _has_scores(data):
            raise NotTheSame(
                "another server's answer is split into different pieces, each with its own logprobs"
            )
        return data if is_new else None

    def _note_ids(self, data: dict[str, Any], choice: _Choice) -> None:
        """Note the ids of an event; in a replay, replace them by those that the client knows."""
        for holder, key in _ids_in(data):
            ids = self._ids if holder is data and "choices" in data else choice.ids
            own = holder[key]
            if not self._is_replay:
                ids.note(own)
                continue
            holder[key] = known = ids.of(own)
            if known != own and isinstance(own, str):
                self.renamed[str(known)] = own


def _channel(data: dict[str, Any] | str) -> int:
    """The choice that an event belongs to."""
    if isinstance(data, str):
        return _OUTSIDE
    if "choices" not in data:
        return 0
    choices = data["choices"]
    first = choices[0] if isinstance(choices, list) and choices else None
    index = first.get("index") if isinstance(first, dict) else None
    return index if isinstance(index, int) else _OUTSIDE


def _facts(value: Any, path: Path, texts: list[tuple[Path, str]]) -> Any:
    """`value` without the surroundings of an answer and without its texts, which are added to `texts`."""
    if isinstance(value, dict):
        kept = {}
        for key, item in value.items():
            if key in _SURROUNDINGS or (key == "role" and path == ("message",)):  # in every line of Ollama's
                continue
            if key in _TEXT_KEYS and isinstance(item, str):
                if item:
                    texts.append(((*path, key), item))
                continue
            fact = _facts(item, (*path, key), texts)
            if fact is not None and fact is not False and fact not in ({}, []):
                kept[key] = fact
        return kept
    if isinstance(value, list):
        return [_facts(item, (*path, at), texts) for at, item in enumerate(value)]
    return value


def _is_bare(facts: Any) -> bool:
    """Whether facts are mere structure without content."""
    if isinstance(facts, dict):
        return all(
            key == "index" or (isinstance(item, dict | list) and _is_bare(item))
            for key, item in facts.items()
        )
    return isinstance(facts, list) and all(_is_bare(item) for item in facts)


def _ids_in(value: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """Every place that holds an id, in order."""
    if isinstance(value, dict):
        for key, item in value.items():
            is_time = key in ("created", "created_at")
            if key in _ID_KEYS and (type(item) is int if is_time else isinstance(item, str)):
                yield value, key
            else:
                yield from _ids_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from _ids_in(item)


def _set_text(data: Any, path: Path, text: str) -> None:
    for step in path[:-1]:
        data = data[step]
    data[path[-1]] = text


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:  # the texts differ in the middle of a character
        raise _difference() from None


def _has_scores(data: dict[str, Any]) -> bool:
    choices = data.get("choices")
    holders = [data, *(choices if isinstance(choices, list) else [])]
    return any(isinstance(holder, dict) and bool(holder.get("logprobs")) for holder in holders)


def _is_last(data: dict[str, Any] | str) -> bool:
    if isinstance(data, str):
        return True
    return data.get("done") is True or data.get("type") in (
        "message_stop",
        "response.completed",
        "response.incomplete",
    )


def is_failure(event: Event) -> bool:
    """Whether this event says that the server cannot finish its answer."""
    data = event.data
    return isinstance(data, dict) and (
        bool(data.get("error")) or data.get("type") in ("error", "response.failed")
    )


def _difference() -> NotTheSame:
    return NotTheSame(
        "the server failed, and another server gives a different answer to this request", hint="send it again"
    )
