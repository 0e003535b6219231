"""Gives an answer its original tokens when its conversation continues.

    answer  ->  remember  ->  memory        conversation  ->  recall  ->  prompt with the tokens of the answer

A client sends an answer back as text and parsed arguments. Rendered by the template, they rarely give the sampled
tokens: JSON has different spacing, thoughts are left out, a word has several tokenizations. Everything after them
would then miss the KV cache. So the tokens of an answer are remembered and reused where the answer lines up: the
prompt before it is the same, token by token, and the template prints what the model said, apart from white space.
Where this does not hold, the template's own text is used.

Parts that a client does not send back (thoughts, the model's own call ids) are filled in before the template sees
the answer, so the template still decides whether to show the thoughts.

Elsewhere: `builder.py` calls both; `formats/` parses answers.
"""

from __future__ import annotations

import threading
from array import array
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from blake3 import blake3

from argosy.media.parts import Content
from argosy.prompt.formats import Answer, Format, collect
from argosy.prompt.json_text import read_object, write_json
from argosy.prompt.messages import Turn
from argosy.prompt.prompt import Prompt, Trace
from argosy.prompt.tokenizer import Segment, text_of
from argosy.prompt.tools import Tool

if TYPE_CHECKING:
    from argosy.prompt.tokenizer import Tokenizer

_ENTRY_BYTES = 1024  # Python's own overhead per entry
_TAIL_CHARACTERS = 64  # of a prompt's end, which show whether it opened the model's thoughts


@dataclass(frozen=True, slots=True)
class Remembered:
    """One answer: where it began, what it said, and its tokens except the one that ended it."""

    trace: Trace
    answer: Answer
    token_ids: array[int]

    @property
    def nbytes(self) -> int:
        answer = self.answer
        said = [
            answer.text,
            answer.reasoning,
            self.trace.continued,
            *(call.arguments for call in answer.calls),
        ]
        return _ENTRY_BYTES + self.token_ids.itemsize * len(self.token_ids) + 4 * sum(map(len, said))


class HasSize(Protocol):
    """A value that a memory can keep."""

    @property
    def nbytes(self) -> int: ...


T = TypeVar("T", bound=HasSize)


class TenantMemory(Generic[T]):
    """Values by tenant and key. When there are too many, the tenant with the most bytes loses its oldest."""

    def __init__(self, *, max_turns: int = 4096, max_bytes: int = 64 << 20) -> None:
        self._max_turns = max_turns
        self._max_bytes = max_bytes
        self._tenants: dict[str, _Tenant[T]] = {}
        self._lock = threading.Lock()

    @property
    def num_turns(self) -> int:
        return sum(len(tenant.turns) for tenant in self._tenants.values())

    @property
    def nbytes(self) -> int:
        # other threads may change it meanwhile
        return sum(tenant.nbytes for tenant in list(self._tenants.values()))

    def put(self, tenant: str, key: bytes, turn: T) -> None:
        with self._lock:
            self._tenants.setdefault(tenant, _Tenant()).put(key, turn)
            while self.num_turns > self._max_turns or self.nbytes > self._max_bytes:
                largest = max(self._tenants, key=lambda name: self._tenants[name].nbytes)
                self._tenants[largest].drop_oldest()
                if not self._tenants[largest].turns:
                    del self._tenants[largest]

    def get(self, tenant: str, key: bytes) -> T | None:
        with self._lock:
            held = self._tenants.get(tenant)
            return None if held is None else held.turns.get(key)

    def touch(self, tenant: str, keys: Iterable[bytes]) -> None:
        """Mark these values as just used, the last one most recently."""
        with self._lock:
            held = self._tenants.get(tenant)
            turns: OrderedDict[bytes, T] = OrderedDict() if held is None else held.turns
            for key in keys:
                if key in turns:
                    turns.move_to_end(key)

    def remove(self, tenant: str, keys: Iterable[bytes]) -> None:
        """Remove these values, if present."""
        with self._lock:
            if (held := self._tenants.get(tenant)) is not None:
                for key in keys:
                    held.remove(key)

    def remove_oldest(self, is_old: Callable[[T], bool], *, most: int) -> None:
        """Remove each tenant's least recently used values, up to the first that is not old.

        Args:
            most: the limit over all tenants; the rest is left for another call.
        """
        with self._lock:
            for name, held in list(self._tenants.items()):
                while most and held.turns and is_old(next(iter(held.turns.values()))):
                    held.drop_oldest()
                    most -= 1
                if not held.turns:
                    del self._tenants[name]

    def forget(self, tenant: str) -> int:
        """Forget everything of `tenant`; return the number of its values."""
        with self._lock:
            held = self._tenants.pop(tenant, None)
            return 0 if held is None else len(held.turns)


class ReplayMemory(TenantMemory[Remembered]):
    """Remembered answers, by their key."""


