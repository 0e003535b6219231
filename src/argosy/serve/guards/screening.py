"""Apply a policy to one request: before the prompt is made, and during its answers.

    before: transcripts -> texts of a possible length -> patterns, lists -> what the model gets; asked checks
    during: steps that have arrived together -> patterns, lists, in a thread -> asked checks -> what may be sent

The policy decides how a failed check counts.

Elsewhere: what a policy does to a text is in the room `guard`; checks run in `checks.py`; the server's policies are
`guarding.py`.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import TypeVar

from argosy.config import SamplingParams
from argosy.errors import Overloaded, UsageError
from argosy.guard.guard_models import Question
from argosy.guard.keys import Key
from argosy.guard.policy import HttpCheck, ListCheck, ModelCheck
from argosy.guard.screen import Note, RequestScreen, TextScreen
from argosy.guard.users import Users
from argosy.guard.verdict import Blocked, CheckFailed, Verdict, together
from argosy.prompt.formats.events import (
    Event,
    ReasoningDelta,
    TextDelta,
    ToolCallArguments,
    ToolCallBegin,
    ToolCallEnd,
)
from argosy.prompt.messages import require_few_values
from argosy.serve.answer.answers import Answers, Ended, Progress, Said, Step
from argosy.serve.answer.check import Check, Checked, Text
from argosy.serve.answer.request import ChatRequest, ModelRequest, TextRequest
from argosy.serve.answer.service import Service
from argosy.serve.guards.checks import Checks, CountTokens
from argosy.serve.guards.shown import shown_of, with_shown
from argosy.serve.http.caller import Caller

_SCREENED_AT_ONCE = 64  # the most steps that are screened together
_PIECE = 20_000  # characters of a text per question
_PIECE_OVERLAP = 500
_ASKED = 4000  # characters of the user's turn shown in a question about an answer
_RETRY_S = 5
_USER_FIELDS = ("safety_identifier", "user")  # fields that name the person behind a request

T = TypeVar("T")


class Screening(Check):
    """The policy of one request."""

    def __init__(
        self, screen: RequestScreen, key: Key | None, *, digest: str, checks: Checks, users: Users, note: Note
    ) -> None:
        """`digest` is that of the policies; `users` counts each person's requests; `note` counts findings."""
        self._key, self._checks, self._users, self._note = key, checks, users, note
        self.screen, self.policy, self.digest = screen, screen.policy, digest
        self.changes_answers = self.policy.changes_answers
        self.asks = bool(screen.asked_checks)

    @property
    def tenant(self) -> str:
        return "" if self._key is None else self._key.id

    def named(self, person: str) -> None:
        """Count a request for the person that the client names.

        Raises:
            TooMany: the person has reached the limit.
        """
        self._users.admit(self.tenant, person, self.policy.requests_per_minute_per_user)

    def before(
        self, request: ModelRequest, service: Service, caller: Caller, *, counts: bool = True
    ) -> Checked:
        """Check a request.

        Raises:
            Blocked: the policy does not allow a text.
            UsageError: the request cannot be checked: it requests log-probabilities of text that may be withheld,
                or its prompt is token ids and contains values to replace.
        """
        params = request.params
        if self.changes_answers and (params.logprobs is not None or params.prompt_logprobs is not None):
            raise UsageError(
                "log-probabilities would show text before it is checked, and the policy of this server checks answers",
                param="logprobs", hint="leave them out",
            )  # fmt: skip
        if self.policy.checks_requests:
            if isinstance(request, ChatRequest):
                require_few_values(request.messages)  # because the view parses the arguments of calls
            request = _near(_heard(request, service, caller), service)
        shown = shown_of(request, partial(_decoded, service))
        made, texts = self.screen.check(shown, counts=counts)
        if isinstance(request, ChatRequest):
            if list(made.texts) != list(shown.texts):
                raise UsageError(
                    "the policy of this server replaces values, and the beginning of the answer is token ids",
                    param="continue_token_ids", hint="send it as a final assistant message",
                )  # fmt: skip
            # for the copy from which the prompt is built
            caller.held.share.hold(sum(map(sys.getsizeof, texts)))
        request = with_shown(request, shown, made)
        if not self.policy.watermark:
            request = replace(request, params=replace(request.params, watermark=False))
        # Under a policy these fields do matter: users are counted and may be blocked.
        return Checked(
            replace(request, ignored=[name for name in request.ignored if name not in _USER_FIELDS]), texts
        )

    async def passed(
        self, texts: Sequence[Text], service: Service, caller: Caller, *, cuts: bool = False
    ) -> Sequence[Text]:
        def check() -> list[Checked]:
            near = service.prompts.near.start
            given = (near(one) if cuts and isinstance(one, str) else one for one in texts)
            made = (TextRequest(prompt=one, params=SamplingParams()) for one in given)
            return [self.before(one, service, caller) for one in made]

        checked = await service.work.run(caller, check)
        if self.asks:
            await self.require_allowed([text for one in checked for text in one.texts])
        return [one.request.prompt for one in checked if isinstance(one.request, TextRequest)]

    def restored(self, text: str) -> str:
        return self.screen.restore(text)

    async def during(self, answers: Answers) -> AsyncGenerator[Step, None]:
        screened = [self.answer() for _ in answers.results] if self.policy.checks_answers else []
        waiting: list[Step] = []
        async with aclosing(answers.own_steps()) as steps:
            async for step in steps:
                if not screened:
                    yield step
                    continue
                waiting.append(step)
                if answers.has_more and len(waiting) < _SCREENED_AT_ONCE and not isinstance(step, Ended):
                    continue
                passed = [
                    made for one in _joined(waiting) for made in await _screened(one, answers, screened)
                ]
                for made in passed if self.changes_answers else waiting:
                    yield made
                waiting = []

    async def require_allowed(self, texts: Sequence[str]) -> None:
        """Ask about the texts of a request.

        Raises:
            Blocked: a check does not allow one of them.
            Overloaded: a check failed, and the policy requires it.
        """
        for check in self.screen.asked_checks:
            names = await self.compute(partial(self._checks.names, check, self.digest, texts))
            new = dict.fromkeys(texts[self._checks.num_passed(names) :])
            try:
                verdict = await self._ask(check, Question("user", "\n\n".join(new)))
            except CheckFailed:
                self._note("input", f"failed:{check.name}", 1)
                if check.on_failure == "pass":
                    continue
                raise Overloaded(
                    f"the check {check.name} does not answer, and the policy requires it",
                    retry_after_s=_RETRY_S,
                ) from None
            if verdict.is_flagged:
                self._note("input", check.name, 1)
                raise Blocked("the request", check.name)
            if names:
                self._checks.passed(names[-1])

    async def refusal_of(self, text: str) -> str:
        """The name of the check that disallows a part of an answer; empty if none does."""
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
        """The verdict on a text of any length, piece by piece up to the first flagged one. Raises CheckFailed."""
        found: list[Verdict] = []
        text = question.text
        if text.strip():
            for start in range(0, max(1, len(text) - _PIECE_OVERLAP), _PIECE - _PIECE_OVERLAP):
                piece = replace(question, text=text[start : start + _PIECE])
                found.append(await self._checks.verdict(check, piece, self._key, count))
                if found[-1].is_flagged:
                    break
        return together(found)

    async def moderate(self, text: str, name: str | None, count: CountTokens) -> Verdict:
        """The verdict of the input checks on a text.

        Args:
            name: the only check to ask; None for all.
            count: counts the models' tokens.

        Raises:
            Overloaded: a check does not answer.
        """
        found: list[Verdict] = []
        for check in self.policy.input:
            if name not in (None, check.name):
                continue
            if isinstance(check, ListCheck):
                found.append(await self._checks.compute(self.tenant, partial(check.words.judge, text)))
                continue
            try:
                found.append(await self._ask(check, Question("user", text), count))
            except CheckFailed as error:
                raise Overloaded(f"the check {check.name} failed: {error}", retry_after_s=_RETRY_S) from None
        return together(found)

    def answer(self) -> ScreenedAnswer:
        """Start the checks of an answer."""
        return ScreenedAnswer(self)

    async def compute(self, call: Callable[[], T]) -> T:
        """Run a computing check in a thread."""
        return await self._checks.compute(self.tenant, call)


