"""Requests and answers in a form common to all dialects; a dialect only renames fields.

    dialect  ->  ChatRequest, or a text  ->  Service.open  ->  Answers: Progress, Said, Ended  ->  dialect

Prompts are rendered and requests checked in threads that all callers share fairly (`work.py`), answers are stored for
replay in other threads, and steps run in the engine's own thread, so the event loop never waits. No answer keeps the
event loop for longer than a turn, however many of its tokens are ready. Leaving an `Answers` before its end cancels it:
the engine frees its sequences before the next step.

Elsewhere: routes and errors are `app.py` and `gate.py`; the engine's thread is `engine/loop.py`.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, Protocol, TypeVar

from argosy.config import Grammar, SamplingParams
from argosy.engine.loop import AnswerEnd, AnswerToken, Event, LoopFacts, PromptProgress
from argosy.engine.sequence import Result, TokenLogprob
from argosy.errors import ArgosyError
from argosy.prompt.formats.events import Answer, ToolCallBegin, ToolCallEnd, collect
from argosy.prompt.formats.events import Event as SaidEvent
from argosy.prompt.prompt import Prompt
from argosy.serve.fields import ReadOfPrompt
from argosy.serve.gate import Caller, Refused
from argosy.serve.kept_items import KeptItems
from argosy.serve.replaced import Replaced
from argosy.serve.tool_use import ToolChoice, ToolUse
from argosy.serve.work import WorkQueue

if TYPE_CHECKING:
    from argosy.prompt.builder import PromptBuilder
    from argosy.prompt.formats import Parser
    from argosy.prompt.tokenizer import Tokenizer

P = ParamSpec("P")
T = TypeVar("T")

_TURN_S = 0.001  # after this time, an answer whose tokens are ready yields to others

Finish = Literal["stop", "length", "tool_calls"]
MOST_UNREAD = 4096  # events waiting for the client, per request; some MB with log-probabilities


class Loop(Protocol):
    """The part of `EngineLoop` that the server uses."""

    def submit(
        self, prompt: Prompt, params: SamplingParams | None, on_event: Callable[[Event], None], *,
        num_answers: int = 1, tenant: str = "",
    ) -> Any: ...  # fmt: skip

    def cancel(self, request: Any) -> None: ...

    def revoke(self, tenant: str) -> None: ...

    def snapshot(self) -> LoopFacts: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """Facts about the model that clients can see."""

    id: str
    family: str
    context_tokens: int
    num_layers: int
    num_experts: int
    experts_per_token: int
    vocab_size: int
    created: int = field(default_factory=lambda: int(time.time()))


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """A conversation to be answered.

    form: form of an answer without tool calls; None allows any form.
    effort: reasoning effort, if the model's template supports it.
    thinks: whether the model thinks at all; None leaves that to `effort`.
    replaced: notes in the messages that replace blocks that the model cannot read.
    ignored: names of fields that were given and have no effect.
    """

    messages: Sequence[Mapping[str, Any]]
    params: SamplingParams
    tools: Sequence[Mapping[str, Any]] = ()
    tool_choice: ToolChoice = field(default_factory=ToolChoice)
    parallel: bool = True
    form: Grammar | None = None
    effort: str | None = None
    thinks: bool | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    num_answers: int = 1
    replaced: Replaced = field(default_factory=Replaced)
    ignored: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of the prefill, in tokens."""

    processed: int
    total: int
    cached: int

    def as_dict(self) -> ReadOfPrompt:
        """The form for OpenAI's dialects, with llama.cpp's field names."""
        return {"processed": self.processed, "total": self.total, "cache": self.cached}


@dataclass(frozen=True, slots=True)
class Said:
    """The output of one token: events, sampled text and, if requested, its log-probability."""

    answer: int
    events: tuple[SaidEvent, ...]
    text: str
    logprob: TokenLogprob | None


@dataclass(frozen=True, slots=True)
class Ended:
    """The end of one answer."""

    answer: int
    finish: Finish
    result: Result


Step = Progress | Said | Ended