class _Tenant(Generic[T]):
    def __init__(self) -> None:
        self.turns: OrderedDict[bytes, T] = OrderedDict()
        self.nbytes = 0

    def put(self, key: bytes, turn: T) -> None:
        self.remove(key)
        self.nbytes += turn.nbytes
        self.turns[key] = turn

    def remove(self, key: bytes) -> None:
        if (old := self.turns.pop(key, None)) is not None:
            self.nbytes -= old.nbytes

    def drop_oldest(self) -> None:
        _, turn = self.turns.popitem(last=False)
        self.nbytes -= turn.nbytes


class Replay:
    """Remembers and recalls answers for one model."""

    def __init__(
        self, memory: ReplayMemory, tokenizer: Tokenizer, format_for: Callable[[Sequence[Tool]], Format],
        under: str = "",
    ) -> None:  # fmt: skip
        """`format_for` returns the format of an answer that may call these tools; `under`: the adapter that answers."""
        self._memory = memory
        self._tokenizer = tokenizer
        self._format_for = format_for
        self._under = under.encode()

    def remember(
        self, tenant: str, prompt: Prompt, token_ids: Sequence[int], answer: Answer, tools: Sequence[Tool]
    ) -> bool:
        """Keep an answer in case its conversation continues.

        Args:
            tenant: the owner; only this tenant gets the answer back.
            prompt: the prompt that was answered.
            token_ids: the sampled tokens, including the one that ended the answer.
            answer: the answer that the client received.
            tools: the tools of the request.

        Returns:
            Whether it is kept. It is not if the client received less than was sampled (a stop string cut it off),
            or if the prompt was not built from messages.
        """
        if prompt.trace is None or not (answer.text.strip() or answer.calls):
            return False
        sampled = list(token_ids)
        if sampled and sampled[-1] in self._tokenizer.eos_ids:
            sampled.pop()
        if not _is_same(self._read(sampled, prompt, tools), answer):
            return False
        turn = Remembered(prompt.trace, answer, array("I", sampled))
        if answer.calls:
            key = _call_key(answer.calls[0].id)
        else:
            said = prompt.trace.continued + answer.text
            key = next_digest(prompt.trace.conversation, Turn("assistant", said))
        self._memory.put(tenant, self._under + key, turn)
        return True

    def recall(
        self, tenant: str, turns: Sequence[Turn]
    ) -> tuple[list[Turn], list[Remembered], dict[str, str]]:
        """Look up the remembered answers of a conversation.

        Returns:
            turns: with the thoughts that the client left out.
            remembered: the answers among them, in order.
            own_ids: maps each call's id to the model's own id for it.
        """
        filled: list[Turn] = []
        remembered: list[Remembered] = []
        own_ids: dict[str, str] = {}
        keys: list[bytes] = []
        digest = b""
        for turn in turns:
            digest = next_digest(digest, turn)
            keys.append(self._under + (_call_key(turn.calls[0].id) if turn.calls else digest))
            found = self._memory.get(tenant, keys[-1]) if turn.role == "assistant" else None
            if found is not None and _says_what_was_said(turn, found):
                remembered.append(found)
                own_ids |= {call.id: call.own_id for call in found.answer.calls if call.own_id is not None}
                filled.append(replace(turn, reasoning=found.answer.reasoning))
            else:
                filled.append(turn)
        # An answer is useful only with those before it, so the first ones are forgotten last.
        self._memory.touch(tenant, reversed(keys))
        return filled, remembered, own_ids

    def encode(
        self,
        segments: Sequence[Segment],
        remembered: Iterable[Remembered],
        tools: Sequence[Tool],
        *,
        is_continued: bool = False,
        max_tokens: int | None = None,
    ) -> list[int]:
        """Encode a rendered conversation, using the tokens of remembered answers where they line up.

        `is_continued`: the conversation ends inside an assistant's turn.

        Raises:
            PromptTooLong: there are more than `max_tokens`.
        """
        tokenizer, text, turns = self._tokenizer, Rendered(segments), list(remembered)
        digests = text.digests({turn.trace.num_characters for turn in turns})
        ends = [c.start for c in tokenizer.template_controls(segments) if c.token_id in tokenizer.eos_ids]
        if is_continued:
            ends.append(text.num_characters)

        def encoded(start: int, stop: int) -> list[int]:
            return tokenizer.encode_segments(text.cut(start, stop), max_tokens=max_tokens)

        # Each turn must cost only its own text and that since the turn before: a conversation may have thousands of
        # turns.
        ids, hasher = list[int](), blake3()
        at = 0  # position in the text where the ids end
        for turn in turns:
            begin = turn.trace.num_characters
            number = bisect_left(ends, begin)
            if begin < at or number == len(ends) or digests.get(begin) != turn.trace.text:
                continue  # rejected without encoding anything
            tail = text.cut(max(0, begin - _TAIL_CHARACTERS), begin)
            prompt = Prompt(
                tuple(tokenizer.encode_segments(tail)), text_of(tail), is_continued=bool(turn.trace.continued)
            )
            if not _is_same(self._read(encoded(begin, ends[number]), prompt, tools), turn.answer):
                continue
            head = encoded(at, begin)
            hasher.update(array("I", head).tobytes())
            if hasher.digest() != turn.trace.ids:
                break  # an earlier answer was forgotten, so later ones cannot match either
            hasher.update(turn.token_ids.tobytes())
            ids += head
            ids += turn.token_ids
            at = ends[number]
        return ids + encoded(at, text.num_characters)

    def _read(self, token_ids: Sequence[int], prompt: Prompt, tools: Sequence[Tool]) -> Answer:
        return read_answer(token_ids, self._format_for(tools), self._tokenizer, tools, prompt)


