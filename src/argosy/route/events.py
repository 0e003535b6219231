"""Continue the stream of a server that died with the same answer from another server.

    bytes  ->  Splitter  ->  events  ->  Transcript.take     what the client has, as a length and a digest
                                         Transcript.replay   the second server's events, without what the client has

Two servers that give the same answer differ in what surrounds it: ids, times, token counts, and how much text an event
carries. A transcript therefore compares what an answer says: its texts, and the facts between them (roles, names of
tools, reasons to stop), joined in order. It keeps one digest for each choice of an answer, not the answer itself.
In a replay, what the client has is compared and dropped, an event that reaches beyond it loses the beginning of its
text, and later events get the ids that the client knows.

Elsewhere: who dies and who replaces it is `app.py`; how servers write events is `serve/http/streams.py`.
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

MOST_EVENT_BYTES = 8 << 20  # the last event of a response repeats its request and all of its text
MOST_IDS = 4096  # per choice; tools called later keep the ids of the second server
_ID_KEYS = {"id", "item_id", "call_id", "response_id", "created", "created_at"}
# Keys in which two equal answers may differ, and keys that say nothing about them.
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
    """A second server gave another answer than the one that the client has the beginning of."""

    http_status = 503


class BadStream(ArgosyError):
    """A server sent something that is not a stream of events."""

    http_status = 502


class Splitter:
    """Cuts a stream into events, each with its separator.

    Args:
        encoding: how the server writes events.
        hold: is called with the bytes of an event that is not complete, beyond the first 64 KiB, and raises if there is
            no room for them.
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
            self._hold(2 * len(self._rest) - self._held_bytes)  # so it is asked for seldom
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
    data: a JSON object, or `DONE`; None: a comment.
    """

    name: str | None
    data: dict[str, Any] | str | None


def parse_event(raw: bytes) -> Event:
    """Parse one event, server-sent or a line of JSON.

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

    digest: over all pieces so far, which are `num_bytes` long.
    shape: the facts around the text that came last.
    path: where in its event that text stood.
    """

    num_bytes: int = 0
    digest: Any = field(default_factory=lambda: hashlib.blake2b(digest_size=16))
    shape: bytes = b""
    path: Path = ()

    def pieces(self, data: dict[str, Any] | str) -> list[tuple[bytes, Path | None]]:
        """The pieces of an event, in order: facts with None, texts with their places. Adjacent texts join."""
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

    clients, noted: ids that the client knows.
    known: ids of the server of a replay, and those that the client knows instead.
    """

    clients: list[str | int] = field(default_factory=list)
    noted: set[str | int] = field(default_factory=set)
    known: dict[str | int, str | int] = field(default_factory=dict)

    def note(self, own: str | int) -> None:
        if own not in self.noted and len(self.clients) < MOST_IDS:
            self.noted.add(own)
            self.clients.append(own)

    def of(self, own: str | int) -> str | int:
        """The id that the client knows for one of the server."""
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
    again: the text that the server of a replay has repeated; None: all of `said`, or this is no replay.
    """

    said: _Said = field(default_factory=_Said)
    ids: _Ids = field(default_factory=_Ids)
    again: _Said | None = None


class Transcript:
    """The part of a stream that a client has.

    Attributes:
        is_whole: the last event that the client has ends the stream.
        renamed: ids that the client knows, and those of the server that answers now.
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
        """Whether the server of a replay has not yet repeated all that the client has."""
        return any(choice.again is not None for choice in self._choices.values())

    def begin_replay(self) -> None:
        """Expect the stream of another server, from its beginning."""
        self._is_replay = True
        self._ids.known.clear()
        for choice in self._choices.values():
            choice.again = _Said() if choice.said.num_bytes else None
            choice.ids.known.clear()

    def take(self, raw: bytes, event: Event) -> bytes | None:
        """Note an event; return what to send to the client, or None if the client has all of it.

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
        """The part of a repeated event that the client does not have; None: it has all of it."""
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
            raise NotTheSame("the answer of another server has other pieces, and each has its own logprobs")
        return data if is_new else None

    def _note_ids(self, data: dict[str, Any], choice: _Choice) -> None:
        """Note the ids of an event; in a replay, put those in their places that the client knows."""
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
    """`value` without its texts, which are added to `texts`, and without what surrounds an answer."""
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
    """Whether facts only say where something would stand."""
    if isinstance(facts, dict):
        return all(
            key == "index" or (isinstance(item, dict | list) and _is_bare(item))
            for key, item in facts.items()
        )
    return isinstance(facts, list) and all(_is_bare(item) for item in facts)


def _ids_in(value: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """Every place of an id, in order."""
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
    """Whether a server says with this event that it cannot finish its answer."""
    data = event.data
    return isinstance(data, dict) and (
        bool(data.get("error")) or data.get("type") in ("error", "response.failed")
    )


def _difference() -> NotTheSame:
    return NotTheSame(
        "the server failed, and another server gives another answer to this request", hint="send it again"
    )
