"""Apply a policy to the texts of one request and to its answers.

    Shown (`view.py`)  ─ RequestScreen ─>  the same with placeholders, or Blocked
    an answer, piece by piece  ─ TextScreen ─>  found values, lists  ->  question  ─ other checks ─>  restored, sent

Checks that only compute run here, in the caller's thread. Checks that must ask a model or a server are returned as
a `question`: the caller asks it and then calls `answered`. Text is sent only after every check has passed it; the
last `overlap_characters` wait for the next question, so no passage of that length is sent in part.

Elsewhere: the policy is `policy.py`; `serve/guards/screening.py` asks the questions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

from argosy.guard.pii.placeholders import Placeholders, Restorer
from argosy.guard.pii.stream import FindingStream
from argosy.guard.policy import ContentPolicy, HttpCheck, ListCheck, ModelCheck
from argosy.guard.verdict import Blocked
from argosy.guard.view import Collector, Shown, call_visited, in_json_text

Side = Literal["input", "output"]
Note = Callable[[Side, str, int], None]
"""Counts (side, what was found, how often): `pii:email`, or the name of a check."""


class RequestScreen:
    """The texts of one request. One thread at a time may use it.

    asked: the user's last words, as the model sees them.
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
        """The input checks that must ask a model or a server."""
        return [check for check in self.policy.input if not isinstance(check, ListCheck)]

    def check(self, shown: Shown, *, counts: bool = True) -> tuple[Shown, list[str]]:
        """Check everything in a request that the model will see.

        Args:
            counts: record the findings; false when the same request is checked again.

        Returns:
            What the model gets, and the texts for asked checks.

        Raises:
            Blocked: the policy does not allow a text.
            UsageError: a value is in a place where it cannot be replaced.
        """
        texts = shown.all_texts()
        if self._placeholders is not None:
            mode = self.policy.pii_input
            self._placeholders.reserve(texts)
            made = shown.visited(_Redacting(self._placeholders, replaces=mode == "redact"))
            has_values = self._placeholders.num_found.total() > 0
            self._note_values(is_counted=counts or mode == "block")
            if mode == "block" and has_values:
                raise Blocked("the request", "personal data")
            shown = made
        for check in self.policy.input:
            if isinstance(check, ListCheck) and any(check.words.judge(text).is_flagged for text in texts):
                self._note("input", check.name, 1)
                raise Blocked("the request", check.name)
        self.asked = _last_asked(shown)
        return shown, shown.all_texts() if self.policy.pii_input == "redact" else texts

    def _note_values(self, *, is_counted: bool = True) -> None:
        if self._placeholders is not None:
            for entity, number in self._placeholders.num_found.items() if is_counted else ():
                self._note("input", f"pii:{entity}", number)
            self._placeholders.num_found.clear()

    def restore(self, text: str) -> str:
        """`text` with the values of its placeholders."""
        return text if self._placeholders is None else self._placeholders.restore(text)

    def answer(self) -> AnswerScreen:
        """Start the screen of an answer."""
        return AnswerScreen(self.policy, self._placeholders, self._note)


class AnswerScreen:
    """One answer.

    blocked_by: why the rest of the answer is withheld; empty if it is not.
    """

    def __init__(self, policy: ContentPolicy, given: Placeholders | None, note: Note) -> None:
        self._policy, self._note = policy, note
        self._given = given if policy.pii_input == "redact" else None
        self._own: Placeholders | None = None
        if policy.finder is not None and policy.pii_output != "off":
            # Values that the model itself wrote are not restored.
            self._own = Placeholders(policy.finder)
            if self._given is not None:
                self._own.reserve([self._given.all_names])
        self.blocked_by = ""

    def text(self) -> TextScreen:
        """Start the screen of another stretch of text or thoughts."""
        return TextScreen(self, self._policy, self._given, self._own)

    def call(self, name: str, arguments: str) -> tuple[str, str]:
        """Check a tool call, whole or cut off by the token limit.

        Returns:
            The arguments to send, and the text for asked checks.
        """
        made = arguments
        if self._own is not None:
            redacting = _Redacting(self._own, replaces=self._policy.pii_output == "redact")
            redacting.text(name)
            made = call_visited(arguments, redacting)
            self.found_values()
        found = Collector()
        found.text(name)
        call_visited(made, found)
        for check in self._policy.output:
            if isinstance(check, ListCheck) and any(
                check.words.judge(text).is_flagged for text in found.texts
            ):
                self.block(check.name)
        sent = made if self._given is None else self._given.restore(made, in_json_text)
        return sent, "\n".join(found.texts)

    def block(self, reason: str) -> None:
        """End the answer here."""
        if not self.blocked_by:
            self.blocked_by = reason
            if not reason.startswith("pii:"):
                self._note("output", reason, 1)

    def found_values(self) -> None:
        """Record the values found since the last call, and block the answer if the policy requires it."""
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
        self._context = ""  # passed by all checks; shown again together with what follows
        self._waiting = ""  # passed by the computed checks, not yet by the asked ones
        self._num_seen = 0  # how much of `_waiting` a question has covered
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
        """The text that asked checks must see now; empty if none."""
        num_new = len(self._waiting) - self._num_seen
        if not self._asks or self._answer.blocked_by or not num_new:
            return ""
        return (
            self._context + self._waiting if self._is_end or num_new >= self._policy.chunk_characters else ""
        )

    def answered(self) -> None:
        """Note that the asked checks passed the question."""
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


class _Redacting:
    """Finds values, and replaces them."""

    def __init__(self, placeholders: Placeholders, *, replaces: bool) -> None:
        self._placeholders, self._replaces = placeholders, replaces

    def text(self, text: str) -> str:
        made = self._placeholders.redact(text)
        return made if self._replaces else text

    def lines(self, lines: list[str]) -> list[str]:
        return [self.text(line) for line in lines]


def _last_asked(shown: Shown) -> str:
    """The user's last message, or the text to continue."""
    said = [message for message in shown.messages if message.get("role") == "user"]
    if not said:
        return "\n".join(shown.texts[:1])
    content = said[-1].get("content")
    if isinstance(content, str):
        return content
    texts = (part.get("text") for part in content or () if isinstance(part, Mapping))
    return "\n".join(text for text in texts if isinstance(text, str))
