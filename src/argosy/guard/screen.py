"""Apply a policy to the texts of one request, and to the answers that are made of them.

    messages  ─ RequestScreen ─>  messages with placeholders, or Blocked
    an answer, piece by piece  ─ TextScreen ─>  found values, lists  ->  question  ─ other checks ─>  restored, sent

Checks that only compute run here, in whatever thread calls. Checks that ask somebody are `question`s: the caller asks,
and says `answered`. A text is passed on only after every check saw it and let it pass; `overlap_characters` of it wait
for the next question, so no passage of that length is sent in part.

Elsewhere: the policy is `policy.py`; who asks is `serve/screening.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from argosy.guard.pii.placeholders import Placeholders, Restorer
from argosy.guard.pii.stream import FindingStream
from argosy.guard.policy import ContentPolicy, HttpCheck, ListCheck, ModelCheck
from argosy.guard.verdict import Blocked
from argosy.strict_json import JsonError, parse_json

Side = Literal["input", "output"]
Note = Callable[[Side, str, int], None]
"""Counts (side, what was found, how often): `pii:email`, or the name of a check."""

_NAMES = ("name", "type", "required", "$ref")  # in a tool or a schema: they refer to something
_TEXTS = ("content", "reasoning_content", "reasoning", "name")  # fields of a message


class RequestScreen:
    """The texts of one request. One thread at a time may use it.

    asked: the user's last words, as the model gets them.
    """

    def __init__(self, policy: ContentPolicy, note: Note) -> None:
        self.policy = policy
        self.asked = ""
        self._note = note
        self._placeholders = None
        if policy.finder is not None and policy.pii_input != "off":
            self._placeholders = Placeholders(policy.finder)

    @property
    def asked_checks(self) -> list[HttpCheck | ModelCheck]:
        """The checks of the input that ask somebody."""
        return [check for check in self.policy.input if not isinstance(check, ListCheck)]

    def conversation(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        counts: bool = True,
    ) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]], list[str]]:
        """Check a conversation, and the tools that it offers.

        Args:
            counts: note what is found; false if the same conversation is checked again.

        Returns:
            Messages and tools for the model, and their texts for checks that ask somebody.

        Raises:
            Blocked: the policy does not allow a text.
        """
        texts: list[str] = []
        for tool in tools:
            _described(tool, _collect(texts))
        for message in messages:
            _rewritten(message, _collect(texts))
        if self._placeholders is not None:
            self._placeholders.reserve(texts)
        checked: list[str] = []

        def check(text: str) -> str:
            checked.append(self._checked(text))
            return checked[-1]

        # Tools first: they come first in a prompt, and their placeholders must not change with the next turn.
        made_tools = [_described(tool, check) for tool in tools]
        made = [_rewritten(message, check) for message in messages]
        self.asked = next((_said(message) for message in reversed(made) if message.get("role") == "user"), "")
        self._note_values(is_counted=counts)
        return made, made_tools, checked

    def text(self, text: str, *, counts: bool = True) -> str:
        """Check a text; return what the model gets. Raises what `conversation` raises."""
        if self._placeholders is not None:
            self._placeholders.reserve([text])
        self.asked = made = self._checked(text)
        self._note_values(is_counted=counts)
        return made

    def _checked(self, text: str) -> str:
        mode = self.policy.pii_input
        made = text
        if self._placeholders is not None:
            num_before = self._placeholders.num_found.total()
            made = self._placeholders.redact(text)
            if mode == "block" and self._placeholders.num_found.total() > num_before:
                self._note_values()
                raise Blocked("the request", "personal data")
        for check in self.policy.input:
            if isinstance(check, ListCheck) and check.words.judge(text).is_flagged:
                self._note("input", check.name, 1)
                raise Blocked("the request", check.name)
        return made if mode == "redact" else text

    def _note_values(self, *, is_counted: bool = True) -> None:
        if self._placeholders is not None:
            for entity, number in self._placeholders.num_found.items() if is_counted else ():
                self._note("input", f"pii:{entity}", number)
            self._placeholders.num_found.clear()

    def restore(self, text: str) -> str:
        """`text` with the values of its placeholders."""
        return text if self._placeholders is None else self._placeholders.restore(text)

    def answer(self) -> AnswerScreen:
        """The screen of another answer."""
        return AnswerScreen(self.policy, self._placeholders, self._note)


class AnswerScreen:
    """One answer.

    blocked_by: why the rest of the answer is not sent; empty: it is.
    """

    def __init__(self, policy: ContentPolicy, given: Placeholders | None, note: Note) -> None:
        self._policy, self._note = policy, note
        self._given = given if policy.pii_input == "redact" else None
        self._own: Placeholders | None = None
        if policy.finder is not None and policy.pii_output != "off":
            # Values that the model itself wrote: none of them is put back.
            self._own = Placeholders(policy.finder)
            if self._given is not None:
                self._own.reserve([self._given.all_names])
        self.blocked_by = ""

    def text(self) -> TextScreen:
        """The screen of another stretch of text or thoughts."""
        return TextScreen(self, self._policy, self._given, self._own)

    def arguments(self, text: str) -> tuple[str, str]:
        """Check the arguments of a whole tool call.

        Returns:
            The arguments to send, and the text for checks that ask somebody.
        """
        made = text
        if self._own is not None:
            made = in_json(text, self._own.redact)
            self.found_values()
            if self._policy.pii_output == "detect":
                made = text
        for check in self._policy.output:
            if isinstance(check, ListCheck) and check.words.judge(made).is_flagged:
                self.block(check.name)
        return (made if self._given is None else self._given.restore(made, _in_json_text)), made

    def block(self, reason: str) -> None:
        """End the answer here."""
        if not self.blocked_by:
            self.blocked_by = reason
            if not reason.startswith("pii:"):
                self._note("output", reason, 1)

    def found_values(self) -> None:
        """Note the values that were found since the last call, and block the answer if the policy says so."""
        assert self._own is not None
        for entity, number in self._own.num_found.items():
            self._note("output", f"pii:{entity}", number)
            if self._policy.pii_output == "block":
                self.block(f"pii:{entity}")
        self._own.num_found.clear()


class TextScreen:
    """A stretch of text, piece by piece."""

    def __init__(
        self,
        answer: AnswerScreen,
        policy: ContentPolicy,
        given: Placeholders | None,
        own: Placeholders | None,
    ) -> None:
        self._answer, self._policy, self._own = answer, policy, own
        self._finding = (
            FindingStream(policy.finder) if own is not None and policy.finder is not None else None
        )
        self._lists = [
            (check.name, check.words.stream()) for check in policy.output if isinstance(check, ListCheck)
        ]
        self._asks = any(not isinstance(check, ListCheck) for check in policy.output)
        self._restorer = None if given is None else Restorer(given)
        self._context = ""  # passed by all checks, and shown to them again with what follows
        self._waiting = ""  # passed by what computes, and not by what asks
        self._num_seen = 0  # characters of that which a question has had
        self._is_end = False
        self._ready: list[str] = []

    def push(self, text: str, *, is_end: bool = False) -> None:
        """Take the next piece of the text, and with `is_end` its end."""
        if self._answer.blocked_by:
            return
        self._is_end = is_end
        text = self._without_values(text)
        for name, words in self._lists:
            text = words.push(text) + (words.finish() if is_end else "")
            if words.is_flagged:
                self._answer.block(name)
                return
        if self._answer.blocked_by:
            return
        self._waiting += text
        is_all_seen = is_end and self._num_seen == len(self._waiting)
        if not self._asks or is_all_seen:
            self._pass(len(self._waiting))

    def _without_values(self, text: str) -> str:
        if self._finding is None or self._own is None:
            return text
        parts = self._finding.push(text) + (self._finding.finish() if self._is_end else [])
        pieces = []
        for part in parts:
            if part.entity is not None:
                self._own.num_found[part.entity] += 1
            is_redacted = part.entity is not None and self._policy.pii_output == "redact"
            pieces.append(
                self._own.name(part.entity, part.text) if is_redacted and part.entity else part.text
            )
        self._answer.found_values()
        return text if self._policy.pii_output == "detect" else "".join(pieces)

    @property
    def question(self) -> str:
        """The text that other checks must see now; empty: none yet."""
        num_new = len(self._waiting) - self._num_seen
        if not self._asks or self._answer.blocked_by or not num_new:
            return ""
        return (
            self._context + self._waiting if self._is_end or num_new >= self._policy.chunk_characters else ""
        )

    def answered(self) -> None:
        """The checks let the question pass."""
        self._num_seen = len(self._waiting)
        self._pass(
            self._num_seen if self._is_end else max(0, self._num_seen - self._policy.overlap_characters)
        )

    def _pass(self, num_characters: int) -> None:
        passed, self._waiting = self._waiting[:num_characters], self._waiting[num_characters:]
        self._num_seen = max(0, self._num_seen - num_characters)
        self._context = (self._context + passed)[-self._policy.chunk_characters :]
        if self._restorer is not None:
            passed = self._restorer.push(passed) + (self._restorer.finish() if self._is_end else "")
        self._ready.append(passed)

    def take(self) -> str:
        """Return the text that may be sent now."""
        ready, self._ready = "".join(self._ready), []
        return ready


def in_json(text: str, write: Callable[[str], str]) -> str:
    """Rewrite the strings and numbers of a JSON text; a text that is none is rewritten as it is."""
    try:
        given = parse_json(text)
    except JsonError:
        return write(text)
    made = _leaves(given, write)
    return text if made == given else json.dumps(made, ensure_ascii=False)


def _leaves(value: Any, write: Callable[[str], str]) -> Any:
    match value:
        case str():
            return write(value)
        case bool() | None:
            return value
        case int() | float():
            text = repr(value)
            return value if (made := write(text)) == text else made
        case list():
            return [_leaves(one, write) for one in value]
        case dict():
            return {write(name): _leaves(one, write) for name, one in value.items()}
    return value


def _described(value: Any, write: Callable[[str], str]) -> Any:
    """A tool with the texts of its description and schema rewritten; names stay, of functions and of parameters."""
    match value:
        case str():
            return write(value)
        case list():
            return [_described(one, write) for one in value]
        case dict():
            # A parameter may be called `name`; its schema is no name.
            return {
                name: one if name in _NAMES and not isinstance(one, dict) else _described(one, write)
                for name, one in value.items()
            }
    return value


def _in_json_text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)[1:-1]


def _collect(texts: list[str]) -> Callable[[str], str]:
    def collect(text: str) -> str:
        texts.append(text)
        return text

    return collect


def _rewritten(message: Mapping[str, Any], write: Callable[[str], str]) -> Mapping[str, Any]:
    """A message with its texts rewritten; pictures and sounds stay."""
    made = dict(message)
    for name in _TEXTS:
        if isinstance(text := message.get(name), str):
            made[name] = write(text)
    if isinstance(parts := message.get("content"), list):
        made["content"] = [_part(part, write) for part in parts]
    if isinstance(calls := message.get("tool_calls"), list):
        made["tool_calls"] = [_call(call, write) for call in calls]
    return made


def _said(message: Mapping[str, Any]) -> str:
    """The text of a message."""
    content = message.get("content")
    if not isinstance(content, list):
        return str(content or "")
    texts = (part.get("text") for part in content if isinstance(part, dict))
    return "\n".join(text for text in texts if isinstance(text, str))


def _part(part: Any, write: Callable[[str], str]) -> Any:
    if isinstance(part, dict) and isinstance(text := part.get("text"), str):
        return {**part, "text": write(text)}
    return part


def _call(call: Any, write: Callable[[str], str]) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return call
    arguments = function.get("arguments")
    made = in_json(arguments, write) if isinstance(arguments, str) else _leaves(arguments, write)
    return {**call, "function": {**function, "arguments": made}}