def screening_of(caller: Caller) -> Screening | None:
    """The screening of a request; None: nothing is checked."""
    return next((watch for watch in caller.watches if isinstance(watch, Screening)), None)


class ScreenedAnswer:
    """Checks the events of one answer in order."""

    def __init__(self, screening: Screening) -> None:
        self._screening = screening
        self._answer = screening.screen.answer()
        self._kind: type[TextDelta | ReasoningDelta] | None = None
        self._stretch: TextScreen | None = None
        self._calls: dict[int, tuple[ToolCallBegin, list[str]]] = {}

    @property
    def is_blocked(self) -> bool:
        """Whether the rest of the answer is withheld."""
        return bool(self._answer.blocked_by)

    async def take(self, events: Sequence[Event]) -> list[Event]:
        """Take events; return those that may be sent."""
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
        """Take more of an answer that is only text."""
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
        """Check a whole call; one that the token limit cut off has no end."""
        begin, pieces = self._calls.pop(index)
        check = partial(self._answer.call, begin.name, "".join(pieces))
        arguments, question = await self._screening.compute(check)
        if not self.is_blocked and (reason := await self._screening.refusal_of(question)):
            self._answer.block(reason)
        if self.is_blocked:
            return []
        made: list[Event] = [begin, ToolCallArguments(index, arguments)]
        return made if end is None else [*made, end]