class Service:
    """One model, for all dialects."""

    def __init__(
        self,
        loop: Loop,
        prompts: PromptBuilder,
        tokenizer: Tokenizer | None,
        model: ModelFacts,
        *,
        keep_billing_line: bool = False,
        kept: KeptItems | None = None,
        any_model: bool = False,
    ) -> None:
        self.loop = loop
        self.kept = KeptItems() if kept is None else kept
        self.prompts = prompts
        self.tokenizer = tokenizer
        self.model = model
        self.is_draining = False
        self.keep_billing_line = keep_billing_line
        self._any_model = any_model
        self._work = WorkQueue()
        self._large_work = WorkQueue(num_threads=1, is_large=True)

    def require_model(self, name: str | None) -> None:
        """Check that a request names the served model; None leaves the choice to the server.

        Raises:
            Refused: the request names another model, and the server does not accept every name.
        """
        if name not in (None, self.model.id) and not self._any_model:
            raise Refused(
                404,
                f"the model {json.dumps(name)} does not exist; this server has: {self.model.id}",
                hint="`argosy serve --any-model` accepts every model name",
                param="model",
                code="model_not_found",
            )

    @property
    def has_efforts(self) -> bool:
        """Whether the model's template supports a reasoning effort."""
        return bool(self._effort("medium"))

    def ignored_effort(self, request: ChatRequest) -> bool:
        """Whether the request asks for a reasoning effort that the model's template does not support."""
        return request.effort is not None and not self._effort(request.effort)

    def ignored_switch(self, request: ChatRequest) -> bool:
        """Whether the request switches thinking on or off and the model's template cannot."""
        return request.thinks is not None and not self._switches(request.thinks)

    async def run(self, caller: Caller, call: Callable[P, T], *args: P.args, **named: P.kwargs) -> T:
        """Run the work before the engine in a thread. Raises what `call` raises.

        Raises:
            TooMany: too much work of this caller is already waiting.
        """
        work = self._large_work if caller.has_large_body else self._work
        return await work.run(caller.tenant, call, *args, **named)

    async def open(self, read: Callable[[], ChatRequest], caller: Caller) -> tuple[ChatRequest, Answers]:
        """Read a conversation, render, check and queue it.

        All of this is one job, because each job waits for a thread behind jobs of other keys. Raises what `run`,
        `read`, `PromptBuilder.build` and `EngineLoop.submit` raise.
        """
        events = asyncio.get_running_loop()

        def begin() -> tuple[ChatRequest, Answers]:
            request = read()
            return request, self._open_chat(request, caller, events)

        return await self.run(caller, begin)

    async def open_text(
        self,
        prompt: str | Sequence[int],
        read_params: Callable[[], SamplingParams],
        caller: Caller,
        num_answers: int = 1,
    ) -> Answers:
        """Queue a text, or token ids, for completion. Raises what `open` raises."""
        events = asyncio.get_running_loop()

        def begin() -> Answers:
            params = read_params()
            built = self.prompts.build(Prompt.raw(prompt) if isinstance(prompt, str) else list(prompt))
            return Answers(self, built, params, caller, num_answers, events)

        return await self.run(caller, begin)

    def count_tokens(self, request: ChatRequest, tenant: str) -> int:
        """Count the prompt tokens of a conversation."""
        return len(self._build(request, _tool_use(request), tenant, is_counted=True).token_ids or ())

    def revoke(self, tenant: str) -> None:
        """End all requests of a revoked tenant and delete all of its data."""
        self.loop.revoke(tenant)
        self.prompts.forget(tenant)
        self.kept.forget(tenant)

    def _build(self, request: ChatRequest, use: ToolUse, tenant: str, *, is_counted: bool = False) -> Prompt:
        return self.prompts.build(
            request.messages, tools=use.told, variables=self._variables(request), tenant=tenant, is_counted=is_counted
        )  # fmt: skip

    def _open_chat(self, request: ChatRequest, caller: Caller, events: asyncio.AbstractEventLoop) -> Answers:
        use = _tool_use(request)
        prompt = self._build(request, use, caller.tenant)
        grammar = self.prompts.grammar(
            prompt, use.callable, must_call=use.must_call, parallel=use.parallel, form=request.form
        )
        params = request.params if grammar is None else replace(request.params, grammar=grammar)
        return Answers(self, prompt, params, caller, request.num_answers, events, use)

    def _variables(self, request: ChatRequest) -> dict[str, Any]:
        return self._effort(request.effort) | self._switches(request.thinks) | dict(request.variables)

    def _effort(self, effort: str | None) -> dict[str, Any]:
        """The template variables for `effort`; empty if the template has none."""
        if effort is None:
            return {}
        is_known = "reasoning_effort" in self.prompts.variables
        said = {"reasoning_effort": effort} if is_known and effort != "none" else {}
        return self._switches(effort != "none") | said

    def _switches(self, thinks: bool | None) -> dict[str, Any]:
        """The template variables that switch thinking; empty if the template has none."""
        if thinks is None:
            return {}
        known = self.prompts.variables
        return {name: thinks for name in ("enable_thinking", "thinking") if name in known}


def _tool_use(request: ChatRequest) -> ToolUse:
    return ToolUse.of(request.tools, request.tool_choice, parallel=request.parallel)


class ReadTooSlowly(ArgosyError):
    """A client reads its answer too slowly to keep the rest for it."""

    http_status = 408


