"""Run the checks of a policy around requests: off the event loop, and off the engine's thread.

    Guarding: the server's policies, stops and users     Screening: one request     ScreenedAnswer: one of its answers
    gate: policy of the key  ->  core: the prompt  ─ patterns, lists ─ asked checks ─>  engine
    core: steps  ─ as many as have arrived together ─>  patterns and lists, in a thread; asked checks  ->  dialect

A check that asks another server or a model is asked only about what is new in a conversation, which is sent again with
every turn. Only keyed digests of conversations that passed are kept: a text passed where it stood, and nowhere else. A
check that fails counts as the policy says, and nothing is kept of it.

Elsewhere: what a policy does to a text is the room `guard`; asking is `check_over_http.py` and `check_by_model.py`.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import secrets
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

from prometheus_client.core import CounterMetricFamily, Metric

from argosy.errors import ArgosyError, Overloaded, UsageError
from argosy.guard.guard_models import Question
from argosy.guard.keys import Key
from argosy.guard.policy import ContentPolicy, HttpCheck, ListCheck, ModelCheck, Policies, read_policies
from argosy.guard.screen import Note, RequestScreen, Side, TextScreen
from argosy.guard.stops import Stops, stopped
from argosy.guard.users import UserBlocked, Users
from argosy.guard.verdict import Blocked, CheckFailed, Verdict, together
from argosy.prompt.formats.events import (
    Event,
    ReasoningDelta,
    TextDelta,
    ToolCallArguments,
    ToolCallBegin,
    ToolCallEnd,
)
from argosy.serve.guards import check_over_http
from argosy.serve.http.work import WorkQueue

log = logging.getLogger("argosy.serve")

_MOST_PASSED = 8192  # conversations that a check let pass
_ASKED_AT_ONCE = 8
_MOST_WAITING = 4096  # texts of one key: each of its answers waits for one at most
_PIECE = 20_000  # characters of one question about a text
_PIECE_OVERLAP = 500
_ASKED = 4000  # characters of the user's turn that a question about an answer shows
_RETRY_S = 5
_SAID_EVERY_S = 60.0  # how often to log that a check fails

T = TypeVar("T")
CountTokens = Callable[[str, int, int], None]
"""Counts tokens: (model, tokens of the question, tokens of its answer)."""
AskModel = Callable[[ModelCheck, Question, Key | None, CountTokens | None], Awaitable[Verdict]]
"""Asks a model for a key. Raises CheckFailed or ArgosyError."""


class InForce(NamedTuple):
    """A policy, and the digest of the file that it is from."""

    policy: ContentPolicy
    digest: str


class Guarding:
    """A server's checks and stops.

    Args:
        path: the policy file; what is stopped is kept beside it. None: nothing is checked, and stops end with the
            process.

    Raises:
        UsageError: a file cannot be read, or is invalid.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._policies: Policies | None = None if path is None else _read(path)
        self.stops = Stops(None if path is None else path.with_name(path.name + ".stops"))
        self.users = Users()
        self.changed: Callable[[], None] = lambda: None  # called when the files have been read again
        self._models: Sequence[str] = ()
        self.ask_model: AskModel | None = None
        self._computing = WorkQueue(max_waiting=_MOST_WAITING)
        self._asking = WorkQueue(num_threads=_ASKED_AT_ONCE, max_waiting=_MOST_WAITING)
        self._passed: OrderedDict[bytes, None] = OrderedDict()
        self._secret = secrets.token_bytes(32)
        self._lock = threading.Lock()
        self._counts: Counter[tuple[Side, str]] = Counter()
        self._said_at: dict[str, float] = {}

    @property
    def digest(self) -> str | None:
        """The digest of the policies in force; None: there are none."""
        return None if self._policies is None else self._policies.digest

    def require_models(self, names: Sequence[str]) -> None:
        """Check that the server has the models that checks ask, now and when the policies are read again.

        Raises:
            UsageError: it has not.
        """
        self._models = names
        if self._policies is not None:
            _require_models(self._policies, names)

    def reload(self) -> None:
        """Read the files again; running requests keep their policy. Raises UsageError, and then nothing changes."""
        if self._path is None:
            return
        policies = _read(self._path)
        _require_models(policies, self._models)
        self.stops.reload()
        with self._lock:
            self._policies = policies
            self._passed.clear()
        self.changed()

    def why_not(
        self, key: Key | None, models: Collection[str], persons: Collection[str]
    ) -> ArgosyError | None:
        """Why a request may not run now, by what is stopped and who is blocked; None: it may.

        Args:
            models: the id of the model that it uses and the name of the preset, if it uses one.
            persons: all names by which its client means a person.
        """
        if key is not None and self.stops.has("key", key.id, key.name):
            return stopped("key")
        if self.stops.has("model", *models):
            return stopped("model")
        blocked = () if self._policies is None else self._policies.blocked_users
        if self.stops.has("user", *persons) or any(person in blocked for person in persons):
            return UserBlocked(
                "the operator of this server does not accept requests of this user", code="user_blocked"
            )
        return None

    def in_force(self, key: Key | None) -> InForce | None:
        """The policy of a key that chooses none; None: nothing is checked for it."""
        policies = self._policies
        policy = None if policies is None else policies.of(key)
        return None if policies is None or policy is None else InForce(policy, policies.digest)

    def screening(self, key: Key | None, chosen: str | None, verdicts: list[str]) -> Screening | None:
        """The screening of a request; None: nothing is checked.

        Args:
            chosen: the policy that the request names.
            verdicts: gets the policy, its digest, and what is found, for a record of the request.

        Raises:
            UsageError: it may not choose that policy.
        """
        if self._policies is None:
            if chosen is not None:
                raise UsageError("x-argosy-policy: this server has no policies", param="x-argosy-policy")
            return None
        policy = self._policies.of(key, chosen)
        if policy is None:
            return None
        verdicts += [f"policy {policy.name}", f"policy_sha256 {self._policies.digest}"]

        def note(side: Side, what: str, number: int) -> None:
            self.note(side, what, number)
            if (verdict := f"{side} {what}") not in verdicts:
                verdicts.append(verdict)

        return Screening(self, RequestScreen(policy, note), key, self._policies, note)

    def note(self, side: Side, what: str, number: int) -> None:
        """Count what was found. Any thread may call it."""
        with self._lock:
            self._counts[side, what] += number

    def collect(self) -> Iterator[Metric]:
        """For Prometheus: how often each entity, list and check was found, by side."""
        metric = CounterMetricFamily("argosy_guard_found", "What checks found", labels=["side", "found"])
        with self._lock:
            counts = dict(self._counts)
        for (side, what), number in counts.items():
            metric.add_metric([side, what], number)
        yield metric

    @property
    def has_stopped(self) -> bool:
        """Whether checks wait for a thread that does not come."""
        return self._computing.has_stopped or self._asking.has_stopped

    async def compute(self, tenant: str, call: Callable[[], T]) -> T:
        """Run a check that only computes."""
        return await self._computing.run(tenant, call)

    async def verdict(
        self,
        check: HttpCheck | ModelCheck,
        question: Question,
        key: Key | None,
        count: CountTokens | None = None,
    ) -> Verdict:
        """Ask about a text. Raises CheckFailed."""
        tenant = "" if key is None else key.id
        try:
            async with asyncio.timeout(check.timeout_s):
                if isinstance(check, HttpCheck):
                    return await self._asking.run(tenant, check_over_http.judge, check, question.text)
                if self.ask_model is None:
                    raise CheckFailed("there is no such model")
                return await self.ask_model(check, question, key, count)
        except TimeoutError:
            raise self._failed(check.name, f"there was no answer within {check.timeout_s:g} s") from None
        except (CheckFailed, ArgosyError) as error:
            why = str(error) if isinstance(error, CheckFailed) else type(error).__name__
            raise self._failed(check.name, why) from None

    def num_passed(self, names: Sequence[bytes]) -> int:
        """How many texts at a conversation's beginning have passed, by the names of its beginnings (`_names`)."""
        with self._lock:
            return next((at for at in range(len(names), 0, -1) if names[at - 1] in self._passed), 0)

    def passed(self, name: bytes) -> None:
        """Remember that a check lets a conversation pass."""
        with self._lock:
            self._passed[name] = None
            self._passed.move_to_end(name)
            while len(self._passed) > _MOST_PASSED:
                self._passed.popitem(last=False)

    def names(self, check: HttpCheck | ModelCheck, digest: str, texts: Sequence[str]) -> list[bytes]:
        """Names of the beginnings of a conversation, under a check of the policies with this digest."""
        found, before = [], f"{digest}\0{check.name}".encode()
        for text in texts:
            said = hashlib.blake2b(before, key=self._secret, digest_size=32)
            said.update(text.encode("utf-8", "surrogatepass"))
            before = said.digest()
            found.append(before)
        return found

    def _failed(self, name: str, why: str) -> CheckFailed:
        now = time.monotonic()
        if now - self._said_at.get(name, -_SAID_EVERY_S) >= _SAID_EVERY_S:
            self._said_at[name] = now
            log.error("policy: the check %s failed: %s", name, why)
        return CheckFailed(why)


