"""The answers of one request as they are generated: engine events become steps, which a dialect turns into its
events.

    engine's thread  ─ Event ─>  Answers: parsed and passed by the policy  ─ Progress, Said, Ended ─>  dialect

No answer holds the event loop for longer than a turn, however many of its tokens are ready. Answers are stored for
replay in threads. Cancelling an `Answers` early makes the engine free its sequences before the next step.

Elsewhere: `opening.py` makes the prompts; the engine's thread is `engine/loop.py`.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal, cast

from argosy.config import SamplingParams
from argosy.engine.loop import AnswerEnd, AnswerToken, EngineLoop, Event, PromptProgress, Request
from argosy.engine.sequence import Result, TokenLogprob
from argosy.errors import ArgosyError
from argosy.prompt.formats.events import Event as SaidEvent
from argosy.prompt.formats.events import ToolCallBegin, ToolCallEnd, collect
from argosy.prompt.prompt import Prompt
from argosy.serve.answer.request import media_tokens
from argosy.serve.answer.tool_use import ToolUse
from argosy.serve.answer.usage import PromptTokens, ReadOfPrompt
from argosy.serve.http.caller import Caller

if TYPE_CHECKING:
    from argosy.prompt.builder import PromptBuilder
    from argosy.prompt.formats import Parser

_TURN_S = 0.001  # after this time, an answer with tokens ready yields to others
Finish = Literal["stop", "length", "tool_calls", "content_filter"]
MOST_UNREAD = 4096  # events waiting for the client, per request; a few MB with log-probabilities


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of the prefill; see `PromptProgress`."""

    processed: int
    total: int
    cached: int
    encoded: float | None

    def as_dict(self) -> ReadOfPrompt:
        """The JSON for OpenAI's dialects, with llama.cpp's field names."""
        made: ReadOfPrompt = {"processed": self.processed, "total": self.total, "cache": self.cached}
        return made if self.encoded is None else {**made, "encoded": round(self.encoded, 3)}


@dataclass(frozen=True, slots=True)
class Said:
    """The output of one token: events, sampled text and, if requested, its log-probability.

    token_ids: the token, or those with which the answer began; empty where a policy may change the answer.
    """

    answer: int
    events: tuple[SaidEvent, ...]
    text: str
    logprob: TokenLogprob | None
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Ended:
    """The end of one answer."""

    answer: int
    finish: Finish
    result: Result


Step = Progress | Said | Ended
During = Callable[["Answers"], AsyncGenerator[Step, None]]


class ReadTooSlowly(ArgosyError):
    """A client reads its answer too slowly for the server to buffer the rest."""

    http_status = 408