class Answers:
    """The answers of one request, as they are made. Use it as a context: leaving it early cancels them.

    At most MOST_UNREAD events may wait for the client; with more, the request ends.
    """

    def __init__(
        self,
        service: Service,
        prompt: Prompt,
        params: SamplingParams,
        caller: Caller,
        num_answers: int,
        events: asyncio.AbstractEventLoop,
        use: ToolUse | None = None,
    ) -> None:
        self.prompt = prompt
        self.num_prompt_tokens = len(prompt.token_ids or ())
        self._service = service
        self._tenant = caller.tenant
        self._use = use = use or ToolUse()
        self._arrived: deque[Event] = deque()
        self._some = asyncio.Event()
        self._is_woken = False  # the event loop will look, so it needs no second signal
        self._parsers: list[Parser] | None = None
        if prompt.text and prompt.trace is not None:
            self._parsers = [service.prompts.parser(prompt, use.callable) for _ in range(num_answers)]
        self._said: list[list[SaidEvent]] = [[] for _ in range(num_answers)]
        self._num_open = num_answers
        self.num_reasoning_tokens = 0  # of all answers
        self.num_new_tokens = 0  # of all answers
        self.num_cached_tokens = 0  # of the prompt
        self.results: list[Result | None] = [None] * num_answers

        self._is_behind = False

        def deliver(event: Event) -> None:
            if isinstance(event, AnswerToken):  # counted here, because the client may be gone
                caller.count(new=1)
            if not self._is_behind and len(self._arrived) >= MOST_UNREAD:
                self._is_behind = True
                events.call_soon_threadsafe(self.cancel)
            if self._is_behind and not isinstance(event, AnswerEnd):
                return
            self._arrived.append(event)
            if not self._is_woken:
                self._is_woken = True
                events.call_soon_threadsafe(self._some.set)

        self._request = service.loop.submit(
            prompt, params, deliver, num_answers=num_answers, tenant=caller.tenant
        )
        caller.count(prompt=self.num_prompt_tokens)

    def said(self, answer: int) -> Answer:
        """The content of an answer so far."""
        return collect(self._said[answer])

    async def __aenter__(self) -> Answers:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()

    def cancel(self) -> None:
        if self._num_open:
            self._service.loop.cancel(self._request)

    async def steps(self) -> AsyncIterator[Step]:
        """Yield every step until the last answer has ended.

        Raises:
            ArgosyError: an answer cannot be finished.
        """
        turn_began = time.monotonic()
        while self._num_open:
            if not self._arrived:
                await self._wait()
                turn_began = time.monotonic()
            elif time.monotonic() - turn_began > _TURN_S:
                await asyncio.sleep(0)
                turn_began = time.monotonic()
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
            if self._arrived:  # checked last: an event after this check wakes us
                return
            await self._some.wait()

    async def _remember(self, end: AnswerEnd) -> None:
        """Store the answer before its end is sent, so the next turn finds it; in a thread, as all of it is read."""
        if self._parsers is not None:
            token_ids, told = end.result.token_ids, self._use.told
            remember, said = self._service.prompts.remember, self.said(end.answer)
            await asyncio.to_thread(remember, self._tenant, self.prompt, token_ids, said, told)

    def _step(self, event: Event) -> list[Step]:
        match event:
            case PromptProgress():
                if event.answer == 0:
                    self.num_cached_tokens = event.cached
                return [Progress(event.processed, event.total, event.cached)] if event.answer == 0 else []
            case AnswerToken(answer=answer, event=token):
                if self.results[answer] is not None:
                    return []
                self.num_new_tokens += 1
                said = self._parse(answer, token.token_id, token.text)
                return [Said(answer, tuple(said), token.text, token.logprob)]
            case AnswerEnd(answer=answer, result=result):
                return self._end(answer, result)

    def _parse(self, answer: int, token_id: int, text: str) -> list[SaidEvent]:
        if self._parsers is None:
            return []
        parser = self._parsers[answer]
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
        if result.finish_reason == "cancelled":
            raise ArgosyError("the answer was cancelled")
        steps: list[Step] = []
        is_cut = result.finish_reason == "length"
        if self._parsers is not None and (
            last := self._keep(answer, self._parsers[answer].finish(is_cut=is_cut))
        ):
            steps.append(Said(answer, tuple(last), "", None))
        finish: Finish = "length" if is_cut else "stop"
        num_begun, num_whole = (
            sum(isinstance(event, kind) for event in self._said[answer])
            for kind in (ToolCallBegin, ToolCallEnd)
        )
        if num_whole == num_begun > 0:
            finish = "tool_calls"
        return [*steps, Ended(answer, finish, result)]


async def steps_of(several: Sequence[Answers]) -> AsyncIterator[tuple[int, Step]]:
    """Yield the steps of several requests as they are made, each with the index of its request.

    Raises:
        ArgosyError: an answer cannot be finished.
    """
    if len(several) == 1:  # a task per token would cost time
        async for step in several[0].steps():
            yield 0, step
        return
    sources = [answers.steps() for answers in several]
    upcoming = {asyncio.ensure_future(anext(source)): at for at, source in enumerate(sources)}
    try:
        while upcoming:
            done, _ = await asyncio.wait(upcoming, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=upcoming.__getitem__):
                at = upcoming.pop(task)
                with suppress(StopAsyncIteration):
                    step = task.result()
                    upcoming[asyncio.ensure_future(anext(sources[at]))] = at
                    yield at, step
    finally:
        for task in upcoming:
            task.cancel()
        await asyncio.gather(*upcoming, return_exceptions=True)