class Screening:
    """The checks of one request."""

    def __init__(
        self, guarding: Guarding, screen: RequestScreen, key: Key | None, policies: Policies, note: Note
    ) -> None:
        self._guarding, self._key, self._policies, self._note = guarding, key, policies, note
        self.screen = screen
        self.policy = screen.policy
        self.digest = policies.digest

    @property
    def tenant(self) -> str:
        return "" if self._key is None else self._key.id

    @property
    def asks_about_input(self) -> bool:
        """Whether a check of the input asks somebody."""
        return bool(self.screen.asked_checks)

    def admit(self, user: str) -> None:
        """Count a request of the person that the client names.

        Raises:
            TooMany: they have used up their requests.
        """
        self._guarding.users.admit(self.tenant, user, self.policy.requests_per_minute_per_user)

    async def require_allowed(self, texts: Sequence[str]) -> None:
        """Ask about the texts of a request.

        Raises:
            Blocked: a check does not allow one of them.
            Overloaded: a check failed, and the policy allows nothing without it.
        """
        for check in self.screen.asked_checks:
            names = await self.compute(partial(self._guarding.names, check, self.digest, texts))
            new = dict.fromkeys(texts[self._guarding.num_passed(names) :])
            try:
                verdict = await self._ask(check, Question("user", "\n\n".join(new)))
            except CheckFailed:
                self._note("input", f"failed:{check.name}", 1)
                if check.on_failure == "pass":
                    continue
                raise Overloaded(
                    f"the check {check.name} does not answer, and the policy allows no request without it",
                    retry_after_s=_RETRY_S,
                ) from None
            if verdict.is_flagged:
                self._note("input", check.name, 1)
                raise Blocked("the request", check.name)
            if names:
                self._guarding.passed(names[-1])

    async def refusal_of(self, text: str) -> str:
        """The check that does not allow a part of an answer; empty: all of them allow it."""
        question = Question("assistant", text, self.screen.asked[-_ASKED:])
        for check in self.policy.output:
            if isinstance(check, ListCheck):
                continue
            try:
                is_refused = (await self._ask(check, question)).is_flagged
            except CheckFailed:
                self._note("output", f"failed:{check.name}", 1)
                is_refused = check.on_failure == "block"
            if is_refused:
                return check.name
        return ""

    async def _ask(
        self, check: HttpCheck | ModelCheck, question: Question, count: CountTokens | None = None
    ) -> Verdict:
        """The verdict on a text of any length, piece by piece up to the first that is flagged. Raises CheckFailed."""
        found: list[Verdict] = []
        text = question.text
        if text.strip():
            for start in range(0, max(1, len(text) - _PIECE_OVERLAP), _PIECE - _PIECE_OVERLAP):
                piece = replace(question, text=text[start : start + _PIECE])
                found.append(await self._guarding.verdict(check, piece, self._key, count))
                if found[-1].is_flagged:
                    break
        return together(found)

    async def moderate(self, text: str, name: str | None, count: CountTokens) -> Verdict:
        """The verdict of the checks of the input on a text.

        Args:
            name: the only check to ask; None: all.
            count: counts the tokens of models.

        Raises:
            Overloaded: a check does not answer.
        """
        found: list[Verdict] = []
        for check in self.policy.input:
            if name not in (None, check.name):
                continue
            if isinstance(check, ListCheck):
                found.append(await self._guarding.compute(self.tenant, partial(check.words.judge, text)))
                continue
            try:
                found.append(await self._ask(check, Question("user", text), count))
            except CheckFailed as error:
                raise Overloaded(f"the check {check.name} failed: {error}", retry_after_s=_RETRY_S) from None
        return together(found)

    def answer(self) -> ScreenedAnswer:
        """The checks of another answer."""
        return ScreenedAnswer(self)

    async def compute(self, call: Callable[[], T]) -> T:
        """Run a check that only computes, in a thread."""
        return await self._guarding.compute(self.tenant, call)