class Answers:
    """The answers of one request as they are generated, numbered from 0 in the order of their prompts.

    At most MOST_UNREAD events per prompt may wait for the client; beyond that the request ends.

    Args:
        during: selects the steps to send from those that `own_steps` yields.
        adapter: the name of the adapter that answers; None: the model does without one.

    Attributes:
        results: for each answer, None until its end.
        tells_token_ids: the client may see token ids, because nothing withholds or changes their text.
        unused_adapter: the adapter that a prompt does not invoke, so that the base answers it; None: there is none.
    """

    def __init__(
        self, loop: EngineLoop, prompts: PromptBuilder, caller: Caller, events: asyncio.AbstractEventLoop,
        *, during: During = lambda answers: answers.own_steps(), tells_token_ids: bool = True,
        adapter: str | None = None,
    ) -> None:  # fmt: skip
        self.prompts: list[Prompt] = []
        self.results: list[Result | None] = []
        self.num_prompt_tokens = 0  # over all prompts, like the next fields
        self.num_new_tokens = 0
        self.num_reasoning_tokens = 0
        self.tells_token_ids = tells_token_ids
        self._loop, self._prompts, self._caller, self._events = loop, prompts, caller, events
        self._during, self._adapter = during, adapter
        self.unused_adapter: str | None = None
        self._requests: list[Request] = []
        self._num_cached: dict[int, int] = {}  # by first answer
        self._parsers: list[Parser | None] = []
        self._said: list[list[SaidEvent]] = []
        self._num_open = 0
        self._use = ToolUse()
        self._arrived: deque[Event] = deque()
        self._some = asyncio.Event()
        self._is_woken = False  # the event loop will look, so it needs no further signal
        self._is_behind = False
        self._is_left = False  # prompts still being queued end at once
        self._fault: Exception | None = None  # raised by a watch; no more events come
        self._blocked: set[int] = set()
        self._begun_ids: tuple[int, ...] = ()  # tokens with which every answer began
        self._begun: list[Step] = []  # and their text

    def add(self, prompt: Prompt, params: SamplingParams, use: ToolUse, num_answers: int) -> None:
        """Queue a prompt in the engine; only a conversation, which has a single prompt, has tools.

        Any thread may call this before `steps`. Raises what `EngineLoop.submit` raises.
        """
        first, is_parsed = len(self.results), prompt.text and prompt.trace is not None
        for _ in range(num_answers):
            self._parsers.append(self._prompts.parser(prompt, use.callable) if is_parsed else None)
            self._said.append([])
            self.results.append(None)
        self.prompts.append(prompt)
        self._num_cached[first] = 0
        self._use = use
        caller = self._caller
        for watch in caller.watches:
            watch.queued(num_answers, is_chat=prompt.trace is not None)

        def deliver(event: Event) -> None:
            try:
                self._tell_watches(first, event)  # told here, because the client may be gone
            except Exception as error:
                self._fault = error
                self._events.call_soon_threadsafe(self._some.set)
                raise  # the loop reports it and ends the request
            if not self._is_behind and len(self._arrived) >= MOST_UNREAD * len(self.prompts):
                self._is_behind = True
                self._events.call_soon_threadsafe(self.cancel)
            if self._is_behind and not isinstance(event, AnswerEnd):
                return
            self._arrived.append(event if first == 0 else replace(event, answer=first + event.answer))
            if not self._is_woken:
                self._is_woken = True
                self._events.call_soon_threadsafe(self._some.set)

        request = self._loop.submit(
            prompt, params, deliver, num_answers=num_answers, tenant=caller.tenant, name=caller.request_id,
            adapter=self._adapter,
        )  # fmt: skip
        if self._adapter is not None and not request.has_adapter:
            self.unused_adapter = self._adapter
        self._requests.append(request)
        self._num_open += num_answers
        if self._is_left:  # the client left while a thread was queueing this prompt
            self._loop.cancel(request)
        if prompt.num_answered:
            self._begun_ids = (prompt.token_ids or ())[-prompt.num_answered :]
            keeps_special = not params.skip_special_tokens
            for number in range(first, first + num_answers):
                parser = self._parsers[number]
                assert parser is not None
                said = self._keep(number, self._prompts.begun(prompt, parser, keep_special=keeps_special))
                told = self._begun_ids if self.tells_token_ids else ()
                self._begun.append(Said(number, tuple(said), "", None, told))
        num_tokens = len(prompt.token_ids or ())
        self.num_prompt_tokens += num_tokens
        self._caller.count(prompt=num_tokens)

    def _tell_watches(self, first: int, event: Event) -> None:
        for watch in self._caller.watches:
            if isinstance(event, AnswerToken):
                watch.token(first + event.answer)
            elif isinstance(event, AnswerEnd):
                watch.ended(first + event.answer, event.result)

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens found in the prefix cache."""
        return sum(self._num_cached.values())

    def prompt_tokens(self) -> PromptTokens:
        """The breakdown of prompt tokens that OpenAI's dialects report."""
        return cast(PromptTokens, {"cached_tokens": self.num_cached_tokens, **media_tokens(self.prompts)})

    def cancel(self) -> None:
        """End all unfinished answers, including those that a thread is still queueing."""
        self._is_left = True
        for request in self._requests if self._num_open else ():
            self._loop.cancel(request)

    @property
    def has_more(self) -> bool:
        """Whether the next step is ready."""
        return bool(self._arrived)

    def is_parsed(self, answer: int) -> bool:
        """Whether the steps of an answer contain events, rather than only text."""
        return self._parsers[answer] is not None

    def block(self, answer: int) -> None:
        """End an answer as filtered, and stop the engine's work once no other answer is open."""
        self._blocked.add(answer)
        if all(result is not None or at in self._blocked for at, result in enumerate(self.results)):
            self.cancel()

    def steps(self) -> AsyncGenerator[Step, None]:
        """Yield every step that the check passes, until the last answer has ended.

        Raises:
            ArgosyError: an answer cannot be finished.
        """
        return self._during(self)

    async def own_steps(self) -> AsyncGenerator[Step, None]:
        """Yield every step, regardless of the check. Raises what `steps` raises."""
        for begun in self._begun:
            yield begun
        turn_began = time.monotonic()
        while self._num_open:
            if not self._arrived:
                await self._wait()
                turn_began = time.monotonic()
            elif time.monotonic() - turn_began > _TURN_S:
                await asyncio.sleep(0)
                turn_began = time.monotonic()
            if not self._arrived and self._fault is not None:
                raise self._fault
            event = self._arrived.popleft()
            steps = self._step(event)
            if isinstance(event, AnswerEnd):
                await self._remember(event)
            for step in steps:
                yield step

    async def _wait(self) -> None:
        """Wait for the next event."""
        while True:
            self._some.clear()
            self._is_woken = False
            # checked last, because an event after this check wakes us
            if self._arrived or self._fault is not None:
                return
            await self._some.wait()

    async def _remember(self, end: AnswerEnd) -> None:
        """Store the answer before its end is sent, so that the next turn finds it; in a thread, because it may be
        long.
        """
        if self._parsers[end.answer] is not None and end.answer not in self._blocked:
            tenant, token_ids, said = (
                self._caller.tenant,
                [*self._begun_ids, *end.result.token_ids],
                collect(self._said[end.answer]),
            )
            remember = self._prompts.remember
            await asyncio.to_thread(
                self._caller.work, partial(remember, tenant, self.prompts[0], token_ids, said, self._use.told)
            )

    def _step(self, event: Event) -> list[Step]:
        match event:
            case PromptProgress():
                if event.answer not in self._num_cached:
                    return []
                self._num_cached[event.answer] = event.cached
                return [Progress(event.processed, event.total, event.cached, event.encoded)]
            case AnswerToken(answer=answer, event=token):
                if self.results[answer] is not None:
                    return []
                self.num_new_tokens += 1
                said = self._parse(answer, token.token_id, token.text)
                told = (token.token_id,) if self.tells_token_ids else ()
                return [Said(answer, tuple(said), token.text, token.logprob, told)]
            case AnswerEnd(answer=answer, result=result):
                return self._end(answer, result)

    def _parse(self, answer: int, token_id: int, text: str) -> list[SaidEvent]:
        parser = self._parsers[answer]
        if parser is None:
            return []
        was_reasoning = parser.is_reasoning
        events = parser.push(token_id, text)
        self.num_reasoning_tokens += was_reasoning or parser.is_reasoning
        return self._keep(answer, events)

    def _keep(self, answer: int, events: list[SaidEvent]) -> list[SaidEvent]:
        if not self._use.parallel:
            # The grammar does not cover a call that began inside thoughts, or a call after it.
            events = [event for event in events if not getattr(event, "index", 0)]
        self._said[answer] += events
        return events

    def _end(self, answer: int, result: Result) -> list[Step]:
        self._num_open -= 1
        self.results[answer] = result
        if result.error is not None:
            raise result.error
        if self._is_behind:
            raise ReadTooSlowly(
                f"the client read the answer too slowly: more than {MOST_UNREAD} events waited",
                hint="read faster, or request fewer answers and no log-probabilities",
            )
        if answer in self._blocked:
            return [Ended(answer, "content_filter", result)]
        if result.finish_reason == "cancelled":
            raise ArgosyError("the answer was cancelled")
        steps: list[Step] = []
        is_cut, parser = result.finish_reason == "length", self._parsers[answer]
        if parser is not None and (last := self._keep(answer, parser.finish(is_cut=is_cut))):
            steps.append(Said(answer, tuple(last), "", None))
        finish: Finish = "length" if is_cut else "stop"
        num_begun, num_whole = (
            sum(isinstance(event, kind) for event in self._said[answer])
            for kind in (ToolCallBegin, ToolCallEnd)
        )
        if num_whole == num_begun > 0:
            finish = "tool_calls"
        return [*steps, Ended(answer, finish, result)]