def _merged(events: Sequence[Event]) -> Iterator[Event]:
    """The events, with consecutive deltas of the same kind joined."""
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


def _joined(steps: Sequence[Step]) -> Iterator[Step]:
    """The steps, with consecutive steps of the same answer joined so that they are checked together."""
    last: Said | None = None
    for step in steps:
        if isinstance(step, Said) and last is not None and last.answer == step.answer:
            last = Said(step.answer, (*last.events, *step.events), last.text + step.text, None)
            continue
        if last is not None:
            yield last
        last = step if isinstance(step, Said) else None
        if last is None:
            yield step
    if last is not None:
        yield last


async def _screened(step: Step, answers: Answers, screened: Sequence[ScreenedAnswer]) -> list[Step]:
    """The parts of a step that pass the checks."""
    if isinstance(step, Progress):
        return [step]
    number, answer = step.answer, screened[step.answer]
    made: list[Step] = []
    events: list[Event] = []
    is_end, text = isinstance(step, Ended), ""
    if not answers.is_parsed(number):
        text = await answer.take_text("" if isinstance(step, Ended) else step.text, is_end=is_end)
    elif isinstance(step, Ended):
        events = await answer.finish()
    else:
        events = await answer.take(step.events)
    if events or text:
        made.append(Said(number, tuple(events), text, None))
    if isinstance(step, Ended):
        return [*made, replace(step, finish="content_filter") if answer.is_blocked else step]
    if answer.is_blocked:
        answers.block(number)
    return made


def _decoded(service: Service, token_ids: Sequence[int]) -> str:
    return "" if service.tokenizer is None else service.tokenizer.decode(token_ids, keep_special=True)


def _heard(request: ModelRequest, service: Service, caller: Caller) -> ModelRequest:
    """The request, with sounds that the model gets as text replaced by transcripts."""
    if not isinstance(request, ChatRequest) or service.model.hears != "transcript":
        return request
    heard = service.prompts.with_transcripts(request.messages, tenant=caller.tenant, check=caller.go_on)
    return replace(request, messages=heard)


def _near(request: ModelRequest, service: Service) -> ModelRequest:
    """The request without snippets that cannot fit, because searching their texts takes longer than counting them.

    Raises:
        PromptTooLong: the rest does not fit either.
    """
    prompts = service.prompts
    if isinstance(request, ChatRequest):
        prompts.near.require(shown_of(replace(request, begun_ids=()), partial(_decoded, service)).all_texts())
        return request
    prompts.near.require((request.prompt if isinstance(request.prompt, str) else "", request.suffix or ""))
    if request.snippets is None:
        return request
    kept = prompts.near.snippets(request.snippets)
    return replace(request, snippets=kept, num_left_out=len(request.snippets) - len(kept))