class ScreenedAnswer:
    """The checks of one answer, in the order of its events."""

    def __init__(self, screening: Screening) -> None:
        self._screening = screening
        self._answer = screening.screen.answer()
        self._kind: type[TextDelta | ReasoningDelta] | None = None
        self._stretch: TextScreen | None = None
        self._calls: dict[int, tuple[ToolCallBegin, list[str]]] = {}

    @property
    def is_blocked(self) -> bool:
        """Whether the rest of the answer is not sent."""
        return bool(self._answer.blocked_by)

    async def take(self, events: Sequence[Event]) -> list[Event]:
        """Take events of the answer; return those that may be sent."""
        made: list[Event] = []
        for event in _merged(events):
            if self.is_blocked:
                break
            match event:
                case TextDelta() | ReasoningDelta():
                    if self._kind is not type(event):
                        made += await self._end_stretch()
                    self._kind = type(event)
                    made += self._delta(await self._push(event.text, is_end=False))
                case ToolCallBegin():
                    made += await self._end_stretch()
                    self._calls[event.index] = (event, [])
                case ToolCallArguments():
                    self._calls[event.index][1].append(event.json_fragment)
                case ToolCallEnd():
                    made += await self._end_call(event.index, event)
        return made

    async def finish(self) -> list[Event]:
        """The events that may be sent after the last one."""
        made = await self._end_stretch()
        for index in list(self._calls):
            made += await self._end_call(index, None)
        return made

    async def take_text(self, text: str, *, is_end: bool) -> str:
        """Take more of an answer that is nothing but text."""
        return "" if self.is_blocked else await self._push(text, is_end=is_end)

    async def _push(self, text: str, *, is_end: bool) -> str:
        if self._stretch is None:
            self._stretch = self._answer.text()
        stretch = self._stretch
        await self._screening.compute(partial(stretch.push, text, is_end=is_end))
        if question := stretch.question:
            if reason := await self._screening.refusal_of(question):
                self._answer.block(reason)
            else:
                stretch.answered()
        return stretch.take()

    async def _end_stretch(self) -> list[Event]:
        made = [] if self._kind is None else self._delta(await self._push("", is_end=True))
        self._kind = self._stretch = None
        return made

    def _delta(self, text: str) -> list[Event]:
        assert self._kind is not None
        return [self._kind(text)] if text else []

    async def _end_call(self, index: int, end: ToolCallEnd | None) -> list[Event]:
        """A whole call; one that the token limit cut off has no end."""
        begin, pieces = self._calls.pop(index)
        check = partial(self._answer.call, begin.name, "".join(pieces))
        arguments, question = await self._screening.compute(check)
        if not self.is_blocked and (reason := await self._screening.refusal_of(question)):
            self._answer.block(reason)
        if self.is_blocked:
            return []
        made: list[Event] = [begin, ToolCallArguments(index, arguments)]
        return made if end is None else [*made, end]


def _read(path: Path) -> Policies:
    policies = read_policies(path)
    for check in policies.checks:
        if isinstance(check, HttpCheck) and check.key_env is not None and not os.environ.get(check.key_env):
            raise UsageError(f"{path}: checks.{check.name}.key-env: the variable {check.key_env} is not set")
    return policies


def _require_models(policies: Policies, names: Sequence[str]) -> None:
    for check in policies.checks:
        if isinstance(check, ModelCheck) and check.model not in names:
            raise UsageError(
                f"the policy's check {check.name} asks the model {check.model}, "
                f"and this server has: {', '.join(names)}",
                hint="serve it beside the others: `argosy serve MODEL GUARD --policy FILE`",
            )


def _merged(events: Sequence[Event]) -> Iterator[Event]:
    """The events, with deltas of one kind that follow each other joined."""
    last: TextDelta | ReasoningDelta | None = None
    for event in events:
        if isinstance(event, TextDelta | ReasoningDelta):
            if last is not None and type(last) is type(event):
                last = type(event)(last.text + event.text)
                continue
            if last is not None:
                yield last
            last = event
            continue
        if last is not None:
            yield last
            last = None
        yield event
    if last is not None:
        yield last