def read_answer(
    token_ids: Sequence[int], form: Format, tokenizer: Tokenizer, tools: Sequence[Tool], prompt: Prompt | None
) -> Answer:
    """Parse `token_ids` as the answer to `prompt`."""
    is_continued = prompt is not None and prompt.is_continued
    parser, stream = form.parser(tools, prompt), tokenizer.stream(is_start=not is_continued)
    events = [event for token_id in token_ids for event in parser.push(token_id, stream.push(token_id))]
    return collect([*events, *parser.push(None, stream.finish()), *parser.finish()])


def trace_of(
    turns: Sequence[Turn],
    segments: Sequence[Segment],
    token_ids: Sequence[int],
    *,
    is_continued: bool = False,
) -> Trace:
    """The trace by which to find the answer to this prompt later; `is_continued`: the answer continues the last
    turn.
    """
    continued = turns[-1].content if is_continued else ""
    conversation = b""
    for turn in turns[:-1] if is_continued else turns:
        conversation = next_digest(conversation, turn)
    num_characters = sum(len(text) for _, text in segments)
    return Trace(num_characters, text_digest(segments), ids_digest(token_ids), conversation, continued)


class Rendered:
    """A rendered conversation, from which a part or the digest of a beginning costs no more than that part."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._segments = [segment for segment in segments if segment[1]]
        self._stops = list(accumulate(len(text) for _, text in self._segments))
        self.num_characters = self._stops[-1] if self._stops else 0

    def cut(self, start: int, stop: int) -> list[Segment]:
        """The part from character `start` to `stop`."""
        parts: list[Segment] = []
        for number in range(bisect_right(self._stops, start), len(self._segments)):
            is_callers, text = self._segments[number]
            at = self._stops[number] - len(text)
            if max(at, start) >= stop:
                break
            parts.append((is_callers, text[max(start - at, 0) : stop - at]))
        return parts

    def digests(self, stops: Collection[int]) -> dict[int, bytes]:
        """`text_digest` of the beginnings that end at `stops`, before the end of the text."""
        found: dict[int, bytes] = {}
        hasher, at = blake3(), 0  # digest of the segments that end by `at`
        for stop in sorted(stop for stop in stops if 0 <= stop < self.num_characters):
            number = bisect_right(self._stops, stop)
            whole = self._stops[number - 1] if number else 0
            _add_to(hasher, self.cut(at, whole))
            at, beginning = whole, hasher.copy()
            _add_to(beginning, self.cut(whole, stop))
            found[stop] = beginning.digest()
        return found


def text_digest(segments: Sequence[Segment]) -> bytes:
    """Digest of a text, including the author of each part."""
    hasher = blake3()
    _add_to(hasher, segments)
    return hasher.digest()


def _add_to(hasher: blake3, segments: Sequence[Segment]) -> None:
    for is_callers, text in segments:
        data = text.encode()
        hasher.update(b"%d %d:" % (is_callers, len(data)))
        hasher.update(data)


def ids_digest(token_ids: Sequence[int]) -> bytes:
    return blake3(array("I", token_ids).tobytes()).digest()


def next_digest(digest: bytes, turn: Turn) -> bytes:
    """Digest of a conversation extended by `turn`, without thoughts, because clients leave them out."""
    calls = [[call.id, call.name, call.arguments] for call in turn.calls]
    said = write_json([turn.role, turn.content.strip(), turn.name, turn.answers, calls])
    media = b"".join(part.digest for part in turn.media if isinstance(part, Content))
    return blake3(digest + said.encode() + media).digest()


def _call_key(call_id: str) -> bytes:
    return b"call " + call_id.encode()


def _says_what_was_said(turn: Turn, found: Remembered) -> bool:
    """Whether a client sent an answer back unchanged, after the text it continued; thoughts may be left out."""
    answer = found.answer
    return (
        [call.id for call in turn.calls] == [call.id for call in answer.calls]
        and [(call.name, call.arguments) for call in turn.calls] == _named(answer)
        and turn.content.strip() == (found.trace.continued + answer.text).strip()
        and turn.reasoning.strip() in ("", answer.reasoning.strip())
    )


def _is_same(one: Answer, other: Answer) -> bool:
    """Whether two answers are equal, apart from surrounding white space and call ids."""
    return (
        one.text.strip() == other.text.strip()
        and one.reasoning.strip() == other.reasoning.strip()
        and _named(one) == _named(other)
    )


def _named(answer: Answer) -> list[tuple[str, object]]:
    return [(call.name, read_object(call.arguments)) for call in answer.calls]
